//! kubelane beside the rules of kube-proxy's iptables and nftables modes, and beside no proxy at all: netperf from pods
//! and from outside, through cluster IPs, NodePorts and a load balancer IP, at different numbers of Services; the time
//! of first connections; and what kubelane's programs take by the kernel's own account.
//!
//! Modes take turns in short runs, and what counts is the ratio within a round. Tables, CSV and plots go to a directory.
//! Figures are printed beside their targets and never asserted.

#[path = "../common/mod.rs"]
mod common;
#[path = "../../tests/laboratory/mod.rs"]
mod laboratory;
#[path = "../common/service_port.rs"]
mod service_port;

mod connect;
mod instructions;
mod latency;
mod measure;
mod mode;
mod options;
mod path;
mod plot;
mod preconditions;
mod programs;
mod real_cluster;
mod run;
mod services;
mod table;

use std::fs;
use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::Parser as _;

use instructions::Instructions;
use laboratory::lab::Lab;
use laboratory::rulesets::load::TooSlow;
use latency::Latency;
use measure::Cell;
use mode::{Mode, Served};
use options::Arguments;
use programs::Ran;
use real_cluster::{RealCluster, RealProxy};
use run::Netperf;

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if arguments.part.play()? {
        return Ok(());
    }
    laboratory::preflight()?;
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
    if let Some(caveat) = common::processor_time_caveat() {
        println!("{caveat}\n");
    }
    // Objects on an API server first: the bench itself ends when its laboratories go.
    laboratory::signals::clean_up(laboratory::api_client::connection::remove_own)?;
    let real = match (&arguments.kube_proxy, &arguments.kubeconfig) {
        (Some(program), Some(kubeconfig)) => Some(RealProxy::new(program, kubeconfig)?),
        _ => None,
    };
    if let Some(real) = &real {
        let counts = arguments.others().into_iter().chain(arguments.latency_others());
        real.check(counts.max().unwrap_or_default())?;
    }
    let mut bench = Bench {
        netperf,
        modes: arguments.modes(),
        real,
        no_instructions: Instructions::missing(),
        arguments,
        figures: Figures::default(),
    };
    // What was measured before something failed is told, too.
    let outcome = bench.measure();
    let told = bench.report(&head);
    outcome?;
    told?;
    let seconds = began.elapsed().as_secs_f64();
    println!("{seconds:.0} s in all; the tables, the CSV and the plots are in {}", bench.arguments.output.display());
    latency::check(&bench.figures.latencies)
}

struct Bench {
    netperf: Netperf,
    modes: Vec<Mode>,
    arguments: Arguments,
    /// What modes of rules are, when they are not written here.
    real: Option<RealProxy>,
    /// Why this machine counts no instructions.
    no_instructions: Option<String>,
    figures: Figures,
}

/// All that was measured.
#[derive(Default)]
struct Figures {
    cells: Vec<Cell>,
    ran: Vec<Ran>,
    latencies: Vec<Latency>,
    /// What the kernel's run statistics say of a program that does nothing, in nanoseconds.
    clock: f64,
    /// Modes that were not measured somewhere, and why.
    left_out: Vec<String>,
}

/// A mode that is to be laid out, and the number of other Services.
type Side = (Mode, usize);

impl Bench {
    fn measure(&mut self) -> anyhow::Result<()> {
        self.figures.clock = common::empty::cost()?;
        for others in self.arguments.others() {
            self.beside(others).with_context(|| format!("beside {others} other Services"))?;
        }
        self.first_connections().context("first connections")
    }

    /// All tests on all paths beside `others` Services.
    fn beside(&mut self, others: usize) -> anyhow::Result<()> {
        let began = Instant::now();
        let sides: Vec<Side> = self.modes.iter().map(|mode| (*mode, others)).collect();
        let labs = lay_out(&sides)?;
        let cluster = self.cluster(&labs, others)?;
        let served = self.serve(&sides, &labs, cluster.as_ref())?;
        let _servers = labs.iter().map(|lab| self.netperf.serve(lab)).collect::<anyhow::Result<Vec<_>>>()?;
        let paths = self.arguments.paths();
        for path in &paths {
            measure::warm_up(&self.netperf, &served, *path)?;
        }
        for test in self.arguments.tests(others) {
            let rounds = self.arguments.rounds(test);
            let mut cells = measure::cells(&self.netperf, &served, others, &paths, test, rounds)?;
            if self.no_instructions.is_none() {
                for cell in &mut cells {
                    measure::count_instructions(&self.netperf, &served, cell)?;
                }
            }
            self.figures.cells.extend(cells);
        }
        if self.arguments.has_statistics(others) {
            self.figures.ran.extend(programs::measure(&self.netperf, &served, others, &paths)?);
        }
        println!("{others:6} others  {:.0} s", began.elapsed().as_secs_f64());
        Ok(())
    }

    /// First connections beside all numbers of other Services. One API server has one number of Services at a time, so
    /// that with a real kube-proxy these cannot take turns.
    fn first_connections(&mut self) -> anyhow::Result<()> {
        let counts = self.arguments.latency_others();
        let extent = self.arguments.extent();
        if extent.rounds == 0 {
            return Ok(());
        }
        let began = Instant::now();
        let groups: Vec<&[usize]> = if self.real.is_some() { counts.chunks(1).collect() } else { vec![&counts] };
        for (number, group) in groups.into_iter().enumerate() {
            let sides = group.iter().enumerate().flat_map(|(at, others)| {
                // Without a proxy, nobody knows how many Services there are.
                let is_first = number == 0 && at == 0;
                let modes = self.modes.iter().filter(move |mode| is_first || !mode.is_plain());
                modes.map(|mode| (*mode, *others))
            });
            let sides: Vec<Side> = sides.collect();
            let labs = lay_out(&sides)?;
            let cluster = self.cluster(&labs, group[0])?;
            let served = self.serve(&sides, &labs, cluster.as_ref())?;
            latency::measure(&served, extent, &mut self.figures.latencies)?;
        }
        println!("first connections: {:.0} s", began.elapsed().as_secs_f64());
        Ok(())
    }

    /// The objects on the API server, if there is one.
    fn cluster(&self, labs: &[Lab], others: usize) -> anyhow::Result<Option<RealCluster>> {
        let (Some(real), Some(lab)) = (&self.real, labs.first()) else { return Ok(None) };
        Ok(Some(RealCluster::fill(real, lab, others)?))
    }

    /// Puts each side in force. One whose rules take too long is left out, and said to be.
    fn serve<'l>(
        &mut self,
        sides: &[Side],
        labs: &'l [Lab],
        cluster: Option<&RealCluster>,
    ) -> anyhow::Result<Vec<Served<'l>>> {
        let mut all = Vec::new();
        for ((mode, others), lab) in sides.iter().zip(labs) {
            match Served::start(*mode, lab, *others, cluster, self.arguments.load_limit()) {
                Ok(served) => {
                    println!(
                        "{others:6} others  {mode} loaded in {:.2} s on both nodes",
                        served.loaded_after.as_secs_f64()
                    );
                    all.push(served);
                }
                Err(error) if error.is::<TooSlow>() => {
                    let line = format!("{mode} beside {others} others: {error:#}");
                    println!("LEFT OUT: {line}");
                    self.figures.left_out.push(line);
                }
                Err(error) => return Err(error.context(format!("setting up {mode}"))),
            }
        }
        Ok(all)
    }

    fn report(&self, head: &str) -> anyhow::Result<()> {
        let Figures { cells, ran, latencies, .. } = &self.figures;
        let text = self.text(head);
        println!("\n{text}");
        let output = &self.arguments.output;
        fs::create_dir_all(output).with_context(|| format!("creating {}", output.display()))?;
        let files = [
            ("compare.md", text),
            ("compare.csv", table::csv(cells)),
            ("programs.csv", programs::csv(ran)),
            ("first-connections.csv", table::latencies_csv(latencies)),
        ];
        for (name, text) in files {
            let path = output.join(name);
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        }
        let machine = head.lines().next().unwrap_or_default();
        for path in plot::write(output, cells, latencies, &self.modes, machine)? {
            println!("{}", path.display());
        }
        Ok(())
    }

    /// All tables.
    fn text(&self, head: &str) -> String {
        let Figures { cells, ran, latencies, clock, left_out } = &self.figures;
        let rules = match &self.real {
            Some(_) => "Rules are those of the kube-proxy that was given, by legacy iptables",
            None => "Rules are written here, as kube-proxy 1.36 writes them, and loaded by legacy iptables",
        };
        let mut parts = vec![
            format!("{head}{rules}"),
            "Rates (medians), and the rounds' ratios: median [lower, upper quartile]. UDP_STREAM is what arrives of \
             datagrams of 1,400 bytes, by a sender that the receiver interrupts where they share a processor"
                .to_owned(),
            table::rates(cells, &self.modes),
            "Processor time of all processes (the kernel's account of their cgroup), and its ratios".to_owned(),
            table::processor(cells, &self.modes),
        ];
        match &self.no_instructions {
            None => parts.extend([
                "Instructions of all processes for one transaction or one Mbit, and their ratios; of one run"
                    .to_owned(),
                table::instructions(cells, &self.modes),
            ]),
            Some(why) => parts.push(format!("Instructions are not counted here: {why}")),
        }
        parts.extend([
            "How much of these is noise: without a proxy \"pod to pod\" and \"cluster IP, other node\" are the same client, \
             pod and address"
                .to_owned(),
            table::noise(cells),
            "First connections: how long connect() takes, each from another source port; the ratios are to the same \
             mode's p99 beside the fewest others"
                .to_owned(),
            table::latencies(latencies),
            format!(
                "kubelane's programs under load, by the kernel's run statistics; of a program that does nothing these \
                 say {clock:.0} ns: two readings of the clock"
            ),
            programs::text(ran, *clock),
            "Targets".to_owned(),
            table::targets(cells, latencies),
        ]);
        parts.extend(left_out.iter().map(|line| format!("LEFT OUT: {line}")));
        parts.iter().map(|part| part.trim_end()).collect::<Vec<_>>().join("\n\n") + "\n"
    }
}

fn lay_out(sides: &[Side]) -> anyhow::Result<Vec<Lab>> {
    sides.iter().map(|(mode, _)| mode::lay_out(*mode)).collect()
}
