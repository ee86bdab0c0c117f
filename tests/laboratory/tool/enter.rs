//! The way into a place: cgroup first, then namespace, then exec; so no socket is ever made outside.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};

use crate::laboratory::netns;

pub fn run(netns: &Path, cgroup: &Path, command: &[String]) -> anyhow::Result<()> {
    // Survives exec: nothing outlives a test runner that was killed.
    set_pdeathsig(Signal::SIGKILL).context("asking to die with the parent")?;
    fs::write(cgroup.join("cgroup.procs"), "0").with_context(|| format!("joining the cgroup {}", cgroup.display()))?;
    netns::enter(netns)?;
    // The demo blocks signals in all its threads to take them in one place; its children must not inherit that.
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).context("unblocking signals")?;
    let (program, arguments) = command.split_first().context("no command")?;
    let error = Command::new(program).args(arguments).exec();
    Err(error).with_context(|| format!("running {program}"))
}
