//! Every way through the packet programs that is measured, on one node.

use kubelane::bpf::{Direction, LinkLayer};
use kubelane::model::Protocol;

use crate::established::{self, Party};
use crate::first;
use crate::laboratory::packets::frame::{ACK, tcp, udp};
use crate::laboratory::packets::{
    CLIENT4, CLIENT6, LOCAL4, LOCAL6, NODE4, NODE6, Node, PASS, PODS, VIP4, VIP6, interface_index,
};
use crate::measure::{Hook, Packets, Way};

const PARTIES: [Party; 2] = [
    Party { family: "IPv4", client: CLIENT4, service: VIP4, local: LOCAL4 },
    Party { family: "IPv6", client: CLIENT6, service: VIP6, local: LOCAL6 },
];
/// Source addresses with the number of a protocol in them; see [`kubelane::bpf::run::run_bare`].
const BARE_PARTIES: [Party; 2] = [
    Party { family: "IPv4", client: "8.0.0.7", service: VIP4, local: "8.0.0.5" },
    Party { family: "IPv6", client: "2001:db8:86dd::7", service: VIP6, local: "2001:db8:86dd::5" },
];

pub fn ethernet(direction: Direction, interface: u32) -> Hook {
    Hook { direction, link_layer: LinkLayer::Ethernet, interface, mark: 0, is_pods: false }
}

pub fn marked(direction: Direction, interface: u32) -> Hook {
    Hook { mark: 1, ..ethernet(direction, interface) }
}

pub fn bare(direction: Direction, interface: u32) -> Hook {
    Hook { link_layer: LinkLayer::None, ..ethernet(direction, interface) }
}

/// What comes in from a pod.
pub fn pod() -> Hook {
    Hook { is_pods: true, ..ethernet(Direction::In, interface_index(PODS)) }
}

/// All of them, with the rows that they need written.
pub fn all(node: &mut Node) -> Vec<Way> {
    let first = first::ways(node);
    first::learn(node);
    for party in PARTIES.iter().chain(&BARE_PARTIES) {
        node.pass(&[party.client, party.local, party.service], &[80, 2000, 5001, 8080]);
    }
    let mut ways = unrelated(node);
    for party in PARTIES {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            ways.extend(established::ways(node, party, protocol));
        }
        ways.extend(established::rare_ways(node, party));
        ways.extend(established::fragments(node, party));
    }
    ways.extend(first);
    for party in BARE_PARTIES {
        ways.extend(established::bare_ways(node, party));
    }
    ways
}

fn unrelated(node: &Node) -> Vec<Way> {
    let mut arp = tcp((CLIENT4, 5000), ("10.9.9.9", 443), ACK).bytes();
    arp[12..14].copy_from_slice(&[0x08, 0x06]);
    let way = |what: &str, direction, packet| Way {
        name: what.to_owned(),
        hook: ethernet(direction, node.uplink),
        packets: Packets::Same(packet),
        action: PASS,
    };
    let mut ways = vec![way("not IP, ingress", Direction::In, arp.clone()), way("not IP, egress", Direction::Out, arp)];
    ways.extend(
        [
            ("address not ours, IPv4, ingress", Direction::In, tcp((CLIENT4, 5000), ("10.9.9.9", 443), ACK)),
            ("address not ours, IPv6, ingress", Direction::In, tcp((CLIENT6, 5000), ("2001:db8:9::9", 443), ACK)),
            ("to the node (VXLAN, ssh), ingress", Direction::In, udp((CLIENT4, 5000), (NODE4, 8472), &[0; 100])),
            ("IPv4, egress", Direction::Out, tcp((NODE4, 40_000), (CLIENT4, 443), ACK)),
            ("from a busy backend's port, egress", Direction::Out, tcp(("10.1.0.77", 8080), (CLIENT4, 443), ACK)),
            ("IPv6, egress", Direction::Out, tcp((NODE6, 40_000), (CLIENT6, 443), ACK)),
        ]
        .map(|(what, direction, frame)| way(&format!("unrelated, {what}"), direction, frame.bytes())),
    );
    let from_pod = [("IPv4", CLIENT4, "10.9.9.9"), ("IPv6", CLIENT6, "2001:db8:9::9")];
    ways.extend(from_pod.map(|(family, from, to)| Way {
        name: format!("unrelated, {family}, from a pod"),
        hook: pod(),
        packets: Packets::Same(tcp((from, 5000), (to, 443), ACK).bytes()),
        action: PASS,
    }));
    ways
}
