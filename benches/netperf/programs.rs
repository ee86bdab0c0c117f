//! What the kernel's own run statistics say of each BPF program: the cost that the ratios are made of.

use std::fs;

use anyhow::Context as _;
use kubelane::bpf::pinned::links_directory;
use libbpf_rs::Link;
use libbpf_rs::query::{ProgInfoIter, ProgramInfo};

use crate::common::print_table;
use crate::support::lab::Lab;

const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// Runs `work` with statistics on (they cost time themselves, so that nothing else is measured meanwhile), and prints
/// the mean time of each of the node's programs that ran.
pub fn print(lab: &Lab, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let ids = program_ids(lab)?;
    let before = infos(&ids);
    let switched = fs::read_to_string(SWITCH).context("reading the switch of the BPF statistics")?;
    fs::write(SWITCH, "1").context("switching the BPF statistics on")?;
    let result = work();
    fs::write(SWITCH, switched).context("switching the BPF statistics back")?;
    result?;
    let mut rows = Vec::new();
    for now in infos(&ids) {
        let Some(then) = before.iter().find(|then| then.id == now.id) else { continue };
        let runs = now.run_cnt - then.run_cnt;
        if runs > 0 {
            let nanoseconds = (now.run_time_ns - then.run_time_ns) as f64 / runs as f64;
            rows.push(vec![now.name.to_string_lossy().into_owned(), runs.to_string(), format!("{nanoseconds:.0} ns")]);
        }
    }
    println!("Kernel run statistics of the programs while the same tests go through the cluster IP once more:\n");
    print_table(&["program", "runs", "mean"], &rows);
    Ok(())
}

/// The programs behind the node's pinned links.
fn program_ids(lab: &Lab) -> anyhow::Result<Vec<u32>> {
    let directory = links_directory(&lab.node("node1").pin_path);
    let entries = fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))?;
    entries.map(|entry| Ok(Link::open(entry?.path())?.info()?.prog_id)).collect()
}

fn infos(ids: &[u32]) -> Vec<ProgramInfo> {
    ProgInfoIter::default().filter(|info| ids.contains(&info.id)).collect()
}
