//! Instructions of all of a laboratory's processes, in the kernel and outside: they do not depend on the machine's mood.

use std::fs::File;
use std::io;

use anyhow::Context as _;
use perf_event::events::Hardware;
use perf_event::{Builder, Counter};

use crate::support::lab::Lab;

/// Counters of a laboratory's cgroup, one on each processor.
pub struct Instructions(Vec<Counter>);

impl Instructions {
    /// Why this machine cannot count instructions; `None` when it can.
    pub fn missing() -> Option<String> {
        let error = Builder::new(Hardware::INSTRUCTIONS).build().err()?;
        Some(match error.raw_os_error() {
            Some(libc::ENOENT | libc::EOPNOTSUPP | libc::ENODEV) => "no hardware counters".to_owned(),
            _ => format!("perf_event_open: {error}"),
        })
    }

    /// Counts from here on.
    pub fn start(lab: &Lab) -> anyhow::Result<Instructions> {
        let cgroup = lab.node("node1").cgroup.join("..");
        let cgroup = File::open(&cgroup).with_context(|| format!("opening {}", cgroup.display()))?;
        let count = |processor| -> io::Result<Counter> {
            let mut builder = Builder::new(Hardware::INSTRUCTIONS);
            let mut counter = builder.observe_cgroup(&cgroup).one_cpu(processor).include_kernel().build()?;
            counter.enable()?;
            Ok(counter)
        };
        let processors = std::thread::available_parallelism().context("counting processors")?.get();
        let counters: io::Result<Vec<Counter>> = (0..processors).map(count).collect();
        Ok(Instructions(counters.context("counting a cgroup's instructions")?))
    }

    /// Those since the start.
    pub fn stop(mut self) -> anyhow::Result<f64> {
        let mut sum = 0;
        for counter in &mut self.0 {
            counter.disable()?;
            sum += counter.read().context("reading a counter of instructions")?;
        }
        Ok(sum as f64)
    }
}
