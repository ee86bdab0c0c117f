//! `kubelane trace`: a packet that is tried meets what a real one would, step by step, and leaves nothing behind.

use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Output, Stdio};

use crate::laboratory::cluster::{Cluster, vip};
use crate::laboratory::daemon::Daemon;
use crate::laboratory::lab::Node;
use crate::laboratory::manifests::{Endpoint, port};
use crate::laboratory::messages::Kind::{Tcp4, Tcp6};
use serde_json::{Value, json};

const NODE: &str = "172.31.0.11";
const NODE6: &str = "[fd31::11]";
const CLIENT: &str = "172.31.0.1";
const REMOTE: u16 = 30_001;
const LOCAL: u16 = 30_002;
const EMPTY: u16 = 30_003;
const NOWHERE: u16 = 30_004;

/// NodePorts, and cluster IPs of the numbers 1 to 4.
fn cluster_or_skip() -> Option<Cluster> {
    let cluster = Cluster::or_skip()?;
    let put = |number: u8, node_port: u16, policy: &str, endpoints: &[Endpoint]| {
        let mut tcp = port("tcp", "TCP", 80);
        tcp["nodePort"] = json!(node_port);
        let mut udp = port("udp", "UDP", 80);
        udp["nodePort"] = json!(node_port);
        let changes = json!({"spec": {"type": "NodePort", "externalTrafficPolicy": policy,
            "sessionAffinity": "ClientIP"}});
        let targets = [("tcp", "TCP", 9000), ("udp", "UDP", 9000)];
        cluster.put_with(&format!("service-{number}"), number, json!([tcp, udp]), changes, &targets, endpoints);
    };
    put(1, REMOTE, "Cluster", &cluster.ready(&["b"]));
    put(2, LOCAL, "Cluster", &cluster.ready(&["a"]));
    put(3, EMPTY, "Cluster", &cluster.endpoints(Endpoint::unready, &["b"]));
    put(4, NOWHERE, "Local", &cluster.ready(&["b"]));
    Some(cluster)
}

fn start(cluster: &Cluster) -> Daemon<'_> {
    Daemon::start(&cluster.lab, "node1", &cluster.manifests.dir).expect("the daemon starts")
}

fn run(node: &Node, arguments: &[&str]) -> String {
    let pins = node.pin_path.display().to_string();
    node.kubelane(&[&["trace", "--pin-path", &pins], arguments].concat()).unwrap()
}

fn traced(node: &Node, arguments: &[&str]) -> Value {
    let text = run(node, &[&["-o", "json"], arguments].concat());
    serde_json::from_str(&text).unwrap()
}

fn node(cluster: &Cluster) -> &Node {
    cluster.lab.node("node1")
}

/// "TCP a -> b" of a packet.
fn ends(packet: &Value) -> String {
    let text = |name: &str| packet[name].as_str().unwrap_or_default();
    format!("{} {} -> {}", text("protocol"), text("from"), text("to"))
}

/// Device, direction and verdict of each step, and that no checksum is wrong anywhere.
fn steps(passage: &Value) -> Vec<String> {
    let step = |step: &Value| {
        for packet in [&step["packet"], &step["becomes"]] {
            assert!(packet["wrongChecksums"].is_null(), "{step:#}");
        }
        let text = |name: &str| step[name].as_str().unwrap();
        format!("{} {}: {}", text("device"), text("direction"), text("verdict"))
    };
    passage["steps"].as_array().unwrap().iter().map(step).collect()
}

/// What the last step made of the packet.
fn last(passage: &Value) -> String {
    let steps = passage["steps"].as_array().unwrap();
    let changed = steps.iter().rev().find(|step| !step["becomes"].is_null());
    ends(changed.map_or(&steps[0]["packet"], |step| &step["becomes"]))
}

fn rows(step: &Value, what: &str) -> Vec<String> {
    let all = step["rows"].as_array().unwrap().iter().filter(|row| row["what"] == what);
    all.map(|row| format!("{}: {}", row["map"].as_str().unwrap(), row["text"].as_str().unwrap())).collect()
}

fn pod(cluster: &Cluster, name: &str, port: u16) -> [SocketAddr; 2] {
    cluster.lab.pod(name).addresses().map(|ip| SocketAddr::new(ip, port))
}

#[test]
fn a_packet_from_outside_goes_its_whole_way_and_its_answer_back_and_nothing_stays() {
    let Some(cluster) = cluster_or_skip() else { return };
    let daemon = start(&cluster);
    let node = node(&cluster);
    for (family, (to, client)) in [(NODE, CLIENT), (NODE6, "[fd31::1]")].into_iter().enumerate() {
        let from = format!("{client}:40000");
        let remote = traced(node, &["--from", &from, &format!("{to}:{REMOTE}")]);
        assert_eq!(remote["notes"], json!([]), "{remote:#}");
        let backend = pod(&cluster, "b", 9000)[family];
        assert_eq!(steps(&remote["request"])[0], "eth0 in: sent on from here", "{remote:#}");
        assert!(last(&remote["request"]).ends_with(&format!("-> {backend}")), "{remote:#}");
        let first = &remote["request"]["steps"][0];
        let read = rows(first, "read");
        assert!(read.iter().any(|row| row.contains("of default/service-1:tcp (NodePort)")), "{read:?}");
        assert!(
            read.iter().any(|row| row.starts_with("backends: ") && row.ends_with(&backend.to_string())),
            "{read:?}"
        );
        // Both directions, and the client.
        assert_eq!(rows(first, "new").len(), 3, "{remote:#}");
        let event = first["events"].as_array().unwrap().iter().find(|event| event["event"] == "flow-begun");
        assert_eq!(event.unwrap()["reason"], "flow_remote", "{remote:#}");
        assert!(first["counted"].as_array().unwrap().contains(&json!("flow_remote")), "{remote:#}");
        assert!(first["nanoseconds"].as_u64().unwrap() > 0);
        assert_eq!(last(&remote["answer"]), format!("TCP {to}:{REMOTE} -> {from}"), "{remote:#}");

        let local = traced(node, &["--from", &from, &format!("{to}:{LOCAL}/udp")]);
        let backend = pod(&cluster, "a", 9000)[family];
        // Towards a pod of this node UDP has a source port of its own.
        assert!(last(&local["request"]).ends_with(&format!("-> {backend}")), "{local:#}");
        assert_eq!(last(&local["answer"]), format!("UDP {to}:{LOCAL} -> {from}"), "{local:#}");
        assert!(steps(&local["answer"]).contains(&"eth0 out: let go".to_owned()), "{local:#}");
    }
    let flows = node.kubelane(&["get", "flows", "--no-headers", "--pin-path", &node.pin_path.display().to_string()]);
    assert_eq!(flows.unwrap(), "");
    let metrics = daemon.metrics().unwrap();
    let counted = metrics.lines().find(|line| line.contains("verdict=\"flow_remote\"")).unwrap();
    assert!(counted.ends_with(" 0"), "{counted}");
}

#[test]
fn pods_packets_refusals_and_drops_are_told_with_their_reasons() {
    let Some(cluster) = cluster_or_skip() else { return };
    let _daemon = start(&cluster);
    let node = node(&cluster);
    let [own, own6] = cluster.lab.pod("client").addresses();
    // The bridge learns where they are.
    let mut host = cluster.host_client();
    for (of, port) in [("a", 9000), ("client", 1)] {
        for (kind, to) in [Tcp4, Tcp6].into_iter().zip(pod(&cluster, of, port)) {
            host.ask(kind, to, 1);
        }
    }
    for (own, family) in [(own, 0), (own6, 1)] {
        let to = vip(2, 80)[family];
        let trace = traced(node, &["--from", &own.to_string(), &to.to_string()]);
        let first = &trace["request"]["steps"][0];
        assert_eq!(first["program"], "pod_in_ethernet", "{trace:#}");
        let backend = pod(&cluster, "a", 9000)[family];
        assert!(last(&trace["request"]).ends_with(&format!("-> {backend}")), "{trace:#}");
        let client = SocketAddr::new(own, 40_000);
        assert_eq!(last(&trace["answer"]), format!("TCP {to} -> {client}"), "{trace:#}");
    }
    // A pod that is its own backend: nobody answers in its place.
    let own = cluster.lab.pod("a").addresses()[0];
    let to = vip(2, 80)[0];
    let hairpin = traced(node, &["--from", &own.to_string(), &to.to_string()]);
    assert_eq!(hairpin["request"]["steps"][0]["verdict"], "sent on from here", "{hairpin:#}");
    assert_eq!(last(&hairpin["answer"]), format!("TCP {to} -> {}", SocketAddr::new(own, 40_000)), "{hairpin:#}");
    let refused = traced(node, &["--from", CLIENT, &format!("{NODE}:{EMPTY}")]);
    let step = &refused["request"]["steps"][0];
    assert_eq!((&step["verdict"], &step["counted"]), (&json!("answered from here"), &json!(["refused_no_endpoint"])));
    assert!(refused["answer"].is_null(), "{refused:#}");
    assert!(step["becomes"]["to"].as_str().unwrap().starts_with(CLIENT), "{refused:#}");
    let dropped = traced(node, &["--from", CLIENT, &format!("{NODE}:{NOWHERE}")]);
    let step = &dropped["request"]["steps"][0];
    assert_eq!((&step["verdict"], &step["counted"]), (&json!("dropped"), &json!(["dropped_no_local_endpoint"])));
    assert_eq!(dropped["request"]["end"], "it is dropped");
    // No Service's: to the node itself.
    let plain = traced(node, &["--from", CLIENT, &format!("{NODE}:22")]);
    assert_eq!(steps(&plain["request"]), ["eth0 in: handed to the host's stack"], "{plain:#}");
    assert!(plain["request"]["end"].as_str().unwrap().starts_with("it is delivered on this node"), "{plain:#}");
}

#[test]
fn a_packet_of_a_connection_that_there_is_meets_its_rows_and_leaves_them_as_they_are() {
    let Some(cluster) = cluster_or_skip() else { return };
    let _daemon = start(&cluster);
    let node = node(&cluster);
    let to: SocketAddr = format!("{NODE}:{REMOTE}").parse().unwrap();
    let open = cluster.lab.outside(|| Ok(TcpStream::connect(to)?)).unwrap();
    let from = open.local_addr().unwrap();
    let pins = node.pin_path.display().to_string();
    let flows = || -> Value {
        let text = node.kubelane(&["get", "flows", "-o", "json", "--pin-path", &pins]).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let before = flows();
    let reset = traced(node, &["--from", &from.to_string(), "--tcp-flags", "R", &to.to_string()]);
    let step = &reset["request"]["steps"][0];
    let read = rows(step, "read");
    assert!(read[0].starts_with("flows4: TCP ") && read[0].contains("request, proved, sent on from here"), "{read:?}");
    assert!(last(&reset["request"]).ends_with(&format!("-> {}", pod(&cluster, "b", 9000)[0])), "{reset:#}");
    let without_idle = |mut flows: Value| {
        flows["items"].as_array_mut().into_iter().flatten().for_each(|flow| flow["idleSeconds"] = json!(0));
        flows
    };
    assert_eq!(without_idle(flows()), without_idle(before));
}

#[test]
fn a_connect_goes_through_the_programs_that_are_attached_and_leaves_no_group_behind() {
    let Some(cluster) = cluster_or_skip() else { return };
    let _daemon = start(&cluster);
    let node = node(&cluster);
    let cgroup = node.cgroup.display().to_string();
    // As a killed one leaves it: no process has such a number.
    std::fs::create_dir(node.cgroup.join("kubelane-trace-4294967295")).unwrap();
    let connect =
        |to: SocketAddr, protocol: &str| traced(node, &["--connect", "--cgroup", &cgroup, &format!("{to}/{protocol}")]);
    for (protocol, family) in [("tcp", 0), ("udp", 1)] {
        let told = connect(vip(2, 80)[family], protocol);
        let event = &told["events"][0];
        assert_eq!((&event["event"], &event["verdict"]), (&json!("connect"), &json!("translated")), "{told:#}");
        assert_eq!(event["backend"], json!(pod(&cluster, "a", 9000)[family]), "{told:#}");
        assert_eq!(event["service"]["name"], "service-2", "{told:#}");
    }
    let refused = connect(vip(3, 80)[0], "tcp");
    assert_eq!(refused["events"][0]["reason"], "refused_no_endpoint", "{refused:#}");
    assert!(refused["error"].as_str().unwrap().contains("refused"), "{refused:#}");
    let nobody = connect("10.1.2.3:80".parse().unwrap(), "tcp");
    assert_eq!(nobody["events"], json!([]), "{nobody:#}");
    let left: Vec<_> = std::fs::read_dir(&node.cgroup).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with("kubelane-trace")), "{left:?}");
}

#[test]
fn a_packet_of_a_capture_is_tried_as_it_was_caught() {
    let Some(cluster) = cluster_or_skip() else { return };
    let _daemon = start(&cluster);
    let node = node(&cluster);
    // tcpdump's format, of IP alone: a header, a record's header, and a SYN with a wrong checksum.
    let word = |word: u32| word.to_le_bytes();
    let mut file = [0xa1b2_c3d4, 0x0004_0002, 0, 0, 262_144, 101, 0, 0, 40, 40].map(word).concat();
    file.extend([0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, 6, 0, 0, 172, 31, 0, 1, 172, 31, 0, 11]);
    file.extend([
        0x9c,
        0x40,
        (REMOTE >> 8) as u8,
        REMOTE as u8,
        0,
        0,
        0,
        1,
        0,
        0,
        0,
        0,
        0x50,
        2,
        0xff,
        0xff,
        0,
        0,
        0,
        0,
    ]);
    let path = cluster.lab.dir.join("capture.pcap");
    std::fs::write(&path, file).unwrap();
    let text = run(node, &["--read", &path.display().to_string()]);
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    assert_eq!(lines[0], "request, by eth0", "{text}");
    assert!(lines[1].starts_with("1. eth0, in: wire_in_ethernet"), "{text}");
    assert!(lines[2].ends_with("wrong checksum (IPv4, TCP)"), "{text}");
    assert!(text.contains("   verdict   sent on from here, ") && text.contains("\nanswer\n"), "{text}");
}

fn fails(arguments: &[&str]) -> (Option<i32>, String) {
    let output: Output = Command::new(env!("CARGO_BIN_EXE_kubelane"))
        .arg("trace")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn what_cannot_be_tried_says_why() {
    let (code, said) = fails(&["10.0.0.1:80"]);
    assert!(code == Some(2) && said.contains("--from"), "{said}");
    let (code, said) = fails(&["--from", "10.0.0.2", "svc/shop/web"]);
    assert!(code == Some(2) && said.contains("a packet has an address"), "{said}");
    let (code, said) = fails(&["--connect", "--read", "x", "10.0.0.1:80"]);
    assert!(code == Some(2) && said.contains("cannot be used with"), "{said}");
    let (code, said) = fails(&["--pin-path", "/none", "--from", "10.0.0.2", "10.0.0.1:80"]);
    assert!(code == Some(1) && said.contains("no kubelane state below /none"), "{said}");
    let (code, said) = fails(&["--connect", "10.0.0.1:80/sctp"]);
    assert!(code == Some(2) && said.contains("no hook for SCTP"), "{said}");
    let Some(cluster) = cluster_or_skip() else { return };
    let _daemon = start(&cluster);
    let node = node(&cluster);
    let pins = node.pin_path.display().to_string();
    let refused = |arguments: &[&str]| {
        let all = [&["trace", "--pin-path", &pins], arguments].concat();
        format!("{:#}", node.kubelane(&all).unwrap_err())
    };
    let said = refused(&["--from", NODE, &format!("{NODE}:{REMOTE}")]);
    assert!(said.contains("this node's own address"), "{said}");
    let said = refused(&["--from", CLIENT, "--device", "none0", &format!("{NODE}:{REMOTE}")]);
    assert!(said.contains("this node has no device none0"), "{said}");
    let said = refused(&["--from", CLIENT, &format!("{NODE6}:{REMOTE}")]);
    assert!(said.contains("different families"), "{said}");
}
