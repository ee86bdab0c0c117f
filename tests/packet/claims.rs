//! Packets to and from served addresses and ports that are not a Service's, or that the host's stack would refuse: other
//! hosts' frames, answers to the node's own connections, connections to a pod itself, forged sources, source routes.

use crate::laboratory::packets::frame::{ACK, FIN, RST, SYN, tcp, udp, with_options};
use crate::laboratory::packets::{
    self, CLIENT4, CLIENT6, DROP, LOCAL4, LOCAL6, NODE4, NODE6, Node, PASS, REDIRECT, REMOTE4, REMOTE6, VIP4,
};
use kubelane::abi::rp_filter::{RP_FILTER_LOOSE, RP_FILTER_OFF, RP_FILTER_STRICT};
use kubelane::bpf::Direction;
use kubelane::model::Protocol;

/// Ports with a backend here, elsewhere, and none.
const HERE: u16 = 30080;
const ELSEWHERE: u16 = 30081;
const NOWHERE: u16 = 30082;

fn node(protocol: Protocol) -> Node {
    let mut node = Node::new();
    for (id, backend, local) in [(1, LOCAL4, true), (2, REMOTE4, false), (3, LOCAL6, true), (4, REMOTE6, false)] {
        node.backend(id, backend, 8080, protocol, local);
    }
    for (any, ids) in [("0.0.0.0", [1, 2]), ("::", [3, 4])] {
        node.frontend(any, HERE, protocol, &ids[..1]);
        node.frontend(any, ELSEWHERE, protocol, &ids[1..]);
        node.frontend(any, NOWHERE, protocol, &[]);
    }
    node
}

const PARTIES: [(&str, &str); 2] = [(CLIENT4, NODE4), (CLIENT6, NODE6)];

#[test]
fn frames_for_another_host_and_for_all_are_left_alone() {
    let mut node = node(Protocol::Udp);
    for (client, address) in PARTIES {
        for port in [HERE, ELSEWHERE, NOWHERE] {
            for to in [[2, 0, 0, 0, 0, 9], [0xff; 6], [1, 0, 0x5e, 0, 0, 1]] {
                let mut frame = udp((client, 5000), (address, port), b"?").bytes();
                frame[..6].copy_from_slice(&to);
                let (outcome, moved) = node.counted(|n| n.raw(Direction::In, n.uplink, &frame));
                assert_eq!((outcome.action, &outcome.frame), (PASS, &frame), "{port} {to:?}");
                assert!(moved.is_empty(), "{moved:?}");
            }
        }
    }
    assert_eq!(node.flow_rows(), (0, 0));
}

#[test]
fn a_syn_with_an_acknowledgement_answers_somebody_elses_syn_and_begins_no_flow() {
    let mut node = node(Protocol::Tcp);
    for (client, address) in PARTIES {
        for port in [HERE, ELSEWHERE, NOWHERE] {
            let answer = tcp((client, 443), (address, port), SYN | ACK).numbered(1, 2);
            let (outcome, moved) = node.counted(|n| n.uplink_in(&answer));
            assert_eq!((outcome, moved.is_empty()), ((PASS, answer), true), "{port}");
        }
    }
    assert_eq!(node.flow_rows(), (0, 0));
}

#[test]
fn answers_to_what_has_left_from_a_served_port_are_its_senders() {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let mut node = node(protocol);
        for (client, address) in PARTIES {
            for port in [HERE, ELSEWHERE, NOWHERE] {
                let packet = |from, to| match protocol {
                    Protocol::Tcp => tcp(from, to, ACK).carrying(9),
                    _ => udp(from, to, b"?"),
                };
                let (own, far) = ((address, port), (client, 9000));
                let question = packet(own, far);
                assert_eq!(node.uplink_out(&question), (PASS, question));
                let answer = packet(far, own);
                let (outcome, moved) = node.counted(|n| n.uplink_in(&answer));
                assert_eq!((outcome, moved.is_empty()), ((PASS, answer), true), "{port}");
                // Another port of the same peer has nothing to do with it.
                let (_, moved) = node.counted(|n| n.uplink_in(&packet((client, 9001), own)));
                assert!(!moved.is_empty(), "{port}");
            }
        }
    }
}

#[test]
fn a_replys_own_way_out_is_no_question() {
    let mut node = node(Protocol::Udp);
    let (from, to) = ((CLIENT4, 5000), (NODE4, ELSEWHERE));
    let query = udp(from, to, b"?");
    let (_, seen) = node.uplink_in(&query);
    let answer = udp((REMOTE4, 8080), ("10.244.0.1", seen.ports().0), b"!");
    let (action, answered) = node.tunnel_in(&answer);
    assert_eq!((action, answered.ports()), (REDIRECT, (ELSEWHERE, 5000)));
    // As it meets the programs again when it leaves, having come in by the tunnel.
    let outcome = node.forwarded_out(&answered, node.tunnel);
    assert_eq!(outcome, (PASS, answered));
    node.forget_flows();
    assert_eq!(node.counted(|n| n.uplink_in(&query)).1, [("flow_remote", 1)].into());
}

#[test]
fn a_flow_that_nobody_has_answered_takes_no_packet_of_a_connection_to_the_pod_itself() {
    let mut node = node(Protocol::Tcp);
    for (client, address, pod) in [(CLIENT4, NODE4, LOCAL4), (CLIENT6, NODE6, LOCAL6)] {
        let (from, to, pod) = ((client, 40_000), (address, HERE), (pod, 8080));
        // Somebody else, or the client itself, opens a connection to the NodePort from the port of another one.
        assert_eq!(node.uplink_in(&tcp(from, to, SYN)).0, PASS);
        for direct in [
            tcp(pod, from, ACK).numbered(0x7000_0000, 0x4000_0000).carrying(100),
            tcp(pod, from, SYN | ACK).numbered(0x7000_0000, 0x4000_0000),
            tcp(pod, from, FIN | ACK).numbered(0x7000_0000, 0x4000_0000),
            tcp(pod, from, RST).numbered(0x7000_0000, 0),
        ] {
            assert_eq!(node.uplink_out(&direct), (PASS, direct));
        }
        // The answer to that SYN is the flow's; and so is a refusal.
        let refusal = tcp(pod, from, RST | ACK).numbered(0, 1001);
        assert_eq!(node.uplink_out(&refusal), (PASS, refusal.with_ends(to, from)));
        assert_eq!(node.uplink_in(&tcp(from, to, SYN)).0, PASS);
        let answer = tcp(pod, from, SYN | ACK).numbered(7000, 1001);
        assert_eq!(node.uplink_out(&answer), (PASS, answer.with_ends(to, from)));
    }
}

#[test]
fn a_connection_by_a_node_port_from_the_port_of_one_to_the_pod_itself_gets_another_port() {
    let mut node = node(Protocol::Tcp);
    for (client, address, pod) in [(CLIENT4, NODE4, LOCAL4), (CLIENT6, NODE6, LOCAL6)] {
        let (from, to, pod) = ((client, 40_000), (address, HERE), (pod, 8080));
        let syn = tcp(from, to, SYN);
        assert_eq!(node.uplink_in(&syn), (PASS, syn.with_ends(from, pod)));
        // The pod takes it for a SYN on the connection that it has, and says where that one is (RFC 5961).
        let challenge = tcp(pod, from, ACK).numbered(0x7000_0000, 0x4000_0000);
        assert_eq!(node.uplink_out(&challenge), (PASS, challenge.clone()));
        let (action, again) = node.uplink_in(&syn);
        let port = again.ports().0;
        assert_ne!(port, 40_000);
        assert_eq!((action, again), (PASS, syn.with_ends((client, port), pod)));
        let answer = tcp(pod, (client, port), SYN | ACK).numbered(7000, 1001);
        assert_eq!(node.uplink_out(&answer), (PASS, answer.with_ends(to, from)));
        let ack = tcp(from, to, ACK).numbered(1001, 7001);
        assert_eq!(node.uplink_in(&ack), (PASS, ack.with_ends((client, port), pod)));
        assert_eq!(node.uplink_out(&challenge), (PASS, challenge));
    }
    assert_eq!(node.flow_rows(), (4, 0));
}

#[test]
fn where_a_backend_is_is_a_matter_of_routes_whatever_its_nodes_name() {
    let mut node = node(Protocol::Tcp);
    // Named as of another node, or of none, but here: pods, and the node itself.
    let here = ["10.1.0.77", "fd01::77", NODE4, NODE6];
    // Named as of this node, but elsewhere.
    let elsewhere = [REMOTE4, REMOTE6];
    for (port, backend) in (31_000..).zip(here.into_iter().chain(elsewhere)) {
        let id = u32::from(port) - 30_900;
        let is_elsewhere = elsewhere.contains(&backend);
        let six = backend.contains(':');
        let (client, address) = PARTIES[usize::from(six)];
        node.backend(id, backend, 8080, Protocol::Tcp, is_elsewhere);
        node.frontend(if six { "::" } else { "0.0.0.0" }, port, Protocol::Tcp, &[id]);
        let syn = tcp((client, 5000), (address, port), SYN);
        let (action, seen) = node.uplink_in(&syn);
        let keeps_client = seen.source.to_string() == client;
        assert_eq!(
            (action, seen.destination.to_string().as_str(), keeps_client),
            if is_elsewhere { (REDIRECT, backend, false) } else { (PASS, backend, true) },
        );
    }
}

#[test]
fn sources_that_cannot_be_reach_no_backend_elsewhere() {
    let mut node = node(Protocol::Udp);
    let four = ["127.0.0.1", "0.0.0.0", "0.1.2.3", "224.1.2.3", "255.255.255.255", "240.0.0.1", NODE4, "10.0.0.255"];
    let six = ["::", "::1", "ff02::1", "fe80::1", NODE6];
    for (sources, address) in [(&four[..], NODE4), (&six[..], NODE6)] {
        for source in sources {
            let query = udp((source, 5000), (address, ELSEWHERE), b"?");
            let (outcome, moved) = node.counted(|n| n.uplink_in(&query));
            assert_eq!((outcome.0, moved), (DROP, [("dropped_martian", 1)].into()), "{source}");
        }
    }
    assert_eq!(node.flow_rows(), (0, 0));
}

#[test]
fn the_reverse_path_is_looked_for_where_the_device_asks_for_it() {
    // Behind the tunnel, and behind nothing.
    for (source, allowed) in [
        ("10.244.7.7", [(RP_FILTER_OFF, true), (RP_FILTER_LOOSE, true), (RP_FILTER_STRICT, false)]),
        ("203.0.113.7", [(RP_FILTER_OFF, true), (RP_FILTER_LOOSE, false), (RP_FILTER_STRICT, false)]),
        (CLIENT4, [(RP_FILTER_OFF, true), (RP_FILTER_LOOSE, true), (RP_FILTER_STRICT, true)]),
    ] {
        for (port, (rp_filter, is_allowed)) in (5000..).zip(allowed) {
            let mut node = node(Protocol::Udp);
            packets::ip_command("route add unreachable 203.0.113.0/24");
            node.filter_reverse_paths(rp_filter);
            let query = udp((source, port), (NODE4, ELSEWHERE), b"?");
            let (outcome, moved) = node.counted(|n| n.uplink_in(&query));
            let wanted = if is_allowed { (REDIRECT, "flow_remote") } else { (DROP, "dropped_martian") };
            assert!(outcome.0 == wanted.0 && moved.contains_key(wanted.1), "{source} {rp_filter}: {moved:?}");
        }
    }
}

#[test]
fn a_source_route_is_refused_and_other_options_pass() {
    let mut node = node(Protocol::Udp);
    let lsrr = [1, 0x83, 7, 4, 10, 0, 0, 254];
    let ssrr = [0x89, 7, 4, 10, 0, 0, 254, 0];
    let record_route = [7, 7, 4, 0, 0, 0, 0, 0];
    let broken = [7, 0, 0x83, 7, 4, 0, 0, 0];
    for (port, options, passes) in [(1, lsrr, false), (2, ssrr, false), (3, record_route, true), (4, broken, false)] {
        let frame = with_options(&udp((CLIENT4, port), (NODE4, ELSEWHERE), b"?").bytes(), &options);
        let (outcome, moved) = node.counted(|n| n.raw(Direction::In, n.uplink, &frame));
        assert_eq!(outcome.action, if passes { REDIRECT } else { DROP }, "{options:?}");
        assert_eq!(moved.contains_key("dropped_options"), !passes, "{options:?}: {moved:?}");
    }
}

#[test]
fn a_flood_of_forged_clients_takes_nobodys_affinity_and_no_proved_flow() {
    let mut node = Node::new();
    node.backend(1, LOCAL4, 80, Protocol::Tcp, true);
    node.backend(2, "10.1.0.6", 80, Protocol::Tcp, true);
    node.backend(3, LOCAL4, 53, Protocol::Udp, true);
    let mut row = node.frontend(VIP4, 80, Protocol::Tcp, &[1, 2]);
    row.affinity_seconds = 10_800;
    node.frontend_row(VIP4, 80, Protocol::Tcp, &row);
    node.frontend(VIP4, 53, Protocol::Udp, &[3]);
    let open = |node: &mut Node, port: u16| {
        let from = (CLIENT4, port);
        let pod = node.uplink_in(&tcp(from, (VIP4, 80), SYN)).1.destination.to_string();
        node.uplink_out(&tcp((&pod, 80), from, SYN | ACK).numbered(7000, 1001));
        node.uplink_in(&tcp(from, (VIP4, 80), ACK).numbered(1001, 7001));
        pod
    };
    let pod = open(&mut node, 5000);
    assert_eq!(node.rows("affinities"), 1);
    let ((), moved) = node.counted(|node| {
        for n in 0..100_000u32 {
            let client = format!("203.{}.{}.{}", n >> 16 & 0xff, n >> 8 & 0xff, n & 0xff);
            node.raw(Direction::In, node.uplink, &tcp((&client, 7), (VIP4, 80), SYN).bytes());
            let datagram = udp((&client, 7), (VIP4, 53), b"?").bytes();
            node.raw(Direction::In, node.uplink, &datagram);
            node.raw(Direction::In, node.uplink, &datagram);
        }
    });
    assert!(moved["flow_pushed_out"] > 100_000, "{moved:?}");
    assert_eq!((moved.get("flow_established"), moved.get("dropped_flow_table")), (None, None), "{moved:?}");
    assert_eq!((node.rows("affinities"), node.flow_rows().0), (1, 2));
    let data = tcp((CLIENT4, 5000), (VIP4, 80), ACK).numbered(1001, 7001).carrying(9);
    assert_eq!(node.uplink_in(&data), (PASS, data.with_ends((CLIENT4, 5000), (&pod, 80))));
    for port in 5001..5020 {
        assert_eq!(open(&mut node, port), pod, "the client is where it was");
    }
}

#[test]
fn fragments_to_ports_that_nobody_serves_are_not_remembered() {
    let mut node = node(Protocol::Udp);
    for (port, rows) in [(9, 0), (HERE, 1)] {
        for piece in udp((CLIENT4, 5000), (NODE4, port), &[0; 1000]).fragments(504, u32::from(port)) {
            node.uplink_in(&piece);
        }
        assert_eq!(node.rows("fragments"), rows, "{port}");
    }
}
