//! What no sender means to send: truncated headers, random bytes, valid packets with bits turned over. Nothing may be
//! rewritten that is not a well-formed packet of ours, and what is rewritten must still be well-formed.

use std::time::{Duration, Instant};

use crate::laboratory::packets::frame::{self, ACK, Frame, Inside, SYN, ip, tcp, udp};
use crate::laboratory::packets::{
    CLIENT4, CLIENT6, LOCAL4, LOCAL6, Node, PASS, REDIRECT, REMOTE4, REMOTE6, TUNNEL4, TUNNEL6, VIP4, VIP6,
};
use kubelane::bpf::Direction;
use kubelane::model::Protocol;

/// How long each random run may take; the number of packets follows from the machine.
const TIME: Duration = Duration::from_secs(8);

/// xorshift64*, seeded: a failure names the seed's state and comes back.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

/// A node with a local and a remote backend in each family, and one flow of each.
fn busy_node() -> (Node, Vec<Frame>) {
    let mut node = Node::new();
    let mut frames = Vec::new();
    let families = [(CLIENT4, VIP4, LOCAL4, REMOTE4, TUNNEL4), (CLIENT6, VIP6, LOCAL6, REMOTE6, TUNNEL6)];
    let mut id = 0;
    for (client, service, local, remote, source) in families {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let packet = |from, to| match protocol {
                Protocol::Tcp => tcp(from, to, SYN | ACK).carrying(24),
                _ => udp(from, to, &[5; 40]),
            };
            for (pod, port) in [(local, 80), (remote, 81)] {
                id += 1;
                node.backend(id, pod, 8080, protocol, pod == local);
                node.frontend(service, port, protocol, &[id]);
                let request = packet((client, 5000), (service, port));
                let seen = node.uplink_in(&request).1.ports().0;
                let reply = packet((pod, 8080), (if pod == local { client } else { source }, seen));
                let data = packet((service, port), (client, 5000)).packet()[..56].to_vec();
                let kind = if client == CLIENT4 { 3 } else { 2 };
                let inside = Inside::Icmp { kind, code: 0, rest: 1300, data };
                frames.push(Frame { source: ip(client), destination: ip(service), ttl: 60, inside });
                frames.extend(udp((client, 5000), (service, port), &[9; 100]).fragments(64, id));
                frames.extend([request, reply]);
            }
        }
    }
    (node, frames)
}

#[test]
fn every_truncation_of_every_kind_of_packet_is_left_alone_or_dropped_and_never_rewritten() {
    let (mut node, frames) = busy_node();
    for frame in frames {
        let bytes = frame.bytes();
        for length in 14..bytes.len() {
            for direction in [Direction::In, Direction::Out] {
                // Cut on the way: the IP header still tells the whole length, the rest misses bytes. What an error
                // quotes is enough with eight bytes of the transport header.
                let header = if frame.source.is_ipv4() { 20 } else { 40 };
                let enough = match frame.inside {
                    Inside::Tcp { .. } => header + 20,
                    Inside::Udp { .. } | Inside::Sctp { .. } => header + 8,
                    Inside::Icmp { .. } => header + 8 + header + 8,
                    Inside::Piece { .. } => header,
                };
                // The kernel's test run wants the IP header of an IP frame.
                if length < 14 + header || length >= 14 + enough {
                    continue;
                }
                let outcome = node.raw(direction, node.uplink, &bytes[..length]);
                assert_eq!((outcome.action, &outcome.frame[..]), (PASS, &bytes[..length]), "{frame:?} cut to {length}");
            }
        }
    }
}

#[test]
fn random_bytes_behind_an_ethernet_header_change_nothing() {
    let (mut node, _) = busy_node();
    let mut random = Random(0x6b75_6265_6c61_6e65);
    let end = Instant::now() + TIME;
    let mut packets = 0u64;
    while Instant::now() < end {
        let state = random.0;
        let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        let six = random.below(2) == 1;
        bytes.extend(if six { [0x86, 0xdd] } else { [0x08, 0x00] });
        let least = if six { 40 } else { 20 };
        let length = least + random.below(120);
        bytes.extend((0..length).map(|_| random.next() as u8));
        if random.below(4) > 0 {
            // A likely version, so that more than the first check is met, and our own address.
            bytes[14] = if six { 0x60 } else { 0x45 };
            let (at, octets) = match if six { ip(VIP6) } else { ip(VIP4) } {
                std::net::IpAddr::V4(ip) => (30, ip.octets().to_vec()),
                std::net::IpAddr::V6(ip) => (38, ip.octets().to_vec()),
            };
            bytes[at..at + octets.len()].copy_from_slice(&octets);
        }
        for direction in [Direction::In, Direction::Out] {
            let outcome = node.raw(direction, node.uplink, &bytes);
            // Dropped, if a fragment; else nothing that has a flow or a frontend comes up by chance.
            assert!(outcome.frame == bytes, "state {state:#x}");
        }
        packets += 1;
    }
    println!("{packets} packets");
    assert!(packets > 10_000);
}

#[test]
fn packets_with_a_byte_changed_stay_well_formed_or_unchanged() {
    let (mut node, frames) = busy_node();
    let mut random = Random(0x7061_636b_6574_7321);
    let end = Instant::now() + TIME;
    let mut packets = 0u64;
    while Instant::now() < end {
        let state = random.0;
        let mut bytes = frames[random.below(frames.len())].bytes();
        let at = 14 + random.below(bytes.len() - 14);
        bytes[at] ^= 1 << random.below(8);
        let direction = if random.below(2) == 0 { Direction::In } else { Direction::Out };
        let outcome = node.raw(direction, node.uplink, &bytes);
        let length = outcome.frame.len();
        assert!(length == bytes.len() || outcome.action == REDIRECT, "state {state:#x}");
        if outcome.frame != bytes && length == bytes.len() {
            // What the sender got wrong stays wrong by the same amount: checksums are changed, never made anew.
            assert_eq!(faults(&bytes), faults(&outcome.frame), "state {state:#x}");
        }
        packets += 1;
    }
    println!("{packets} packets");
    assert!(packets > 10_000);
}

/// By how much the IPv4 header's and the transport's checksums are off, 0 and 0xffff being the same.
fn faults(frame: &[u8]) -> (u16, u16) {
    let packet = &frame[14..];
    let off = |parts: &[&[u8]]| match frame::checksum(parts) {
        0xffff => 0,
        sum => sum,
    };
    let (header, body, addresses, protocol) = if frame[12] == 0x08 {
        (&packet[..20], &packet[20..], &packet[12..20], packet[9])
    } else {
        (&packet[..0], &packet[40..], &packet[8..40], packet[6])
    };
    let is_piece = frame[12] == 0x08 && (packet[6] & 0x3f != 0 || packet[7] != 0);
    if is_piece || ![6, 17].contains(&protocol) || (frame[12] == 0x08 && packet[0] != 0x45) || body.len() < 8 {
        return (if header.is_empty() { 0 } else { off(&[header]) }, 0);
    }
    if protocol == 17 && body[6..8] == [0, 0] {
        return (if header.is_empty() { 0 } else { off(&[header]) }, 0);
    }
    let pseudo_tail = [&(body.len() as u32).to_be_bytes()[..], &[0, 0, 0, protocol]].concat();
    let header_fault = if header.is_empty() { 0 } else { off(&[header]) };
    (header_fault, off(&[addresses, &pseudo_tail, body]))
}
