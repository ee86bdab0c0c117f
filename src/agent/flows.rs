//! The background passes over what the programs fill: tables of flows, a bounded part at a time, and, for the metrics
//! only, how full the other maps are.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::time::{MissedTickBehavior, interval};

use crate::bpf::{FlowCollector, FlowPass, MapUsage, PROTOCOLS, STATES};
use crate::serve::Metrics;

/// Between two parts of a pass.
const EVERY: Duration = Duration::from_secs(5);
/// Rows of one part: some tens of milliseconds of one processor. Both tables, full, are seen in half a minute.
const ROWS: usize = 131_072;
/// A part that took away one row in so many is followed by the next at once: flows end faster than pauses allow for.
/// (Beside 13,000 new connections a second a part every five seconds would fall behind.)
const BUSY: usize = 8;
/// Parts from one count of the other maps to the next: a minute, less where parts follow at once.
const PARTS_PER_COUNT: usize = 12;

/// What works on a thread of its own, and what it is asked for.
struct Passes {
    flows: FlowCollector,
    usage: MapUsage,
}

/// Runs for ever; a part that fails is told of when its reason is new, and tried again.
///
/// # Errors
/// When a part panics.
pub async fn collect(flows: FlowCollector, usage: MapUsage, metrics: Arc<Metrics>) -> anyhow::Result<()> {
    let mut passes = Passes { flows, usage };
    let mut told = None;
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for part in (0..PARTS_PER_COUNT).cycle() {
        ticks.tick().await;
        let metrics = Arc::clone(&metrics);
        let work = tokio::task::spawn_blocking(move || {
            let result = passes.run(part == 0, &metrics);
            (passes, result)
        });
        let result;
        (passes, result) = work.await.context("collecting ended flows failed")?;
        if result.as_ref().is_ok_and(is_behind) {
            ticks.reset_immediately();
        }
        let error = result.err().map(|error| format!("{error:#}"));
        if let Some(error) = error.as_ref().filter(|error| told.as_ref() != Some(*error)) {
            tracing::warn!("cannot remove ended flows or count map entries: {error}; trying again");
        }
        told = error;
    }
    Ok(())
}

impl Passes {
    fn run(&mut self, count_all: bool, metrics: &Metrics) -> anyhow::Result<FlowPass> {
        let pass = self.flows.collect(ROWS)?;
        measure(&pass, metrics);
        if count_all {
            for (map, rows, capacity) in self.usage.count()? {
                metrics.set_map(map, rows as u64, capacity as u64);
            }
        }
        Ok(pass)
    }
}

/// Whether the part ended before its table did, and found much that was over.
fn is_behind(pass: &FlowPass) -> bool {
    pass.examined >= ROWS && pass.removed * BUSY >= pass.examined
}

fn measure(pass: &FlowPass, metrics: &Metrics) {
    for (map, table) in ["flows4", "flows6"].into_iter().zip(&pass.tables) {
        metrics.set_map(map, table.seen.map_or(0, |seen| seen.rows) as u64, table.capacity as u64);
    }
    for (row, protocol) in PROTOCOLS.into_iter().enumerate() {
        for (column, state) in STATES.into_iter().enumerate() {
            let flows = pass.tables.iter().filter_map(|table| table.seen).map(|seen| seen.flows[row][column]).sum();
            metrics.set_flows(protocol.as_str(), state, flows);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_part_waits_unless_much_was_over_and_more_is_to_be_looked_at() {
        let is_behind = |examined, removed| is_behind(&FlowPass { examined, removed, ..FlowPass::default() });
        assert!(is_behind(ROWS, ROWS / BUSY));
        assert!(is_behind(ROWS + 20, ROWS));
        assert!(!is_behind(ROWS, ROWS / BUSY - 1), "open connections only");
        assert!(!is_behind(ROWS - 1, ROWS - 1), "the end of the table");
        assert!(!is_behind(0, 0));
    }
}
