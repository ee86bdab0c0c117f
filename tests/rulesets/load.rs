//! Loading a rule set into the network namespace that the calling thread has entered.

use std::fs;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};

use super::Family;

/// The command that loads iptables rules. Legacy: through nf_tables, thousands of Services take minutes.
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
    // All namespaces share a lock: wait for it.
    run(&[iptables_command(family), "-w"], rules, limit)
}

/// Adds the table of `rules`. [`TooSlow`] when that takes longer than `limit`.
pub fn nftables(rules: &str, limit: Duration) -> anyhow::Result<()> {
    run(&["nft", "-f", "-"], rules, limit)
}

/// The exit code with which timeout(1) says that time was up.
const TIME_UP: i32 = 124;

fn run(command: &[&str], input: &str, limit: Duration) -> anyhow::Result<()> {
    let namespace = |of: &str| fs::read_link(format!("/proc/{of}/ns/net")).context("reading a link to a namespace");
    // A thread that entered a namespace is never the first one.
    if namespace("thread-self")? == namespace("self")? {
        bail!("{} would change this process's own rules: enter another network namespace first", command[0]);
    }
    let mut child = Command::new("timeout")
        .arg(limit.as_secs_f64().to_string())
        .args(command)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("running {} (`make setup` installs it)", command[0]))?;
    // A loader that ends early breaks the pipe; what it says then is the better reason.
    let told = child.stdin.take().context("a loader has a stdin")?.write_all(input.as_bytes());
    let output = child.wait_with_output().with_context(|| format!("waiting for {}", command[0]))?;
    if output.status.code() == Some(TIME_UP) {
        return Err(TooSlow { loader: command[0].to_owned(), limit }.into());
    }
    if !output.status.success() {
        bail!("{} failed: {}", command.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    told.with_context(|| format!("talking to {}", command[0]))
}
