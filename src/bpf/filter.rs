//! The map `wire_filter`: bytes by which the programs tell packets and sockets that are not ours. See bpf/abi.h.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use anyhow::Result;
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use super::pinned;
use crate::abi::address_flag::{ADDRESS_CLUSTER_IP, ADDRESS_LOCAL, ADDRESS_NODE, ADDRESS_SERVICE_VIP};
use crate::abi::frontend_flag::{FRONTEND_EXTERNAL_IP, FRONTEND_LOAD_BALANCER, FRONTEND_NODE_PORT};
use crate::abi::socket_filter::{SOCKET_FILTER_NODE, SOCKET_FILTER_SERVICE};
use crate::abi::wire_filter_size::WIRE_FILTER_SIZE;
use crate::abi::{Frontend, FrontendKey, address_index};

/// One value of an array of one: what packets may be sent to by address and by port, and what sockets ask for by address.
const SIZE: usize = 3 * WIRE_FILTER_SIZE as usize;
const PORTS: usize = WIRE_FILTER_SIZE as usize;
const SOCKETS: usize = 2 * WIRE_FILTER_SIZE as usize;
const KEY: [u8; 4] = [0; 4];

/// Whether packets to this port are looked at, by the value of the map.
pub(super) fn is_port_marked(filter: &[u8], port: u16) -> bool {
    filter.get(PORTS + usize::from(port)).is_some_and(|mark| *mark != 0)
}

/// Whether the programs look any further at a destination, by the value of the map: `frontend_may_exist()` of
/// bpf/frontend.h for sockets, `wire_may_request()` of bpf/wire.h for packets.
pub(super) fn lets_look(filter: &[u8], address: &[u8; 16], port: u16, for_sockets: bool, is_loopback: bool) -> bool {
    let mark = |at: usize| filter.get(at).copied().unwrap_or(0);
    if !for_sockets {
        return mark(address_index(address)) != 0 && is_port_marked(filter, port);
    }
    match mark(SOCKETS + address_index(address)) {
        _ if is_loopback => is_port_marked(filter, port),
        marks if u32::from(marks) == SOCKET_FILTER_NODE => is_port_marked(filter, port),
        marks => marks != 0,
    }
}

/// The filter in the kernel, and the same bytes here: a row that adds nothing new costs no system call.
pub(super) struct WireFilter {
    map: MapHandle,
    /// Read from the kernel before the first row.
    known: Vec<u8>,
    /// Ports of the rows that this process has let through, and those of them that nobody has asked for yet.
    ports: BTreeSet<u16>,
    new_ports: BTreeSet<u16>,
}

impl WireFilter {
    pub fn open(pin_path: &Path) -> Result<WireFilter> {
        let map = pinned::open_map(pin_path, "wire_filter")?;
        Ok(WireFilter { map, known: Vec::new(), ports: BTreeSet::new(), new_ports: BTreeSet::new() })
    }

    /// Lets packets and sockets to these addresses be looked at: rows of `addresses`, keys and flags one after another.
    /// Returns the system calls made.
    pub fn add_addresses(&mut self, keys: &[u8], flags: &[u8]) -> io::Result<u64> {
        const ON_THE_WIRE: u32 = ADDRESS_NODE | ADDRESS_LOCAL | ADDRESS_SERVICE_VIP;
        let rows = keys.as_chunks::<16>().0.iter().zip(flags.as_chunks::<4>().0);
        let marks = rows.flat_map(|(address, flags)| {
            let (index, flags) = (address_index(address), u32::from_ne_bytes(*flags));
            let mark = |base: usize, roles: u32, mark: u32| (flags & roles != 0).then_some((base + index, mark as u8));
            [
                mark(0, ON_THE_WIRE, 1),
                mark(SOCKETS, ADDRESS_CLUSTER_IP | ADDRESS_SERVICE_VIP, SOCKET_FILTER_SERVICE),
                mark(SOCKETS, ADDRESS_NODE, SOCKET_FILTER_NODE),
            ]
        });
        self.set(marks.flatten())
    }

    /// The same for rows of `frontends`: the ports of what is served to the wire, and the addresses that sockets ask
    /// for. (A NodePort's is the wildcard, which no socket is compared with: it is told by its port.)
    pub fn add_frontends(&mut self, keys: &[u8], rows: &[u8]) -> io::Result<u64> {
        const ON_THE_WIRE: u32 = FRONTEND_EXTERNAL_IP | FRONTEND_LOAD_BALANCER | FRONTEND_NODE_PORT;
        let keys = keys.chunks_exact(size_of::<FrontendKey>()).map(bytemuck::pod_read_unaligned::<FrontendKey>);
        let rows = rows.chunks_exact(size_of::<Frontend>()).map(bytemuck::pod_read_unaligned::<Frontend>);
        let mut marks = Vec::new();
        for (key, row) in keys.zip(rows) {
            if row.flags & ON_THE_WIRE != 0 {
                marks.push((PORTS + usize::from(key.port()), 1));
                if self.ports.insert(key.port()) {
                    self.new_ports.insert(key.port());
                }
            }
            marks.push((SOCKETS + address_index(&key.address), SOCKET_FILTER_SERVICE as u8));
        }
        self.set(marks.into_iter())
    }

    /// The same for ports at which health probes are answered: they are no Service's.
    pub fn add_ports(&mut self, ports: impl Iterator<Item = u16>) -> io::Result<u64> {
        self.set(ports.map(|port| (PORTS + usize::from(port), 1)))
    }

    /// Ports of rows that this process has let through for the first time. The kernel's bytes would not do: they outlive
    /// programs, and a daemon that ended before it had asked.
    pub fn take_new_ports(&mut self) -> BTreeSet<u16> {
        std::mem::take(&mut self.new_ports)
    }

    fn set(&mut self, marks: impl Iterator<Item = (usize, u8)>) -> io::Result<u64> {
        let mut calls = 0;
        if self.known.is_empty() {
            self.known = self.map.lookup(&KEY, MapFlags::ANY).map_err(io::Error::other)?.unwrap_or_default();
            self.known.resize(SIZE, 0);
            calls += 1;
        }
        let mut is_new = false;
        for (index, mark) in marks {
            is_new |= self.known[index] & mark == 0;
            self.known[index] |= mark;
        }
        if is_new {
            calls += 1;
            if let Err(error) = self.map.update(&KEY, &self.known, MapFlags::ANY) {
                // What the kernel has is no longer known.
                self.known.clear();
                return Err(io::Error::other(error));
            }
        }
        Ok(calls)
    }
}
