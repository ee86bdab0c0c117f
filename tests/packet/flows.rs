//! Flows that have ended are collected, a bounded part at a time, both directions together, and no others.

use crate::laboratory::packets::frame::{ACK, FIN, Frame, RST, SYN, tcp, udp};
use crate::laboratory::packets::{self, CLIENT4, LOCAL4, NODE4, Node, PASS, REDIRECT, REMOTE4, TUNNEL4, empty_drop};
use kubelane::abi::{Backend, ServiceName};
use kubelane::bpf::{Counting, Datapath, Direction, FlowCollector, MapUsage};
use kubelane::model::Protocol;
use kubelane::sync::{MapIo as _, MapName};

/// Both tables; returns the rows removed.
fn collect(collector: &mut FlowCollector) -> usize {
    collector.collect(usize::MAX / 4).unwrap().removed
}

/// The same when the flows' last packets were so many seconds ago.
fn collect_after(node: &Node, collector: &mut FlowCollector, seconds: u32) -> usize {
    node.let_flows_rest(seconds);
    collect(collector)
}

fn node() -> Node {
    served(Node::new())
}

fn served(mut node: Node) -> Node {
    node.backend(1, LOCAL4, 80, Protocol::Tcp, true);
    node.backend(2, LOCAL4, 53, Protocol::Udp, true);
    node.frontend("0.0.0.0", 30080, Protocol::Tcp, &[1]);
    node.frontend("0.0.0.0", 30053, Protocol::Udp, &[2]);
    node
}

const FROM: (&str, u16) = (CLIENT4, 5000);
const TO: (&str, u16) = (NODE4, 30080);
const POD: (&str, u16) = (LOCAL4, 80);

fn open(node: &mut Node) {
    node.uplink_in(&tcp(FROM, TO, SYN));
    node.uplink_out(&tcp(POD, FROM, SYN | ACK).numbered(7000, 1001));
    node.uplink_in(&tcp(FROM, TO, ACK).numbered(1001, 7001));
}

#[test]
fn each_state_of_a_flow_lasts_as_long_as_it_should() {
    let mut node = node();
    let mut collector = node.datapath.flow_collector().unwrap();
    type Step = fn(&mut Node);
    let states: [(&str, Step, u32); 10] = [
        ("opening", |n| drop(n.uplink_in(&tcp(FROM, TO, SYN))), 60),
        ("open", open, 86_400),
        (
            "half closed",
            |n| {
                open(n);
                n.uplink_in(&tcp(FROM, TO, FIN | ACK));
            },
            3600,
        ),
        (
            "closed by the client",
            |n| {
                open(n);
                n.uplink_in(&tcp(FROM, TO, FIN | ACK));
                n.uplink_out(&tcp(POD, FROM, FIN | ACK).numbered(7001, 1001));
            },
            10,
        ),
        (
            "closed by the backend",
            |n| {
                open(n);
                n.uplink_out(&tcp(POD, FROM, FIN | ACK).numbered(7001, 1001));
                n.uplink_in(&tcp(FROM, TO, FIN | ACK));
            },
            60,
        ),
        (
            "reset",
            |n| {
                open(n);
                n.uplink_in(&tcp(FROM, TO, RST));
            },
            10,
        ),
        (
            "alive after a reset that was none",
            |n| {
                open(n);
                n.uplink_in(&tcp(FROM, TO, RST));
                n.uplink_in(&tcp(FROM, TO, ACK));
            },
            86_400,
        ),
        (
            "reset out of the window",
            |n| {
                open(n);
                n.uplink_in(&tcp(FROM, TO, RST).numbered(1001 + 131_072, 0));
                n.uplink_in(&tcp(FROM, TO, FIN | ACK).numbered(0x8000_0000, 0));
                n.uplink_out(&tcp(POD, FROM, RST).numbered(7000u32.wrapping_sub(131_073), 0));
            },
            86_400,
        ),
        ("unanswered", |n| drop(n.uplink_in(&udp(FROM, (NODE4, 30053), b"?"))), 30),
        (
            "answered",
            |n| {
                n.uplink_in(&udp(FROM, (NODE4, 30053), b"?"));
                n.uplink_out(&udp((LOCAL4, 53), FROM, b"!"));
                n.begin_earlier(2);
                n.uplink_in(&udp(FROM, (NODE4, 30053), b"?"));
            },
            120,
        ),
    ];
    for (state, step, seconds) in states {
        step(&mut node);
        let rows = node.flows().len();
        assert_eq!(rows, 2, "{state}");
        assert_eq!(collect_after(&node, &mut collector, seconds - 2), 0, "{state}: too early");
        assert_eq!(collect_after(&node, &mut collector, seconds + 1), 2, "{state}: in time");
        assert_eq!(node.flows().len(), 0, "{state}");
    }
}

#[test]
fn a_pass_over_many_flows_is_bounded_and_sees_all_of_them_in_turn() {
    let mut node = node();
    for n in 0..3000u16 {
        node.raw(Direction::In, node.uplink, &udp((CLIENT4, 1000 + n), (NODE4, 30053), b"?").bytes());
    }
    let mut collector = node.datapath.flow_collector().unwrap();
    node.let_flows_rest(31);
    let (mut removed, mut calls) = (0, 0);
    while removed < 6000 {
        let pass = collector.collect(500).unwrap();
        assert!(pass.examined <= 500 + 64, "{pass:?}");
        removed += pass.removed;
        calls += 1;
        assert!(calls < 100, "{removed} after {calls} calls");
    }
    assert!(calls >= 6, "{calls}");
    assert_eq!(node.flow_rows().1, 0);
}

#[test]
fn traffic_in_one_direction_keeps_both_rows() {
    let query = udp(FROM, (NODE4, 30053), b"?");
    let answer = udp((LOCAL4, 53), FROM, b"!");
    for by_backend in [false, true] {
        let mut node = node();
        let mut collector = node.datapath.flow_collector().unwrap();
        node.uplink_in(&query);
        node.uplink_out(&answer);
        node.begin_earlier(2);
        node.uplink_in(&query);
        // Longer than any silence of a stream, with a packet of one end a minute.
        for _ in 0..4 {
            node.age_flows(60);
            let ((action, _), moved) =
                node.counted(|n| if by_backend { n.uplink_out(&answer) } else { n.uplink_in(&query) });
            assert_eq!((action, moved.is_empty(), collect(&mut collector)), (PASS, true, 0));
        }
        assert_eq!(node.counted(|n| n.uplink_in(&query)).1.get("flow_local"), None, "the same flow");
        assert_eq!(collect_after(&node, &mut collector, 121), 2);
    }
}

#[test]
fn flows_are_counted_once_each_by_protocol_and_state() {
    let mut node = node();
    let mut collector = node.datapath.flow_collector().unwrap();
    let from = |port: u16| (CLIENT4, port);
    open(&mut node);
    node.uplink_in(&tcp(from(5001), TO, SYN));
    node.uplink_in(&tcp(from(5002), TO, SYN));
    (5001..5008).for_each(|port| drop(node.uplink_in(&udp(from(port), (NODE4, 30053), b"?"))));
    let pass = collector.collect(usize::MAX / 4).unwrap();
    let counts = pass.tables.map(|table| (table.seen.unwrap().rows, table.seen.unwrap().flows));
    assert_eq!(counts, [(20, [[2, 1, 0], [7, 0, 0], [0, 0, 0]]), (0, [[0; 3]; 3])]);
    node.uplink_in(&tcp(FROM, TO, FIN | ACK));
    let flows = collector.collect(usize::MAX / 4).unwrap().tables[0].seen.unwrap().flows;
    assert_eq!(flows[0], [2, 0, 1]);
    // What a pass takes away is not there in the next.
    assert_eq!(collect_after(&node, &mut collector, 4000), 20);
    let emptied = collector.collect(usize::MAX / 4).unwrap();
    assert!(emptied.tables.iter().all(|table| table.seen.unwrap().rows == 0), "{emptied:?}");
}

#[test]
fn maps_that_programs_fill_are_counted() {
    let mut node = node();
    let usage = node.datapath.map_usage().unwrap();
    let counts = |usage: &MapUsage| {
        let counts = usage.count().unwrap();
        counts.into_iter().map(|(map, rows, capacity)| (map, (rows, capacity > rows))).collect::<Vec<_>>()
    };
    let before = counts(&usage);
    let names: Vec<&str> = before.iter().map(|(map, _)| *map).collect();
    assert_eq!(names, ["affinities", "new_affinities", "devices", "fragments", "handed", "outgoing"]);
    assert!(before.iter().all(|(_, (rows, fits))| *fits && *rows < 10), "{before:?}");
    let mut row = node.frontend("0.0.0.0", 30080, Protocol::Tcp, &[1]);
    row.affinity_seconds = 60;
    node.frontend_row("0.0.0.0", 30080, Protocol::Tcp, &row);
    (1..=5u8).for_each(|host| drop(node.uplink_in(&tcp((&format!("198.51.100.{host}"), 5000), TO, SYN))));
    assert_eq!(counts(&usage)[..2], [("affinities", (0, true)), ("new_affinities", (5, true))]);
}

#[test]
fn new_flows_are_counted_by_service_and_an_ids_next_owner_begins_with_none() {
    assert!(node().datapath.service_counts().is_none(), "nobody asked for it");
    let mut node = served(Node::opened_by(|settings| Datapath::open_counting(settings, Counting::Connections)));
    let counts = node.datapath.service_counts().unwrap();
    let name = |node: &mut Node, text: &str| {
        node.write(MapName::Services, &1u32.to_ne_bytes(), bytemuck::bytes_of(&ServiceName::new(text)));
    };
    let busiest = |most: usize| -> Vec<(String, u64)> {
        let busiest = counts.busiest(most).unwrap();
        busiest.into_iter().map(|count| (count.name.as_str().to_owned(), count.connections)).collect()
    };
    name(&mut node, "shop/web:http");
    assert_eq!(busiest(10), []);
    open(&mut node);
    (5001..5004).for_each(|port| drop(node.uplink_in(&udp((CLIENT4, port), (NODE4, 30053), b"?"))));
    assert_eq!(busiest(10), [("shop/web:http".to_owned(), 4)]);
    assert_eq!(busiest(0), []);
    assert!(node.datapath.maps().delete(MapName::Services, &1u32.to_ne_bytes(), 1).is_empty());
    name(&mut node, "shop/cart:http");
    assert_eq!(busiest(10), []);
    node.uplink_in(&tcp((CLIENT4, 5009), TO, SYN));
    assert_eq!(busiest(10), [("shop/cart:http".to_owned(), 1)]);
    // What is refused and dropped counts, by its reason.
    let mut row = node.frontend("0.0.0.0", 30081, Protocol::Tcp, &[]);
    let empty = (NODE4, 30081);
    (5000..5002).for_each(|port| drop(node.uplink_in(&tcp((CLIENT4, port), empty, SYN))));
    row.outside = empty_drop();
    node.frontend_row("0.0.0.0", 30081, Protocol::Tcp, &row);
    (5000..5003).for_each(|port| drop(node.uplink_in(&tcp((CLIENT4, port), empty, SYN))));
    let verdicts: Vec<_> = counts.busiest(1).unwrap()[0].verdicts().collect();
    assert_eq!(verdicts, [("refused_no_endpoint", 2), ("dropped_no_local_endpoint", 3)]);
}

#[test]
fn packets_and_bytes_of_a_services_flows_are_counted_in_both_directions() {
    let mut node = served(Node::opened_by(|settings| Datapath::open_counting(settings, Counting::Traffic)));
    let counts = node.datapath.service_counts().unwrap();
    node.write(MapName::Services, &1u32.to_ne_bytes(), bytemuck::bytes_of(&ServiceName::new("shop/web")));
    let measured = || {
        let traffic = counts.busiest(1).unwrap()[0].traffic.unwrap();
        (traffic.packets(), traffic.packet_bytes())
    };
    let length = |frame: &Frame| frame.packet().len() as u64;
    open(&mut node);
    let head = length(&tcp(FROM, TO, ACK));
    assert_eq!(measured(), ([2, 1], [2 * head, head]));
    // A backend elsewhere, whose replies come in.
    node.backend(3, REMOTE4, 80, Protocol::Tcp, false);
    node.frontend("0.0.0.0", 30081, Protocol::Tcp, &[3]);
    let request = tcp(FROM, (NODE4, 30081), SYN);
    let (_, sent) = node.uplink_in(&request);
    let reply = tcp((REMOTE4, 80), (TUNNEL4, sent.ports().0), SYN | ACK).numbered(7000, 1001).carrying(100);
    assert_eq!(node.tunnel_in(&reply).0, REDIRECT);
    assert_eq!(measured(), ([3, 2], [3 * head, head + length(&reply)]));
    // What is no flow's is nobody's.
    node.uplink_in(&tcp(FROM, (NODE4, 22), SYN));
    node.uplink_in(&tcp(FROM, TO, RST));
    assert_eq!(measured().0, [4, 2]);
    // The backend is gone, and its id another Service's.
    node.backend_row(1, &Backend { generation: 2, ..packets::backend(LOCAL4, 80, Protocol::Tcp, true) });
    node.uplink_in(&tcp(FROM, TO, ACK).numbered(1001, 7001));
    assert_eq!(measured().0, [4, 2]);
}

#[test]
fn the_filter_of_replies_forgets_flows_that_have_gone_and_no_others() {
    let mut node = node();
    let mut collector = node.datapath.flow_collector().unwrap();
    let client = |number: u32| format!("198.51.100.{number}");
    let ask = |node: &mut Node, number| drop(node.uplink_in(&tcp((&client(number), 5000), TO, SYN)));
    let is_answered = |node: &mut Node, number| {
        let from = (&*client(number), 5000);
        let answer = tcp(POD, from, SYN | ACK).numbered(7000, 1001);
        node.uplink_out(&answer) == (PASS, answer.with_ends(TO, from))
    };
    // Clients that are gone when it is renewed, one that stays, and one that comes meanwhile.
    (100..200).for_each(|number| ask(&mut node, number));
    node.forget_flows();
    ask(&mut node, 1);
    assert!(node.replies_noted() > 90, "two may share a byte");
    for _ in 0..2 {
        collector.renew_soon();
        ask(&mut node, 2);
        collect(&mut collector);
        assert_eq!(node.replies_noted(), 2);
        assert!(is_answered(&mut node, 1) && is_answered(&mut node, 2));
    }
}

#[test]
fn of_two_daemons_that_renew_the_filter_of_replies_none_lets_a_half_filled_one_be_read() {
    let mut node = node();
    let [mut one, mut two] = [(); 2].map(|()| node.datapath.flow_collector().unwrap());
    node.uplink_in(&tcp(FROM, TO, SYN));
    one.renew_soon();
    assert_eq!(one.collect(2).unwrap().examined, 2, "both rows are noted, and the end is not reached");
    two.renew_soon();
    let answer = tcp(POD, FROM, SYN | ACK).numbered(7000, 1001);
    for collector in [&mut one, &mut two] {
        collect(collector);
        assert_eq!(node.replies_noted(), 1);
        assert_eq!(node.uplink_out(&answer), (PASS, answer.with_ends(TO, FROM)));
    }
}
