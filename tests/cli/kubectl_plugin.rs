//! `plugin/kubectl-kubelane` beside two real daemons. kubectl is a double, which lists the pods as the jsonpath asks for
//! them and starts the real binary on the pod's node.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::laboratory::daemon::Daemon;
use crate::laboratory::lab::Lab;
use crate::laboratory::lab_or_skip;
use crate::laboratory::manifests::{Endpoint, Manifests, port, service, slice};
use serde_json::{Value, json};

/// Fails as kubectl does: a pod that is not there, a connection that breaks, one that hangs.
const KUBECTL: &str = r#"#!/bin/bash
echo "$*" >> "$DOUBLE/calls"
while [[ $1 == --* ]]; do case $1 in --*=*) shift ;; *) shift 2 ;; esac; done
case $1 in
get)
	[[ $2 == pods && "$*" == *'.spec.nodeName}{"\t"}{.metadata.name}'* ]] || { echo "error: unexpected: $*" >&2; exit 1; }
	cat "$DOUBLE/pods" ;;
exec)
	pod=$2
	[[ "$3 $4 $5 $6" == "--container kubelane -- /kubelane" ]] || { echo "error: unexpected: $*" >&2; exit 1; }
	shift 6
	case $pod in
	broken) echo "error: unable to upgrade connection: container not found" >&2; exit 1 ;;
	hangs) exec sleep 60 ;;
	*) exec "$KUBELANE" "$@" --pin-path "$(cat "$DOUBLE/$pod.pins")" ;;
	esac ;;
*) echo "error: unknown command \"$1\" for \"kubectl\"" >&2; exit 1 ;;
esac
"#;

fn plugin(double: &Path, arguments: &[&str]) -> Output {
    let path = format!("{}:{}", double.display(), std::env::var("PATH").unwrap());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("plugin/kubectl-kubelane");
    let mut command = Command::new(script);
    command.args(arguments).env("PATH", path).env("DOUBLE", double).env("KUBELANE", env!("CARGO_BIN_EXE_kubelane"));
    command.stdin(Stdio::null()).output().unwrap()
}

fn said(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

fn lay_out(lab: &Lab) -> (tempfile::TempDir, Manifests) {
    let double = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(double.path().join(name), text).unwrap();
    write("kubectl", KUBECTL);
    std::fs::set_permissions(double.path().join("kubectl"), std::fs::Permissions::from_mode(0o755)).unwrap();
    write("pods", "node2\tkubelane-bbbbb\nnode1\tkubelane-aaaaa\n");
    for (pod, node) in [("kubelane-aaaaa", "node1"), ("kubelane-bbbbb", "node2")] {
        write(&format!("{pod}.pins"), &lab.node(node).pin_path.display().to_string());
    }
    let manifests = Manifests::new(lab.dir.join("manifests"));
    let web = service(
        "web",
        json!({"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "ports": [port("http", "TCP", 80)]}),
    );
    let endpoint = Endpoint::ready(lab.pod("a").v4.into(), "node1");
    manifests.save("web", &[web, slice("web-1", "web", &[("http", "TCP", 8080)], &[endpoint])]);
    (double, manifests)
}

#[test]
fn one_node_or_all_of_them_are_asked_and_those_that_fail_are_named() {
    let Some(lab) = lab_or_skip(&[("node1", &["a"]), ("node2", &["b"])]) else { return };
    let (double, manifests) = lay_out(&lab);
    let daemons = ["node1", "node2"].map(|node| Daemon::start(&lab, node, &manifests.dir).unwrap());
    let ask = |arguments: &[&str]| said(&plugin(double.path(), arguments));

    let (code, table, errors) = ask(&["get", "node"]);
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!((code, lines.len(), errors.as_str()), (Some(0), 3, ""), "{table}");
    assert_eq!(lines[0][..5], ["NODE", "VERSION", "DAEMON", "LAST-SYNC", "SERVICES"]);
    for (line, node) in lines[1..].iter().zip(["node1", "node2"]) {
        assert_eq!(line[..3], [node, env!("CARGO_PKG_VERSION"), "running"], "{table}");
        assert!(line[3].trim_end_matches('s').parse::<u64>().is_ok() && line[4] == "1", "{table}");
    }
    let (code, text, _) = ask(&["--context", "lab", "--node=node2", "explain", "svc/default/web", "--from", "node"]);
    assert!(code == Some(0) && text.contains("10.244.1.10:8080, the only one"), "{text}");
    let calls = std::fs::read_to_string(double.path().join("calls")).unwrap();
    assert!(
        calls.lines().last().unwrap().starts_with("--context=lab --namespace kube-system exec kubelane-bbbbb"),
        "{calls}"
    );

    let (code, text, _) = ask(&["--all-nodes", "get", "svc", "--no-headers"]);
    let starts: Vec<&str> = text.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    assert_eq!((code, &starts[..]), (Some(0), &["node1", "node2"][..]), "{text}");
    let (_, text, _) = ask(&["--all-nodes", "get", "svc", "-o", "json"]);
    let all: Vec<Value> = serde_json::Deserializer::from_str(&text).into_iter().map(Result::unwrap).collect();
    assert_eq!((all.len(), &all[1]["items"][0]["name"]), (2, &json!("web")));

    let (code, _, errors) = ask(&["--node", "node1", "get", "services", "-o", "xml"]);
    assert!(code == Some(2) && errors.contains("expected json"), "{errors}");
    for daemon in daemons {
        daemon.kill();
    }
    let (code, table, _) = ask(&["get", "node", "--no-headers"]);
    let daemons: Vec<&str> = table.lines().map(|line| line.split_whitespace().nth(2).unwrap()).collect();
    assert_eq!((code, &daemons[..]), (Some(0), &["none", "none"][..]), "{table}");

    std::fs::write(double.path().join("pods"), "node1\tkubelane-aaaaa\nnode2\tbroken\nnode3\thangs\n").unwrap();
    let (code, text, errors) = ask(&["--all-nodes", "--timeout", "1", "get", "svc", "--no-headers"]);
    assert!(code == Some(1) && text.starts_with("node1  default"), "{text}");
    for expected in
        ["node2: error: unable to upgrade connection", "node3: no answer within 1 s", "failed on: node2 node3"]
    {
        assert!(errors.contains(expected), "{errors}");
    }
}

#[test]
fn what_makes_no_sense_is_refused_with_what_would() {
    let Some(lab) = lab_or_skip(&[("node1", &["a"]), ("node2", &["b"])]) else { return };
    let (double, _manifests) = lay_out(&lab);
    let ask = |arguments: &[&str]| said(&plugin(double.path(), arguments));
    for (arguments, code, expected) in [
        (&["get", "svc"][..], 2, "which node? --node NAME or --all-nodes; kubelane runs on: node1 node2"),
        (&["--node", "node9", "get", "svc"], 1, "no kubelane runs on the node node9; it runs on: node1 node2"),
        (&["--node", "node1", "--all-nodes", "get", "svc"], 2, "cannot be used together"),
        (&["--frobnicate", "get"], 2, "unknown flag --frobnicate"),
        (&["--timeout", "soon", "get"], 2, "--timeout: expected seconds"),
        (&["--node"], 2, "--node needs a value"),
        (&[], 2, "Usage:"),
    ] {
        let (got, _, errors) = ask(arguments);
        assert!(got == Some(code) && errors.contains(expected), "{arguments:?}: {got:?} {errors}");
    }
    std::fs::write(double.path().join("pods"), "").unwrap();
    let (code, _, errors) = ask(&["get", "node"]);
    assert!(
        code == Some(1)
            && errors.contains("no pod with the labels app.kubernetes.io/name=kubelane runs in kube-system"),
        "{errors}"
    );
}
