//! Reading a map many rows at a time (BPF_MAP_LOOKUP_BATCH, 5.6), without losing an error: libbpf-rs's iterators end
//! silently on one.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType};

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

/// Writes rows in one system call (BPF_MAP_UPDATE_BATCH, 5.6), keys and values one after another; answers how many leading
/// ones the kernel took, and the error that stopped it.
pub(super) fn write(map: &MapHandle, keys: &[u8], values: &[u8], rows: usize) -> (usize, Option<io::Error>) {
    let sizes = (map.key_size() as usize, map.value_size() as usize);
    assert!(keys.len() == rows * sizes.0 && values.len() == rows * sizes.1, "rows of another size");
    let mut count = rows as u32;
    // SAFETY: `keys` and `values` hold `rows` rows of the map's key and value sizes, and outlive the call; the kernel only
    // reads them.
    let result = unsafe {
        libbpf_sys::bpf_map_update_batch(
            map.as_fd().as_raw_fd(),
            keys.as_ptr().cast(),
            values.as_ptr().cast(),
            &mut count,
            std::ptr::null(),
        )
    };
    processed(result, count, rows)
}

/// libbpf returns -errno and the kernel's count. A count that is still the whole batch beside an error means that the
/// kernel gave up before it began (generic_map_update_batch leaves it so when it has no memory): no row was taken.
pub(super) fn processed(result: i32, count: u32, rows: usize) -> (usize, Option<io::Error>) {
    if result == 0 {
        return (rows, None);
    }
    let taken = if count as usize >= rows { 0 } else { count as usize };
    (taken, Some(io::Error::from_raw_os_error(-result)))
}

/// Every row, by its key: tries have no batches before 5.16. Nobody else may write meanwhile, so that no key vanishes in
/// between. Answers the system calls made.
pub(super) fn each_by_key(map: &MapHandle, mut each: impl FnMut(&[u8], &[u8]) -> io::Result<()>) -> io::Result<u64> {
    let fd = map.as_fd().as_raw_fd();
    let mut key = vec![0u8; map.key_size() as usize];
    let mut next = key.clone();
    let mut calls = 0;
    loop {
        let input = if calls > 0 { key.as_ptr().cast() } else { std::ptr::null() };
        // SAFETY: `key` and `next` have the map's key size and outlive the call.
        let result = unsafe { libbpf_sys::bpf_map_get_next_key(fd, input, next.as_mut_ptr().cast()) };
        calls += 1;
        if result == -libc::ENOENT {
            return Ok(2 * calls);
        }
        if result != 0 {
            return Err(io::Error::from_raw_os_error(-result));
        }
        std::mem::swap(&mut key, &mut next);
        let value = map.lookup(&key, MapFlags::ANY).map_err(io::Error::other)?;
        each(&key, &value.ok_or_else(|| io::Error::other("a row vanished while the map was read"))?)?;
    }
}
