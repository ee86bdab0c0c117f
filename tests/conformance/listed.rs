//! `tests/conformance.md` and the tests name each other.

use std::collections::BTreeSet;
use std::fs;

use crate::{affinity, datagrams, endpoints, policies, ports, topology, types};

const MODULES: [(&str, &[(&str, crate::case_cluster::Case)]); 7] = [
    ("affinity", affinity::CASES),
    ("datagrams", datagrams::CASES),
    ("endpoints", endpoints::CASES),
    ("policies", policies::CASES),
    ("ports", ports::CASES),
    ("topology", topology::CASES),
    ("types", types::CASES),
];

/// The tests that the table's second column names: file below tests/ and function. `-` needs a reason behind it.
fn named(text: &str) -> Vec<(String, String)> {
    let rows = text.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| upstream"));
    let cells = rows.map(|row| row.trim_matches('|').split(" | ").map(str::trim).collect::<Vec<_>>());
    let mut named = Vec::new();
    for cells in cells {
        let [upstream, ours] = cells[..] else { panic!("not two columns: {cells:?}") };
        assert!(!upstream.is_empty() && !ours.is_empty(), "{cells:?}");
        if let Some(reason) = ours.strip_prefix('-') {
            assert!(reason.trim().len() > 10, "{upstream}: why not?");
            continue;
        }
        for test in ours.split(", ") {
            let (file, function) = test.trim_matches('`').split_once("::").unwrap_or_else(|| panic!("{test}"));
            named.push((format!("{file}.rs"), function.to_owned()));
        }
    }
    named
}

#[test]
fn the_list_names_tests_that_exist_and_every_case() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests");
    let text = fs::read_to_string(format!("{directory}/conformance.md")).expect("the list");
    let named = named(&text);
    assert!(named.len() > 60, "{} tests are named", named.len());
    for (file, function) in &named {
        let code = fs::read_to_string(format!("{directory}/{file}")).unwrap_or_else(|e| panic!("{file}: {e}"));
        assert!(code.contains(&format!("fn {function}(")), "{file} has no {function}");
    }
    let named: BTreeSet<_> = named.into_iter().collect();
    for (module, cases) in MODULES {
        for (case, _) in cases {
            let entry = (format!("conformance/{module}.rs"), (*case).to_owned());
            assert!(named.contains(&entry), "conformance.md does not name {module}::{case}");
        }
    }
}
