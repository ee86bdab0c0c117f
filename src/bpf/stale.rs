//! Connected sockets that do not go where their Service is.
//!
//! A connected UDP socket sends without passing any hook, so that it would go on to a backend that is no more, or to a
//! Service that nobody served when it connected. A BPF iterator names the first sort: that over socket storage, which
//! looks at no other socket and into all namespaces, or where the kernel refuses it, those over UDP and TCP in one namespace
//! after the other. The second sort is looked for among all UDP sockets, when a UDP Service gets its first endpoint.
//!
//! UDP sockets are connected anew (`reconnect`). Where that cannot be, and for TCP, SOCK_DESTROY of sock_diag(7) ends those
//! whose backend is gone, inside their own namespace. Their owner sees ECONNABORTED and connects anew.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::{Context, Result};
use bytemuck::{Pod, Zeroable};
use libbpf_rs::{Iter, Link};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

use super::namespaces;
use super::reconnect::reconnect;
use crate::abi::StaleSocket;
use crate::model::Protocol;

/// linux/sock_diag.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// Of an answer: struct nlmsghdr, then struct inet_diag_msg, whose last member is the inode.
const DIAG_INODE: usize = 16 + 68;
/// linux/inet_diag.h: "any cookie".
const INET_DIAG_NOCOOKIE: [u32; 2] = [u32::MAX; 2];
/// linux/netlink.h.
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;

/// struct nlmsghdr, struct inet_diag_req_v2 and its struct inet_diag_sockid, in one message.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct DiagRequest {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port_id: u32,
    family: u8,
    protocol: u8,
    extensions: u8,
    pad: u8,
    states: u32,
    source_port_be: [u8; 2],
    destination_port_be: [u8; 2],
    source: [u8; 16],
    destination: [u8; 16],
    interface: u32,
    cookie: [u32; 2],
}

/// Which sockets a pass looks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Search {
    /// TCP sockets whose backend is gone are ended, too.
    pub with_tcp: bool,
    /// A UDP Service got its first endpoint: sockets that were connected to it before are looked for.
    pub unserved: bool,
}

/// What one pass did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StalePass {
    /// Sockets that did not go where their Service is.
    pub found: usize,
    /// Of these, the ones that were connected anew.
    pub reconnected: usize,
    /// Of these, the ones that were ended.
    pub destroyed: usize,
    /// Of these, the ones that the kernel would not end.
    pub failed: usize,
    /// Of these, the ones in a network namespace that no handle leads to, or that cannot be entered.
    pub unreachable: usize,
    /// Namespaces that cannot be entered, and processes whose namespace may not be looked at.
    pub hidden: usize,
}

/// The search for such sockets. Cheap to clone; clones share the iterators' programs.
#[derive(Clone)]
pub struct StaleSockets {
    programs: Arc<RwLock<Arc<Programs>>>,
    /// Sockets of other namespaces than the daemon's are not translated.
    own_only: bool,
}

struct Programs {
    stale: Iterators,
    /// Over the UDP sockets of the namespace that it is opened in.
    unserved: Link,
}

pub(super) enum Iterators {
    /// Over the sockets with an origin, in all namespaces.
    Origins(Link),
    /// Over all sockets of a protocol, in the namespace that the iterator is opened in.
    Namespaces { udp: Link, tcp: Link },
}

impl StaleSockets {
    pub(super) fn new(stale: Iterators, unserved: Link, own_only: bool) -> Self {
        let programs = Programs { stale, unserved };
        StaleSockets { programs: Arc::new(RwLock::new(Arc::new(programs))), own_only }
    }

    /// From the next search on these are used.
    pub(super) fn replace(&self, stale: Iterators, unserved: Link) {
        *self.programs.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(Programs { stale, unserved });
    }

    /// Sets right what the search finds. Blocks for as long as it takes to walk the sockets that were sent to a Service, or
    /// all of these protocols.
    pub fn settle(&self, search: Search) -> Result<StalePass> {
        let programs = Arc::clone(&self.programs.read().unwrap_or_else(PoisonError::into_inner));
        let Programs { stale, unserved } = &*programs;
        let mut pass = match stale {
            Iterators::Origins(link) => settle_everywhere(link, search.with_tcp)?,
            Iterators::Namespaces { udp, tcp } => {
                let links: &[&Link] = if search.with_tcp { &[udp, tcp] } else { &[udp] };
                settle_in_each(links, false)
            }
        };
        if search.unserved {
            pass.add(settle_in_each(&[unserved], self.own_only));
        }
        Ok(pass)
    }
}

fn settle_everywhere(origins: &Link, with_tcp: bool) -> Result<StalePass> {
    let mut by_namespace: BTreeMap<u32, Vec<StaleSocket>> = BTreeMap::new();
    let mut pass = StalePass::default();
    for socket in read_stale(origins)? {
        if !is_tcp(&socket) || with_tcp {
            by_namespace.entry(socket.netns_inum).or_default().push(socket);
            pass.found += 1;
        }
    }
    let handles = if pass.found == 0 { Default::default() } else { namespaces::all().handles };
    for (inum, sockets) in by_namespace {
        let inside = handles.get(&inum).map(|handle| namespaces::run_inside(handle, || settle_all(&sockets)));
        match inside {
            Some(Ok(Ok(settled))) => pass.add(settled),
            // Others may do better.
            Some(Ok(Err(error))) => {
                tell(&error);
                pass.failed += sockets.len();
            }
            Some(Err(_)) | None => pass.unreachable += sockets.len(),
        }
    }
    Ok(pass)
}

fn settle_in_each(links: &[&Link], own_only: bool) -> StalePass {
    let found = if own_only { namespaces::own() } else { namespaces::all() };
    let mut pass = StalePass { hidden: found.hidden, ..StalePass::default() };
    for handle in found.handles.values() {
        let search = || -> Result<StalePass> {
            let read: Vec<Vec<StaleSocket>> = links.iter().map(|link| read_stale(link)).collect::<Result<_>>()?;
            let sockets = read.concat();
            let settled = if sockets.is_empty() { StalePass::default() } else { settle_all(&sockets)? };
            Ok(StalePass { found: sockets.len(), ..settled })
        };
        match namespaces::run_inside(handle, search) {
            Ok(Ok(settled)) => pass.add(settled),
            // Others may do better.
            Ok(Err(error)) => {
                tell(&error);
                pass.failed += 1;
            }
            // It may have gone with its last process.
            Err(_) if !handle.exists() => {}
            Err(_) => pass.hidden += 1,
        }
    }
    pass
}

fn tell(error: &anyhow::Error) {
    tracing::warn!("cannot destroy sockets of removed backends in a network namespace: {error:#}");
}

fn read_stale(iterator: &Link) -> Result<Vec<StaleSocket>> {
    let mut bytes = Vec::new();
    let mut reader = Iter::new(iterator).context("cannot start the socket iterator")?;
    reader.read_to_end(&mut bytes).context("cannot read the socket iterator")?;
    Ok(bytes.chunks_exact(size_of::<StaleSocket>()).map(bytemuck::pod_read_unaligned).collect())
}

impl StalePass {
    fn add(&mut self, other: StalePass) {
        self.found += other.found;
        self.reconnected += other.reconnected;
        self.destroyed += other.destroyed;
        self.failed += other.failed;
        self.unreachable += other.unreachable;
        self.hidden += other.hidden;
    }
}

/// Of the namespace that the calling thread is in. Does not count what was found.
fn settle_all(sockets: &[StaleSocket]) -> Result<StalePass> {
    let netlink = open().context("cannot open a sock_diag socket")?;
    let (tcp, datagrams): (Vec<StaleSocket>, Vec<StaleSocket>) = sockets.iter().partition(|socket| is_tcp(socket));
    let named = datagrams.iter().map(|socket| (*socket, inode_of(&netlink, socket).ok())).collect();
    let mut left = reconnect(named);
    let reconnected = datagrams.len() - left.len();
    // Nobody is wronged by what was never translated.
    left.retain(|socket| !was_never_served(socket));
    let rest = [left, tcp].concat();
    let ended = destroy_each(&rest, |socket| request(&netlink, &diag_request(SOCK_DESTROY, socket)));
    Ok(StalePass { reconnected, ..ended })
}

fn was_never_served(socket: &StaleSocket) -> bool {
    (socket.service_address, socket.service_port_be) == (socket.backend_address, socket.backend_port_be)
}

/// Asks for the end of each socket, whatever became of the others; the first failure is told.
fn destroy_each(sockets: &[StaleSocket], mut destroy: impl FnMut(&StaleSocket) -> io::Result<()>) -> StalePass {
    let mut ended = StalePass::default();
    for socket in sockets {
        match destroy(socket) {
            Ok(()) => ended.destroyed += 1,
            // Closed by its owner in the meantime, or in TIME_WAIT, which kernels before 6.5 do not end.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) if is_tcp(socket) && error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            Err(error) => {
                if ended.failed == 0 {
                    tell(&anyhow::Error::new(error).context("SOCK_DESTROY failed (CAP_NET_ADMIN is needed)"));
                }
                ended.failed += 1;
            }
        }
    }
    ended
}

fn is_tcp(socket: &StaleSocket) -> bool {
    matches!(i32::from(socket.protocol), libc::IPPROTO_TCP | libc::IPPROTO_MPTCP)
}

fn open() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag)?)
}

fn diag_request(kind: u16, stale: &StaleSocket) -> DiagRequest {
    // An MPTCP subflow is an ordinary TCP socket to sock_diag.
    let protocol = match stale.protocol as i32 {
        libc::IPPROTO_MPTCP => Protocol::Tcp as u8,
        other => other as u8,
    };
    DiagRequest {
        length: size_of::<DiagRequest>() as u32,
        kind,
        // What is asked for is an answer by itself.
        flags: if kind == SOCK_DESTROY { NLM_F_REQUEST | NLM_F_ACK } else { NLM_F_REQUEST },
        family: stale.family as u8,
        protocol,
        states: u32::MAX,
        source_port_be: stale.source_port_be,
        destination_port_be: stale.backend_port_be,
        source: diag_address(stale.family, stale.source_address),
        destination: diag_address(stale.family, stale.backend_address),
        interface: stale.interface,
        cookie: INET_DIAG_NOCOOKIE,
        ..Zeroable::zeroed()
    }
}

/// An AF_INET address stands in the first four bytes; an AF_INET6 one, v4-mapped or not, as it is.
fn diag_address(family: u16, address: [u8; 16]) -> [u8; 16] {
    let mut diag = [0; 16];
    if i32::from(family) == libc::AF_INET {
        diag[..4].copy_from_slice(&address[12..]);
    } else {
        diag = address;
    }
    diag
}

/// The inode of a UDP socket, by which the descriptors of processes name it.
fn inode_of(netlink: &OwnedFd, socket: &StaleSocket) -> io::Result<u64> {
    let mut request = diag_request(SOCK_DIAG_BY_FAMILY, socket);
    // "For historical reasons" (net/ipv4/udp_diag.c).
    std::mem::swap(&mut request.source, &mut request.destination);
    std::mem::swap(&mut request.source_port_be, &mut request.destination_port_be);
    send(netlink.as_raw_fd(), bytemuck::bytes_of(&request), MsgFlags::empty())?;
    let mut answer = [0u8; 1024];
    let length = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    let kind = answer.get(4..6).map(|b| u16::from_ne_bytes([b[0], b[1]]));
    let inode = answer[..length].get(DIAG_INODE..).and_then(|rest| rest.first_chunk());
    match inode.filter(|_| kind == Some(SOCK_DIAG_BY_FAMILY)) {
        Some(inode) => Ok(u32::from_ne_bytes(*inode).into()),
        None => Err(io::ErrorKind::NotFound.into()),
    }
}

/// Sends one request and waits for its acknowledgement.
fn request(netlink: &OwnedFd, request: &DiagRequest) -> io::Result<()> {
    send(netlink.as_raw_fd(), bytemuck::bytes_of(request), MsgFlags::empty())?;
    let mut answer = [0u8; 1024];
    let length = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    // struct nlmsghdr is 16 bytes, then comes struct nlmsgerr with a negative errno or 0.
    let kind = answer.get(4..6).map(|b| u16::from_ne_bytes([b[0], b[1]]));
    if length < 20 || kind != Some(NLMSG_ERROR) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "sock_diag answered with something other than an acknowledgement",
        ));
    }
    match i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]) {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

/// Whether the kernel can destroy sockets: it answers a request for one that does not exist with ENOENT, and with
/// EOPNOTSUPP when it was built without CONFIG_INET_DIAG_DESTROY.
pub fn can_destroy() -> bool {
    let nobody = StaleSocket {
        family: libc::AF_INET as u16,
        protocol: libc::IPPROTO_UDP as u16,
        source_port_be: 1u16.to_be_bytes(),
        backend_port_be: 1u16.to_be_bytes(),
        ..Zeroable::zeroed()
    };
    let result = open().and_then(|netlink| request(&netlink, &diag_request(SOCK_DESTROY, &nobody)));
    result.is_err_and(|e| e.raw_os_error() == Some(libc::ENOENT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_cannot_be_ended_saves_no_other() {
        let of = |protocol: i32| StaleSocket { protocol: protocol as u16, ..Zeroable::zeroed() };
        let sockets = [of(libc::IPPROTO_UDP), of(libc::IPPROTO_UDP), of(libc::IPPROTO_TCP), of(libc::IPPROTO_UDP)];
        let mut answers = [Some(libc::EPERM), Some(libc::ENOENT), Some(libc::EOPNOTSUPP), None].into_iter();
        let ended = destroy_each(&sockets, |_| match answers.next().flatten() {
            Some(error) => Err(io::Error::from_raw_os_error(error)),
            None => Ok(()),
        });
        assert_eq!(ended, StalePass { destroyed: 1, failed: 1, ..StalePass::default() });
    }
}
