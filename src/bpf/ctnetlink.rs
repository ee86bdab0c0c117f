//! Messages to and from netfilter's connection tracking (linux/netfilter/nfnetlink_conntrack.h).

use anyhow::{Context as _, Result};
use netlink_packet_netfilter::conntrack::ConntrackMessageType;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily, NetfilterSubsystem,
};
use rtnetlink::packet_core::{DefaultNla, NLM_F_REQUEST, NetlinkMessage};
use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use rtnetlink::sys::{Socket, SocketAddr};

/// A socket to the connection tracking of the calling thread's network namespace.
pub(super) struct Conntrack(Socket);

impl Conntrack {
    pub fn open() -> Result<Conntrack> {
        let mut socket = Socket::new(NETLINK_NETFILTER).context("opening a netlink socket")?;
        socket.bind_auto().context("binding a netlink socket")?;
        Ok(Conntrack(socket))
    }

    /// All of them in one system call, numbered from 0 on.
    pub fn send(&self, messages: Vec<NetlinkMessage<NetfilterMessage>>) -> Result<()> {
        let mut bytes = Vec::new();
        for (number, mut message) in (0..).zip(messages) {
            message.header.sequence_number = number;
            message.finalize();
            let start = bytes.len();
            bytes.resize(start + aligned(message.buffer_len()), 0);
            message.serialize(&mut bytes[start..]);
        }
        self.0.send_to(&bytes, &SocketAddr::new(0, 0), 0).context("telling connection tracking")?;
        Ok(())
    }

    /// Waits for the next answers.
    pub fn receive(&self) -> Result<Vec<NetlinkMessage<NetfilterMessage>>> {
        let (answer, _) = self.0.recv_from_full().context("reading what connection tracking says")?;
        let (mut messages, mut rest) = (Vec::new(), &answer[..]);
        while !rest.is_empty() {
            let message = NetlinkMessage::deserialize(rest).context("what connection tracking says")?;
            rest = rest.get(aligned(message.header.length as usize)..).unwrap_or_default();
            messages.push(message);
        }
        Ok(messages)
    }
}

/// Attributes as they are: what the library knows as ConntrackMessage would lose the flag of nested ones.
pub(super) fn request(
    kind: ConntrackMessageType,
    family: NetfilterProtoFamily,
    flags: u16,
    attributes: Vec<DefaultNla>,
) -> NetlinkMessage<NetfilterMessage> {
    let inner =
        NetfilterMessageInner::Other { subsys: NetfilterSubsystem::Conntrack, message_type: kind.into(), attributes };
    let mut message = NetlinkMessage::from(NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), inner));
    message.header.flags = NLM_F_REQUEST | flags;
    message
}

/// Messages are aligned to four bytes.
fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}
