//! Control groups: where a place's processes live, so that a node's BPF programs see their sockets and no others.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

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

/// Where the memory controller of cgroup1 is, on machines that have it beside cgroup2.
pub fn memory_mount_point() -> Option<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let mut mounts = table.lines().filter_map(|line| line.split_once(" - "));
    let (fixed, _) = mounts.find(|(_, rest)| {
        let mut words = rest.split(' ');
        words.next() == Some("cgroup") && words.nth(1).is_some_and(|options| options.split(',').any(|o| o == "memory"))
    })?;
    fixed.split(' ').nth(4).map(PathBuf::from)
}

/// A group whose processes, and the maps that they make, share a limit of memory. Removed when dropped.
pub struct MemoryGroup {
    pub path: PathBuf,
    is_v2: bool,
}

impl MemoryGroup {
    /// Of this name in cgroup1; in cgroup2 below `parent`, in which a daemon has to be to be served itself. `None`: no
    /// hierarchy has the memory controller.
    pub fn new(name: &str, parent: &Path) -> Option<MemoryGroup> {
        let group = match memory_mount_point() {
            Some(mount) => MemoryGroup { path: mount.join(name), is_v2: false },
            None => {
                let top = mount_point().ok()?;
                let mut above: Vec<&Path> = parent.ancestors().take_while(|path| path.starts_with(&top)).collect();
                above.reverse();
                above.iter().try_for_each(|path| fs::write(path.join("cgroup.subtree_control"), "+memory")).ok()?;
                MemoryGroup { path: parent.join("memory"), is_v2: true }
            }
        };
        fs::create_dir(&group.path).ok()?;
        Some(group)
    }

    fn file(&self, v1: &str, v2: &str) -> PathBuf {
        self.path.join(if self.is_v2 { v2 } else { v1 })
    }

    /// Leaves room for so many bytes more than are in use, once nothing of that can be given back. Programs, maps and rows
    /// that nobody has any more are freed a moment later.
    pub fn leave(&self, room: u64) -> anyhow::Result<()> {
        const SETTLED: Duration = Duration::from_secs(1);
        let (mut least, mut since) = (self.usage()?, Instant::now());
        while since.elapsed() < SETTLED {
            std::thread::sleep(SETTLED / 20);
            let now = self.usage()?;
            if now < least {
                (least, since) = (now, Instant::now());
            }
        }
        // Fails when not all can be.
        let _ = fs::write(self.file("memory.force_empty", "memory.reclaim"), if self.is_v2 { "1G" } else { "0" });
        self.limit(Some(self.usage()? + room))
    }

    /// `None`: none.
    pub fn limit(&self, bytes: Option<u64>) -> anyhow::Result<()> {
        let none = if self.is_v2 { "max" } else { "-1" };
        let file = self.file("memory.limit_in_bytes", "memory.max");
        fs::write(&file, bytes.map_or(none.to_owned(), |bytes| bytes.to_string()))
            .with_context(|| format!("limiting {}", file.display()))
    }

    /// Bytes in use.
    fn usage(&self) -> anyhow::Result<u64> {
        let file = self.file("memory.usage_in_bytes", "memory.current");
        let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        Ok(text.trim().parse()?)
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            eprintln!("{error:#}");
        }
    }
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
