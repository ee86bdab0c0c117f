//! Instructions of all of a laboratory's processes, in the kernel and outside: they do not depend on the machine's mood.

use std::fs::File;
use std::io;

use anyhow::Context as _;
use perf_event::events::Hardware;
use perf_event::{Builder, Counter};

use crate::laboratory::cgroup;
use crate::laboratory::lab::Lab;

/// Counters of a laboratory's cgroup, one on each processor.
pub struct Instructions(Vec<Counter>);

impl Instructions {
    /// Why this machine cannot count instructions; `None` when it can.
    pub fn missing() -> Option<String> {
        let all = cgroup::mount_point().and_then(|root| Ok(File::open(root)?)).and_then(|root| Ok(count(&root)?));
        let error = all.err()?;
        let code = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
        Some(match code {
            Some(libc::ENOENT | libc::EOPNOTSUPP | libc::ENODEV) => "no hardware counters".to_owned(),
            _ => format!("perf_event_open: {error:#}"),
        })
    }

    /// Counts from here on.
    pub fn start(lab: &Lab) -> anyhow::Result<Instructions> {
        let cgroup = lab.node("node1").cgroup.join("..");
        let cgroup = File::open(&cgroup).with_context(|| format!("opening {}", cgroup.display()))?;
        Ok(Instructions(count(&cgroup).context("counting a cgroup's instructions")?))
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

/// A running counter for each processor that there is, whichever this process may use.
fn count(cgroup: &File) -> io::Result<Vec<Counter>> {
    let one = |processor| -> io::Result<Counter> {
        let mut builder = Builder::new(Hardware::INSTRUCTIONS);
        let mut counter = builder.observe_cgroup(cgroup).one_cpu(processor).include_kernel().build()?;
        counter.enable()?;
        Ok(counter)
    };
    online(&std::fs::read_to_string("/sys/devices/system/cpu/online")?).into_iter().map(one).collect()
}

/// The numbers of a list like "0-3,6".
fn online(list: &str) -> Vec<usize> {
    let ranges = list.trim().split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(first.parse().ok()?..=last.parse().ok()?)
    });
    ranges.flatten().collect()
}
