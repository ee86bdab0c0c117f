//! Listening to single packets (BPF_PROG_TEST_RUN): what of a flow's life is told, how much of a burst, and that nothing of
//! it changes what becomes of a packet.

use crate::laboratory::packets::frame::{ACK, FIN, Frame, Inside, RST, SYN, ip, tcp, udp};
use crate::laboratory::packets::{CLIENT4, LOCAL4, NODE4, Node};
use kubelane::abi::counter::{
    COUNTER_DROPPED_UNKNOWN_RESET, COUNTER_FLOW_ESTABLISHED, COUNTER_FLOW_LOCAL, COUNTER_ICMP_TRANSLATED,
};
use kubelane::abi::event_number::EVENT_FLOW_ENDED;
use kubelane::abi::flow_flag::{FLOW_FIN, FLOW_PROVED};
use kubelane::abi::removal::{REMOVE_OPENING, REMOVE_OVER, REMOVE_REPLACED};
use kubelane::abi::{choice_reason, flow_openings, listener_limits};
use kubelane::bpf::run::run;
use kubelane::bpf::{Direction, Event, Listening, Wanted};
use kubelane::model::{Ipx, Protocol};
use libbpf_rs::MapCore as _;

const FROM: (&str, u16) = (CLIENT4, 5000);
const TO: (&str, u16) = (NODE4, 30080);
const POD: (&str, u16) = (LOCAL4, 80);

fn node() -> Node {
    let mut node = Node::new();
    node.backend(1, LOCAL4, 80, Protocol::Tcp, true);
    node.backend(2, LOCAL4, 53, Protocol::Udp, true);
    node.frontend("0.0.0.0", 30080, Protocol::Tcp, &[1]);
    node.frontend("0.0.0.0", 30053, Protocol::Udp, &[2]);
    node
}

fn everything() -> Wanted {
    Wanted { numbers: u64::MAX, protocol: 0, from: None, to: None, port: 0, one_in: 1, rate: 0 }
}

fn listen(node: &Node, wanted: Wanted) -> Listening {
    Listening::open(&node.pin_path, wanted).unwrap()
}

fn told(listening: &mut Listening) -> Vec<Event> {
    let mut all = Vec::new();
    loop {
        let some = listening.read(10_000).unwrap();
        if some.is_empty() {
            return all;
        }
        all.extend(some);
    }
}

fn numbers(events: &[Event]) -> Vec<u32> {
    events.iter().map(|event| event.number).collect()
}

fn open(node: &mut Node) {
    node.uplink_in(&tcp(FROM, TO, SYN));
    node.uplink_out(&tcp(POD, FROM, SYN | ACK).numbered(7000, 1001));
    node.uplink_in(&tcp(FROM, TO, ACK).numbered(1001, 7001));
}

fn close(node: &mut Node) {
    node.uplink_in(&tcp(FROM, TO, FIN | ACK));
    node.uplink_out(&tcp(POD, FROM, FIN | ACK).numbered(7001, 1001));
}

fn end(address: &str, port: u16) -> ([u8; 16], [u8; 2]) {
    (address.parse::<Ipx>().unwrap().0, port.to_be_bytes())
}

#[test]
fn a_flow_is_told_when_it_begins_is_proved_and_ends_with_its_ends_backend_and_states() {
    let mut node = node();
    let mut listening = listen(&node, everything());
    open(&mut node);
    close(&mut node);
    let events = told(&mut listening);
    assert_eq!(numbers(&events), [COUNTER_FLOW_LOCAL, COUNTER_FLOW_ESTABLISHED]);
    for event in &events {
        assert_eq!((event.asked.source, event.asked.source_port_be), end(FROM.0, FROM.1));
        assert_eq!((event.asked.destination, event.asked.destination_port_be), end(TO.0, TO.1));
        assert_eq!((event.becomes.source, event.becomes.source_port_be), end(FROM.0, FROM.1));
        assert_eq!((event.becomes.destination, event.becomes.destination_port_be), end(POD.0, POD.1));
        assert_eq!((event.has_backend, event.backend_id, event.service_id, event.protocol), (1, 1, 1, 6));
        assert_eq!((event.process, event.interface), (0, node.uplink));
    }
    assert_eq!((events[0].reason, events[0].tcp_flags), (choice_reason::CHOSEN_BY_CHANCE, SYN));
    node.let_flows_rest(11);
    let mut collector = node.datapath.flow_collector().unwrap();
    assert_eq!(collector.collect(usize::MAX / 4).unwrap().removed, 2);
    let ended = told(&mut listening);
    assert_eq!(numbers(&ended), [EVENT_FLOW_ENDED]);
    assert_eq!((ended[0].asked, ended[0].becomes, ended[0].reason), (events[0].asked, events[0].becomes, REMOVE_OVER));
    let states = [ended[0].request_state, ended[0].reply_state];
    assert!(states.iter().all(|state| state & (FLOW_FIN | FLOW_PROVED) == FLOW_FIN | FLOW_PROVED), "{states:x?}");
    assert_eq!((ended[0].has_backend, ended[0].service_id), (1, 1));
}

#[test]
fn a_flow_that_another_one_replaces_or_pushes_out_is_told_to_end() {
    let mut node = node();
    open(&mut node);
    close(&mut node);
    let mut listening = listen(&node, everything());
    node.uplink_in(&tcp(FROM, TO, SYN).numbered(90_000, 0));
    let events = told(&mut listening);
    assert_eq!(numbers(&events), [EVENT_FLOW_ENDED, COUNTER_FLOW_LOCAL]);
    assert_eq!((events[0].reason, events[0].asked), (REMOVE_REPLACED, events[1].asked));
    assert_eq!((events[0].has_backend, events[0].backend_id), (1, 1));
    // A ring of openings that goes round once: the first of them is pushed out.
    drop(listening);
    let wanted = Wanted { numbers: 1 << EVENT_FLOW_ENDED, ..everything() };
    let mut listening = listen(&node, wanted);
    // On one of two processors at the least.
    for port in 0..=2 * flow_openings::FLOW_OPENINGS as u16 {
        node.raw(Direction::In, node.uplink, &udp((CLIENT4, 10_000 + port), (NODE4, 30053), b"?").bytes());
    }
    let events = told(&mut listening);
    assert!(!events.is_empty() && events.iter().all(|event| event.reason == REMOVE_OPENING), "{events:?}");
}

#[test]
fn an_icmp_error_is_told_with_what_it_is_about() {
    let mut node = node();
    node.uplink_in(&tcp(FROM, TO, SYN));
    let mut listening = listen(&node, everything());
    let quoted = tcp(TO, FROM, ACK);
    let inside = Inside::Icmp { kind: 3, code: 4, rest: 1300, data: quoted.packet() };
    let error = Frame { source: ip("203.0.113.9"), destination: quoted.source, ttl: 61, inside };
    node.uplink_in(&error);
    let events = told(&mut listening);
    assert_eq!(numbers(&events), [COUNTER_ICMP_TRANSLATED]);
    let [event] = events[..] else { panic!("{events:?}") };
    assert_eq!((event.asked.source, event.asked.destination), (end("203.0.113.9", 0).0, end(NODE4, 0).0));
    assert_eq!((event.quoted.destination, event.quoted.destination_port_be), end(FROM.0, FROM.1));
    assert_eq!((event.becomes.destination, event.becomes.destination_port_be), end(POD.0, POD.1));
    assert_eq!(event.protocol, Protocol::Tcp as u8);
}

/// A packet that is dropped, and leaves nothing.
fn stray() -> Frame {
    tcp(FROM, TO, RST)
}

fn burst(node: &mut Node, packets: u32) {
    let uplink = node.uplink;
    run(node.datapath.devices(), Direction::In, &stray().bytes(), uplink, packets).unwrap();
}

#[test]
fn of_a_burst_every_event_is_told_or_counted_as_lost() {
    let mut node = node();
    let mut listening = listen(&node, everything());
    burst(&mut node, 200_000);
    let tally = listening.tally().unwrap();
    assert_eq!(tally.told + tally.lost, 200_000, "{tally:?}");
    assert!(tally.told > 20_000 && tally.lost > 100_000, "nobody has read: {tally:?}");
    let events = told(&mut listening);
    assert_eq!(events.len() as u64, tally.told);
    assert!(events.iter().all(|event| event.number == COUNTER_DROPPED_UNKNOWN_RESET));
    // There is room again.
    burst(&mut node, 10);
    assert_eq!(told(&mut listening).len(), 10);
}

#[test]
fn one_in_so_many_is_told_and_no_more_than_the_rate_and_the_rest_is_counted() {
    let mut node = node();
    let mut sampled = listen(&node, Wanted { one_in: 10, ..everything() });
    burst(&mut node, 1000);
    assert_eq!(told(&mut sampled).len(), 100);
    assert_eq!(sampled.tally().unwrap().sampled, 900);
    drop(sampled);
    let mut limited = listen(&node, Wanted { rate: 1000, ..everything() });
    let before = std::time::Instant::now();
    burst(&mut node, 20_000);
    let windows = 2 + before.elapsed().as_millis() as u64 / 100;
    let tally = limited.tally().unwrap();
    assert_eq!(told(&mut limited).len() as u64, tally.told);
    assert!(tally.told >= 100 && tally.told <= 100 * windows, "{tally:?} in {windows} tenths of a second");
    assert_eq!(tally.told + tally.limited, 20_000, "{tally:?}");
}

#[test]
fn what_is_not_wanted_never_leaves_the_kernel() {
    let mut node = node();
    let other = "198.51.100.8";
    let ip = |text: &str| Some(text.parse::<Ipx>().unwrap());
    let table = [
        (everything(), 6),
        (Wanted { protocol: Protocol::Udp as u8, ..everything() }, 2),
        (Wanted { from: ip(other), ..everything() }, 1),
        (Wanted { from: ip(LOCAL4), ..everything() }, 0),
        (Wanted { to: ip(LOCAL4), ..everything() }, 5),
        (Wanted { to: ip(NODE4), ..everything() }, 6),
        (Wanted { to: ip(other), ..everything() }, 0),
        (Wanted { port: 30053, ..everything() }, 2),
        (Wanted { port: 53, ..everything() }, 2),
        (Wanted { port: 80, protocol: Protocol::Udp as u8, ..everything() }, 0),
        (Wanted { numbers: 1 << COUNTER_DROPPED_UNKNOWN_RESET, ..everything() }, 1),
    ];
    for (wanted, expected) in table {
        node.forget_flows();
        // What the scratch holds of the last packet is another's.
        node.uplink_in(&udp(("198.51.100.99", 9), (NODE4, 30053), b"?"));
        node.forget_flows();
        let mut listening = listen(&node, wanted);
        node.uplink_in(&tcp((other, 5001), TO, RST));
        open(&mut node);
        node.uplink_in(&udp(FROM, (NODE4, 30053), b"?"));
        node.uplink_in(&udp((CLIENT4, 5002), (NODE4, 30053), b"?"));
        node.uplink_in(&tcp((CLIENT4, 5003), TO, SYN));
        let events = told(&mut listening);
        assert_eq!(events.len(), expected, "{wanted:?}: {events:#?}");
        assert_eq!(listening.tally().unwrap().told, expected as u64);
    }
}

#[test]
fn each_of_several_listeners_is_told_what_it_wants_and_one_that_was_killed_is_told_nothing() {
    let mut node = node();
    let udp_only = Wanted { protocol: Protocol::Udp as u8, ..everything() };
    let mut several: Vec<Listening> =
        (0..listener_limits::LISTENERS).map(|n| listen(&node, if n == 0 { udp_only } else { everything() })).collect();
    let full = Listening::open(&node.pin_path, everything()).err().map(|error| error.to_string()).unwrap_or_default();
    assert!(full.contains("there is room for no more"), "{full}");
    node.uplink_in(&stray());
    node.uplink_in(&udp(FROM, (NODE4, 30053), b"?"));
    assert_eq!(several.iter_mut().map(|one| told(one).len()).collect::<Vec<_>>(), [1, 2, 2, 2]);
    drop(several.remove(1));
    let mut next = listen(&node, everything());
    node.uplink_in(&stray());
    assert_eq!(told(&mut next).len(), 1, "a place that was left is free");
    // As after SIGKILL: nobody leaves, and nobody says that it is there.
    several.push(next);
    several.into_iter().for_each(std::mem::forget);
    std::thread::sleep(std::time::Duration::from_secs(u64::from(listener_limits::LISTENER_STALE_S) + 1));
    let mut late = listen(&node, everything());
    node.uplink_in(&stray());
    assert_eq!((told(&mut late).len(), late.tally().unwrap().told), (1, 1));
    let slots = || node.pinned("listening").lookup(&[0; 4], libbpf_rs::MapFlags::ANY).unwrap().unwrap()[0];
    assert_eq!(slots(), 0b1111, "they left their places");
    assert_eq!(kubelane::bpf::sweep_listeners(&node.pin_path).unwrap(), 3);
    assert_eq!(slots().count_ones(), 1);
}

#[test]
fn verdicts_and_bytes_are_the_same_whether_somebody_listens_or_not() {
    let mut node = node();
    let packets = [tcp(FROM, TO, SYN), udp(FROM, (NODE4, 30053), b"?"), stray(), tcp(FROM, (NODE4, 22), SYN)];
    let become_all = |node: &mut Node| {
        node.forget_flows();
        packets.iter().map(|packet| node.uplink_in(packet)).collect::<Vec<_>>()
    };
    let before = become_all(&mut node);
    let listening = listen(&node, everything());
    let (during, counted) = node.counted(become_all);
    assert_eq!(during, before);
    drop(listening);
    let (after, counted_after) = node.counted(become_all);
    assert_eq!((after, counted_after), (before, counted));
}
