//! The real daemon on an API server with 10,000 Services of 10 endpoints: time, processor and memory of the first sync;
//! from an EndpointSlice's event to the map while 100 changes a second go on; and what it uses when nothing happens.
//!
//! The server is the tests' double, in a process of its own (this binary again, as `serve`). Figures are printed beside
//! their targets and never asserted.

#[path = "../../tests/apiserver/mod.rs"]
mod apiserver;
#[path = "../common/mod.rs"]
mod common;
#[allow(dead_code, reason = "the other bench uses the rest")]
#[path = "../scale/observe.rs"]
mod observe;
#[path = "../../tests/support/mod.rs"]
mod support;

mod serve;

use std::io::{BufRead as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Parser;

use common::world::{BenchWorld, Layout, Style};
use common::{Sample, machine, print_table};
use observe::{Eyes, Usage};
use support::daemon::Daemon;
use support::lab::Lab;

#[derive(Parser)]
struct Arguments {
    #[arg(long, default_value_t = 10_000)]
    services: usize,
    /// Endpoints of each Service.
    #[arg(long, default_value_t = 10)]
    endpoints: usize,
    /// Cold starts, each in a laboratory of its own.
    #[arg(long, default_value_t = 3)]
    starts: usize,
    /// Changes of one endpoint.
    #[arg(long, default_value_t = 1000)]
    changes: usize,
    /// Changes in a second.
    #[arg(long, default_value_t = 100)]
    rate: u32,
    /// How long to look at an idle daemon, in seconds.
    #[arg(long, default_value_t = 60)]
    idle: u64,
    /// Given to the server's process: where the world is, and the daemon's pins.
    #[arg(long, num_args = 2, hide = true)]
    serve: Vec<PathBuf>,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if let [world, pins] = arguments.serve.as_slice() {
        return serve::run(world, pins, &arguments);
    }
    support::preflight()?;
    println!("{}\n{} Services with {} endpoints each\n", machine(), arguments.services, arguments.endpoints);
    let files = tempfile::tempdir().context("making a directory for the world")?;
    let dir = files.path().join("world");
    let world = BenchWorld::write(&dir, arguments.services, arguments.endpoints, Layout::Big, Style::Cluster)?;
    let mut starts = Vec::new();
    for number in 1..=arguments.starts.max(1) {
        let lab = Lab::new(&[("node1", &[])])?;
        let is_last = number == arguments.starts.max(1);
        starts.push(measure(&lab, &world, &arguments, is_last)?);
    }
    print_starts(&starts);
    Ok(())
}

/// One start on a machine that has no trace of the daemon: seconds of wall and processor, MiB at the peak.
struct Start {
    last_row: Duration,
    ready: Duration,
    usage: Usage,
}

fn measure(lab: &Lab, world: &BenchWorld, arguments: &Arguments, is_last: bool) -> anyhow::Result<Start> {
    let node = lab.node("node1");
    let text = |path: &Path| path.display().to_string();
    let (services, endpoints) = (arguments.services.to_string(), arguments.endpoints.to_string());
    let (changes, rate) = (arguments.changes.to_string(), arguments.rate.to_string());
    let (dir, pins) = (text(&world.dir), text(&node.pin_path));
    let options = ["--services", &services, "--endpoints", &endpoints, "--changes", &changes, "--rate", &rate];
    let options = [&options[..], &["--serve", &dir, &pins]].concat();
    let mut server = node.host.spawn(&std::env::current_exe()?, &options)?;
    let (mut orders, mut reports) = (server.stdin()?, server.stdout()?);
    let mut line = String::new();
    reports.read_line(&mut line).context("the server's address")?;
    let kubeconfig = lab.dir.join("kubeconfig");
    std::fs::write(&kubeconfig, serve::kubeconfig(line.trim()))?;

    let began = Instant::now();
    let (seen, daemon) = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| Eyes::wait_for_all(&node.pin_path, world, began));
        let daemon = Daemon::start_on(lab, "node1", &["--kubeconfig", &text(&kubeconfig)], &[]);
        (watcher.join(), daemon)
    });
    let daemon = daemon?;
    let Ok(seen) = seen else { bail!("the watcher of the maps panicked") };
    let start = Start { last_row: seen?, ready: daemon.ready_after, usage: Usage::of(daemon.pid())? };
    observe::check_complete(&node.pin_path, world)?;
    if is_last {
        writeln!(orders, "go").context("telling the server to begin")?;
        line.clear();
        reports.read_line(&mut line).context("the server's figures")?;
        let times = line.split_whitespace().map(str::parse::<f64>).collect::<Result<Vec<_>, _>>()?;
        print_changes(Sample::new(times), arguments.rate);
        print_idle(&daemon, arguments.idle)?;
    }
    Ok(start)
}

fn print_changes(times: Sample, rate: u32) {
    println!("From an EndpointSlice's event to the maps, at {rate} changes a second:\n");
    let row = [50.0, 99.0, 100.0].map(|percent| format!("{:.2} ms", times.percentile(percent)));
    let row = vec![row[0].clone(), row[1].clone(), row[2].clone(), "p99 < 5 ms".to_owned()];
    print_table(&["p50", "p99", "worst", "target"], &[row]);
}

fn print_idle(daemon: &Daemon, seconds: u64) -> anyhow::Result<()> {
    std::thread::sleep(Duration::from_secs(5));
    let before = observe::cpu_time(daemon.pid())?;
    std::thread::sleep(Duration::from_secs(seconds));
    let used = observe::cpu_time(daemon.pid())?.saturating_sub(before);
    let usage = Usage::of(daemon.pid())?;
    let percent = 100.0 * used.as_secs_f64() / seconds.max(1) as f64;
    println!("Idle for {seconds} s:\n");
    let resident = usage.resident_kib as f64 / 1024.0;
    let rows = [
        vec!["of one processor".to_owned(), format!("{percent:.3} %"), "< 0.1 %".to_owned()],
        vec!["resident (VmRSS)".to_owned(), format!("{resident:.1} MiB"), "< 80 MiB".to_owned()],
    ];
    print_table(&["", "", "target"], &rows);
    Ok(())
}

fn print_starts(starts: &[Start]) {
    let mut rows = Vec::new();
    let mut row = |what: &str, unit: &str, target: &str, of: &dyn Fn(&Start) -> f64| {
        let sample = Sample::new(starts.iter().map(of));
        let show = |value: f64| format!("{value:.2} {unit}");
        rows.push(vec![
            what.to_owned(),
            show(sample.min()),
            show(sample.median()),
            show(sample.max()),
            target.to_owned(),
        ]);
    };
    row("process start to last row in the maps", "s", "< 5 s", &|s| s.last_row.as_secs_f64());
    row("process start to /readyz 200", "s", "-", &|s| s.ready.as_secs_f64());
    row("processor time, user and system", "s", "< 3 s", &|s| s.usage.cpu.as_secs_f64());
    row("highest resident memory (VmHWM)", "MiB", "< 120 MiB", &|s| s.usage.peak_kib as f64 / 1024.0);
    row("resident memory after it (VmRSS)", "MiB", "-", &|s| s.usage.resident_kib as f64 / 1024.0);
    println!("First sync, {} cold starts:\n", starts.len());
    print_table(&["", "best", "median", "worst", "target"], &rows);
}

/// Where the pinned maps are.
fn map_path(pin_path: &Path, map: &str) -> PathBuf {
    kubelane::bpf::pinned::maps_directory(pin_path).join(map)
}
