//! Control groups: where a place's processes live, so that a node's BPF programs see their sockets and no others.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Where cgroup2 is mounted: /sys/fs/cgroup on most machines, elsewhere when cgroup1 lives beside it.
pub fn mount_point() -> anyhow::Result<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?;
    for line in table.lines() {
        // proc_pid_mountinfo(5): six fixed fields, optional ones, " - ", file system type, source, options.
        let Some((fixed, rest)) = line.split_once(" - ") else { continue };
        if rest.split(' ').next() == Some("cgroup2")
            && let Some(path) = fixed.split(' ').nth(4)
        {
            return Ok(PathBuf::from(path));
        }
    }
    bail!("cgroup2 is not mounted (mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified)")
}

/// Kills every process in `group` and below, by cgroup.kill (kernel 5.14+) or one by one.
pub fn kill_all(group: &Path) {
    if fs::write(group.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    for directory in tree(group) {
        let Ok(pids) = fs::read_to_string(directory.join("cgroup.procs")) else { continue };
        for pid in pids.lines().filter_map(|line| line.parse().ok()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Kills what runs in `group`, then removes it with everything below. Fine when it is not there.
pub fn remove(group: &Path) -> anyhow::Result<()> {
    let mut last = Ok(());
    let gone = super::eventually(Duration::from_secs(5), || {
        if !group.exists() {
            return true;
        }
        kill_all(group);
        last = tree(group).iter().try_for_each(fs::remove_dir);
        last.is_ok()
    });
    if gone { Ok(()) } else { last.with_context(|| format!("removing the cgroup {}", group.display())) }
}

/// The group and all groups below it, the deepest first.
fn tree(group: &Path) -> Vec<PathBuf> {
    let mut groups = Vec::new();
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            groups.extend(tree(&entry.path()));
        }
    }
    groups.push(group.to_owned());
    groups
}
