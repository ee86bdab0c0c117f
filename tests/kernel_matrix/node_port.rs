//! What comes from outside to a NodePort: real clients, real pods on two nodes (laboratory/packets/network.rs), and ICMP
//! errors in both directions.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use kubelane::abi::ServiceName;
use kubelane::abi::counter::COUNTER_FLOW_REMOTE;
use kubelane::bpf::{Counting, Datapath, Device, Direction, Hook, LinkLayer, Rehearsal, Role};
use kubelane::model::Protocol;
use kubelane::sync::MapName;

use crate::laboratory::packets::errors::{assert_error, error};
use crate::laboratory::packets::frame::{ACK, Frame, SYN, tcp, udp};
use crate::laboratory::packets::network::{
    CLIENT, NODE, Network, OVERLAY, POD_HERE, POD_PORT, POD_THERE, WILDCARD, ask, publish, transfer,
};
use crate::laboratory::packets::{
    self, CLIENT4, CLIENT6, LOCAL4, LOCAL6, NODE4, NODE6, PASS, REDIRECT, REMOTE4, REMOTE6, TUNNEL4, TUNNEL6,
};
use crate::node::can_run;

/// Of a pod on the node, and of one elsewhere: the namespace, its addresses, and whom it sees as its client.
const PODS: [(&str, [&str; 2], [&str; 2]); 2] = [("podn", POD_HERE, CLIENT), ("podf", POD_THERE, OVERLAY)];
/// An answer that takes longer does not come, in a guest in software emulation either.
const PATIENCE: Duration = Duration::from_secs(30);

/// The NodePort on the near node.
fn node_port(family: usize, port: u16) -> SocketAddr {
    SocketAddr::new(NODE[family].parse().unwrap(), port)
}

fn udp_socket(ip: IpAddr, port: u16) -> UdpSocket {
    let socket = UdpSocket::bind((ip, port)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Lets nobody receive any more at a port that the kernel has chosen. To close the socket is not enough: a process that
/// another test forks has a copy of it until it becomes another program, and would take what comes.
fn give_up_port(socket: &UdpSocket) {
    let none = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    // SAFETY: `none` is a whole socket address that outlives the call.
    let result = unsafe { libc::connect(socket.as_raw_fd(), &none, size_of_val(&none) as libc::socklen_t) };
    assert_eq!((result, socket.local_addr().unwrap().port()), (0, 0), "{}", std::io::Error::last_os_error());
}

#[test]
fn a_client_outside_reaches_pods_here_and_elsewhere_through_a_node_port_and_hears_them() {
    if !can_run() {
        return;
    }
    let cluster = Network::new();
    cluster.serve();
    let mut node = cluster.open_near(false);
    for (port, (_, pod, seen)) in (30080..).zip(PODS) {
        for family in 0..2 {
            publish(&mut node, port, Protocol::Tcp, pod[family], POD_PORT);
            publish(&mut node, port, Protocol::Udp, pod[family], POD_PORT);
            let to = node_port(family, port);
            cluster.inside("client", || {
                let peer = transfer(to, 300_000, 300_000).unwrap_or_else(|e| panic!("{to}: {e}"));
                assert_eq!(peer.to_string(), seen[family], "TCP to {to}");
                // The longer ones are fragmented.
                for length in [1, 1000, 3000] {
                    assert_eq!(ask(to, length).0.to_string(), seen[family], "{length} bytes to {to}");
                }
            });
        }
    }
    let counters = node.counters();
    assert!(counters["icmp_too_big"] >= 2, "TCP to the pod elsewhere needs its path's MTU: {counters:?}");
    assert!(counters["flow_local"] >= 4 && counters["flow_remote"] >= 4, "{counters:?}");
}

#[test]
fn a_socket_that_is_gone_is_told_to_the_one_at_the_other_end_of_a_node_port() {
    const CLOSED: u16 = 9;
    const LATE: u16 = 8081;
    if !can_run() {
        return;
    }
    let cluster = Network::new();
    let mut node = cluster.open_near(false);
    for (port, (space, pod, seen)) in (30080..).step_by(2).zip(PODS) {
        for family in 0..2 {
            publish(&mut node, port, Protocol::Udp, pod[family], CLOSED);
            publish(&mut node, port + 1, Protocol::Udp, pod[family], LATE);
            let any = WILDCARD[family].parse().unwrap();
            let closed = node_port(family, port);
            let error = cluster.inside("client", || {
                let client = udp_socket(any, 0);
                client.connect(closed).unwrap();
                client.send(b"anybody?").unwrap();
                client.recv(&mut [0; 16]).unwrap_err()
            });
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "a request to {closed}");

            let late = node_port(family, port + 1);
            let server = cluster.inside(space, || udp_socket(pod[family].parse().unwrap(), LATE));
            cluster.inside("client", || {
                let client = udp_socket(any, 0);
                client.send_to(b"late?", late).unwrap();
                give_up_port(&client);
            });
            let (_, client) = server.recv_from(&mut [0; 16]).unwrap();
            assert_eq!(client.ip().to_string(), seen[family], "{late}");
            server.connect(client).unwrap();
            server.send(b"too late").unwrap();
            let error = server.recv(&mut [0; 16]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "a reply of {late}");
        }
    }
    assert_eq!(node.counters()["icmp_translated"], 8);
}

/// A packet from one end to the other.
fn packet(protocol: Protocol, from: (&str, u16), to: (&str, u16), flags: u8) -> Frame {
    match protocol {
        // An answer acknowledges the request.
        Protocol::Tcp if flags == SYN | ACK => tcp(from, to, flags).numbered(7000, 1001),
        Protocol::Tcp => tcp(from, to, flags),
        _ => udp(from, to, &[5; 100]),
    }
}

/// `kubelane trace`: what the programs do to a packet on copies of their tables, beside those that are attached.
#[test]
fn a_packet_is_tried_as_it_would_be_served_and_the_tables_stay_as_they_are() {
    if !can_run() {
        return;
    }
    let mut node = packets::Node::new();
    let id = node.next_backend();
    node.backend(id, REMOTE4, 8080, Protocol::Tcp, false);
    node.frontend("0.0.0.0", 30080, Protocol::Tcp, &[id]);
    let device = Device {
        index: node.uplink,
        link_layer: LinkLayer::Ethernet,
        role: Role::Outward,
        ip4: NODE4.parse().ok(),
        ip6: NODE6.parse().ok(),
        rp_filter: 0,
    };
    let unattached = Rehearsal::open(&node.pin_path).err().map(|error| format!("{error:#}"));
    let unattached = unattached.unwrap();
    assert!(unattached.contains("no device of this node has the packet programs"), "{unattached}");
    node.datapath.devices().attach(&device).unwrap();
    let (earlier, later) = (tcp((CLIENT4, 4000), (NODE4, 30080), SYN), tcp((CLIENT4, 4001), (NODE4, 30080), SYN));
    node.uplink_in(&earlier);
    let (before, counters) = (node.flow_rows(), node.counters());
    let mut rehearsal = Rehearsal::open(&node.pin_path).unwrap();
    assert!(rehearsal.is_attached_build);
    let mut changed = |frame: &Frame| {
        let trial = rehearsal.run(Hook::Wire(Direction::In), &frame.bytes(), 0, node.uplink).unwrap();
        assert_eq!(trial.outcome.action, REDIRECT);
        let events: Vec<u32> = trial.events.iter().map(|event| event.number).collect();
        let new = trial.changes.iter().filter(|change| !change.was_there).count();
        (new, events.contains(&COUNTER_FLOW_REMOTE), trial.counted.contains(&(COUNTER_FLOW_REMOTE, 1)))
    };
    assert_eq!(changed(&later), (2, true, true));
    // Both have their rows now, copied or begun.
    for frame in [&earlier, &later] {
        assert_eq!(changed(frame), (0, false, false));
    }
    assert_eq!((node.flow_rows(), node.counters()), (before, counters));
}

#[test]
fn programs_that_count_by_service_pass_the_verifier_and_count_what_is_refused() {
    if !can_run() {
        return;
    }
    let mut node = packets::Node::opened_by(|settings| Datapath::open_counting(settings, Counting::Traffic));
    let counts = node.datapath.service_counts().unwrap();
    let name = ServiceName::new("shop/web:http");
    node.write(MapName::Services, &1u32.to_ne_bytes(), bytemuck::bytes_of(&name));
    node.frontend("0.0.0.0", 30080, Protocol::Tcp, &[]);
    node.uplink_in(&tcp((CLIENT4, 4000), (NODE4, 30080), SYN));
    let [shop] = counts.busiest(2).unwrap()[..] else { panic!("one Service was asked for") };
    let verdicts: Vec<_> = shop.verdicts().collect();
    assert_eq!((shop.name, shop.connections, verdicts), (name, 0, vec![("refused_no_endpoint", 1)]));
}

/// Of each family: client, router, node, pod here, pod elsewhere, the node's address towards it.
const FAMILIES: [[&str; 6]; 2] = [
    [CLIENT4, "203.0.113.9", NODE4, LOCAL4, REMOTE4, TUNNEL4],
    [CLIENT6, "2001:db8:9::9", NODE6, LOCAL6, REMOTE6, TUNNEL6],
];

#[test]
fn packets_of_a_node_port_and_errors_about_them_are_rewritten_both_ways_when_the_pod_is_here() {
    if !can_run() {
        return;
    }
    let mut node = packets::Node::new();
    for (family, [client, router, address, pod, ..]) in FAMILIES.into_iter().enumerate() {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let id = node.next_backend();
            node.backend(id, pod, 8080, protocol, true);
            node.frontend(WILDCARD[family], 30080, protocol, &[id]);
            let (from, to, pod_end) = ((client, 5000), (address, 30080), (pod, 8080));
            let request = packet(protocol, from, to, SYN);
            assert_eq!(node.uplink_in(&request), (PASS, request.with_ends(from, pod_end)));
            let reply = packet(protocol, pod_end, from, SYN | ACK);
            assert_eq!(node.uplink_out(&reply), (PASS, reply.with_ends(to, from)));
            let (action, seen) = node.uplink_in(&error(router, &packet(protocol, to, from, ACK), 60, 1300));
            assert_eq!(action, PASS);
            assert_error(&seen, (router, pod), pod_end, from, 1300);
            let (action, seen) = node.uplink_out(&error(pod, &packet(protocol, from, pod_end, ACK), 60, 1200));
            assert_eq!(action, PASS);
            assert_error(&seen, (address, client), from, to, 1200);
        }
    }
}

#[test]
fn packets_of_a_node_port_and_errors_about_them_are_rewritten_both_ways_when_the_pod_is_elsewhere() {
    if !can_run() {
        return;
    }
    let mut node = packets::Node::new();
    for (family, [client, router, address, _, pod, source]) in FAMILIES.into_iter().enumerate() {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let id = node.next_backend();
            node.backend(id, pod, 8080, protocol, false);
            node.frontend(WILDCARD[family], 30080, protocol, &[id]);
            let (from, to, pod_end) = ((client, 5000), (address, 30080), (pod, 8080));
            let request = packet(protocol, from, to, SYN);
            let (action, seen) = node.uplink_in(&request);
            let near = (source, seen.ports().0);
            assert_eq!((action, seen), (REDIRECT, request.with_ends(near, pod_end).living(60)));
            let reply = packet(protocol, pod_end, near, SYN | ACK);
            assert_eq!(node.tunnel_in(&reply), (REDIRECT, reply.with_ends(to, from).living(60)));
            let (action, seen) = node.uplink_in(&error(router, &packet(protocol, to, from, ACK), 60, 1300));
            assert_eq!((action, seen.ttl), (REDIRECT, 59));
            assert_error(&seen, (source, pod), pod_end, near, 1300);
            let (action, seen) = node.tunnel_in(&error(pod, &packet(protocol, near, pod_end, ACK), 60, 1200));
            assert_eq!((action, seen.ttl), (REDIRECT, 59));
            assert_error(&seen, (address, client), from, to, 1200);
        }
    }
}
