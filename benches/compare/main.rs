//! kubelane beside the rules of kube-proxy's iptables and nftables modes, and beside no proxy at all: netperf from pods
//! and from outside, through cluster IPs, NodePorts and a load balancer IP, at different numbers of Services.
//!
//! Modes take turns in short runs, and what counts is the ratio within a round. Tables, CSV and plots go to a directory.
//! Figures are printed beside their targets and never asserted.

#[path = "../common/mod.rs"]
mod common;
#[path = "../../tests/rulesets/mod.rs"]
mod rulesets;
#[path = "../../tests/support/mod.rs"]
mod support;

mod measure;
mod mode;
mod path;
mod plot;
mod run;
mod table;

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::Parser;

use measure::Cell;
use mode::{Mode, Served};
use path::Path;
use run::{Netperf, Test};

#[derive(Parser)]
struct Arguments {
    /// Services beside the two that are measured [default: 0,1000,10000].
    #[arg(long, value_delimiter = ',')]
    others: Vec<usize>,
    /// All modes when left out.
    #[arg(long, value_enum, value_delimiter = ',')]
    mode: Vec<Mode>,
    /// All paths when left out.
    #[arg(long, value_enum, value_delimiter = ',')]
    path: Vec<Path>,
    /// netperf's names of the tests [default: all beside no others, TCP_CRR and TCP_RR beside some].
    #[arg(long, value_delimiter = ',', value_parser = Test::ALL.map(|test| test.name))]
    test: Vec<String>,
    /// Rounds of each test on each path [default: 5].
    #[arg(long)]
    rounds: Option<usize>,
    /// Two rounds, three paths, two tests and at most 1,000 others, where nothing else is said: three minutes.
    #[arg(long)]
    quick: bool,
    /// Makes runs this many times as long; one is about half a second.
    #[arg(long, default_value_t = 1)]
    length: u32,
    /// Processors of client and server.
    #[arg(long, default_value = "1,1", value_delimiter = ',', num_args = 1)]
    processors: Vec<u32>,
    /// Directory of netperf and netserver [default: what benches/fetch-netperf says].
    #[arg(long)]
    netperf: Option<PathBuf>,
    /// Where the tables, the CSV and the plots go.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/target/bench"))]
    output: PathBuf,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    support::preflight()?;
    let &[client, server] = arguments.processors.as_slice() else { bail!("--processors takes two numbers: 0,1") };
    let programs = arguments.netperf.clone().map_or_else(common::netperf, Ok)?;
    let netperf = Netperf { programs, processors: (client, server), length: arguments.length };
    let began = Instant::now();
    let head = format!(
        "{}\nnetperf and netserver in real time (SCHED_FIFO), client on processor {client}, server on {server}; length of runs {}\n",
        common::machine(),
        arguments.length
    );
    println!("{head}");
    let modes = if arguments.mode.is_empty() { Mode::ALL.to_vec() } else { arguments.mode.clone() };
    let mut cells = Vec::new();
    for others in arguments.others() {
        cells.extend(at(&netperf, &modes, others, &arguments)?);
    }
    report(&head, &cells, &modes, &arguments)?;
    println!(
        "{:.0} s in all; the tables, the CSV and the plots are in {}",
        began.elapsed().as_secs_f64(),
        arguments.output.display()
    );
    Ok(())
}

/// All tests on all paths beside `others` Services.
fn at(netperf: &Netperf, modes: &[Mode], others: usize, arguments: &Arguments) -> anyhow::Result<Vec<Cell>> {
    let labs = modes.iter().map(|mode| mode::lay_out(*mode)).collect::<anyhow::Result<Vec<_>>>()?;
    let mut served = Vec::new();
    for (mode, lab) in modes.iter().zip(&labs) {
        let side = Served::start(*mode, lab, others).with_context(|| format!("setting up {mode}"))?;
        println!("{others:6} others  {mode} loaded in {:.2} s on both nodes", side.loaded_after.as_secs_f64());
        served.push(side);
    }
    let _servers = labs.iter().map(|lab| netperf.serve(lab)).collect::<anyhow::Result<Vec<_>>>()?;
    let paths = arguments.paths();
    for path in &paths {
        measure::warm_up(netperf, &served, *path)?;
    }
    let mut cells = Vec::new();
    for test in arguments.tests(others) {
        for path in &paths {
            cells.push(measure::cell(netperf, &served, others, *path, test, arguments.rounds())?);
        }
    }
    Ok(cells)
}

impl Arguments {
    fn others(&self) -> Vec<usize> {
        match (self.others.is_empty(), self.quick) {
            (false, _) => self.others.clone(),
            (true, true) => vec![0, 1000],
            (true, false) => vec![0, 1000, 10_000],
        }
    }

    fn paths(&self) -> Vec<Path> {
        match (self.path.is_empty(), self.quick) {
            (false, _) => self.path.clone(),
            (true, true) => vec![Path::ClusterIpRemote, Path::NodePortLocal, Path::NodePortRemote],
            (true, false) => Path::ALL.into(),
        }
    }

    fn tests(&self, others: usize) -> Vec<Test> {
        let is_wanted = |test: &Test| {
            if self.test.is_empty() {
                (others == 0 && !self.quick) || ["TCP_CRR", "TCP_RR"].contains(&test.name)
            } else {
                self.test.iter().any(|name| name == test.name)
            }
        };
        Test::ALL.into_iter().filter(is_wanted).collect()
    }

    fn rounds(&self) -> usize {
        self.rounds.unwrap_or(if self.quick { 2 } else { 5 })
    }
}

fn report(head: &str, cells: &[Cell], modes: &[Mode], arguments: &Arguments) -> anyhow::Result<()> {
    let text = format!(
        "{head}\nRates (medians), and the rounds' ratios: median [lower, upper quartile]\n\n{}\n\
         Processor time of all processes (the kernel's account of their cgroup), and its ratios\n\n{}\n\
         Targets\n\n{}",
        table::rates(cells, modes),
        table::processor(cells, modes),
        table::targets(cells)
    );
    println!("\n{text}");
    fs::create_dir_all(&arguments.output).with_context(|| format!("creating {}", arguments.output.display()))?;
    for (name, text) in [("compare.md", text), ("compare.csv", table::csv(cells))] {
        let path = arguments.output.join(name);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    for path in plot::write(&arguments.output, cells, modes, head.lines().next().unwrap_or_default())? {
        println!("{}", path.display());
    }
    Ok(())
}
