//! Packets from the wire to a backend on another node: both ends are rewritten, the packet is routed here, and the
//! replies are rewritten back where they come in. Programs run under BPF_PROG_TEST_RUN, in the real kernel.

use std::collections::{BTreeMap, HashSet};

use crate::laboratory::packets::errors::{assert_error, error};
use crate::laboratory::packets::frame::{ACK, FIN, Frame, Inside, SYN, may_fragment, parse, parse_packet, tcp, udp};
use crate::laboratory::packets::{
    self, CLIENT4, CLIENT6, DROP, LOCAL4, NODE4, NODE6, Node, PASS, REDIRECT, REMOTE4, REMOTE6, TUNNEL_MTU, TUNNEL4,
    TUNNEL6, VIP4, VIP6, ip_command,
};
use kubelane::bpf::{Direction, ThroughStack, probe};
use kubelane::model::Protocol;

/// Client, service address, frontend's address, backend, the node's address towards it.
const ENDS: [(&str, &str, &str, &str, &str); 4] = [
    (CLIENT4, NODE4, "0.0.0.0", REMOTE4, TUNNEL4),
    (CLIENT6, NODE6, "::", REMOTE6, TUNNEL6),
    (CLIENT4, VIP4, VIP4, REMOTE4, TUNNEL4),
    (CLIENT6, VIP6, VIP6, REMOTE6, TUNNEL6),
];

fn node_with_remote_backends(protocol: Protocol) -> Node {
    let mut node = Node::new();
    node.backend(4, REMOTE4, 8080, protocol, false);
    node.backend(6, REMOTE6, 8080, protocol, false);
    for (_, _, frontend, backend, _) in ENDS {
        node.frontend(frontend, 30080, protocol, &[if backend == REMOTE4 { 4 } else { 6 }]);
    }
    node
}

/// Sends a frame of the client's and returns the port that the backend sees.
fn port_of(node: &mut Node, frame: &Frame) -> u16 {
    let (action, seen) = node.uplink_in(frame);
    assert_eq!(action, REDIRECT, "{frame:?}");
    seen.ports().0
}

#[test]
fn a_tcp_connection_gets_the_nodes_address_and_a_private_port_and_loses_a_hop_each_way() {
    let mut node = node_with_remote_backends(Protocol::Tcp);
    for (i, (client, service, _, backend, source)) in ENDS.into_iter().enumerate() {
        let (from, to) = ((client, 40_000 + i as u16), (service, 30080));
        let syn = tcp(from, to, SYN);
        let port = port_of(&mut node, &syn);
        assert!((1024..30_000).contains(&port), "{port}");
        let (near, far) = ((source, port), (backend, 8080));
        assert_eq!(node.uplink_in(&syn), (REDIRECT, syn.with_ends(near, far).living(60)));
        let syn_ack = tcp(far, near, SYN | ACK).numbered(7000, 1001);
        assert_eq!(node.tunnel_in(&syn_ack), (REDIRECT, syn_ack.with_ends(to, from).living(60)));
        for size in [0, 1, 1000, 1301] {
            let data = tcp(from, to, ACK).numbered(1001, 7001).carrying(size);
            assert_eq!(node.uplink_in(&data), (REDIRECT, data.with_ends(near, far).living(60)));
            let answer = tcp(far, near, ACK).numbered(7001, 1001).carrying(size);
            assert_eq!(node.tunnel_in(&answer), (REDIRECT, answer.with_ends(to, from).living(60)));
        }
    }
    assert_eq!(node.flow_rows(), (8, 0));
}

#[test]
fn udp_goes_both_ways_with_and_without_a_checksum() {
    let mut node = node_with_remote_backends(Protocol::Udp);
    for (i, (client, service, _, backend, source)) in ENDS.into_iter().enumerate() {
        for checked in [true, false] {
            let with = |frame: Frame| if checked { frame } else { frame.unchecked() };
            let (from, to) = ((client, 41_000 + 2 * i as u16 + u16::from(checked)), (service, 30080));
            let query = with(udp(from, to, b"who?"));
            let port = port_of(&mut node, &query);
            let (near, far) = ((source, port), (backend, 8080));
            let answer = with(udp(far, near, b"me."));
            for _ in 0..3 {
                assert_eq!(node.uplink_in(&query), (REDIRECT, query.with_ends(near, far).living(60)));
                assert_eq!(node.tunnel_in(&answer), (REDIRECT, answer.with_ends(to, from).living(60)));
                node.age_flows(1);
            }
        }
    }
    assert_eq!(node.flow_rows(), (16, 0));
}

#[test]
fn one_clients_ports_never_meet_and_a_port_used_again_is_given_the_same_one() {
    let mut node = node_with_remote_backends(Protocol::Tcp);
    let (_, counted) = node.counted(|node| {
        let mut seen = HashSet::new();
        for port in 32_768..=60_999u16 {
            let syn = tcp((CLIENT4, port), (NODE4, 30080), SYN);
            assert!(seen.insert(port_of(node, &syn)), "{port}");
        }
    });
    assert_eq!((counted.get("snat_retry"), counted.get("flow_remote")), (None, Some(&28_232)));

    // Closed by the backend: it has the connection in TIME_WAIT, where only the same client's SYN is welcome.
    let from = (CLIENT4, 50_000);
    let port = port_of(&mut node, &tcp(from, (NODE4, 30080), SYN));
    let near = (TUNNEL4, port);
    node.tunnel_in(&tcp((REMOTE4, 8080), near, SYN | ACK).numbered(7000, 1001));
    node.uplink_in(&tcp(from, (NODE4, 30080), ACK).numbered(1001, 7001));
    node.tunnel_in(&tcp((REMOTE4, 8080), near, FIN | ACK).numbered(7001, 1001));
    node.uplink_in(&tcp(from, (NODE4, 30080), FIN | ACK).numbered(1001, 7002));
    assert_eq!(port_of(&mut node, &tcp(from, (NODE4, 30080), SYN)), port);
}

#[test]
fn many_clients_share_the_range_until_established_ones_fill_it() {
    let mut node = node_with_remote_backends(Protocol::Tcp);
    // Each flow is proved, so that none may be pushed out.
    let ((), counted) = node.counted(|node| {
        for n in 0..40_000u32 {
            let client = format!("198.51.{}.{}", n >> 8 & 0xff, n & 0xff);
            let from = (client.as_str(), 7000 + (n >> 16) as u16);
            let (action, seen) = node.uplink_in(&tcp(from, (VIP4, 30080), SYN));
            if action != REDIRECT {
                continue;
            }
            node.tunnel_in(&tcp((REMOTE4, 8080), (TUNNEL4, seen.ports().0), SYN | ACK).numbered(7000, 1001));
            node.uplink_in(&tcp(from, (VIP4, 30080), ACK).numbered(1001, 7001));
        }
    });
    let flows = counted["flow_remote"];
    assert!((25_000..=28_976).contains(&flows), "{counted:?}");
    assert_eq!(counted["dropped_snat_exhausted"], 40_000 - flows);
    assert_eq!(node.flow_rows().0 as u64, 2 * flows);
}

/// 30,000 connections that the backend closes, more than there are ports in the range; what was counted.
fn closed_connections(client: impl Fn(u16) -> String) -> BTreeMap<&'static str, u64> {
    let mut node = node_with_remote_backends(Protocol::Tcp);
    let ((), counted) = node.counted(|node| {
        for n in 0..30_000u16 {
            if n == 28_000 {
                // However fast or slow the machine is: those that closed did so seconds ago, and not minutes.
                node.let_flows_rest(3);
            }
            let client = client(n);
            let from = (client.as_str(), 5000 + n);
            let port = port_of(node, &tcp(from, (NODE4, 30080), SYN));
            node.tunnel_in(&tcp((REMOTE4, 8080), (TUNNEL4, port), SYN | ACK).numbered(7000, 1001));
            node.uplink_in(&tcp(from, (NODE4, 30080), ACK).numbered(1001, 7001));
            node.tunnel_in(&tcp((REMOTE4, 8080), (TUNNEL4, port), FIN | ACK).numbered(7001, 1001));
            node.uplink_in(&tcp(from, (NODE4, 30080), FIN | ACK).numbered(1001, 7002));
        }
    });
    counted
}

#[test]
fn connections_that_a_backend_closed_give_way_when_the_range_is_used_up() {
    let counted = closed_connections(|n| format!("198.51.{}.{}", n >> 8, n & 0xff));
    assert_eq!((counted["flow_remote"], counted.get("dropped_snat_exhausted")), (30_000, None), "{counted:?}");
    assert!(counted["snat_reclaimed"] > 0);
}

#[test]
fn a_client_follows_its_own_closed_connections_after_two_tries() {
    let counted = closed_connections(|_| CLIENT4.to_owned());
    assert_eq!((counted["flow_remote"], counted.get("dropped_snat_exhausted")), (30_000, None), "{counted:?}");
    // The range has more than 28,000 ports, and this client's meet each other only when it is used up: then two tries, one of
    // them in vain.
    assert!((1..2000).contains(&counted["snat_retry"]), "{counted:?}");
    assert_eq!(counted.get("snat_reclaimed"), None);
}

#[test]
fn a_flood_of_unproved_flows_takes_places_from_itself_only() {
    let mut node = node_with_remote_backends(Protocol::Tcp);
    let from = (CLIENT4, 50_000);
    let port = port_of(&mut node, &tcp(from, (VIP4, 30080), SYN));
    node.tunnel_in(&tcp((REMOTE4, 8080), (TUNNEL4, port), SYN | ACK).numbered(7000, 1001));
    node.uplink_in(&tcp(from, (VIP4, 30080), ACK).numbered(1001, 7001));
    let ((), counted) = node.counted(|node| {
        for n in 0..200_000u32 {
            let client = format!("203.{}.{}.{}", n >> 16 & 0xff, n >> 8 & 0xff, n & 0xff);
            let outcome = node.raw(Direction::In, node.uplink, &tcp((&client, 7), (VIP4, 30080), SYN).bytes());
            assert_eq!(outcome.action, REDIRECT);
        }
    });
    assert_eq!(counted.get("dropped_snat_exhausted"), None);
    assert!(counted["snat_reclaimed"] > 0);
    assert_eq!(node.flow_rows().0, 2);
    let data = tcp(from, (VIP4, 30080), ACK).numbered(1001, 7001).carrying(9);
    assert_eq!(node.uplink_in(&data), (REDIRECT, data.with_ends((TUNNEL4, port), (REMOTE4, 8080)).living(60)));
}

/// What a router's answer says, and the packet that it quotes.
fn answer_of(frame: &Frame) -> ((u8, u8, u32), Frame) {
    let Inside::Icmp { kind, code, rest, data } = &frame.inside else { panic!("{frame:?}") };
    ((*kind, *code, *rest), parse_packet(data, false))
}

/// What a sender is told of a device's MTU: where the kernel does not name it, the least that IPv6 allows.
fn told(mtu: u32) -> u32 {
    if probe::has_route_mtu() { mtu } else { 1280 }
}

#[test]
fn what_does_not_fit_the_tunnel_is_answered_with_its_mtu_in_both_directions() {
    let mut node = node_with_remote_backends(Protocol::Tcp);
    for (client, service, _, backend, source) in ENDS {
        let (from, to) = ((client, 40_000), (service, 30080));
        let port = port_of(&mut node, &tcp(from, to, SYN));
        node.tunnel_in(&tcp((backend, 8080), (source, port), SYN | ACK).numbered(7000, 1001));
        let header = if client == CLIENT4 { 40 } else { 60 };
        let fits = tcp(from, to, ACK).carrying(TUNNEL_MTU as usize - header);
        assert_eq!(node.uplink_in(&fits).0, REDIRECT);
        let big = tcp(from, to, ACK).carrying(TUNNEL_MTU as usize - header + 1);
        let ((action, answer), counted) = node.counted(|n| n.uplink_in(&big));
        assert_eq!((action, counted.get("icmp_too_big")), (REDIRECT, Some(&1)));
        assert_eq!((answer.source, answer.destination), (big.destination, big.source));
        let (said, quoted) = answer_of(&answer);
        let expected = if client == CLIENT4 { (3, 4, told(TUNNEL_MTU)) } else { (2, 0, told(TUNNEL_MTU)) };
        assert_eq!(said, expected);
        assert_eq!((quoted.source, quoted.destination, quoted.ports()), (big.source, big.destination, big.ports()));

        // The other way round: a reply too big for the uplink.
        ip_command("link set up0 mtu 1400");
        node.routes_changed();
        let big = tcp((backend, 8080), (source, port), ACK).carrying(1400 - header + 1);
        let (action, answer) = node.tunnel_in(&big);
        let (said, quoted) = answer_of(&answer);
        assert_eq!((action, said.2), (REDIRECT, told(1400)));
        assert_eq!((answer.source, answer.destination), (big.destination, big.source));
        assert_eq!((quoted.source, quoted.ports()), (big.source, big.ports()));
        ip_command("link set up0 mtu 1500");
        node.routes_changed();
    }
}

#[test]
fn a_packet_at_the_end_of_its_hops_is_answered_with_time_exceeded() {
    let mut node = node_with_remote_backends(Protocol::Udp);
    for (client, service, ..) in ENDS {
        for ttl in [0, 1] {
            let probe = udp((client, 33_434), (service, 30080), b"traceroute").living(ttl);
            let ((action, answer), counted) = node.counted(|n| n.uplink_in(&probe));
            assert_eq!((action, counted.get("icmp_ttl_exceeded")), (REDIRECT, Some(&1)));
            let (said, quoted) = answer_of(&answer);
            assert_eq!(said, if client == CLIENT4 { (11, 0, 0) } else { (3, 0, 0) });
            assert_eq!((quoted.source, quoted.ttl, quoted.ports()), (probe.source, ttl, probe.ports()));
        }
        assert_eq!(node.uplink_in(&udp((client, 33_434), (service, 30080), b"").living(2)).1.ttl, 1);
    }
}

#[test]
fn every_way_in_which_a_packet_cannot_go_on_is_counted() {
    let mut node = node_with_remote_backends(Protocol::Udp);
    let query = |port| udp((CLIENT4, port), (NODE4, 30080), b"?");
    let refused = |node: &mut Node, port: u16| {
        node.routes_changed();
        let ((action, _), counted) = node.counted(|n| n.uplink_in(&query(port)));
        assert_eq!(action, DROP);
        counted.into_keys().collect::<Vec<_>>()
    };
    // A route that names a source which is no address of an outward device.
    ip_command("addr add 10.99.0.1/32 dev lo");
    ip_command("route add 10.244.1.5/32 dev over0 src 10.99.0.1");
    if probe::has_route_source() {
        assert_eq!(refused(&mut node, 1), ["dropped_snat_source"]);
    } else {
        let (action, seen) = node.uplink_in(&query(1));
        assert_eq!((action, seen.source.to_string().as_str()), (REDIRECT, TUNNEL4), "the device's address");
    }
    ip_command("route del 10.244.1.5/32");
    ip_command("route add blackhole 10.244.1.5/32");
    assert_eq!(refused(&mut node, 2), ["dropped_no_route"]);
    ip_command("route del blackhole 10.244.1.5/32");
    // A flow whose route goes away.
    assert_eq!(node.uplink_in(&query(3)).0, REDIRECT);
    ip_command("route add unreachable 10.244.1.5/32");
    node.routes_changed();
    assert_eq!(refused(&mut node, 3), ["dropped_no_route"]);
    ip_command("route del unreachable 10.244.1.5/32");
    assert_eq!(node.uplink_in(&query(3)).0, REDIRECT);
    packets::set_sysctl("net/ipv4/conf/up0/forwarding", "0");
    node.routes_changed();
    assert_eq!(refused(&mut node, 3), ["dropped_forwarding_off"]);
    assert_eq!(refused(&mut node, 4), ["dropped_forwarding_off"]);
}

fn clock() -> nix::sys::time::TimeSpec {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap()
}

#[test]
fn a_route_is_remembered_until_a_change_is_told_or_the_second_has_passed() {
    // What is remembered is the processor's.
    let mut here = nix::sched::CpuSet::new();
    here.set(nix::sched::sched_getcpu().unwrap()).unwrap();
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &here).unwrap();
    for (client, service, _, backend, _) in ENDS {
        let mut node = node_with_remote_backends(Protocol::Udp);
        node.datapath.route_epoch().unwrap().set_by_address(true).unwrap();
        let query = |port| udp((client, port), (service, 30080), b"?");
        let is_sent = |node: &mut Node, port| node.uplink_in(&query(port)).0 == REDIRECT;
        let family = if client == CLIENT4 { "" } else { "-6 " };
        let prefix = if client == CLIENT4 { 32 } else { 128 };
        let forbid = || ip_command(&format!("{family}route add unreachable {backend}/{prefix}"));
        let allow = || ip_command(&format!("{family}route del unreachable {backend}/{prefix}"));
        // As often as it takes for all of it to be in one second, each time with flows that begin: only these ask where
        // the backend is.
        for ports in (5000..).step_by(2) {
            let (first, other) = (ports, ports + 1);
            node.routes_changed();
            let began = clock();
            assert!(is_sent(&mut node, first));
            forbid();
            let sent = [is_sent(&mut node, first), is_sent(&mut node, other)];
            let large = query(first).carrying(1460);
            let (_, counted) = node.counted(|n| n.uplink_in(&large));
            let marked = node.marked(&query(first));
            // The programs' clock is the tick's, which an emulated processor gets late.
            let in_one_second = began.tv_sec() == clock().tv_sec() && began.tv_nsec() > 100_000_000;
            if in_one_second {
                assert_eq!(sent, [true, true], "what was answered a moment ago holds, for other flows as well");
                assert_eq!(counted, [("dropped_no_route", 1)].into(), "too big to be sure");
                assert_eq!(marked, DROP, "a mark may choose another route");
            }
            node.routes_changed();
            assert!(!is_sent(&mut node, first), "a change was told");
            allow();
            node.routes_changed();
            assert!(is_sent(&mut node, first));
            forbid();
            let told = clock().tv_sec();
            while clock().tv_sec() == told {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
            assert!(!is_sent(&mut node, first), "the second is over");
            allow();
            if in_one_second {
                break;
            }
        }
    }
}

#[test]
fn routing_rules_decide_by_source_and_not_the_main_table_alone() {
    let mut node = node_with_remote_backends(Protocol::Udp);
    // As where each address of a node has its own gateway: the reply's new source chooses the device.
    ip_command("rule add from 10.0.0.1 lookup 100");
    ip_command("route add default via 10.244.0.9 dev over0 mtu lock 1300 table 100");
    let query = udp((CLIENT4, 5000), (NODE4, 30080), b"?");
    let port = port_of(&mut node, &query);
    let answer = udp((REMOTE4, 8080), (TUNNEL4, port), b"").carrying(1290);
    let (_, counted) = node.counted(|n| n.tunnel_in(&answer));
    assert_eq!(counted.get("icmp_too_big"), Some(&1), "the rule's route has an MTU of its own");
}

#[test]
fn a_backend_behind_the_uplink_itself_is_reached_through_it() {
    let mut node = Node::new();
    node.backend(1, "10.0.0.7", 80, Protocol::Tcp, false);
    node.frontend("0.0.0.0", 30080, Protocol::Tcp, &[1]);
    let syn = tcp((CLIENT4, 5000), (NODE4, 30080), SYN);
    let port = port_of(&mut node, &syn);
    // The client may be the backend's own host: it still sees the node.
    let own = tcp(("10.0.0.7", 5000), (NODE4, 30080), SYN);
    let (_, seen) = node.uplink_in(&own);
    assert_eq!((seen.source.to_string().as_str(), seen.destination.to_string().as_str()), (NODE4, "10.0.0.7"));
    let answer = tcp(("10.0.0.7", 80), (NODE4, port), SYN | ACK).numbered(7000, 1001);
    assert_eq!(node.uplink_in(&answer), (REDIRECT, answer.with_ends((NODE4, 30080), (CLIENT4, 5000)).living(60)));
    let (action, seen) = node.uplink_in(&tcp(("10.0.0.7", 80), (NODE4, seen.ports().0), SYN | ACK).numbered(1, 1001));
    assert_eq!((action, seen.destination.to_string().as_str(), seen.ports()), (REDIRECT, "10.0.0.7", (30080, 5000)));
}

#[test]
fn local_and_remote_backends_of_one_frontend_are_both_chosen() {
    let mut node = Node::new();
    node.backend(1, LOCAL4, 80, Protocol::Tcp, true);
    node.backend(2, REMOTE4, 80, Protocol::Tcp, false);
    node.frontend("0.0.0.0", 30080, Protocol::Tcp, &[1, 2]);
    let mut local = 0;
    for port in 1000..2000 {
        local +=
            usize::from(node.uplink_in(&tcp((CLIENT4, port), (NODE4, 30080), SYN)).1.destination.to_string() == LOCAL4);
    }
    assert!((400..600).contains(&local), "{local}");
}

/// A packet that the host's stack goes on with: its own source, the backend, and the port that the backend sees.
fn through_the_stack(node: &mut Node, protocol: Protocol) {
    for (i, (client, service, _, backend, source)) in ENDS.into_iter().enumerate() {
        let (from, to, far) = ((client, 42_000 + i as u16), (service, 30080), (backend, 8080));
        let packet = |from, to, answers: bool| match protocol {
            Protocol::Tcp if answers => tcp(from, to, SYN | ACK).numbered(7000, 1001),
            Protocol::Tcp => tcp(from, to, SYN),
            _ => udp(from, to, b"through the stack"),
        };
        let request = packet(from, to, false);
        let ((action, seen), counted) = node.counted(|n| n.uplink_in(&request));
        assert_eq!((action, counted.get("handed_to_stack")), (PASS, Some(&1)), "{counted:?}");
        let port = seen.ports().0;
        assert_eq!(seen, request.with_ends((client, port), far));
        // It leaves by the tunnel, a hop less to live, and gets the node's address, also when the filter was renewed.
        node.renew_reply_filter();
        let leaving = seen.living(60);
        assert_eq!(node.tunnel_out(&leaving), (PASS, leaving.with_ends((source, port), far)));
        let answer = packet(far, (source, port), true);
        let (action, seen) = node.tunnel_in(&answer);
        assert_eq!((action, &seen), (PASS, &answer.with_ends(far, (client, port))));
        let leaving = seen.living(60);
        assert_eq!(node.uplink_out(&leaving), (PASS, leaving.with_ends(to, from)));
        // The next ones, too, and what the host's own NAT sent as another client's comes back as the client's.
        assert_eq!(node.uplink_in(&request).0, PASS);
    }
}

#[test]
fn packets_go_through_the_hosts_stack_where_that_is_asked_for() {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let mut node = node_with_remote_backends(protocol);
        let routing = node.datapath.route_epoch().unwrap();
        routing.set_through_stack(ThroughStack::All).unwrap();
        through_the_stack(&mut node, protocol);
        routing.set_through_stack(ThroughStack::None).unwrap();
        assert_eq!(
            node.uplink_in(&udp((CLIENT4, 42_000), (NODE4, 30080), b"")).0 == REDIRECT,
            protocol == Protocol::Udp
        );
    }
}

/// bpf_fib_lookup() does not tell the MTU of a route that is not locked; the stack keeps to it.
#[test]
fn ip4_packets_that_may_be_larger_than_a_routes_mtu_are_the_stacks_to_judge() {
    let mut node = node_with_remote_backends(Protocol::Udp);
    node.datapath.route_epoch().unwrap().set_through_stack(ThroughStack::Above(1400)).unwrap();
    for (client, service, expected) in [(CLIENT4, NODE4, PASS), (CLIENT6, NODE6, REDIRECT)] {
        let headers = if client == CLIENT4 { 28 } else { 48 };
        let of = |length: usize| udp((client, 42_000), (service, 30080), &vec![7; length - headers]);
        assert_eq!(node.uplink_in(&of(1400)).0, REDIRECT, "{client}");
        assert_eq!(node.uplink_in(&of(1401)).0, expected, "{client}");
    }
}

/// What was noted for the second step stays when the flow is gone.
#[test]
fn a_packet_with_the_ends_of_a_flow_that_went_through_the_stack_and_is_gone_leaves_as_it_is() {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let mut node = node_with_remote_backends(protocol);
        let mut collector = node.datapath.flow_collector().unwrap();
        node.datapath.route_epoch().unwrap().set_through_stack(ThroughStack::All).unwrap();
        for (client, service, remote, tunnel) in
            [(CLIENT4, NODE4, REMOTE4, TUNNEL4), (CLIENT6, NODE6, REMOTE6, TUNNEL6)]
        {
            let (from, to) = ((client, 42_000), (service, 30080));
            let asks = if protocol == Protocol::Tcp { tcp(from, to, SYN) } else { udp(from, to, b"?") };
            let (_, half) = node.uplink_in(&asks);
            assert_eq!(half.destination.to_string(), remote);
            let (_, whole) = node.tunnel_out(&half.clone());
            assert_eq!(whole.source.to_string(), tunnel);
            // This node's own error about it, as its stack saw it.
            let about = error(service, &half, 60, 1400);
            assert_error(&node.uplink_out(&about).1, (service, client), from, to, 1400);
            node.let_flows_rest(100_000);
            collector.collect(usize::MAX / 4).unwrap();
            let (action, left) = node.tunnel_out(&half);
            assert_eq!((action, left), (PASS, half), "{protocol:?} from {client}");
            assert_eq!(node.uplink_out(&about), (PASS, about), "an error, {protocol:?} from {client}");
        }
    }
}

#[test]
fn what_may_be_fragmented_is_handed_to_the_hosts_stack_which_does() {
    let mut node = node_with_remote_backends(Protocol::Udp);
    let (from, to) = ((CLIENT4, 42_000), (NODE4, 30080));
    let small = udp(from, to, b"?");
    let port = port_of(&mut node, &small);
    let big = udp(from, to, &[7; 1460]);
    let (outcome, counted) = node.counted(|n| n.raw(Direction::In, n.uplink, &may_fragment(big.bytes())));
    let (action, seen) = (outcome.action, parse(&outcome.frame));
    assert_eq!((action, counted.get("icmp_too_big"), counted.get("handed_to_stack")), (PASS, None, Some(&1)));
    assert_eq!(seen, big.with_ends((CLIENT4, port), (REMOTE4, 8080)));
    for piece in seen.living(60).fragments(1000, 99) {
        let (action, left) = node.tunnel_out(&piece);
        assert_eq!((action, left.source.to_string().as_str()), (PASS, TUNNEL4), "{piece:?}");
    }
    // What is small goes on as before, and so does what must not be fragmented.
    assert_eq!(node.uplink_in(&small).0, REDIRECT);
    assert_eq!(node.counted(|n| n.uplink_in(&big)).1.get("icmp_too_big"), Some(&1));
}
