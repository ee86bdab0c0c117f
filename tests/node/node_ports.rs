//! A client outside all nodes, and real daemons: NodePorts, load balancer IPs and external IPs by both families, what
//! the pods see as their client, what is refused or dropped, and a daemon that is killed in the middle of a transfer.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::laboratory::cluster::Cluster;
use crate::laboratory::daemon::Daemon;
use crate::laboratory::eventually;
use crate::laboratory::manifests::{Endpoint, port};

/// Where every pod says who asks, by TCP (which then echoes) and UDP.
const ASKED: u16 = 7000;
const CLIENT: [&str; 2] = ["172.31.0.1", "fd31::1"];
const NODE1: [&str; 2] = ["172.31.0.11", "fd31::11"];
/// Addresses that the client reaches by node1.
const VIPS: [&str; 2] = ["192.0.2.0/24", "2001:db8::/32"];
/// A refused connect() may have to wait for its second SYN.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long nothing has to come for a packet to count as dropped.
const SILENCE: Duration = Duration::from_millis(1500);

#[derive(Clone, Copy, Debug)]
enum By {
    Tcp,
    Udp,
}

/// What a client outside gets: who it is to the pod, or nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    Seen([&'static str; 2]),
    Refused,
    Dropped,
}

fn answer(cluster: &Cluster, pod: &str) {
    let at = SocketAddr::new("::".parse().unwrap(), ASKED);
    let (listener, datagrams) =
        cluster.lab.pod(pod).inside(|| Ok((TcpListener::bind(at)?, UdpSocket::bind(at)?))).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let peer = stream.peer_addr()?.ip().to_canonical();
                writeln!(stream, "{peer}")?;
                std::io::copy(&mut stream.try_clone()?, &mut stream)
            });
        }
    });
    std::thread::spawn(move || {
        while let Ok((_, peer)) = datagrams.recv_from(&mut [0; 100]) {
            let _ = datagrams.send_to(peer.ip().to_canonical().to_string().as_bytes(), peer);
        }
    });
}

/// The client's address as the pod sees it.
fn ask(by: By, to: SocketAddr, patience: Duration) -> std::io::Result<IpAddr> {
    let text = match by {
        By::Tcp => {
            let mut stream = TcpStream::connect_timeout(&to, patience)?;
            stream.set_read_timeout(Some(patience))?;
            stream.shutdown(std::net::Shutdown::Write)?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            text
        }
        By::Udp => {
            let socket =
                UdpSocket::bind(SocketAddr::new(if to.is_ipv4() { "0.0.0.0" } else { "::" }.parse().unwrap(), 0))?;
            socket.connect(to)?;
            socket.set_read_timeout(Some(patience))?;
            socket.send(b"?")?;
            let mut bytes = [0; 100];
            let length = socket.recv(&mut bytes)?;
            String::from_utf8_lossy(&bytes[..length]).into_owned()
        }
    };
    text.trim().parse().map_err(|_| std::io::Error::other(format!("{to} answered {text:?}")))
}

fn assert_answer(what: &str, by: By, to: SocketAddr, expected: Expect) {
    let patience = if expected == Expect::Dropped { SILENCE } else { PATIENCE };
    let got = ask(by, to, patience);
    let family = usize::from(to.is_ipv6());
    let is_right = match (&got, expected) {
        (Ok(peer), Expect::Seen(seen)) => peer.to_string() == seen[family],
        (Err(error), Expect::Refused) => error.kind() == ErrorKind::ConnectionRefused,
        (Err(error), Expect::Dropped) => matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock),
        _ => false,
    };
    assert!(is_right, "{what}: {by:?} to {to}: {got:?}, not {expected:?}");
}

/// A Service with NodePort `node_port` for TCP and UDP, and with endpoints in `pods`.
fn put(cluster: &Cluster, name: &str, node_port: u16, changes: Value, pods: &[&str]) {
    let ports = [("tcp", "TCP"), ("udp", "UDP")].map(|(name, protocol)| {
        let mut object = port(name, protocol, 80);
        object["nodePort"] = json!(node_port);
        object
    });
    let targets = [("tcp", "TCP", ASKED), ("udp", "UDP", ASKED)];
    let endpoints: Vec<Endpoint> = cluster.ready(pods);
    let number = u8::try_from(node_port - 30_000).unwrap();
    cluster.put_with(name, number, json!(ports), changes, &targets, &endpoints);
}

fn load_balancer(last: u8, ranges: &[&str]) -> Value {
    let ips = [format!("192.0.2.{last}"), format!("2001:db8::{last}")];
    json!({
        "spec": {"type": "LoadBalancer", "loadBalancerSourceRanges": ranges},
        "status": {"loadBalancer": {"ingress": [{"ip": ips[0]}, {"ip": ips[1]}]}},
    })
}

fn world(cluster: &Cluster) {
    let node_port = || json!({"spec": {"type": "NodePort"}});
    let local = || json!({"spec": {"type": "NodePort", "externalTrafficPolicy": "Local"}});
    put(cluster, "here", 30_001, node_port(), &["a"]);
    put(cluster, "there", 30_002, node_port(), &["b"]);
    put(cluster, "local", 30_003, local(), &["a", "b", "c"]);
    put(cluster, "away", 30_004, local(), &["b"]);
    put(cluster, "nowhere", 30_005, node_port(), &[]);
    put(cluster, "open", 30_006, load_balancer(6, &[]), &["a"]);
    put(cluster, "mine", 30_007, load_balancer(7, &["172.31.0.0/24", "fd31::/64"]), &["b"]);
    put(cluster, "others", 30_008, load_balancer(8, &["10.0.0.0/8", "fd99::/16"]), &["a"]);
    put(cluster, "six", 30_009, load_balancer(9, &["10.0.0.0/8", "::/0"]), &["a"]);
    let external = json!({"spec": {"externalIPs": ["192.0.2.10", "2001:db8::10"], "type": "NodePort"}});
    put(cluster, "external", 30_010, external, &["a"]);
    for pod in ["a", "b", "c"] {
        answer(cluster, pod);
    }
    for network in VIPS {
        cluster.lab.route_outside(network, "node1").unwrap();
    }
}

fn start(cluster: &Cluster) -> Vec<Daemon<'_>> {
    let daemons = ["node1", "node2"].map(|node| Daemon::start(&cluster.lab, node, &cluster.manifests.dir).unwrap());
    daemons.into()
}

#[test]
fn a_client_outside_gets_what_the_services_say_by_both_families_and_protocols() {
    let Some(cluster) = Cluster::or_skip() else { return };
    world(&cluster);
    let daemons = start(&cluster);
    let vip = |last: u8| [format!("192.0.2.{last}"), format!("2001:db8::{last}")];
    let node1 = NODE1.map(str::to_owned);
    let node2 = ["172.31.0.12", "fd31::12"].map(str::to_owned);
    let seen = Expect::Seen(CLIENT);
    let table: [(&str, [String; 2], u16, [Expect; 2]); 14] = [
        ("a local pod sees the client", node1.clone(), 30_001, [seen; 2]),
        ("a remote pod sees the node", node1.clone(), 30_002, [Expect::Seen(NODE1); 2]),
        ("policy Local keeps the client", node1.clone(), 30_003, [seen; 2]),
        ("policy Local without a local pod", node1.clone(), 30_004, [Expect::Dropped; 2]),
        ("policy Local where the pod is", node2.clone(), 30_004, [seen; 2]),
        ("no endpoint", node1.clone(), 30_005, [Expect::Refused; 2]),
        ("no endpoint, the other node", node2, 30_005, [Expect::Refused; 2]),
        ("a load balancer IP", vip(6), 80, [seen; 2]),
        ("inside the source ranges", vip(7), 80, [Expect::Seen(NODE1); 2]),
        ("outside the source ranges", vip(8), 80, [Expect::Dropped; 2]),
        ("NodePorts have no source ranges", node1.clone(), 30_008, [seen; 2]),
        ("::/0 lets no IPv4 client in", vip(9), 80, [Expect::Dropped, seen]),
        ("an external IP", vip(10), 80, [seen; 2]),
        ("a NodePort beside it", node1, 30_010, [seen; 2]),
    ];
    let outcome = cluster.lab.outside(|| {
        for (what, addresses, port, expected) in &table {
            for (family, address) in addresses.iter().enumerate() {
                for by in [By::Tcp, By::Udp] {
                    let to = SocketAddr::new(address.parse()?, *port);
                    assert_answer(what, by, to, expected[family]);
                }
            }
        }
        Ok(())
    });
    outcome.unwrap();
    let verdicts =
        |name: &str| daemons[0].metric(&format!("kubelane_datapath_verdicts_total{{verdict=\"{name}\"}}")).unwrap();
    for name in
        ["dropped_source_range", "dropped_no_local_endpoint", "refused_no_endpoint", "flow_local", "flow_remote"]
    {
        assert!(verdicts(name) >= 2.0, "{name}: {}", daemons[0].metrics().unwrap());
    }
}

#[test]
fn source_ranges_are_followed_while_the_service_runs() {
    let Some(cluster) = Cluster::or_skip() else { return };
    world(&cluster);
    let _daemons = start(&cluster);
    let to = |last: &str| SocketAddr::new(format!("192.0.2.{last}").parse().unwrap(), 80);
    let expect = |expected| {
        let reached = || Ok(ask(By::Udp, to("6"), SILENCE).is_ok());
        let is_followed = eventually(PATIENCE, || cluster.lab.outside(reached).unwrap() == expected);
        assert!(is_followed, "reached={expected} did not come true; {}", cluster.lab.node("node1").host.log_tail());
    };
    expect(true);
    put(&cluster, "open", 30_006, load_balancer(6, &["10.0.0.0/8"]), &["a"]);
    expect(false);
    put(&cluster, "open", 30_006, load_balancer(6, &["172.31.0.1/32"]), &["a"]);
    expect(true);
    put(&cluster, "open", 30_006, load_balancer(6, &[]), &["a"]);
    expect(true);
}

#[test]
fn packets_that_are_dropped_for_the_nodes_fault_are_told_of_once_with_what_to_do() {
    let Some(cluster) = Cluster::or_skip() else { return };
    world(&cluster);
    let daemons = start(&cluster);
    let reached = || {
        let to = SocketAddr::new(NODE1[0].parse()?, 30_002);
        Ok(ask(By::Udp, to, SILENCE).is_ok())
    };
    assert!(cluster.lab.outside(reached).unwrap());
    let told = || daemons[0].log().matches("(dropped_forwarding_off: ").count();
    assert_eq!(told(), 0, "{}", daemons[0].log());
    let forwarding = |value: &str| {
        let write = || Ok(std::fs::write("/proc/sys/net/ipv4/conf/all/forwarding", value)?);
        cluster.lab.node("node1").host.inside(write).unwrap();
    };
    forwarding("0");
    // Long enough for several looks at the counters.
    for _ in 0..4 {
        assert!(!cluster.lab.outside(reached).unwrap());
    }
    let log = daemons[0].log();
    assert_eq!(told(), 1, "{log}");
    assert!(log.contains("sysctl -w net.ipv4.conf.all.forwarding=1"), "{log}");
    forwarding("1");
    assert!(cluster.lab.outside(reached).unwrap(), "nothing else is disturbed");
    assert_eq!(told(), 1, "{log}");
}

/// Sends and reads back `kilobytes`, a bit at a time.
fn transfer(stream: &mut TcpStream, kilobytes: usize) -> anyhow::Result<()> {
    let block: Vec<u8> = (0..1024u32).map(|n| n as u8).collect();
    let mut back = vec![0; block.len()];
    for n in 0..kilobytes {
        stream.write_all(&block).with_context(|| format!("writing block {n}"))?;
        stream.read_exact(&mut back).with_context(|| format!("reading block {n}"))?;
        anyhow::ensure!(back == block, "block {n} came back changed");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn connect(address: &str, port: u16) -> anyhow::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(address.parse()?, port), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // Past the line that says who asks.
    let mut byte = [0];
    while byte != *b"\n" {
        stream.read_exact(&mut byte)?;
    }
    Ok(stream)
}

#[test]
fn connections_outlive_a_killed_daemon_and_new_ones_are_served_without_it() {
    let Some(cluster) = Cluster::or_skip() else { return };
    world(&cluster);
    let daemons = start(&cluster);
    let targets = NODE1.into_iter().flat_map(|node| [(node, 30_001), (node, 30_002)]);
    let mut streams: Vec<TcpStream> =
        cluster.lab.outside(|| targets.map(|(node, port)| connect(node, port)).collect()).unwrap();
    let transfers: Vec<_> =
        streams.drain(..).map(|mut stream| std::thread::spawn(move || transfer(&mut stream, 1000))).collect();
    std::thread::sleep(Duration::from_millis(300));
    daemons.into_iter().for_each(Daemon::kill);
    let asked = cluster.lab.outside(|| {
        for (node, port) in NODE1.into_iter().flat_map(|node| [(node, 30_001), (node, 30_002)]) {
            ask(By::Tcp, SocketAddr::new(node.parse()?, port), PATIENCE)?;
        }
        Ok(())
    });
    asked.expect("the programs serve without a daemon");
    let again = start(&cluster);
    for running in transfers {
        running.join().unwrap().expect("a transfer does not notice");
    }
    assert!(again[0].log().contains("took over this device"), "{}", again[0].log());
    drop(again);
    let node1 = cluster.lab.node("node1");
    node1.cleanup().unwrap();
    let left = cluster.lab.outside(|| Ok(ask(By::Udp, SocketAddr::new(NODE1[0].parse()?, 30_001), SILENCE).is_ok()));
    assert!(!left.unwrap(), "cleanup leaves no program on the device");
}
