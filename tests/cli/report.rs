//! `kubelane report`: what is in the archive, what is not, and that there is one whatever is missing.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::laboratory::cluster::Cluster;
use crate::laboratory::lab::Node;
use crate::laboratory::manifests::port;
use flate2::read::GzDecoder;
use serde_json::{Value, json};

fn report(pins: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kubelane"));
    command.args(["report", "--seconds", "1", "--pin-path"]).arg(pins).args(arguments);
    command.args(["--healthz-bind-address", "", "--metrics-bind-address", ""]).stdin(Stdio::null()).output().unwrap()
}

/// The archive's files by their bare names; all are in one directory.
fn unpack(archive: &[u8]) -> (String, BTreeMap<String, String>) {
    let mut tar = tar::Archive::new(GzDecoder::new(archive));
    let mut directory = String::new();
    let mut files = BTreeMap::new();
    for entry in tar.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().display().to_string();
        let (top, name) = path.split_once('/').unwrap();
        assert!(directory.is_empty() || directory == top, "{path}");
        directory = top.to_owned();
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        files.insert(name.to_owned(), text);
    }
    (directory, files)
}

fn made(node: &Node, arguments: &[&str]) -> (String, BTreeMap<String, String>) {
    let output = report(&node.pin_path, &[&["-o", "-"], arguments].concat());
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    unpack(&output.stdout)
}

const FILES: [&str; 13] = [
    "arguments.txt",
    "attachments.json",
    "backends.json",
    "check.txt",
    "counters.txt",
    "daemon.json",
    "log.txt",
    "metrics.txt",
    "services.json",
    "status.json",
    "sysctls.txt",
    "version.txt",
    "warnings.txt",
];

#[test]
fn the_archive_has_what_a_bug_report_needs_and_redacted_no_name_or_address_of_the_cluster() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let spec = json!({"spec": {"externalIPs": ["192.0.2.77"]}});
    let ports = json!([port("tcp-secret", "TCP", 90), port("sctp-secret", "SCTP", 91)]);
    cluster.put_with("paycheck", 10, ports, spec, &[("tcp-secret", "TCP", 9000)], &cluster.ready(&["a", "b"]));
    let daemon = cluster.start();
    let node = cluster.lab.node("node1");
    let (directory, plain) = made(node, &[]);
    assert!(directory.starts_with("kubelane-report-") && directory.ends_with('Z'), "{directory}");
    assert_eq!(plain.keys().collect::<Vec<_>>(), FILES);
    assert!(!plain.values().any(|text| text.contains("could not be collected")), "{plain:#?}");
    for (file, expected) in [
        ("arguments.txt", "--hostname-override\nnode1\n"),
        (
            "warnings.txt",
            "Service default/paycheck: port sctp-secret: SCTP is served for packets of pods and from outside",
        ),
        ("log.txt", "first sync"),
        ("metrics.txt", "kubelane_services 1"),
        ("counters.txt", "connect_translated"),
        ("daemon.json", "\"node\": \"node1\""),
        ("sysctls.txt", "net.ipv4.conf.all.forwarding = "),
        ("check.txt", "kubelane would"),
        ("version.txt", "map ABI"),
    ] {
        assert!(plain[file].contains(expected), "{file}: {}", plain[file]);
    }
    let attachments: Value = serde_json::from_str(&plain["attachments.json"]).unwrap();
    let connect = attachments.as_array().unwrap().iter().find(|link| link["name"] == "connect4").unwrap();
    assert!(connect["programId"].as_u64().is_some_and(|id| id > 0), "{attachments}");

    let (_, redacted) = made(node, &["--redact"]);
    let secrets =
        ["paycheck", "secret", "node1", "node2", "10.96.0.10", "fd96::a", "192.0.2.77", "10.244.1.1", "172.31.0.11"];
    for (file, text) in &redacted {
        for secret in secrets {
            // The laboratory's own paths have the node's name in them.
            let told = text.lines().find(|line| line.contains(secret) && !line.contains("kubelane-lab"));
            assert!(told.is_none(), "{file}: {secret}: {told:?}");
        }
    }
    let services: Value = serde_json::from_str(&redacted["services.json"]).unwrap();
    let name = services[0]["name"].as_str().unwrap();
    assert!(redacted["warnings.txt"].contains(&format!("Service default/{name}: ")), "the same word everywhere");
    let backends: Value = serde_json::from_str(&redacted["backends.json"]).unwrap();
    let address = backends[0]["address"].as_str().unwrap();
    assert!(services.to_string().contains(address), "{services}");

    daemon.kill();
    let (_, without) = made(node, &[]);
    assert_eq!(without["log.txt"], "This could not be collected: no daemon answers\n");
    assert_eq!(without["services.json"], plain["services.json"]);
}

#[test]
fn there_is_an_archive_whatever_is_missing_and_it_goes_over_no_file() {
    let directory = tempfile::tempdir().unwrap();
    let (pins, archive) = (directory.path().join("none"), directory.path().join("report.tar.gz"));
    let at = archive.to_str().unwrap();
    let output = report(&pins, &["-o", at, "--redact"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.starts_with(&format!("{at}: 13 files")), "{said}");
    let written = std::fs::read(&archive).unwrap();
    let (_, files) = unpack(&written);
    assert_eq!(files.keys().collect::<Vec<_>>(), FILES);
    assert!(files["services.json"].starts_with("This could not be collected: no kubelane state below"));
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(std::fs::metadata(&archive).unwrap().permissions().mode() & 0o777, 0o600);
    let (precious, link) = (directory.path().join("precious"), directory.path().join("link"));
    std::fs::write(&precious, "x").unwrap();
    std::os::unix::fs::symlink(&precious, &link).unwrap();
    for path in [&archive, &link] {
        let output = report(&pins, &["-o", path.to_str().unwrap()]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && said.contains("File exists"), "{said}");
    }
    assert_eq!((std::fs::read(&archive).unwrap(), std::fs::read(&precious).unwrap()), (written, b"x".to_vec()));
}
