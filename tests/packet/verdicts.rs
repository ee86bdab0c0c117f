//! Who is refused, dropped and remembered; ICMP errors and fragments. Programs run under BPF_PROG_TEST_RUN, in the real
//! kernel.

use crate::laboratory::packets::errors::{assert_error, error};
use crate::laboratory::packets::frame::{ACK, Inside, SYN, ip, may_fragment, tcp, udp};
use crate::laboratory::packets::{
    self, CLIENT4, CLIENT6, DROP, LOCAL4, LOCAL6, NODE4, NODE6, Node, PASS, REDIRECT, REMOTE4, REMOTE6, TUNNEL4,
    TUNNEL6, VIP4, VIP6,
};
use kubelane::abi::{address_flag, frontend_flag};
use kubelane::bpf::Direction;
use kubelane::model::Protocol;

/// Client, service address, local and remote backend, the node's address towards the latter.
const FAMILIES: [(&str, &str, &str, &str, &str); 2] =
    [(CLIENT4, VIP4, LOCAL4, REMOTE4, TUNNEL4), (CLIENT6, VIP6, LOCAL6, REMOTE6, TUNNEL6)];

fn is_ip4(client: &str) -> bool {
    client == CLIENT4
}

#[test]
fn a_service_without_endpoints_is_refused_with_port_unreachable() {
    let mut node = Node::new();
    for (client, service, ..) in FAMILIES {
        for (protocol, packet) in [
            (Protocol::Tcp, tcp((client, 5000), (service, 30080), SYN)),
            (Protocol::Udp, udp((client, 5000), (service, 30080), b"")),
            (Protocol::Udp, udp((client, 5000), (service, 30080), &[7; 1200])),
        ] {
            node.frontend(service, 30080, protocol, &[]);
            let ((action, answer), counted) = node.counted(|n| n.uplink_in(&packet));
            assert_eq!(counted, [("refused_no_endpoint", 1)].into());
            assert_eq!((action, answer.source, answer.destination), (REDIRECT, packet.destination, packet.source));
            let Inside::Icmp { kind, code, data, .. } = &answer.inside else { panic!("{answer:?}") };
            assert_eq!((*kind, *code), if is_ip4(client) { (3, 3) } else { (1, 4) });
            assert_eq!(*data, packet.packet()[..data.len()], "quoted as it came");
            assert!(data.len() >= packet.packet().len().min(96));
        }
    }
    let outcome = node.raw(Direction::In, node.uplink, &udp((CLIENT4, 5000), (VIP4, 30080), b"").bytes());
    assert_eq!(outcome.frame[..12], [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1], "back to the station that it came from");
}

#[test]
fn no_answer_goes_to_a_source_that_is_no_single_host() {
    let mut node = Node::new();
    node.frontend(VIP4, 30080, Protocol::Udp, &[]);
    node.frontend(VIP6, 30080, Protocol::Udp, &[]);
    for (source, service) in [
        ("224.0.0.1", VIP4),
        ("255.255.255.255", VIP4),
        ("0.0.0.0", VIP4),
        ("127.0.0.1", VIP4),
        ("ff02::1", VIP6),
        ("::", VIP6),
        ("::1", VIP6),
    ] {
        assert_eq!(node.uplink_in(&udp((source, 5000), (service, 30080), b"?")).0, DROP, "{source}");
    }
}

#[test]
fn a_local_policy_without_local_endpoints_drops_and_says_nothing() {
    let mut node = Node::new();
    let mut row = node.frontend(VIP4, 30080, Protocol::Tcp, &[]);
    row.outside = packets::empty_drop();
    node.frontend_row(VIP4, 30080, Protocol::Tcp, &row);
    let (result, counted) = node.counted(|n| n.uplink_in(&tcp((CLIENT4, 5000), (VIP4, 30080), SYN)));
    assert_eq!(result.0, DROP);
    assert_eq!(counted, [("dropped_no_local_endpoint", 1)].into());
}

#[test]
fn source_ranges_hold_by_service_and_family_for_load_balancer_addresses() {
    let mut node = Node::new();
    node.backend(4, LOCAL4, 80, Protocol::Tcp, true);
    node.backend(6, LOCAL6, 80, Protocol::Tcp, true);
    for (service, wildcard, id) in [(VIP4, "0.0.0.0", 4), (VIP6, "::", 6)] {
        let mut row = node.frontend(service, 80, Protocol::Tcp, &[id]);
        row.flags |= frontend_flag::FRONTEND_SOURCE_RANGES;
        node.frontend_row(service, 80, Protocol::Tcp, &row);
        node.frontend(wildcard, 30080, Protocol::Tcp, &[id]);
    }
    node.source_range(1, "198.51.100.0", 25);
    node.source_range(1, "2001:db8:7::", 48);
    node.source_range(2, "0.0.0.0", 0);
    for (client, service, port, allowed) in [
        ("198.51.100.1", VIP4, 80, true),
        ("198.51.100.127", VIP4, 80, true),
        ("198.51.100.128", VIP4, 80, false),
        ("198.51.100.128", NODE4, 30080, true),
        ("203.0.113.1", VIP4, 80, false),
        ("2001:db8:7::1", VIP6, 80, true),
        ("2001:db8:8::1", VIP6, 80, false),
        ("2001:db8:8::1", NODE6, 30080, true),
    ] {
        let ((action, _), counted) = node.counted(|n| n.uplink_in(&tcp((client, 5000), (service, port), SYN)));
        assert_eq!(action == PASS, allowed, "{client}");
        assert_eq!(!counted.contains_key("dropped_source_range"), allowed, "{client}");
    }
}

#[test]
fn affinity_is_by_client_address_and_shared_by_a_services_addresses() {
    let mut node = Node::new();
    let ids: Vec<u32> = (1..=8).collect();
    for id in &ids {
        node.backend(*id, &format!("10.1.0.{id}"), 80, Protocol::Tcp, true);
    }
    for (address, port) in [(VIP4, 80), ("0.0.0.0", 30080)] {
        let mut row = node.frontend(address, port, Protocol::Tcp, &ids);
        row.affinity_seconds = 3600;
        node.frontend_row(address, port, Protocol::Tcp, &row);
    }
    let mut chosen = std::collections::HashSet::new();
    for client in 1..=40 {
        let client = format!("198.51.100.{client}");
        let first = node.uplink_in(&tcp((&client, 5000), (VIP4, 80), SYN)).1.destination;
        for port in 5001..5006 {
            assert_eq!(node.uplink_in(&tcp((&client, port), (VIP4, 80), SYN)).1.destination, first);
            assert_eq!(node.uplink_in(&tcp((&client, port), (NODE4, 30080), SYN)).1.destination, first);
        }
        chosen.insert(first);
    }
    assert!(chosen.len() >= 6, "{chosen:?}");
}

#[test]
fn a_slot_without_a_backend_lets_the_packet_through_and_says_so() {
    let mut node = Node::new();
    node.frontend(VIP4, 80, Protocol::Tcp, &[5000]);
    let syn = tcp((CLIENT4, 5000), (VIP4, 80), SYN);
    let (result, counted) = node.counted(|n| n.uplink_in(&syn));
    assert_eq!((result, counted), ((PASS, syn), [("failed_backend_missing", 1)].into()));
}

#[test]
fn a_cluster_ip_is_not_served_to_the_wire() {
    let mut node = Node::new();
    node.backend(1, LOCAL4, 80, Protocol::Tcp, true);
    let mut row = node.frontend("10.96.0.1", 80, Protocol::Tcp, &[1]);
    row.flags = frontend_flag::FRONTEND_CLUSTER_IP;
    node.frontend_row("10.96.0.1", 80, Protocol::Tcp, &row);
    node.address("10.96.0.1", address_flag::ADDRESS_CLUSTER_IP);
    let syn = tcp((CLIENT4, 5000), ("10.96.0.1", 80), SYN);
    assert_eq!(node.uplink_in(&syn), (PASS, syn));
}

#[test]
fn errors_about_local_flows_are_translated_outside_and_inside_both_ways() {
    let mut node = Node::new();
    for (client, service, local, ..) in FAMILIES {
        let (router, host) = if is_ip4(client) { ("203.0.113.9", NODE4) } else { ("2001:db8:9::9", NODE6) };
        let least = if is_ip4(client) { 28 } else { 48 };
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let id = node.counters()["flow_local"] as u32 + 1;
            node.backend(id, local, 8080, protocol, true);
            node.frontend(service, 80, protocol, &[id]);
            let packet = |from, to| match protocol {
                Protocol::Tcp => tcp(from, to, SYN),
                _ => udp(from, to, &[5; 200]),
            };
            let (from, to, pod) = ((client, 5000), (service, 80), (local, 8080));
            node.uplink_in(&packet(from, to));
            for bytes in [least, least + 12, 1000] {
                // A router beyond the uplink, about a reply.
                let (action, seen) = node.uplink_in(&error(router, &packet(to, from), bytes, 1300));
                assert_eq!(action, PASS);
                assert_error(&seen, (router, local), pod, from, 1300);
                // The pod itself, and the host in front of it, about a request.
                for (sender, shown) in [(local, service), (host, host)] {
                    let (action, seen) = node.uplink_out(&error(sender, &packet(from, pod), bytes, 1200));
                    assert_eq!(action, PASS);
                    assert_error(&seen, (shown, client), from, to, 1200);
                }
            }
        }
    }
    assert_eq!(node.counters()["icmp_translated"], 2 * 2 * 3 * 3);
}

#[test]
fn errors_about_remote_flows_are_translated_and_forwarded_both_ways() {
    let mut node = Node::new();
    for (client, service, _, remote, source) in FAMILIES {
        let router = if is_ip4(client) { "203.0.113.9" } else { "2001:db8:9::9" };
        node.backend(1, remote, 8080, Protocol::Tcp, false);
        node.frontend(service, 80, Protocol::Tcp, &[1]);
        let (from, to, pod) = ((client, 5000), (service, 80), (remote, 8080));
        let port = node.uplink_in(&tcp(from, to, SYN)).1.ports().0;
        let near = (source, port);
        for (sender, bytes) in [(router, 60), (remote, 1000)] {
            let (action, seen) = node.tunnel_in(&error(sender, &tcp(near, pod, ACK).carrying(300), bytes, 1300));
            assert_eq!((action, seen.ttl), (REDIRECT, 59));
            assert_error(&seen, (service, client), from, to, 1300);
        }
        let (action, seen) = node.uplink_in(&error(router, &tcp(to, from, ACK).carrying(300), 100, 1250));
        assert_eq!((action, seen.ttl), (REDIRECT, 59));
        assert_error(&seen, (source, remote), pod, near, 1250);
    }
}

#[test]
fn an_error_that_does_not_fit_its_way_is_dropped_and_counted_whether_it_may_be_fragmented_or_not() {
    let mut node = Node::new();
    node.backend(1, REMOTE4, 8080, Protocol::Tcp, false);
    node.frontend(VIP4, 80, Protocol::Tcp, &[1]);
    node.uplink_in(&tcp((CLIENT4, 5000), (VIP4, 80), SYN));
    let large = error("203.0.113.9", &tcp((VIP4, 80), (CLIENT4, 5000), ACK).carrying(1440), 1440, 1300).bytes();
    for bytes in [large.clone(), may_fragment(large)] {
        let (outcome, counted) = node.counted(|n| n.raw(Direction::In, n.uplink, &bytes));
        assert_eq!((outcome.action, counted), (DROP, [("icmp_too_big", 1)].into()));
    }
}

#[test]
fn errors_about_what_is_not_ours_are_left_alone() {
    let mut node = Node::new();
    node.backend(1, LOCAL4, 8080, Protocol::Tcp, true);
    node.frontend(VIP4, 80, Protocol::Tcp, &[1]);
    node.uplink_in(&tcp((CLIENT4, 5000), (VIP4, 80), SYN));
    let mut forged = error("203.0.113.9", &tcp((VIP4, 80), (CLIENT4, 5000), ACK), 60, 1300);
    forged.destination = ip(NODE4);
    for frame in [
        error("203.0.113.9", &tcp((VIP4, 80), (CLIENT4, 5001), ACK), 60, 1300),
        error("203.0.113.9", &udp((VIP4, 80), (CLIENT4, 5000), b""), 60, 1300),
        forged,
    ] {
        assert_eq!(node.uplink_in(&frame), (PASS, frame));
    }
}

#[test]
fn fragments_follow_their_first_one_both_ways() {
    let mut node = Node::new();
    for (client, service, local, remote, source) in FAMILIES {
        node.backend(1, local, 53, Protocol::Udp, true);
        node.backend(2, remote, 53, Protocol::Udp, false);
        node.frontend(service, 5301, Protocol::Udp, &[1]);
        node.frontend(service, 5302, Protocol::Udp, &[2]);
        // To and from a local backend.
        let (from, to) = ((client, 5000), (service, 5301));
        let whole = udp(from, to, &[3; 2000]);
        let expected = whole.with_ends(from, (local, 53)).fragments(1208, 77);
        for (piece, expected) in whole.fragments(1208, 77).iter().zip(expected) {
            assert_eq!(node.uplink_in(piece), (PASS, expected));
        }
        let whole = udp((local, 53), from, &[4; 2000]);
        let expected = whole.with_ends(to, from).fragments(1208, 78);
        for (piece, expected) in whole.fragments(1208, 78).iter().zip(expected) {
            assert_eq!(node.uplink_out(piece), (PASS, expected));
        }
        // To and from a remote one.
        let (from, to) = ((client, 5000), (service, 5302));
        let whole = udp(from, to, &[5; 2000]);
        let port = node.uplink_in(&udp(from, to, b"?")).1.ports().0;
        let expected = whole.with_ends((source, port), (remote, 53)).living(60).fragments(1208, 79);
        for (piece, expected) in whole.fragments(1208, 79).iter().zip(expected) {
            assert_eq!(node.uplink_in(piece), (REDIRECT, expected));
        }
        let whole = udp((remote, 53), (source, port), &[6; 2000]);
        let expected = whole.with_ends(to, from).living(60).fragments(1208, 80);
        for (piece, expected) in whole.fragments(1208, 80).iter().zip(expected) {
            assert_eq!(node.tunnel_in(piece), (REDIRECT, expected));
        }
        // One that comes before its first: lost for a Service's address, the host's stack's for a node's.
        let late = &udp(from, to, &[5; 2000]).fragments(1208, 81)[1];
        let (result, counted) = node.counted(|n| n.uplink_in(late));
        assert_eq!((result.0, counted), (DROP, [("dropped_fragment", 1)].into()));
        let node_address = if is_ip4(client) { NODE4 } else { NODE6 };
        let late = udp(from, (node_address, 5302), &[5; 2000]).fragments(1208, 82)[1].clone();
        assert_eq!(node.uplink_in(&late), (PASS, late));
    }
}
