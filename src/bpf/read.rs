//! Reading single pinned maps, for people who ask: look-ups, and walks that hold no more than a batch of rows.

use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use bytemuck::Pod;
use libbpf_rs::{ErrorKind, MapCore, MapFlags, MapHandle, MapType};

use super::batch::Batches;
use super::filter;
use super::pinned;

const ROWS_AT_ONCE: usize = 4096;

/// A pinned map, to be read.
pub struct PinnedMap {
    name: &'static str,
    map: MapHandle,
}

impl PinnedMap {
    /// Opens the map `name` below `pin_path`.
    ///
    /// # Errors
    /// When nothing is pinned there, what is pinned is another version's, or the kernel refuses.
    pub fn open(pin_path: &Path, name: &'static str) -> Result<PinnedMap> {
        pinned::expect_state(pin_path)?;
        Ok(PinnedMap { name, map: pinned::open_map(pin_path, name)? })
    }

    /// Rows that fit.
    pub fn capacity(&self) -> u32 {
        self.map.max_entries()
    }

    /// The row of `key`; of a trie the row with the longest prefix of it.
    ///
    /// # Errors
    /// When the kernel refuses, or rows are not those of this version.
    pub fn get<K: Pod, V: Pod>(&self, key: &K) -> Result<Option<V>> {
        self.expect_sizes::<K, V>()?;
        let value = self.map.lookup(bytemuck::bytes_of(key), MapFlags::ANY);
        let value = value.with_context(|| format!("cannot read the map {:?}", self.name))?;
        Ok(value.map(|value| bytemuck::pod_read_unaligned(&value)))
    }

    /// Gives a row another value, if it is there.
    ///
    /// # Errors
    /// As for [`PinnedMap::get`].
    pub(super) fn replace<K: Pod, V: Pod>(&self, key: &K, value: &V) -> Result<()> {
        self.expect_sizes::<K, V>()?;
        match self.map.update(bytemuck::bytes_of(key), bytemuck::bytes_of(value), MapFlags::EXIST) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot write the map {:?}", self.name))
            }
            _ => Ok(()),
        }
    }

    /// Every row; rows that come or go meanwhile may be met twice or not at all. Stops when `each` says so.
    ///
    /// # Errors
    /// As for [`PinnedMap::get`], and what `each` fails with.
    pub fn each<K: Pod, V: Pod>(&self, mut each: impl FnMut(K, V) -> Result<()>) -> Result<()> {
        self.expect_sizes::<K, V>()?;
        if self.map.map_type() == MapType::LpmTrie {
            return self.each_by_key(each);
        }
        let mut batches = Batches::new(&self.map);
        loop {
            let batch = batches.next(&self.map, ROWS_AT_ONCE);
            let batch = batch.with_context(|| format!("cannot read the map {:?}", self.name))?;
            for (key, value) in batch.rows() {
                each(bytemuck::pod_read_unaligned(key), bytemuck::pod_read_unaligned(value))?;
            }
            if batch.ended {
                return Ok(());
            }
        }
    }

    /// Tries have no batches before 5.16. One whose key goes while it is the last one read begins anew, so that the walk
    /// is bounded by the rows that fit.
    fn each_by_key<K: Pod, V: Pod>(&self, mut each: impl FnMut(K, V) -> Result<()>) -> Result<()> {
        let mut key: Option<K> = None;
        for _ in 0..=self.capacity() {
            let mut next = K::zeroed();
            let input = key.as_ref().map_or(std::ptr::null(), |key| std::ptr::from_ref(key).cast());
            let output = std::ptr::from_mut(&mut next).cast();
            // SAFETY: both keys have the map's key size (checked by the caller) and outlive the call.
            let result = unsafe { libbpf_sys::bpf_map_get_next_key(self.map.as_fd().as_raw_fd(), input, output) };
            if result == -libc::ENOENT {
                break;
            }
            if result != 0 {
                let error = std::io::Error::from_raw_os_error(-result);
                return Err(error).with_context(|| format!("cannot read the map {:?}", self.name));
            }
            if let Some(value) = self.get(&next)? {
                each(next, value)?;
            }
            key = Some(next);
        }
        Ok(())
    }

    fn expect_sizes<K, V>(&self) -> Result<()> {
        let sizes = (self.map.key_size() as usize, self.map.value_size() as usize);
        ensure!(
            sizes == (size_of::<K>(), size_of::<V>()),
            "the map {:?} has rows of another size: it is not this version's",
            self.name
        );
        Ok(())
    }
}

/// What the programs look at first: whether anything of ours may be there.
pub struct WireMarks(Vec<u8>);

impl WireMarks {
    /// # Errors
    /// When the map cannot be read.
    pub fn read(pin_path: &Path) -> Result<WireMarks> {
        let map = PinnedMap::open(pin_path, "wire_filter")?;
        let value = map.map.lookup(&[0; 4], MapFlags::ANY).context("cannot read the map \"wire_filter\"")?;
        Ok(WireMarks(value.unwrap_or_default()))
    }

    /// Whether the programs look any further at a destination.
    pub fn lets_look(&self, address: &[u8; 16], port: u16, for_sockets: bool, is_loopback: bool) -> bool {
        filter::lets_look(&self.0, address, port, for_sockets, is_loopback)
    }
}
