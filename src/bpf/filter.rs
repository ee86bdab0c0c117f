//! The map `wire_filter`: bytes by which the packet programs tell traffic that is not ours. See bpf/abi.h.

use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use super::pinned;
use crate::abi::address_flag::{ADDRESS_LOCAL, ADDRESS_NODE, ADDRESS_SERVICE_VIP};
use crate::abi::frontend_flag::{FRONTEND_EXTERNAL_IP, FRONTEND_LOAD_BALANCER, FRONTEND_NODE_PORT};
use crate::abi::wire_filter_size::WIRE_FILTER_SIZE;
use crate::abi::{Frontend, FrontendKey, address_index};

/// Addresses, then ports: one value of an array of one.
const SIZE: usize = 2 * WIRE_FILTER_SIZE as usize;
const KEY: [u8; 4] = [0; 4];

/// The filter in the kernel, and the same bytes here: a row that adds nothing new costs no system call.
pub(super) struct WireFilter {
    map: MapHandle,
    /// Read from the kernel before the first row.
    known: Vec<u8>,
}

impl WireFilter {
    pub fn open(pin_path: &Path) -> Result<WireFilter> {
        let path = pinned::maps_directory(pin_path).join("wire_filter");
        let map = MapHandle::from_pinned_path(&path)
            .with_context(|| format!("cannot open the pinned map {}", path.display()))?;
        Ok(WireFilter { map, known: Vec::new() })
    }

    /// Lets packets to these addresses be looked at: rows of `addresses`, keys and flags one after another.
    /// Returns the system calls made.
    pub fn add_addresses(&mut self, keys: &[u8], flags: &[u8]) -> io::Result<u64> {
        const ON_THE_WIRE: u32 = ADDRESS_NODE | ADDRESS_LOCAL | ADDRESS_SERVICE_VIP;
        let rows = keys.as_chunks::<16>().0.iter().zip(flags.as_chunks::<4>().0);
        let seen = rows.filter(|(_, flags)| u32::from_ne_bytes(**flags) & ON_THE_WIRE != 0);
        self.set(seen.map(|(address, _)| address_index(address)))
    }

    /// The same for the ports of rows of `frontends`.
    pub fn add_frontends(&mut self, keys: &[u8], rows: &[u8]) -> io::Result<u64> {
        const ON_THE_WIRE: u32 = FRONTEND_EXTERNAL_IP | FRONTEND_LOAD_BALANCER | FRONTEND_NODE_PORT;
        let keys = keys.chunks_exact(size_of::<FrontendKey>()).map(bytemuck::pod_read_unaligned::<FrontendKey>);
        let rows = rows.chunks_exact(size_of::<Frontend>()).map(bytemuck::pod_read_unaligned::<Frontend>);
        let seen = keys.zip(rows).filter(|(_, row)| row.flags & ON_THE_WIRE != 0);
        self.set(seen.map(|(key, _)| WIRE_FILTER_SIZE as usize + usize::from(u16::from_be_bytes(key.port_be))))
    }

    fn set(&mut self, indices: impl Iterator<Item = usize>) -> io::Result<u64> {
        let mut calls = 0;
        if self.known.is_empty() {
            self.known = self.map.lookup(&KEY, MapFlags::ANY).map_err(io::Error::other)?.unwrap_or_default();
            self.known.resize(SIZE, 0);
            calls += 1;
        }
        let mut is_new = false;
        for index in indices {
            is_new |= std::mem::replace(&mut self.known[index], 1) == 0;
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
