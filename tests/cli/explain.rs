//! `kubelane explain` beside the datapath: whatever it says the next connection gets, a real one then gets; its reasons
//! are those of the situation; and it says what it does not know.

use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use crate::laboratory::cluster::{Cluster, PODS, names, vip};
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::eventually;
use crate::laboratory::lab::Node;
use crate::laboratory::manifests::{Endpoint, port, service, slice};
use crate::laboratory::messages::Kind;
use kubelane::abi::{Frontend, FrontendKey, ServiceName};
use kubelane::bpf::Maps;
use kubelane::model::Protocol;
use kubelane::sync::{MapIo as _, MapName};
use serde_json::{Value, json};

const NODE1: &str = "172.31.0.11";
const CLIENT: &str = "172.31.0.1";

fn run(node: &Node, arguments: &[&str]) -> String {
    let pins = node.pin_path.display().to_string();
    node.kubelane(&[&["explain", "--pin-path", &pins], arguments].concat()).unwrap()
}

fn explained(node: &Node, arguments: &[&str]) -> Value {
    serde_json::from_str(&run(node, &[&["-o", "json"], arguments].concat())).unwrap()
}

/// The one view of a destination from one client.
fn view(node: &Node, from: &str, to: &str) -> Value {
    let all = explained(node, &["--from", from, to]);
    assert_eq!(all["disagreements"], json!([]), "{all:#}");
    assert_eq!(all["views"].as_array().unwrap().len(), 1, "{all:#}");
    all["views"][0].clone()
}

fn reasons(view: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let all = view["leftOut"].as_array().unwrap();
    all.iter().map(|endpoint| (text(&endpoint["address"]), text(&endpoint["reason"]))).collect()
}

fn address(cluster: &Cluster, pod: &str) -> String {
    cluster.lab.pod(pod).v4.to_string()
}

fn kubelane(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kubelane")).args(arguments).stdin(Stdio::null()).output().unwrap()
}

/// The zone's Node, and Services in every situation that a client on the node can meet.
fn situations(cluster: &Cluster) {
    let node = json!({"apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "node1", "labels": {"topology.kubernetes.io/zone": "z1"}}});
    cluster.manifests.save("node", &[node]);
    let ready = |pods: &[&str]| cluster.ready(pods);
    cluster.put("plain", 10, json!({}), &ready(&["a", "b", "c"]));
    cluster.put("empty", 11, json!({}), &cluster.endpoints(Endpoint::unready, &["b"]));
    cluster.put("local", 12, json!({"spec": {"internalTrafficPolicy": "Local"}}), &ready(&["a", "b"]));
    cluster.put("nowhere", 13, json!({"spec": {"internalTrafficPolicy": "Local"}}), &ready(&["b", "c"]));
    let zones = |pod: &str, zone: &str| {
        let hints = json!({"forZones": [{"name": zone}]});
        ready(&[pod]).into_iter().map(move |endpoint| endpoint.hinted(hints.clone())).collect::<Vec<_>>()
    };
    cluster.put("zoned", 14, json!({}), &[zones("a", "z1"), zones("b", "z2"), zones("c", "z1")].concat());
    cluster.put("going", 15, json!({}), &cluster.endpoints(Endpoint::terminating, &["b", "c"]));
    let mixed =
        [ready(&["a"]), cluster.endpoints(Endpoint::terminating, &["b"]), cluster.endpoints(Endpoint::unready, &["c"])];
    cluster.put("mixed", 16, json!({}), &mixed.concat());
    let affine = json!({"spec": {"sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}}}});
    cluster.put("affine", 17, affine, &ready(&["a", "b", "c"]));
}

/// A Service's number and port; the verdict, the pods that serve, and else the errors that a client may see.
type Situation = (u8, u16, &'static str, &'static [&'static str], &'static [&'static str]);

#[test]
fn what_a_client_on_the_node_gets_is_what_was_explained() {
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    let _daemon = cluster.start();
    let node = cluster.lab.node("node1");
    let pod = address(&cluster, "client");
    let mut client = cluster.client("client");
    let table: [Situation; 9] = [
        (10, 90, "backend", &["a", "b", "c"], &[]),
        (10, 99, "refused", &[], &["ECONNREFUSED", "EPERM"]),
        (11, 90, "refused", &[], &["ECONNREFUSED", "EPERM"]),
        (12, 90, "backend", &["a"], &[]),
        (13, 90, "dropped", &[], &["ETIMEDOUT", "EPERM"]),
        (14, 90, "backend", &["a", "c"], &[]),
        (15, 90, "backend", &["b", "c"], &[]),
        (16, 90, "backend", &["a"], &[]),
        (17, 90, "backend", &["a", "b", "c"], &[]),
    ];
    for (number, port, verdict, backends, errors) in table {
        for (to, kind) in vip(number, port).into_iter().zip([Kind::Tcp4, Kind::Tcp6]) {
            let from = cluster.lab.pod("client").addresses()[usize::from(to.is_ipv6())].to_string();
            let told = view(node, &from, &to.to_string());
            assert_eq!(told["verdict"], verdict, "{told:#}");
            let endpoints = told["endpoints"].as_array().unwrap();
            let ips = endpoints.iter().map(|e| e["address"].as_str().unwrap().parse::<SocketAddr>().unwrap().ip());
            let known = |ip| PODS.into_iter().find(|pod| cluster.lab.pod(pod).addresses().contains(&ip));
            let mut shown: Vec<&str> = ips.filter_map(known).collect();
            shown.sort_unstable();
            assert_eq!(shown, backends, "{told:#}");
            let shares: f64 = endpoints.iter().map(|endpoint| endpoint["share"].as_f64().unwrap()).sum();
            assert!(endpoints.is_empty() || (shares - 1.0).abs() < 1e-9, "{told:#}");
            let got = client.ask(kind, to, if number == 17 { 1 } else { 60 });
            match errors {
                [] => assert!(number == 17 || names(&got) == backends, "{to}: {got:?}"),
                errors => assert!(names(&got).iter().all(|error| errors.contains(error)), "{to}: {got:?}"),
            }
        }
    }
    // Whoever was remembered is named, with the time that is left, and is what the next connections get.
    let to = vip(17, 90)[0];
    let told = view(node, &pod, &to.to_string());
    let left = told["affinity"]["leftSeconds"].as_u64().unwrap();
    assert!((500..=600).contains(&left), "{told:#}");
    let remembered: SocketAddr = told["affinity"]["backend"].as_str().unwrap().parse().unwrap();
    let got = client.ask(Kind::Tcp4, to, 20);
    assert_eq!(names(&got).len(), 1);
    assert_eq!(cluster.lab.pod(names(&got)[0]).v4, remembered.ip(), "{told:#}");
    let other = view(node, "node", &to.to_string());
    assert!(other["affinity"]["backend"].is_null() && other["affinity"]["isKnownClient"] == true, "{other:#}");
}

/// They are in no row of a Service: the programs that are attached are asked.
#[test]
fn what_the_daemon_was_told_counts_whether_it_runs_or_not() {
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    let node = cluster.lab.node("node1");
    let pod = address(&cluster, "client");
    let (to, unknown) = (vip(10, 90)[0].to_string(), vip(10, 99)[0].to_string());
    let sctp = format!("{to}/sctp");
    for (options, outside, other_port, pods_sctp) in [
        (&[][..], "untouched", "untouched", "refused"),
        (&["--external-cluster-ip", "--pod-devices", "none"][..], "backend", "refused", "untouched"),
        (&["--socket-lb", "host", "--pod-devices", "none"], "untouched", "untouched", "untouched"),
    ] {
        let daemon = Daemon::start_with(&cluster.lab, "node1", &cluster.manifests.dir, options).unwrap();
        let verdicts = || {
            let verdict = |from: &str, to: &str| explained(node, &["--from", from, to])["views"][0]["verdict"].clone();
            let outside_from = format!("outside:{CLIENT}");
            [verdict(&outside_from, &to), verdict(&outside_from, &unknown), verdict(&pod, &sctp)]
        };
        assert_eq!(verdicts(), [outside, other_port, pods_sctp], "{options:?}");
        drop(daemon);
        assert_eq!(verdicts(), [outside, other_port, pods_sctp], "{options:?}, without the daemon");
    }
}

#[test]
fn each_endpoint_that_is_left_out_has_its_reason_and_each_failure_its_remedy() {
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    let _daemon = cluster.start();
    let node = cluster.lab.node("node1");
    let at = |pod: &str| format!("{}:9000", address(&cluster, pod));
    let out = |number: u8| reasons(&view(node, "node", &vip(number, 90)[0].to_string()));
    let because = |pods: &[(&str, &str)]| -> Vec<(String, String)> {
        pods.iter().map(|(pod, reason)| (at(pod), (*reason).to_owned())).collect()
    };
    assert_eq!(out(10), []);
    assert_eq!(out(11), because(&[("b", "notReady")]));
    assert_eq!(out(12), because(&[("b", "otherNode")]));
    assert_eq!(out(13), because(&[("b", "otherNode"), ("c", "otherNode")]));
    assert_eq!(out(14), because(&[("b", "hintsOtherZones")]));
    assert_eq!(out(15), []);
    assert_eq!(out(16), because(&[("b", "terminating"), ("c", "notReady")]));
    let text = |number: u8, port: u16| run(node, &["--from", "node", &vip(number, port)[0].to_string()]);
    for (number, port, expected) in [
        (10, 99, "the cluster IP belongs to Service default/plain, which has 80/TCP, 90/TCP, 91/TCP, 53/UDP"),
        (11, 90, "kubectl -n default get endpointslices -l kubernetes.io/service-name=empty"),
        (12, 90, "internalTrafficPolicy is Local: endpoints of this node"),
        (13, 90, "no endpoint of default/nowhere is on this node, but other nodes have some"),
        (14, 90, "hints are followed: endpoints for zone z1"),
        (15, 90, "no endpoint is ready: terminating endpoints that still serve are used"),
        (16, 90, "the only one"),
        (17, 90, "by client, 600 s; this client has no entry"),
    ] {
        let told = text(number, port);
        assert!(told.contains(expected), "{expected:?} is not in\n{told}");
        assert!(told.ends_with("The kernel and the daemon agree.\n"), "{told}");
    }
    // By name: every frontend of both families, the same words once.
    let told = run(node, &["svc/default/mixed:tcp"]);
    for expected in [
        "10.96.0.16:90/TCP (ClusterIP) from this node and its pods\n",
        "[fd96::10]:90/TCP (ClusterIP)",
        "Left out    2\n",
    ] {
        assert!(told.contains(expected), "{told}");
    }
    assert_eq!(explained(node, &["svc/default/mixed:90"])["views"].as_array().unwrap().len(), 2);
    let pins = node.pin_path.display().to_string();
    let unknown = kubelane(&["explain", "--pin-path", &pins, "svc/default/nobody"]);
    let said = String::from_utf8(unknown.stderr).unwrap();
    assert!(unknown.status.code() == Some(1) && said.contains("and the daemon knows none"), "{said}");
}

/// Outcome of a TCP connection of a client outside the nodes.
fn connect_outside(cluster: &Cluster, to: SocketAddr) -> &'static str {
    let connect = || {
        Ok(match TcpStream::connect_timeout(&to, Duration::from_secs(2)) {
            Ok(_) => "backend",
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => "refused",
            Err(_) => "dropped",
        })
    };
    cluster.lab.outside(connect).unwrap()
}

#[test]
fn what_a_client_outside_gets_is_what_was_explained() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let expose = |name: &str, number: u8, node_port: u16, spec: Value, ips: Value, pods: &[&str]| {
        let mut tcp = port("tcp", "TCP", 90);
        tcp["nodePort"] = json!(node_port);
        let mut changes = json!({"spec": {"type": "LoadBalancer"}, "status": {"loadBalancer": {"ingress": ips}}});
        spec.as_object().unwrap().iter().for_each(|(field, value)| changes["spec"][field] = value.clone());
        cluster.put_with(name, number, json!([tcp]), changes, &[("tcp", "TCP", 9000)], &cluster.ready(pods));
    };
    let ip = |ip: &str| json!([{"ip": ip}]);
    expose("open", 10, 30010, json!({}), ip("192.0.2.10"), &["a", "b"]);
    expose("local", 11, 30011, json!({"externalTrafficPolicy": "Local"}), ip("192.0.2.11"), &["b"]);
    expose("ranged", 12, 30012, json!({"loadBalancerSourceRanges": ["172.31.0.0/24"]}), ip("192.0.2.12"), &["a"]);
    expose("closed", 13, 30013, json!({"loadBalancerSourceRanges": ["10.0.0.0/8"]}), ip("192.0.2.13"), &["a"]);
    expose("empty", 14, 30014, json!({}), ip("192.0.2.14"), &[]);
    let _daemon = cluster.start();
    let node = cluster.lab.node("node1");
    cluster.lab.outside_place().unwrap().ip(&["route add 192.0.2.0/24 via 172.31.0.11"]).unwrap();
    for (to, verdict, reason) in [
        (format!("{NODE1}:30010"), "backend", None),
        ("192.0.2.10:90".to_owned(), "backend", None),
        (format!("{NODE1}:30011"), "dropped", Some("dropped_no_local_endpoint")),
        ("192.0.2.12:90".to_owned(), "backend", None),
        ("192.0.2.13:90".to_owned(), "dropped", Some("dropped_source_range")),
        (format!("{NODE1}:30013"), "backend", None),
        ("192.0.2.14:90".to_owned(), "refused", Some("refused_no_endpoint")),
    ] {
        let told = view(node, &format!("outside:{CLIENT}"), &to);
        assert_eq!((&told["verdict"], &told["reason"]), (&json!(verdict), &json!(reason)), "{told:#}");
        assert_eq!(connect_outside(&cluster, to.parse().unwrap()), verdict, "{to}");
    }
    let stranger = view(node, "outside:203.0.113.9", "192.0.2.12:90");
    assert_eq!((&stranger["verdict"], &stranger["sourceRanges"]["hasClient"]), (&json!("dropped"), &json!(false)));
    // A pod's packets are judged by its address, the node's own processes by the Node's: there is no Node object.
    for (from, verdict, has_client) in
        [(address(&cluster, "client"), "backend", true), ("node".to_owned(), "dropped", false)]
    {
        let told = view(node, &from, "192.0.2.13:90");
        assert_eq!(
            (&told["verdict"], &told["sourceRanges"]["hasClient"]),
            (&json!(verdict), &json!(has_client)),
            "{from}"
        );
    }
    // Cluster IPs serve nobody outside, and by name nobody asks for that.
    let told = view(node, "outside", "10.96.0.10:90");
    assert_eq!((&told["verdict"], &told["reason"]), (&json!("untouched"), &json!("cluster_ip_outside")));
    let by_name = explained(node, &["svc/default/open"]);
    let from_outside = |view: &&Value| view["isOutside"] == true && view["kinds"] == json!(["ClusterIP"]);
    assert!(!by_name["views"].as_array().unwrap().iter().any(|view| from_outside(&view)), "{by_name:#}");
    // Loopback is the node in its own namespace, and nowhere else.
    let pod = address(&cluster, "client");
    for (from, verdict) in [("node", "backend"), (&pod, "untouched"), ("outside", "untouched")] {
        assert_eq!(view(node, from, "127.0.0.1:30010")["verdict"], verdict, "{from}");
    }
    let other = explained(node, &["--from", "10.9.9.9", "10.96.0.10:90"]);
    assert!(
        other["notes"][0].as_str().unwrap().contains("no network namespace of this node has the address"),
        "{other:#}"
    );
}

#[test]
fn a_daemon_that_is_gone_is_said_to_be_and_the_next_one_answers() {
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    let daemon = cluster.start();
    let node = cluster.lab.node("node1");
    let to = vip(16, 90)[0].to_string();
    let with = view(node, "node", &to);
    daemon.kill();
    let told = run(node, &["--from", "node", &to]);
    assert!(told.contains("The daemon does not answer: this comes from the maps alone"), "{told}");
    assert!(!told.contains("agree"), "{told}");
    let without = view(node, "node", &to);
    for field in ["verdict", "service", "kinds", "affinity", "next"] {
        assert_eq!(with[field], without[field], "{field}");
    }
    // An endpoint that is not ready is in no map.
    assert_eq!(reasons(&without), [(format!("{}:9000", address(&cluster, "b")), "terminating".to_owned())]);
    let _again = cluster.start();
    assert!(eventually(PATIENCE, || !explained(node, &[&to])["daemon"].is_null()));
    assert_eq!(view(node, "node", &to), with);
}

#[test]
fn a_row_that_somebody_else_has_changed_is_told_as_a_disagreement() {
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    let _daemon = cluster.start();
    let node = cluster.lab.node("node1");
    let to = vip(10, 90)[0];
    let mut maps = Maps::open(&node.pin_path).unwrap();
    let key = FrontendKey::new(to.ip().into(), to.port(), Protocol::Tcp);
    let key = bytemuck::bytes_of(&key);
    let row = maps.read(MapName::Frontends, key).unwrap().unwrap();
    let mut changed: Frontend = bytemuck::pod_read_unaligned(&row);
    changed.inside.count = 1;
    changed.affinity_seconds = 30;
    assert!(maps.write(MapName::Frontends, key, bytemuck::bytes_of(&changed), 1).is_empty());
    let told = run(node, &["--from", "node", &to.to_string()]);
    for expected in [
        "The kernel and the daemon DISAGREE:\n",
        "affinity of 30 s in the kernel, of 0 s by the daemon",
        "the daemon has endpoints that the kernel does not: ",
    ] {
        assert!(told.contains(expected), "{told}");
    }
    assert!(maps.delete(MapName::Frontends, key, 1).is_empty());
    for target in [to.to_string(), "svc/default/plain".to_owned()] {
        let told = run(node, &["--from", "node", &target]);
        let expected = "10.96.0.10:90: the daemon has it for default/plain, the kernel does not have it";
        assert!(told.contains(expected), "{told}");
    }
}

#[test]
fn names_that_a_terminal_would_act_upon_are_escaped_in_every_output() {
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    let daemon = cluster.start();
    cluster.client("client").ask(Kind::Tcp4, vip(17, 90)[0], 1);
    daemon.kill();
    let node = cluster.lab.node("node1");
    let mut maps = Maps::open(&node.pin_path).unwrap();
    let mut ids = Vec::new();
    maps.dump(MapName::Services, &mut |id, _| ids.push(id.to_vec())).unwrap();
    let hostile = ServiceName::new(&format!("ev\x1b[2Jil/\u{202e}{}\n:\u{9b}p\u{200f}", "w".repeat(140)));
    ids.iter().for_each(|id| assert!(maps.write(MapName::Services, id, bytemuck::bytes_of(&hostile), 1).is_empty()));
    let to = vip(10, 90)[0].to_string();
    let pins = node.pin_path.display().to_string();
    let mut asked = vec![vec!["explain", &to], vec!["explain", &to, "-o", "json"], vec!["explain", &to, "-o", "yaml"]];
    for what in ["services", "backends", "affinities"] {
        asked.extend([vec!["get", what], vec!["get", what, "-o", "wide"]]);
        asked.extend([vec!["get", what, "-o", "json"], vec!["get", what, "-o", "yaml"]]);
    }
    for mut arguments in asked {
        arguments.extend(["--pin-path", &pins]);
        let output = kubelane(&arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let is_bad = |c: char| (c.is_control() && c != '\n') || ('\u{200b}'..='\u{202e}').contains(&c);
        assert!(!text.contains(is_bad), "{arguments:?}: {text:?}");
        assert!(text.contains("\\u202ew") && text.contains("\\u001b"), "{arguments:?}: {text}");
        if arguments.contains(&"yaml") || arguments.contains(&"json") {
            let read: Value = serde_norway::from_str(&text).unwrap();
            assert!(read.to_string().contains("\u{202e}"), "{arguments:?}");
        }
    }
}

#[test]
fn the_log_reports_and_errors_escape_names_that_are_refused() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let name = format!("ev\x1b[2Jil\u{202e}{}", "w".repeat(253));
    let spec = json!({"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "ports": [port("p", "SCTP", 90)]});
    let endpoint = Endpoint::ready(cluster.lab.pod("a").v4.into(), "node1");
    let objects = [service(&name, spec), slice("hostile-1", &name, &[("p", "SCTP", 90)], &[endpoint])];
    cluster.manifests.save("hostile", &objects);
    let daemon = cluster.start();
    let node = cluster.lab.node("node1");
    let is_bad = |c: char| (c.is_control() && c != '\n') || ('\u{200b}'..='\u{202e}').contains(&c);
    let log = std::fs::read_to_string(cluster.lab.dir.join("node1.log")).unwrap();
    assert!(!log.contains(is_bad) && log.contains("is not a name") && log.contains("\\u202e"), "{log:?}");
    let pins = node.pin_path.display().to_string();
    let off = ["--healthz-bind-address", "", "--metrics-bind-address", ""];
    let report = kubelane(&[&["report", "-o", "-", "--seconds", "1", "--pin-path", &pins], &off[..]].concat());
    let mut text = String::new();
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(&report.stdout[..]));
    for entry in archive.entries().unwrap() {
        std::io::Read::read_to_string(&mut entry.unwrap(), &mut text).unwrap();
    }
    assert!(!text.contains(|c| is_bad(c) && c != '\t') && text.contains("\\u202e"), "{text:?}");
    let by_name = kubelane(&["explain", "--pin-path", &pins, &format!("svc/default/{name}")]);
    assert_eq!(by_name.status.code(), Some(1), "{by_name:?}");
    let told = String::from_utf8(by_name.stderr).unwrap();
    assert!(!told.contains(is_bad) && told.contains("\\u202eww"), "{told:?}");
    daemon.kill();
}

#[test]
fn the_daemons_socket_is_roots_alone_and_minds_no_nonsense() {
    use std::io::{Read as _, Write as _};
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::process::CommandExt as _;
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    let _daemon = cluster.start();
    let node = cluster.lab.node("node1");
    let socket = kubelane::explain::sockets_path(&node.pin_path).unwrap();
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let say = |text: &[u8]| -> String {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(text).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    assert!(say(b"{\"version\":999,\"about\":\"daemon\"}\n").contains("requests of version 999 are not supported"));
    assert!(say(b"what?\n").contains("cannot parse the request"));
    assert!(say(&[b'x'; 100_000][..4096]).contains("cannot parse the request"));
    let silent: Vec<UnixStream> = (0..3).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    assert!(say(b"{\"version\":1,\"about\":\"daemon\"}\n").contains("\"node\":\"node1\""));
    drop(silent);
    let pins = node.pin_path.display().to_string();
    let mut command = Command::new(env!("CARGO_BIN_EXE_kubelane"));
    let output = command.args(["explain", "--pin-path", &pins, "10.96.0.10:90"]).uid(65534).gid(65534).output();
    // Where the build is below a directory that only root enters, nobody else can start it.
    if let Ok(output) = output {
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && said.contains("(this process is not root)"), "{said}");
    }
    node.cleanup().ok();
}
