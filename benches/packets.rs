//! Nanoseconds that a packet costs, by BPF_PROG_TEST_RUN on one core, for each way through the packet programs. Needs
//! root. Printed, not judged: `cargo bench --features lab --bench packets`; words after `--` choose lines that have them.
//!
//! The kernel runs a program again on what the last run left of the packet. So the flows measured here come in pairs that
//! lead to each other: each run finds a flow and changes every address, port and checksum.

#[path = "../tests/wire/mod.rs"]
mod wire;

use kubelane::abi::{Ends, Flow, FlowKey, flow_kind};
use kubelane::bpf::Direction;
use kubelane::bpf::run::run_marked;
use kubelane::model::{Ipx, Protocol};
use libbpf_rs::{MapCore, MapFlags};
use nix::time::{ClockId, clock_gettime};
use wire::frame::{ACK, Frame, SYN, tcp, udp};
use wire::{CLIENT4, CLIENT6, LOCAL4, LOCAL6, NODE4, NODE6, Node, VIP4, VIP6};

/// Runs in one system call: a forwarded packet loses a hop in each.
const REPEAT: u32 = 200;
const ROUNDS: usize = 3000;

/// The median of the rounds, in nanoseconds.
fn measure(node: &mut Node, direction: Direction, frame: &Frame) -> u128 {
    measure_bytes(node, direction, &frame.clone().living(255).bytes(), 0)
}

/// The route of a marked packet is asked for each time; others remember the last one's.
fn measure_routed(node: &mut Node, frame: &Frame) -> u128 {
    measure_bytes(node, Direction::In, &frame.clone().living(255).bytes(), 1)
}

fn measure_bytes(node: &mut Node, direction: Direction, bytes: &[u8], mark: u32) -> u128 {
    let uplink = node.uplink;
    let once = |node: &mut Node| run_marked(node.datapath.devices(), direction, bytes, uplink, mark, REPEAT).unwrap();
    let mut times: Vec<u128> = (0..ROUNDS).map(|_| once(node).duration.as_nanos()).collect();
    times.sort_unstable();
    times[ROUNDS / 2]
}

fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

fn ends_of(frame: &Frame) -> Ends {
    let (source, destination) = frame.ports();
    Ends {
        source: Ipx::from(frame.source).0,
        destination: Ipx::from(frame.destination).0,
        source_port_be: source.to_be_bytes(),
        destination_port_be: destination.to_be_bytes(),
    }
}

/// Rows of the lasting table from each frame's ends to the other's.
fn remember(node: &Node, frames: [&Frame; 2], protocol: Protocol, kind: u32) {
    let [one, other] = frames.map(ends_of);
    for (ends, new) in [(one, other), (other, one)] {
        let key = FlowKey { ends, protocol: protocol as u8, zero: [0; 3] };
        let flow = Flow {
            ends: new,
            kind: kind as u8,
            replied: 1,
            backend_id: 1,
            generation: 1,
            interface: node.uplink,
            // An hour ahead: neither too old nor touched by every packet.
            used_ns: now_ns() + 3_600_000_000_000,
            ..bytemuck::Zeroable::zeroed()
        };
        node.pinned("flows").update(bytemuck::bytes_of(&key), bytemuck::bytes_of(&flow), MapFlags::ANY).unwrap();
    }
}

/// The lines to print: all, or those that have one of the words asked for.
struct Lines(Vec<String>);

impl Lines {
    fn print(&self, what: &str, measure: impl FnOnce() -> u128) {
        if self.0.is_empty() || self.0.iter().any(|word| what.contains(word)) {
            println!("{what:<52} {:>5} ns", measure());
        }
    }
}

fn main() {
    let mut node = Node::new();
    let lines = Lines(std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect());
    // Flows to local backends of port 8080, so that it is known as one that replies come from.
    node.backend(1, LOCAL4, 8080, Protocol::Tcp, true);
    node.frontend("0.0.0.0", 30080, Protocol::Tcp, &[1]);
    node.uplink_in(&tcp((CLIENT4, 1), (NODE4, 30080), SYN));
    unrelated(&lines, &mut node);
    node.pass(&[CLIENT4, CLIENT6, LOCAL4, LOCAL6], &[80, 2000, 5001, 8080]);
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        related(&lines, &mut node, protocol, "IPv4", CLIENT4, VIP4, LOCAL4);
        related(&lines, &mut node, protocol, "IPv6", CLIENT6, VIP6, LOCAL6);
    }
}

fn unrelated(lines: &Lines, node: &mut Node) {
    let mut arp = tcp((CLIENT4, 5000), ("10.9.9.9", 443), ACK).bytes();
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    lines.print("not IP (what measuring costs)", || measure_bytes(node, Direction::In, &arp, 0));
    for (what, direction, frame) in [
        ("ingress, address not ours, IPv4", Direction::In, tcp((CLIENT4, 5000), ("10.9.9.9", 443), ACK)),
        ("ingress, address not ours, IPv6", Direction::In, tcp((CLIENT6, 5000), ("2001:db8:9::9", 443), ACK)),
        ("ingress to the node (VXLAN, ssh)", Direction::In, udp((CLIENT4, 5000), (NODE4, 8472), &[0; 100])),
        ("egress, IPv4", Direction::Out, tcp((NODE4, 40_000), (CLIENT4, 443), ACK)),
        ("egress, IPv6", Direction::Out, tcp((NODE6, 40_000), (CLIENT6, 443), ACK)),
    ] {
        lines.print(&format!("unrelated {what}"), || measure(node, direction, &frame));
    }
}

fn related(lines: &Lines, node: &mut Node, protocol: Protocol, family: &str, client: &str, service: &str, local: &str) {
    use flow_kind::{FLOW_AT_EGRESS, FLOW_FORWARDED, FLOW_REPLY};
    let packet = |from, to| match protocol {
        Protocol::Tcp => tcp(from, to, ACK).carrying(100),
        _ => udp(from, to, &[0; 100]),
    };
    let name = format!("{} {family}", protocol.as_str());
    let request = [packet((client, 5000), (service, 80)), packet((client, 5000), (local, 8080))];
    let reply = [packet((local, 8080), (client, 5000)), packet((service, 80), (client, 5000))];
    // All are routed by the uplink: one route, one neighbour.
    let forth = [packet((client, 5002), (service, 80)), packet((local, 2000), (client, 8080))];
    let back = [packet((local, 8080), (service, 2000)), packet((service, 80), (client, 5001))];
    for (pair, kind) in [
        (&request, 0),
        (&reply, FLOW_REPLY | FLOW_AT_EGRESS),
        (&forth, FLOW_FORWARDED),
        (&back, FLOW_REPLY | FLOW_FORWARDED),
    ] {
        remember(node, [&pair[0], &pair[1]], protocol, kind);
    }
    lines.print(&format!("{name} to a local backend"), || measure(node, Direction::In, &request[0]));
    lines.print(&format!("{name} reply of a local backend"), || measure(node, Direction::Out, &reply[0]));
    for (what, pair) in [("to a remote backend", &forth), ("reply of a remote backend", &back)] {
        lines.print(&format!("{name} {what}"), || measure(node, Direction::In, &pair[0]));
        lines.print(&format!("{name} {what}, route asked for"), || measure_routed(node, &pair[0]));
    }
}
