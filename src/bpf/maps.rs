//! The pinned maps as a [`MapIo`]: batched system calls, and an exact account of what was written.
//!
//! libbpf-rs's batch calls lose the count of processed rows when one fails, and its iterators end silently on an
//! error, so that the two batch calls are made through libbpf-sys here, and reads in `batch`.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::Result;
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use tracing::{debug, info, warn};

use super::batch::{self, Batches};
use super::epochs;
use super::filter::WireFilter;
use super::grow::Grower;
use super::sizes::Limits;
use super::tracked::{Tracked, Wanted};
use super::{memory, pinned};
use crate::abi::{counter, epoch};
use crate::sync::{Failure, MapIo, MapName};

/// Rows in one system call: the kernel copies them one by one, so that more would only hold more memory.
const BATCH: usize = 4096;

/// The maps that the daemon fills, and the counters.
pub struct Maps {
    handles: Vec<(MapName, MapHandle)>,
    counters: MapHandle,
    epochs: MapHandle,
    filter: Arc<Mutex<WireFilter>>,
    tracked: Tracked,
    /// By service id; none: nobody counts.
    counts: Vec<MapHandle>,
    /// Of the daemon's own handles: who gives the maps more room, and how much they may have.
    growth: Option<(Grower, Limits)>,
    /// Made by this process, and neither written to nor read yet.
    empty: Vec<MapName>,
    /// There was no frontend when they were read.
    is_first: bool,
    syscalls: u64,
}

impl Maps {
    /// Opens the maps pinned below `pin_path`. Fails with a remedy when nothing is pinned there.
    pub fn open(pin_path: &Path) -> Result<Maps> {
        pinned::expect_state(pin_path)?;
        let open = |name: &str| pinned::open_map(pin_path, name);
        let handles = MapName::ALL.iter().map(|name| Ok((*name, open(name.as_str())?))).collect::<Result<_>>()?;
        let (counters, epochs) = (open("counters")?, epochs::open(pin_path)?);
        let (filter, tracked) = (Arc::new(Mutex::new(WireFilter::open(pin_path)?)), Tracked::open(pin_path)?);
        Ok(Maps {
            handles,
            counters,
            epochs,
            filter,
            tracked,
            counts: Vec::new(),
            growth: None,
            empty: Vec::new(),
            is_first: false,
            syscalls: 0,
        })
    }

    /// These maps have just been made: the first to read them finds nothing, without reading. To read an array is to
    /// read every row that fits, which may be millions.
    pub(super) fn know_empty(&mut self, maps: Vec<MapName>) {
        self.empty = maps;
    }

    /// From now on the counts of a Service go with its name, so that the id's next owner begins with none.
    pub(super) fn count_by_service(&mut self, counts: Vec<MapHandle>) {
        self.counts = counts;
    }

    /// From now on these maps have as much room as is needed, up to `limits`.
    pub(super) fn grow_by(&mut self, grower: Grower, limits: Limits) {
        self.growth = Some((grower, limits));
    }

    /// bpf(2) calls made so far.
    pub fn syscalls(&self) -> u64 {
        self.syscalls
    }

    /// Each counter's label and its sum over the processors, in the order of `enum counter`.
    pub fn read_counters(&self) -> Result<Vec<(&'static str, u64)>> {
        let mut sums = Vec::with_capacity(counter::NAMES.len());
        for (index, (label, _)) in (0u32..).zip(counter::NAMES) {
            let values =
                self.counters.lookup_percpu(&index.to_ne_bytes(), libbpf_rs::MapFlags::ANY)?.unwrap_or_default();
            let per_cpu = values.iter().filter_map(|v| Some(u64::from_ne_bytes(v.get(..8)?.try_into().ok()?)));
            sums.push((label, per_cpu.sum()));
        }
        Ok(sums)
    }

    fn filter(&self) -> MutexGuard<'_, WireFilter> {
        // Whoever panicked has ended the daemon.
        self.filter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The filter, for another writer: it is written whole, so that there is one copy of it.
    pub(super) fn shared_filter(&self) -> Arc<Mutex<WireFilter>> {
        Arc::clone(&self.filter)
    }

    /// Lets packets to what these rows stand for be looked at. Before the rows: else a flow could begin whose packets
    /// are not.
    fn open_filter(&mut self, map: MapName, keys: &[u8], values: &[u8]) -> io::Result<()> {
        self.syscalls += match map {
            MapName::Addresses => self.filter().add_addresses(keys, values)?,
            MapName::Frontends => self.filter().add_frontends(keys, values)?,
            _ => 0,
        };
        Ok(())
    }

    /// After the filter, so that programs see what leaves from now on, and before the frontends, which would take what
    /// comes in for theirs.
    fn note_tracked(&mut self) {
        let all_translated = std::mem::take(&mut self.is_first);
        let wanted = Wanted { ports: self.filter().take_new_ports(), all_translated };
        match self.tracked.note(&wanted) {
            Ok(0) => {}
            Ok(packets) => debug!(packets, ?wanted, "connections that are older than their Services are the host's"),
            Err(error) => warn!(
                "connections that netfilter tracks cannot be read: those that are masqueraded to the port of a new \
                 Service, or translated by kube-proxy, may break: {error:#}"
            ),
        }
    }

    fn handle(&self, map: MapName) -> &MapHandle {
        // Every name is in the list: `open` made it from MapName::ALL, which is in the order of the enum.
        &self.handles[map as usize].1
    }

    /// For tries, which have no batches before 5.16. `call(fd, row)` returns -errno, as libbpf does: libbpf-rs's errors
    /// do not lead to theirs, and the one that says that the map is full looks like any other.
    fn one_by_one(&mut self, map: MapName, rows: usize, call: impl Fn(i32, usize) -> i32) -> Vec<Failure> {
        self.syscalls += rows as u64;
        let fd = self.handle(map).as_fd().as_raw_fd();
        let failed = |row| match call(fd, row) {
            0 => None,
            errno => Some(Failure { row, error: io::Error::from_raw_os_error(-errno) }),
        };
        (0..rows).filter_map(failed).collect()
    }

    /// Also for tries.
    fn dump_by_keys(&mut self, map: MapName, each: &mut dyn FnMut(&[u8], &[u8])) -> io::Result<()> {
        self.syscalls += batch::each_by_key(self.handle(map), |key, value| {
            each(key, value);
            Ok(())
        })?;
        Ok(())
    }

    /// One batch; returns how many leading rows the kernel took, and the error that stopped it.
    fn write_batch(&mut self, map: MapName, keys: &[u8], values: &[u8], rows: usize) -> (usize, Option<io::Error>) {
        self.syscalls += 1;
        batch::write(self.handle(map), keys, values, rows)
    }

    fn delete_batch(&mut self, map: MapName, keys: &[u8], rows: usize) -> (usize, Option<io::Error>) {
        self.syscalls += 1;
        let fd = self.handle(map).as_fd().as_raw_fd();
        let mut count = rows as u32;
        // SAFETY: `keys` holds `rows` keys of the map (asserted by the caller), and outlives the call; the kernel only
        // reads them.
        let result =
            unsafe { libbpf_sys::bpf_map_delete_batch(fd, keys.as_ptr().cast(), &mut count, std::ptr::null()) };
        batch::processed(result, count, rows)
    }
}

/// Runs `batch(first, rows)` over all rows; the row that stops a batch is judged by `verdict`, and the rest goes on
/// behind it.
fn in_batches(
    rows: usize,
    mut batch: impl FnMut(usize, usize) -> (usize, Option<io::Error>),
    is_failure: impl Fn(&io::Error) -> bool,
) -> Vec<Failure> {
    let mut failures = Vec::new();
    let mut first = 0;
    while first < rows {
        let (taken, error) = batch(first, BATCH.min(rows - first));
        first += taken;
        if let Some(error) = error {
            if is_failure(&error) {
                failures.push(Failure { row: first, error });
            }
            first += 1;
        }
    }
    failures
}

impl MapIo for Maps {
    fn write(&mut self, map: MapName, keys: &[u8], values: &[u8], rows: usize) -> Vec<Failure> {
        let (key_size, value_size) = (self.handle(map).key_size() as usize, self.handle(map).value_size() as usize);
        assert!(keys.len() == rows * key_size && values.len() == rows * value_size, "{map:?}: rows of another size");
        self.empty.retain(|empty| *empty != map);
        if let Err(error) = self.open_filter(map, keys, values) {
            let failure = |row| Failure { row, error: io::Error::other(format!("the map wire_filter: {error}")) };
            return (0..rows).map(failure).collect();
        }
        if map == MapName::Frontends {
            self.note_tracked();
        }
        if map == MapName::SourceRanges {
            return self.one_by_one(map, rows, |fd, row| {
                let (key, value) = (&keys[row * key_size..][..key_size], &values[row * value_size..][..value_size]);
                let flags = MapFlags::ANY.bits();
                // SAFETY: `key` and `value` have the map's sizes and outlive the call; the kernel only reads them.
                unsafe { libbpf_sys::bpf_map_update_elem(fd, key.as_ptr().cast(), value.as_ptr().cast(), flags) }
            });
        }
        let batch = |first: usize, n: usize| {
            let (keys, values) =
                (&keys[first * key_size..][..n * key_size], &values[first * value_size..][..n * value_size]);
            self.write_batch(map, keys, values, n)
        };
        in_batches(rows, batch, |_| true)
    }

    fn delete(&mut self, map: MapName, keys: &[u8], rows: usize) -> Vec<Failure> {
        let key_size = self.handle(map).key_size() as usize;
        assert!(keys.len() == rows * key_size, "{map:?}: keys of another size");
        if map == MapName::SourceRanges {
            return self.one_by_one(map, rows, |fd, row| {
                let key = &keys[row * key_size..][..key_size];
                // SAFETY: as in `write`.
                let result = unsafe { libbpf_sys::bpf_map_delete_elem(fd, key.as_ptr().cast()) };
                if result == -libc::ENOENT { 0 } else { result }
            });
        }
        let batch = |first: usize, n: usize| self.delete_batch(map, &keys[first * key_size..][..n * key_size], n);
        let failures = in_batches(rows, batch, |error| error.raw_os_error() != Some(libc::ENOENT));
        for counts in self.counts.iter().filter(|_| map == MapName::Services) {
            // A Service that was never asked for has no count.
            keys.chunks_exact(key_size).for_each(|id| drop(counts.delete(id)));
            self.syscalls += rows as u64;
        }
        failures
    }

    fn dump_first(&mut self, map: MapName, rows: u32, each: &mut dyn FnMut(&[u8], &[u8])) -> io::Result<()> {
        let handle = self.handle(map);
        let (mut batches, mut calls, mut left) = (Batches::new(handle), 0, rows as usize);
        while left > 0 {
            let batch = batches.next(handle, BATCH)?;
            calls += 1;
            let first = batch.rows().take(left).filter(|(_, value)| value.iter().any(|byte| *byte != 0));
            first.for_each(|(key, value)| each(key, value));
            left = left.saturating_sub(batch.len());
            if batch.ended {
                break;
            }
        }
        self.syscalls += calls;
        Ok(())
    }

    fn dump(&mut self, map: MapName, each: &mut dyn FnMut(&[u8], &[u8])) -> io::Result<()> {
        if let Some(at) = self.empty.iter().position(|empty| *empty == map) {
            self.empty.swap_remove(at);
            self.is_first |= map == MapName::Frontends;
            return Ok(());
        }
        if map == MapName::SourceRanges {
            return self.dump_by_keys(map, each);
        }
        let is_array = matches!(map, MapName::Backends | MapName::Slots);
        let handle = self.handle(map);
        let (mut batches, mut calls, mut found) = (Batches::new(handle), 0, 0);
        loop {
            let batch = batches.next(handle, BATCH)?;
            calls += 1;
            found += batch.len();
            let rows = batch.rows().filter(|(_, value)| !is_array || value.iter().any(|byte| *byte != 0));
            rows.for_each(|(key, value)| each(key, value));
            if batch.ended {
                break;
            }
        }
        self.syscalls += calls;
        self.is_first |= map == MapName::Frontends && found == 0;
        Ok(())
    }

    fn read(&mut self, map: MapName, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        if map == MapName::SourceRanges {
            // A trie answers with the longest prefix, not with the row of this key.
            let mut found = None;
            self.dump_by_keys(map, &mut |each, value| found = (each == key).then(|| value.to_vec()).or(found.take()))?;
            return Ok(found);
        }
        self.syscalls += 1;
        let is_array = matches!(map, MapName::Backends | MapName::Slots);
        let value = self.handle(map).lookup(key, MapFlags::ANY).map_err(io::Error::other)?;
        Ok(value.filter(|value| !is_array || value.iter().any(|byte| *byte != 0)))
    }

    fn note_new_owners(&mut self) -> io::Result<()> {
        self.syscalls += 2;
        epochs::count_up(&self.epochs, epoch::EPOCH_OWNERS).map_err(io::Error::other)
    }

    fn reserve(&mut self, rows: &[(MapName, usize)]) {
        let Some((mut grower, limits)) = self.growth.take() else { return };
        let size = |map| self.handle(map).max_entries();
        let is_short = rows.iter().any(|(map, rows)| limits.is_short(*map, *rows, size(*map)));
        if is_short && grower.is_due() {
            // What is half as full would be next: to load the programs once more is what takes time.
            let also = rows.iter().filter(|(map, rows)| limits.is_short(*map, 2 * *rows, size(*map)));
            let sizes: Vec<_> = also.map(|(map, rows)| (*map, limits.next(*map, *rows, size(*map)))).collect();
            let began = Instant::now();
            match grower.grow(&sizes) {
                Ok(grown) => {
                    let names = sizes.iter().map(|(map, size)| format!("{} to {size}", map.as_str()));
                    let maps = names.collect::<Vec<_>>().join(", ");
                    grown.into_iter().for_each(|(map, handle)| self.handles[map as usize].1 = handle);
                    info!(took = ?began.elapsed(), "gave maps room for more entries: {maps}");
                }
                Err(error) => warn!(
                    "cannot give maps room for more entries: {error:#}; what does not fit is not served; trying again"
                ),
            }
            memory::release();
        }
        self.growth = Some((grower, limits));
    }

    fn capacity(&self, map: MapName) -> u32 {
        let limit = self.growth.as_ref().map_or(0, |(_, limits)| limits.of(map));
        limit.max(self.size(map))
    }

    fn size(&self, map: MapName) -> u32 {
        self.handle(map).max_entries()
    }
}
