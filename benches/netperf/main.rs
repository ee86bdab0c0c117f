//! netperf between two pods of one node, while the daemon runs: through a cluster IP, to the pod's address directly,
//! and to the pod's address from processes that kubelane's programs do not see at all.
//!
//! The three paths take turns in short runs, and what counts is the ratio within a round: the machine's mood is in all
//! three of them. Figures are printed beside their targets and never asserted.

#[path = "../common/mod.rs"]
mod common;
#[path = "../../tests/laboratory/mod.rs"]
mod laboratory;

mod path;

use std::path::PathBuf;

use anyhow::bail;
use clap::Parser;
use serde_json::json;

use common::programs::Mean;
use common::world::{BenchWorld, Layout, Style};
use common::{Sample, machine, print_table, programs};
use laboratory::daemon::Daemon;
use laboratory::lab::Lab;
use laboratory::manifests::{Endpoint, Manifests, port, service, slice};
use path::{Bench, CLUSTER_IP, Path, Run};

#[derive(Parser)]
struct Arguments {
    /// netperf's names of the tests to run; all when left out.
    #[arg(long, value_parser = TESTS.map(|(test, _)| test))]
    test: Vec<String>,
    /// Rounds of each test.
    #[arg(long, default_value_t = 11)]
    rounds: usize,
    /// Length of one run, to which netperf adds about two seconds.
    #[arg(long, default_value_t = 1)]
    seconds: u32,
    /// Other Services in the maps.
    #[arg(long, default_value_t = 0)]
    services: usize,
    /// Processors of client and server.
    #[arg(long, default_value = "1,1", value_delimiter = ',', num_args = 1)]
    processors: Vec<u32>,
    /// Directory of netperf and netserver [default: what benches/fetch-netperf says].
    #[arg(long)]
    netperf: Option<PathBuf>,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// netperf's name of a test, and the smallest share of the direct rate that the cluster IP should reach.
const TESTS: [(&str, f64); 3] = [("TCP_RR", 0.98), ("TCP_CRR", 0.95), ("UDP_RR", 0.98)];

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    laboratory::preflight()?;
    let &[client, server] = arguments.processors.as_slice() else { bail!("--processors takes two numbers: 0,1") };
    let programs = arguments.netperf.clone().map_or_else(common::netperf, Ok)?;
    let lab = Lab::new(&[("node1", &["client", "server"])])?;
    let manifests = lay_services(&lab, arguments.services)?;
    let daemon = Daemon::start(&lab, "node1", &manifests.dir)?;
    let bench = Bench::start(&lab, programs, (client, server), arguments.seconds)?;
    println!("{}", machine());
    println!(
        "netperf and netserver in real time (SCHED_FIFO), client on processor {client}, server on {server}; {} rounds of {} s for each path; {} other Services\n",
        arguments.rounds, arguments.seconds, arguments.services
    );
    let mut rows = Vec::new();
    let wanted = |test: &str| arguments.test.is_empty() || arguments.test.iter().any(|name| name == test);
    let tests: Vec<(&str, f64)> = TESTS.into_iter().filter(|(test, _)| wanted(test)).collect();
    for (test, target) in &tests {
        let rounds = measure(&bench, test, arguments.rounds)?;
        rows.push(summary(test, *target, &rounds));
    }
    println!("\nTransactions per second are medians; ratios are medians of the rounds' ratios [lower quartile, upper");
    println!("quartile; worst, best round]. Without kubelane: the same pods, the processes in another cgroup.\n");
    print_table(
        &["test", "without", "direct", "cluster IP", "cluster IP / direct", "target", "cluster IP / without", "rounds"],
        &rows,
    );
    let node = lab.node("node1");
    let means = programs::watch(&[(&node.name, &node.pin_path)], || {
        tests.iter().try_for_each(|(test, _)| bench.run(Path::ClusterIp, test).map(drop))
    })?;
    println!("Kernel run statistics of the programs while the same tests go through the cluster IP once more:\n");
    let row = |mean: &Mean| vec![mean.program.clone(), mean.runs.to_string(), format!("{:.0} ns", mean.nanoseconds)];
    print_table(&["program", "runs", "mean"], &means.iter().map(row).collect::<Vec<_>>());
    drop(daemon);
    Ok(())
}

/// One Service with the ports of the cluster IP's path, and as many others as asked for.
fn lay_services(lab: &Lab, others: usize) -> anyhow::Result<Manifests> {
    let manifests = Manifests::new(lab.dir.join("manifests"));
    if others > 0 {
        BenchWorld::write(&manifests.dir, others, 10, Layout::Big, Style::Plain)?;
    }
    let (control, data) = Path::ClusterIp.ports();
    let ports = [("control", "TCP", control), ("tcp", "TCP", data), ("udp", "UDP", data)];
    let service_ports: Vec<_> = ports.iter().map(|(name, protocol, number)| port(name, protocol, *number)).collect();
    let endpoint = Endpoint::ready(lab.pod("server").v4.into(), "node1");
    manifests.save(
        "netperf",
        &[
            service("netperf", json!({"clusterIP": CLUSTER_IP.to_string(), "ports": service_ports})),
            slice("netperf-1", "netperf", &ports, &[endpoint]),
        ],
    );
    Ok(manifests)
}

/// Transactions per second of one round, in the order of [`Path::ALL`].
type Round = [f64; 3];

fn measure(bench: &Bench, test: &str, rounds: usize) -> anyhow::Result<Vec<Round>> {
    // The first run of a path meets cold neighbour tables and caches.
    for path in Path::ALL {
        bench.run(path, test)?;
    }
    let mut good = Vec::new();
    let (mut thrown_away, mut number) = (0, 0);
    while good.len() < rounds {
        let mut round = [f64::NAN; 3];
        let mut trouble = Vec::new();
        for turn in 0..Path::ALL.len() {
            // Each path is first, in the middle and last in turn.
            let at = (turn + number) % Path::ALL.len();
            match bench.run(Path::ALL[at], test)? {
                Run::Good(rate) => round[at] = rate,
                Run::Spoiled(why) => trouble.push(format!("{}: {why}", Path::ALL[at])),
            }
        }
        number += 1;
        let [without, direct, cluster_ip] = round;
        if trouble.is_empty() {
            println!(
                "{test:8} round {number:2}: without {without:9.0}/s  direct {direct:9.0}/s  cluster IP \
                 {cluster_ip:9.0}/s  cluster IP / direct {:.3}",
                cluster_ip / direct
            );
            good.push(round);
        } else {
            println!("{test:8} round {number:2}: THROWN AWAY: {}", trouble.join("; "));
            thrown_away += 1;
        }
        if thrown_away > rounds {
            bail!("{test}: more rounds were spoiled than wanted");
        }
    }
    Ok(good)
}

fn summary(test: &str, target: f64, rounds: &[Round]) -> Vec<String> {
    let rate = |at: usize| format!("{:.0}/s", Sample::new(rounds.iter().map(|round| round[at])).median());
    let ratio = |of: usize, to: usize| {
        let sample = Sample::new(rounds.iter().map(|round| round[of] / round[to]));
        format!(
            "{:.3} [{:.3}, {:.3}; {:.3}, {:.3}]",
            sample.median(),
            sample.percentile(25.0),
            sample.percentile(75.0),
            sample.min(),
            sample.max()
        )
    };
    vec![
        test.to_owned(),
        rate(0),
        rate(1),
        rate(2),
        ratio(2, 1),
        format!(">= {target}"),
        ratio(2, 0),
        rounds.len().to_string(),
    ]
}
