//! Frees the places of those who listened to events (`kubelane monitor`) and were killed, so that nothing is written for
//! nobody.

use std::path::PathBuf;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

use crate::bpf::sweep_listeners;

const EVERY: Duration = Duration::from_secs(2);

/// Runs for ever; that the state cannot be read is told of when the reason is new.
///
/// # Errors
/// Never: it ends with the daemon.
pub async fn watch(pin_path: PathBuf) -> anyhow::Result<()> {
    let mut told = None;
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match sweep_listeners(&pin_path) {
            Ok(gone) => {
                if gone > 0 {
                    tracing::debug!("{gone} who listened to events were killed: their places are free");
                }
                told = None;
            }
            Err(error) => {
                let error = format!("{error:#}");
                if told.as_ref() != Some(&error) {
                    tracing::warn!("who listens to events cannot be read: {error}; trying again");
                    told = Some(error);
                }
            }
        }
    }
}
