//! Which machine figures are of: they are compared with those of its like only.

use std::fs;

use anyhow::{Context as _, Result};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::laboratory::figures::release_line;

pub fn kernel() -> Result<String> {
    let name = nix::sys::utsname::uname().context("uname")?;
    Ok(release_line(&name.release().to_string_lossy()))
}

/// Model, family, model number and stepping of the processor, the kernel, and whether it guards indirect branches by
/// retpolines, which calls and returns pay for: "AMD EPYC 25.1.1, 6.18, retpolines". Virtual machines are given names of many
/// models, and see more or fewer of a model's features, so that the name does not tell.
pub fn processor_and_kernel() -> Result<String> {
    let cpus = fs::read_to_string("/proc/cpuinfo").context("reading /proc/cpuinfo")?;
    let value = |name: &str| {
        let line = cpus.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name));
        line.and_then(|line| line.split_once(':')).map_or("?", |(_, value)| value.trim())
    };
    let numbers = ["cpu family", "model", "stepping"].map(value).join(".");
    let guard = fs::read_to_string("/sys/devices/system/cpu/vulnerabilities/spectre_v2").unwrap_or_default();
    let guard = if guard.contains("Retpolines") { ", retpolines" } else { "" };
    Ok(format!("{} {numbers}, {}{guard}", value("model name").replace('|', "/"), kernel()?))
}

/// Stays on the processor that it is on: what is cached there, and which answers it may still give, is that one's.
pub fn stay_on_this_processor() -> Result<()> {
    let mut set = CpuSet::new();
    set.set(nix::sched::sched_getcpu().context("asking which processor this is")?).context("naming a processor")?;
    sched_setaffinity(Pid::from_raw(0), &set).context("staying on a processor")
}
