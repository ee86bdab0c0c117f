//! `kubelane monitor` beside the datapath: what real clients do is told, as they do it, with names, backends and reasons;
//! every filter lets through what it says; and whatever ends it, it ends well.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{ChildStdout, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::laboratory::client::Client;
use crate::laboratory::cluster::{Cluster, vip};
use crate::laboratory::daemon::PATIENCE;
use crate::laboratory::lab::Node;
use crate::laboratory::manifests::{Endpoint, port};
use crate::laboratory::messages::Kind;
use crate::laboratory::process::Process;
use crate::laboratory::{eventually, kubelane_binary};
use kubelane::abi::ServiceName;
use kubelane::bpf::Maps;
use kubelane::sync::{MapIo as _, MapName};
use libbpf_rs::{MapCore as _, MapFlags, MapHandle};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const CLIENT: &str = "172.31.0.1";
const NODE1: &str = "172.31.0.11";
/// What is never there: an event that comes late is waited for as long as this.
const A_WHILE: Duration = Duration::from_millis(500);

/// A running `kubelane monitor`, and what it has written so far.
struct Monitor {
    process: Process,
    lines: Arc<Mutex<Vec<String>>>,
}

/// How many monitors of this node have said that they listen.
fn listening(node: &Node, directory: &Path) -> usize {
    let log = std::fs::read_to_string(directory.join(format!("{}.log", node.name))).unwrap_or_default();
    log.lines().filter(|line| line.starts_with("listening to ")).count()
}

fn spawn(cluster: &Cluster, arguments: &[&str]) -> (Process, BufReader<ChildStdout>) {
    let node = cluster.lab.node("node1");
    let before = listening(node, &cluster.lab.dir);
    let pins = node.pin_path.display().to_string();
    let arguments = [&["monitor", "--pin-path", &pins], arguments].concat();
    let mut process = node.host.spawn(&kubelane_binary().unwrap(), &arguments).unwrap();
    let is_there = eventually(PATIENCE, || listening(node, &cluster.lab.dir) > before);
    assert!(is_there, "{arguments:?}: {}", node.host.log_tail());
    let stdout = process.stdout().unwrap();
    (process, stdout)
}

impl Drop for Monitor {
    /// It gives its place back, which a process that is killed does not.
    fn drop(&mut self) {
        let _ = self.process.terminate(PATIENCE);
    }
}

impl Monitor {
    fn start(cluster: &Cluster, arguments: &[&str]) -> Monitor {
        let (process, stdout) = spawn(cluster, arguments);
        let lines = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&lines);
        std::thread::spawn(move || {
            stdout.lines().map_while(Result::ok).for_each(|line| into.lock().unwrap().push(line))
        });
        Monitor { process, lines }
    }

    fn json(cluster: &Cluster, arguments: &[&str]) -> Monitor {
        Monitor::start(cluster, &[&["-o", "json"], arguments].concat())
    }

    fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    fn records(&self) -> Vec<Value> {
        self.lines().iter().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"))).collect()
    }

    /// The first event that is so.
    fn event(&self, is_it: impl Fn(&Value) -> bool) -> Value {
        let mut found = None;
        let is_there = eventually(PATIENCE, || {
            found = self.records().into_iter().find(&is_it);
            found.is_some()
        });
        assert!(is_there, "not among {:#?}", self.records());
        found.unwrap()
    }

    /// The event of this reason to this destination.
    fn to(&self, reason: &str, to: SocketAddr) -> Value {
        self.event(|event| event["reason"] == reason && event["to"] == to.to_string())
    }

    fn wait_for_lines(&self, count: usize) -> Vec<String> {
        assert!(eventually(PATIENCE, || self.lines().len() >= count), "{count}: {:#?}", self.lines());
        std::thread::sleep(A_WHILE);
        self.lines()
    }
}

fn kubelane(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kubelane")).args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn pod(cluster: &Cluster, name: &str) -> String {
    cluster.lab.pod(name).v4.to_string()
}

/// Services in situations that clients meet, and one that clients outside reach.
fn situations(cluster: &Cluster) {
    let ready = |pods: &[&str]| cluster.ready(pods);
    cluster.put("plain", 10, json!({}), &ready(&["a", "b"]));
    cluster.put("empty", 11, json!({}), &cluster.endpoints(Endpoint::unready, &["b"]));
    cluster.put("nowhere", 13, json!({"spec": {"internalTrafficPolicy": "Local"}}), &ready(&["b", "c"]));
    cluster.put("affine", 17, json!({"spec": {"sessionAffinity": "ClientIP"}}), &ready(&["a", "b", "c"]));
    for (name, number, node_port, pods) in
        [("open", 20, 30020, &["a"][..]), ("far", 21, 30021, &["b"]), ("none", 22, 30022, &[])]
    {
        let mut tcp = port("tcp", "TCP", 90);
        tcp["nodePort"] = json!(node_port);
        let changes = json!({"spec": {"type": "NodePort"}});
        cluster.put_with(name, number, json!([tcp]), changes, &[("tcp", "TCP", 9000)], &ready(pods));
    }
}

fn once(client: &mut Client, kind: Kind, to: SocketAddr) {
    client.ask(kind, to, 1);
}

/// A whole connection of a client outside; whether there was one.
fn connect_outside(cluster: &Cluster, to: &str) -> bool {
    let to: SocketAddr = to.parse().unwrap();
    let connect =
        || Ok(TcpStream::connect_timeout(&to, Duration::from_secs(2)).and_then(|mut stream| stream.write_all(b"?")));
    cluster.lab.outside(connect).unwrap().is_ok()
}

#[test]
fn what_processes_on_the_node_do_is_told_with_their_names_their_backend_and_why() {
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    let _daemon = cluster.start();
    let mut client = cluster.client("client");
    let monitor = Monitor::json(&cluster, &[]);
    let plain = vip(10, 90);
    for (to, kind) in plain.into_iter().zip([Kind::Tcp4, Kind::Tcp6]) {
        once(&mut client, kind, to);
        let told = monitor.to("connect_translated", to);
        assert_eq!(told["process"], json!({"name": "kubelane-lab", "pid": client.pid()}), "{told:#}");
        assert_eq!(
            (&told["event"], &told["verdict"], &told["protocol"]),
            (&json!("connect"), &json!("translated"), &json!("TCP"))
        );
        assert_eq!(told["service"], json!({"namespace": "default", "name": "plain", "portName": "tcp"}));
        let from: SocketAddr = told["from"].as_str().unwrap().parse().unwrap();
        assert_eq!(from.ip(), cluster.lab.pod("client").addresses()[usize::from(to.is_ipv6())], "{told:#}");
        let backend: SocketAddr = told["backend"].as_str().unwrap().parse().unwrap();
        let pods: Vec<_> = ["a", "b"].into_iter().flat_map(|pod| cluster.lab.pod(pod).addresses()).collect();
        assert!(pods.contains(&backend.ip()) && backend.port() == 9000, "{told:#}");
        assert_eq!(told["why"], "by chance");
    }
    for (number, port, reason, verdict, service) in [
        (10, 99, "refused_unknown_port", "refused", Value::Null),
        (11, 90, "refused_no_endpoint", "refused", json!("empty")),
        (13, 90, "dropped_no_local_endpoint", "dropped", json!("nowhere")),
    ] {
        let to = vip(number, port)[0];
        once(&mut client, Kind::Tcp4, to);
        let told = monitor.to(reason, to);
        assert_eq!(
            (&told["verdict"], &told["service"]["name"], &told["backend"]),
            (&json!(verdict), &service, &Value::Null)
        );
        assert!(!told["why"].as_str().unwrap().is_empty() && told["process"]["pid"] == client.pid(), "{told:#}");
    }
    let affine = vip(17, 90)[0];
    once(&mut client, Kind::Tcp4, affine);
    let first = monitor.to("connect_translated", affine);
    once(&mut client, Kind::Tcp4, affine);
    let again = monitor.event(|event| event["to"] == affine.to_string() && event["why"] != "by chance");
    assert_eq!((&again["why"], &again["backend"]), (&json!("as before: session affinity"), &first["backend"]));
    // Of a socket's datagrams the one that chose a backend; and of the node's own processes.
    let datagrams = vip(10, 53)[0];
    let mut host = cluster.host_client();
    let mut socket = host.open(Kind::Udp4).unwrap();
    (0..5).for_each(|_| drop(socket.ask_at(datagrams).unwrap()));
    let told = monitor.to("datagram_translated", datagrams);
    assert_eq!((&told["event"], &told["protocol"]), (&json!("datagram"), &json!("UDP")), "{told:#}");
    std::thread::sleep(A_WHILE);
    let all = monitor.records();
    assert_eq!(all.iter().filter(|event| event["event"] == "datagram").count(), 1, "{all:#?}");
    assert!(all.windows(2).all(|two| two[0]["time"].as_str() <= two[1]["time"].as_str()), "in order");
}

#[test]
fn flows_from_outside_are_told_from_their_beginning_to_their_end() {
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    let _daemon = cluster.start();
    let monitor = Monitor::json(&cluster, &[]);
    for (port, reason, service, pod_name) in [(30020, "flow_local", "open", "a"), (30021, "flow_remote", "far", "b")] {
        let to: SocketAddr = format!("{NODE1}:{port}").parse().unwrap();
        assert!(connect_outside(&cluster, &to.to_string()));
        let begun = monitor.to(reason, to);
        assert_eq!(
            (&begun["event"], &begun["verdict"], &begun["why"]),
            (&json!("flow-begun"), &json!("translated"), &json!("by chance"))
        );
        assert_eq!((&begun["service"]["name"], &begun["device"]), (&json!(service), &json!("eth0")), "{begun:#}");
        assert_eq!(begun["backend"], format!("{}:9000", pod(&cluster, pod_name)), "{begun:#}");
        // A backend elsewhere sees this node as its client.
        assert_eq!(begun["source"].is_null(), reason == "flow_local", "{begun:#}");
        assert!(begun["from"].as_str().unwrap().starts_with(CLIENT), "{begun:#}");
        let proved = monitor.to("flow_established", to);
        assert_eq!(
            (&proved["from"], &proved["backend"], &proved["service"]),
            (&begun["from"], &begun["backend"], &begun["service"])
        );
        // Closed by both: a row rests for ten seconds, and the daemon looks once in five.
        let ended = monitor.event(|event| event["event"] == "flow-ended" && event["to"] == to.to_string());
        assert_eq!((&ended["from"], &ended["service"]), (&begun["from"], &begun["service"]), "{ended:#}");
        assert!(["closed", "reset"].contains(&ended["reason"].as_str().unwrap()), "{ended:#}");
        assert!(ended["seconds"].as_u64().unwrap() <= 5, "{ended:#}");
    }
    assert!(!connect_outside(&cluster, &format!("{NODE1}:30022")));
    let refused = monitor.to("refused_no_endpoint", format!("{NODE1}:30022").parse().unwrap());
    assert!(refused["service"]["name"] == "none" && refused["process"].is_null(), "{refused:#}");
}

#[test]
fn every_filter_lets_through_what_it_says_and_not_the_rest() {
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    let _daemon = cluster.start();
    let (client_ip, other_ip) = (pod(&cluster, "client"), pod(&cluster, "other"));
    // By what each lets through: the client's connection to plain, the other's to affine, the client's datagram to plain,
    // the client's to nobody, and what the client outside begins and proves.
    let all = ["plain", "affine", "datagram", "unknown", "begun", "proved"];
    let table: [(&[&str], &[&str]); 21] = [
        (&[], &all),
        (&["--service", "default/plain"], &["plain", "datagram"]),
        (&["--service", "default/plain:udp,default/affine"], &["affine", "datagram"]),
        (&["-n", "default"], &["plain", "affine", "datagram", "begun", "proved"]),
        (&["-n", "kube-system"], &[]),
        (&["--from-ip", &client_ip], &["plain", "datagram", "unknown"]),
        (&["--from-ip", &other_ip], &["affine"]),
        (&["--from-ip", "172.31.0.0/24"], &["begun", "proved"]),
        (&["--to-ip", "10.96.0.17"], &["affine"]),
        (&["--to-ip", NODE1], &["begun", "proved"]),
        (&["--port", "53"], &["datagram"]),
        (&["--port", "30020"], &["begun", "proved"]),
        (&["--protocol", "udp"], &["datagram"]),
        (&["--protocol", "icmp"], &[]),
        (&["--verdict", "refused,noted"], &["unknown", "proved"]),
        (&["--reason", "refused_unknown_port,flow_local"], &["unknown", "begun"]),
        (&["--not", "--verdict", "translated"], &["unknown", "proved"]),
        (&["--not", "--service", "default/plain"], &["affine", "unknown", "begun", "proved"]),
        (&["tcp", "and", "not", "(port", "90", "or", "9000)"], &["unknown", "begun", "proved"]),
        (&["src host 172.31.0.1 or (udp and dst port 53)"], &["datagram", "begun", "proved"]),
        (&["--verdict", "translated", "port 90"], &["plain", "affine"]),
    ];
    let (mut client, mut other) = (cluster.client("client"), cluster.client("other"));
    let what = |event: &Value| match (event["event"].as_str().unwrap(), event["service"]["name"].as_str()) {
        ("connect", Some("plain")) => "plain",
        ("connect", Some("affine")) => "affine",
        ("datagram", Some("plain")) => "datagram",
        ("refusal", None) => "unknown",
        ("flow-begun", Some("open")) => "begun",
        ("flow-proved", Some("open")) => "proved",
        _ => panic!("{event:#}"),
    };
    // As many as may listen at once, the first of which hears everything.
    for rows in table[1..].chunks(3) {
        let everything = Monitor::json(&cluster, &[]);
        let monitors: Vec<Monitor> = rows.iter().map(|(arguments, _)| Monitor::json(&cluster, arguments)).collect();
        once(&mut client, Kind::Tcp4, vip(10, 90)[0]);
        once(&mut other, Kind::Tcp4, vip(17, 90)[0]);
        client.ask_unconnected(Kind::Udp4, vip(10, 53)[0], 1);
        once(&mut client, Kind::Tcp4, vip(10, 99)[0]);
        assert!(connect_outside(&cluster, &format!("{NODE1}:30020")));
        everything.to("flow_established", format!("{NODE1}:30020").parse().unwrap());
        std::thread::sleep(A_WHILE);
        let all = [(&table[0], &everything)];
        for ((arguments, expected), monitor) in all.into_iter().chain(rows.iter().zip(&monitors)) {
            let told: Vec<Value> =
                monitor.records().into_iter().filter(|event| event["event"] != "flow-ended").collect();
            assert_eq!(told.iter().map(what).collect::<Vec<_>>(), *expected, "{arguments:?}");
        }
    }
}

#[test]
fn each_output_is_one_line_an_event_and_names_are_escaped_in_all() {
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    let daemon = cluster.start();
    daemon.kill();
    let node = cluster.lab.node("node1");
    let mut maps = Maps::open(&node.pin_path).unwrap();
    let mut ids = Vec::new();
    maps.dump(MapName::Services, &mut |id, _| ids.push(id.to_vec())).unwrap();
    let hostile = ServiceName::new("ev\x1b[2Jil/\u{202e}web\n:\u{9b}p\u{200f}");
    ids.iter().for_each(|id| assert!(maps.write(MapName::Services, id, bytemuck::bytes_of(&hostile), 1).is_empty()));
    // The programs serve on while there is no daemon, and are listened to.
    let monitors = ["compact", "table", "json"].map(|output| (output, Monitor::start(&cluster, &["-o", output])));
    let to = vip(10, 90)[0];
    let mut client = cluster.client("client");
    client.ask(Kind::Tcp4, to, 3);
    for (output, monitor) in &monitors {
        let heads = usize::from(*output == "table");
        let lines = monitor.wait_for_lines(3 + heads);
        assert_eq!(lines.len(), 3 + heads, "{output}: {lines:#?}");
        for line in &lines[heads..] {
            let is_bad = |c: char| c.is_control() || ('\u{200b}'..='\u{202e}').contains(&c);
            assert!(!line.contains(is_bad), "{output}: {line:?}");
            assert!(line.contains("\\u202eweb\\u000a") || line.contains("\\u202eweb\\n"), "{output}: {line:?}");
            assert!(line.contains(&to.to_string()) && line.contains(&client.pid().to_string()), "{output}: {line:?}");
        }
        assert!(heads == 0 || lines[0].starts_with("TIME "), "{lines:?}");
    }
    let read: Value = serde_json::from_str(&monitors[2].1.lines()[0]).unwrap();
    assert_eq!(read["service"]["name"], "\u{202e}web\n");
}

#[test]
fn it_ends_when_nobody_reads_on_when_it_is_told_to_and_after_as_many_as_were_asked_for() {
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    let _daemon = cluster.start();
    let node = cluster.lab.node("node1");
    let to = vip(10, 90)[0];
    let mut client = cluster.client("client");
    // Before the first event, and after it.
    let (mut silent, stdout) = spawn(&cluster, &[]);
    drop(stdout);
    assert!(eventually(PATIENCE, || silent.ended().is_some()), "a pipe that nobody reads is noticed without events");
    assert!(silent.ended().unwrap().success());
    let (mut read_once, mut stdout) = spawn(&cluster, &[]);
    client.ask(Kind::Tcp4, to, 1);
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert!(line.contains("connect TCP kubelane-lab["), "{line}");
    drop(stdout);
    client.ask(Kind::Tcp4, to, 20);
    assert!(eventually(PATIENCE, || read_once.ended().is_some()) && read_once.ended().unwrap().success());
    let mut counted = Monitor::start(&cluster, &["-c", "3"]);
    client.ask(Kind::Tcp4, to, 20);
    assert!(eventually(PATIENCE, || counted.process.ended().is_some()) && counted.process.ended().unwrap().success());
    assert_eq!(counted.wait_for_lines(3).len(), 3);
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut told = Monitor::start(&cluster, &[]);
        client.ask(Kind::Tcp4, to, 4);
        told.wait_for_lines(4);
        told.process.signal(signal).unwrap();
        assert!(eventually(PATIENCE, || told.process.ended().is_some()) && told.process.ended().unwrap().success());
        assert!(node.host.log_tail().ends_with("4 events shown of 4 told; none lost"), "{}", node.host.log_tail());
    }
}

#[test]
fn a_daemon_that_is_started_again_goes_on_telling_and_frees_the_places_of_those_who_were_killed() {
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    let daemon = cluster.start();
    // The daemon connects to itself when it starts, which is no Service's.
    let mut monitor = Monitor::json(&cluster, &["--service", "default/plain"]);
    daemon.kill();
    let _again = cluster.start();
    cluster.client("client").ask(Kind::Tcp4, vip(10, 90)[0], 5);
    monitor.wait_for_lines(5);
    assert_eq!(monitor.records().len(), 5, "each once");
    let node = cluster.lab.node("node1");
    let listening = MapHandle::from_pinned_path(node.pin_path.join("v3/maps/listening")).unwrap();
    let slots = || listening.lookup(&[0; 4], MapFlags::ANY).unwrap().unwrap()[0];
    assert_eq!(slots(), 1);
    monitor.process.kill();
    assert!(eventually(PATIENCE, || slots() == 0), "{:b}", slots());
}

#[test]
fn what_was_written_to_a_file_is_read_back_with_filters_and_followed() {
    let Some(cluster) = Cluster::or_skip() else { return };
    situations(&cluster);
    let _daemon = cluster.start();
    let monitor = Monitor::json(&cluster, &[]);
    let mut client = cluster.client("client");
    client.ask(Kind::Tcp4, vip(10, 90)[0], 6);
    client.ask(Kind::Tcp4, vip(11, 90)[0], 2);
    let lines = monitor.wait_for_lines(8);
    assert_eq!(lines.len(), 8);
    let file = cluster.lab.dir.join("events.json");
    std::fs::write(&file, lines[..7].iter().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    let path = file.to_str().unwrap();
    let read = |arguments: &[&str]| -> Vec<String> {
        let output = kubelane(&[&["monitor", "--input", path], arguments].concat());
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
    };
    assert_eq!(read(&["-o", "json"]), lines[..7]);
    assert_eq!(read(&["-o", "json", "--last", "2"]), lines[5..7]);
    assert_eq!(read(&["-o", "json", "--last", "2", "--verdict", "translated"]), lines[4..6]);
    assert_eq!(read(&["-o", "json", "--count", "2"]), lines[..2]);
    assert_eq!(read(&["-o", "json", "--service", "default/empty"]), lines[6..7]);
    let third: Value = serde_json::from_str(&lines[2]).unwrap();
    assert_eq!(read(&["-o", "json", "--since", third["time"].as_str().unwrap()]), lines[2..7]);
    assert_eq!((read(&["--since", "1h"]).len(), read(&["--since", "0s"]).len()), (7, 0));
    assert!(read(&["--last", "1"])[0].contains("refusal TCP"));
    let arguments = ["monitor", "--input", path, "--follow", "--last", "1", "-o", "json"];
    let mut follower = cluster.lab.node("node1").host.spawn(&kubelane_binary().unwrap(), &arguments).unwrap();
    let mut stdout = follower.stdout().unwrap();
    let mut next = || {
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    };
    assert_eq!(next(), lines[6]);
    let mut appended = std::fs::File::options().append(true).open(&file).unwrap();
    writeln!(appended, "{}", lines[7]).unwrap();
    assert_eq!(next(), lines[7]);
    assert!(follower.terminate(PATIENCE).unwrap().success());
    writeln!(appended, "not an event").unwrap();
    let broken = kubelane(&["monitor", "--input", path]);
    let said = String::from_utf8(broken.stderr).unwrap();
    assert!(broken.status.code() == Some(1) && said.contains("line 9: no event"), "{said}");
}

#[test]
fn what_cannot_be_listened_to_is_said_with_what_to_do() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let daemon = cluster.start();
    let node = cluster.lab.node("node1");
    let pins = node.pin_path.display().to_string();
    let said = |arguments: &[&str], code: i32| {
        let output = kubelane(&[&["monitor"], arguments].concat());
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let missing = cluster.lab.dir.join("nothing");
    assert!(said(&["--pin-path", missing.to_str().unwrap()], 1).contains("the daemon has not run"));
    std::fs::create_dir_all(missing.join("v1")).unwrap();
    assert!(said(&["--pin-path", missing.to_str().unwrap()], 1).contains("has map ABI v1"));
    for (arguments, words) in [
        (&["port", "http"][..], &["\"http\"", "number"][..]),
        (&["vlan", "7"], &["\"vlan\"", "pcap-filter(7)"]),
        (&["--not"], &["--not"]),
        (&["--last", "3"], &["--input"]),
        (&["--since", "5m"], &["--input"]),
        (&["--follow"], &["--input"]),
        (&["--input", "/x", "--rate", "3"], &["--rate"]),
        (&["--reason", "magic"], &["--reason", "dropped_no_route"]),
        (&["--protocol", "gre"], &["--protocol", "icmp"]),
        (&["--from-ip", "web"], &["--from-ip", "IP/LENGTH"]),
        (&["--port", "0"], &["--port"]),
        (&["--verdict", "maybe"], &["--verdict", "translated"]),
        (&["-o", "xml"], &["--output", "compact"]),
    ] {
        let text = said(&[arguments, &["--pin-path", &pins]].concat(), 2);
        words.iter().for_each(|word| assert!(text.contains(word), "{arguments:?}: no {word} in {text}"));
    }
    use std::os::unix::process::CommandExt as _;
    let mut command = Command::new(env!("CARGO_BIN_EXE_kubelane"));
    // Where the build is below a directory that only root enters, nobody else can start it.
    if let Ok(output) = command.args(["monitor", "--pin-path", &pins]).uid(65534).gid(65534).output() {
        let said = String::from_utf8(output.stderr).unwrap();
        let is_clear = said.contains("CAP_BPF missing: run kubelane monitor as root")
            || said.contains("(this process is not root)");
        assert!(output.status.code() == Some(1) && is_clear, "{said}");
    }
    daemon.kill();
    node.cleanup().unwrap();
    assert!(said(&["--pin-path", &pins], 1).contains("the daemon has not run"));
}
