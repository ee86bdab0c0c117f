//! Packets that pods send to Services where no socket program has seen them connect: translated when they come in by the
//! pod's device, and back when the answers leave for it; the host's stack does the rest. Programs run under
//! BPF_PROG_TEST_RUN, in the real kernel.

use crate::laboratory::packets::errors::{assert_error, error};
use crate::laboratory::packets::frame::{ACK, FIN, Frame, Inside, RST, SYN, ip, parse, sctp, tcp, udp, with_options};
use crate::laboratory::packets::{
    CLIENT4, CLIENT6, DROP, LOCAL4, LOCAL6, NODE4, NODE6, Node, PASS, REDIRECT, REMOTE4, REMOTE6, VIP4, VIP6,
};
use kubelane::abi::pod_quota::{POD_OPENINGS, POD_REFUSAL};
use kubelane::abi::{Frontend, Pool, address_flag, frontend_flag, pool_empty, pool_member};
use kubelane::model::Protocol;

const CLUSTER4: &str = "10.96.0.10";
const CLUSTER6: &str = "fd96::10";
/// The asking pod, beside the backend.
const POD4: &str = "10.1.0.9";
const POD6: &str = "fd01::9";

/// Pod, cluster IP, a backend on the node and one elsewhere, this node.
const FAMILIES: [[&str; 5]; 2] = [[POD4, CLUSTER4, LOCAL4, REMOTE4, NODE4], [POD6, CLUSTER6, LOCAL6, REMOTE6, NODE6]];

/// A frontend whose inside pool has one backend; outside there is nobody.
fn serve(node: &mut Node, address: &str, port: u16, protocol: Protocol, backend: &str, flags: u32) {
    let id = node.next_backend();
    node.backend(id, backend, 8080, protocol, true);
    let row = node.frontend(address, port, protocol, &[id]);
    let refused =
        Pool { on_empty: pool_empty::EMPTY_DROP as u8, member: pool_member::POOL_LOCAL as u8, ..Pool::default() };
    let row = Frontend { flags, inside: row.outside, outside: refused, ..row };
    node.frontend_row(address, port, protocol, &row);
}

fn node() -> Node {
    let mut node = Node::new();
    for address in [CLUSTER4, CLUSTER6] {
        node.address(address, address_flag::ADDRESS_CLUSTER_IP);
    }
    node
}

fn packet(protocol: Protocol, from: (&str, u16), to: (&str, u16)) -> Frame {
    match protocol {
        Protocol::Tcp => tcp(from, to, SYN),
        Protocol::Udp => udp(from, to, b"who?"),
        Protocol::Sctp => sctp(from, to, b"who?"),
    }
}

fn answer(protocol: Protocol, from: (&str, u16), to: (&str, u16)) -> Frame {
    match protocol {
        Protocol::Tcp => tcp(from, to, SYN | ACK).numbered(7000, 1001),
        _ => packet(protocol, from, to),
    }
}

#[test]
fn a_pod_reaches_backends_here_and_elsewhere_as_itself_and_hears_the_service() {
    for [pod, cluster_ip, here, elsewhere, _] in FAMILIES {
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
            for (port, backend) in [(80, here), (81, elsewhere)] {
                let mut node = node();
                // SCTP's checksum covers ports: only backends with the Service's own are served.
                let port = if protocol == Protocol::Sctp { 8080 } else { port };
                serve(&mut node, cluster_ip, port, protocol, backend, frontend_flag::FRONTEND_CLUSTER_IP);
                let (from, to) = ((pod, 40_000), (cluster_ip, port));
                let request = packet(protocol, from, to);
                let (result, counted) = node.counted(|n| n.pod_in(&request));
                assert_eq!(result, (PASS, request.with_ends(from, (backend, 8080))), "{protocol:?}");
                assert_eq!(counted, [("flow_pod", 1)].into());
                let answer = answer(protocol, (backend, 8080), from);
                assert_eq!(node.pod_out(&answer), (PASS, answer.with_ends(to, from)), "{protocol:?}");
            }
        }
    }
}

#[test]
fn a_pods_own_datagrams_and_connections_are_left_alone() {
    let mut node = node();
    serve(&mut node, CLUSTER4, 80, Protocol::Tcp, LOCAL4, frontend_flag::FRONTEND_CLUSTER_IP);
    serve(&mut node, "0.0.0.0", 30080, Protocol::Tcp, LOCAL4, frontend_flag::FRONTEND_NODE_PORT);
    for to in [(CLIENT4, 80), (LOCAL4, 8080), (NODE4, 22), (REMOTE4, 30080)] {
        let packet = tcp((POD4, 40_000), to, SYN);
        assert_eq!(node.pod_in(&packet), (PASS, packet), "{to:?}");
    }
    let to_pod = tcp((LOCAL4, 8080), (POD4, 40_000), SYN | ACK);
    assert_eq!(node.pod_out(&to_pod), (PASS, to_pod));
    assert_eq!(node.flow_rows(), (0, 0));
}

#[test]
fn what_no_service_has_is_refused_and_empty_pools_as_they_say() {
    for [pod, cluster_ip, here, ..] in FAMILIES {
        let mut node = node();
        let icmp = |frame: &Frame| match frame.inside {
            Inside::Icmp { kind, code, .. } => (kind, code),
            _ => panic!("{frame:?} is no ICMP error"),
        };
        serve(&mut node, cluster_ip, 80, Protocol::Tcp, here, frontend_flag::FRONTEND_CLUSTER_IP);
        for (port, on_empty) in [(82, pool_empty::EMPTY_REFUSE), (83, pool_empty::EMPTY_DROP)] {
            let row = Frontend {
                service_id: 1,
                flags: frontend_flag::FRONTEND_CLUSTER_IP,
                inside: Pool { on_empty: on_empty as u8, ..Pool::default() },
                ..Frontend::default()
            };
            node.frontend_row(cluster_ip, port, Protocol::Tcp, &row);
        }
        let unreachable = if pod == POD4 { (3, 3) } else { (1, 4) };
        for (port, counter) in [(81, "refused_unknown_port"), (82, "refused_no_endpoint")] {
            let syn = tcp((pod, 40_000), (cluster_ip, port), SYN);
            let ((action, answer), counted) = node.counted(|n| n.pod_in(&syn));
            assert_eq!((action, icmp(&answer), counted), (REDIRECT, unreachable, [(counter, 1)].into()));
            assert_eq!((answer.source, answer.destination), (ip(cluster_ip), ip(pod)));
        }
        let syn = tcp((pod, 40_000), (cluster_ip, 83), SYN);
        let ((action, _), counted) = node.counted(|n| n.pod_in(&syn));
        assert_eq!((action, counted), (DROP, [("dropped_no_local_endpoint", 1)].into()));
        // A reset is never answered.
        let reset = tcp((pod, 40_000), (cluster_ip, 81), RST);
        let ((action, _), counted) = node.counted(|n| n.pod_in(&reset));
        assert_eq!((action, counted), (DROP, [("dropped_unknown_reset", 1)].into()));
    }
}

/// What becomes of a packet, whose frame must lead back to where it came from.
fn sent_back(node: &mut Node, packet: &Frame) -> (i32, Frame) {
    let bytes = packet.bytes();
    let (action, after) = node.pod_in_bytes(&bytes);
    assert_eq!((&after[..6], &after[6..12]), (&bytes[6..12], &bytes[..6]), "link addresses");
    (action, parse(&after))
}

#[test]
fn a_pod_that_asks_for_itself_sees_the_node_and_both_directions_are_sent_back_to_it() {
    for [_, cluster_ip, here, _, own] in FAMILIES {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let mut node = node();
            serve(&mut node, cluster_ip, 80, protocol, here, frontend_flag::FRONTEND_CLUSTER_IP);
            let (from, to) = ((here, 40_000), (cluster_ip, 80));
            let request = packet(protocol, from, to);
            let (action, seen) = sent_back(&mut node, &request);
            let port = seen.ports().0;
            assert_eq!((action, &seen), (REDIRECT, &request.with_ends((own, port), (here, 8080))));
            let answer = answer(protocol, (here, 8080), (own, port));
            assert_eq!(sent_back(&mut node, &answer), (REDIRECT, answer.with_ends(to, from)), "{protocol:?}");
            // Nobody outside is served by these rows.
            assert_eq!(node.uplink_in(&answer).0, PASS);
        }
    }
}

/// What is sent back meets no stack of this node's, which would refuse it.
#[test]
fn a_pod_that_asks_for_itself_by_a_source_route_is_dropped() {
    let mut node = node();
    serve(&mut node, CLUSTER4, 80, Protocol::Tcp, LOCAL4, frontend_flag::FRONTEND_CLUSTER_IP);
    let syn = tcp((LOCAL4, 40_000), (CLUSTER4, 80), SYN).bytes();
    let record_route = with_options(&syn, &[7, 7, 4, 0, 0, 0, 0, 0]);
    assert_eq!(node.pod_in_bytes(&record_route).0, REDIRECT);
    let source_route = with_options(&syn, &[0x83, 7, 4, 10, 0, 0, 254, 0]);
    let ((action, _), counted) = node.counted(|n| n.pod_in_bytes(&source_route));
    assert_eq!((action, counted), (DROP, [("dropped_options", 1)].into()));
}

#[test]
fn node_ports_and_load_balancers_serve_pods_from_the_inside_pool() {
    for ([pod, _, here, _, own], vip) in FAMILIES.into_iter().zip([VIP4, VIP6]) {
        let mut node = node();
        let wildcard = if pod == POD4 { "0.0.0.0" } else { "::" };
        serve(&mut node, wildcard, 30080, Protocol::Tcp, here, frontend_flag::FRONTEND_NODE_PORT);
        serve(&mut node, vip, 80, Protocol::Tcp, here, frontend_flag::FRONTEND_LOAD_BALANCER);
        for to in [(own, 30080), (vip, 80)] {
            let syn = tcp((pod, 40_000), to, SYN);
            assert_eq!(node.pod_in(&syn), (PASS, syn.with_ends((pod, 40_000), (here, 8080))), "{to:?}");
            let mut other = tcp((CLIENT4, 40_000), to, SYN);
            if pod == POD6 {
                other = tcp((CLIENT6, 40_000), to, SYN);
            }
            assert_eq!(node.uplink_in(&other).0, DROP, "outside nobody is left");
            node.forget_flows();
        }
    }
}

const GATEWAY: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// What becomes of packets in one second of the programs' clock, in which the pod has begun so many flows already.
fn after_openings<T>(node: &mut Node, openings: u32, mut packets: impl FnMut(&mut Node) -> T) -> T {
    loop {
        let second = node.fill_pod_quota(GATEWAY, openings);
        let result = packets(node);
        if node.pod_quota().0 == second {
            return result;
        }
    }
}

/// Openings and ICMP errors have limits on each processor, which one pod alone must not use up.
#[test]
fn a_pod_that_floods_uses_up_its_own_quota_and_nobody_elses() {
    let mut node = node();
    serve(&mut node, CLUSTER4, 80, Protocol::Tcp, LOCAL4, frontend_flag::FRONTEND_CLUSTER_IP);
    node.frontend(CLUSTER4, 81, Protocol::Tcp, &[]);
    node.frontend("0.0.0.0", 30080, Protocol::Tcp, &[1]);
    let mut next = 1;
    let mut ask = |node: &mut Node, port: u16| {
        next += 1;
        let syn = tcp((POD4, next), (CLUSTER4, port), SYN);
        let ((action, _), counted) = node.counted(|n| n.pod_in(&syn));
        assert_eq!(action == DROP, counted == [("dropped_pod_quota", 1)].into(), "{counted:?}");
        (action == DROP).then_some(next)
    };
    let dropped = after_openings(&mut node, POD_OPENINGS - 2, |n| [80, 80, 80, 81].map(|port| ask(n, port).is_some()));
    assert_eq!(dropped, [false, false, true, true]);
    let refusals =
        after_openings(&mut node, POD_OPENINGS - 2 * POD_REFUSAL, |n| [81, 81, 81].map(|p| ask(n, p).is_some()));
    assert_eq!(refusals, [false, false, true], "an ICMP error weighs more");
    // What is answered is none that fills it.
    let openings = after_openings(&mut node, POD_OPENINGS - 1, |n| {
        let last = (tcp((POD4, 50_000), (CLUSTER4, 80), SYN), answer(Protocol::Tcp, (LOCAL4, 8080), (POD4, 50_000)));
        let before = n.pod_in(&last.0).0;
        n.pod_out(&last.1);
        (before, n.pod_quota().1)
    });
    assert_eq!(openings.1, POD_OPENINGS as i32 - 1);
    // A reset is no answer, however often it comes: a backend that helps the pod would empty its quota by them.
    let openings = after_openings(&mut node, POD_OPENINGS - 1, |n| {
        n.pod_in(&tcp((POD4, 50_001), (CLUSTER4, 80), SYN));
        for _ in 0..3 {
            n.pod_out(&tcp((LOCAL4, 8080), (POD4, 50_001), RST | ACK).numbered(0, 1001));
        }
        n.pod_quota().1
    });
    assert_eq!(openings, POD_OPENINGS as i32);
    // Clients outside are served all the same, and the pod itself in the next second.
    let outside = tcp((CLIENT4, 5000), (NODE4, 30080), SYN);
    let counted = after_openings(&mut node, POD_OPENINGS, |n| n.counted(|n| n.uplink_in(&outside)).1);
    assert!(counted.is_empty() || counted == [("flow_local", 1)].into(), "{counted:?}");
    node.fill_pod_quota(GATEWAY, POD_OPENINGS);
    let later = std::time::Instant::now() + std::time::Duration::from_secs(3);
    while ask(&mut node, 80).is_some() {
        assert!(std::time::Instant::now() < later, "the quota is a second's");
    }
}

#[test]
fn source_ranges_hold_for_pods_too() {
    let mut node = node();
    let flags = frontend_flag::FRONTEND_LOAD_BALANCER | frontend_flag::FRONTEND_SOURCE_RANGES;
    serve(&mut node, VIP4, 80, Protocol::Tcp, LOCAL4, flags);
    node.source_range(1, POD4, 32);
    let syn = tcp((POD4, 40_000), (VIP4, 80), SYN);
    assert_eq!(node.pod_in(&syn).0, PASS);
    let barred = tcp(("10.1.0.10", 40_000), (VIP4, 80), SYN);
    let ((action, _), counted) = node.counted(|n| n.pod_in(&barred));
    assert_eq!((action, counted), (DROP, [("dropped_source_range", 1)].into()));
}

/// A bridge hands frames between its ports: one whose gateway is a router outside is none of this node's.
#[test]
fn a_frame_for_another_gateway_is_left_alone() {
    let mut node = node();
    serve(&mut node, CLUSTER4, 80, Protocol::Tcp, LOCAL4, frontend_flag::FRONTEND_CLUSTER_IP);
    let other = [2, 0, 0, 0, 0, 9];
    let syn = tcp((POD4, 40_000), (CLUSTER4, 80), SYN);
    let mut bytes = syn.bytes();
    bytes[..6].copy_from_slice(&other);
    assert_eq!(node.pod_in_bytes(&bytes), (PASS, bytes.clone()));
    // The bridge's own link address differs from its port's.
    node.note_pod_device(other, NODE4, NODE6);
    assert_eq!(parse(&node.pod_in_bytes(&bytes).1), syn.with_ends((POD4, 40_000), (LOCAL4, 8080)));
}

/// Pieces of a datagram for another host's Service wait for nobody here.
#[test]
fn a_stray_piece_for_another_gateway_is_left_alone_and_one_for_this_node_is_dropped() {
    let mut node = node();
    serve(&mut node, CLUSTER4, 80, Protocol::Udp, LOCAL4, frontend_flag::FRONTEND_CLUSTER_IP);
    let piece = udp((POD4, 40_000), (CLUSTER4, 80), &[7; 1000]).fragments(504, 77).remove(1);
    let mut elsewhere = piece.bytes();
    elsewhere[..6].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
    assert_eq!(node.pod_in_bytes(&elsewhere), (PASS, elsewhere.clone()));
    let ((action, _), counted) = node.counted(|n| n.pod_in(&piece));
    assert_eq!((action, counted), (DROP, [("dropped_fragment", 1)].into()));
}

/// The row of a client outside leads elsewhere, past the policies of the pods' network.
#[test]
fn a_pod_that_forges_a_client_outside_does_not_get_into_its_connection() {
    let mut node = node();
    node.backend(1, REMOTE4, 8080, Protocol::Tcp, false);
    node.frontend("0.0.0.0", 30080, Protocol::Tcp, &[1]);
    let syn = tcp((CLIENT4, 40_000), (NODE4, 30080), SYN);
    let (action, sent) = node.uplink_in(&syn);
    assert_eq!(action, REDIRECT);
    let forged = tcp((CLIENT4, 40_000), (NODE4, 30080), ACK).numbered(1001, 1);
    assert_eq!(node.pod_in(&forged), (PASS, forged.clone()));
    // Nor by a backend's answer.
    let (source, port) = (sent.source.to_string(), sent.ports().0);
    let forged = tcp((REMOTE4, 8080), (&source, port), SYN | ACK).numbered(7000, 1001);
    assert_eq!(node.pod_in(&forged), (PASS, forged.clone()));
}

/// FRONTEND_SOURCE_NODE: the destination is translated when a request comes in, its source when it leaves.
#[test]
fn a_client_is_hidden_from_a_backend_on_this_node_by_halves() {
    for ([_, _, here, _, own], client) in FAMILIES.into_iter().zip([CLIENT4, CLIENT6]) {
        let mut node = Node::new();
        node.backend(1, here, 8080, Protocol::Tcp, true);
        let wildcard = if here == LOCAL4 { "0.0.0.0" } else { "::" };
        let row = node.frontend(wildcard, 30080, Protocol::Tcp, &[1]);
        let flags = row.flags | frontend_flag::FRONTEND_SOURCE_NODE;
        node.frontend_row(wildcard, 30080, Protocol::Tcp, &Frontend { flags, ..row });
        let (from, to) = ((client, 40_000), (own, 30080));
        let syn = tcp(from, to, SYN);
        let (action, half) = node.uplink_in(&syn);
        let port = half.ports().0;
        assert_eq!((action, &half), (PASS, &syn.with_ends((client, port), (here, 8080))), "the stack sees the client");
        assert_eq!(node.pod_out(&half), (PASS, half.with_ends((own, port), (here, 8080))), "the pod sees the node");
        let answer = tcp((here, 8080), (own, port), SYN | ACK).numbered(7000, 1001);
        let (action, half) = node.pod_in(&answer);
        assert_eq!((action, &half), (PASS, &answer.with_ends((here, 8080), (client, port))));
        assert_eq!(node.uplink_out(&half), (PASS, half.with_ends(to, from)));
        // The pod's error about what it got goes the same two steps, and says to the client what that sent.
        let (action, half) = node.pod_in(&error(here, &syn.with_ends((own, port), (here, 8080)), 60, 1400));
        assert_eq!(action, PASS);
        assert_error(&half, (here, client), (client, port), (here, 8080), 1400);
        let (action, whole) = node.uplink_out(&half);
        assert_eq!(action, PASS);
        assert_error(&whole, (own, client), from, to, 1400);
        let fin = tcp(from, to, FIN | ACK).numbered(1001, 7001);
        assert_eq!(node.uplink_in(&fin).1, fin.with_ends((client, port), (here, 8080)));
        assert_eq!(node.flow_rows(), (2, 0));
    }
}

/// What was noted for its hidden flow stays, and the request's row leads to the same pod again.
#[test]
fn a_client_that_is_hidden_no_longer_has_the_answers_to_its_own_connections_to_the_pod() {
    for ([_, _, here, _, own], client) in FAMILIES.into_iter().zip([CLIENT4, CLIENT6]) {
        let mut node = Node::new();
        let mut collector = node.datapath.flow_collector().unwrap();
        node.backend(1, here, 8080, Protocol::Tcp, true);
        let wildcard = if here == LOCAL4 { "0.0.0.0" } else { "::" };
        let row = node.frontend(wildcard, 30080, Protocol::Tcp, &[1]);
        let flags = row.flags | frontend_flag::FRONTEND_SOURCE_NODE;
        node.frontend_row(wildcard, 30080, Protocol::Tcp, &Frontend { flags, ..row });
        let syn = tcp((client, 40_000), (own, 30080), SYN);
        let port = node.uplink_in(&syn).1.ports().0;
        assert_ne!(port, 40_000);
        node.let_flows_rest(100_000);
        collector.collect(usize::MAX / 4).unwrap();
        node.frontend_row(wildcard, 30080, Protocol::Tcp, &row);
        assert_eq!(node.uplink_in(&syn).1, syn.with_ends((client, 40_000), (here, 8080)));
        let answer = tcp((here, 8080), (client, port), SYN | ACK).numbered(7000, 1001);
        assert_eq!(node.uplink_out(&answer), (PASS, answer));
    }
}
