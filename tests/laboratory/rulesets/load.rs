//! Loading a rule set into the network namespace that the calling thread has entered.

use std::fs;
use std::io::{Read as _, Seek as _, Write as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;

use super::Family;

/// Who loads what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loader {
    /// Replaces the tables nat and filter.
    Iptables(Family),
    /// Replaces the chains that are named and leaves all others, as kube-proxy's own call does.
    IptablesChange(Family),
    /// Adds a table, or changes one.
    Nftables,
}

impl Loader {
    /// Legacy iptables: through nf_tables, thousands of Services take minutes. All namespaces share its lock: wait for it.
    pub fn command(self) -> Vec<&'static str> {
        match self {
            Loader::Iptables(family) => vec![iptables_command(family), "-w"],
            Loader::IptablesChange(family) => vec![iptables_command(family), "-w", "--noflush", "--counters"],
            Loader::Nftables => vec!["nft", "-f", "-"],
        }
    }
}

/// The command that loads iptables rules.
pub fn iptables_command(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables-legacy-restore",
        Family::V6 => "ip6tables-legacy-restore",
    }
}

/// A loader that was ended because it took too long.
#[derive(Debug, thiserror::Error)]
#[error("{loader} had not loaded the rules after {limit:?}")]
pub struct TooSlow {
    pub loader: String,
    pub limit: Duration,
}

/// For a caller who waits for as long as it takes.
pub const NO_HURRY: Duration = Duration::from_secs(3600);

/// Replaces the tables nat and filter by those of `rules`. [`TooSlow`] when that takes longer than `limit`.
pub fn iptables(family: Family, rules: &str, limit: Duration) -> anyhow::Result<()> {
    load(Loader::Iptables(family), rules, limit)
}

/// Adds the table of `rules`. [`TooSlow`] when that takes longer than `limit`.
pub fn nftables(rules: &str, limit: Duration) -> anyhow::Result<()> {
    load(Loader::Nftables, rules, limit)
}

fn load(loader: Loader, rules: &str, limit: Duration) -> anyhow::Result<()> {
    let command = loader.command()[0].to_owned();
    within(limit, loader, rules)?.map(drop).ok_or_else(|| TooSlow { loader: command, limit }.into())
}

/// What a loader took: the wall, and user and system time, in which most of the kernel's work is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spent {
    pub wall: Duration,
    pub cpu: Duration,
}

/// Loads `rules`; `None` when the loader took longer than `limit` and was ended. No other child of this process may
/// end in the meantime: the kernel counts them together.
pub fn within(limit: Duration, loader: Loader, rules: &str) -> anyhow::Result<Option<Spent>> {
    let namespace = |of: &str| fs::read_link(format!("/proc/{of}/ns/net")).context("reading a link to a namespace");
    let command = loader.command();
    // A thread that entered a namespace is never the first one.
    if namespace("thread-self")? == namespace("self")? {
        bail!("{} would change this process's own rules: enter another network namespace first", command[0]);
    }
    // Files, not pipes: nobody has to write and read while the loader is waited for.
    let (mut input, mut errors) = (tempfile::tempfile()?, tempfile::tempfile()?);
    input.write_all(rules.as_bytes())?;
    input.rewind()?;
    let (before, began) = (children()?, Instant::now());
    let mut child = Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::from(input))
        .stdout(Stdio::null())
        .stderr(Stdio::from(errors.try_clone()?))
        .spawn()
        .with_context(|| format!("running {} (`make setup` installs it)", command[0]))?;
    let Some(status) = end_of(&mut child, began, limit)? else { return Ok(None) };
    let spent = Spent { wall: began.elapsed(), cpu: children()?.saturating_sub(before) };
    if !status.success() {
        let mut said = String::new();
        errors.rewind()?;
        errors.read_to_string(&mut said)?;
        bail!("{} failed: {}", command.join(" "), said.trim());
    }
    Ok(Some(spent))
}

/// Waits for the end; ends it at the limit.
fn end_of(child: &mut Child, began: Instant, limit: Duration) -> anyhow::Result<Option<ExitStatus>> {
    loop {
        let elapsed = began.elapsed();
        if elapsed > limit {
            child.kill().context("ending a loader")?;
            child.wait().context("waiting for a loader")?;
            return Ok(None);
        }
        if let Some(status) = child.try_wait().context("waiting for a loader")? {
            return Ok(Some(status));
        }
        // A hundredth of the time is near enough.
        std::thread::sleep((elapsed / 100).clamp(Duration::from_micros(50), Duration::from_millis(20)));
    }
}

/// User and system time of all children that have ended.
fn children() -> anyhow::Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).context("reading what children have used")?;
    let duration = |time: TimeVal| Duration::from_micros(time.tv_sec() as u64 * 1_000_000 + time.tv_usec() as u64);
    Ok(duration(usage.user_time()) + duration(usage.system_time()))
}
