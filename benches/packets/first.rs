//! Ways of a flow's first packets, and of those that get no flow. A run with the same packet would be another way, so
//! that each run has a packet from another port, whose last flow has been removed.

use kubelane::abi::frontend_flag;
use kubelane::bpf::Direction;
use kubelane::model::Protocol;

use crate::laboratory::packets::frame::{ACK, Frame, SYN, tcp, udp};
use crate::laboratory::packets::{
    CLIENT4, CLIENT6, DROP, LOCAL4, LOCAL6, NODE4, NODE6, Node, PASS, REDIRECT, REMOTE4, REMOTE6, VIP4, VIP6,
    empty_drop,
};
use crate::measure::{Packets, Way};
use crate::ways::ethernet;

/// NodePorts of backends here and elsewhere.
const HERE: u16 = 30080;
const ELSEWHERE: u16 = 30081;
/// Ports of the service address: without endpoints, for some sources only, without local endpoints.
const REFUSED: u16 = 81;
const BARRED: u16 = 82;
const DROPPED: u16 = 83;

const FAMILIES: [(&str, &str, &str, [&str; 2]); 2] =
    [("IPv4", CLIENT4, NODE4, [LOCAL4, REMOTE4]), ("IPv6", CLIENT6, NODE6, [LOCAL6, REMOTE6])];

/// Backends 1 to 8, and what is served by them.
fn serve(node: &mut Node) {
    let mut id = 1;
    for (_, _, address, backends) in FAMILIES {
        let any = if address == NODE4 { "0.0.0.0" } else { "::" };
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for (backend, port, local) in [(backends[0], HERE, true), (backends[1], ELSEWHERE, false)] {
                node.backend(id, backend, 8080, protocol, local);
                node.frontend(any, port, protocol, &[id]);
                id += 1;
            }
        }
    }
    for vip in [VIP4, VIP6] {
        node.frontend(vip, REFUSED, Protocol::Tcp, &[]);
        let mut row = node.frontend(vip, BARRED, Protocol::Tcp, &[1]);
        row.flags |= frontend_flag::FRONTEND_SOURCE_RANGES;
        node.frontend_row(vip, BARRED, Protocol::Tcp, &row);
        let mut row = node.frontend(vip, DROPPED, Protocol::Tcp, &[]);
        row.outside = empty_drop();
        node.frontend_row(vip, DROPPED, Protocol::Tcp, &row);
    }
}

/// Clients' ports, used in turn: few, so that the places of their rows stay in the processor's caches. How cold tables
/// are in the end is the neighbours' affair, and would hide what the programs do.
const CLIENT_PORTS: std::ops::Range<u16> = 10_000..10_016;

/// Makes the last of these many packets of a connection that is not known: the client's SYN, the backend's answer,
/// the client's acknowledgement, which proves the flow.
#[derive(Clone, Copy)]
struct Opening {
    client: &'static str,
    node: &'static str,
    port: u16,
    protocol: Protocol,
    packets: usize,
    next_port: u16,
}

impl Opening {
    fn make(&mut self, node: &mut Node) -> Vec<u8> {
        self.next_port = if self.next_port + 1 < CLIENT_PORTS.end { self.next_port + 1 } else { CLIENT_PORTS.start };
        let (from, to) = ((self.client, self.next_port), (self.node, self.port));
        let is_tcp = self.protocol == Protocol::Tcp;
        let first = if is_tcp { tcp(from, to, SYN) } else { udp(from, to, &[0; 100]) };
        node.forget_flow(&first, self.protocol);
        if self.packets == 1 {
            return first.bytes();
        }
        let (_, seen) = node.uplink_in(&first);
        let answer = answer_to(&seen, is_tcp);
        if self.packets == 2 {
            return answer.bytes();
        }
        if self.port == HERE {
            node.uplink_out(&answer);
        } else {
            node.tunnel_in(&answer);
        }
        if is_tcp {
            return tcp(from, to, ACK).numbered(1001, 7001).bytes();
        }
        node.begin_flow_earlier(&first, self.protocol, 2);
        first.bytes()
    }
}

/// What a backend says to its first packet.
fn answer_to(seen: &Frame, is_tcp: bool) -> Frame {
    let (source, destination) = (seen.source.to_string(), seen.destination.to_string());
    let (from, to) = ((destination.as_str(), seen.ports().1), (source.as_str(), seen.ports().0));
    if is_tcp { tcp(from, to, SYN | ACK).numbered(7000, 1001) } else { udp(from, to, &[0; 100]) }
}

fn openings(node: &Node) -> Vec<Way> {
    let (uplink, tunnel) = (node.uplink, node.tunnel);
    let mut ways = Vec::new();
    for (family, client, address, _) in FAMILIES {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for (port, place) in [(HERE, "local"), (ELSEWHERE, "remote")] {
                let here = port == HERE;
                let answered = if here { ethernet(Direction::Out, uplink) } else { ethernet(Direction::In, tunnel) };
                let hooks = [ethernet(Direction::In, uplink), answered, ethernet(Direction::In, uplink)];
                let names = [
                    format!("to a {place} backend, first"),
                    format!("reply of a {place} backend, first"),
                    format!("to a {place} backend, proving the flow"),
                ];
                for (i, (hook, name)) in hooks.into_iter().zip(names).enumerate() {
                    let mut opening = Opening {
                        client,
                        node: address,
                        port,
                        protocol,
                        packets: i + 1,
                        next_port: CLIENT_PORTS.start,
                    };
                    ways.push(Way {
                        name: format!("{} {family} {name}", protocol.as_str()),
                        hook,
                        packets: Packets::Fresh(Box::new(move |node| opening.make(node))),
                        action: if here { PASS } else { REDIRECT },
                    });
                }
            }
        }
    }
    ways
}

/// First packets, answers to them, proofs; refusals and drops.
pub fn ways(node: &mut Node) -> Vec<Way> {
    serve(node);
    let mut ways = openings(node);
    let hook = ethernet(Direction::In, node.uplink);
    for (family, client, vip) in [("IPv4", CLIENT4, VIP4), ("IPv6", CLIENT6, VIP6)] {
        let syn = |port| tcp((client, 5000), (vip, port), SYN).bytes();
        // The answer takes the packet's place, and is no second packet.
        let refused = syn(REFUSED);
        ways.push(Way {
            name: format!("TCP {family} refused, no endpoint"),
            hook,
            packets: Packets::Fresh(Box::new(move |_| refused.clone())),
            action: REDIRECT,
        });
        for (what, port) in [("dropped, source range", BARRED), ("dropped, no local endpoint", DROPPED)] {
            let packets = Packets::Same(syn(port));
            ways.push(Way { name: format!("TCP {family} {what}"), hook, packets, action: DROP });
        }
    }
    ways
}

/// Learns the ports that local backends reply from, as traffic would.
pub fn learn(node: &mut Node) {
    for (_, client, address, _) in FAMILIES {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for port in [HERE, ELSEWHERE] {
                Opening { client, node: address, port, protocol, packets: 2, next_port: CLIENT_PORTS.start }.make(node);
            }
        }
    }
}
