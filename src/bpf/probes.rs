//! The maps `probes` and `probe_state`: what the packet programs answer to health probes, and when the daemon last vouched
//! for it. See bpf/probe.h.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use super::batch::Batches;
use super::filter::WireFilter;
use super::pinned;
use crate::abi::{Probe, ProbeKey, ProbeState};
use crate::model::ProbeAnswer;

const STATE: [u8; 4] = [0; 4];
const ROWS_AT_ONCE: usize = 256;

/// Writes the answers. There is one in a daemon.
pub struct ProbeRows {
    rows: MapHandle,
    state: MapHandle,
    /// The worker's as well, as it is written whole.
    filter: Arc<Mutex<WireFilter>>,
    secret: [u64; 2],
    /// What the kernel has. `None`: has to be read.
    known: Option<BTreeMap<ProbeKey, Probe>>,
}

/// CLOCK_MONOTONIC, as bpf_ktime_get_ns() says it.
pub fn clock_ns() -> u64 {
    // It cannot fail: every kernel has this clock. 0 would be a time at which nothing was vouched for.
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map_or(0, |now| now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}

impl ProbeRows {
    pub(super) fn open(pin_path: &Path, filter: Arc<Mutex<WireFilter>>) -> Result<ProbeRows> {
        let open = |name: &str| pinned::open_map(pin_path, name);
        let (rows, state) = (open("probes")?, open("probe_state")?);
        let secret = secret(&state)?;
        Ok(ProbeRows { rows, state, filter, secret, known: None })
    }

    /// Makes these the answers, and no others; those beyond the map's capacity are left to the listening sockets.
    ///
    /// # Errors
    /// When a map cannot be read or written: the kernel may still have rows that are not true any more.
    pub fn write(&mut self, answers: &[ProbeAnswer]) -> Result<()> {
        let rows = answers.iter().map(|answer| (ProbeKey::of(answer), Probe::of(answer)));
        let rows: BTreeMap<ProbeKey, Probe> = rows.take(self.rows.max_entries() as usize).collect();
        self.open_filter(&rows)?;
        // What fails leaves it unknown what the kernel has.
        let known = self.known.take().map_or_else(|| self.read(), Ok)?;
        // The row by which a port is found goes first, and comes last.
        for key in known.keys().filter(|key| !rows.contains_key(key)) {
            self.rows.delete(bytemuck::bytes_of(key)).context("cannot delete a row of the map probes")?;
        }
        for (key, row) in rows.iter().rev().filter(|(key, row)| known.get(key) != Some(row)) {
            let (key, row) = (bytemuck::bytes_of(key), bytemuck::bytes_of(row));
            self.rows.update(key, row, MapFlags::ANY).context("cannot write the map probes")?;
        }
        self.known = Some(rows);
        Ok(())
    }

    /// All that was written was true at this time of [`clock_ns`].
    ///
    /// # Errors
    /// When the map cannot be written.
    pub fn vouch(&self, alive_ns: u64) -> Result<()> {
        let state = ProbeState { alive_ns, secret: self.secret };
        let written = self.state.update(&STATE, bytemuck::bytes_of(&state), MapFlags::ANY);
        written.context("cannot write the map probe_state")
    }

    /// Before the rows: packets to these ports are looked at.
    fn open_filter(&self, rows: &BTreeMap<ProbeKey, Probe>) -> Result<()> {
        let mut filter = self.filter.lock().unwrap_or_else(PoisonError::into_inner);
        filter.add_ports(rows.keys().map(ProbeKey::port)).context("cannot write the map wire_filter")?;
        Ok(())
    }

    fn read(&self) -> Result<BTreeMap<ProbeKey, Probe>> {
        let (mut batches, mut known) = (Batches::new(&self.rows), BTreeMap::new());
        loop {
            let batch = batches.next(&self.rows, ROWS_AT_ONCE).context("cannot read the map probes")?;
            known.extend(
                batch
                    .rows()
                    .map(|(key, row)| (bytemuck::pod_read_unaligned(key), bytemuck::pod_read_unaligned::<Probe>(row))),
            );
            if batch.ended {
                return Ok(known);
            }
        }
    }
}

/// The secret of the cookies, made when there is none.
fn secret(map: &MapHandle) -> Result<[u64; 2]> {
    let state = map.lookup(&STATE, MapFlags::ANY).context("cannot read the map probe_state")?.unwrap_or_default();
    let known = bytemuck::try_pod_read_unaligned::<ProbeState>(&state).ok();
    if let Some(state) = known.filter(|state| state.secret != [0; 2]) {
        return Ok(state.secret);
    }
    let mut bytes = [0u8; 16];
    // Not the crate of this name: in a static binary it takes /dev/urandom, which an image does not have.
    // SAFETY: `bytes` has room for as many as are asked for, and outlives the call.
    let given = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    ensure!(given == bytes.len() as isize, "the kernel gives no random bytes: {}", io::Error::last_os_error());
    let secret = bytemuck::cast(bytes);
    let state = ProbeState { alive_ns: 0, secret };
    map.update(&STATE, bytemuck::bytes_of(&state), MapFlags::ANY).context("cannot write the map probe_state")?;
    Ok(secret)
}
