//! Taking away flows that have ended: a pass over the tables, a bounded part at a time, beside the traffic.
//!
//! Nothing depends on it being prompt. A flow that is over gives its place away by itself; rows that nobody asks for
//! again only take room. When the lasting table fills up, silence is tolerated for less and less time, so that what is
//! idle goes before what is in use is refused.

use std::path::Path;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use nix::time::{ClockId, clock_gettime};

use super::batch::Batches;
use super::pinned;
use crate::abi::flow_kind::FLOW_REPLY;
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
    /// Of `flows`, then `new_flows`.
    pub tables: [TableUse; 2],
}

/// A table as of the last full pass over it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableUse {
    /// `None` until there was a pass.
    pub seen: Option<Seen>,
    /// Rows that it can hold.
    pub capacity: usize,
}

/// What a pass saw. Rows that came or went meanwhile may have been met twice or not at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub rows: usize,
    /// By [`PROTOCOLS`] and [`STATES`], from the requests' rows: a flow counts once.
    pub flows: [[usize; 3]; 3],
}

/// Protocols that flows have.
pub const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
/// What becomes of a flow: not proved by both ends, proved, and (of TCP) with a FIN or RST seen.
pub const STATES: [&str; 3] = ["opening", "established", "closing"];

impl Seen {
    fn note(&mut self, key: &FlowKey, flow: &Flow) {
        self.rows += 1;
        if u32::from(flow.kind) & FLOW_REPLY != 0 {
            return;
        }
        let Some(protocol) = PROTOCOLS.iter().position(|protocol| *protocol as u8 == key.protocol) else { return };
        let closing = flow.reset != 0 || flow.client_closed != 0 || flow.backend_closed != 0;
        let state = if closing { 2 } else { usize::from(flow.replied != 0) };
        self.flows[protocol][state] += 1;
    }
}

/// Where a pass over one table has got to.
struct Table {
    map: MapHandle,
    batches: Batches,
    /// Since the beginning.
    seen: Seen,
    /// By the last full pass.
    last: Option<Seen>,
}

/// The collector; each call goes on where the last one stopped.
pub struct FlowCollector {
    /// `flows`, then `new_flows`.
    tables: [Table; 2],
    turn: usize,
}

impl FlowCollector {
    /// Opens the tables pinned below `pin_path`.
    pub fn open(pin_path: &Path) -> Result<FlowCollector> {
        let open = |name: &str| -> Result<Table> {
            let path = pinned::maps_directory(pin_path).join(name);
            let map = MapHandle::from_pinned_path(&path)
                .with_context(|| format!("cannot open the pinned map {}", path.display()))?;
            Ok(Table { batches: Batches::new(&map), map, seen: Seen::default(), last: None })
        };
        Ok(FlowCollector { tables: [open("flows")?, open("new_flows")?], turn: 0 })
    }

    /// Looks at about `budget` rows (at least one bucket) and takes away those that are over.
    pub fn collect(&mut self, budget: usize) -> Result<FlowPass> {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("cannot read the clock")?;
        self.collect_at(budget, now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
    }

    /// As `collect`, at a time of the caller's: CLOCK_MONOTONIC in nanoseconds.
    pub fn collect_at(&mut self, budget: usize, now_ns: u64) -> Result<FlowPass> {
        let mut pass = FlowPass::default();
        // Each table at most once a call, or an empty one would be begun again for ever.
        for _ in 0..self.tables.len() {
            let lasting = self.tables[0].in_use();
            let pressure = Pressure::of(lasting.seen.map_or(0, |seen| seen.rows), lasting.capacity);
            let table = &mut self.tables[self.turn];
            let ended = table.collect(budget.max(1), now_ns, pressure, &mut pass)?;
            if ended {
                table.batches.restart();
                table.last = Some(std::mem::take(&mut table.seen));
                self.turn = (self.turn + 1) % self.tables.len();
            }
            if !ended || pass.examined >= budget {
                break;
            }
        }
        pass.tables = [self.tables[0].in_use(), self.tables[1].in_use()];
        Ok(pass)
    }
}

impl Table {
    fn in_use(&self) -> TableUse {
        TableUse { seen: self.last, capacity: self.map.max_entries() as usize }
    }

    /// True at the end of the table.
    fn collect(&mut self, budget: usize, now_ns: u64, pressure: Pressure, pass: &mut FlowPass) -> Result<bool> {
        while pass.examined < budget {
            let Table { map, batches, seen, .. } = self;
            let wanted = ROWS_AT_ONCE.min(budget - pass.examined);
            let batch = batches.next(map, wanted).context("cannot read the table of flows")?;
            pass.examined += batch.len();
            for (key, flow) in batch.rows() {
                let (key, flow) = (bytemuck::pod_read_unaligned(key), bytemuck::pod_read_unaligned(flow));
                match remove_if_over(map, &key, &flow, now_ns, pressure)? {
                    Some(removed) => pass.removed += removed,
                    None => seen.note(&key, &flow),
                }
            }
            if batch.ended {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Removes the row, and its partner, if the flow has ended: how many rows went (none, if others were faster), or `None`.
fn remove_if_over(
    map: &MapHandle,
    key: &FlowKey,
    flow: &Flow,
    now_ns: u64,
    pressure: Pressure,
) -> Result<Option<usize>> {
    let limit = pressure.limit(timeout(key, flow));
    if idle(flow, now_ns) <= limit {
        return Ok(None);
    }
    let partner_key = FlowKey { ends: flow.ends.reversed(), ..*key };
    let partner = lookup(map, &partner_key)?.filter(|partner| partner.ends.reversed() == key.ends);
    if let Some(partner) = &partner
        && idle(partner, now_ns) <= pressure.limit(timeout(key, partner))
    {
        return Ok(None);
    }
    let mut removed = usize::from(delete(map, key)?);
    if partner.is_some() {
        removed += usize::from(delete(map, &partner_key)?);
    }
    Ok(Some(removed))
}

fn lookup(map: &MapHandle, key: &FlowKey) -> Result<Option<Flow>> {
    let row = map.lookup(bytemuck::bytes_of(key), MapFlags::ANY).context("cannot read the table of flows")?;
    Ok(row.map(|bytes| bytemuck::pod_read_unaligned(&bytes)))
}

fn delete(map: &MapHandle, key: &FlowKey) -> Result<bool> {
    match map.delete(bytemuck::bytes_of(key)) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == libbpf_rs::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).context("cannot delete from the table of flows"),
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
