//! Health probes that the packet programs answer from the daemon's rows: what each segment of a client gets, and what is
//! left to the host's stack. Programs run under BPF_PROG_TEST_RUN, in the real kernel.

use crate::laboratory::packets::frame::{self, ACK, FIN, Frame, Inside, RST, SYN, parse, tcp, udp, with_options};
use crate::laboratory::packets::{
    self, CLIENT4, CLIENT6, DROP, LOCAL4, NODE4, NODE6, Node, PASS, PODS, REDIRECT, TUNNEL4, VIP4,
};
use kubelane::abi::probe_limit::PROBE_FRESH_MS;
use kubelane::abi::probe_path::{PROBE_ANY, PROBE_HEALTHZ, PROBE_LIVEZ, PROBE_METHOD, PROBE_READYZ};
use kubelane::bpf::run::{run_bare, run_pod};
use kubelane::bpf::{Direction, ProbeRows, clock_ns};
use kubelane::model::{Ipx, ProbeAnswer, Protocol};

const PSH: u8 = 8;
/// With paths, and without.
const HEALTH: u16 = 10256;
const CHECK: u16 = 32100;
const ENDS: [(&str, &str); 2] = [(CLIENT4, NODE4), (CLIENT6, NODE6)];
const WILDCARDS: [&str; 2] = ["0.0.0.0", "::"];

fn answer(address: &str, port: u16, path: u32, body: &str) -> ProbeAnswer {
    let address = address.parse::<Ipx>().unwrap();
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
    ProbeAnswer { address, port, path, has_paths: port == HEALTH, head, body: body.to_owned() }
}

fn text(answer: &ProbeAnswer) -> String {
    format!("{}{}", answer.head, answer.body)
}

/// What the tests have written, all of it vouched for just now.
fn answers() -> Vec<ProbeAnswer> {
    let of = |address: &&'static str| {
        let paths = [PROBE_HEALTHZ, PROBE_LIVEZ, PROBE_READYZ, PROBE_METHOD, PROBE_ANY];
        let health = paths.map(|path| answer(address, HEALTH, path, &format!("path {path} of {address}")));
        health.into_iter().chain([answer(address, CHECK, PROBE_ANY, "two\n")])
    };
    WILDCARDS.iter().flat_map(of).collect()
}

fn node() -> (Node, ProbeRows) {
    let node = Node::new();
    let mut rows = node.datapath.probe_rows().unwrap();
    rows.write(&answers()).unwrap();
    rows.vouch(clock_ns()).unwrap();
    (node, rows)
}

/// Flags, sequence number, acknowledgement and data.
fn segment(frame: &Frame) -> (u8, u32, u32, &[u8]) {
    match &frame.inside {
        Inside::Tcp { flags, sequence, acknowledgement, data, .. } => (*flags, *sequence, *acknowledgement, data),
        other => panic!("{other:?}"),
    }
}

/// A client's side of a connection.
#[derive(Clone, Copy)]
struct Client {
    from: (&'static str, u16),
    to: (&'static str, u16),
    first: u32,
    /// What it expects.
    next: u32,
}

impl Client {
    /// Sends a SYN, and believes the answer.
    fn connect(node: &mut Node, from: (&'static str, u16), to: (&'static str, u16), first: u32) -> Client {
        let (action, greeting) = node.uplink_in(&tcp(from, to, SYN).numbered(first, 0));
        let (flags, cookie, acknowledged, data) = segment(&greeting);
        assert_eq!((action, flags, acknowledged, data), (REDIRECT, SYN | ACK, first.wrapping_add(1), &[][..]));
        assert_eq!(greeting.with_ends(from, to), tcp(from, to, SYN | ACK).numbered(cookie, acknowledged).living(64));
        Client { from, to, first, next: cookie.wrapping_add(1) }
    }

    /// A segment that begins `offset` bytes behind the SYN.
    fn segment(&self, flags: u8, offset: u32, data: &str) -> Frame {
        let sequence = self.first.wrapping_add(1 + offset);
        tcp(self.from, self.to, flags).numbered(sequence, self.next).with_data(data.as_bytes())
    }

    /// What this request gets, which is all that it gets.
    fn ask(&self, node: &mut Node, request: &str) -> String {
        let (action, answer) = node.uplink_in(&self.segment(ACK | PSH, 0, request));
        let (flags, sequence, acknowledged, data) = segment(&answer);
        let expected = (REDIRECT, ACK | PSH | FIN, self.next, self.first.wrapping_add(1 + request.len() as u32));
        assert_eq!((action, flags, sequence, acknowledged), expected);
        assert_eq!((answer.source, answer.destination), (frame::ip(self.to.0), frame::ip(self.from.0)));
        String::from_utf8(data.to_vec()).unwrap()
    }
}

#[test]
fn a_probe_is_answered_from_the_first_segment_to_the_last() {
    let (mut node, _rows) = node();
    for (from, to) in ENDS {
        for first in [1000, 0, u32::MAX, u32::MAX - 5] {
            let mut client = Client::connect(&mut node, (from, 40_000), (to, CHECK), first);
            let request = "GET /anything HTTP/1.1\r\nHost: x\r\n\r\n";
            // The end of the handshake needs no answer.
            assert_eq!(node.uplink_in(&client.segment(ACK, 0, "")).0, DROP);
            let expected = text(&answer(WILDCARDS[0], CHECK, PROBE_ANY, "two\n"));
            for _ in 0..3 {
                // What is sent again is answered again.
                let (said, counted) = node.counted(|node| client.ask(node, request));
                assert_eq!((said, counted), (expected.clone(), [("probe_answered", 1)].into()));
            }
            client.next = client.next.wrapping_add(expected.len() as u32 + 1);
            let length = request.len() as u32;
            assert_eq!(node.uplink_in(&client.segment(ACK, length, "")).0, DROP);
            let (action, last) = node.uplink_in(&client.segment(FIN | ACK, length, ""));
            let acknowledged = first.wrapping_add(2 + length);
            assert_eq!((action, segment(&last)), (REDIRECT, (ACK, client.next, acknowledged, &[][..])));
        }
    }
    assert_eq!(node.flow_rows(), (0, 0));
}

#[test]
fn a_request_is_told_by_its_method_and_path() {
    let (mut node, _rows) = node();
    let table = [
        ("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", PROBE_HEALTHZ),
        ("GET /healthz HTTP/1.0\r\n\r\n", PROBE_HEALTHZ),
        ("GET /healthz?verbose HTTP/1.1\r\n\r\n", PROBE_HEALTHZ),
        ("GET /livez HTTP/1.0\r\n\r\n", PROBE_LIVEZ),
        ("GET /livez?x HTTP/1.0\r\n\r\n", PROBE_LIVEZ),
        ("GET /readyz HTTP/1.1\r\n\r\n", PROBE_READYZ),
        ("GET / HTTP/1.0\r\n\r\n", PROBE_ANY),
        ("GET /healthzz HTTP/1.1\r\n\r\n", PROBE_ANY),
        ("GET /healthz/x HTTP/1.1\r\n\r\n", PROBE_ANY),
        ("GET /livezz HTTP/1.1\r\n\r\n", PROBE_ANY),
        ("GET /readyzz HTTP/1.1\r\n\r\n", PROBE_ANY),
        ("GET /metrics HTTP/1.1\r\n\r\n", PROBE_ANY),
        ("POST /healthz HTTP/1.1\r\n\r\n", PROBE_METHOD),
        ("HEADS /healthz HTTP/1.1\r\n\r\n", PROBE_METHOD),
        ("\u{16}\u{3}\u{1} what TLS begins with", PROBE_METHOD),
        ("G", PROBE_ANY),
    ];
    for (port, ((from, to), wildcard)) in (40_000..).zip(ENDS.into_iter().zip(WILDCARDS)) {
        for (request, path) in table {
            let of = |port, path| {
                text(
                    &answers()
                        .into_iter()
                        .find(|a| (a.address, a.port, a.path) == (wildcard.parse().unwrap(), port, path))
                        .unwrap(),
                )
            };
            let client = Client::connect(&mut node, (from, port), (to, HEALTH), 77);
            assert_eq!(client.ask(&mut node, request), of(HEALTH, path), "{request}");
            let client = Client::connect(&mut node, (from, port), (to, CHECK), 77);
            assert_eq!(client.ask(&mut node, request), of(CHECK, PROBE_ANY), "{request}");
        }
        for (request, path) in table.into_iter().filter(|(request, _)| request.starts_with("GET ")) {
            let request = request.replace("GET", "HEAD");
            let head = answers()
                .into_iter()
                .find(|a| (a.address, a.port, a.path) == (wildcard.parse().unwrap(), HEALTH, path))
                .unwrap()
                .head;
            let client = Client::connect(&mut node, (from, port), (to, HEALTH), 78);
            assert_eq!(client.ask(&mut node, &request), head, "{request}");
        }
    }
}

#[test]
fn answers_of_all_lengths_have_the_right_checksum() {
    let (mut node, mut rows) = node();
    for length in (0..=460).step_by(23) {
        let body: String = ('a'..='z').cycle().take(length).collect();
        let all: Vec<_> = WILDCARDS.iter().map(|address| answer(address, CHECK, PROBE_ANY, &body)).collect();
        rows.write(&all).unwrap();
        for (from, to) in ENDS {
            let client = Client::connect(&mut node, (from, 40_001), (to, CHECK), 5);
            // A long request is cut, a short one grows.
            for request in ["GET / HTTP/1.0\r\n\r\n".to_owned(), format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(1400))]
            {
                assert_eq!(client.ask(&mut node, &request), text(&all[0]), "{length}");
            }
        }
    }
}

#[test]
fn the_greeting_is_not_longer_than_the_syn_and_says_how_much_a_segment_may_carry() {
    let (mut node, _rows) = node();
    for ((from, to), (header, mss)) in ENDS.into_iter().zip([(34, 1460u16), (54, 1440)]) {
        let bare = tcp((from, 40_002), (to, CHECK), SYN);
        let uplink = node.uplink;
        let greeting = node.raw(Direction::In, uplink, &bare.bytes()).frame;
        assert_eq!(greeting.len(), bare.bytes().len());
        // As long as a usual one's options, which are not looked at.
        let mut usual = bare.with_data(&[1; 20]).bytes();
        usual[header + 12] = 0xa0;
        let outcome = node.raw(Direction::In, uplink, &usual);
        assert_eq!((outcome.action, outcome.frame.len()), (REDIRECT, header + 24));
        assert_eq!(outcome.frame[header + 12] >> 4, 6, "words in the header");
        let option = [[2, 4], mss.to_be_bytes()].concat();
        assert_eq!(outcome.frame[header + 20..], option);
        // Checksums are looked at there.
        parse(&outcome.frame);
        assert_eq!(outcome.frame[..12], [&usual[6..12], &usual[..6]].concat(), "back to whom it came from");
    }
}

#[test]
fn what_has_no_cookie_is_the_stacks() {
    let (mut node, _rows) = node();
    for (from, to) in ENDS {
        let client = Client::connect(&mut node, (from, 40_003), (to, CHECK), 1000);
        let forged = |change: u32| Client { next: client.next.wrapping_add(change), ..client };
        for change in [0x8000_0000, 0x0002_0000, 0xfffe_0000] {
            for (flags, data) in [(ACK, ""), (ACK | PSH, "GET / HTTP/1.0\r\n\r\n"), (FIN | ACK, "")] {
                let frame = forged(change).segment(flags, 0, data);
                assert_eq!(node.uplink_in(&frame), (PASS, frame), "{change:x} {flags}");
            }
        }
        // The cookie of another client, or port, or of this one's other connection.
        let request = "GET / HTTP/1.0\r\n\r\n";
        let other = Client { from: (from, 40_004), ..client }.segment(ACK | PSH, 0, request);
        assert_eq!(node.uplink_in(&other), (PASS, other));
        let other = Client { to: (to, HEALTH), ..client }.segment(ACK | PSH, 0, request);
        assert_eq!(node.uplink_in(&other), (PASS, other));
        for flags in [0, RST, RST | ACK, SYN | ACK, SYN | FIN, SYN | RST, FIN] {
            let frame = client.segment(flags, 0, "");
            assert_eq!(node.uplink_in(&frame), (PASS, frame), "{flags}");
        }
    }
}

#[test]
fn a_request_in_pieces_is_answered_once_its_beginning_is_there() {
    let (mut node, _rows) = node();
    let parts = ["GET /healthz HTTP/1.1\r\n", "Host: x\r\n\r\n"];
    let (mut later, mut taken) = (0, 0);
    for port in 41_000..41_200 {
        let mut client = Client::connect(&mut node, (CLIENT4, port), (NODE4, HEALTH), 1000 + u32::from(port));
        let second = client.segment(ACK | PSH, parts[0].len() as u32, parts[1]);
        // It is not acknowledged: the client sends both again. (It may be taken for a first one, one time in 128.)
        match node.uplink_in(&second).0 {
            DROP => later += 1,
            _ => taken += 1,
        }
        let said = client.ask(&mut node, parts[0]);
        assert!(said.ends_with("path 1 of 0.0.0.0"), "{said}");
        client.next = client.next.wrapping_add(said.len() as u32 + 1);
        let all = (parts[0].len() + parts[1].len()) as u32;
        let second = client.segment(ACK | PSH | FIN, parts[0].len() as u32, parts[1]);
        let (action, last) = node.uplink_in(&second);
        let acknowledged = client.first.wrapping_add(2 + all);
        assert_eq!((action, segment(&last)), (REDIRECT, (ACK, client.next, acknowledged, &[][..])));
    }
    assert!(later > 180 && taken < 20, "{later} {taken}");
}

#[test]
fn a_client_that_only_connects_is_taken_leave_of() {
    let (mut node, _rows) = node();
    let mut client = Client::connect(&mut node, (CLIENT4, 40_005), (NODE4, CHECK), 9);
    assert_eq!(node.uplink_in(&client.segment(ACK, 0, "")).0, DROP);
    for _ in 0..2 {
        let (action, last) = node.uplink_in(&client.segment(FIN | ACK, 0, ""));
        assert_eq!((action, segment(&last)), (REDIRECT, (FIN | ACK, client.next, 11, &[][..])));
    }
    client.next = client.next.wrapping_add(1);
    assert_eq!(node.uplink_in(&client.segment(ACK, 1, "")).0, DROP);
}

#[test]
fn rows_that_nobody_vouches_for_are_not_answered_by() {
    let (mut node, rows) = node();
    let syn = tcp((CLIENT4, 40_006), (NODE4, CHECK), SYN);
    let fresh = u64::from(PROBE_FRESH_MS) * 1_000_000;
    let client = Client::connect(&mut node, (CLIENT4, 40_006), (NODE4, CHECK), 1000);
    for (age, action) in [(fresh - 500_000_000, REDIRECT), (fresh + 1_000_000, PASS), (clock_ns(), PASS)] {
        rows.vouch(clock_ns() - age).unwrap();
        assert_eq!(node.uplink_in(&syn).0, action, "{age}");
        assert_eq!(node.uplink_in(&client.segment(ACK | PSH, 0, "GET / HTTP/1.0\r\n\r\n")).0, action, "{age}");
    }
    // The secret stays when a daemon comes that knows no rows yet: connections go on.
    drop(rows);
    let mut rows = node.datapath.probe_rows().unwrap();
    assert_eq!(node.uplink_in(&syn).0, PASS, "a new daemon does not vouch by coming");
    rows.vouch(clock_ns()).unwrap();
    assert!(client.ask(&mut node, "GET / HTTP/1.0\r\n\r\n").ends_with("two\n"));
    rows.write(&[]).unwrap();
    assert_eq!(node.uplink_in(&syn), (PASS, syn), "the rows of the former one are gone");
}

#[test]
fn what_is_not_a_probe_of_this_node_is_left_alone() {
    let (mut node, mut rows) = node();
    let syn = |from: &str, to: &str, port| tcp((from, 40_007), (to, port), SYN);
    assert_eq!(node.uplink_in(&syn(CLIENT4, TUNNEL4, CHECK)).0, REDIRECT, "an outward device's address");
    let stays = [
        (syn(CLIENT4, NODE4, 10257), "a port without a row"),
        (syn(CLIENT4, VIP4, CHECK), "a Service's address"),
        (syn(NODE4, NODE4, CHECK), "from itself"),
        (syn(TUNNEL4, NODE4, CHECK), "from an address of its own"),
        (syn("127.0.0.1", NODE4, CHECK), "from nowhere"),
        (syn("224.0.0.1", NODE4, CHECK), "from many"),
        (syn(NODE6, NODE6, CHECK), "from itself"),
        (udp((CLIENT4, 40_007), (NODE4, CHECK), b"GET"), "UDP"),
    ];
    for (frame, why) in stays {
        assert_eq!(node.uplink_in(&frame), (PASS, frame), "{why}");
    }
    let uplink = node.uplink;
    let options = with_options(&syn(CLIENT4, NODE4, CHECK).bytes(), &[1, 1, 1, 0]);
    assert_eq!(node.raw(Direction::In, uplink, &options).action, PASS, "IP options");
    for piece in syn(CLIENT6, NODE6, CHECK).with_data(&[0; 20]).fragments(24, 7) {
        assert_eq!(node.uplink_in(&piece).0, PASS, "a fragment");
    }
    let from_pod = syn("10.1.0.5", NODE4, CHECK).bytes();
    let pods = packets::interface_index(PODS);
    assert_eq!(run_pod(node.datapath.devices(), &from_pod, pods, 1).unwrap().action, PASS, "pods ask the listener");

    // One that is bound to an address answers there only, and before the one that is bound to all.
    let mut all = answers();
    all.push(answer(NODE4, CHECK, PROBE_ANY, "bound\n"));
    all.push(answer(NODE4, 32101, PROBE_ANY, "bound\n"));
    rows.write(&all).unwrap();
    for (port, elsewhere) in [(CHECK, REDIRECT), (32101, PASS)] {
        let client = Client::connect(&mut node, (CLIENT4, 40_008), (NODE4, port), 1);
        assert!(client.ask(&mut node, "GET / HTTP/1.0\r\n\r\n").ends_with("bound\n"));
        assert_eq!(node.uplink_in(&syn(CLIENT4, TUNNEL4, port)).0, elsewhere);
    }

    // A Service that has the port is asked first.
    node.backend(1, LOCAL4, 8080, Protocol::Tcp, true);
    node.frontend("0.0.0.0", CHECK, Protocol::Tcp, &[1]);
    let syn = syn(CLIENT4, NODE4, CHECK);
    assert_eq!(node.uplink_in(&syn), (PASS, syn.with_ends((CLIENT4, 40_007), (LOCAL4, 8080))));
}

#[test]
fn a_probe_by_a_device_without_link_headers_is_answered() {
    let (mut node, _rows) = node();
    let uplink = node.uplink;
    // See run_bare() about this address.
    let packet = tcp(("8.0.1.1", 40_009), (NODE4, CHECK), SYN).packet();
    let outcome = run_bare(node.datapath.devices(), Direction::In, &packet, uplink, 1).unwrap();
    assert_eq!(outcome.action, REDIRECT);
    // A link header that nobody reads was put before it.
    let greeting = frame::parse_packet(&outcome.frame[14..], true);
    assert_eq!(segment(&greeting).0, SYN | ACK);
}
