//! Real clients outside, real servers in pods, real kernels between them (see wire/cluster.rs).

mod wire;

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use kubelane::bpf::ThroughStack;
use kubelane::model::Protocol;
use wire::Node;
use wire::cluster::{
    BARRED, CLIENT, Cluster, NODE, OVERLAY, POD_HERE, POD_PORT, POD_THERE, VIP, WILDCARD, ask, publish, transfer,
};

const HERE: u16 = 30081;
const THERE: u16 = 30082;
const NOWHERE: u16 = 30083;

/// The near node's datapath, and each port on each kind of address.
fn near_node(cluster: &Cluster, clsact: bool) -> Node {
    let mut node = cluster.open_near(clsact);
    for family in 0..2 {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            publish(&mut node, HERE, protocol, POD_HERE[family], POD_PORT);
            publish(&mut node, THERE, protocol, POD_THERE[family], POD_PORT);
            node.frontend(WILDCARD[family], NOWHERE, protocol, &[]);
        }
    }
    node
}

fn services(port: u16) -> impl Iterator<Item = (usize, SocketAddr)> {
    [NODE, VIP].into_iter().flat_map(move |addresses| {
        addresses.into_iter().enumerate().map(move |(family, a)| (family, SocketAddr::new(a.parse().unwrap(), port)))
    })
}

#[test]
fn large_transfers_pass_both_ways_to_local_and_remote_pods_and_local_ones_see_the_client() {
    for clsact in [false, true] {
        let cluster = Cluster::new();
        cluster.serve();
        let mut node = near_node(&cluster, clsact);
        cluster.inside("client", || {
            for (port, seen) in [(HERE, CLIENT), (THERE, OVERLAY)] {
                for (family, to) in services(port) {
                    let started = Instant::now();
                    let peer = transfer(to, 20 << 20, 20 << 20).unwrap_or_else(|e| panic!("{to}: {e}"));
                    assert_eq!(peer.to_string(), seen[family], "{to}");
                    assert!(started.elapsed() < Duration::from_secs(30), "{to}: {:?}", started.elapsed());
                }
            }
        });
        let counters = node.counters();
        assert!(counters["icmp_too_big"] >= 1, "path-MTU discovery was needed: {counters:?}");
        assert_eq!(counters["flow_established"], 8, "{counters:?}");
    }
}

#[test]
fn transfers_and_datagrams_pass_through_the_hosts_stack_where_that_is_asked_for() {
    let cluster = Cluster::new();
    cluster.serve();
    let mut node = near_node(&cluster, false);
    node.datapath.route_epoch().unwrap().set_through_stack(ThroughStack::All).unwrap();
    cluster.inside("client", || {
        for (family, to) in services(THERE) {
            let peer = transfer(to, 5 << 20, 5 << 20).unwrap_or_else(|e| panic!("{to}: {e}"));
            assert_eq!(peer.to_string(), OVERLAY[family], "{to}");
            for length in [1, 1400, 3000, 20_000] {
                let (peer, sent) = ask(to, length);
                assert_eq!(peer.to_string(), OVERLAY[family], "{to}");
                assert!(sent <= 4, "{to}: {length} bytes took {sent} datagrams");
            }
        }
    });
    let counters = node.counters();
    assert!(counters["handed_to_stack"] > 1000, "{counters:?}");
    // What the host's policy forbids does not pass: it sees the client's address.
    let forbidden = |to: SocketAddr| {
        cluster.inside("client", || {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            socket.bind(&SocketAddr::new(BARRED.parse().unwrap(), 0).into()).unwrap();
            socket.connect_timeout(&to.into(), Duration::from_millis(700)).is_err()
        })
    };
    let to = SocketAddr::new(NODE[0].parse().unwrap(), THERE);
    assert!(forbidden(to), "through the stack");
    node.datapath.route_epoch().unwrap().set_through_stack(ThroughStack::None).unwrap();
    assert!(!forbidden(to), "sent on from here");
}

#[test]
fn datagrams_larger_than_any_mtu_arrive_whole_both_ways() {
    let cluster = Cluster::new();
    cluster.serve();
    let _node = near_node(&cluster, false);
    cluster.inside("client", || {
        for (port, seen) in [(HERE, CLIENT), (THERE, OVERLAY)] {
            for (family, to) in services(port) {
                for length in [1, 1400, 1472, 3000, 20_000] {
                    let (peer, sent) = ask(to, length);
                    assert_eq!(peer.to_string(), seen[family], "{to}");
                    assert!(sent <= 4, "{to}: {length} bytes took {sent} datagrams");
                }
            }
        }
    });
}

#[test]
fn refused_is_at_once_and_a_policy_on_the_node_still_knows_the_client() {
    let cluster = Cluster::new();
    cluster.serve();
    let _node = near_node(&cluster, false);
    cluster.inside("client", || {
        for node in NODE {
            let to = SocketAddr::new(node.parse().unwrap(), NOWHERE);
            let started = Instant::now();
            let socket = std::net::UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
            socket.connect(to).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            socket.send(b"anybody?").unwrap();
            assert_eq!(socket.recv(&mut [0; 10]).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{node}");
            assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
            // On one machine the answer comes while connect() still holds the socket, and counts for the second SYN.
            let error = transfer(to, 0, 0).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{node}: {error}");
            assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
        }
        let to = SocketAddr::new(NODE[0].parse().unwrap(), HERE);
        let socket = std::net::UdpSocket::bind((BARRED, 0)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        socket.send_to(b"let me in", to).unwrap();
        assert!(socket.recv(&mut [0; 100]).is_err(), "the node's rule bars this client's address");
        assert_eq!(ask(to, 9).0.to_string(), CLIENT[0]);
    });
}

#[test]
fn thousands_of_short_connections_from_one_client_never_stall() {
    let cluster = Cluster::new();
    cluster.serve();
    let mut node = near_node(&cluster, false);
    cluster.inside("client", || {
        for (_, to) in services(THERE).take(2) {
            for n in 0..2500 {
                let started = Instant::now();
                transfer(to, 1, 1).unwrap_or_else(|e| panic!("{to}, connection {n}: {e}"));
                assert!(
                    started.elapsed() < Duration::from_millis(900),
                    "{to}, connection {n}: {:?}",
                    started.elapsed()
                );
            }
        }
    });
    let counters = node.counters();
    assert_eq!(counters["flow_remote"], 5000, "{counters:?}");
    assert_eq!(counters["dropped_snat_exhausted"], 0);
}
