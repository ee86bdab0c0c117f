//! Requests without a break while something changes, and what each of them met.

use std::io::BufRead as _;
use std::net::SocketAddr;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, bail};

use super::lab::Place;
use super::lab_binary;
use super::messages::LoadRecord;
use super::process::Process;

/// CLOCK_MONOTONIC in microseconds: the same clock in every process of the machine.
pub fn now_micros() -> anyhow::Result<u64> {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).context("reading the clock")?;
    Ok(Duration::from(time).as_micros().try_into()?)
}

/// A running `kubelane-lab load`.
pub struct Load {
    process: Process,
    records: JoinHandle<anyhow::Result<Vec<LoadRecord>>>,
}

impl Load {
    /// Starts HTTP requests from `place` to `to`, one after another, each on a new connection.
    pub fn start(place: &Place, to: SocketAddr) -> anyhow::Result<Load> {
        let mut process = place.spawn(&lab_binary()?, &["load", "--to", &to.to_string()])?;
        let stdout = process.stdout()?;
        let records = std::thread::spawn(move || {
            let parse = |line: Result<String, std::io::Error>| Ok(serde_json::from_str(&line?)?);
            stdout.lines().map(parse).collect()
        });
        Ok(Load { process, records })
    }

    /// Ends it after the request under way; every request that was made.
    pub fn finish(mut self) -> anyhow::Result<Vec<LoadRecord>> {
        drop(self.process.stdin()?);
        let Ok(records) = self.records.join() else { bail!("the reader of a load panicked") };
        let status = self.process.wait()?;
        if !status.success() {
            bail!("a load ended with {status}");
        }
        records.context("reading the records of a load")
    }
}

/// What went wrong in `records`, each once.
pub fn failures(records: &[LoadRecord]) -> Vec<&String> {
    let mut failures: Vec<&String> = records.iter().filter_map(|record| record.result.as_ref().err()).collect();
    failures.sort();
    failures.dedup();
    failures
}
