//! What the verifiers of other kernels say: the guests of the last `make test-vm` leave it in their logs.

use std::fs;

use anyhow::{Context as _, Result, ensure};

use crate::laboratory::figures::{Found, release_line};

const LOGS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/vm/run");

/// Release line and programs of each kernel.
pub fn programs() -> Result<Vec<(String, Vec<Found>)>> {
    let entries = fs::read_dir(LOGS).with_context(|| format!("no guests have run: {LOGS}"))?;
    let mut all = Vec::new();
    for entry in entries {
        let directory = entry.with_context(|| format!("reading {LOGS}"))?.path();
        if !directory.is_dir() {
            continue;
        }
        let read = |name: &str| {
            let path = directory.join(name);
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
        };
        let found = parse(&read("log")?);
        ensure!(!found.is_empty(), "{} names no program", directory.join("log").display());
        all.push((release_line(read("version")?.trim()), found));
    }
    ensure!(!all.is_empty(), "no guests have left logs in {LOGS}");
    Ok(all)
}

/// "matrix: program connect4 1234 max 400", as tests/kernel_matrix prints it.
fn parse(log: &str) -> Vec<Found> {
    let line = |line: &str| {
        let mut words = line.strip_prefix("matrix: program ")?.split(' ');
        let (name, instructions) = (words.next()?, words.next()?.parse().ok()?);
        Some(Found { name: name.to_owned(), value: instructions, ns: None })
    };
    let mut found: Vec<Found> = Vec::new();
    for program in log.lines().filter_map(line) {
        // Tests that failed say what they printed twice.
        if !found.iter().any(|known| known.name == program.name) {
            found.push(program);
        }
    }
    found
}
