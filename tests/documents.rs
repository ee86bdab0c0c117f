//! SECURITY.md, CONTRIBUTING.md and CHANGELOG.md: what they name exists, and the changes are in the form that releases
//! take their notes from.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

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
