//! The rule sets of kube-proxy at the same sizes: how long the kernel takes to have all of them, one change, a burst of
//! changes, one Service with thousands of endpoints, and all of them again after a restart.
//!
//! It is the loaders' time alone: kube-proxy waits for other changes before, puts the text together, and at its start
//! reads what is in the kernel.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Context as _;
use clap::ValueEnum;
use nix::sched::{CloneFlags, unshare};

use crate::Arguments;
use crate::common::Sample;
use crate::common::world::BenchWorld;
use crate::laboratory::process::in_path;
use crate::laboratory::rulesets::load::{self, Loader, Spent};
use crate::laboratory::rulesets::{Family, World, iptables, nftables};
use crate::report::{Figures, Growth, thousands};
use crate::service_port::service_port;

/// How often one endpoint changes.
const CHANGES: usize = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// As kube-proxy's iptables mode has it, in legacy iptables.
    Iptables,
    /// As kube-proxy's nftables mode has it.
    Nftables,
}

impl Mode {
    pub const ALL: [Mode; 2] = [Mode::Iptables, Mode::Nftables];

    pub fn name(self) -> &'static str {
        match self {
            Mode::Iptables => "iptables",
            Mode::Nftables => "nftables",
        }
    }

    fn loader(self) -> Loader {
        match self {
            Mode::Iptables => Loader::Iptables(Family::V4),
            Mode::Nftables => Loader::Nftables,
        }
    }

    fn change_loader(self) -> Loader {
        match self {
            Mode::Iptables => Loader::IptablesChange(Family::V4),
            Mode::Nftables => Loader::Nftables,
        }
    }

    fn render(self, world: &World) -> String {
        match self {
            Mode::Iptables => iptables::render(world, Family::V4),
            Mode::Nftables => nftables::render(world, Family::V4),
        }
    }

    fn render_changes(self, world: &World, changed: &BTreeSet<usize>) -> String {
        match self {
            Mode::Iptables => iptables::render_changes(world, Family::V4, changed),
            Mode::Nftables => nftables::render_changes(world, Family::V4, changed),
        }
    }

    fn render_again(self, world: &World) -> String {
        match self {
            Mode::Iptables => iptables::render_again(world, Family::V4),
            Mode::Nftables => nftables::render_again(world, Family::V4),
        }
    }

    /// `false` on a machine that cannot load such rules, which is said aloud.
    pub fn can_be_measured(self) -> bool {
        let command = self.loader().command()[0];
        let is_there = in_path(command);
        if !is_there {
            println!("NOT MEASURED: {} needs {command} (`make setup` installs it)\n", self.name());
        }
        is_there
    }
}

/// Everything about as many Services as `figures` is of, which has what was measured, also when something failed.
pub fn measure(mode: Mode, arguments: &Arguments, figures: &mut Figures) -> anyhow::Result<()> {
    let work = || {
        // The namespace, and with it all rules, goes when this thread has ended.
        unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace")?;
        measure_inside(mode, arguments, figures)
    };
    std::thread::scope(|scope| scope.spawn(work).join()).unwrap_or_else(|_| anyhow::bail!("loading rules panicked"))
}

fn measure_inside(mode: Mode, arguments: &Arguments, figures: &mut Figures) -> anyhow::Result<()> {
    let &Arguments { burst, grown, limit, .. } = arguments;
    let bench = BenchWorld::new(figures.services, figures.endpoints);
    let mut cluster = Cluster::new(mode, bench)?;
    let mut loads = Loads { mode, limit: Duration::from_secs(limit), figures, are_loaded: true };

    let whole = Load { ids: ["load", "load_cpu", "rules_size"], what: "the whole rule set".to_owned(), is_whole: true };
    loads.are_loaded = loads.measure(&whole, mode.loader(), &[mode.render(&cluster.world)])?;

    let changes: Vec<String> = (0..CHANGES).map(|_| cluster.change(1)).collect();
    let ids = ["rules_change", "rules_change_cpu", "rules_change_size"];
    let change = Load { ids, what: "one change (median)".to_owned(), is_whole: false };
    loads.measure(&change, mode.change_loader(), &changes)?;

    let ids = ["rules_burst", "rules_burst_cpu", "rules_burst_size"];
    let burst_of = Load { ids, what: format!("{burst} changes in one sync"), is_whole: false };
    loads.measure(&burst_of, mode.change_loader(), &[cluster.change(burst)])?;

    let ids = ["rules_grow", "rules_grow_cpu", "rules_grow_size"];
    let grow = Load { ids, what: format!("a Service gets {grown} endpoints"), is_whole: false };
    loads.measure(&grow, mode.change_loader(), &[cluster.grow(grown)])?;

    let ids = ["rules_restart", "rules_restart_cpu", "rules_restart_size"];
    let restart = Load { ids, what: "restart, the whole rule set again".to_owned(), is_whole: true };
    loads.measure(&restart, mode.change_loader(), &[mode.render_again(&cluster.world)])?;
    Ok(())
}

/// What kube-proxy knows, and writes after changes.
struct Cluster {
    mode: Mode,
    bench: BenchWorld,
    world: World,
    /// Changes so far.
    made: usize,
}

impl Cluster {
    fn new(mode: Mode, bench: BenchWorld) -> anyhow::Result<Cluster> {
        let world = World {
            pods: vec!["10.244.0.0/16".parse()?],
            node: vec!["172.31.0.11".parse()?],
            services: bench.services.iter().map(service_port).collect(),
        };
        Ok(Cluster { mode, bench, world, made: 0 })
    }

    /// Gives endpoints other addresses, one of another Service each as far as there are any; what one partial sync
    /// writes then. kube-proxy waits for a second between two syncs (minSyncPeriod), so that it comes to many at once.
    fn change(&mut self, changes: usize) -> String {
        let count = self.bench.services.len();
        let mut changed = BTreeSet::new();
        for _ in 0..changes {
            // As the server of kubelane's changes has it: 7,919 is prime.
            let (number, at) = (self.made * 7919 % count, self.made / count);
            self.made += 1;
            let fresh = self.bench.fresh_ip();
            let endpoints = &mut self.bench.services[number].endpoints;
            let at = at % endpoints.len();
            endpoints[at] = fresh;
            changed.insert(number);
        }
        self.write(&changed)
    }

    /// Gives the first Service so many endpoints instead of those that it has. (It has some before, so that in
    /// nftables mode no element of a map changes.)
    fn grow(&mut self, endpoints: usize) -> String {
        self.bench.services[0].endpoints = (0..endpoints).map(|_| self.bench.fresh_ip()).collect();
        self.write(&[0].into())
    }

    fn write(&mut self, changed: &BTreeSet<usize>) -> String {
        for number in changed {
            self.world.services[*number] = service_port(&self.bench.services[*number]);
        }
        self.mode.render_changes(&self.world, changed)
    }
}

/// Texts of one kind that are loaded, and what their figures are called.
struct Load {
    /// Of the time, the processor time and the size.
    ids: [&'static str; 3],
    what: String,
    /// All Services' rules: it takes seconds, and grows with them.
    is_whole: bool,
}

struct Loads<'a> {
    mode: Mode,
    limit: Duration,
    figures: &'a mut Figures,
    /// Whether there is a rule set that can change.
    are_loaded: bool,
}

impl Loads<'_> {
    /// Loads these texts, one after the other, and notes medians; `false` when one took longer than it might.
    fn measure(&mut self, load: &Load, loader: Loader, texts: &[String]) -> anyhow::Result<bool> {
        let spent = if self.are_loaded { self.spend(loader, texts)? } else { None };
        if spent.is_none() {
            let (mode, services) = (self.mode.name(), thousands(self.figures.services));
            let why =
                if self.are_loaded { format!("within {:?}", self.limit) } else { "without a rule set".to_owned() };
            println!("NOT LOADED {why}: {mode} at {services} Services, {}\n", load.what);
        }
        let (time, size, growth) =
            if load.is_whole { ("s", "MiB", Growth::Linear) } else { ("ms", "KiB", Growth::Flat) };
        let median = |of: fn(&Spent) -> Duration| {
            let milliseconds = Sample::milliseconds(spent.as_ref()?.iter().map(of)).median();
            Some(if load.is_whole { milliseconds / 1e3 } else { milliseconds })
        };
        let bytes = Sample::new(texts.iter().map(|text| text.len() as f64)).median();
        let size_value = if load.is_whole { bytes / f64::from(1 << 20) } else { bytes / 1024.0 };
        let rows = [
            ("to load it", time, median(|spent| spent.wall)),
            ("processor time", time, median(|spent| spent.cpu)),
            ("text", size, Some(size_value)),
        ];
        for (id, (name, unit, value)) in load.ids.into_iter().zip(rows) {
            let name = format!("{}: {name}", load.what);
            match value {
                Some(value) => self.figures.add(id, &name, unit, growth, value),
                None => self.figures.add_missing(id, &name, unit, growth),
            }
        }
        Ok(spent.is_some())
    }

    /// `None` as soon as one takes longer than it may.
    fn spend(&self, loader: Loader, texts: &[String]) -> anyhow::Result<Option<Vec<Spent>>> {
        texts.iter().map(|text| load::within(self.limit, loader, text)).collect()
    }
}
