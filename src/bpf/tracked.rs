//! Connections that netfilter tracks (ctnetlink) and that are older than the Service which their packets seem to ask for:
//! their packets belong to the host's stack, which translates them. `bpf/owner.h` sees what leaves from a served port;
//! this is for what left before the port was served.
//!
//!   - A masqueraded connection whose source port is served from now on: its answers come in by that port.
//!   - A TCP connection that kube-proxy, or a CNI plugin for host ports, has translated: the rest of its packets.
//!
//! Cost: one dump of the table for each port that the daemon serves for the first time. Where they are few the kernel filters it.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context, Result, bail};
use libbpf_rs::{ErrorKind, MapCore, MapFlags, MapHandle};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, ConntrackMessageType, IPTuple, ProtoTuple, Protocol, Tuple,
};
use netlink_packet_netfilter::{NetfilterMessageInner, NetfilterProtoFamily};
use rtnetlink::packet_core::{DefaultNla, NLA_F_NESTED, NLM_F_DUMP, NetlinkPayload, Nla};

use super::ctnetlink::{Conntrack, request};
use super::pinned;
use crate::abi::{Ends, FlowKey};
use crate::model::Ipx;

/// Connections that are tracked in the network namespace of whoever reads it. Missing where nothing is tracked: then the
/// question alone would load the module.
pub(super) const COUNT: &str = "/proc/sys/net/netfilter/nf_conntrack_count";
/// With more new ports than this the whole table is read once.
const PORTS_ASKED_FOR: usize = 4;
const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
const FAMILIES: [NetfilterProtoFamily; 2] = [NetfilterProtoFamily::IPv4, NetfilterProtoFamily::IPv6];
/// CTA_FILTER of linux/netfilter/nfnetlink_conntrack.h (5.8), and what is in it.
const CTA_FILTER: u16 = 25;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
/// Protocol and destination port are compared (net/netfilter/nf_internals.h).
const PROTOCOL_AND_DESTINATION_PORT: u32 = 1 << 3 | 1 << 5;

/// Whose packets are noted.
#[derive(Debug)]
pub(super) struct Wanted {
    /// Ports that are served from now on.
    pub ports: BTreeSet<u16>,
    /// No address was served before.
    pub all_translated: bool,
}

/// The map `outgoing`: packets that belong to the host's stack.
pub(super) struct Tracked(MapHandle);

impl Tracked {
    pub fn open(pin_path: &Path) -> Result<Tracked> {
        pinned::open_map(pin_path, "outgoing").map(Tracked)
    }

    /// Notes what `wanted` says of all that is tracked now. Returns how many connections there were.
    ///
    /// # Errors
    /// The kernel does not tell them.
    pub fn note(&self, wanted: &Wanted) -> Result<usize> {
        let any = fs::read_to_string(COUNT).is_ok_and(|count| count.trim() != "0");
        if !any || (wanted.ports.is_empty() && !wanted.all_translated) {
            return Ok(0);
        }
        let mut keys = Vec::new();
        if wanted.all_translated || wanted.ports.len() > PORTS_ASKED_FOR {
            dump(NetfilterProtoFamily::Unspec, Vec::new(), wanted, &mut keys)?;
        } else {
            for (port, family) in wanted.ports.iter().flat_map(|port| FAMILIES.map(|family| (*port, family))) {
                for protocol in PROTOCOLS {
                    dump(family, filter(true, protocol, port), wanted, &mut keys)?;
                }
                dump(family, filter(false, Protocol::Tcp, port), wanted, &mut keys)?;
            }
        }
        for key in &keys {
            // Nobody replaces a row: a program that looks for it meanwhile could miss both.
            match self.0.update(bytemuck::bytes_of(key), &[0; 4], MapFlags::NO_EXIST) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                    return Err(error).context("cannot write the map outgoing");
                }
                _ => {}
            }
        }
        Ok(keys.len())
    }
}

/// Only connections of which packets come in by this port: answers, or what was asked.
fn filter(are_answers: bool, protocol: Protocol, port: u16) -> Vec<DefaultNla> {
    let tuple = vec![Tuple::Proto(vec![ProtoTuple::Protocol(protocol), ProtoTuple::DestinationPort(port)])];
    let (tuple, flags) = match are_answers {
        true => (ConntrackAttribute::CtaTupleReply(tuple), CTA_FILTER_REPLY_FLAGS),
        false => (ConntrackAttribute::CtaTupleOrig(tuple), CTA_FILTER_ORIG_FLAGS),
    };
    let mut ends = vec![0; tuple.value_len()];
    tuple.emit_value(&mut ends);
    // The one attribute in it: its length, type and value.
    let value = PROTOCOL_AND_DESTINATION_PORT.to_ne_bytes();
    let flags = [&8u16.to_ne_bytes()[..], &flags.to_ne_bytes(), &value].concat();
    let nested = |kind, value| DefaultNla::new(kind | NLA_F_NESTED, value);
    vec![nested(tuple.kind(), ends), nested(CTA_FILTER, flags)]
}

fn dump(
    family: NetfilterProtoFamily,
    attributes: Vec<DefaultNla>,
    wanted: &Wanted,
    keys: &mut Vec<FlowKey>,
) -> Result<()> {
    let conntrack = Conntrack::open()?;
    conntrack.send(vec![request(ConntrackMessageType::Get, family, NLM_F_DUMP, attributes)])?;
    loop {
        for message in conntrack.receive()? {
            match message.payload {
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) => bail!(error.to_io()),
                NetlinkPayload::InnerMessage(message) => {
                    if let NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) = &message.inner {
                        keys.extend(packets(attributes, wanted));
                    }
                }
                _ => {}
            }
        }
    }
}

/// The packets of a connection that belong to the stack.
fn packets(attributes: &[ConntrackAttribute], wanted: &Wanted) -> impl Iterator<Item = FlowKey> {
    let (mut asked, mut answer) = (None, None);
    for attribute in attributes {
        match attribute {
            ConntrackAttribute::CtaTupleOrig(tuple) => asked = key(tuple),
            ConntrackAttribute::CtaTupleReply(tuple) => answer = key(tuple),
            _ => {}
        }
    }
    let of_both = asked.zip(answer).map(|(asked, answer)| of_stack(asked, answer, wanted));
    of_both.into_iter().flatten().flatten()
}

fn of_stack(asked: FlowKey, answer: FlowKey, wanted: &Wanted) -> [Option<FlowKey>; 2] {
    let port = |key: &FlowKey| u16::from_be_bytes(key.ends.destination_port_be);
    let is_tcp = i32::from(asked.protocol) == libc::IPPROTO_TCP;
    let backend = (answer.ends.source, answer.ends.source_port_be);
    let is_translated = (asked.ends.destination, asked.ends.destination_port_be) != backend;
    let asks_here = wanted.all_translated || wanted.ports.contains(&port(&asked));
    // A datagram may find its Service anew at any time, and nobody else says when its connection has ended.
    let rest = (is_tcp && is_translated && asks_here).then_some(asked);
    let answers = wanted.ports.contains(&port(&answer)).then_some(answer);
    [rest, answers]
}

fn key(tuples: &[Tuple]) -> Option<FlowKey> {
    let (mut source, mut destination, mut source_port, mut destination_port) = (None, None, None, None);
    let mut protocol = None;
    let address = |ip: &IpAddr| Some(Ipx::from(*ip).0);
    for tuple in tuples {
        match tuple {
            Tuple::Ip(ends) => ends.iter().for_each(|end| match end {
                IPTuple::SourceAddress(ip) => source = address(ip),
                IPTuple::DestinationAddress(ip) => destination = address(ip),
                _ => {}
            }),
            Tuple::Proto(ends) => ends.iter().for_each(|end| match end {
                ProtoTuple::Protocol(number) => protocol = Some(u8::from(*number)),
                ProtoTuple::SourcePort(port) => source_port = Some(port.to_be_bytes()),
                ProtoTuple::DestinationPort(port) => destination_port = Some(port.to_be_bytes()),
                _ => {}
            }),
            _ => {}
        }
    }
    let ends = Ends {
        source: source?,
        destination: destination?,
        source_port_be: source_port?,
        destination_port_be: destination_port?,
    };
    Some(FlowKey { ends, protocol: protocol?, zero: [0; 3] })
}
