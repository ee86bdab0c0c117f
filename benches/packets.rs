//! Nanoseconds that a packet costs, by BPF_PROG_TEST_RUN on one core, for each way through the packet programs. Needs
//! root. Printed, not judged: `cargo bench --features lab --bench packets`.
//!
//! The kernel runs a program again on what the last run left of the packet. So the flows measured here lead from their
//! ends to the same ends: every look-up, checksum and store is made, and the packet stays what it is.

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

/// A row of the lasting table from a frame's ends to the same ends.
fn remember(node: &Node, frame: &Frame, protocol: Protocol, kind: u32) {
    let (source, destination) = frame.ports();
    let ends = Ends {
        source: Ipx::from(frame.source).0,
        destination: Ipx::from(frame.destination).0,
        source_port_be: source.to_be_bytes(),
        destination_port_be: destination.to_be_bytes(),
    };
    let key = FlowKey { ends, protocol: protocol as u8, zero: [0; 3] };
    let flow = Flow {
        ends,
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

fn main() {
    let mut node = Node::new();
    // Flows to local backends of port 8080, so that it is known as one that replies come from.
    node.backend(1, LOCAL4, 8080, Protocol::Tcp, true);
    node.frontend("0.0.0.0", 30080, Protocol::Tcp, &[1]);
    node.uplink_in(&tcp((CLIENT4, 1), (NODE4, 30080), SYN));
    let print = |what: &str, ns: u128| println!("{what:<52} {ns:>5} ns");
    let mut arp = tcp((CLIENT4, 5000), ("10.9.9.9", 443), ACK).bytes();
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    print("not IP (what measuring costs)", measure_bytes(&mut node, Direction::In, &arp, 0));
    print("unrelated ingress, address not ours", {
        measure(&mut node, Direction::In, &tcp((CLIENT4, 5000), ("10.9.9.9", 443), ACK))
    });
    print("unrelated ingress, address not ours, IPv6", {
        measure(&mut node, Direction::In, &tcp((CLIENT6, 5000), ("2001:db8:9::9", 443), ACK))
    });
    print("unrelated ingress to the node (VXLAN, ssh)", {
        measure(&mut node, Direction::In, &udp((CLIENT4, 5000), (NODE4, 8472), &[0; 100]))
    });
    print("unrelated egress", measure(&mut node, Direction::Out, &tcp((NODE4, 40_000), (CLIENT4, 443), ACK)));
    print("unrelated egress, IPv6", measure(&mut node, Direction::Out, &tcp((NODE6, 40_000), (CLIENT6, 443), ACK)));
    node.pass_ports(&[80], &[2000]);
    let families = [("IPv4", CLIENT4, VIP4, LOCAL4), ("IPv6", CLIENT6, VIP6, LOCAL6)];
    for (family, client, service, local) in families {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let packet = |from, to| match protocol {
                Protocol::Tcp => tcp(from, to, ACK).carrying(100),
                _ => udp(from, to, &[0; 100]),
            };
            let (request, reply) = (packet((client, 5000), (service, 80)), packet((local, 8080), (client, 5000)));
            remember(&node, &request, protocol, 0);
            remember(&node, &reply, protocol, flow_kind::FLOW_REPLY | flow_kind::FLOW_AT_EGRESS);
            // Forwarded ones go to the client's side of the uplink: one route, one neighbour.
            let (back, forth) = (packet((client, 5001), (service, 2000)), packet((client, 5002), (service, 80)));
            remember(&node, &back, protocol, flow_kind::FLOW_REPLY | flow_kind::FLOW_FORWARDED);
            remember(&node, &forth, protocol, flow_kind::FLOW_FORWARDED);
            let name = format!("{} {family}", protocol.as_str());
            print(&format!("{name} to a local backend"), measure(&mut node, Direction::In, &request));
            print(&format!("{name} reply of a local backend"), measure(&mut node, Direction::Out, &reply));
            print(&format!("{name} to a remote backend"), measure(&mut node, Direction::In, &forth));
            print(&format!("{name} to a remote backend, route asked for"), measure_routed(&mut node, &forth));
            print(&format!("{name} reply of a remote backend"), measure(&mut node, Direction::In, &back));
            print(&format!("{name} reply of a remote backend, route asked for"), measure_routed(&mut node, &back));
        }
    }
}
