//! The control plane at 100 to 100,000 Services: time, processor and memory of the first sync, one change, a burst of
//! changes, one Service with thousands of endpoints and a restart, of the real daemon on an API server; and how long
//! the rule sets of kube-proxy's iptables and nftables modes take to load and to change, in the same ways.
//!
//! The server is the tests' double, in a process of its own (this binary again, with `--serve`). Figures are printed
//! beside their targets and never asserted, with a table of how they grow; a CSV goes to the output directory.

#[path = "../common/mod.rs"]
mod common;
#[path = "../../tests/laboratory/mod.rs"]
mod laboratory;
#[path = "../common/service_port.rs"]
mod service_port;

mod measure;
mod report;
mod rules;
mod serve;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Parser;

use common::machine;
use report::Figures;
use rules::Mode;

#[derive(Parser)]
struct Arguments {
    /// Sizes at which the daemon is measured.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "100,1000,10000,100000",
        default_value_if("quick", "true", "100,1000")
    )]
    services: Vec<usize>,
    /// Endpoints of each Service.
    #[arg(long, default_value_t = 10)]
    endpoints: usize,
    /// Cold starts of each size, each in a laboratory of its own; medians are shown.
    #[arg(long, default_value_t = 1)]
    starts: usize,
    /// Changes of one endpoint.
    #[arg(long, default_value_t = 1000, default_value_if("quick", "true", "50"))]
    changes: usize,
    /// Of these, in a second.
    #[arg(long, default_value_t = 100)]
    rate: u32,
    /// Changes of a burst, each of another Service as far as there are any.
    #[arg(long, default_value_t = 1000)]
    burst: usize,
    /// Endpoints of the Service that gets thousands.
    #[arg(long, default_value_t = 5000, default_value_if("quick", "true", "1000"))]
    grown: usize,
    /// Services that come at once after all of that, which the maps grow for; 0: none.
    #[arg(long, default_value_t = 0)]
    more: usize,
    /// How long to look at an idle daemon, in seconds; 0: not at all.
    #[arg(long, default_value_t = 0)]
    idle: u64,
    /// Sizes at which rule sets are measured; 0: none.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "100,1000,10000",
        default_value_if("quick", "true", "100,1000")
    )]
    rules: Vec<usize>,
    /// Which rule sets; all when left out.
    #[arg(long, value_enum, value_delimiter = ',')]
    mode: Vec<Mode>,
    /// How long a rule set may take to load or to change, in seconds; what takes longer is ended and shown as such.
    #[arg(long, default_value_t = 120)]
    limit: u64,
    /// Two small sizes and few changes, where nothing else is said: half a minute from the debug build.
    #[arg(long)]
    quick: bool,
    /// Where the CSV goes.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/target/bench"))]
    output: PathBuf,
    /// Given to the server's process: the daemon's pins.
    #[arg(long, hide = true)]
    serve: Option<PathBuf>,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if let Some(pins) = &arguments.serve {
        return serve::run(pins, &arguments);
    }
    laboratory::preflight()?;
    println!("{}\n", machine());
    let mut all = Vec::new();
    // What was measured before something failed is told, too.
    let outcome = measure(&arguments, &mut all);
    let written = write_csv(&arguments.output, &all);
    outcome.and(written)
}

/// Everything that is asked for: `all` has it, or as much of it as there was before something failed.
fn measure(arguments: &Arguments, all: &mut Vec<Figures>) -> anyhow::Result<()> {
    let outcome = measure_daemon(arguments, all);
    print_sizes("kubelane", all);
    outcome?;
    let modes = if arguments.mode.is_empty() { &Mode::ALL[..] } else { &arguments.mode };
    for mode in modes.iter().filter(|mode| mode.can_be_measured()) {
        let first = all.len();
        let outcome = measure_rules(*mode, arguments, all);
        print_sizes(mode.name(), &all[first..]);
        outcome?;
    }
    Ok(())
}

fn measure_daemon(arguments: &Arguments, all: &mut Vec<Figures>) -> anyhow::Result<()> {
    for services in &arguments.services {
        let mut figures = Figures::new("kubelane", *services, arguments.endpoints);
        let outcome = measure::measure(arguments, &mut figures);
        print_size(&figures);
        all.push(figures);
        outcome.with_context(|| format!("kubelane at {} Services", report::thousands(*services)))?;
    }
    Ok(())
}

fn measure_rules(mode: Mode, arguments: &Arguments, all: &mut Vec<Figures>) -> anyhow::Result<()> {
    for services in arguments.rules.iter().filter(|services| **services > 0) {
        let mut figures = Figures::new(mode.name(), *services, arguments.endpoints);
        let outcome = rules::measure(mode, arguments, &mut figures);
        all.push(figures);
        outcome.with_context(|| format!("{} at {} Services", mode.name(), report::thousands(*services)))?;
    }
    Ok(())
}

fn write_csv(output: &Path, all: &[Figures]) -> anyhow::Result<()> {
    std::fs::create_dir_all(output).context("making the directory for the CSV")?;
    let path = output.join("control.csv");
    std::fs::write(&path, report::csv(all)).with_context(|| format!("writing {}", path.display()))?;
    println!("All figures: {}", path.display());
    Ok(())
}

fn print_size(figures: &Figures) {
    if figures.all.is_empty() {
        return;
    }
    println!(
        "{}: {} Services with {} endpoints each:\n",
        figures.of,
        report::thousands(figures.services),
        figures.endpoints
    );
    println!("{}", figures.table());
}

fn print_sizes(of: &str, sizes: &[Figures]) {
    if sizes.iter().all(|size| size.all.is_empty()) {
        return;
    }
    println!("{of}, all sizes:\n\n{}", report::summary(sizes));
    if let Some(growth) = report::growth(sizes) {
        println!("{of}, from size to size (1 is linear per Service, or flat):\n\n{growth}");
    }
}
