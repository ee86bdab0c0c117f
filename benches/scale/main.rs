//! The real daemon at 10,000 Services with 10 endpoints each: time, processor and memory of the first sync, of a
//! restart, and of one endpoint that changes, seen from outside, in the pinned maps, and told by the daemon itself; and
//! how long `kubelane get` and `explain` take.
//!
//! Figures are printed beside their targets and never asserted: a machine that is busy would fail for nothing.

#[path = "../common/mod.rs"]
mod common;
#[path = "../../tests/laboratory/mod.rs"]
mod laboratory;

mod change;
mod syscalls;

use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Parser;

use change::{Changes, Edit};
use common::observe::{self, Eyes, Usage};
use common::world::{BenchWorld, Layout, Style};
use common::{Sample, machine, print_table, refs};
use laboratory::daemon::{Daemon, LOADING};
use laboratory::lab::Lab;

#[derive(Parser)]
struct Arguments {
    #[arg(long, default_value_t = 10_000)]
    services: usize,
    /// Endpoints of each Service.
    #[arg(long, default_value_t = 10)]
    endpoints: usize,
    /// How the Services are spread over files; all layouts when left out.
    #[arg(long, value_enum)]
    layout: Vec<Layout>,
    #[arg(long, value_enum, default_value_t = Style::Plain)]
    style: Style,
    /// Cold starts, each in a laboratory of its own.
    #[arg(long, default_value_t = 3)]
    starts: usize,
    /// Changes of one endpoint, of each kind.
    #[arg(long, default_value_t = 200)]
    changes: usize,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Targets of the first sync, for 10,000 Services with 10 endpoints each.
const FIRST_SYNC_SECONDS: f64 = 3.0;
const RESIDENT_MIB: f64 = 80.0;
const CHANGE_MILLISECONDS: f64 = 2.0;
/// Of an answer about one of them, or about all.
const QUESTION_MILLISECONDS: f64 = 100.0;
const QUESTIONS: usize = 20;

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    laboratory::preflight()?;
    println!("{}\n", machine());
    let layouts = match arguments.layout.is_empty() {
        true => vec![Layout::One, Layout::Big],
        false => arguments.layout.clone(),
    };
    for layout in layouts {
        measure(&arguments, layout)?;
    }
    Ok(())
}

fn measure(arguments: &Arguments, layout: Layout) -> anyhow::Result<()> {
    let files = tempfile::tempdir().context("making a directory for the world")?;
    let mut world = BenchWorld::write(
        &files.path().join("world"),
        arguments.services,
        arguments.endpoints,
        layout,
        arguments.style,
    )?;
    println!(
        "{} Services with {} endpoints each, {:?} YAML, {}: {:.1} MiB\n",
        arguments.services,
        arguments.endpoints,
        arguments.style,
        match layout {
            Layout::One => "one file per Service",
            Layout::Big => "1,000 Services per file",
        },
        world.size() as f64 / f64::from(1 << 20),
    );
    let mut starts = Vec::new();
    for number in 1..=arguments.starts.max(1) {
        let lab = Lab::new(&[("node1", &[])])?;
        let (start, daemon) = Start::observe(&lab, &world)?;
        starts.push(start);
        if number == arguments.starts.max(1) {
            print_starts(&starts);
            measure_questions(&lab)?;
            measure_changes(&lab, &daemon, &mut world, arguments.changes)?;
            measure_restart(&lab, daemon, &world)?;
        }
    }
    Ok(())
}

/// One start of the daemon on a machine that has no trace of it.
struct Start {
    /// From before the process was made to the last row in the kernel.
    last_row: Duration,
    /// The same to the first 200 of /readyz.
    ready: Duration,
    usage: Usage,
    maps_bytes: u64,
}

impl Start {
    fn observe<'a>(lab: &'a Lab, world: &BenchWorld) -> anyhow::Result<(Start, Daemon<'a>)> {
        let pin_path = lab.node("node1").pin_path.clone();
        let began = Instant::now();
        let (source, limits) = (format!("dir:{}", world.dir.display()), world.limits());
        let mut daemon = Daemon::spawn_on(lab, "node1", &["--source", &source], &refs(&limits))?;
        let last_row = Eyes::wait_for_all(&pin_path, world, began, &mut || daemon.check_running())?;
        daemon.wait_ready(began, LOADING, Duration::from_millis(2))?;
        let start = Start {
            last_row,
            ready: daemon.ready_after,
            usage: Usage::of(daemon.pid())?,
            maps_bytes: observe::maps_bytes(&pin_path)?,
        };
        observe::check_complete(&pin_path, world)?;
        Ok((start, daemon))
    }
}

fn print_starts(starts: &[Start]) {
    let mib = |kib: u64| kib as f64 / 1024.0;
    let mut rows = Vec::new();
    let mut row = |what: &str, values: Vec<f64>, unit: &str, target: Option<f64>| {
        let sample = Sample::new(values);
        let target = target.map_or_else(|| "-".to_owned(), |target| format!("< {target} {unit}"));
        rows.push(vec![
            what.to_owned(),
            format!("{:.2} {unit}", sample.min()),
            format!("{:.2} {unit}", sample.median()),
            format!("{:.2} {unit}", sample.max()),
            target,
        ]);
    };
    let seconds = |of: fn(&Start) -> Duration| starts.iter().map(|s| of(s).as_secs_f64()).collect::<Vec<_>>();
    row("process start to last row in the maps (outside)", seconds(|s| s.last_row), "s", Some(FIRST_SYNC_SECONDS));
    row("process start to /readyz 200", seconds(|s| s.ready), "s", None);
    row("processor time, user and system", seconds(|s| s.usage.cpu), "s", None);
    row(
        "resident memory after it (VmRSS)",
        starts.iter().map(|s| mib(s.usage.resident_kib)).collect(),
        "MiB",
        Some(RESIDENT_MIB),
    );
    row("highest resident memory (VmHWM)", starts.iter().map(|s| mib(s.usage.peak_kib)).collect(), "MiB", None);
    row("memory of all maps (kernel)", starts.iter().map(|s| mib(s.maps_bytes >> 10)).collect(), "MiB", None);
    println!("First sync, {} cold starts:\n", starts.len());
    print_table(&["", "best", "median", "worst", "target"], &rows);
}

fn measure_changes(lab: &Lab, daemon: &Daemon, world: &mut BenchWorld, count: usize) -> anyhow::Result<()> {
    let pin_path = &lab.node("node1").pin_path;
    let eyes = Eyes::open(pin_path)?;
    let mut changes = Changes::new(world, eyes);
    // The first changes warm caches that a daemon at work has warm.
    for edit in Edit::ALL {
        for _ in 0..5 {
            changes.one(edit)?;
        }
    }
    let mut rows = Vec::new();
    for edit in Edit::ALL {
        let (syncs, before) = (daemon_syncs(daemon)?, observe::cpu_time(daemon.pid())?);
        let times: Vec<Duration> = (0..count).map(|_| changes.one(edit)).collect::<Result<_, _>>()?;
        let cpu = observe::cpu_time(daemon.pid())?.saturating_sub(before);
        let inside = daemon_syncs(daemon)?.since(&syncs);
        let sample = Sample::milliseconds(times);
        rows.push(vec![
            edit.to_string(),
            format!("{:.3} ms", sample.median()),
            format!("{:.3} ms", sample.percentile(99.0)),
            format!("{:.3} ms", sample.max()),
            format!("{:.3} ms", inside.mean_milliseconds()),
            format!("{:.3} ms", cpu.as_secs_f64() * 1e3 / count as f64),
            format!("{:.1}", inside.calls / count as f64),
            format!("< {CHANGE_MILLISECONDS} ms"),
        ]);
    }
    println!("One endpoint changes in one file ({count} times each), from rename(2) to the row in the pinned map:\n");
    print_table(
        &["change", "p50", "p99", "worst", "of it the sync", "processor time", "map calls", "target (p50)"],
        &rows,
    );
    syscalls::print(daemon.pid(), &mut changes)
}

/// How long people wait for an answer about one Service, and about all; from the start of the process to its end.
fn measure_questions(lab: &Lab) -> anyhow::Result<()> {
    let node = lab.node("node1");
    let pins = node.pin_path.display().to_string();
    let all = node.kubelane(&["get", "services", "-o", "json", "--pin-path", &pins])?;
    let all: serde_json::Value = serde_json::from_str(&all).context("reading what `kubelane get` says")?;
    let is_cluster_ip = |item: &&serde_json::Value| item["kinds"][0] == "ClusterIP";
    let first = all["items"].as_array().and_then(|items| items.iter().find(is_cluster_ip)).context("no Service")?;
    let text = |name: &str| first[name].as_str().with_context(|| format!("an item without {name}"));
    let frontend = format!("{}/{}", text("address")?, text("protocol")?);
    let service = format!("svc/{}/{}", text("namespace")?, text("name")?);
    let mut rows = Vec::new();
    for arguments in [
        &["get", "services"][..],
        &["get", "services", "-o", "json"],
        &["explain", "--from", "node", &frontend],
        &["explain", &service],
    ] {
        let ask = || -> anyhow::Result<Duration> {
            let began = Instant::now();
            node.kubelane(&[arguments, &["--pin-path", &pins]].concat())?;
            Ok(began.elapsed())
        };
        let sample = Sample::milliseconds((0..QUESTIONS).map(|_| ask()).collect::<Result<Vec<_>, _>>()?);
        rows.push(vec![
            format!("kubelane {}", arguments.join(" ")),
            format!("{:.1} ms", sample.median()),
            format!("{:.1} ms", sample.max()),
            format!("< {QUESTION_MILLISECONDS} ms"),
        ]);
    }
    println!("Questions, {QUESTIONS} times each:\n");
    print_table(&["", "p50", "worst", "target (p50)"], &rows);
    Ok(())
}

/// What the daemon says of its own syncs, as counted since it started.
struct Syncs {
    count: f64,
    seconds: f64,
    calls: f64,
}

fn daemon_syncs(daemon: &Daemon) -> anyhow::Result<Syncs> {
    Ok(Syncs {
        count: daemon.metric("kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}")?,
        seconds: daemon.metric("kubeproxy_sync_proxy_rules_duration_seconds_sum{ip_family=\"IPv4\"}")?,
        calls: daemon.metric("kubelane_sync_calls_total")?,
    })
}

impl Syncs {
    fn since(&self, earlier: &Syncs) -> Syncs {
        Syncs {
            count: self.count - earlier.count,
            seconds: self.seconds - earlier.seconds,
            calls: self.calls - earlier.calls,
        }
    }

    fn mean_milliseconds(&self) -> f64 {
        self.seconds * 1e3 / self.count
    }
}

/// The daemon ends as in a crash and starts again on the same world: it should find everything and write nothing.
fn measure_restart(lab: &Lab, daemon: Daemon, world: &BenchWorld) -> anyhow::Result<()> {
    daemon.kill();
    let daemon = Daemon::start_with(lab, "node1", &world.dir, &refs(&world.limits()))?;
    let usage = Usage::of(daemon.pid())?;
    let rows = vec![
        vec!["process start to /readyz 200".to_owned(), format!("{:.2} s", daemon.ready_after.as_secs_f64())],
        vec!["processor time, user and system".to_owned(), format!("{:.2} s", usage.cpu.as_secs_f64())],
        vec!["resident memory (VmRSS)".to_owned(), format!("{:.2} MiB", usage.resident_kib as f64 / 1024.0)],
        vec!["rows written or deleted".to_owned(), format!("{}", daemon.metric("kubelane_sync_rows_total")?)],
    ];
    println!("Killed and started again, the world unchanged:\n");
    print_table(&["", ""], &rows);
    Ok(())
}
