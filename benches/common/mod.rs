//! What the benches share: the world that they measure, and how figures are summed up and printed.
// Every bench compiles this module for itself and uses a part of it.
#![allow(dead_code)]

pub mod empty;
pub mod health;
pub mod observe;
pub mod programs;
pub mod world;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};

/// Kernel, processors and the load that others put on them: a figure without these says nothing.
pub fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let count = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = read("/proc/meminfo").lines().next().and_then(|line| {
        let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
        Some(kilobytes >> 20)
    });
    format!(
        "Linux {}, {count} x {}, {} GiB of memory, load average {}",
        read("/proc/sys/kernel/osrelease").trim(),
        model.map_or("unknown processor", |(_, name)| name),
        memory.unwrap_or_default(),
        read("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" "),
    )
}

/// Kernels built so do not count what interrupts do (the work that packets make, for the most part) as anybody's
/// processor time: what the kernel says of a cgroup is then too little.
pub fn processor_time_caveat() -> Option<&'static str> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    // zcat of either: Debian's file is plain.
    let files = [format!("/boot/config-{}", release.trim()), "/proc/config.gz".to_owned()];
    let output = Command::new("zcat").arg("-f").args(files).stderr(Stdio::null()).output().ok()?;
    let is_so = String::from_utf8_lossy(&output.stdout).lines().any(|line| line == "CONFIG_IRQ_TIME_ACCOUNTING=y");
    is_so.then_some(
        "CAUTION: this kernel has CONFIG_IRQ_TIME_ACCOUNTING: processor times below are without the work of interrupts",
    )
}

/// The directory of netperf and netserver, downloaded when they are not installed.
pub fn netperf() -> anyhow::Result<PathBuf> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/fetch-netperf");
    let output = Command::new(script).stderr(Stdio::inherit()).output().context("running fetch-netperf")?;
    if !output.status.success() {
        bail!("without netperf there is nothing to compare");
    }
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim()))
}

/// Options as commands take them.
pub fn refs(options: &[String]) -> Vec<&str> {
    options.iter().map(String::as_str).collect()
}

/// Measured values, sorted.
#[derive(Clone, Debug, Default)]
pub struct Sample(Vec<f64>);

impl Sample {
    pub fn new(values: impl IntoIterator<Item = f64>) -> Sample {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        Sample(values)
    }

    pub fn milliseconds(durations: impl IntoIterator<Item = Duration>) -> Sample {
        Sample::new(durations.into_iter().map(|d| d.as_secs_f64() * 1e3))
    }

    /// The smallest value that at least `percent` of all values do not exceed (nearest rank); NaN without values.
    pub fn percentile(&self, percent: f64) -> f64 {
        let rank = (percent / 100.0 * self.0.len() as f64).ceil() as usize;
        self.0.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
    }

    /// With an even number of values, the mean of the middle two.
    pub fn median(&self) -> f64 {
        let middle = self.0.len() / 2;
        match self.0.len() {
            0 => f64::NAN,
            n if n % 2 == 0 => f64::midpoint(self.0[middle - 1], self.0[middle]),
            _ => self.0[middle],
        }
    }

    /// The values, the smallest first.
    pub fn values(&self) -> impl Iterator<Item = f64> {
        self.0.iter().copied()
    }

    pub fn min(&self) -> f64 {
        self.percentile(0.0)
    }

    pub fn max(&self) -> f64 {
        self.percentile(100.0)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// Prints rows as a table of Markdown, which is read as well on a terminal.
pub fn print_table(heading: &[&str], rows: &[Vec<String>]) {
    println!("{}", table(heading, rows));
}

/// Rows as a table of Markdown, each line ended.
pub fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = heading.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &[&str]| {
        let padded: Vec<String> =
            cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}", width = *width)).collect();
        format!("| {} |\n", padded.join(" | "))
    };
    let rules: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
    let mut text = line(heading);
    text += &line(&rules.iter().map(String::as_str).collect::<Vec<_>>());
    for row in rows {
        text += &line(&row.iter().map(String::as_str).collect::<Vec<_>>());
    }
    text
}
