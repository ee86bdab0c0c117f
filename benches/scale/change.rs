//! One endpoint of one Service changes, and the time until the kernel knows.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::common::observe::Eyes;
use crate::common::world::BenchWorld;

/// Pause between two changes: each meets a daemon that has nothing to do.
const PAUSE: Duration = Duration::from_millis(10);

/// What happens to one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edit {
    /// It gets another address, as when a pod is replaced.
    Replace,
    /// It goes; it had come with an earlier change.
    Remove,
    /// It comes.
    Add,
}

impl Edit {
    /// In an order in which the number of endpoints at the end is that at the beginning.
    pub const ALL: [Edit; 3] = [Edit::Replace, Edit::Remove, Edit::Add];
}

impl fmt::Display for Edit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Edit::Replace => "another address",
            Edit::Remove => "removed",
            Edit::Add => "added",
        })
    }
}

/// Makes changes, each to the next Service in a walk through the whole world.
pub struct Changes<'a> {
    world: &'a mut BenchWorld,
    eyes: Eyes,
    /// How many changes of each kind have been made.
    made: [usize; 3],
}

impl<'a> Changes<'a> {
    pub fn new(world: &'a mut BenchWorld, eyes: Eyes) -> Self {
        Changes { world, eyes, made: [0; 3] }
    }

    /// Makes one change; the time from rename(2) until the maps lead to the new endpoints and to no other.
    pub fn one(&mut self, edit: Edit) -> anyhow::Result<Duration> {
        let made = &mut self.made[edit as usize];
        // Removals and additions take the same walk. 7,919 is prime: every Service comes before one comes again.
        let number = *made * 7919 % self.world.services.len();
        *made += 1;
        let fresh = self.world.fresh_ip();
        let service = &mut self.world.services[number];
        match edit {
            Edit::Replace => service.endpoints[0] = fresh,
            Edit::Remove => drop(service.endpoints.pop().context("a Service without endpoints")?),
            Edit::Add => service.endpoints.push(fresh),
        }
        let wanted: BTreeSet<_> = service.endpoints.iter().copied().collect();
        let (cluster_ip, path) = (service.cluster_ip(), self.world.path(number));
        let fresh = path.with_file_name(".save");
        fs::write(&fresh, self.world.text(number)?).context("writing a changed file")?;
        std::thread::sleep(PAUSE);
        let began = Instant::now();
        fs::rename(&fresh, &path).context("saving a changed file")?;
        self.eyes.watch_until(cluster_ip, &wanted)?;
        Ok(began.elapsed())
    }
}
