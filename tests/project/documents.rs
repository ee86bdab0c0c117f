//! The documents agree with the code: docs/REFERENCE.md has every command, flag, metric and verdict and no others; README.md
//! is short; what SECURITY.md and CONTRIBUTING.md name exists; CHANGELOG.md has the form that releases take their notes from.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use clap::CommandFactory as _;
use kubelane::abi::counter;
use kubelane::cli::Cli;
use kubelane::serve::Metrics;

const README_LINES: usize = 250;
const HEADINGS: [&str; 6] = ["Action required", "New", "Changed", "Deprecated", "Removed", "Metrics"];

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(name: &str) -> String {
    fs::read_to_string(repository().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Every `.rs` file below a directory.
fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The names of all functions that are tests.
fn tests() -> BTreeSet<String> {
    let mut files = Vec::new();
    sources(&repository().join("tests"), &mut files);
    sources(&repository().join("src"), &mut files);
    let mut names = BTreeSet::new();
    for file in files {
        let text = fs::read_to_string(file).unwrap();
        let mut is_test = false;
        for line in text.lines().map(str::trim_start) {
            is_test |= line.starts_with("#[test]") || line.starts_with("#[tokio::test");
            let name = line.trim_start_matches("async ").strip_prefix("fn ").and_then(|rest| rest.split('(').next());
            if let Some(name) = name.filter(|_| std::mem::take(&mut is_test)) {
                names.insert(name.to_owned());
            }
        }
    }
    names
}

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// A document without its code blocks, in which flags may be other programs'.
fn prose(text: &str) -> String {
    text.split("```").step_by(2).collect()
}

/// Whether this is the start of a command line of a program that is not ours.
fn is_foreign(span: &str) -> bool {
    let program = span.split_whitespace().next().unwrap_or_default();
    ["docker", "kube-proxy", "kubeadm", "kubectl", "skopeo", "sysctl", "systemctl"].contains(&program)
}

/// The flags that a document names between backticks, without their values: "--devices".
fn named_flags(text: &str) -> BTreeSet<String> {
    let prose = prose(text);
    let spans = quoted(&prose).filter(|span| !is_foreign(span));
    let words = spans.flat_map(str::split_whitespace).filter(|word| word.starts_with("--"));
    words.map(|word| word.split('=').next().unwrap().to_owned()).collect()
}

/// The long flags of a command and their visible aliases.
fn flags_of(command: &clap::Command) -> BTreeSet<String> {
    let mut names: Vec<&str> = command.get_arguments().filter_map(clap::Arg::get_long).collect();
    names.extend(command.get_arguments().filter_map(clap::Arg::get_visible_aliases).flatten());
    names.into_iter().map(|name| format!("--{name}")).filter(|name| name != "--help").collect()
}

fn command_line() -> clap::Command {
    let mut all = Cli::command();
    all.build();
    all
}

/// The names in backticks in the first column of a document's tables, of rows that begin with one of these.
fn first_column(text: &str, starts: &[&str]) -> BTreeSet<String> {
    let cells = text.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    cells.filter(|cell| starts.iter().any(|start| cell.starts_with(start))).map(str::to_owned).collect()
}

/// What is in one set only, with the name of that set.
fn differences(documented: &BTreeSet<String>, real: &BTreeSet<String>) -> Vec<String> {
    let only = |a: &BTreeSet<String>, b: &BTreeSet<String>, whose: &str| -> Vec<String> {
        a.difference(b).map(|name| format!("{name} is in {whose} only")).collect()
    };
    [only(documented, real, "the reference"), only(real, documented, "the code")].concat()
}

/// The metrics that the code registers: those of a fresh registry that have samples, and every name in a string of `src`.
fn registered_metrics() -> BTreeSet<String> {
    let text = Metrics::new().unwrap().text().unwrap();
    let mut names: BTreeSet<String> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).map(str::to_owned).collect();
    let mut files = Vec::new();
    sources(&repository().join("src"), &mut files);
    for file in files.iter().filter(|file| !file.to_string_lossy().ends_with("tests.rs")) {
        let text = fs::read_to_string(file).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        names.extend(code.split('"').filter(|string| is_metric(string)).map(str::to_owned));
    }
    // A histogram's series are no metrics of their own.
    let is_series = |name: &String| {
        let bases = ["_bucket", "_count", "_sum"].iter().filter_map(|end| name.strip_suffix(end));
        bases.into_iter().any(|base| names.contains(base))
    };
    names.iter().filter(|name| !is_series(name)).cloned().collect()
}

/// "kubelane_flows"; "kubelane_trial" is a BPF program, and what ends in an underscore is only a part of a name.
fn is_metric(text: &str) -> bool {
    let is_word = text.chars().all(|c| c.is_ascii_lowercase() || c == '_') && !text.ends_with('_');
    is_word && text != "kubelane_trial" && ["kubelane_", "kubeproxy_"].iter().any(|start| text.starts_with(start))
}

#[test]
fn the_reference_has_every_flag_and_names_no_other() {
    let text = read("docs/REFERENCE.md");
    let named = named_flags(&text);
    let all = command_line();
    let run = flags_of(all.find_subcommand("run").unwrap());
    assert!(run.len() > 80, "the flags are found: {run:?}");
    let (_, section) = text.split_once("\n## Flags of `kubelane run`\n").unwrap();
    let listed = named_flags(section.split("\n## ").next().unwrap());
    let missing: Vec<_> = run.difference(&listed).collect();
    assert!(missing.is_empty(), "docs/REFERENCE.md lacks flags of `kubelane run`: {missing:?}");
    let plugin = read("plugin/kubectl-kubelane");
    let known: BTreeSet<String> = all.get_subcommands().flat_map(flags_of).collect();
    let is_unknown = |flag: &&String| !known.contains(*flag) && !plugin.contains(&format!("{flag})"));
    let unknown: Vec<_> = named.iter().filter(is_unknown).collect();
    assert!(unknown.is_empty(), "docs/REFERENCE.md names flags that do not exist: {unknown:?}");
}

#[test]
fn the_reference_has_the_defaults_of_the_flags() {
    let text = read("docs/REFERENCE.md");
    let all = command_line();
    for arg in all.find_subcommand("run").unwrap().get_arguments().filter(|arg| !arg.is_hide_set()) {
        let Some(name) = arg.get_long() else { continue };
        let row = text.lines().find(|line| line.starts_with('|') && line.contains(&format!("`--{name}")));
        for default in arg.get_default_values().iter().filter_map(|value| value.to_str()) {
            let cell = row.and_then(|row| row.split('|').nth(2)).unwrap_or_default().trim().trim_matches('`');
            let is_said = cell == default || default.is_empty() || (default == "false" && cell == "off");
            assert!(is_said, "--{name}: the default is {default:?}, the reference says {cell:?}");
        }
    }
}

#[test]
fn the_reference_has_every_command_and_names_no_other() {
    let named: BTreeSet<String> =
        first_column(&read("docs/REFERENCE.md"), &["kubelane "]).iter().map(|cell| second_word(cell)).collect();
    let all = command_line();
    let real = all.get_subcommands().map(|command| command.get_name().to_owned()).filter(|name| name != "help");
    let differences = differences(&named, &real.collect());
    assert!(differences.is_empty(), "{differences:#?}");
    let get = all.find_subcommand("get").unwrap();
    let what = get.get_arguments().find(|arg| arg.get_id() == "what").unwrap();
    let rows: String = read("docs/REFERENCE.md").lines().filter(|line| line.starts_with("| `kubelane get ")).collect();
    for kind in what.get_possible_values() {
        let name = kind.get_name();
        assert!(quoted(&rows).any(|span| span.ends_with(name)), "the reference lacks `kubelane get {name}`");
    }
}

fn second_word(text: &str) -> String {
    text.split_whitespace().nth(1).unwrap_or_default().to_owned()
}

#[test]
fn the_reference_has_every_metric_and_verdict_and_names_no_other() {
    let text = read("docs/REFERENCE.md");
    let metrics = first_column(&text, &["kubelane_", "kubeproxy_", "process_"]);
    let differences_of_metrics = differences(&metrics, &registered_metrics());
    assert!(differences_of_metrics.is_empty(), "{differences_of_metrics:#?}");
    for word in quoted(&prose(&text)).map(|span| span.split(['{', ' ']).next().unwrap()).filter(|word| is_metric(word))
    {
        assert!(metrics.contains(word), "the reference names {word}");
    }
    let (_, verdicts) = text.split_once("| verdict | meaning |\n|---|---|\n").unwrap();
    let rows: String =
        verdicts.lines().take_while(|line| line.starts_with('|')).map(|line| format!("{line}\n")).collect();
    let real = counter::NAMES.iter().map(|(name, _)| (*name).to_owned()).collect();
    let differences_of_verdicts = differences(&first_column(&rows, &[""]), &real);
    assert!(differences_of_verdicts.is_empty(), "{differences_of_verdicts:#?}");
}

#[test]
fn readme_is_short_and_has_the_two_commands() {
    let text = read("README.md");
    let lines = text.lines().count();
    assert!(lines < README_LINES, "README.md has {lines} lines, and at most {} are allowed", README_LINES - 1);
    for command in ["make demo", "make test"] {
        assert!(text.contains(&format!("\n```\n{command}\n```\n")), "README.md lacks a code block with {command}");
    }
}

/// The places inside a document that links lead to, as GitHub names them.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = prose(text);
    let headings =
        headings.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim());
    let anchor = |heading: &str| -> String {
        let kept = heading.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
        kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
    };
    headings.map(anchor).collect()
}

#[test]
fn every_link_between_the_documents_leads_somewhere() {
    let documents = [
        "README.md",
        "ARCHITECTURE.md",
        "SECURITY.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/REFERENCE.md",
        "manifests/MIGRATION.md",
        "manifests/chart/README.md",
        "benches/RESULTS.md",
    ];
    let mut found = 0;
    for document in documents {
        let text = read(document);
        let directory = repository().join(document).parent().unwrap().to_owned();
        for link in prose(&text).split("](").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            if link.starts_with("https://") {
                continue;
            }
            found += 1;
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { repository().join(document) } else { directory.join(path) };
            assert!(target.exists(), "{document} links to {link}");
            if !anchor.is_empty() {
                let anchors = anchors(&fs::read_to_string(&target).unwrap());
                assert!(anchors.contains(anchor), "{document} links to {link}; there are {anchors:?}");
            }
        }
    }
    assert!(found > 30, "the links are found: {found}");
}

#[test]
fn what_the_reference_lacks_and_what_the_code_lacks_is_told_apart() {
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
    let found = differences(&set(&["a", "b"]), &set(&["b", "c"]));
    assert_eq!(found, ["a is in the reference only", "c is in the code only"]);
    let text = "`--known FILE`, `kubectl --theirs`, `kubelane --config=/x`\n```\n`--block`\n```\n";
    assert_eq!(named_flags(text), set(&["--known", "--config"]));
    assert_eq!(anchors("# Flags of `kubelane run`\n## A b\n"), set(&["flags-of-kubelane-run", "a-b"]));
}

fn is_test_name(word: &&str) -> bool {
    let is_sentence = word.matches('_').count() > 3;
    is_sentence && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

#[test]
fn every_test_that_the_threat_model_names_exists() {
    let text = read("SECURITY.md");
    let known = tests();
    let named: Vec<&str> = quoted(&text).filter(is_test_name).collect();
    assert!(named.len() > 30, "the names are found: {named:?}");
    let unknown: Vec<&&str> = named.iter().filter(|name| !known.contains(**name)).collect();
    assert!(unknown.is_empty(), "SECURITY.md names tests that do not exist: {unknown:#?}");
}

#[test]
fn every_path_that_the_guides_name_exists_and_every_make_target_too() {
    let makefiles = ["Makefile", "tests/vm/vm.mk", "benches/bench.mk", "tests/fuzz/fuzz.mk", "release/release.mk"]
        .map(read)
        .concat();
    for guide in ["SECURITY.md", "CONTRIBUTING.md"] {
        let text = read(guide);
        let words = quoted(&text).filter(|word| !word.contains("target/"));
        for word in words.filter(|word| !word.contains(char::is_whitespace) && word.contains('/')) {
            if word.starts_with('/') {
                continue;
            }
            assert!(repository().join(word).exists(), "{guide} names {word}");
        }
        for target in quoted(&text).filter_map(|word| word.strip_prefix("make ")) {
            let rule = format!("\n{target}:");
            assert!(makefiles.contains(&rule), "{guide} names make {target}");
        }
    }
}

/// A version's heading is "Unreleased", or `0.2.0 - 2026-12-31`.
fn is_version(heading: &str) -> bool {
    let Some((version, date)) = heading.split_once(" - ") else { return heading == "Unreleased" };
    let numbers = |text: &str, by: char| text.split(by).all(|part| part.parse::<u32>().is_ok());
    let is_date = date.len() == 10 && date.matches('-').count() == 2 && numbers(date, '-');
    version.matches('.').count() == 2 && numbers(version, '.') && is_date
}

#[test]
fn changes_are_told_by_version_under_the_six_headings_in_their_order() {
    let text = read("CHANGELOG.md");
    let versions: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("## ")).collect();
    assert_eq!(versions.first(), Some(&"Unreleased"));
    assert!(versions.iter().all(|heading| is_version(heading)), "{versions:?}");
    for version in text.split("\n## ").skip(1) {
        let headings: Vec<&str> = version.lines().filter_map(|line| line.strip_prefix("### ")).collect();
        let expected: Vec<&str> = HEADINGS.into_iter().filter(|heading| headings.contains(heading)).collect();
        assert_eq!(headings, expected, "{}", version.lines().next().unwrap());
        for part in version.split("\n### ").skip(1) {
            assert!(part.contains("\n- "), "a heading without an entry: {}", part.lines().next().unwrap());
        }
    }
}

#[test]
fn a_release_takes_its_versions_notes_and_no_others_and_fails_without() {
    let notes = |version: &[&str]| {
        std::process::Command::new(repository().join("release/notes")).args(version).output().unwrap()
    };
    let unreleased = notes(&[]);
    let said = String::from_utf8(unreleased.stdout).unwrap();
    assert!(unreleased.status.success() && said.starts_with("## Unreleased\n") && said.contains("\n- "), "{said}");
    assert_eq!(said.matches("\n## ").count(), 0, "one version: {said}");
    for unknown in ["9.9.9", ".*"] {
        let output = notes(&[unknown]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(unknown), "{said}");
    }
}

#[test]
fn versions_that_are_none_are_told_apart() {
    for good in ["Unreleased", "0.2.0 - 2026-12-31"] {
        assert!(is_version(good), "{good}");
    }
    for bad in ["0.2.0", "0.2 - 2026-12-31", "0.2.0 - soon", "unreleased", "0.2.x - 2026-12-31", "0.2.0 - 2026-1-1"] {
        assert!(!is_version(bad), "{bad}");
    }
}
