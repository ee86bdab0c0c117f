//! One size of a cluster: the real daemon on the server's process, from its first sync to its restart.

use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::Arguments;
use crate::common::observe::{self, Eyes, Usage, cpu_time};
use crate::common::world::BenchWorld;
use crate::common::{Sample, refs};
use crate::laboratory::daemon::Daemon;
use crate::laboratory::lab::Lab;
use crate::report::{Figures, Growth};
use crate::serve::{Order, Report, Server, Target};

const NODE: &str = "node1";
/// How long a start may take: ten times as long as 100,000 Services take a debug build.
const PATIENCE: Duration = Duration::from_secs(900);
/// Between two looks at /readyz.
const PAUSE: Duration = Duration::from_millis(10);
/// After the last row, what belongs to a sync goes on for a moment.
const SETTLE: Duration = Duration::from_millis(300);
/// For so long the daemon is watched while nothing changes: several of its passes.
const IDLE: Duration = Duration::from_secs(12);

/// Everything about as many Services as `figures` is of, which has what was measured, also when something failed.
pub fn measure(arguments: &Arguments, figures: &mut Figures) -> anyhow::Result<()> {
    let services = figures.services;
    let world = BenchWorld::new(services, arguments.endpoints);
    let mut starts = Vec::new();
    for number in 1..=arguments.starts.max(1) {
        let lab = Lab::new(&[(NODE, &[])])?;
        let mut server = Server::start(&lab, services, arguments.endpoints)?;
        let (start, daemon) = Start::observe(&lab, &server, &world).inspect_err(|_| add_starts(figures, &starts))?;
        starts.push(start);
        if number == arguments.starts.max(1) {
            add_starts(figures, &starts);
            measure_changes(&daemon, &mut server, arguments, figures)?;
            measure_idle(&daemon, arguments.idle, figures)?;
            measure_more(&daemon, &mut server, arguments, figures)?;
            measure_restart(&lab, daemon, &server, &world, figures)?;
        }
    }
    Ok(())
}

/// One start on a machine that has no trace of the daemon.
struct Start {
    last_row: Duration,
    ready: Duration,
    usage: Usage,
    map_bytes: u64,
}

impl Start {
    fn observe<'a>(lab: &'a Lab, server: &Server, world: &BenchWorld) -> anyhow::Result<(Start, Daemon<'a>)> {
        let pins = &lab.node(NODE).pin_path;
        let began = Instant::now();
        let mut daemon = spawn(lab, server, world)?;
        let last_row = Eyes::wait_for_all(pins, world, began, &mut || daemon.check_running())?;
        daemon.wait_ready(began, PATIENCE, PAUSE)?;
        std::thread::sleep(SETTLE);
        let (ready, usage) = (daemon.ready_after, Usage::of(daemon.pid())?);
        observe::check_complete(pins, world)?;
        Ok((Start { last_row, ready, usage, map_bytes: observe::maps_bytes(pins)? }, daemon))
    }
}

/// With the same limits at each start of a measurement.
fn spawn<'a>(lab: &'a Lab, server: &Server, world: &BenchWorld) -> anyhow::Result<Daemon<'a>> {
    let (kubeconfig, limits) = (server.kubeconfig.display().to_string(), world.limits());
    Daemon::spawn_on(lab, NODE, &["--kubeconfig", &kubeconfig], &refs(&limits))
}

fn add_starts(figures: &mut Figures, starts: &[Start]) {
    if starts.is_empty() {
        return;
    }
    let median = |of: &dyn Fn(&Start) -> f64| Sample::new(starts.iter().map(of)).median();
    let mut add = |id, name, unit, of: &dyn Fn(&Start) -> f64| figures.add(id, name, unit, Growth::Linear, median(of));
    add("first_sync", "first sync: process start to the last row", "s", &|s| s.last_row.as_secs_f64());
    add("first_sync_ready", "first sync: process start to /readyz 200", "s", &|s| s.ready.as_secs_f64());
    add("first_sync_cpu", "first sync: processor time", "s", &|s| s.usage.cpu.as_secs_f64());
    add("first_sync_peak", "first sync: highest resident memory (VmHWM)", "MiB", &|s| mib(s.usage.peak_kib << 10));
    add("resident", "resident memory after it (VmRSS)", "MiB", &|s| mib(s.usage.resident_kib << 10));
    add("maps", "memory of all maps (kernel)", "MiB", &|s| mib(s.map_bytes));
}

fn measure_changes(
    daemon: &Daemon,
    server: &mut Server,
    arguments: &Arguments,
    figures: &mut Figures,
) -> anyhow::Result<()> {
    let Arguments { changes, rate, burst, grown, .. } = *arguments;
    let flat = Growth::Flat;
    // The first changes warm caches that a daemon at work has warm.
    server.order(Order::Change { changes: 20, rate, of: Target::Every })?;
    let change = Work::of(daemon, server, Order::Change { changes, rate, of: Target::Every })?;
    add_changes(figures, ["change_p50", "change_p99", "change_cpu"], "one change", &change);

    let work = Work::of(daemon, server, Order::Burst { changes: burst })?;
    let name = |what: &str| format!("{burst} changes at once: {what}");
    figures.add("burst", &name("first event to the last row"), "ms", flat, work.report.milliseconds[0]);
    figures.add("burst_sent", &name("of it until the server had sent them"), "ms", Growth::None, work.report.sent);
    figures.add("burst_cpu", &name("processor time"), "ms", flat, work.cpu.as_secs_f64() * 1e3);
    figures.add("burst_syncs", &name("syncs"), "", Growth::None, work.syncs);
    figures.add("burst_calls", &name("calls that change maps"), "", Growth::None, work.calls);

    let work = Work::of(daemon, server, Order::Grow { endpoints: grown })?;
    let name = |what: &str| format!("a Service gets {grown} endpoints: {what}");
    figures.add("grow", &name("first slice to the last row"), "ms", flat, work.report.milliseconds[0]);
    figures.add("grow_cpu", &name("processor time"), "ms", flat, work.cpu.as_secs_f64() * 1e3);
    figures.add("grow_syncs", &name("syncs"), "", Growth::None, work.syncs);
    let changes = (changes / 4).max(1);
    let change = Work::of(daemon, server, Order::Change { changes, rate, of: Target::Grown })?;
    let name = format!("one change among its {grown}");
    add_changes(figures, ["grown_change_p50", "grown_change_p99", "grown_change_cpu"], &name, &change);

    let usage = Usage::of(daemon.pid())?;
    figures.add(
        "resident_end",
        "resident memory after all changes (VmRSS)",
        "MiB",
        Growth::Linear,
        mib(usage.resident_kib << 10),
    );
    Ok(())
}

/// An order, and what it took the daemon.
struct Work {
    report: Report,
    cpu: Duration,
    syncs: f64,
    calls: f64,
}

impl Work {
    fn of(daemon: &Daemon, server: &mut Server, order: Order) -> anyhow::Result<Work> {
        // Whoever asks for metrics is served by the same processor time: outside of what is measured. So is what the
        // daemon does in any case (passes over flows, attachments and rows), as long as nothing changes.
        let (syncs, calls) = counts(daemon)?;
        std::thread::sleep(SETTLE);
        let before = cpu_time(daemon.pid())?;
        std::thread::sleep(IDLE);
        let idle = cpu_time(daemon.pid())?.saturating_sub(before).div_f64(IDLE.as_secs_f64());
        let (before, began) = (cpu_time(daemon.pid())?, Instant::now());
        let report = server.order(order).with_context(|| daemon.log())?;
        std::thread::sleep(SETTLE);
        let used = cpu_time(daemon.pid())?.saturating_sub(before);
        let cpu = used.saturating_sub(idle.mul_f64(began.elapsed().as_secs_f64()));
        let (syncs_after, calls_after) = counts(daemon)?;
        Ok(Work { report, cpu, syncs: syncs_after - syncs, calls: calls_after - calls })
    }
}

/// Syncs, and calls that change maps, since the daemon started.
fn counts(daemon: &Daemon) -> anyhow::Result<(f64, f64)> {
    let syncs = daemon.metric("kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}")?;
    Ok((syncs, daemon.metric("kubelane_sync_calls_total")?))
}

fn add_changes(figures: &mut Figures, ids: [&'static str; 3], what: &str, work: &Work) {
    let times = Sample::new(work.report.milliseconds.iter().copied());
    let each = work.cpu.as_secs_f64() * 1e3 / times.len() as f64;
    figures.add(ids[0], &format!("{what}: event to the row, p50"), "ms", Growth::Flat, times.median());
    figures.add(ids[1], &format!("{what}: event to the row, p99"), "ms", Growth::Flat, times.percentile(99.0));
    figures.add(ids[2], &format!("{what}: processor time"), "ms", Growth::Flat, each);
}

fn measure_more(
    daemon: &Daemon,
    server: &mut Server,
    arguments: &Arguments,
    figures: &mut Figures,
) -> anyhow::Result<()> {
    let Arguments { more: services, endpoints, .. } = *arguments;
    if services == 0 {
        return Ok(());
    }
    let work = Work::of(daemon, server, Order::More { services, endpoints })?;
    let name = |what: &str| format!("{services} Services more: {what}");
    let (none, seconds) = (Growth::None, 1e-3);
    figures.add("more", &name("first event to the last row"), "s", none, work.report.milliseconds[0] * seconds);
    figures.add("more_sent", &name("of it until the server had sent them"), "s", none, work.report.sent * seconds);
    figures.add("more_cpu", &name("processor time"), "s", none, work.cpu.as_secs_f64());
    // What the daemon says of each growth, during which it writes nothing.
    daemon.log().lines().filter(|line| line.contains("room for more entries")).for_each(|line| println!("{line}"));
    Ok(())
}

fn measure_idle(daemon: &Daemon, seconds: u64, figures: &mut Figures) -> anyhow::Result<()> {
    if seconds == 0 {
        return Ok(());
    }
    std::thread::sleep(Duration::from_secs(5));
    let before = cpu_time(daemon.pid())?;
    std::thread::sleep(Duration::from_secs(seconds));
    let used = cpu_time(daemon.pid())?.saturating_sub(before);
    let percent = 100.0 * used.as_secs_f64() / seconds as f64;
    figures.add("idle", "idle: of one processor", "%", Growth::None, percent);
    Ok(())
}

/// The daemon ends as in a crash and starts again on the same world: it finds everything, and writes nothing.
fn measure_restart(
    lab: &Lab,
    daemon: Daemon,
    server: &Server,
    world: &BenchWorld,
    figures: &mut Figures,
) -> anyhow::Result<()> {
    daemon.kill();
    let began = Instant::now();
    let mut daemon = spawn(lab, server, world)?;
    daemon.wait_ready(began, PATIENCE, PAUSE)?;
    std::thread::sleep(SETTLE);
    let usage = Usage::of(daemon.pid())?;
    let linear = Growth::Linear;
    figures.add("restart", "restart: process start to /readyz 200", "s", linear, daemon.ready_after.as_secs_f64());
    figures.add("restart_cpu", "restart: processor time", "s", linear, usage.cpu.as_secs_f64());
    figures.add("restart_peak", "restart: highest resident memory (VmHWM)", "MiB", linear, mib(usage.peak_kib << 10));
    let rows = daemon.metric("kubelane_sync_rows_total")?;
    figures.add("restart_rows", "restart: rows written or deleted", "", Growth::None, rows);
    Ok(())
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
