//! `kubelane get` beside real traffic: what it shows of flows, affinities, devices, NodePorts and source ports is what
//! there is; filters, orders and formats; readers that go away; and tables of any size within bounds.

use std::io::{BufRead as _, BufReader, Read as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use crate::laboratory::cluster::Cluster;
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::eventually;
use crate::laboratory::lab::Node;
use crate::laboratory::manifests::port;
use kubelane::abi::{Flow, FlowKey, FlowKey4, flow_flag};
use kubelane::bpf::pinned;
use libbpf_rs::{MapCore as _, MapFlags, MapHandle};
use serde_json::{Value, json};

const NODE1: &str = "172.31.0.11";
const CLIENT: &str = "172.31.0.1";

fn kubelane(node: &Node, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kubelane"));
    command.arg("get").args(arguments).arg("--pin-path").arg(&node.pin_path).stdin(Stdio::null());
    command
}

fn run(node: &Node, arguments: &[&str]) -> Output {
    kubelane(node, arguments).output().unwrap()
}

fn text(node: &Node, arguments: &[&str]) -> String {
    let output = run(node, arguments);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn items(node: &Node, arguments: &[&str]) -> Vec<Value> {
    let all: Value = serde_json::from_str(&text(node, &[arguments, &["-o", "json"]].concat())).unwrap();
    all["items"].as_array().unwrap().clone()
}

/// NodePort 30010 with a pod on each node, and 30011 with affinity on node2.
fn expose(cluster: &Cluster) {
    let put = |name: &str, number: u8, node_port: u16, changes: Value, pods: &[&str]| {
        let mut tcp = port("tcp", "TCP", 90);
        tcp["nodePort"] = json!(node_port);
        let mut all = json!({"spec": {"type": "NodePort"}});
        changes.as_object().unwrap().iter().for_each(|(field, value)| all["spec"][field] = value.clone());
        cluster.put_with(name, number, json!([tcp]), all, &[("tcp", "TCP", 9000)], &cluster.ready(pods));
    };
    put("both", 10, 30010, json!({}), &["a", "b"]);
    put("far", 11, 30011, json!({"sessionAffinity": "ClientIP"}), &["b"]);
}

/// Open connections of a client outside the nodes.
fn connect(cluster: &Cluster, number: u16, times: usize) -> Vec<TcpStream> {
    let at: SocketAddr = format!("{NODE1}:{number}").parse().unwrap();
    let all = || Ok((0..times).map(|_| TcpStream::connect_timeout(&at, Duration::from_secs(5)).unwrap()).collect());
    cluster.lab.outside(all).unwrap()
}

#[test]
fn flows_affinities_devices_nodeports_and_source_ports_are_those_that_there_are() {
    let Some(cluster) = Cluster::or_skip() else { return };
    expose(&cluster);
    let _daemon = cluster.start();
    let node = cluster.lab.node("node1");
    let streams = [connect(&cluster, 30010, 20), connect(&cluster, 30011, 3)];
    let flows = items(node, &["flows"]);
    assert_eq!(flows.len(), 23);
    let mut clients: Vec<String> = flows.iter().map(|flow| flow["client"].as_str().unwrap().to_owned()).collect();
    let mut own: Vec<String> =
        streams.iter().flatten().map(|stream| stream.local_addr().unwrap().to_string()).collect();
    clients.sort();
    own.sort();
    assert_eq!(clients, own);
    for flow in &flows {
        let backend: SocketAddr = flow["backend"].as_str().unwrap().parse().unwrap();
        let is_remote = backend.ip() == IpAddr::from(cluster.lab.pod("b").v4);
        let source: SocketAddr = flow["source"].as_str().unwrap().parse().unwrap();
        let seen = if is_remote { NODE1 } else { CLIENT };
        assert_eq!((&flow["isRemote"], source.ip().to_string()), (&json!(is_remote), seen.to_owned()), "{flow}");
        assert_eq!((&flow["namespace"], &flow["portName"]), (&json!("default"), &json!("tcp")), "{flow}");
    }
    let count = |arguments: &[&str]| items(node, &[&["flow"], arguments].concat()).len();
    assert_eq!(count(&["--service", "default/far"]), 3);
    assert_eq!((count(&["-n", "default"]), count(&["-n", "other"]), count(&["-A"])), (23, 0, 23));
    assert_eq!((count(&["--address", CLIENT]), count(&["--address", "10.9.9.9"])), (23, 0));
    let remote = flows.iter().filter(|flow| flow["isRemote"] == true).count();
    assert_eq!(count(&["--address", &cluster.lab.pod("b").v4.to_string()]), remote);
    let one = format!("{}:{}", CLIENT, streams[0][0].local_addr().unwrap().port());
    let table = text(node, &["flows"]);
    assert!(table.starts_with("NAMESPACE   NAME   PORT   PROTOCOL   CLIENT") && table.contains(&one), "{table}");

    let snat = items(node, &["snat"]);
    assert_eq!(snat.len(), 1);
    assert_eq!((&snat[0]["ports"], &snat[0]["source"]), (&json!(remote), &json!(NODE1)));
    assert_eq!(items(node, &["snat", "--service", "default/far"])[0]["ports"], 3);

    // What was noted before the client had answered stays until others push it out.
    let all = items(node, &["aff"]);
    let affinities: Vec<&Value> = all.iter().filter(|affinity| affinity["isProved"] == true).collect();
    assert_eq!(affinities.len(), 1, "{all:?}");
    assert_eq!((&affinities[0]["client"], &affinities[0]["name"]), (&json!(CLIENT), &json!("far")));
    assert_eq!(affinities[0]["state"], "holds");
    assert!((10_700..=10_800).contains(&affinities[0]["leftSeconds"].as_u64().unwrap()), "{affinities:?}");

    let devices = node.get("devices", &["-o", "json"]).unwrap();
    let devices: Value = serde_json::from_str(&devices).unwrap();
    assert_eq!((&devices["items"][0]["device"], &devices["items"][0]["ipv4"]), (&json!("eth0"), &json!(NODE1)));

    let ports = items(node, &["np"]);
    assert_eq!(ports.len(), 4, "two of each family");
    assert!(ports.iter().all(|port| port["family"] == "IPv6" || port["addresses"].to_string().contains(NODE1)));

    let ipvs = text(node, &["svc", "-o", "ipvsadm"]);
    let far = format!("TCP  {NODE1}:30011 random persistent 10800\n  -> {}:9000", cluster.lab.pod("b").v4);
    assert!(ipvs.contains(&far), "{ipvs}");
    let active = ipvs.split(&far).nth(1).unwrap().lines().next().unwrap();
    assert_eq!(active.split_whitespace().collect::<Vec<_>>(), ["Masq", "1", "3", "0"], "{ipvs}");
    drop(streams);
    assert!(eventually(PATIENCE, || count(&["--state", "closing"]) > 0 || count(&[]) == 0));
}

#[test]
fn the_metrics_count_the_flows_that_get_shows() {
    let Some(cluster) = Cluster::or_skip() else { return };
    expose(&cluster);
    let daemon = cluster.start();
    let node = cluster.lab.node("node1");
    let _streams = [connect(&cluster, 30010, 20), connect(&cluster, 30011, 3)];
    let remote = items(node, &["flows"]).iter().filter(|flow| flow["isRemote"] == true).count();
    // They are counted once a minute, and first of all when a daemon starts.
    daemon.kill();
    let options = ["--service-metrics", "2"];
    let daemon = Daemon::start_with(&cluster.lab, "node1", &cluster.manifests.dir, &options).unwrap();
    let _more = connect(&cluster, 30011, 1);
    let open = "kubelane_service_flows{namespace=\"default\",port=\"tcp\",service=\"far\",state=\"established\"}";
    assert!(eventually(PATIENCE, || daemon.metric(open).ok() == Some(3.0)), "{}", daemon.metrics().unwrap());
    assert_eq!(daemon.metric("kubelane_snat_ports_used ").unwrap(), remote as f64);
}

#[test]
fn services_are_ordered_named_and_cut_as_kubectl_does_it() {
    let Some(cluster) = Cluster::or_skip() else { return };
    expose(&cluster);
    cluster.start().kill();
    let node = cluster.lab.node("node1");
    assert_eq!(text(node, &["svc", "-o", "name"]), "service/default/both\nservice/default/far\n");
    let by_id = text(node, &["svc", "far", "--no-headers", "--sort-by", "{.address}"]);
    let addresses: Vec<&str> = by_id.lines().map(|line| line.split_whitespace().nth(4).unwrap()).collect();
    assert_eq!(addresses, ["0.0.0.0:30011", "10.96.0.11:90", "[::]:30011", "[fd96::b]:90"]);
    let template = "jsonpath={range .items[?@.kinds[0]=='ClusterIP']}{.name} {.address}{\"\\n\"}{end}";
    let shown = text(node, &["services", "-o", template]);
    assert_eq!(shown, "both 10.96.0.10:90\nboth [fd96::a]:90\nfar 10.96.0.11:90\nfar [fd96::b]:90\n");
    for (arguments, expected) in [
        (&["flows", "--sort-by", ".client"][..], "--sort-by does not apply"),
        (&["backends", "-o", "ipvsadm"], "-o ipvsadm is for services only"),
        (&["flows", "--watch"], "cannot be watched"),
        (&["status", "-n", "default"], "`get status` is a single record"),
        (&["services", "-n", "x", "-A"], "cannot be used with"),
        (&["services", "-o", "jsonpath={.items"], "a { without its }"),
        (&["services", "--sort-by", "a["], "not a JSONPath"),
        (&["services", "--service", "web"], "NAMESPACE/NAME"),
    ] {
        let output = run(node, arguments);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && said.contains(expected), "{arguments:?}: {said}");
    }
}

/// A child that is ended with its owner.
struct Watcher(Child);

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_watch_tells_of_what_comes_changes_and_goes_until_nobody_reads() {
    let Some(cluster) = Cluster::or_skip() else { return };
    expose(&cluster);
    let _daemon = cluster.start();
    let node = cluster.lab.node("node1");
    let mut watcher = Watcher(kubelane(node, &["svc", "-w", "-o", "json"]).stdout(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(watcher.0.stdout.take().unwrap()).lines();
    let mut next = || -> (String, String) {
        let line: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        (text(&line["type"]), text(&line["object"]["name"]))
    };
    let is = |event: &str, name: &str| (event.to_owned(), name.to_owned());
    assert!((0..8).all(|_| next().0 == "ADDED"));
    cluster.put_with("new", 12, json!([port("tcp", "TCP", 90)]), json!({}), &[], &[]);
    assert_eq!([next(), next()], [is("ADDED", "new"), is("ADDED", "new")]);
    cluster.put_with(
        "new",
        12,
        json!([port("tcp", "TCP", 90)]),
        json!({}),
        &[("tcp", "TCP", 9000)],
        &cluster.ready(&["a"]),
    );
    assert_eq!([next(), next()], [is("MODIFIED", "new"), is("MODIFIED", "new")]);
    cluster.manifests.delete("new");
    assert_eq!([next(), next()], [is("DELETED", "new"), is("DELETED", "new")]);
    drop(lines);
    cluster.put_with("last", 13, json!([port("tcp", "TCP", 90)]), json!({}), &[], &[]);
    let mut status = None;
    assert!(eventually(PATIENCE, || {
        status = watcher.0.try_wait().unwrap();
        status.is_some()
    }));
    assert_eq!(status.unwrap().code(), Some(0));
}

/// Fills both tables of flows; how many there are.
fn fill(node: &Node) -> usize {
    let table = |name: &str| MapHandle::from_pinned_path(pinned::maps_directory(&node.pin_path).join(name)).unwrap();
    let mut count = 0;
    for (map, is_ipv6) in [(table("flows4"), false), (table("flows6"), true)] {
        let rows = map.max_entries();
        count += rows as usize;
        for first in (0..rows).step_by(4096) {
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            let batch = first..rows.min(first + 4096);
            for row in batch.clone() {
                let key = FlowKey4 {
                    source: (0x0b00_0000 + (row >> 8)).to_be_bytes(),
                    destination: [172, 31, 0, 11],
                    source_port_be: (row as u16 & 255 | 1024).to_be_bytes(),
                    destination_port_be: 30010u16.to_be_bytes(),
                    protocol: 6,
                    zero: [0; 3],
                };
                let mut wide = FlowKey::from(key);
                let mut flow: Flow = bytemuck::Zeroable::zeroed();
                flow.state = flow_flag::FLOW_PROVED;
                flow.ends = wide.ends;
                if is_ipv6 {
                    wide.ends.source[0] = 0xfd;
                    keys.extend_from_slice(bytemuck::bytes_of(&wide));
                } else {
                    keys.extend_from_slice(bytemuck::bytes_of(&key));
                }
                values.extend_from_slice(bytemuck::bytes_of(&flow));
            }
            map.update_batch(&keys, &values, batch.len() as u32, MapFlags::ANY, MapFlags::ANY).unwrap();
        }
    }
    count
}

#[test]
fn half_a_million_flows_are_written_within_fifty_megabytes_and_a_reader_may_leave() {
    let Some(cluster) = Cluster::or_skip() else { return };
    expose(&cluster);
    cluster.start().kill();
    let node = cluster.lab.node("node1");
    let count = fill(node);
    assert!(count > 500_000, "{count}");
    for (arguments, lines) in [(&["flows"][..], count + 1), (&["flows", "-o", "name"], count)] {
        let mut child = kubelane(node, arguments).stdout(Stdio::piped()).spawn().unwrap();
        let mut reader = BufReader::new(child.stdout.take().unwrap());
        let (mut seen, mut line) = (0, Vec::new());
        // Behind the half, the most that it has had so far.
        let mut peak = 0;
        while reader.read_until(b'\n', &mut line).unwrap() > 0 {
            seen += 1;
            line.clear();
            if seen == count - 1000 {
                let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
                let high = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
                peak = high.trim().trim_end_matches(" kB").parse().unwrap();
            }
        }
        assert!(child.wait().unwrap().success());
        assert_eq!(seen, lines, "{arguments:?}");
        assert!((1..50 * 1024).contains(&peak), "{arguments:?}: {peak} KiB for {count} flows");
        println!("{arguments:?}: {count} flows, {peak} KiB at most");
    }
    for output in ["wide", "json", "yaml", "name"] {
        let arguments = ["flows", "-o", output];
        let mut child = kubelane(node, &arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let status = child.wait().unwrap();
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!((status.code(), said.as_str()), (Some(0), ""), "{output}");
    }
    let filtered = items(node, &["flows", "--address", "11.0.0.7"]);
    assert_eq!(filtered.len(), 256);
}
