//! What surrounds the daemon: load balancers that ask for a Service's health, people who read events, schedulers that
//! wait for a taint to go, rollouts that wait for /readyz, and strangers at the health port.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use bytemuck::bytes_of;
use kubelane::abi::{Backend, Frontend, FrontendKey};
use kubelane::bpf::Maps;
use kubelane::model::Protocol;
use kubelane::sync::{MapIo as _, MapName};
use serde_json::{Value, json};

use crate::laboratory::api_cluster::ApiCluster;
use crate::laboratory::apiserver::{Answer, Resource, Verb};
use crate::laboratory::cluster::{self, Cluster, names};
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::manifests::{Endpoint, port, service, slice};
use crate::laboratory::messages::Kind;
use crate::laboratory::{eventually, process, skip};

const NODE1: [&str; 2] = ["172.31.0.11", "fd31::11"];

/// A Service that a load balancer asks about.
fn asked(health_port: u16) -> Value {
    let spec = json!({
        "type": "LoadBalancer", "clusterIP": "10.96.0.20", "clusterIPs": ["10.96.0.20"],
        "externalTrafficPolicy": "Local", "healthCheckNodePort": health_port,
        "ports": [{"name": "tcp", "protocol": "TCP", "port": 90, "nodePort": 30090}],
    });
    service("asked", spec)
}

/// What a load balancer gets at every address of the node: nothing, or status, weight and body.
fn answers(daemon: &Daemon, port: u16) -> Vec<Option<(u16, String, Value)>> {
    let addresses = ["127.0.0.1", "[::1]", NODE1[0], "[fd31::11]"];
    let ask = |ip: &&str| {
        let answer = daemon.get(&format!("{ip}:{port}"), "/any/path").ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let head = head.to_lowercase();
        assert!(head.contains("content-type: application/json") && head.contains("x-content-type-options: nosniff"));
        let weight = head.lines().find_map(|line| line.strip_prefix("x-load-balancing-endpoint-weight: "))?;
        Some((head.split(' ').nth(1)?.parse().ok()?, weight.to_owned(), serde_json::from_str(body).ok()?))
    };
    addresses.iter().map(ask).collect()
}

fn all_are(daemon: &Daemon, port: u16, status: u16, endpoints: u32) -> bool {
    let body = json!({
        "service": {"namespace": "default", "name": "asked"},
        "localEndpoints": endpoints,
        "serviceProxyHealthy": true,
    });
    let expected = Some((status, endpoints.to_string(), body));
    answers(daemon, port).iter().all(|answer| *answer == expected)
}

fn none_is(daemon: &Daemon, port: u16) -> bool {
    answers(daemon, port).iter().all(Option::is_none)
}

#[test]
fn load_balancers_are_told_of_local_endpoints_as_services_come_change_and_go() {
    let Some(cluster) = ApiCluster::or_skip() else { return };
    let daemon = cluster.start();
    let follows = |condition: &dyn Fn() -> bool| eventually(PATIENCE, condition);
    cluster.server.upsert(asked(32100));
    assert!(follows(&|| all_are(&daemon, 32100, 503, 0)), "{:?}", answers(&daemon, 32100));
    cluster.put_slice("asked", &["a", "b", "c"]);
    assert!(follows(&|| all_are(&daemon, 32100, 200, 1)), "{:?}", answers(&daemon, 32100));
    let ending = [Endpoint::terminating(cluster.address("a"), "node1"), Endpoint::ready(cluster.address("b"), "node2")];
    cluster.server.upsert(slice("asked-1", "asked", &[("tcp", "TCP", 9000)], &ending));
    assert!(follows(&|| all_are(&daemon, 32100, 503, 0)), "an endpoint that ends is none");

    cluster.put_slice("asked", &["a"]);
    cluster.server.upsert(asked(32101));
    assert!(follows(&|| all_are(&daemon, 32101, 200, 1)) && none_is(&daemon, 32100), "another port");
    let mut everywhere = asked(32101);
    everywhere["spec"]["externalTrafficPolicy"] = json!("Cluster");
    cluster.server.upsert(everywhere);
    assert!(follows(&|| none_is(&daemon, 32101)), "policy Cluster has no health check");
    cluster.server.upsert(asked(32102));
    assert!(follows(&|| all_are(&daemon, 32102, 200, 1)));
    cluster.server.delete(Resource::Services, "default", "asked");
    assert!(follows(&|| none_is(&daemon, 32102)), "a Service that is gone");
}

#[test]
fn a_health_check_port_that_is_taken_is_an_event_and_is_had_when_it_is_free() {
    let Some(cluster) = ApiCluster::or_skip() else { return };
    let host = &cluster.lab.node("node1").host;
    let taken = host.inside(|| Ok(TcpListener::bind((Ipv4Addr::UNSPECIFIED, 32100))?)).unwrap();
    cluster.server.upsert(asked(32100));
    cluster.put_slice("asked", &["a"]);
    let daemon = cluster.start();
    let events = || cluster.server.events("FailedToStartServiceHealthcheck");
    assert!(eventually(PATIENCE, || !events().is_empty()), "{}", daemon.log());
    drop(taken);
    assert!(eventually(PATIENCE, || all_are(&daemon, 32100, 200, 1)), "{}", daemon.log());
    let told = events();
    assert_eq!(told.len(), 1, "{told:#?}");
    let event = &told[0];
    assert_eq!((&event["type"], &event["action"]), (&json!("Warning"), &json!("Listen")));
    assert_eq!(event["reportingController"], "kubelane");
    let regarding = &event["regarding"];
    assert_eq!(
        (&regarding["kind"], &regarding["namespace"], &regarding["name"]),
        (&json!("Service"), &json!("default"), &json!("asked"))
    );
    let note = event["note"].as_str().unwrap();
    assert!(note.contains("node1") && note.contains("32100"), "{note}");
}

#[test]
fn node_port_addresses_are_where_health_checks_are_answered() {
    let Some(cluster) = ApiCluster::or_skip() else { return };
    cluster.server.upsert(asked(32100));
    cluster.put_slice("asked", &["a"]);
    let daemon = cluster.start_with(&["--nodeport-addresses", "172.31.0.0/24,fd99::/64"]);
    let is_there = || answers(&daemon, 32100).iter().map(Option::is_some).collect::<Vec<_>>();
    assert!(eventually(PATIENCE, || is_there() == [false, false, true, false]), "{:?}", is_there());
}

#[test]
fn people_read_of_the_start_and_of_services_that_cannot_be_served_as_asked() {
    let Some(cluster) = ApiCluster::or_skip() else { return };
    cluster.server.fail_writes([500, 503]);
    let sctp = json!({"clusterIP": "10.96.0.21", "clusterIPs": ["10.96.0.21"], "ports": [port("s", "SCTP", 5000)]});
    cluster.server.upsert(service("tunnel", sctp));
    for (name, ip) in [("first", "10.96.0.22"), ("second", "10.96.0.23")] {
        let spec =
            json!({"clusterIP": ip, "clusterIPs": [ip], "externalIPs": ["192.0.2.9"], "ports": [port("w", "TCP", 80)]});
        cluster.server.upsert(service(name, spec));
    }
    let daemon = cluster.start();
    assert!(eventually(PATIENCE, || cluster.server.events("Starting").len() == 1), "{}", daemon.log());
    let starting = cluster.server.events("Starting").remove(0);
    assert_eq!((&starting["type"], &starting["metadata"]["namespace"]), (&json!("Normal"), &json!("default")));
    let node = &starting["regarding"];
    assert_eq!((&node["kind"], &node["name"], &node["uid"]), (&json!("Node"), &json!("node1"), &json!("node1")));
    let notes = || -> Vec<String> {
        let events = cluster.server.events("NotServedAsAsked");
        let note = |e: &Value| format!("{}: {}", e["regarding"]["name"].as_str().unwrap(), e["note"].as_str().unwrap());
        events.iter().map(note).collect()
    };
    let has = |service: &str, part: &str| notes().iter().any(|n| n.starts_with(service) && n.contains(part));
    // What every node says each of them says at a time of its own, within half a minute.
    assert!(eventually(PATIENCE * 2, || has("tunnel", "SCTP") && has("second", "192.0.2.9:80")), "{:#?}", notes());
    assert!(!has("first", ""), "the older Service keeps its address: {:#?}", notes());
}

#[test]
fn the_startup_taint_goes_when_the_daemon_is_ready_and_not_before() {
    let Some(cluster) = ApiCluster::or_skip() else { return };
    let taint = |key: &str, effect: &str| json!({"key": key, "effect": effect});
    let own = "kubelane.io/not-ready";
    let node = |taints: Value| json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": "node1"}, "spec": {"taints": taints}});
    cluster.server.upsert(node(json!([
        taint(own, "NoExecute"),
        taint("other", "NoSchedule"),
        taint(own, "NoSchedule")
    ])));
    let keys = || -> Vec<String> {
        let node = cluster.server.get(Resource::Nodes, "", "node1").unwrap();
        let taints = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
        taints.iter().map(|taint| taint["key"].as_str().unwrap().to_owned()).collect()
    };
    // Without EndpointSlices there is no first sync.
    let empty = "{}";
    cluster.server.script(
        Resource::EndpointSlices,
        Verb::StreamingList,
        [Answer::Body(500, empty.into()), Answer::Body(500, empty.into())],
    );
    let still = std::thread::scope(|scope| {
        let before = scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(700));
            keys()
        });
        let daemon = cluster.start_with(&["--startup-taint", own]);
        assert!(eventually(PATIENCE, || keys() == ["other"]), "{:?}; {}", keys(), daemon.log());
        // A Node that is registered anew has it again.
        cluster.server.upsert(node(json!([taint(own, "NoSchedule")])));
        assert!(eventually(PATIENCE, || keys().is_empty()), "{:?}; {}", keys(), daemon.log());
        before.join().unwrap()
    });
    assert_eq!(still, [own, "other", own], "while the daemon was not ready");
}

#[test]
fn ready_means_that_a_connection_went_through_the_datapath_and_nothing_of_it_is_left() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("echo", 10, json!({}), &cluster.ready(&["a", "b"]));
    let node = cluster.lab.node("node1");
    let maps = || ["services", "backends"].map(|what| node.get(what, &["-o", "json"]).unwrap());
    let daemon = cluster.start();
    assert!(daemon.log().contains("a connection went through the datapath: IPv4, IPv6"), "{}", daemon.log());
    assert!(daemon.health("/readyz").unwrap().ends_with("\r\n\r\nok\n"));
    let before = maps();
    assert!(!before[0].contains("192.0.0.8") && !before[1].contains("127.0.0.1"), "{before:?}");
    daemon.kill();

    // As if it had been killed in the middle of its trial.
    let key = FrontendKey::new("192.0.0.8".parse().unwrap(), 10256, Protocol::Tcp);
    let mut kernel = Maps::open(&node.pin_path).unwrap();
    let row = Frontend { flags: 1, ..Frontend::default() };
    assert!(kernel.write(MapName::Frontends, bytes_of(&key), bytes_of(&row), 1).is_empty());
    let backend = Backend { state: 1, generation: 1, ..Backend::default() };
    assert!(kernel.write(MapName::Backends, bytes_of(&0u32), bytes_of(&backend), 1).is_empty());
    let _daemon = cluster.start();
    let mut found = 0;
    kernel.dump(MapName::Frontends, &mut |at, _| found += u32::from(at == bytes_of(&key))).unwrap();
    kernel.dump(MapName::Backends, &mut |at, _| found += u32::from(at == [0; 4])).unwrap();
    assert_eq!(found, 0, "rows of the trial are left");
    assert_eq!(maps(), before);
}

#[test]
fn a_datapath_that_loses_connections_is_not_ready_and_says_why() {
    let Some(cluster) = Cluster::or_skip() else { return };
    if !process::in_path("iptables") {
        return skip("needs the `iptables` command (Debian: apt-get install iptables; `make setup` does it)");
    }
    cluster.put("echo", 10, json!({}), &cluster.ready(&["a", "b"]));
    let node = cluster.lab.node("node1");
    let rule = |verb: &str| {
        let rule = "INPUT -i lo -p tcp --syn -m multiport ! --dports 10249,10256 -j DROP";
        let run = || Ok(Command::new("iptables").arg(verb).args(rule.split(' ')).status()?);
        assert!(node.host.inside(run).unwrap().success(), "iptables {verb}");
    };
    rule("-I");
    let (cgroup, pins) = (node.cgroup.display().to_string(), node.pin_path.display().to_string());
    let source = format!("dir:{}", cluster.manifests.dir.display());
    let arguments = ["run", "--hostname-override=node1", "--source", &source, "--cgroup", &cgroup, "--pin-path", &pins];
    let daemon = Daemon::spawn_as(&cluster.lab, "node1", &arguments).unwrap();
    let readyz = || daemon.health("/readyz").unwrap_or_default();
    let expected =
        "not ready: a connection through the datapath failed: to 192.0.0.8:10256: nothing arrived within 2 s";
    assert!(eventually(PATIENCE, || readyz().contains(expected)), "{}; {}", readyz(), daemon.log());
    assert!(daemon.health("/healthz").unwrap().starts_with("HTTP/1.1 200"), "what is programmed serves");
    assert_eq!(names(&cluster.client("client").ask(Kind::Tcp4, cluster::vip(10, 90)[0], 40)), ["a", "b"]);
    rule("-D");
    assert!(eventually(PATIENCE, || readyz().starts_with("HTTP/1.1 200")), "{}; {}", readyz(), daemon.log());
}

#[test]
fn one_stranger_at_the_health_port_does_not_keep_others_from_it() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let node = cluster.lab.node("node1");
    let (cgroup, pins) = (node.cgroup.display().to_string(), node.pin_path.display().to_string());
    let source = format!("dir:{}", cluster.manifests.dir.display());
    let arguments = ["run", "--hostname-override=node1", "--source", &source, "--cgroup", &cgroup, "--pin-path", &pins];
    let daemon = Daemon::start_as(&cluster.lab, "node1", &arguments).unwrap();
    let at: SocketAddr = (Ipv4Addr::new(172, 31, 0, 11), 10256).into();
    let hold = || -> anyhow::Result<Vec<TcpStream>> {
        let half = |_| -> anyhow::Result<TcpStream> {
            let mut stream = TcpStream::connect(at)?;
            stream.write_all(b"GET /healthz HTTP/1.1\r\nX-")?;
            Ok(stream)
        };
        (0..200).map(half).collect()
    };
    // Of a pod: who is outside is answered by the packet programs, and holds nothing.
    let mut held = cluster.lab.pod("client").inside(hold).unwrap();
    for address in ["127.0.0.1:10256", "[::1]:10256", "172.31.0.11:10256", "[fd31::11]:10256"] {
        let answer = daemon.get(address, "/livez").unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{address}: {answer}");
    }
    let last = held.last_mut().unwrap();
    last.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(!matches!(last.read(&mut [0; 1]), Ok(1..)), "beyond its share a stranger is closed at once");
}
