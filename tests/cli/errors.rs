//! The binary's manners: what it says about a command line that it cannot follow, and what --help tells.

use std::fs::File;
use std::process::{Command, Output, Stdio};

fn kubelane(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kubelane"));
    for variable in ["KUBERNETES_SERVICE_HOST", "NODE_NAME", "RUST_LOG"] {
        command.env_remove(variable);
    }
    command.args(arguments).output().expect("the binary runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("output is UTF-8")
}

#[test]
fn an_unknown_value_is_refused_with_its_flag_and_what_is_allowed() {
    // arguments, then what the message must contain
    let table: [(&[&str], &[&str]); 42] = [
        (&["run", "--source", "file:x"], &["--source", "file:x", "kubernetes", "dir:PATH"]),
        (&["run", "--source", "dir:"], &["--source", "dir:PATH"]),
        (&["run"], &["--source", "kubernetes", "dir:PATH", "--kubeconfig", "--master"]),
        (&["run", "--source", "dir:/x", "--master", "http://x"], &["--master", "dir:PATH"]),
        (&["run", "--source", "dir:/x", "--log-format", "xml"], &["--log-format", "xml", "human", "json"]),
        (
            &["run", "--source", "dir:/x", "--nodeport-addresses", "10.0.0.1"],
            &["--nodeport-addresses", "10.0.0.1", "CIDR"],
        ),
        (&["run", "--source", "dir:/x", "--healthz-bind-address", "here:1"], &["--healthz-bind-address", "IP:PORT"]),
        (&["run", "--source", "dir:/x", "--metrics-bind-address", "1"], &["--metrics-bind-address", "IP:PORT"]),
        (&["run", "--source", "dir:/x", "--devices", "eth0,"], &["--devices", "eth0,"]),
        (&["run", "--source", "dir:/x", "--max-services", "0"], &["--max-services", "0", "1..=1048576"]),
        (&["run", "--source", "dir:/x", "--max-endpoints", "many"], &["--max-endpoints", "many"]),
        (&["run", "--source", "dir:/x", "-v", "loud"], &["--v", "loud"]),
        (&["run", "--frobnicate"], &["--frobnicate"]),
        (&["--proxy-mode=userspace"], &["--proxy-mode", "userspace", "iptables, ipvs, nftables"]),
        (&["--iptables-sync-period", "soon"], &["--iptables-sync-period", "soon", "30s"]),
        (&["--detect-local-mode=pods"], &["--detect-local-mode", "pods", "ClusterCIDR"]),
        (&["--cluster-cidr=10.0.0.1"], &["--cluster-cidr", "10.0.0.1", "CIDRs"]),
        (&["--bind-address=here"], &["--bind-address", "here"]),
        (&["--masquerade-all=perhaps"], &["--masquerade-all", "perhaps"]),
        (&["--forward-through", "tunnel"], &["--forward-through", "tunnel", "redirect or stack"]),
        (&["--conntrack-tcp-timeout-established=721h"], &["--conntrack-tcp-timeout-established", "721h", "1s to 720h"]),
        (&["--conntrack-udp-timeout", "100ms"], &["--conntrack-udp-timeout", "100ms", "1s to 720h"]),
        (&["--conntrack-udp-timeout-stream=soon"], &["--conntrack-udp-timeout-stream", "soon", "30s"]),
        (&["--conntrack-tcp-be-liberal=2"], &["--conntrack-tcp-be-liberal", "2", "true or false"]),
        (
            &["--source=dir:/x", "--nodeport-addresses=primary", "--nodeport-addresses=10.0.0.0/8"],
            &["--nodeport-addresses", "`primary` cannot stand in a list"],
        ),
        (&["--oom-score-adj=-1001"], &["--oom-score-adj", "-1001", "-1000"]),
        (&["--shadow=twice"], &["--shadow", "twice", "watch, once"]),
        (&["--shadow", "--cleanup", "--pin-path=/nowhere"], &["--shadow", "cannot be used with", "--cleanup"]),
        (&["--cleanup=perhaps"], &["--cleanup", "perhaps"]),
        (&["--config=/nowhere/config.conf"], &["--config", "/nowhere/config.conf", "No such file"]),
        (&["check", "--config=/nowhere/config.conf"], &["--config", "/nowhere/config.conf", "No such file"]),
        (&["get", "pods"], &["pods", "services", "backends", "status"]),
        (&["get", "services", "-o", "xml"], &["--output", "xml", "json", "yaml", "wide"]),
        (&["frobnicate"], &["frobnicate"]),
        (&["explain"], &["DEST"]),
        (&["report", "--seconds", "0"], &["--seconds", "1..=600"]),
        (&["completion", "tcsh"], &["SHELL", "tcsh", "bash, zsh, fish"]),
        (&["man", "nothing"], &["unknown subcommand \"nothing\""]),
        (&["explain", "web"], &["DEST", "web", "IP:PORT", "svc/NAMESPACE/NAME"]),
        (&["explain", "10.96.0.1:80/icmp"], &["DEST", "/tcp, /udp or /sctp"]),
        (&["explain", "10.96.0.1:80", "--from", "web"], &["--from", "a pod's IP address", "outside:IP"]),
        (&["explain", "10.96.0.1:80", "-o", "wide"], &["--output", "json, yaml"]),
    ];
    for (arguments, expected) in table {
        let output = kubelane(arguments);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        for part in expected {
            assert!(message.contains(part), "{arguments:?}: no {part:?} in {message}");
        }
        assert!(output.stdout.is_empty(), "{arguments:?}: something on standard output");
    }
}

#[test]
fn what_cannot_be_done_ends_with_1_and_names_the_cause() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    let missing = directory.path().join("missing");
    let other = directory.path().join("other");
    std::fs::create_dir_all(other.join("v1/maps")).unwrap();
    let source = format!("dir:{}", missing.display());
    let quiet = ["--healthz-bind-address", "", "--metrics-bind-address", ""];
    let run = |more: &[&str]| kubelane(&[&["run"], &quiet[..], more].concat());
    let table = [
        (run(&["--source", &source]), "missing: not a directory"),
        (run(&["--source", &format!("dir:{path}"), "--cgroup", path]), "not in a cgroup2 hierarchy"),
        (run(&["--kubeconfig", missing.to_str().unwrap()]), "missing"),
        (run(&["--master", "http://"]), "--master"),
        (kubelane(&["get", "services", "--pin-path", missing.to_str().unwrap()]), "the daemon has not run"),
        (kubelane(&["explain", "10.96.0.1:80", "--pin-path", missing.to_str().unwrap()]), "the daemon has not run"),
        (
            kubelane(&["explain", "10.96.0.1:80", "--pin-path", other.to_str().unwrap()]),
            "has map ABI v1, and this binary",
        ),
    ];
    for (output, expected) in table {
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert!(message.to_lowercase().contains("error") && message.contains(expected), "no {expected:?} in {message}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure_and_a_full_disk_is() {
    let directory = tempfile::tempdir().unwrap();
    let pins = directory.path().join("nothing");
    let pins = pins.to_str().unwrap();
    let ports = ["--healthz-bind-address", "", "--metrics-bind-address", ""];
    let check = [&["check", "--pin-path", pins], &ports[..]].concat();
    for arguments in [&["version"][..], &["cleanup", "--pin-path", pins], &check] {
        let expected = kubelane(arguments).status.code();
        let run = |stdout: Stdio| {
            let output = Command::new(env!("CARGO_BIN_EXE_kubelane")).args(arguments).stdout(stdout).output().unwrap();
            (output.status.code(), text(&output.stderr))
        };
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        assert_eq!(run(writer.into()), (expected, String::new()), "{arguments:?} into a closed pipe");
        let (code, said) = run(File::options().write(true).open("/dev/full").unwrap().into());
        assert_eq!(code, Some(1), "{arguments:?}");
        assert!(said.starts_with("error: writing to standard output: No space left"), "{arguments:?}: {said}");
    }
}

#[test]
fn a_field_of_the_configuration_that_cannot_be_followed_is_named_before_anything_is_attached() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.conf");
    let header = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
    let table = [
        ("ipvs: rr", "ipvs: expected an object"),
        ("conntrack: {udpTimeout: 5ms}", "conntrack.udpTimeout: \"5ms\" is not valid: expected 1s to 720h"),
        ("mode: userspace", "mode: \"userspace\" is not valid: expected one of iptables, ipvs, nftables"),
        ("nodePortAddresses: [10.0.0.1]", "nodePortAddresses: \"10.0.0.1\" is not a CIDR"),
    ];
    for (body, expected) in table {
        std::fs::write(&path, format!("{header}{body}\n")).unwrap();
        for command in [&["--config"][..], &["run", "--config"], &["check", "--config"]] {
            let output = kubelane(&[command, &[path.to_str().unwrap()]].concat());
            let message = text(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{command:?} {body}: {message}");
            assert!(message.contains(path.to_str().unwrap()) && message.contains(expected), "{body}: {message}");
            assert!(output.stdout.is_empty(), "{command:?}");
        }
    }
}

#[test]
fn kube_proxys_cleanup_flag_is_the_cleanup_subcommand() {
    let directory = tempfile::tempdir().unwrap();
    let nothing = directory.path().join("nothing");
    let pins = ["--pin-path", nothing.to_str().unwrap()];
    for command in [&["--cleanup"][..], &["--cleanup=true", "--proxy-mode=ipvs"], &["run", "--cleanup"]] {
        let output = kubelane(&[command, &pins].concat());
        assert_eq!(output.status.code(), Some(0), "{command:?}: {}", text(&output.stderr));
        assert!(
            text(&output.stdout).starts_with("nothing to remove: no kubelane state below "),
            "{}",
            text(&output.stdout)
        );
    }
    let not = kubelane(&[&["--cleanup=false"], &pins[..]].concat());
    assert!(
        not.status.code() == Some(2) && text(&not.stderr).contains("--source is required"),
        "{}",
        text(&not.stderr)
    );
}

#[test]
fn rust_log_that_is_no_filter_is_refused() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kubelane"));
    let output = command.args(["run", "--source", "dir:/"]).env("RUST_LOG", "a=b=c").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("RUST_LOG"), "{}", text(&output.stderr));
}

#[test]
fn help_names_every_subcommand_and_flag_with_its_default() {
    let help = text(&kubelane(&["--help"]).stdout);
    for part in ["run", "check", "get", "explain", "cleanup", "version", "Examples:", "dir:/etc/kubelane"] {
        assert!(help.contains(part), "no {part:?} in {help}");
    }
    let table: [(&str, &[&str]); 5] = [
        (
            "run",
            &[
                "--source",
                "--kubeconfig",
                "--master",
                "--hostname-override",
                "NODE_NAME",
                "--service-proxy-name",
                "--pin-path",
                "[default: /sys/fs/bpf/kubelane]",
                "--cgroup",
                "--healthz-bind-address",
                "[default: 0.0.0.0:10256]",
                "--metrics-bind-address",
                "[default: 127.0.0.1:10249]",
                "--nodeport-addresses",
                "--destroy-tcp-sockets",
                "Traffic from outside",
                "--masquerade-all",
                "--forward-through",
                "[default: redirect]",
                "--conntrack-tcp-be-liberal",
                "--conntrack-tcp-timeout-established",
                "[default: 24h]",
                "--conntrack-tcp-timeout-close-wait",
                "[default: 1h]",
                "--conntrack-udp-timeout ",
                "[default: 30s]",
                "--conntrack-udp-timeout-stream",
                "[default: 120s]",
                "--max-services",
                "[default: 65536]",
                "--max-endpoints",
                "[default: 262144]",
                "--max-source-ranges",
                "--log-format",
                "-v, --v",
                "--config",
                "--bind-address",
                "--cleanup",
                "--oom-score-adj",
                "Flags of kube-proxy that are accepted, checked, and have no effect here",
                "--cluster-cidr",
                "--ipvs-scheduler",
            ],
        ),
        ("check", &["--pin-path", "--cgroup", "--healthz-bind-address", "--metrics-bind-address"]),
        ("get", &["services", "backends", "status", "-o, --output", "json", "yaml", "wide", "--pin-path"]),
        ("explain", &["DEST", "--from", "outside:IP", "-o, --output", "--pin-path"]),
        ("cleanup", &["--pin-path"]),
    ];
    for (command, parts) in table {
        let output = kubelane(&[command, "--help"]);
        let help = text(&output.stdout);
        assert_eq!(output.status.code(), Some(0), "{command}");
        for part in parts {
            assert!(help.contains(part), "{command}: no {part:?} in {help}");
        }
    }
}

#[test]
fn version_and_an_empty_cleanup_succeed() {
    let version = kubelane(&["version"]);
    assert_eq!(version.status.code(), Some(0));
    assert!(text(&version.stdout).starts_with(concat!("kubelane ", env!("CARGO_PKG_VERSION"), " (map ABI ")));
    let directory = tempfile::tempdir().unwrap();
    let nothing = directory.path().join("nothing");
    let cleanup = kubelane(&["cleanup", "--pin-path", nothing.to_str().unwrap()]);
    assert_eq!(cleanup.status.code(), Some(0));
    assert!(
        text(&cleanup.stdout).starts_with("nothing to remove: no kubelane state below "),
        "{}",
        text(&cleanup.stdout)
    );
}
