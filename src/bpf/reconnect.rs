//! Connecting a UDP socket of another process anew. A connected socket sends without passing any hook, so that only
//! connect(2) can give it another backend, and a process that ignores errors never calls it again. The daemon does so in
//! its place: it takes a copy of the descriptor (pidfd_getfd(2), 5.6), and connects it to the Service that the process asked
//! for. The hooks of the socket's own cgroup translate that as they did the first time, and the process notices nothing.
//!
//! Needs to see the processes (the host's PID namespace) and CAP_SYS_PTRACE.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::sys::socket::{SockaddrStorage, connect, getpeername};

use crate::abi::StaleSocket;
use crate::model::Ipx;

/// A descriptor of a process.
#[derive(Clone, Copy)]
struct Holder {
    process: i32,
    descriptor: i32,
}

/// Connects these sockets anew, each named by its inode, and returns those of them that could not be: these are as they were.
/// All are of one network namespace.
pub(super) fn reconnect(sockets: Vec<(StaleSocket, Option<u64>)>) -> Vec<StaleSocket> {
    let Some(namespace) = sockets.first().map(|(socket, _)| socket.netns_inum) else { return Vec::new() };
    let wanted = sockets.iter().filter_map(|(_, inode)| *inode).map(|inode| (inode, None)).collect();
    let holders = find_holders(namespace, wanted);
    let mut left = Vec::new();
    for (socket, inode) in sockets {
        let holder = inode.and_then(|inode| Some((inode, (*holders.get(&inode)?)?)));
        let connected = holder.map(|(inode, holder)| connect_anew(&socket, holder, inode));
        if !matches!(connected, Some(Ok(()))) {
            tracing::debug!(?connected, ?socket, "a connected UDP socket cannot be connected anew");
            left.push(socket);
        }
    }
    left
}

/// Which process of this network namespace has each of the sockets.
fn find_holders(namespace: u32, mut wanted: HashMap<u64, Option<Holder>>) -> HashMap<u64, Option<Holder>> {
    let namespace = format!("net:[{namespace}]");
    for process in entries(Path::new("/proc")) {
        let directory = format!("/proc/{process}");
        if !fs::read_link(format!("{directory}/ns/net")).is_ok_and(|link| link.as_os_str() == &*namespace) {
            continue;
        }
        let descriptors = Path::new(&directory).join("fd");
        for descriptor in entries(&descriptors) {
            let link = fs::read_link(descriptors.join(descriptor.to_string())).unwrap_or_default();
            let inode = link.to_str().and_then(|link| link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
            if let Some(holder) = inode.and_then(|inode: u64| wanted.get_mut(&inode)) {
                *holder = Some(Holder { process, descriptor });
            }
        }
    }
    wanted
}

/// The names that are numbers.
fn entries(directory: &Path) -> impl Iterator<Item = i32> + use<> {
    let names = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.filter_map(|name| name.to_str()?.parse().ok())
}

/// One system call, so that no end of the daemon leaves the socket without a peer. It keeps its source address, which is one of
/// its namespace's wherever the new backend is, and its port.
fn connect_anew(socket: &StaleSocket, holder: Holder, inode: u64) -> io::Result<()> {
    let service = service_of(socket);
    let copy = copy_of(holder)?;
    // The process may have closed the descriptor and opened another file, or connected the socket to something else.
    let is_it = nix::sys::stat::fstat(&copy).is_ok_and(|file| file.st_ino == inode);
    let peer: Option<SockaddrStorage> = getpeername(copy.as_raw_fd()).ok();
    if !is_it || peer != Some(service) {
        return Err(io::Error::from_raw_os_error(libc::ESTALE));
    }
    Ok(connect(copy.as_raw_fd(), &service)?)
}

fn copy_of(holder: Holder) -> io::Result<OwnedFd> {
    // SAFETY: the system calls take and return numbers; what they return is checked, and owned by nobody else.
    unsafe {
        let process = owned(libc::syscall(libc::SYS_pidfd_open, holder.process, 0))?;
        owned(libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), holder.descriptor, 0))
    }
}

/// # Safety
/// `result` is a system call's, which returns a new descriptor or -1.
unsafe fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as the caller says.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}

/// In the socket's family: an AF_INET6 one may have asked for a v4-mapped address.
fn service_of(socket: &StaleSocket) -> SockaddrStorage {
    let port = u16::from_be_bytes(socket.service_port_be);
    let ip = match i32::from(socket.family) {
        libc::AF_INET => Ipx(socket.service_address).to_ip(),
        _ => IpAddr::V6(socket.service_address.into()),
    };
    SocketAddr::new(ip, port).into()
}
