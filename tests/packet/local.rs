//! Packets from the wire to a backend on the same node: the destination is rewritten, the client's address is kept, and
//! the replies are rewritten back when they leave. Programs run under BPF_PROG_TEST_RUN, in the real kernel.

use crate::laboratory::packets::frame::{self, ACK, FIN, Frame, Inside, RST, SYN, sctp, tcp, udp};
use crate::laboratory::packets::{
    self, CLIENT4, CLIENT6, DROP, LOCAL4, LOCAL6, NODE4, NODE6, Node, PASS, REDIRECT, TUNNEL4, VIP4, VIP6,
};
use kubelane::abi::address_flag::ADDRESS_SERVICE_VIP;
use kubelane::abi::pool_member::{POOL_CLUSTER, POOL_LOCAL};
use kubelane::abi::{Frontend, Pool};
use kubelane::model::Protocol;

/// Client, service address, frontend's address, backend.
const ENDS: [(&str, &str, &str, &str); 4] = [
    (CLIENT4, NODE4, "0.0.0.0", LOCAL4),
    (CLIENT6, NODE6, "::", LOCAL6),
    (CLIENT4, VIP4, VIP4, LOCAL4),
    (CLIENT6, VIP6, VIP6, LOCAL6),
];

fn node_with_local_backends(protocol: Protocol) -> Node {
    let mut node = Node::new();
    node.backend(4, LOCAL4, 8080, protocol, true);
    node.backend(6, LOCAL6, 8080, protocol, true);
    for (_, _, frontend, backend) in ENDS {
        node.frontend(frontend, 30080, protocol, &[if backend == LOCAL4 { 4 } else { 6 }]);
    }
    node
}

#[test]
fn a_tcp_connection_keeps_its_client_and_is_rewritten_both_ways() {
    let mut node = node_with_local_backends(Protocol::Tcp);
    for (i, (client, service, _, backend)) in ENDS.into_iter().enumerate() {
        let port = 40_000 + i as u16;
        let (from, to) = ((client, port), (service, 30080));
        let syn = tcp(from, to, SYN);
        assert_eq!(node.uplink_in(&syn), (PASS, syn.with_ends(from, (backend, 8080))));
        let syn_ack = tcp((backend, 8080), from, SYN | ACK).numbered(7000, 1001);
        assert_eq!(node.uplink_out(&syn_ack), (PASS, syn_ack.with_ends(to, from)));
        let ack = tcp(from, to, ACK).numbered(1001, 7001);
        let (result, counted) = node.counted(|n| n.uplink_in(&ack));
        assert_eq!(result, (PASS, ack.with_ends(from, (backend, 8080))));
        assert_eq!(counted.get("flow_established"), Some(&1), "{counted:?}");
        for size in [0, 1, 2, 1000, 1401] {
            let data = tcp(from, to, ACK).numbered(1001, 7001).carrying(size);
            assert_eq!(node.uplink_in(&data), (PASS, data.with_ends(from, (backend, 8080))));
            let answer = tcp((backend, 8080), from, ACK).numbered(7001, 1001).carrying(size);
            assert_eq!(node.uplink_out(&answer), (PASS, answer.with_ends(to, from)));
        }
    }
    assert_eq!(node.flow_rows(), (8, 0));
}

#[test]
fn a_client_that_comes_to_the_backend_itself_with_the_port_of_an_ended_connection_is_left_alone() {
    let mut node = node_with_local_backends(Protocol::Tcp);
    for (port, (client, service, _, backend)) in (50_000..).zip(ENDS) {
        let (from, to) = ((client, port), (service, 30080));
        node.uplink_in(&tcp(from, to, SYN));
        let reply = |flags| tcp((backend, 8080), from, flags).numbered(7000, 1001);
        assert_eq!(node.uplink_out(&reply(SYN | ACK)), (PASS, reply(SYN | ACK).with_ends(to, from)));
        node.uplink_in(&tcp(from, to, ACK).numbered(1001, 7001));
        // As long as the connection is open, a SYN-ACK is its own, sent again.
        assert_eq!(node.uplink_out(&reply(SYN | ACK)), (PASS, reply(SYN | ACK).with_ends(to, from)));
        node.uplink_in(&tcp(from, to, FIN | ACK).numbered(1001, 7001));
        assert_eq!(node.uplink_out(&reply(FIN | ACK)), (PASS, reply(FIN | ACK).with_ends(to, from)));
        // The last words of the connection, sent again, are still the flow's.
        assert_eq!(node.uplink_out(&reply(FIN | ACK)), (PASS, reply(FIN | ACK).with_ends(to, from)));
        // The client's SYN to the backend's own address never met the programs; the answers do, with numbers that may be near.
        let direct = |flags| tcp((backend, 8080), from, flags).numbered(7777, 0x4000_0001);
        for flags in [SYN | ACK, ACK, FIN | ACK] {
            assert_eq!(node.uplink_out(&direct(flags)), (PASS, direct(flags)), "{flags}");
        }
    }
}

#[test]
fn an_address_that_leaves_the_node_keeps_its_flows_and_gets_no_new_ones() {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let mut node = node_with_local_backends(protocol);
        for (i, (client, service, _, backend)) in (0u16..).zip(ENDS) {
            let (open, later) = (50_000 + i, 51_000 + i);
            let packet = |port| match protocol {
                Protocol::Tcp => tcp((client, port), (service, 30080), ACK),
                _ => udp((client, port), (service, 30080), b"?"),
            };
            let translated = |port| packet(port).with_ends((client, port), (backend, 8080));
            assert_eq!(node.uplink_in(&packet(open)), (PASS, translated(open)));
            node.forget_address(service);
            assert_eq!(node.uplink_in(&packet(open)), (PASS, translated(open)), "the flow runs on");
            assert_eq!(node.uplink_in(&packet(later)), (PASS, packet(later)), "nobody's by now");
        }
    }
}

#[test]
fn a_pod_that_comes_back_to_itself_by_a_load_balancer_sees_the_service_and_is_answered() {
    let mut node = node_with_local_backends(Protocol::Tcp);
    for (service, backend) in [(VIP4, LOCAL4), (VIP6, LOCAL6)] {
        let (from, to) = ((backend, 50_000), (service, 30080));
        let syn = tcp(from, to, SYN);
        assert_eq!(node.uplink_in(&syn), (PASS, syn.with_ends((service, 50_000), (backend, 8080))));
        let answer = tcp((backend, 8080), (service, 50_000), SYN | ACK).numbered(7000, 1001);
        assert_eq!(node.uplink_out(&answer), (REDIRECT, answer.with_ends(to, from)), "sent to the pod, not out");
    }
}

/// The reply would have the ends of the request: one row cannot be both.
#[test]
fn a_pod_that_comes_back_to_itself_from_the_services_own_port_gets_another_or_leaves_no_row_behind() {
    for (service, backend) in [(VIP4, LOCAL4), (VIP6, LOCAL6)] {
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
            let mut node = Node::new();
            node.backend(1, backend, 8080, protocol, true);
            node.frontend(service, 8080, protocol, &[1]);
            let (from, to) = ((backend, 8080), (service, 8080));
            let request = match protocol {
                Protocol::Tcp => tcp(from, to, SYN),
                Protocol::Udp => udp(from, to, b"who?"),
                Protocol::Sctp => sctp(from, to, b"who?"),
            };
            let ((action, seen), counted) = node.counted(|n| n.uplink_in(&request));
            if protocol == Protocol::Sctp {
                assert_eq!((action, counted), (DROP, [("dropped_snat_exhausted", 1)].into()));
                assert_eq!(node.flow_rows(), (0, 0));
                continue;
            }
            let port = seen.ports().0;
            assert!(port != 8080, "{protocol:?}");
            assert_eq!((action, &seen), (PASS, &request.with_ends((service, port), (backend, 8080))));
            let reply = match protocol {
                Protocol::Tcp => tcp((backend, 8080), (service, port), SYN | ACK).numbered(7000, 1001),
                _ => udp((backend, 8080), (service, port), b"me."),
            };
            assert_eq!(node.uplink_out(&reply), (REDIRECT, reply.with_ends(to, from)), "{protocol:?}");
            assert_eq!(node.flow_rows(), (0, 2));
        }
    }
}

#[test]
fn udp_is_rewritten_both_ways_with_and_without_a_checksum() {
    let mut node = node_with_local_backends(Protocol::Udp);
    for (i, (client, service, _, backend)) in ENDS.into_iter().enumerate() {
        for checked in [true, false] {
            // An IPv6 datagram without a checksum is for tunnels only (RFC 6935), but must not be harmed either.
            let (from, to) = ((client, 41_000 + 2 * i as u16 + u16::from(checked)), (service, 30080));
            let with = |frame: Frame| if checked { frame } else { frame.unchecked() };
            let (query, answer) = (with(udp(from, to, b"who?")), with(udp((backend, 8080), from, b"me.")));
            for _ in 0..3 {
                assert_eq!(node.uplink_in(&query), (PASS, query.with_ends(from, (backend, 8080))));
                assert_eq!(node.uplink_out(&answer), (PASS, answer.with_ends(to, from)));
                node.age_flows(1);
            }
        }
    }
    assert_eq!(node.flow_rows(), (16, 0), "proved once they have gone both ways for two seconds");
}

#[test]
fn a_udp_checksum_that_becomes_zero_is_sent_as_ffff() {
    let mut node = node_with_local_backends(Protocol::Udp);
    let mut seen = false;
    for n in 0..=u16::MAX {
        // Two bytes of data run through all checksums.
        let query = udp((CLIENT4, 1024), (NODE4, 30080), &n.to_be_bytes());
        let outcome = node.raw(kubelane::bpf::Direction::In, node.uplink, &query.bytes());
        let checksum = [outcome.frame[40], outcome.frame[41]];
        assert_ne!(checksum, [0, 0], "{n}");
        if checksum == [0xff, 0xff] {
            frame::parse(&outcome.frame);
            seen = true;
        }
    }
    assert!(seen);
}

#[test]
fn a_whole_checksum_that_looks_like_one_left_to_the_device_is_changed_as_a_whole_one() {
    // Also where the addresses' sum stays the same, as of these: the words of the backends' are swapped.
    let swapped = [(CLIENT4, "0.5.10.1", LOCAL4), (CLIENT6, "fd05::1", LOCAL6)];
    let plain = ENDS.map(|(client, service, _, backend)| (client, service, backend));
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let mut node = node_with_local_backends(protocol);
        for ((_, service, _), id) in swapped.into_iter().zip([4, 6]) {
            node.address(service, ADDRESS_SERVICE_VIP);
            node.frontend(service, 30080, protocol, &[id]);
        }
        for (port, (client, service, backend)) in (40_000..).zip(plain.into_iter().chain(swapped)) {
            let (from, to) = ((client, port), (service, 30080));
            let frame = match protocol {
                Protocol::Tcp => tcp(from, to, SYN),
                _ => udp(from, to, b""),
            };
            let frame = frame.looking_partial();
            assert_eq!(node.uplink_in(&frame), (PASS, frame.with_ends(from, (backend, 8080))), "{service}");
        }
    }
}

#[test]
fn traffic_that_is_not_ours_is_left_alone_byte_by_byte() {
    let mut node = node_with_local_backends(Protocol::Tcp);
    let echo = |to: &str, from: &str| Frame {
        inside: Inside::Icmp { kind: if from.contains(':') { 128 } else { 8 }, code: 0, rest: 1, data: vec![9; 56] },
        ..tcp((from, 0), (to, 0), 0)
    };
    for frame in [
        tcp((CLIENT4, 5000), ("10.9.9.9", 80), SYN),
        tcp((CLIENT4, 5000), (NODE4, 22), SYN),
        tcp((CLIENT4, 5000), (NODE4, 22), ACK),
        tcp((CLIENT4, 5000), (VIP4, 22), SYN),
        tcp((CLIENT6, 5000), (NODE6, 22), SYN),
        udp((CLIENT4, 5000), (NODE4, 30080), b"the TCP port's number"),
        udp((CLIENT6, 5000), (VIP6, 30080), b"the TCP port's number"),
        // A NodePort is served on the node's addresses only.
        tcp((CLIENT4, 5000), (TUNNEL4, 30080), SYN),
        echo(NODE4, CLIENT4),
        echo(VIP6, CLIENT6),
    ] {
        let (result, counted) = node.counted(|n| n.uplink_in(&frame));
        assert_eq!(result, (PASS, frame.clone()));
        assert!(counted.is_empty(), "{frame:?}: {counted:?}");
        assert_eq!(node.uplink_out(&frame), (PASS, frame));
    }
}

#[test]
fn a_backends_own_connections_are_left_alone_when_they_leave() {
    let mut node = node_with_local_backends(Protocol::Tcp);
    node.uplink_in(&tcp((CLIENT4, 5000), (NODE4, 30080), SYN));
    let other = tcp((LOCAL4, 8080), (CLIENT4, 5001), ACK);
    assert_eq!(node.uplink_out(&other), (PASS, other));
    let other = udp((LOCAL4, 8080), (CLIENT4, 5000), b"");
    assert_eq!(node.uplink_out(&other), (PASS, other));
}

#[test]
fn one_clients_port_to_one_backend_by_two_addresses_gets_two_ports() {
    let mut node = node_with_local_backends(Protocol::Tcp);
    let (first, second) = (tcp((CLIENT4, 5000), (NODE4, 30080), SYN), tcp((CLIENT4, 5000), (VIP4, 30080), SYN));
    assert_eq!(node.uplink_in(&first).1, first.with_ends((CLIENT4, 5000), (LOCAL4, 8080)));
    let seen = node.uplink_in(&second).1;
    let (port, _) = seen.ports();
    assert_ne!(port, 5000);
    assert_eq!(seen, second.with_ends((CLIENT4, port), (LOCAL4, 8080)));
    for (port, service) in [(5000, NODE4), (port, VIP4)] {
        let answer = tcp((LOCAL4, 8080), (CLIENT4, port), SYN | ACK).numbered(7000, 1001);
        assert_eq!(node.uplink_out(&answer), (PASS, answer.with_ends((service, 30080), (CLIENT4, 5000))));
    }
}

#[test]
fn a_removed_udp_backend_is_left_with_the_next_datagram_and_refused_when_it_was_the_last() {
    let mut node = Node::new();
    node.backend(1, LOCAL4, 53, Protocol::Udp, true);
    node.backend(2, "10.1.0.6", 53, Protocol::Udp, true);
    node.frontend("0.0.0.0", 30053, Protocol::Udp, &[1]);
    let query = udp((CLIENT4, 5000), (NODE4, 30053), b"?");
    for answered in [false, true] {
        assert_eq!(node.uplink_in(&query).1.destination.to_string(), LOCAL4);
        if answered {
            node.uplink_out(&udp((LOCAL4, 53), (CLIENT4, 5000), b"!"));
            node.age_flows(2);
            node.uplink_in(&query);
            assert_eq!(node.flow_rows().0, 2);
        }
        let mut gone = packets::backend(LOCAL4, 53, Protocol::Udp, true);
        gone.state = kubelane::abi::backend_state::BACKEND_GONE as u8;
        node.backend_row(1, &gone);
        node.frontend("0.0.0.0", 30053, Protocol::Udp, &[2]);
        assert_eq!(node.uplink_in(&query).1.destination.to_string(), "10.1.0.6");
        // The id has a new assignment: its generation tells it from the former one.
        gone.state = kubelane::abi::backend_state::BACKEND_ACTIVE as u8;
        gone.generation = 2;
        node.backend_row(2, &gone);
        node.backend(1, LOCAL4, 53, Protocol::Udp, true);
        node.frontend("0.0.0.0", 30053, Protocol::Udp, &[1]);
        assert_eq!(node.uplink_in(&query).1.destination.to_string(), LOCAL4);
        node.backend(2, "10.1.0.6", 53, Protocol::Udp, true);
    }
    let mut gone = packets::backend(LOCAL4, 53, Protocol::Udp, true);
    gone.state = kubelane::abi::backend_state::BACKEND_GONE as u8;
    node.backend_row(1, &gone);
    node.frontend("0.0.0.0", 30053, Protocol::Udp, &[]);
    let (_, counted) = node.counted(|n| n.uplink_in(&query));
    assert_eq!(counted.get("refused_no_endpoint"), Some(&1));
}

#[test]
fn a_closed_connections_port_serves_again_with_a_fresh_choice_and_an_open_ones_syn_is_the_backends_to_judge() {
    let mut node = node_with_local_backends(Protocol::Tcp);
    let (from, to, pod) = ((CLIENT4, 5000), (NODE4, 30080), (LOCAL4, 8080));
    let open = |node: &mut Node| {
        let (_, counted) = node.counted(|node| {
            node.uplink_in(&tcp(from, to, SYN));
            node.uplink_out(&tcp(pod, from, SYN | ACK).numbered(7000, 1001));
            node.uplink_in(&tcp(from, to, ACK).numbered(1001, 7001));
        });
        counted
    };
    assert_eq!(open(&mut node).get("flow_local"), Some(&1));
    assert_eq!(open(&mut node).get("flow_local"), None, "still open: the same flow");
    node.uplink_in(&tcp(from, to, FIN | ACK));
    assert_eq!(open(&mut node).get("flow_local"), None, "half closed");
    node.uplink_out(&tcp(pod, from, FIN | ACK));
    let counted = open(&mut node);
    assert_eq!((counted.get("flow_local"), counted.get("flow_established")), (Some(&1), Some(&1)), "{counted:?}");
    node.uplink_out(&tcp(pod, from, RST));
    assert_eq!(open(&mut node).get("flow_local"), Some(&1), "reset");
    assert_eq!(node.flow_rows(), (2, 0));
}

#[test]
fn a_guessed_acknowledgement_does_not_prove_a_flow() {
    let mut node = node_with_local_backends(Protocol::Tcp);
    let (from, to) = ((CLIENT4, 5000), (NODE4, 30080));
    node.uplink_in(&tcp(from, to, SYN));
    for (answered, acknowledgement) in [(false, 7001), (true, 6999), (true, 7000 + 131_072), (true, 0)] {
        if answered {
            node.uplink_out(&tcp((LOCAL4, 8080), from, SYN | ACK).numbered(7000, 1001));
        }
        node.uplink_in(&tcp(from, to, ACK).numbered(1001, acknowledgement));
        assert_eq!(node.flow_rows().0, 0, "{acknowledgement}");
    }
    node.uplink_in(&tcp(from, to, ACK).numbered(1001, 7001));
    assert_eq!(node.flow_rows().0, 2);
}

#[test]
fn a_packet_in_mid_flow_begins_a_flow_and_an_unknown_reset_is_dropped() {
    let mut node = node_with_local_backends(Protocol::Tcp);
    let data = tcp((CLIENT4, 5000), (NODE4, 30080), ACK).carrying(10);
    let (result, counted) = node.counted(|n| n.uplink_in(&data));
    assert_eq!(result, (PASS, data.with_ends((CLIENT4, 5000), (LOCAL4, 8080))));
    assert_eq!(counted.get("flow_midstream"), Some(&1));
    let reset = tcp((CLIENT4, 5001), (NODE4, 30080), RST);
    let (result, counted) = node.counted(|n| n.uplink_in(&reset));
    assert_eq!((result.0, counted.get("dropped_unknown_reset")), (DROP, Some(&1)));
}

/// Whoever asks the backend itself from the same port is answered from the same ends.
#[test]
fn datagrams_get_a_port_that_clients_do_not_use_under_policy_cluster_and_keep_theirs_under_policy_local() {
    for (member, moves) in [(POOL_CLUSTER, true), (POOL_LOCAL, false)] {
        let mut node = node_with_local_backends(Protocol::Udp);
        for (client, service, frontend, backend) in ENDS {
            let row = node.frontend(frontend, 30080, Protocol::Udp, &[if backend == LOCAL4 { 4 } else { 6 }]);
            let outside = Pool { member: member as u8, ..row.outside };
            node.frontend_row(frontend, 30080, Protocol::Udp, &Frontend { outside, ..row });
            for from in [(client, 40_000), (client, 40_001)] {
                let request = udp(from, (service, 30080), b"who?");
                let (action, seen) = node.uplink_in(&request);
                let port = seen.ports().0;
                assert_eq!((action, &seen), (PASS, &request.with_ends((client, port), (backend, 8080))));
                assert_eq!(moves, port >= 61_000, "{port}");
                assert!(moves || port == from.1, "{port}");
                let answer = udp((backend, 8080), (client, port), b"me");
                assert_eq!(node.uplink_out(&answer), (PASS, answer.with_ends((service, 30080), from)));
                let direct = udp((backend, 8080), from, b"me");
                let expected = if moves { direct.clone() } else { direct.with_ends((service, 30080), from) };
                assert_eq!(node.uplink_out(&direct), (PASS, expected), "a direct answer");
                node.forget_flows();
            }
        }
    }
}
