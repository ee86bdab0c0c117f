//! The command line, and what is measured where it says nothing.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

use crate::connect::Part;
use crate::latency::Extent;
use crate::mode::Mode;
use crate::path::Path;
use crate::run::Test;

#[derive(Parser)]
pub struct Arguments {
    /// Services beside the two that are measured [default: 0,1000,10000].
    #[arg(long, value_delimiter = ',')]
    others: Vec<usize>,
    /// All modes when left out.
    #[arg(long, value_enum, value_delimiter = ',')]
    mode: Vec<Mode>,
    /// All paths when left out.
    #[arg(long, value_enum, value_delimiter = ',')]
    path: Vec<Path>,
    /// netperf's names of the tests [default: all].
    #[arg(long, value_delimiter = ',', value_parser = Test::ALL.map(|test| test.name))]
    test: Vec<String>,
    /// Rounds of each test on each path [default: 18 of TCP_CRR and TCP_RR, else 8].
    #[arg(long)]
    rounds: Option<usize>,
    /// Services beside the two that are measured, for first connections [default: 0,1000,10000,30000].
    #[arg(long, value_delimiter = ',')]
    latency_others: Vec<usize>,
    /// Rounds of first connections; 0 leaves them out [default: 24].
    #[arg(long)]
    latency_rounds: Option<u16>,
    /// First connections of one round in one mode on one path [default: 250].
    #[arg(long)]
    latency_connections: Option<u16>,
    /// Three rounds of each test on each path, of TCP_CRR beside 1,000 others, too, and 600 first connections, where nothing
    /// else is said: so that nothing rots. Three minutes at most.
    #[arg(long)]
    quick: bool,
    /// Makes runs of netperf this many times as long; one is about an eighth of a second.
    #[arg(long, default_value_t = 1)]
    pub length: u32,
    /// Processors of client and server.
    #[arg(long, default_value = "1,1", value_delimiter = ',', num_args = 1)]
    pub processors: Vec<u32>,
    /// Seconds that the rules of a node may take to load; what takes longer is left out.
    #[arg(long, default_value_t = 180)]
    load_limit: u64,
    /// Runs this kube-proxy for the modes iptables and nftables, instead of loading rules that are written here.
    /// Services are then made on the API server of --kubeconfig, in a namespace of the run, and deleted at the end, also
    /// after SIGINT or SIGTERM. It must have as many free cluster IPs (IPv4) as Services are asked for and two more, and
    /// no Service with a NodePort from 30010 to 30015 or from 31010 to 31015, which must be in its range.
    #[arg(long, value_name = "PATH", requires = "kubeconfig")]
    pub kube_proxy: Option<PathBuf>,
    /// How to reach the API server for --kube-proxy: files that it names by absolute paths; the rights to create and
    /// delete Nodes, a namespace and in it Services and EndpointSlices, to patch the Services' status, and to list and
    /// watch Nodes, Services and EndpointSlices of all namespaces.
    #[arg(long, value_name = "FILE", requires = "kube_proxy")]
    pub kubeconfig: Option<PathBuf>,
    /// Directory of netperf and netserver [default: what benches/fetch-netperf says].
    #[arg(long)]
    pub netperf: Option<PathBuf>,
    /// Where the tables, the CSV and the plots go.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/target/bench"))]
    pub output: PathBuf,
    #[command(flatten)]
    pub part: Part,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A new connection, and an old one: what a proxy is judged by has the most rounds.
const JUDGED: [&str; 2] = ["TCP_CRR", "TCP_RR"];

impl Arguments {
    pub fn modes(&self) -> Vec<Mode> {
        if self.mode.is_empty() { Mode::ALL.to_vec() } else { self.mode.clone() }
    }

    pub fn others(&self) -> Vec<usize> {
        match (self.others.is_empty(), self.quick) {
            (false, _) => self.others.clone(),
            (true, true) => vec![0, 1000],
            (true, false) => vec![0, 1000, 10_000],
        }
    }

    pub fn paths(&self) -> Vec<Path> {
        if self.path.is_empty() { Path::ALL.into() } else { self.path.clone() }
    }

    pub fn tests(&self, others: usize) -> Vec<Test> {
        let is_wanted = |test: &Test| match (self.test.is_empty(), self.quick) {
            (false, _) => self.test.iter().any(|name| name == test.name),
            (true, true) => others == 0 || test.name == "TCP_CRR",
            (true, false) => true,
        };
        Test::ALL.into_iter().filter(is_wanted).collect()
    }

    pub fn rounds(&self, test: Test) -> usize {
        let usual = if JUDGED.contains(&test.name) { 16 } else { 7 };
        self.rounds.unwrap_or(if self.quick { 3 } else { usual })
    }

    /// Whether the kernel's run statistics are looked at beside so many others: the fewest, and the most.
    pub fn has_statistics(&self, others: usize) -> bool {
        let counts = self.others();
        counts.first() == Some(&others) || (!self.quick && counts.last() == Some(&others))
    }

    pub fn latency_others(&self) -> Vec<usize> {
        let mut counts = match (self.latency_others.is_empty(), self.quick) {
            (false, _) => self.latency_others.clone(),
            (true, true) => vec![0, 1000],
            (true, false) => vec![0, 1000, 10_000, 30_000],
        };
        counts.sort_unstable();
        counts.dedup();
        counts
    }

    /// How much is measured of first connections.
    pub fn extent(&self) -> Extent {
        let (connections, rounds) = if self.quick { (200, 3) } else { (250, 24) };
        Extent {
            connections: self.latency_connections.unwrap_or(connections),
            rounds: self.latency_rounds.unwrap_or(rounds),
            processors: (self.processors[0], self.processors[1]),
        }
    }

    pub fn load_limit(&self) -> Duration {
        Duration::from_secs(self.load_limit)
    }
}
