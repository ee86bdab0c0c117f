//! Completions and manual pages are read by the programs that they are for.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn kubelane(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_kubelane")).args(arguments).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// `None`: there is no such program here.
fn feed(program: &str, arguments: &[&str], input: &str) -> Option<Output> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().ok()?;
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_owned();
    let writer = std::thread::spawn(move || drop(stdin.write_all(input.as_bytes())));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    Some(output)
}

#[test]
fn each_shell_reads_its_completions() {
    for (shell, arguments) in [("bash", &["-n"][..]), ("zsh", &["-n"]), ("fish", &["--no-execute"])] {
        let script = kubelane(&["completion", shell]);
        for word in ["explain", "sort-by", "pin-path", "affinities"] {
            assert!(script.contains(word), "{shell}: no {word}");
        }
        match feed(shell, arguments, &script) {
            Some(read) => assert!(read.status.success() && read.stderr.is_empty(), "{shell}: {read:?}"),
            None => println!("{shell} is not here: its completions were not read"),
        }
    }
    let broken =
        feed("bash", &["-n"], &(kubelane(&["completion", "bash"]) + "\nif then\n")).expect("bash is everywhere");
    assert!(!broken.status.success(), "it does read");
}

/// What bash offers at the end of this line.
fn offered(line: &str) -> Vec<String> {
    let script = kubelane(&["completion", "bash"]);
    let words: Vec<&str> = line.split(' ').collect();
    let ask = format!(
        "{script}\nCOMP_WORDS=({line}{})\nCOMP_CWORD={}\n_kubelane kubelane \"${{COMP_WORDS[COMP_CWORD]}}\" \
         \"${{COMP_WORDS[COMP_CWORD-1]}}\"\nprintf '%s\\n' \"${{COMPREPLY[@]}}\"\n",
        if line.ends_with(' ') { "''" } else { "" },
        words.len() - 1
    );
    let output = feed("bash", &["--norc"], &ask).unwrap();
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn bash_offers_subcommands_kinds_and_flags() {
    assert_eq!(offered("kubelane expl"), ["explain"]);
    assert_eq!(offered("kubelane get fl"), ["flows"]);
    assert!(offered("kubelane get flows --").contains(&"--service".to_owned()));
}

#[test]
fn man_reads_every_page_without_a_warning() {
    let directory = tempfile::tempdir().unwrap();
    kubelane(&["man", "--directory", directory.path().to_str().unwrap()]);
    let mut pages: Vec<_> = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    pages.sort();
    let names: Vec<_> = pages.iter().map(|page| page.file_name().unwrap().to_string_lossy().into_owned()).collect();
    for name in ["kubelane.8", "kubelane-explain.8", "kubelane-get.8", "kubelane-run.8"] {
        assert!(names.iter().any(|known| known == name), "{name}: {names:?}");
    }
    let is_there = |program: &str| Path::new("/usr/bin").join(program).exists();
    for page in &pages {
        let text = std::fs::read_to_string(page).unwrap();
        assert!(text.contains(".TH kubelane"), "{}", page.display());
        if !is_there("groff") {
            println!("groff is not here: {} was not read", page.display());
            continue;
        }
        let read = feed("groff", &["-man", "-Tutf8", "-ww", "-z", "-Kutf8"], &text).unwrap();
        assert!(read.status.success() && read.stderr.is_empty(), "{}: {read:?}", page.display());
    }
    assert_eq!(
        kubelane(&["man", "explain"]),
        std::fs::read_to_string(directory.path().join("kubelane-explain.8")).unwrap()
    );
    let unknown = Command::new(env!("CARGO_BIN_EXE_kubelane")).args(["man", "nothing"]).output().unwrap();
    assert_eq!(unknown.status.code(), Some(2));
}
