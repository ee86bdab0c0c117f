//! Taking away flows that have ended: a pass over the tables, a bounded part at a time, beside the traffic.
//!
//! Nothing depends on it being prompt. A flow that is over gives its place away by itself; rows that nobody asks for
//! again only take room. When the lasting table fills up, silence is tolerated for less and less time, so that what is
//! idle goes before what is in use is refused.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use nix::time::{ClockId, clock_gettime};

use super::pinned;
use crate::abi::flow_timeout::{
    FLOW_TCP_CLOSED, FLOW_TCP_ESTABLISHED, FLOW_TCP_HALF_CLOSED, FLOW_TCP_OPENING, FLOW_TCP_RESET, FLOW_TCP_TIME_WAIT,
    FLOW_UDP_REPLIED, FLOW_UDP_UNREPLIED,
};
use crate::abi::{Flow, FlowKey};
use crate::model::Protocol;

/// Percent of the lasting table in use from which timeouts shrink.
const PRESSURE_FROM: u64 = 70;
/// Percent at which only an eighth of them is left.
const PRESSURE_FULL: u64 = 95;
/// A connection that is open and silent for less is never taken for dead, however full the table is.
const ESTABLISHED_LEAST: u64 = 300;

/// Rows in one system call.
const ROWS_AT_ONCE: usize = 4096;

/// What one call did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowPass {
    /// Rows looked at.
    pub examined: usize,
    /// Rows taken away, two for a flow.
    pub removed: usize,
    /// Rows of the lasting table, as of the last full pass over it; `None` until there was one.
    pub flows: Option<usize>,
    /// How many it can hold.
    pub capacity: usize,
}

/// Where a pass over one table has got to.
struct Table {
    map: MapHandle,
    /// The kernel's position (a bucket number); empty at the beginning.
    position: Vec<u8>,
    /// Rows seen since the beginning.
    seen: usize,
    /// Rows that a bucket may hold, grown when the kernel says that it holds more.
    room: usize,
}

/// The collector; each call goes on where the last one stopped.
pub struct FlowCollector {
    /// `flows`, then `new_flows`.
    tables: [Table; 2],
    turn: usize,
    /// Rows of `flows` at the end of the last full pass.
    flows: Option<usize>,
}

impl FlowCollector {
    /// Opens the tables pinned below `pin_path`.
    pub fn open(pin_path: &Path) -> Result<FlowCollector> {
        let open = |name: &str| -> Result<Table> {
            let path = pinned::maps_directory(pin_path).join(name);
            let map = MapHandle::from_pinned_path(&path)
                .with_context(|| format!("cannot open the pinned map {}", path.display()))?;
            Ok(Table { map, position: Vec::new(), seen: 0, room: 64 })
        };
        Ok(FlowCollector { tables: [open("flows")?, open("new_flows")?], turn: 0, flows: None })
    }

    /// Looks at about `budget` rows (at least one bucket) and takes away those that are over.
    pub fn collect(&mut self, budget: usize) -> Result<FlowPass> {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("cannot read the clock")?;
        self.collect_at(budget, now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
    }

    /// As `collect`, at a time of the caller's: CLOCK_MONOTONIC in nanoseconds.
    pub fn collect_at(&mut self, budget: usize, now_ns: u64) -> Result<FlowPass> {
        let capacity = self.tables[0].map.max_entries() as usize;
        let mut pass = FlowPass { flows: self.flows, capacity, ..FlowPass::default() };
        // Each table at most once a call, or an empty one would be begun again for ever.
        for _ in 0..self.tables.len() {
            let pressure = Pressure::of(self.flows.unwrap_or(0), capacity);
            let table = &mut self.tables[self.turn];
            let ended = table.collect(budget.max(1), now_ns, pressure, &mut pass)?;
            if ended {
                if self.turn == 0 {
                    self.flows = Some(table.seen);
                    pass.flows = self.flows;
                }
                table.position.clear();
                table.seen = 0;
                self.turn = (self.turn + 1) % self.tables.len();
            }
            if !ended || pass.examined >= budget {
                break;
            }
        }
        Ok(pass)
    }
}

impl Table {
    /// True at the end of the table.
    fn collect(&mut self, budget: usize, now_ns: u64, pressure: Pressure, pass: &mut FlowPass) -> Result<bool> {
        while pass.examined < budget {
            let (rows, ended) = self.next_rows(budget - pass.examined)?;
            pass.examined += rows.len();
            self.seen += rows.len();
            for (key, flow) in rows {
                pass.removed += self.remove_if_over(&key, &flow, now_ns, pressure)?;
            }
            if ended {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Up to `wanted` rows (more if one bucket has more), and whether they are the last. Rows that come or go in the
    /// meantime may be met twice or not at all.
    fn next_rows(&mut self, wanted: usize) -> Result<(Vec<(FlowKey, Flow)>, bool)> {
        loop {
            let room = wanted.min(ROWS_AT_ONCE).max(self.room);
            let mut keys = vec![<FlowKey as bytemuck::Zeroable>::zeroed(); room];
            let mut flows = vec![<Flow as bytemuck::Zeroable>::zeroed(); room];
            let mut next = [0u8; 8];
            let mut count = room as u32;
            let input = if self.position.is_empty() { std::ptr::null_mut() } else { self.position.as_mut_ptr().cast() };
            // SAFETY: `keys` and `flows` have room for `count` rows of the map's types (the skeleton asserts their
            // sizes); a hash's position is four bytes, for which `position` (8 bytes once set) and `next` have room.
            let result = unsafe {
                libbpf_sys::bpf_map_lookup_batch(
                    self.map.as_fd().as_raw_fd(),
                    input,
                    next.as_mut_ptr().cast(),
                    keys.as_mut_ptr().cast(),
                    flows.as_mut_ptr().cast(),
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
                return Err(io::Error::from_raw_os_error(-result)).context("cannot read the table of flows");
            }
            self.position = next.to_vec();
            keys.truncate(count as usize);
            return Ok((keys.into_iter().zip(flows).collect(), ended));
        }
    }

    /// Removes the row, and its partner, if the flow has ended; returns how many rows went.
    fn remove_if_over(&self, key: &FlowKey, flow: &Flow, now_ns: u64, pressure: Pressure) -> Result<usize> {
        let limit = pressure.limit(timeout(key, flow));
        if idle(flow, now_ns) <= limit {
            return Ok(0);
        }
        let partner_key = FlowKey { ends: flow.ends.reversed(), ..*key };
        let partner = self.lookup(&partner_key)?.filter(|partner| partner.ends.reversed() == key.ends);
        if let Some(partner) = &partner
            && idle(partner, now_ns) <= pressure.limit(timeout(key, partner))
        {
            return Ok(0);
        }
        let mut removed = usize::from(self.delete(key)?);
        if partner.is_some() {
            removed += usize::from(self.delete(&partner_key)?);
        }
        Ok(removed)
    }

    fn lookup(&self, key: &FlowKey) -> Result<Option<Flow>> {
        let row = self.map.lookup(bytemuck::bytes_of(key), MapFlags::ANY).context("cannot read the table of flows")?;
        Ok(row.map(|bytes| bytemuck::pod_read_unaligned(&bytes)))
    }

    fn delete(&self, key: &FlowKey) -> Result<bool> {
        match self.map.delete(bytemuck::bytes_of(key)) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == libbpf_rs::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error).context("cannot delete from the table of flows"),
        }
    }
}

/// Nanoseconds since the row's last packet.
fn idle(flow: &Flow, now_ns: u64) -> u64 {
    now_ns.saturating_sub(flow.used_ns)
}

/// Seconds of silence after which a flow in this state is over.
fn timeout(key: &FlowKey, flow: &Flow) -> u32 {
    if key.protocol != Protocol::Tcp as u8 {
        return if flow.replied != 0 { FLOW_UDP_REPLIED } else { FLOW_UDP_UNREPLIED };
    }
    match (flow.reset != 0, flow.client_closed != 0, flow.backend_closed != 0) {
        (true, _, _) => FLOW_TCP_RESET,
        (_, true, true) if flow.backend_first != 0 => FLOW_TCP_TIME_WAIT,
        (_, true, true) => FLOW_TCP_CLOSED,
        (_, true, false) | (_, false, true) => FLOW_TCP_HALF_CLOSED,
        _ if flow.replied != 0 => FLOW_TCP_ESTABLISHED,
        _ => FLOW_TCP_OPENING,
    }
}

/// How much of each timeout is granted, in 256ths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pressure(u64);

impl Pressure {
    fn of(flows: usize, capacity: usize) -> Pressure {
        let percent = flows as u64 * 100 / (capacity as u64).max(1);
        let over = percent.clamp(PRESSURE_FROM, PRESSURE_FULL) - PRESSURE_FROM;
        Pressure(256 - over * (256 - 32) / (PRESSURE_FULL - PRESSURE_FROM))
    }

    /// Nanoseconds. An open TCP connection's day shrinks faster, down to minutes, or nothing would be gained.
    fn limit(self, seconds: u32) -> u64 {
        let granted = u64::from(seconds) * 1_000_000_000 * self.0 / 256;
        if seconds != FLOW_TCP_ESTABLISHED || self.0 == 256 {
            return granted;
        }
        (granted * self.0 / 256 * self.0 / 256).max(ESTABLISHED_LEAST * 1_000_000_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_shrink_as_the_table_fills_but_open_connections_keep_five_minutes() {
        let hours = |ns: u64| ns / 3_600_000_000_000;
        assert_eq!(Pressure::of(0, 100), Pressure(256));
        assert_eq!(Pressure::of(70, 100), Pressure(256));
        assert_eq!(Pressure::of(100, 100), Pressure(32));
        assert_eq!(hours(Pressure(256).limit(FLOW_TCP_ESTABLISHED)), 24);
        assert_eq!(Pressure(32).limit(FLOW_TCP_ESTABLISHED), 300_000_000_000);
        assert_eq!(Pressure(32).limit(FLOW_UDP_REPLIED), 15_000_000_000);
    }
}
