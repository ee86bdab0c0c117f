//! The bpf(2) calls of one change, counted by strace: the daemon's own account is not evidence.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::change::{Changes, Edit};
use crate::laboratory::eventually;
use crate::laboratory::process::in_path;

/// Changes of each kind under strace.
const CHANGES: usize = 20;

/// Prints how many calls of each kind one change needs.
pub fn print(pid: u32, changes: &mut Changes) -> anyhow::Result<()> {
    if !in_path("strace") {
        println!("strace is not installed: bpf(2) calls are not counted from outside.\n");
        return Ok(());
    }
    println!("bpf(2) calls for one change, counted by strace over {CHANGES} changes of each kind:\n");
    for edit in Edit::ALL {
        let counts = count(pid, || (0..CHANGES).try_for_each(|_| changes.one(edit).map(drop)))?;
        let total: usize = counts.values().sum();
        let each: Vec<String> =
            counts.iter().map(|(what, n)| format!("{what} {:.2}", *n as f64 / CHANGES as f64)).collect();
        println!("- {edit}: {:.2} ({})", total as f64 / CHANGES as f64, each.join(", "));
    }
    println!();
    Ok(())
}

/// The commands of the bpf(2) calls that the process makes while `work` runs.
fn count(pid: u32, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<BTreeMap<String, usize>> {
    let trace = tempfile::NamedTempFile::new().context("making a file for strace")?;
    let mut strace = Command::new("strace")
        .args(["-f", "-qq", "-e", "trace=bpf", "-o"])
        .arg(trace.path())
        .args(["-p", &pid.to_string()])
        .stdin(Stdio::null())
        .spawn()
        .context("starting strace")?;
    let traced = eventually(Duration::from_secs(5), || is_traced(pid));
    let result = if traced { work() } else { Ok(()) };
    // SIGINT makes strace let go of the process before it ends.
    kill(Pid::from_raw(strace.id().cast_signed()), Signal::SIGINT).context("ending strace")?;
    strace.wait().context("waiting for strace")?;
    if !traced {
        bail!("strace could not attach to the daemon");
    }
    result?;
    let mut counts = BTreeMap::new();
    for line in fs::read_to_string(trace.path()).context("reading what strace saw")?.lines() {
        // "1234 bpf(BPF_MAP_UPDATE_BATCH, {...": the second half of a call that was interrupted has no such start.
        if let Some((_, rest)) = line.split_once(" bpf(BPF_") {
            let command = rest.split([',', ')', ' ']).next().unwrap_or(rest);
            *counts.entry(command.to_owned()).or_default() += 1;
        }
    }
    Ok(counts)
}

/// Whether every thread has a tracer.
fn is_traced(pid: u32) -> bool {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let statuses: Vec<String> = tasks.filter_map(|task| fs::read_to_string(task.path().join("status")).ok()).collect();
    !statuses.is_empty() && statuses.iter().all(|status| !status.contains("TracerPid:\t0\n"))
}
