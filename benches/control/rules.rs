//! The rule sets of kube-proxy at the same sizes: how long the kernel takes to have all of them, and one change.

use std::time::Duration;

use anyhow::Context as _;
use clap::ValueEnum;
use nix::sched::{CloneFlags, unshare};

use crate::common::Sample;
use crate::common::world::BenchWorld;
use crate::report::{Figures, Growth, thousands};
use crate::rulesets::load::{self, Loader, Spent};
use crate::rulesets::{Family, World, iptables, nftables};
use crate::service_port::service_port;
use crate::support::process::in_path;

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

    fn render_change(self, world: &World, changed: usize) -> String {
        match self {
            Mode::Iptables => iptables::render_change(world, Family::V4, changed),
            Mode::Nftables => nftables::render_change(world, Family::V4, changed),
        }
    }
}

/// `None` on a machine that cannot load such rules, which is said aloud.
pub fn measure(mode: Mode, services: usize, endpoints: usize, limit: Duration) -> anyhow::Result<Option<Figures>> {
    let command = mode.loader().command()[0];
    if !in_path(command) {
        println!("NOT MEASURED: {} needs {command} (`make setup` installs it)\n", mode.name());
        return Ok(None);
    }
    let work = || {
        // The namespace, and with it all rules, goes when this thread has ended.
        unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace")?;
        measure_inside(mode, services, endpoints, limit).map(Some)
    };
    std::thread::scope(|scope| scope.spawn(work).join()).unwrap_or_else(|_| anyhow::bail!("loading rules panicked"))
}

fn measure_inside(mode: Mode, services: usize, endpoints: usize, limit: Duration) -> anyhow::Result<Figures> {
    let mut bench = BenchWorld::new(services, endpoints);
    let mut world = World {
        pods: vec!["10.244.0.0/16".parse()?],
        node: vec!["172.31.0.11".parse()?],
        services: bench.services.iter().map(service_port).collect(),
    };
    let mut figures = Figures::new(mode.name(), services, endpoints);
    let rules = mode.render(&world);
    figures.add(
        "rules_size",
        "the whole rule set: text",
        "MiB",
        Growth::Linear,
        rules.len() as f64 / f64::from(1 << 20),
    );
    let spent = load::within(limit, mode.loader(), &rules)?;
    let (load, load_cpu) = ("the whole rule set: to load it", "the whole rule set: processor time");
    let Some(Spent { wall, cpu }) = spent else {
        println!("NOT LOADED within {limit:?}: {} of {} Services\n", mode.name(), thousands(services));
        figures.add_missing("load", load, "s", Growth::Linear);
        figures.add_missing("load_cpu", load_cpu, "s", Growth::Linear);
        return Ok(figures);
    };
    figures.add("load", load, "s", Growth::Linear, wall.as_secs_f64());
    figures.add("load_cpu", load_cpu, "s", Growth::Linear, cpu.as_secs_f64());

    let mut all = Vec::new();
    let (mut size, names) = (0, ["one change: to load it, median", "one change: processor time"]);
    for number in (0..CHANGES).map(|made| made * 7919 % services) {
        bench.services[number].endpoints[0] = bench.fresh_ip();
        world.services[number] = service_port(&bench.services[number]);
        let rules = mode.render_change(&world, number);
        size = rules.len();
        let Some(spent) = load::within(limit, mode.change_loader(), &rules)? else {
            println!("NOT CHANGED within {limit:?}: {} of {} Services\n", mode.name(), thousands(services));
            figures.add_missing("rules_change", names[0], "ms", Growth::Flat);
            figures.add_missing("rules_change_cpu", names[1], "ms", Growth::Flat);
            return Ok(figures);
        };
        all.push(spent);
    }
    let median = |of: fn(&Spent) -> Duration| Sample::milliseconds(all.iter().map(of)).median();
    figures.add("rules_change", names[0], "ms", Growth::Flat, median(|spent| spent.wall));
    figures.add("rules_change_cpu", names[1], "ms", Growth::Flat, median(|spent| spent.cpu));
    figures.add("rules_change_size", "one change: text", "KiB", Growth::Flat, size as f64 / 1024.0);
    Ok(figures)
}
