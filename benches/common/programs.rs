//! What the kernel's own run statistics say of each BPF program while something runs.
//!
//! The kernel reads its clock before and after each run, and what that takes is in its figures: `empty.rs` measures it.

use std::fs;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::path::Path;

use anyhow::{Context as _, bail};
use kubelane::bpf::pinned::links_directory;
use libbpf_rs::Link;
use libbpf_rs::query::{ProgInfoIter, ProgramInfo};

/// How long a program took.
#[derive(Clone, Debug)]
pub struct Mean {
    pub node: String,
    /// The kernel keeps 15 characters of a name.
    pub program: String,
    pub runs: u64,
    pub nanoseconds: f64,
}

/// A node whose programs are looked at: its name and its pins.
pub type Watched<'a> = (&'a str, &'a Path);

/// Runs `work` with statistics on (they cost time themselves, so that nothing else is measured meanwhile): the mean
/// time of each of the nodes' programs that ran, node after node.
pub fn watch(nodes: &[Watched], work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Vec<Mean>> {
    let ids = nodes.iter().map(|(_, pins)| program_ids(pins)).collect::<anyhow::Result<Vec<_>>>()?;
    let statistics = statistics_on()?;
    let before = infos();
    let result = work();
    let after = infos();
    drop(statistics);
    result?;
    let mut means = Vec::new();
    for ((node, _), ids) in nodes.iter().zip(&ids) {
        for now in after.iter().filter(|now| ids.contains(&now.id)) {
            let Some(then) = before.iter().find(|then| then.id == now.id) else { continue };
            let runs = now.run_cnt - then.run_cnt;
            if runs > 0 {
                let nanoseconds = (now.run_time_ns - then.run_time_ns) as f64 / runs as f64;
                let program = now.name.to_string_lossy().into_owned();
                means.push(Mean { node: (*node).to_owned(), program, runs, nanoseconds });
            }
        }
    }
    Ok(means)
}

/// Switches the statistics on for as long as the result lives, which no crash can outlast (kernel 5.8 and newer).
pub fn statistics_on() -> anyhow::Result<OwnedFd> {
    // SAFETY: takes a number, and returns a new file descriptor or a negative error.
    let fd = unsafe { libbpf_sys::bpf_enable_stats(libbpf_sys::BPF_STATS_RUN_TIME) };
    if fd < 0 {
        bail!("switching the BPF statistics on: {}", std::io::Error::from_raw_os_error(-fd));
    }
    // SAFETY: the descriptor is new, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The programs behind a node's pinned links.
fn program_ids(pins: &Path) -> anyhow::Result<Vec<u32>> {
    let directory = links_directory(pins);
    let entries = fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))?;
    entries.map(|entry| Ok(Link::open(entry?.path())?.info()?.prog_id)).collect()
}

fn infos() -> Vec<ProgramInfo> {
    ProgInfoIter::default().collect()
}
