//! Ways of packets of known flows. The kernel runs a program again on what the last run left of the packet, so these
//! flows come in pairs that lead to each other: each run finds a flow and changes every address, port and checksum.

use kubelane::abi::flow_flag::{FLOW_PROVED, FLOW_REPLY};
use kubelane::abi::flow_path::PATH_ROUTED;
use kubelane::bpf::Direction;
use kubelane::model::Protocol;

use crate::laboratory::packets::errors::error;
use crate::laboratory::packets::frame::{ACK, FIN, Frame, tcp, udp};
use crate::laboratory::packets::{Node, PASS, REDIRECT, ends};
use crate::measure::{Packets, Way};
use crate::ways::{bare, ethernet, marked, pod};

/// Who takes part: a client outside, a service address, a pod; all pass the filters (see [`Node::pass`]).
#[derive(Clone, Copy)]
pub struct Party {
    pub family: &'static str,
    pub client: &'static str,
    pub service: &'static str,
    pub local: &'static str,
}

/// Proved flows that turn each frame into the other. `state`: FLOW_REPLY, if the frames are a backend's, and PATH_ROUTED.
fn remember(node: &Node, frames: &[Frame; 2], protocol: Protocol, state: u32) {
    let [one, other] = [&frames[0], &frames[1]].map(ends);
    for (from, to) in [(one, other), (other, one)] {
        let (request, becomes) = if state & FLOW_REPLY != 0 { (to.reversed(), from.reversed()) } else { (from, to) };
        node.flow(protocol, request, becomes, FLOW_PROVED | state & PATH_ROUTED);
    }
}

fn again(frame: &Frame) -> Packets {
    Packets::Same(frame.clone().living(255).bytes())
}

/// Requests and replies, to and from backends here and elsewhere.
pub fn ways(node: &Node, party: Party, protocol: Protocol) -> Vec<Way> {
    let Party { family, client, service, local } = party;
    let packet = |from, to| match protocol {
        Protocol::Tcp => tcp(from, to, ACK).carrying(100),
        _ => udp(from, to, &[0; 100]),
    };
    let request = [packet((client, 5000), (service, 80)), packet((client, 5000), (local, 8080))];
    let reply = [packet((local, 8080), (client, 5000)), packet((service, 80), (client, 5000))];
    // All are routed by the uplink: one route, one neighbour.
    let forth = [packet((client, 5002), (service, 80)), packet((local, 2000), (client, 8080))];
    let back = [packet((local, 8080), (service, 2000)), packet((service, 80), (client, 5001))];
    for (pair, kind) in [(&request, 0), (&reply, FLOW_REPLY), (&forth, PATH_ROUTED), (&back, FLOW_REPLY | PATH_ROUTED)]
    {
        remember(node, pair, protocol, kind);
    }
    let uplink = node.uplink;
    let way = |what: &str, hook, frame: &Frame, action| Way {
        name: format!("{} {family} {what}", protocol.as_str()),
        hook,
        packets: again(frame),
        action,
    };
    let (incoming, leaving) = (ethernet(Direction::In, uplink), ethernet(Direction::Out, uplink));
    // The route of a marked packet is asked for each time; others remember the last one's.
    let routed = marked(Direction::In, uplink);
    vec![
        way("to a local backend", incoming, &request[0], PASS),
        way("from a pod to a backend", pod(), &request[0], PASS),
        way("reply of a local backend", leaving, &reply[0], PASS),
        way("to a remote backend", incoming, &forth[0], REDIRECT),
        way("to a remote backend, route asked for", routed, &forth[0], REDIRECT),
        way("reply of a remote backend", incoming, &back[0], REDIRECT),
        way("reply of a remote backend, route asked for", routed, &back[0], REDIRECT),
    ]
}

/// The end of a connection, and ICMP errors about packets of the flows of [`ways`] for TCP.
pub fn rare_ways(node: &Node, party: Party) -> Vec<Way> {
    let Party { family, client, service, local } = party;
    let closing = [tcp((client, 5003), (service, 80), FIN | ACK), tcp((client, 5003), (local, 8080), FIN | ACK)];
    remember(node, &closing, Protocol::Tcp, 0);
    let uplink = node.uplink;
    let (incoming, leaving) = (ethernet(Direction::In, uplink), ethernet(Direction::Out, uplink));
    let router = if family == "IPv4" { "198.51.100.1" } else { "2001:db8::1" };
    let quoted = |from, to| tcp(from, to, ACK).carrying(100);
    let about_reply = |port| error(router, &quoted((service, 80), (client, port)), 60, 1400);
    let about_request = error(local, &quoted((client, 5000), (local, 8080)), 60, 1400);
    [
        (format!("TCP {family} to a local backend, closing"), incoming, &closing[0], PASS),
        (format!("ICMP {family} error to a local backend"), incoming, &about_reply(5000), PASS),
        (format!("ICMP {family} error to a remote backend"), incoming, &about_reply(5002), REDIRECT),
        (format!("ICMP {family} error of a local backend"), leaving, &about_request, PASS),
    ]
    .map(|(name, hook, frame, action)| Way { name, hook, packets: again(frame), action })
    .into()
}

/// A datagram in two pieces to a local backend. The first one leaves the ports for the other, at each end of the pair.
pub fn fragments(node: &mut Node, party: Party) -> Vec<Way> {
    let Party { family, client, service, local } = party;
    let pieces = |to| udp((client, 5000), to, &[0; 1000]).fragments(504, 77);
    for to in [(service, 80), (local, 8080)] {
        assert_eq!(node.uplink_in(&pieces(to)[0]).0, PASS);
    }
    let hook = ethernet(Direction::In, node.uplink);
    let way = |what, frame| Way {
        name: format!("UDP {family} to a local backend, {what} piece of a datagram"),
        hook,
        packets: again(frame),
        action: PASS,
    };
    let pieces = pieces((service, 80));
    vec![way("first", &pieces[0]), way("later", &pieces[1])]
}

/// Devices without link headers. Addresses are as [`kubelane::bpf::run::run_bare`] needs them, of the client and of the
/// pod.
pub fn bare_ways(node: &Node, party: Party) -> Vec<Way> {
    let Party { family, client, service, local } = party;
    let packet = |from, to| tcp(from, to, ACK).carrying(100);
    let request = [packet((client, 5000), (service, 80)), packet((client, 5000), (local, 8080))];
    let reply = [packet((local, 8080), (client, 5000)), packet((service, 80), (client, 5000))];
    let forth = [packet((client, 5002), (service, 80)), packet((local, 2000), (client, 8080))];
    remember(node, &request, Protocol::Tcp, 0);
    remember(node, &reply, Protocol::Tcp, FLOW_REPLY);
    remember(node, &forth, Protocol::Tcp, PATH_ROUTED);
    let uplink = node.uplink;
    let way = |what: &str, direction, packets, action| Way {
        name: format!("bare device, {what}, {family}"),
        hook: bare(direction, uplink),
        packets,
        action,
    };
    let same = |frame: &Frame| Packets::Same(frame.clone().living(255).packet());
    let elsewhere = if family == "IPv4" { "10.9.9.9" } else { "2001:db8:9::9" };
    let unrelated = tcp((client, 5000), (elsewhere, 443), ACK);
    let forwarded = forth[0].packet();
    vec![
        way("unrelated, ingress", Direction::In, same(&unrelated), PASS),
        way("unrelated, egress", Direction::Out, same(&unrelated), PASS),
        way("TCP to a local backend", Direction::In, same(&request[0]), PASS),
        way("TCP reply of a local backend", Direction::Out, same(&reply[0]), PASS),
        // It is given a link header, so that there is no second run.
        way("TCP to a remote backend", Direction::In, Packets::Fresh(Box::new(move |_| forwarded.clone())), REDIRECT),
    ]
}
