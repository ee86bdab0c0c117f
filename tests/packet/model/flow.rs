//! Flows that the programs must know of, and what their packets look like on either side.

use std::collections::BTreeMap;

use kubelane::model::{Family, Ipx, Protocol};

use super::random_cluster::{GATEWAY4, GATEWAY6, ip};
use super::semantics::{Asked, PortId, Target};
use crate::laboratory::packets::frame::{Frame, Inside};
use crate::laboratory::packets::{NODE4, NODE6, PASS, REDIRECT, TUNNEL4, TUNNEL6};

/// The backends' first sequence number, and the clients'.
pub const BACKEND_SEQUENCE: u32 = 7000;
pub const CLIENT_SEQUENCE: u32 = 1000;

pub type End = (Ipx, u16);
pub type Counted = BTreeMap<&'static str, u64>;

/// By which device a client's packets come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Entry {
    Uplink,
    /// From a host behind it.
    Tunnel,
    /// The one of this node's pods: the client is one of them.
    Pod,
}

/// Who asks what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Request {
    pub client: End,
    pub to: End,
    pub protocol: Protocol,
    pub entry: Entry,
}

impl Request {
    pub fn is_tcp(&self) -> bool {
        self.protocol == Protocol::Tcp
    }

    pub fn is_of_pod(&self) -> bool {
        self.entry == Entry::Pod
    }

    pub fn asked(&self, is_reset: bool) -> Asked {
        let (to, number) = self.to;
        Asked { client: self.client.0, to, number, protocol: self.protocol, from_pod: self.is_of_pod(), is_reset }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The backend has not answered.
    Opening,
    /// Both ends were heard twice.
    Open,
    /// TCP: both have sent a FIN. The one who was first keeps the connection in TIME_WAIT.
    Closed { client_first: bool },
}

/// How packets go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By the host's stack, which knows the route to a pod here, and from a pod of this node to wherever.
    Stack,
    /// Straight to the next hop.
    Routed,
    /// Back by the pods' device: the pod has asked for itself.
    Back,
}

/// A flow that the programs must know of.
#[derive(Clone, Debug)]
pub struct Flow {
    pub request: Request,
    pub port: PortId,
    pub target: Target,
    /// The Service port had session affinity when the flow began.
    pub affine: bool,
    /// What the backend sees as its client.
    pub seen: End,
    pub stage: Stage,
    /// The backend was not to be had for a while, or is not now.
    pub left: bool,
}

impl Flow {
    pub fn is_to_itself(&self) -> bool {
        self.target.ip == self.request.client.0
    }

    pub fn way(&self) -> Way {
        match (self.request.entry, self.target.local) {
            (Entry::Pod, _) if self.is_to_itself() => Way::Back,
            (Entry::Pod, _) | (_, true) => Way::Stack,
            (_, false) => Way::Routed,
        }
    }

    /// Whose replies they are, and to whom: no other flow may have the same.
    pub fn place(&self) -> (End, End, Protocol) {
        (self.target.end(), self.seen, self.request.protocol)
    }
}

/// A packet, and what the programs made of it.
pub struct Passage {
    pub frame: Frame,
    pub action: i32,
    pub seen: Frame,
    pub counted: Counted,
}

pub fn packet(protocol: Protocol, from: End, to: End, flags: u8, bytes: usize) -> Frame {
    let ports = (from.1, to.1);
    let data = vec![bytes as u8; bytes];
    let inside = match protocol {
        Protocol::Tcp => Inside::Tcp { ports, flags, sequence: CLIENT_SEQUENCE, acknowledgement: 0, data },
        Protocol::Udp => Inside::Udp { ports, checked: true, data },
        Protocol::Sctp => Inside::Sctp { ports, tag: 1, data },
    };
    Frame { source: from.0.to_ip(), destination: to.0.to_ip(), ttl: 61, inside }
}

/// The node's own address towards a backend elsewhere: the route decides.
fn near_address(backend: Ipx) -> Ipx {
    let text = backend.to_string();
    match backend.family() {
        Family::Ipv4 => ip(if text.starts_with("10.244.") { TUNNEL4 } else { NODE4 }),
        Family::Ipv6 => ip(if text.starts_with("fd44:") { TUNNEL6 } else { NODE6 }),
    }
}

/// Whom the backend sees. Of a pod: its client, wherever the backend is. Of a client outside: its client, or, if the backend is
/// elsewhere, this node. A pod that asks for itself would answer to itself: it sees this node, or, where it has come back to
/// itself from outside, the Service.
pub fn seen_address(request: &Request, target: &Target) -> Ipx {
    let is_to_itself = target.ip == request.client.0;
    match (request.entry, target.local) {
        (Entry::Pod, _) if is_to_itself => ip(if target.ip.family() == Family::Ipv4 { GATEWAY4 } else { GATEWAY6 }),
        (Entry::Pod, _) => request.client.0,
        (_, true) if is_to_itself => request.to.0,
        (_, true) => request.client.0,
        (_, false) => near_address(target.ip),
    }
}

/// The packet came out with these ends and nothing else changed, but that one which is forwarded here has a hop less.
pub fn assert_passed(flow: &Flow, what: &str, passage: &Passage, from: End, to: End) {
    let wanted = passage.frame.with_ends((&from.0.to_string(), from.1), (&to.0.to_string(), to.1));
    let wanted = match flow.way() {
        Way::Stack => (PASS, &wanted),
        Way::Routed => (REDIRECT, &wanted.living(60)),
        Way::Back => (REDIRECT, &wanted),
    };
    assert_eq!((passage.action, &passage.seen), wanted, "{what} of {flow:?}");
}

/// Port unreachable, from the address that was asked, quoting the packet as it came.
pub fn assert_refusal(passage: &Passage) {
    let Passage { frame, action, seen, .. } = passage;
    assert_eq!((*action, seen.source, seen.destination), (REDIRECT, frame.destination, frame.source));
    let Inside::Icmp { kind, code, data, .. } = &seen.inside else { panic!("no ICMP: {seen:?}") };
    assert_eq!((*kind, *code), if frame.source.is_ipv4() { (3, 3) } else { (1, 4) });
    let packet = frame.packet();
    assert!(data.len() >= packet.len().min(96) && packet.starts_with(data), "quoted as it came");
}
