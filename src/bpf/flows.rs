//! Taking away flows that have ended: a pass over the tables, a bounded part at a time, beside the traffic.
//!
//! Nothing depends on it being prompt. A flow that is over gives its place away by itself; rows that nobody asks for
//! again only take room. Rows are read here, but nothing is decided on what was read: the program `flow_collect` looks at
//! each candidate again, under the flow's lock, and removes it where the packets' programs cannot miss it.
//!
//! When a protocol's quota of the table fills up, its silence is tolerated for less and less time, so that what is idle
//! goes before what is in use is refused.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use nix::time::{ClockId, clock_gettime};

use super::batch::Batches;
use super::pinned;
use super::reply_filter::ReplyFilter;
use super::test_run::test_run;
use crate::abi::flow_class::{FLOW_CLASS_OTHER, FLOW_CLASS_TCP};
use crate::abi::flow_collect_input::{COLLECT_HEAD, COLLECT_KEYS};
use crate::abi::flow_flag::{FLOW_FIN, FLOW_PROVED, FLOW_REPLY, FLOW_RESET};
use crate::abi::flow_limits_of::{FLOW_LIMITS_NOW, FLOW_LIMITS_SET};
use crate::abi::flow_state::FLOW_SECOND_MASK;
use crate::abi::{Flow, FlowKey, FlowKey4, FlowLimits};
use crate::model::Protocol;

/// Percent of a quota in use from which timeouts shrink.
const PRESSURE_FROM: u64 = 70;
/// Percent at which only an eighth of them is left.
const PRESSURE_FULL: u64 = 95;
/// A connection that is open and silent for less is never taken for dead, however full the table is.
const ESTABLISHED_LEAST: u64 = 300;

/// From one renewal of the filter of replies to the next.
const RENEW_EVERY: Duration = Duration::from_secs(3600);

/// Rows in one system call.
const ROWS_AT_ONCE: usize = 4096;

/// What one call did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowPass {
    /// Rows looked at.
    pub examined: usize,
    /// Rows taken away, two for a flow.
    pub removed: usize,
    /// Of IPv4, then IPv6.
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
/// What becomes of a flow: not proved by both ends, proved, and (of TCP) closed or reset by the client.
pub const STATES: [&str; 3] = ["opening", "established", "closing"];

impl Seen {
    fn note(&mut self, key: &FlowKey, flow: &Flow) {
        self.rows += 1;
        if flow.has(FLOW_REPLY) {
            return;
        }
        let Some(protocol) = PROTOCOLS.iter().position(|protocol| *protocol as u8 == key.protocol) else { return };
        let state = if flow.has(FLOW_FIN | FLOW_RESET) { 2 } else { usize::from(flow.has(FLOW_PROVED)) };
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

/// The program flow_collect of today.
pub(super) type SharedProgram = Arc<Mutex<OwnedFd>>;

/// The collector; each call goes on where the last one stopped.
pub struct FlowCollector {
    /// Of IPv4, then IPv6.
    tables: [Table; 2],
    turn: usize,
    program: SharedProgram,
    limits: MapHandle,
    counts: MapHandle,
    /// Proved flows that have room: of TCP, of all others.
    quotas: [u64; 2],
    /// As the daemon was told.
    wanted: FlowLimits,
    filter: ReplyFilter,
    /// Rows of packets that were handed to the host's stack.
    handed: MapHandle,
    renewal: Renewal,
}

/// What is being done about the filter of replies.
#[derive(Clone, Copy)]
enum Renewal {
    /// Nothing, since then.
    Rests(Instant),
    /// Rows are noted as they are seen, of so many tables more.
    Notes { tables: usize },
}

impl FlowCollector {
    /// Opens the tables pinned below `pin_path`. `program`: flow_collect, loaded; `quotas`: how many proved flows of TCP,
    /// and of all others, have room.
    pub(super) fn open(
        pin_path: &Path,
        program: SharedProgram,
        quotas: [u64; 2],
        wanted: FlowLimits,
    ) -> Result<FlowCollector> {
        let open = |name: &str| pinned::open_map(pin_path, name);
        let table = |name: &str| -> Result<Table> {
            let map = open(name)?;
            Ok(Table { batches: Batches::new(&map), map, seen: Seen::default(), last: None })
        };
        Ok(FlowCollector {
            tables: [table("flows4")?, table("flows6")?],
            turn: 0,
            program,
            limits: open("flow_limits")?,
            counts: open("flow_counts")?,
            quotas,
            wanted,
            filter: ReplyFilter::open(&open("ports")?)?,
            handed: open("handed")?,
            renewal: Renewal::Rests(Instant::now()),
        })
    }

    /// With the next passes the filter of replies is renewed, however long ago that was done.
    pub fn renew_soon(&mut self) {
        if let Renewal::Rests(_) = self.renewal {
            self.tables.iter_mut().for_each(Table::restart);
            self.filter.begin();
            self.renewal = Renewal::Notes { tables: self.tables.len() };
        }
    }

    /// A table has been seen from its beginning to its end.
    fn note_end_of_table(&mut self) -> Result<()> {
        let Renewal::Notes { tables } = self.renewal else { return Ok(()) };
        self.renewal = Renewal::Notes { tables: tables - 1 };
        if tables > 1 {
            return Ok(());
        }
        let mut batches = Batches::new(&self.handed);
        loop {
            let batch = batches.next(&self.handed, ROWS_AT_ONCE).context("cannot read the map handed")?;
            for (key, _) in batch.rows() {
                self.filter.note(&bytemuck::pod_read_unaligned(key));
            }
            if batch.ended {
                break;
            }
        }
        self.filter.finish();
        self.renewal = Renewal::Rests(Instant::now());
        Ok(())
    }

    /// Looks at about `budget` rows (at least one bucket) and takes away those that are over.
    pub fn collect(&mut self, budget: usize) -> Result<FlowPass> {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("cannot read the clock")?;
        let second = now.tv_sec() as u32 & FLOW_SECOND_MASK;
        let limits = self.press()?;
        let mut pass = FlowPass::default();
        if matches!(self.renewal, Renewal::Rests(since) if since.elapsed() >= RENEW_EVERY) {
            self.renew_soon();
        }
        // Each table at most once a call, or an empty one would be begun again for ever.
        for _ in 0..self.tables.len() {
            let table = &mut self.tables[self.turn];
            let filter = matches!(self.renewal, Renewal::Notes { .. }).then_some(&self.filter);
            let ended = table.collect(&self.program, budget.max(1), second, &limits, filter, &mut pass)?;
            if ended {
                table.last = Some(table.seen);
                table.restart();
                self.turn = (self.turn + 1) % self.tables.len();
                self.note_end_of_table()?;
            }
            if !ended || pass.examined >= budget {
                break;
            }
        }
        pass.tables = [self.tables[0].in_use(), self.tables[1].in_use()];
        Ok(pass)
    }

    /// Tells the programs how long silence is tolerated now.
    fn press(&mut self) -> Result<FlowLimits> {
        let count = |class: u32| -> Result<u64> {
            let value = self.counts.lookup(&class.to_ne_bytes(), MapFlags::ANY).context("cannot read flow_counts")?;
            let value = value.and_then(|bytes| Some(u64::from_ne_bytes(bytes.get(..8)?.try_into().ok()?)));
            Ok(value.unwrap_or_default())
        };
        let [tcp, other] = self.quotas;
        let pressures = [Pressure::of(count(FLOW_CLASS_TCP)?, tcp), Pressure::of(count(FLOW_CLASS_OTHER)?, other)];
        let now = pressed(&self.wanted, pressures);
        for (index, limits) in [(FLOW_LIMITS_SET, &self.wanted), (FLOW_LIMITS_NOW, &now)] {
            write_limits(&self.limits, index, limits)?;
        }
        Ok(now)
    }
}

/// Writes a row of `flow_limits`; `index` is one of [`flow_limits_of`](crate::abi::flow_limits_of).
pub(super) fn write_limits(map: &impl MapCore, index: u32, limits: &FlowLimits) -> Result<()> {
    let row = bytemuck::bytes_of(limits);
    map.update(&index.to_ne_bytes(), row, MapFlags::ANY).context("cannot write the map flow_limits")
}

impl Table {
    fn in_use(&self) -> TableUse {
        TableUse { seen: self.last, capacity: self.map.max_entries() as usize }
    }

    fn restart(&mut self) {
        self.batches.restart();
        self.seen = Seen::default();
    }

    /// True at the end of the table. Replies that leave are noted in `filter`.
    fn collect(
        &mut self,
        program: &SharedProgram,
        budget: usize,
        second: u32,
        limits: &FlowLimits,
        filter: Option<&ReplyFilter>,
        pass: &mut FlowPass,
    ) -> Result<bool> {
        let mut candidates = Vec::new();
        while pass.examined < budget {
            let Table { map, batches, seen, .. } = self;
            let wanted = ROWS_AT_ONCE.min(budget - pass.examined);
            let batch = batches.next(map, wanted).context("cannot read the table of flows")?;
            pass.examined += batch.len();
            for (key, flow) in batch.rows() {
                let key = match key.len() {
                    16 => FlowKey::from(bytemuck::pod_read_unaligned::<FlowKey4>(key)),
                    _ => bytemuck::pod_read_unaligned(key),
                };
                let flow: Flow = bytemuck::pod_read_unaligned(flow);
                seen.note(&key, &flow);
                if let Some(filter) = filter.filter(|_| flow.is_at_egress()) {
                    filter.note(&key);
                }
                candidates.extend(candidate(&key, &flow, second, limits));
            }
            let ended = batch.ended;
            for keys in candidates.chunks(COLLECT_KEYS as usize) {
                pass.removed += remove(program, keys)?;
            }
            candidates.clear();
            if ended {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Removes those of these flows that are over; returns how many rows went.
fn remove(program: &SharedProgram, keys: &[FlowKey]) -> Result<usize> {
    let mut input = vec![0u8; COLLECT_HEAD as usize];
    input.extend_from_slice(bytemuck::cast_slice(keys));
    let program = program.lock().unwrap_or_else(PoisonError::into_inner);
    let (removed, ..) = test_run(program.as_fd(), &input, &[], &mut [], 1).context("cannot remove ended flows")?;
    Ok(removed as usize)
}

/// The key of the flow that is perhaps over, as far as this row alone tells: that of its requests, or of a replies' row
/// that was never answered and may have lost its partner.
fn candidate(key: &FlowKey, flow: &Flow, second: u32, limits: &FlowLimits) -> Option<FlowKey> {
    let idle = flow.idle(second);
    let is_tcp = key.protocol == Protocol::Tcp as u8;
    if !flow.has(FLOW_REPLY) {
        let limit = match () {
            () if !is_tcp => {
                if flow.has(FLOW_PROVED) {
                    limits.udp_stream
                } else {
                    limits.udp
                }
            }
            () if flow.has(FLOW_RESET) => limits.tcp_reset,
            () if flow.has(FLOW_FIN) => limits.tcp_closed.min(limits.tcp_half_closed),
            () if flow.has(FLOW_PROVED) => limits.tcp_established,
            () => limits.tcp_opening,
        };
        return (idle > limit).then_some(*key);
    }
    if flow.has(FLOW_RESET | FLOW_FIN) {
        let limit = limits.tcp_reset.min(limits.tcp_closed).min(limits.tcp_half_closed);
        return (idle > limit).then(|| key.partner(&flow.ends));
    }
    (!flow.has(FLOW_PROVED) && idle > limits.tcp_opening).then_some(*key)
}

/// How much of each timeout is granted, in 256ths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pressure(u64);

impl Pressure {
    fn of(flows: u64, quota: u64) -> Pressure {
        let percent = flows * 100 / quota.max(1);
        let over = percent.clamp(PRESSURE_FROM, PRESSURE_FULL) - PRESSURE_FROM;
        Pressure(256 - over * (256 - 32) / (PRESSURE_FULL - PRESSURE_FROM))
    }

    /// Seconds, one at least.
    fn limit(self, seconds: u32) -> u32 {
        (u64::from(seconds) * self.0 / 256).max(1) as u32
    }

    /// An open TCP connection's day shrinks faster, down to minutes, or nothing would be gained.
    fn limit_established(self, seconds: u32) -> u32 {
        if self.0 == 256 {
            return seconds;
        }
        let granted = u64::from(seconds) * self.0 / 256 * self.0 / 256 * self.0 / 256;
        granted.max(ESTABLISHED_LEAST).min(u64::from(seconds)) as u32
    }
}

fn pressed(wanted: &FlowLimits, [tcp, other]: [Pressure; 2]) -> FlowLimits {
    FlowLimits {
        tcp_opening: tcp.limit(wanted.tcp_opening),
        tcp_established: tcp.limit_established(wanted.tcp_established),
        tcp_half_closed: tcp.limit(wanted.tcp_half_closed),
        tcp_closed: tcp.limit(wanted.tcp_closed),
        tcp_time_wait: tcp.limit(wanted.tcp_time_wait),
        tcp_reset: tcp.limit(wanted.tcp_reset),
        udp: other.limit(wanted.udp),
        udp_stream: other.limit(wanted.udp_stream),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_shrink_as_a_quota_fills_but_open_connections_keep_five_minutes() {
        assert_eq!(Pressure::of(0, 100), Pressure(256));
        assert_eq!(Pressure::of(70, 100), Pressure(256));
        assert_eq!(Pressure::of(100, 100), Pressure(32));
        let wanted = FlowLimits::default();
        assert_eq!(pressed(&wanted, [Pressure(256); 2]), wanted);
        let udp_full = pressed(&wanted, [Pressure(256), Pressure(32)]);
        assert_eq!(udp_full, FlowLimits { udp: 3, udp_stream: 15, ..wanted }, "TCP does not pay for UDP");
        let tcp_full = pressed(&wanted, [Pressure(32), Pressure(256)]);
        assert_eq!((tcp_full.tcp_established, tcp_full.udp_stream), (300, 120));
        let short = FlowLimits { tcp_established: 60, ..wanted };
        assert_eq!(pressed(&short, [Pressure(32); 2]).tcp_established, 60, "never longer than asked for");
    }
}
