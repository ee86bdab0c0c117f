//! Reading a map many rows at a time (BPF_MAP_LOOKUP_BATCH, 5.6), without losing an error: libbpf-rs's iterators end
//! silently on one.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use libbpf_rs::{MapCore, MapHandle, MapType};

/// A walk over a map. Of a hash, rows that come or go in the meantime may be met twice or not at all.
pub(super) struct Batches {
    value_size: usize,
    /// The kernel's position (a hash's bucket number, an array's index); empty at the beginning.
    position: Vec<u8>,
    /// Rows that a bucket may hold: it is copied whole or not at all, and this grows until the largest one fits.
    room: usize,
    keys: Vec<u8>,
    values: Vec<u8>,
}

/// Rows that were read.
pub(super) struct Batch<'a> {
    keys: &'a [u8],
    values: &'a [u8],
    sizes: (usize, usize),
    /// They are the last.
    pub ended: bool,
}

impl<'a> Batch<'a> {
    pub fn len(&self) -> usize {
        self.keys.len() / self.sizes.0
    }

    /// Keys and values, as the kernel lays them out.
    pub fn rows(&self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> + use<'a> {
        self.keys.chunks_exact(self.sizes.0).zip(self.values.chunks_exact(self.sizes.1))
    }
}

impl Batches {
    pub fn new(map: &MapHandle) -> Batches {
        let value_size = match map.map_type() {
            // One value for each processor, each rounded up to 8 bytes.
            MapType::PercpuHash => {
                (map.value_size() as usize).next_multiple_of(8) * libbpf_rs::num_possible_cpus().unwrap_or(1)
            }
            _ => map.value_size() as usize,
        };
        Batches { value_size, position: Vec::new(), room: 64, keys: Vec::new(), values: Vec::new() }
    }

    /// Starts again from the beginning.
    pub fn restart(&mut self) {
        self.position.clear();
    }

    /// Up to `wanted` rows (more if one bucket has more).
    pub fn next(&mut self, map: &MapHandle, wanted: usize) -> io::Result<Batch<'_>> {
        let sizes = (map.key_size() as usize, self.value_size);
        loop {
            let room = wanted.max(self.room);
            self.keys.resize(room * sizes.0, 0);
            self.values.resize(room * sizes.1, 0);
            // A position is four bytes, but never less than a key.
            let mut next = vec![0u8; sizes.0.max(8)];
            let mut count = room as u32;
            let input = if self.position.is_empty() { std::ptr::null_mut() } else { self.position.as_mut_ptr().cast() };
            // SAFETY: `keys` and `values` have room for `count` rows of the map's sizes, `position` (once set) and
            // `next` for a position; all outlive the call.
            let result = unsafe {
                libbpf_sys::bpf_map_lookup_batch(
                    map.as_fd().as_raw_fd(),
                    input,
                    next.as_mut_ptr().cast(),
                    self.keys.as_mut_ptr().cast(),
                    self.values.as_mut_ptr().cast(),
                    &mut count,
                    std::ptr::null(),
                )
            };
            let ended = result == -libc::ENOENT;
            if result == -libc::ENOSPC && count == 0 {
                self.room *= 2;
                continue;
            }
            if result != 0 && !ended && result != -libc::ENOSPC {
                return Err(io::Error::from_raw_os_error(-result));
            }
            self.position = next;
            let (keys, values) = (&self.keys[..count as usize * sizes.0], &self.values[..count as usize * sizes.1]);
            return Ok(Batch { keys, values, sizes, ended });
        }
    }
}
