//! Every counter of the programs, each with something that moves it, and no other: a packet (BPF_PROG_TEST_RUN) with
//! the verdict and the bytes that it must end in, or a system call on a real socket. A counter without a row here fails
//! the test.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use kubelane::abi::flow_class::FLOW_CLASS_OTHER;
use kubelane::abi::flow_flag::FLOW_PROVED;
use kubelane::abi::flow_path::PATH_ROUTED;
use kubelane::abi::{Backend, Ends, Flow, FlowKey4, address_flag, counter, frontend_flag};
use kubelane::bpf::run::{run, with_stand_in};
use kubelane::bpf::{Direction, Listening, Wanted};
use kubelane::model::{Ipx, Protocol};
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType};

use crate::laboratory::packets::frame::{self, ACK, Frame, Inside, RST, SYN, ip, parse, sctp, tcp, udp};
use crate::laboratory::packets::{
    self, CLIENT4, DROP, LOCAL4, NODE4, Node, PASS, REDIRECT, REMOTE4, TUNNEL4, VIP4, ip_command, set_sysctl,
};
use crate::laboratory::{preflight, skip};

/// Counters that no test can move, and why.
const OUT_OF_REACH: [(&str, &str); 1] = [(
    "dropped_rewrite",
    "the kernel changes any packet whose headers it could read, unless it has no memory left in that very moment",
)];

/// What becomes of a packet.
enum Becomes {
    Dropped,
    /// Let through as it is.
    Same,
    /// Let through with this destination.
    Local(&'static str, u16),
    /// With this source and destination, and a source port of the private range; sent on, if the source is the node.
    NewPort(&'static str, (&'static str, u16)),
    /// Turned into an ICMP error of this type and code, back to its sender.
    Answer(u8, u8),
    /// An ICMP error, sent on to this destination with what it quotes having this source port.
    Error(&'static str, u16),
}

/// A packet that comes in by the uplink after what `prepare` did, and all counters that it moves.
struct Case {
    moves: &'static [(&'static str, u64)],
    prepare: fn(&mut Node),
    packet: fn() -> Frame,
    becomes: Becomes,
}

const FROM: (&str, u16) = (CLIENT4, 5000);
/// The private range's ports: 1024 to 29999.
const PRIVATE_PORTS: std::ops::Range<u16> = 1024..30_000;

/// `None`, said aloud, on a machine that cannot run these tests.
fn node_or_skip() -> Option<Node> {
    let can_run = preflight().inspect_err(|reason| skip(&format!("{reason:#}"))).is_ok();
    can_run.then(Node::new)
}

fn to(port: u16) -> (&'static str, u16) {
    (VIP4, port)
}

fn serve(node: &mut Node, port: u16, protocol: Protocol, backend: &str) {
    node.backend(port.into(), backend, 8080, protocol, backend.starts_with("10.1."));
    node.frontend(VIP4, port, protocol, &[port.into()]);
}

fn serve_by(node: &mut Node, port: u16, ids: &[u32]) {
    node.frontend(VIP4, port, Protocol::Tcp, ids);
}

fn error_about(quoted: &Frame) -> Frame {
    let inside = Inside::Icmp { kind: 3, code: 4, rest: 1300, data: quoted.packet() };
    Frame { source: ip("203.0.113.9"), destination: quoted.source, ttl: 61, inside }
}

/// Another client's flows have all of this node's ports towards a backend.
fn fill_ports(node: &Node, state: u32, port: u16) {
    let ends = |from: &str, from_port: u16, to: &str, to_port: u16| Ends {
        source: from.parse::<Ipx>().unwrap().0,
        destination: to.parse::<Ipx>().unwrap().0,
        source_port_be: from_port.to_be_bytes(),
        destination_port_be: to_port.to_be_bytes(),
    };
    for near in PRIVATE_PORTS {
        let request = ends("203.0.113.77", near, VIP4, port);
        node.flow(Protocol::Udp, request, ends(TUNNEL4, near, REMOTE4, 8080), PATH_ROUTED | state);
    }
}

const CASES: &[Case] = &[
    Case {
        moves: &[("flow_local", 1)],
        prepare: |n| serve(n, 101, Protocol::Tcp, LOCAL4),
        packet: || tcp(FROM, to(101), SYN),
        becomes: Becomes::Local(LOCAL4, 8080),
    },
    Case {
        moves: &[("flow_remote", 1)],
        prepare: |n| serve(n, 102, Protocol::Tcp, REMOTE4),
        packet: || tcp(FROM, to(102), SYN),
        becomes: Becomes::NewPort(TUNNEL4, (REMOTE4, 8080)),
    },
    Case {
        moves: &[("flow_local", 1), ("flow_midstream", 1)],
        prepare: |n| serve(n, 103, Protocol::Tcp, "10.1.0.6"),
        packet: || tcp(FROM, to(103), ACK).carrying(10),
        becomes: Becomes::Local("10.1.0.6", 8080),
    },
    Case {
        moves: &[("flow_established", 1)],
        prepare: |n| {
            serve(n, 104, Protocol::Udp, LOCAL4);
            n.uplink_in(&udp(FROM, to(104), b"?"));
            n.uplink_out(&udp((LOCAL4, 8080), FROM, b"!"));
            n.begin_earlier(2);
        },
        packet: || udp(FROM, to(104), b"?"),
        becomes: Becomes::Local(LOCAL4, 8080),
    },
    Case {
        // The client's port belongs to its flow by another address.
        moves: &[("flow_local", 1), ("snat_retry", 1)],
        prepare: |n| {
            serve(n, 105, Protocol::Udp, "10.1.0.7");
            n.frontend(VIP4, 106, Protocol::Udp, &[105]);
            n.uplink_in(&udp(FROM, to(106), b"?"));
        },
        packet: || udp(FROM, to(105), b"?"),
        becomes: Becomes::NewPort(CLIENT4, ("10.1.0.7", 8080)),
    },
    Case {
        moves: &[("flow_remote", 1), ("snat_retry", 16), ("snat_reclaimed", 1)],
        prepare: |n| {
            serve(n, 107, Protocol::Udp, REMOTE4);
            fill_ports(n, 0, 107);
        },
        packet: || udp(FROM, to(107), b"?"),
        becomes: Becomes::NewPort(TUNNEL4, (REMOTE4, 8080)),
    },
    Case {
        moves: &[("dropped_snat_exhausted", 1), ("snat_retry", 16)],
        prepare: |n| {
            serve(n, 108, Protocol::Udp, REMOTE4);
            fill_ports(n, FLOW_PROVED, 108);
        },
        packet: || udp(FROM, to(108), b"?"),
        becomes: Becomes::Dropped,
    },
    Case {
        moves: &[("dropped_martian", 1)],
        prepare: |n| serve(n, 121, Protocol::Udp, REMOTE4),
        packet: || udp(("224.1.2.3", 5000), to(121), b"?"),
        becomes: Becomes::Dropped,
    },
    Case {
        moves: &[("refused_no_endpoint", 1)],
        prepare: |n| serve_by(n, 109, &[]),
        packet: || tcp(FROM, to(109), SYN),
        becomes: Becomes::Answer(3, 3),
    },
    Case {
        moves: &[("dropped_no_local_endpoint", 1)],
        prepare: |n| {
            let mut row = n.frontend(VIP4, 110, Protocol::Tcp, &[]);
            row.outside = packets::empty_drop();
            n.frontend_row(VIP4, 110, Protocol::Tcp, &row);
        },
        packet: || tcp(FROM, to(110), SYN),
        becomes: Becomes::Dropped,
    },
    Case {
        moves: &[("failed_backend_missing", 1)],
        prepare: |n| serve_by(n, 111, &[5000]),
        packet: || tcp(FROM, to(111), SYN),
        becomes: Becomes::Same,
    },
    Case {
        moves: &[("dropped_source_range", 1)],
        prepare: |n| {
            let mut row = n.frontend(VIP4, 112, Protocol::Tcp, &[101]);
            row.flags |= frontend_flag::FRONTEND_SOURCE_RANGES;
            n.frontend_row(VIP4, 112, Protocol::Tcp, &row);
        },
        packet: || tcp(FROM, to(112), SYN),
        becomes: Becomes::Dropped,
    },
    Case {
        moves: &[("dropped_unknown_reset", 1)],
        prepare: |n| serve(n, 113, Protocol::Tcp, LOCAL4),
        packet: || tcp(FROM, to(113), RST),
        becomes: Becomes::Dropped,
    },
    Case {
        moves: &[("dropped_fragment", 1)],
        prepare: |n| serve(n, 114, Protocol::Udp, LOCAL4),
        packet: || udp(FROM, to(114), &[5; 2000]).fragments(1208, 81)[1].clone(),
        becomes: Becomes::Dropped,
    },
    Case {
        moves: &[("icmp_translated", 1)],
        prepare: |n| {
            serve(n, 115, Protocol::Tcp, "10.1.0.8");
            n.uplink_in(&tcp(FROM, to(115), SYN));
        },
        packet: || error_about(&tcp(to(115), FROM, ACK)),
        becomes: Becomes::Error("10.1.0.8", 8080),
    },
    Case {
        moves: &[("icmp_too_big", 1)],
        prepare: |n| {
            serve(n, 116, Protocol::Tcp, "10.244.1.6");
            n.uplink_in(&tcp(FROM, to(116), SYN));
        },
        packet: || tcp(FROM, to(116), ACK).carrying(1460),
        becomes: Becomes::Answer(3, 4),
    },
    Case {
        moves: &[("icmp_ttl_exceeded", 1)],
        prepare: |n| {
            serve(n, 117, Protocol::Udp, "10.244.1.7");
            n.uplink_in(&udp(FROM, to(117), b"?"));
        },
        packet: || udp(FROM, to(117), b"?").living(1),
        becomes: Becomes::Answer(11, 0),
    },
    Case {
        moves: &[("dropped_snat_source", 1)],
        prepare: |n| {
            serve(n, 118, Protocol::Udp, "10.244.1.8");
            ip_command("addr add 10.99.0.1/32 dev lo");
            ip_command("route add 10.244.1.8/32 dev over0 src 10.99.0.1");
        },
        packet: || udp(FROM, to(118), b"?"),
        becomes: Becomes::Dropped,
    },
    Case {
        moves: &[("dropped_no_route", 1)],
        prepare: |n| {
            serve(n, 119, Protocol::Udp, "10.244.1.9");
            ip_command("route add unreachable 10.244.1.9/32");
        },
        packet: || udp(FROM, to(119), b"?"),
        becomes: Becomes::Dropped,
    },
    Case {
        moves: &[("flow_remote", 1), ("neighbour_unknown", 1)],
        prepare: |n| serve(n, 122, Protocol::Tcp, "10.244.1.77"),
        packet: || tcp(FROM, to(122), SYN),
        becomes: Becomes::NewPort(TUNNEL4, ("10.244.1.77", 8080)),
    },
    Case {
        moves: &[("dropped_sctp_port", 1)],
        prepare: |n| serve(n, 121, Protocol::Sctp, LOCAL4),
        packet: || sctp(FROM, to(121), b"chunks.."),
        becomes: Becomes::Dropped,
    },
    Case {
        // The last one: no packet is forwarded afterwards.
        moves: &[("dropped_forwarding_off", 1)],
        prepare: |n| {
            serve(n, 120, Protocol::Udp, "10.244.1.10");
            set_sysctl("net/ipv4/conf/up0/forwarding", "0");
        },
        packet: || udp(FROM, to(120), b"?"),
        becomes: Becomes::Dropped,
    },
];

fn assert_becomes(case: &Case, sent: &Frame, action: i32, bytes: &[u8]) {
    let name = case.moves[0].0;
    let seen = || parse(bytes);
    match case.becomes {
        Becomes::Dropped => assert_eq!(action, DROP, "{name}"),
        Becomes::Same => assert_eq!((action, bytes), (PASS, &sent.bytes()[..]), "{name}"),
        Becomes::Local(to, port) => {
            assert_eq!((action, seen()), (PASS, sent.with_ends(FROM, (to, port))), "{name}");
        }
        Becomes::NewPort(source, to) => {
            let seen = seen();
            let near = seen.ports().0;
            assert!(PRIVATE_PORTS.contains(&near) && near != FROM.1, "{name}: {near}");
            let expected = sent.with_ends((source, near), to);
            let expected = if source == CLIENT4 { (PASS, expected) } else { (REDIRECT, expected.living(60)) };
            assert_eq!((action, seen), expected, "{name}");
        }
        Becomes::Answer(expected_kind, expected_code) => {
            let seen = seen();
            assert_eq!((action, seen.source, seen.destination), (REDIRECT, sent.destination, sent.source), "{name}");
            let Inside::Icmp { kind, code, data, .. } = &seen.inside else { panic!("{name}: {seen:?}") };
            assert_eq!((*kind, *code), (expected_kind, expected_code), "{name}");
            assert_eq!(*data, sent.packet()[..data.len()], "{name}: quoted as it came");
        }
        Becomes::Error(to, port) => {
            let seen = seen();
            assert_eq!((action, seen.source, seen.destination), (PASS, sent.source, ip(to)), "{name}");
            let Inside::Icmp { data, .. } = &seen.inside else { panic!("{name}: {seen:?}") };
            let quoted = frame::parse_packet(data, false);
            assert_eq!((quoted.source, quoted.ports()), (ip(to), (port, FROM.1)), "{name}");
        }
    }
}

/// Somebody who hears of everything (`kubelane monitor`).
fn listen(node: &Node) -> Listening {
    let wanted = Wanted { numbers: u64::MAX, protocol: 0, from: None, to: None, port: 0, one_in: 1, rate: 0 };
    Listening::open(&node.pin_path, wanted).unwrap()
}

/// The counters whose events were told since the last call. Ends of flows are counted nowhere.
fn told(listening: &mut Listening) -> BTreeMap<&'static str, u64> {
    let mut told = BTreeMap::new();
    for event in listening.read(1_000_000).unwrap() {
        if let Some((name, _)) = counter::NAMES.get(event.number as usize) {
            *told.entry(*name).or_default() += 1;
        }
    }
    told
}

#[test]
fn each_packet_moves_its_own_counters_and_no_others_and_is_told_to_who_listens() {
    let Some(mut node) = node_or_skip() else { return };
    let mut listening = listen(&node);
    for case in CASES {
        (case.prepare)(&mut node);
        told(&mut listening);
        let packet = (case.packet)();
        let (outcome, moved) = node.counted(|n| n.raw(Direction::In, n.uplink, &packet.bytes()));
        assert_eq!(moved, case.moves.iter().copied().collect(), "{packet:?}");
        assert_eq!(told(&mut listening), moved, "{packet:?}");
        assert_becomes(case, &packet, outcome.action, &outcome.frame);
        // The next case finds the ports free.
        node.forget_flows();
    }
}

/// Of packets that come too fast to be answered one by one.
const FLOODED: &str = "dropped_answer_limit";
/// Counters that tests of their own move: `FLOODED`, those of a full table, of a ring that went round, of a flow that
/// another processor is just replacing, of IP options, of the host's stack, and of pods (tests/packet/pods.rs).
const ELSEWHERE: [&str; 10] = [
    "flow_pod",
    "probe_answered",
    "dropped_pod_quota",
    "handed_to_stack",
    FLOODED,
    "dropped_flow_table",
    "flow_table_full",
    "flow_pushed_out",
    "dropped_flow_changing",
    "dropped_options",
];

#[test]
fn a_flood_of_packets_that_nobody_serves_is_answered_so_far_and_no_further() {
    let Some(mut node) = node_or_skip() else { return };
    serve_by(&mut node, 109, &[]);
    let packet = tcp(FROM, to(109), SYN).bytes();
    let (sent, moved) = node.counted(|n| {
        let answered = |n: &mut Node| n.raw(Direction::In, n.uplink, &packet).action == REDIRECT;
        let sent = (1..1_000_000u64).find(|_| !answered(n));
        sent.expect("an end to the answers")
    });
    assert!(sent > 100, "{sent}");
    assert_eq!(moved, [("refused_no_endpoint", sent), (FLOODED, 1)].into());
}

#[test]
fn a_packet_that_a_full_table_does_not_take_is_counted_and_leaves_no_half_of_a_flow() {
    let Some(mut node) = node_or_skip() else { return };
    serve(&mut node, 80, Protocol::Udp, LOCAL4);
    let query = udp(FROM, to(80), b"?");
    // A hash with room for so many rows in the place of the real table.
    for room in [0, 1] {
        let options = libbpf_sys::bpf_map_create_opts {
            sz: size_of::<libbpf_sys::bpf_map_create_opts>() as _,
            ..Default::default()
        };
        let (key, row) = (size_of::<FlowKey4>() as u32, size_of::<Flow>() as u32);
        let full = MapHandle::create(MapType::Hash, Some("flows4"), key, row, 1, &options).unwrap();
        if room == 0 {
            full.update(&[1; size_of::<FlowKey4>()], &[0; size_of::<Flow>()], MapFlags::ANY).unwrap();
        }
        let rows = full.keys().count();
        let devices = with_stand_in(&node.pin_path, "flows4", full.as_fd()).unwrap();
        let uplink = node.uplink;
        let (outcome, moved) = node.counted(|_| run(&devices, Direction::In, &query.bytes(), uplink, 1).unwrap());
        assert_eq!((outcome.action, moved), (DROP, [("dropped_flow_table", 1)].into()), "{room}");
        assert_eq!(full.keys().count(), rows, "{room}");
    }
}

#[test]
fn a_flow_that_has_no_room_among_the_proved_stays_unproved_and_serves() {
    let Some(mut node) = node_or_skip() else { return };
    serve(&mut node, 80, Protocol::Udp, LOCAL4);
    let (query, answer) = (udp(FROM, to(80), b"?"), udp((LOCAL4, 8080), FROM, b"!"));
    node.uplink_in(&query);
    node.uplink_out(&answer);
    node.begin_earlier(2);
    let counts = node.pinned("flow_counts");
    counts.update(&FLOW_CLASS_OTHER.to_ne_bytes(), &u64::from(u32::MAX).to_ne_bytes(), MapFlags::ANY).unwrap();
    for _ in 0..2 {
        // It is asked for once a second.
        node.begin_earlier(0);
        let (outcome, moved) = node.counted(|n| n.uplink_in(&query));
        assert_eq!(outcome, (PASS, query.with_ends(FROM, (LOCAL4, 8080))));
        assert_eq!(moved, [("flow_table_full", 1)].into());
        assert_eq!(node.flow_rows(), (0, 2));
    }
    counts.update(&FLOW_CLASS_OTHER.to_ne_bytes(), &0u64.to_ne_bytes(), MapFlags::ANY).unwrap();
    node.begin_earlier(0);
    assert_eq!(node.counted(|n| n.uplink_in(&query)).1, [("flow_established", 1)].into());
}

const CLUSTER_IP: &str = "10.96.0.1";

/// What a process on the node does, and all counters that it moves.
type SocketCase = (&'static [(&'static str, u64)], fn());

fn service(port: u16) -> SocketAddr {
    SocketAddr::new(ip(CLUSTER_IP), port)
}

fn any_port() -> UdpSocket {
    UdpSocket::bind("0.0.0.0:0").unwrap()
}

const SOCKET_CASES: &[SocketCase] = &[
    (&[("connect_translated", 1)], || drop(TcpStream::connect(service(80)).unwrap())),
    (&[("connect_translated", 1), ("peer_translated", 1)], || {
        assert_eq!(TcpStream::connect(service(80)).unwrap().peer_addr().unwrap(), service(80));
    }),
    (&[("datagram_translated", 1), ("reply_translated", 1)], || {
        let socket = any_port();
        socket.send_to(b"?", service(53)).unwrap();
        assert_eq!(socket.recv_from(&mut [0; 8]).unwrap(), (1, service(53)));
    }),
    (&[("refused_no_endpoint", 1)], || {
        assert_eq!(TcpStream::connect(service(81)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }),
    (&[("refused_unknown_port", 1)], || {
        assert_eq!(TcpStream::connect(service(82)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }),
    (&[("refused_loopback_source", 1)], || {
        let refused = UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"?", "127.0.0.1:30053").unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::AddrNotAvailable);
    }),
];

/// The socket's record is charged to the memory that a socket may have for options (of the namespace since 6.8).
const NO_STORAGE: SocketCase = (&[("connect_translated", 1), ("failed_storage", 1)], || {
    let stream = TcpStream::connect(service(80)).unwrap();
    assert_eq!(stream.peer_addr().unwrap(), SocketAddr::new(ip(NODE4), 9000), "nothing remembers the Service");
});

/// This process in the node's cgroup, until dropped.
struct InCgroup(PathBuf);

impl InCgroup {
    fn enter(cgroup: &Path) -> InCgroup {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).expect("this process is in a cgroup2");
        fs::write(cgroup.join("cgroup.procs"), "0").unwrap();
        InCgroup(cgroup.parent().unwrap().join(own))
    }
}

impl Drop for InCgroup {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("cgroup.procs"), "0");
    }
}

#[test]
fn each_system_call_moves_its_own_counters_and_no_others_and_is_told_to_who_listens() {
    let Some(mut node) = node_or_skip() else { return };
    let listener = TcpListener::bind((NODE4, 9000)).unwrap();
    let datagrams = UdpSocket::bind((NODE4, 9000)).unwrap();
    node.address(CLUSTER_IP, address_flag::ADDRESS_CLUSTER_IP);
    for (port, protocol, has_backend) in
        [(80, Protocol::Tcp, true), (53, Protocol::Udp, true), (81, Protocol::Tcp, false)]
    {
        let row: Backend = packets::backend(NODE4, 9000, protocol, true);
        node.backend_row(port.into(), &row);
        let ids = [u32::from(port)];
        let mut row = node.frontend(CLUSTER_IP, port, protocol, if has_backend { &ids } else { &[] });
        (row.inside, row.flags) = (row.outside, frontend_flag::FRONTEND_CLUSTER_IP);
        node.frontend_row(CLUSTER_IP, port, protocol, &row);
    }
    let mut row = node.frontend("0.0.0.0", 30053, Protocol::Udp, &[53]);
    (row.inside, row.flags) = (row.outside, frontend_flag::FRONTEND_NODE_PORT);
    node.frontend_row("0.0.0.0", 30053, Protocol::Udp, &row);
    std::thread::spawn(move || listener.incoming().for_each(drop));
    std::thread::spawn(move || {
        while let Ok((_, peer)) = datagrams.recv_from(&mut [0; 8]) {
            let _ = datagrams.send_to(b"!", peer);
        }
    });
    let inside = InCgroup::enter(&node.pins.settings().cgroup);
    let mut listening = listen(&node);
    let mut check = |node: &mut Node, (moves, call): SocketCase| {
        let ((), mut moved) = node.counted(|_| call());
        assert_eq!(moved, moves.iter().copied().collect::<BTreeMap<_, _>>());
        // What each answer does is no event.
        moved.retain(|name, _| !["peer_translated", "reply_translated"].contains(name));
        assert_eq!(told(&mut listening), moved);
    };
    SOCKET_CASES.iter().for_each(|case| check(&mut node, *case));
    if Path::new("/proc/sys/net/core/optmem_max").exists() {
        set_sysctl("net/core/optmem_max", "64");
        check(&mut node, NO_STORAGE);
    } else {
        skip("failed_storage is not moved: before 6.8 no namespace has an optmem_max of its own");
    }
    drop(inside);
}

#[test]
fn every_counter_has_a_case() {
    let packets = CASES.iter().flat_map(|case| case.moves);
    let calls = SOCKET_CASES.iter().chain([&NO_STORAGE]).flat_map(|(moves, _)| moves.iter());
    let moved: BTreeSet<&str> = packets.chain(calls).map(|(name, _)| *name).chain(ELSEWHERE).collect();
    let out_of_reach: BTreeSet<&str> = OUT_OF_REACH.iter().map(|(name, _)| *name).collect();
    let all: BTreeSet<&str> = counter::NAMES.iter().map(|(name, _)| *name).collect();
    let missing: Vec<_> = all.iter().filter(|name| !moved.contains(*name) && !out_of_reach.contains(*name)).collect();
    assert!(missing.is_empty(), "counters of bpf/abi.h that no case here moves: {missing:?}");
    assert!(out_of_reach.is_disjoint(&moved), "moved after all: {:?}", out_of_reach.intersection(&moved));
    assert!(moved.union(&out_of_reach).all(|name| all.contains(name)));
}
