//! `cleanup`: connections that go through the packet programs are handed over to netfilter's connection tracking
//! (ctnetlink), with their translation. So they go on when the programs are gone, by the rules of whoever serves Services
//! then.
//!
//! A row of requests is what netfilter keeps: the ends that the client sends to, and what they become. What it would have
//! learnt from the packets before is not known: it is told to take any sequence number (IP_CT_TCP_FLAG_BE_LIBERAL).
//!
//! From then until the programs are gone, a request that they translate would be a second connection with the same answers
//! to netfilter, which gives it another source port, so that the backend answers with a reset. So the flow is stopped first
//! (FLOW_ENDING, which nobody follows up): its requests are dropped, and clients send them again. Answers pass, but for
//! those that go through the host's stack (stack.h), which are sent again, too.
//!
//! [`take_back`] undoes all that for a daemon that starts after a cleanup which did not come to its end.
//!
//! Cost: a row, a message and an answer for each flow, and three more where netfilter has tracked the translated packets.

use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context as _, Result};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessageType, IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple, Status, Tuple,
};
use netlink_packet_netfilter::{NetfilterMessage, NetfilterProtoFamily};
use nix::time::{ClockId, clock_gettime};
use rtnetlink::packet_core::{
    DefaultNla, Emitable as _, NLA_F_NESTED, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NetlinkMessage, NetlinkPayload, Nla,
};

use super::ctnetlink::{Conntrack, request};
use super::read::PinnedMap;
use super::{pinned, tracked};
use crate::abi::flow_flag::{FLOW_ENDING, FLOW_FIN, FLOW_PROVED, FLOW_REPLY, FLOW_RESET, FLOW_SHADOWED};
use crate::abi::flow_limits_of::FLOW_LIMITS_SET;
use crate::abi::flow_state::FLOW_SECOND_MASK;
use crate::abi::{Backend, Ends, Flow, FlowKey, FlowKey4, FlowLimits};
use crate::model::{Family, Ipx, Protocol};
use crate::table::HashMap;

/// Of linux/netfilter/nfnetlink_conntrack.h.
const CTA_NAT_SRC: u16 = 6;
const CTA_NAT_DST: u16 = 13;
const CTA_NAT_V4_MINIP: u16 = 1;
const CTA_NAT_V6_MINIP: u16 = 4;
const CTA_NAT_PROTO: u16 = 3;
const CTA_PROTONAT_PORT_MIN: u16 = 1;
const CTA_PROTONAT_PORT_MAX: u16 = 2;
const CTA_PROTOINFO_TCP_FLAGS_ORIGINAL: u16 = 4;
const CTA_PROTOINFO_TCP_FLAGS_REPLY: u16 = 5;
/// Of linux/netfilter/nf_conntrack_tcp.h.
const TCP_CONNTRACK_ESTABLISHED: u8 = 3;
const IP_CT_TCP_FLAG_BE_LIBERAL: u8 = 8;

const MESSAGES_AT_ONCE: usize = 32;

/// What has become of connections that went through the packet programs.
#[derive(Debug, Default)]
pub struct HandedOver {
    /// How many go on.
    pub connections: usize,
    /// Those that end.
    pub lost: Vec<Lost>,
}

impl fmt::Display for HandedOver {
    /// Lines for whoever cleans up.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 20;
        if self.connections > 0 {
            writeln!(f, "handed {} connections over to netfilter's connection tracking", self.connections)?;
        }
        self.lost.iter().take(SHOWN).try_for_each(|lost| writeln!(f, "a connection ends: {lost}"))?;
        match self.lost.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => writeln!(f, "{more} connections more end"),
        }
    }
}

/// A connection that could not be handed over.
#[derive(Debug)]
pub struct Lost {
    key: FlowKey,
    why: String,
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ends { source, destination, source_port_be, destination_port_be } = self.key.ends;
        let at = |ip, port_be| SocketAddr::new(Ipx(ip).to_ip(), u16::from_be_bytes(port_be));
        let (from, to) = (at(source, source_port_be), at(destination, destination_port_be));
        let protocol = Protocol::of_number(self.key.protocol).map_or("?", Protocol::as_str);
        write!(f, "{protocol} from {from} to {to}: {}", self.why)
    }
}

/// The flows of a node. Their maps are held, so that they can be read when they are pinned no more.
pub(super) struct HandOver {
    flows4: PinnedMap,
    flows6: PinnedMap,
    backends: PinnedMap,
    limits: FlowLimits,
    /// Netfilter tracks connections in this network namespace.
    is_tracked: bool,
    /// What netfilter has of earlier passes, and what their ends become.
    handed: HashMap<FlowKey, Ends>,
    /// As of the last pass.
    lost: Vec<Lost>,
}

/// What becomes of a flow when the programs go.
enum Prospect {
    /// It has ended, or begins anew, with them as without.
    Ends,
    /// For so many seconds of silence more.
    GoesOn(u32),
    Lost(&'static str),
}

/// A flow that is to be handed over.
#[derive(Clone, Copy)]
struct Wanted {
    key: FlowKey,
    flow: Flow,
    /// Seconds.
    timeout: u32,
}

impl HandOver {
    /// # Errors
    /// When a map is missing or cannot be opened.
    pub fn open(pin_path: &Path) -> Result<HandOver> {
        let open = |name| PinnedMap::open(pin_path, name);
        let limits = open("flow_limits")?.get(&FLOW_LIMITS_SET)?.context("flow_limits is empty")?;
        Ok(HandOver {
            flows4: open("flows4")?,
            flows6: open("flows6")?,
            backends: open("backends")?,
            limits,
            is_tracked: fs::exists(tracked::COUNT).unwrap_or(false),
            handed: HashMap::default(),
            lost: Vec::new(),
        })
    }

    /// Hands over what no earlier pass has, and takes back what has ended since: one pass is made before the programs go,
    /// and one after that.
    ///
    /// # Errors
    /// When a map cannot be read, or netfilter cannot be asked.
    pub fn pass(&mut self) -> Result<()> {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("cannot read the clock")?;
        let second = now.tv_sec() as u32 & FLOW_SECOND_MASK;
        self.lost.clear();
        let mut wanted = HashMap::default();
        for (key, flow) in self.established()? {
            match self.prospect(&key, &flow, second)? {
                Prospect::Ends => {}
                Prospect::GoesOn(timeout) => {
                    wanted.insert(key, Wanted { key, flow, timeout });
                }
                Prospect::Lost(why) => self.lost.push(Lost { key, why: why.to_owned() }),
            }
        }
        let is_as_it_was = |key: &FlowKey, ends: &Ends| wanted.get(key).is_some_and(|now| now.flow.ends == *ends);
        let gone: Vec<_> =
            self.handed.iter().filter(|(key, ends)| !is_as_it_was(key, ends)).map(|(key, _)| *key).collect();
        let is_news = |key: &FlowKey| !self.handed.contains_key(key);
        if gone.is_empty() && !wanted.keys().any(is_news) {
            return Ok(());
        }
        let mut conntrack = Conntrack::open()?;
        for some in gone.chunks(MESSAGES_AT_ONCE) {
            forget(&conntrack, some.iter().map(|key| (key.ends, key.protocol)).collect())?;
            for key in some {
                self.handed.remove(key);
            }
        }
        wanted.retain(|key, _| !self.handed.contains_key(key));
        let wanted: Vec<Wanted> = wanted.into_values().collect();
        for some in wanted.chunks(MESSAGES_AT_ONCE) {
            let mut stopped = Vec::new();
            for one in some {
                // Another flow may have taken its place since it was read: that is the next pass'.
                if self.stop(&one.key, &one.flow.ends, true)? {
                    stopped.push(*one);
                }
            }
            let results = match hand(&conntrack, &stopped) {
                Ok(results) => results,
                Err(error) => {
                    // What it has not said yet would be taken for answers to the next.
                    conntrack = Conntrack::open()?;
                    stopped.iter().map(|_| Err(io::Error::other(format!("{error:#}")))).collect()
                }
            };
            for (one, result) in stopped.iter().zip(results) {
                match result {
                    Ok(()) => {
                        self.handed.insert(one.key, one.flow.ends);
                    }
                    Err(error) => {
                        self.stop(&one.key, &one.flow.ends, false)?;
                        self.lost.push(Lost { key: one.key, why: format!("netfilter: {error}") });
                    }
                }
            }
        }
        Ok(())
    }

    pub fn outcome(self) -> HandedOver {
        HandedOver { connections: self.handed.len(), lost: self.lost }
    }

    /// Whether requests of the flow that becomes `ends` are dropped, or not any more. Answers whether it is still there.
    fn stop(&self, key: &FlowKey, ends: &Ends, stops: bool) -> Result<bool> {
        let Some(flow) = self.row(key)?.filter(|flow| flow.ends == *ends) else { return Ok(false) };
        let state = if stops { flow.state | FLOW_ENDING } else { flow.state & !FLOW_ENDING };
        let row = Flow { state, ..flow };
        match Ipx(key.ends.destination).family() {
            Family::Ipv4 => self.flows4.replace(&FlowKey4::from(*key), &row)?,
            Family::Ipv6 => self.flows6.replace(key, &row)?,
        }
        Ok(true)
    }

    /// Rows of requests of flows that both ends take part in.
    fn established(&self) -> Result<Vec<(FlowKey, Flow)>> {
        let mut flows = Vec::new();
        let mut meet = |key: FlowKey, flow: Flow| -> Result<()> {
            let is_open = flow.has(FLOW_PROVED) && !flow.has(FLOW_REPLY | FLOW_RESET);
            // A row that a packet changed while it was read is left to the next pass.
            let is_whole = flow.change == Flow::change_of(&key.ends, &flow.ends);
            if is_open && is_whole {
                flows.push((key, flow));
            }
            Ok(())
        };
        self.flows4.each(|key: FlowKey4, flow: Flow| meet(key.into(), flow))?;
        self.flows6.each(&mut meet)?;
        Ok(flows)
    }

    fn prospect(&self, key: &FlowKey, flow: &Flow, second: u32) -> Result<Prospect> {
        let Some(reply) = self.reply_of(key, flow)? else { return Ok(Prospect::Ends) };
        let protocol = Protocol::of_number(key.protocol);
        let limit = match protocol {
            Some(Protocol::Tcp) if flow.has(FLOW_FIN) || reply.has(FLOW_FIN) => self.limits.tcp_half_closed,
            Some(Protocol::Tcp) => self.limits.tcp_established,
            _ => self.limits.udp_stream,
        };
        let idle = flow.idle(second).min(reply.idle(second));
        Ok(match protocol {
            // Nobody has collected it, because there is no daemon.
            _ if idle >= limit => Prospect::Ends,
            Some(Protocol::Tcp) if flow.has(FLOW_FIN) && reply.has(FLOW_FIN) => Prospect::Ends,
            // Datagrams find another backend when theirs has gone.
            Some(Protocol::Udp) if !self.has_backend(flow)? => Prospect::Ends,
            Some(Protocol::Tcp | Protocol::Udp) if !self.is_tracked => {
                Prospect::Lost("netfilter tracks no connections in this network namespace")
            }
            Some(Protocol::Tcp) if reply.has(FLOW_SHADOWED) => {
                Prospect::Lost("its client has a connection to the endpoint itself from the same port")
            }
            Some(Protocol::Tcp | Protocol::Udp) => Prospect::GoesOn(limit - idle),
            _ => Prospect::Lost("netfilter takes over no SCTP"),
        })
    }

    fn has_backend(&self, flow: &Flow) -> Result<bool> {
        let backend = self.backends.get::<u32, Backend>(&flow.backend_or_first)?;
        Ok(backend.is_some_and(|backend| backend.generation == flow.generation_or_interface))
    }

    fn reply_of(&self, key: &FlowKey, flow: &Flow) -> Result<Option<Flow>> {
        self.row(&FlowKey { ends: flow.ends.reversed(), ..*key })
    }

    fn row(&self, key: &FlowKey) -> Result<Option<Flow>> {
        match Ipx(key.ends.destination).family() {
            Family::Ipv4 => self.flows4.get(&FlowKey4::from(*key)),
            Family::Ipv6 => self.flows6.get(key),
        }
    }
}

/// Takes from netfilter what a cleanup that did not come to its end has handed over: the programs serve it again, and
/// their packets would have two connections there. Returns how many there were.
///
/// # Errors
/// When a map cannot be read, or netfilter cannot be asked; the next call does it again.
pub fn take_back(pin_path: &Path) -> Result<usize> {
    let mark = pinned::handing_over(pin_path);
    if !mark.exists() {
        return Ok(0);
    }
    let flows = HandOver::open(pin_path)?;
    let conntrack = Conntrack::open()?;
    let mut taken = 0;
    for some in flows.established()?.chunks(MESSAGES_AT_ONCE) {
        let results = forget(&conntrack, some.iter().map(|(key, _)| (key.ends, key.protocol)).collect())?;
        taken += results.iter().filter(|result| result.is_ok()).count();
        for (key, flow) in some.iter().filter(|(_, flow)| flow.has(FLOW_ENDING)) {
            flows.stop(key, &flow.ends, false)?;
        }
    }
    fs::remove_dir(&mark).with_context(|| format!("cannot remove {}", mark.display()))?;
    Ok(taken)
}

/// What netfilter said of each.
fn hand(conntrack: &Conntrack, flows: &[Wanted]) -> Result<Vec<io::Result<()>>> {
    let is_taken = |result: &io::Result<()>| matches!(result, Err(e) if e.raw_os_error() == Some(libc::EEXIST));
    let mut results = create(conntrack, flows)?;
    let taken: Vec<usize> = (0..flows.len()).filter(|place| is_taken(&results[*place])).collect();
    if !taken.is_empty() {
        // What netfilter has made of their packets while the programs translated them.
        let again: Vec<Wanted> = taken.iter().map(|place| flows[*place]).collect();
        let ends = |one: &Wanted| [one.key.ends, one.flow.ends.reversed()].map(|ends| (ends, one.key.protocol));
        forget(conntrack, again.iter().flat_map(ends).collect())?;
        for (place, result) in taken.into_iter().zip(create(conntrack, &again)?) {
            results[place] = result;
        }
    }
    Ok(results)
}

fn create(conntrack: &Conntrack, flows: &[Wanted]) -> Result<Vec<io::Result<()>>> {
    let message = |one: &Wanted| {
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        request(ConntrackMessageType::New, family_of(&one.key.ends), flags, connection(one))
    };
    ask(conntrack, flows.iter().map(message).collect())
}

/// Drops the connections of packets with these ends and this protocol. An error of one: there is none.
fn forget(conntrack: &Conntrack, ends: Vec<(Ends, u8)>) -> Result<Vec<io::Result<()>>> {
    let message = |(ends, protocol): &(Ends, u8)| {
        let tuple = ConntrackAttribute::CtaTupleOrig(tuple(ends, *protocol));
        request(ConntrackMessageType::Delete, family_of(ends), NLM_F_ACK, vec![attribute(&tuple)])
    };
    ask(conntrack, ends.iter().map(message).collect())
}

/// Answers what was acknowledged, in the messages' order.
fn ask(conntrack: &Conntrack, messages: Vec<NetlinkMessage<NetfilterMessage>>) -> Result<Vec<io::Result<()>>> {
    let mut results: Vec<Option<io::Result<()>>> = messages.iter().map(|_| None).collect();
    conntrack.send(messages)?;
    while results.iter().any(Option::is_none) {
        for message in conntrack.receive()? {
            if let NetlinkPayload::Error(error) = message.payload
                && let Some(result) = results.get_mut(message.header.sequence_number as usize)
            {
                *result = Some(if error.code.is_none() { Ok(()) } else { Err(error.to_io()) });
            }
        }
    }
    Ok(results.into_iter().flatten().collect())
}

fn family_of(ends: &Ends) -> NetfilterProtoFamily {
    match Ipx(ends.destination).family() {
        Family::Ipv4 => NetfilterProtoFamily::IPv4,
        Family::Ipv6 => NetfilterProtoFamily::IPv6,
    }
}

/// A connection as netfilter keeps it: ends as its client sends them, their reverse, and what they become.
fn connection(Wanted { key, flow, timeout }: &Wanted) -> Vec<DefaultNla> {
    let is_tcp = Protocol::of_number(key.protocol) == Some(Protocol::Tcp);
    let mut attributes = vec![
        attribute(&ConntrackAttribute::CtaTupleOrig(tuple(&key.ends, key.protocol))),
        attribute(&ConntrackAttribute::CtaTupleReply(tuple(&key.ends.reversed(), key.protocol))),
        attribute(&ConntrackAttribute::CtaStatus(Status::Confirmed | Status::SeenReply | Status::Assured)),
        attribute(&ConntrackAttribute::CtaTimeout(*timeout)),
    ];
    if is_tcp {
        // Flags, and a mask of those meant.
        let any_sequence = |kind| ProtoInfoTCP::Other(DefaultNla::new(kind, vec![IP_CT_TCP_FLAG_BE_LIBERAL; 2]));
        attributes.push(attribute(&ConntrackAttribute::CtaProtoInfo(vec![ProtoInfo::TCP(vec![
            ProtoInfoTCP::State(TCP_CONNTRACK_ESTABLISHED),
            any_sequence(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL),
            any_sequence(CTA_PROTOINFO_TCP_FLAGS_REPLY),
        ])])));
    }
    let to = &flow.ends;
    attributes.push(translation(CTA_NAT_DST, to.destination, to.destination_port_be));
    // Also where it stays: netfilter would choose another port instead of saying that this one is taken.
    attributes.push(translation(CTA_NAT_SRC, to.source, to.source_port_be));
    attributes
}

fn translation(kind: u16, address: [u8; 16], port_be: [u8; 2]) -> DefaultNla {
    let ports = [CTA_PROTONAT_PORT_MIN, CTA_PROTONAT_PORT_MAX].map(|kind| DefaultNla::new(kind, port_be.to_vec()));
    let address = match Ipx(address).to_ip4() {
        Some(ip) => DefaultNla::new(CTA_NAT_V4_MINIP, ip.octets().to_vec()),
        None => DefaultNla::new(CTA_NAT_V6_MINIP, address.to_vec()),
    };
    let ports = DefaultNla::new(CTA_NAT_PROTO | NLA_F_NESTED, bytes_of(&ports));
    DefaultNla::new(kind | NLA_F_NESTED, bytes_of(&[address, ports]))
}

fn bytes_of(attributes: &[DefaultNla]) -> Vec<u8> {
    let mut bytes = vec![0; attributes.iter().map(|attribute| attribute.buffer_len()).sum()];
    let mut rest = &mut bytes[..];
    for attribute in attributes {
        attribute.emit(rest);
        rest = &mut rest[attribute.buffer_len()..];
    }
    bytes
}

fn attribute(attribute: &ConntrackAttribute) -> DefaultNla {
    let mut value = vec![0; attribute.value_len()];
    attribute.emit_value(&mut value);
    let nested = if attribute.is_nested() { NLA_F_NESTED } else { 0 };
    DefaultNla::new(attribute.kind() | nested, value)
}

fn tuple(ends: &Ends, protocol: u8) -> Vec<Tuple> {
    let (source, destination) = (Ipx(ends.source).to_ip(), Ipx(ends.destination).to_ip());
    vec![
        Tuple::Ip(vec![IPTuple::SourceAddress(source), IPTuple::DestinationAddress(destination)]),
        Tuple::Proto(vec![
            ProtoTuple::Protocol(protocol.into()),
            ProtoTuple::SourcePort(u16::from_be_bytes(ends.source_port_be)),
            ProtoTuple::DestinationPort(u16::from_be_bytes(ends.destination_port_be)),
        ]),
    ]
}
