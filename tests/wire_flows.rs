//! Flows that have ended are collected, a bounded part at a time, both directions together, and no others.

mod wire;

use kubelane::abi::ServiceName;
use kubelane::bpf::{Datapath, Direction, FlowCollector, MapUsage};
use kubelane::model::Protocol;
use kubelane::sync::{MapIo as _, MapName};
use nix::time::{ClockId, clock_gettime};
use wire::frame::{ACK, FIN, RST, SYN, tcp, udp};
use wire::{CLIENT4, LOCAL4, NODE4, Node};

fn now() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

/// Both tables, as if `seconds` had passed since now; returns the rows removed.
fn collect_after(collector: &mut FlowCollector, seconds: u64) -> usize {
    collector.collect_at(usize::MAX / 4, now() + seconds * 1_000_000_000).unwrap().removed
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
    let states: [(&str, Step, u64); 9] = [
        ("opening", |n| drop(n.uplink_in(&tcp(FROM, TO, SYN))), 60),
        ("open", open, 86_400),
        (
            "half closed",
            |n| {
                open(n);
                n.uplink_in(&tcp(FROM, TO, FIN | ACK));
            },
            120,
        ),
        (
            "closed by the client",
            |n| {
                open(n);
                n.uplink_in(&tcp(FROM, TO, FIN | ACK));
                n.uplink_out(&tcp(POD, FROM, FIN | ACK));
            },
            10,
        ),
        (
            "closed by the backend",
            |n| {
                open(n);
                n.uplink_out(&tcp(POD, FROM, FIN | ACK));
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
                n.uplink_out(&tcp(POD, FROM, ACK));
            },
            86_400,
        ),
        ("unanswered", |n| drop(n.uplink_in(&udp(FROM, (NODE4, 30053), b"?"))), 30),
        (
            "answered",
            |n| {
                n.uplink_in(&udp(FROM, (NODE4, 30053), b"?"));
                n.uplink_out(&udp((LOCAL4, 53), FROM, b"!"));
                n.uplink_in(&udp(FROM, (NODE4, 30053), b"?"));
            },
            120,
        ),
    ];
    for (state, step, seconds) in states {
        step(&mut node);
        let rows = node.rows("flows") + node.rows("new_flows");
        assert_eq!(rows, 2, "{state}");
        assert_eq!(collect_after(&mut collector, seconds - 2), 0, "{state}: too early");
        assert_eq!(collect_after(&mut collector, seconds + 1), 2, "{state}: in time");
        assert_eq!(node.rows("flows") + node.rows("new_flows"), 0, "{state}");
    }
}

#[test]
fn a_pass_over_many_flows_is_bounded_and_sees_all_of_them_in_turn() {
    let mut node = node();
    for n in 0..3000u16 {
        node.raw(Direction::In, node.uplink, &udp((CLIENT4, 1000 + n), (NODE4, 30053), b"?").bytes());
    }
    let mut collector = node.datapath.flow_collector().unwrap();
    let later = now() + 31_000_000_000;
    let (mut removed, mut calls) = (0, 0);
    while removed < 6000 {
        let pass = collector.collect_at(500, later).unwrap();
        assert!(pass.examined <= 500 + 64, "{pass:?}");
        removed += pass.removed;
        calls += 1;
        assert!(calls < 100, "{removed} after {calls} calls");
    }
    assert!(calls >= 6, "{calls}");
    assert_eq!(node.rows("new_flows"), 0);
}

#[test]
fn traffic_in_one_direction_keeps_both_rows() {
    let mut node = node();
    node.uplink_in(&udp(FROM, (NODE4, 30053), b"?"));
    node.uplink_out(&udp((LOCAL4, 53), FROM, b"!"));
    node.uplink_in(&udp(FROM, (NODE4, 30053), b"?"));
    // The reply's row is as of now, the request's two minutes old.
    let flows = node.pinned("flows");
    use libbpf_rs::{MapCore, MapFlags};
    for key in flows.keys().collect::<Vec<_>>() {
        let mut row: kubelane::abi::Flow =
            bytemuck::pod_read_unaligned(&flows.lookup(&key, MapFlags::ANY).unwrap().unwrap());
        if u32::from(row.kind) & kubelane::abi::flow_kind::FLOW_REPLY == 0 {
            row.used_ns = row.used_ns.saturating_sub(121_000_000_000);
            flows.update(&key, bytemuck::bytes_of(&row), MapFlags::ANY).unwrap();
        }
    }
    let mut collector = node.datapath.flow_collector().unwrap();
    assert_eq!(collect_after(&mut collector, 0), 0);
    assert_eq!(collect_after(&mut collector, 121), 2);
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
    let pass = collector.collect_at(usize::MAX / 4, now()).unwrap();
    let counts = pass.tables.map(|table| (table.seen.unwrap().rows, table.seen.unwrap().flows));
    assert_eq!(counts, [(2, [[0, 1, 0], [0, 0, 0], [0, 0, 0]]), (18, [[2, 0, 0], [7, 0, 0], [0, 0, 0]])]);
    node.uplink_in(&tcp(FROM, TO, FIN | ACK));
    let flows = collector.collect_at(usize::MAX / 4, now()).unwrap().tables[0].seen.unwrap().flows;
    assert_eq!(flows[0], [0, 0, 1]);
    // What a pass takes away is not there any more.
    let emptied = collector.collect_at(usize::MAX / 4, now() + 1_000 * 1_000_000_000).unwrap();
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
    assert_eq!(names, ["affinities", "devices", "fragments"]);
    assert!(before.iter().all(|(_, (rows, fits))| *fits && *rows < 10), "{before:?}");
    let mut row = node.frontend("0.0.0.0", 30080, Protocol::Tcp, &[1]);
    row.affinity_seconds = 60;
    node.frontend_row("0.0.0.0", 30080, Protocol::Tcp, &row);
    (1..=5u8).for_each(|host| drop(node.uplink_in(&tcp((&format!("198.51.100.{host}"), 5000), TO, SYN))));
    assert_eq!(counts(&usage)[0], ("affinities", (5, true)));
}

#[test]
fn new_flows_are_counted_by_service_and_an_ids_next_owner_begins_with_none() {
    assert!(node().datapath.service_connections().unwrap().is_none(), "nobody asked for it");
    let mut node = served(Node::opened_by(Datapath::open_counting));
    let connections = node.datapath.service_connections().unwrap().unwrap();
    let name = |node: &mut Node, text: &str| {
        node.write(MapName::Services, &1u32.to_ne_bytes(), bytemuck::bytes_of(&ServiceName::new(text)));
    };
    let busiest = |most: usize| -> Vec<(String, u64)> {
        let busiest = connections.busiest(most).unwrap();
        busiest.into_iter().map(|(name, count)| (name.as_str().to_owned(), count)).collect()
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
}
