//! What `kubelane monitor` costs those who are listened to, and how much it keeps up with. Needs root.
//!
//!     make bench-monitor
//!
//! Connections: netperf's TCP_CRR from a client outside to a NodePort whose pod is on the node. A run without a listener, and
//! one for each way to listen, take turns within a round; what counts is the ratio within a round.
//!
//! Events: packets that are dropped, one event each, so many a second for two seconds (BPF_PROG_TEST_RUN).

#[path = "../common/mod.rs"]
mod common;
#[path = "../../tests/laboratory/mod.rs"]
mod laboratory;

mod connections;
mod events;

use clap::Parser;

#[derive(Parser)]
struct Arguments {
    /// Rounds of connections.
    #[arg(long, default_value_t = 31)]
    rounds: usize,
    /// Transactions of one run.
    #[arg(long, default_value_t = 4000)]
    transactions: u32,
    /// Processors of netperf and netserver; the monitor may have any.
    #[arg(long, default_value = "1,1", value_delimiter = ',', num_args = 1)]
    processors: Vec<u32>,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    laboratory::preflight()?;
    println!("{}\n", common::machine());
    events::measure()?;
    connections::measure(arguments.rounds, arguments.transactions, &arguments.processors)
}
