//! The background pass over the tables of flows, a bounded part at a time.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::time::{MissedTickBehavior, interval};

use crate::bpf::{FlowCollector, FlowPass};
use crate::serve::Metrics;

/// Between two parts of a pass.
const EVERY: Duration = Duration::from_secs(5);
/// Rows of one part: some tens of milliseconds of one processor. Both tables, full, are seen in half a minute.
const ROWS: usize = 131_072;

/// Runs for ever; a part that fails is told of when its reason is new, and tried again.
///
/// # Errors
/// When a part panics.
pub async fn collect(mut collector: FlowCollector, metrics: Arc<Metrics>) -> anyhow::Result<()> {
    let mut told = None;
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let part = tokio::task::spawn_blocking(move || {
            let pass = collector.collect(ROWS);
            (collector, pass)
        });
        let pass;
        (collector, pass) = part.await.context("the collection of ended flows broke off")?;
        match pass {
            Ok(FlowPass { flows, capacity, .. }) => {
                metrics.set_map("flows", flows.unwrap_or(0) as u64, capacity as u64);
                told = None;
            }
            Err(error) => {
                let error = format!("{error:#}");
                if told.as_ref() != Some(&error) {
                    tracing::warn!("ended flows cannot be taken away: {error}; trying again");
                    told = Some(error);
                }
            }
        }
    }
}
