//! Notices of changes, from rtnetlink(7) as bytes. Of a notice only its sort matters, and the netlink crate cannot read
//! every sort: those of `forwarding` (RTM_NEWNETCONF) it prints as errors, and passes none of them on. There is no queue
//! but the socket's, which is bounded: when it overflows, the kernel says so (ENOBUFS), and anything may have changed.

use std::io;

use futures::FutureExt as _;
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{AsyncSocket as _, AsyncSocketExt as _, TokioSocket};

/// Groups of all that may change where packets go.
const GROUPS: [u32; 9] = [
    libc::RTNLGRP_LINK,
    libc::RTNLGRP_IPV4_IFADDR,
    libc::RTNLGRP_IPV6_IFADDR,
    libc::RTNLGRP_IPV4_ROUTE,
    libc::RTNLGRP_IPV6_ROUTE,
    libc::RTNLGRP_IPV4_RULE,
    libc::RTNLGRP_IPV6_RULE,
    libc::RTNLGRP_IPV4_NETCONF,
    libc::RTNLGRP_IPV6_NETCONF,
];
/// struct nlmsghdr, and where it has the message's type.
const HEADER: usize = 16;
const TYPE: usize = 4;
/// Behind the header: `rtm_dst_len` of struct rtmsg, `ifa_scope` of struct ifaddrmsg.
const PREFIX_LENGTH: usize = HEADER + 1;
const SCOPE: usize = HEADER + 3;
/// linux/rtnetlink.h.
const RTM_NEWNETCONF: u16 = 80;
const RTM_DELNETCONF: u16 = 81;

/// What has changed, of all that came at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Devices, addresses, or the sysctls `rp_filter` and `forwarding`.
    pub devices: bool,
    /// Default routes, or an address whose routes the kernel takes away without a word.
    pub default_routes: bool,
    /// Rules.
    pub rules: bool,
    /// Other routes, or the sysctl `forwarding`.
    pub others: bool,
    /// Routes that have metrics, an MTU for instance.
    pub metrics: bool,
}

impl Changes {
    /// All there is.
    pub const ALL: Changes = Changes { devices: true, default_routes: true, rules: true, others: true, metrics: true };

    fn add(&mut self, message: &[u8]) {
        let kind = message[TYPE..].first_chunk().map_or(0, |kind| u16::from_ne_bytes(*kind));
        self.metrics |= matches!(kind, libc::RTM_NEWROUTE | libc::RTM_DELROUTE) && has_metrics(message);
        match kind {
            libc::RTM_NEWLINK | libc::RTM_DELLINK | libc::RTM_NEWADDR => self.devices = true,
            libc::RTM_DELADDR => {
                self.devices = true;
                // A pod that ends takes its link-local address along, which has no default route.
                self.default_routes |= message.get(SCOPE) != Some(&libc::RT_SCOPE_LINK);
            }
            libc::RTM_NEWROUTE | libc::RTM_DELROUTE if message.get(PREFIX_LENGTH) == Some(&0) => {
                self.default_routes = true;
            }
            libc::RTM_NEWRULE | libc::RTM_DELRULE => self.rules = true,
            libc::RTM_NEWROUTE | libc::RTM_DELROUTE => self.others = true,
            RTM_NEWNETCONF | RTM_DELNETCONF => (self.devices, self.others) = (true, true),
            _ => {}
        }
    }

    fn add_all(&mut self, mut messages: &[u8]) {
        while messages.len() >= HEADER {
            let length = messages.first_chunk().map_or(0, |length| u32::from_ne_bytes(*length)) as usize;
            let length = length.clamp(HEADER, messages.len());
            self.add(&messages[..length]);
            // Messages are aligned to four bytes.
            messages = &messages[length.next_multiple_of(4).min(messages.len())..];
        }
    }
}

/// Whether a message about a route has the attribute RTA_METRICS.
fn has_metrics(message: &[u8]) -> bool {
    /// struct rtmsg, and what an attribute begins with: its length and type.
    const BODY: usize = 12;
    const ATTRIBUTE: usize = 4;
    let mut rest = message.get(HEADER + BODY..).unwrap_or_default();
    while let Some(head) = rest.first_chunk::<ATTRIBUTE>() {
        let [low, high, kind @ ..] = *head;
        if u16::from_ne_bytes(kind) == libc::RTA_METRICS {
            return true;
        }
        let length = usize::from(u16::from_ne_bytes([low, high])).max(ATTRIBUTE);
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

/// A socket that is told of changes in the network namespace that it was opened in.
pub struct Notices(TokioSocket);

impl Notices {
    /// # Errors
    /// When the kernel refuses the socket or a group.
    pub fn open() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        socket.socket_mut().bind_auto()?;
        for group in GROUPS {
            socket.socket_mut().add_membership(group)?;
        }
        Ok(Notices(socket))
    }

    /// Waits for a change, and returns all that have come by then.
    ///
    /// # Errors
    /// When the socket is broken.
    pub async fn next(&mut self) -> io::Result<Changes> {
        let mut changes = Changes::default();
        let first = self.0.recv_from_full().await;
        changes.take(first)?;
        while let Some(next) = self.0.recv_from_full().now_or_never() {
            changes.take(next)?;
        }
        Ok(changes)
    }
}

impl Changes {
    fn take(&mut self, received: io::Result<(Vec<u8>, rtnetlink::sys::SocketAddr)>) -> io::Result<()> {
        match received {
            Ok((messages, _)) => self.add_all(&messages),
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => *self = Changes::ALL,
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message of this type whose body begins with these bytes.
    fn message(kind: u16, body: [u8; 4]) -> Vec<u8> {
        let mut message = vec![0; HEADER];
        message[..4].copy_from_slice(&21u32.to_ne_bytes());
        message[4..6].copy_from_slice(&kind.to_ne_bytes());
        message.extend(body);
        // One byte more, and three to align it.
        message.extend([0; 4]);
        message
    }

    fn changes(messages: &[Vec<u8>]) -> Changes {
        let mut changes = Changes::default();
        changes.add_all(&messages.concat());
        changes
    }

    #[test]
    fn each_sort_of_notice_is_known_and_many_in_one_datagram_are_all_seen() {
        let none = Changes::default();
        let default = message(libc::RTM_NEWROUTE, [2, 0, 0, 0]);
        let other = message(libc::RTM_DELROUTE, [2, 24, 0, 0]);
        let link_local = message(libc::RTM_DELADDR, [10, 64, 0, libc::RT_SCOPE_LINK]);
        let address = message(libc::RTM_DELADDR, [2, 24, 0, 0]);
        let forwarding = message(RTM_NEWNETCONF, [2, 0, 0, 0]);
        assert_eq!(changes(std::slice::from_ref(&default)), Changes { default_routes: true, ..none });
        assert_eq!(changes(&[other.clone(), forwarding]), Changes { devices: true, others: true, ..none });
        assert_eq!(changes(&[link_local]), Changes { devices: true, ..none });
        assert_eq!(changes(&[address]), Changes { devices: true, default_routes: true, ..none });
        let rule = message(libc::RTM_NEWRULE, [2, 0, 0, 0]);
        let link = message(libc::RTM_NEWLINK, [0; 4]);
        let mut metrics = message(libc::RTM_NEWROUTE, [2, 24, 0, 0]);
        metrics.truncate(HEADER + 4);
        metrics.extend([0; 8]);
        metrics.extend([8, 0, 15, 0, 0, 0, 0, 0, 12, 0, 8, 0, 8, 0, 2, 0, 0x78, 5, 0, 0]);
        let length = metrics.len() as u32;
        metrics[..4].copy_from_slice(&length.to_ne_bytes());
        assert_eq!(changes(std::slice::from_ref(&metrics)), Changes { others: true, metrics: true, ..none });
        assert_eq!(changes(&[rule, default, other, link, metrics]), Changes::ALL);
        assert_eq!(changes(&[vec![9; 20], vec![0; 7]]), none, "what is no message");
    }
}
