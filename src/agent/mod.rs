//! The daemon: puts the parts together in an order in which nothing is attached before everything else is known to
//! work, and ends with the first part that ends.

mod ask;
mod audit;
mod conditions;
mod conntrack;
mod contest;
mod drops;
mod flows;
mod links;
mod listeners;
mod outlets;
mod outside;
mod probe;
mod probes;
mod reach;
mod request;
mod retry;
mod routes;
mod service_counts;
mod shadow;
mod source;
mod stale;
mod trial;
mod wire;
mod worker;
mod worker_warnings;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tracing::{info, warn};

pub use shadow::{Outcome, Shadow, run as run_shadow};
pub use source::SourceSettings;

use crate::abi;
use crate::bpf::{self, Datapath, Maps};
use crate::k8s::{self, ApiServer};
use crate::model::{About, ForwardThrough, HostConntrack, Masquerade, Notice};
use crate::netdev::{self, DeviceSelection, NodePortAddresses, PodDevices};
use crate::objects::{self, SourceStatus, WatchState};
use crate::serve::{
    self, App, HEALTHZ_FLAG, HealthChecks, Limits, METRICS_FLAG, Metrics, MetricsPage, Page, Sample, Stage,
};
use crate::sync::{Core, CoreSettings};
use crate::takeover;
use conditions::Conditions;
use outlets::Outlets;
use request::Request;
use source::Source;
use stale::{Pass, StaleSocketPasses};
use wire::Wire;
use worker::{Inputs, Worker};

/// Changes that a source may be ahead of the worker.
const CHANGES_AHEAD: usize = 4096;
/// How long a part that has ended may take to say why.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Everything the daemon is told at its start.
#[derive(Clone, Debug)]
pub struct Settings {
    pub source: SourceSettings,
    pub node_name: String,
    pub service_proxy_name: Option<String>,
    pub datapath: bpf::Settings,
    /// Where health is served; `None`: nowhere.
    pub healthz: Option<SocketAddr>,
    /// Where metrics are served; `None`: nowhere.
    pub metrics: Option<SocketAddr>,
    /// Where metrics are served, whether the page is, too.
    pub metrics_page: MetricsPage,
    /// Whether the daemon ends when one of these addresses cannot be had.
    pub bind_hard_fail: bool,
    pub nodeport_addresses: NodePortAddresses,
    pub devices: DeviceSelection,
    pub pod_devices: PodDevices,
    pub masquerade: Masquerade,
    pub forward_through: ForwardThrough,
    /// What the host's connection tracking is to be set to.
    pub conntrack: HostConntrack,
    pub destroy_tcp_sockets: bool,
    /// What is counted of each Service.
    pub counting: bpf::Counting,
    /// Of how many Services that is exposed.
    pub service_metrics: usize,
    /// Key of the taint to be taken off the Node when the daemon is ready.
    pub startup_taint: Option<String>,
    /// kube-proxy's rules are removed once the daemon is ready.
    pub takeover: bool,
}

/// Runs until SIGTERM or SIGINT, and leaves the datapath serving. `started`: when the process did.
///
/// # Errors
/// When a part cannot start, or ends.
pub async fn run(settings: Settings, started: Instant) -> anyhow::Result<()> {
    let pins = settings.datapath.pin_path.clone();
    serve_until_told(settings, started).await.with_context(|| what_remains(&pins))
}

async fn serve_until_told(settings: Settings, started: Instant) -> anyhow::Result<()> {
    let mut signals = Signals::listen()?;
    let app = App { health: Arc::default(), metrics: Arc::new(Metrics::new()?) };
    let mut parts = JoinSet::new();
    let limits = Arc::new(Limits::default());
    let (asking, requests) = mpsc::channel(1);
    let servers = servers(&settings, &app, &asking)?;
    let source = Source::prepare(&settings.source).await?;
    let network = netdev::watch().await.context("reading the node's addresses and devices")?;

    let mut datapath = Datapath::open_counting(&settings.datapath, settings.counting)?;
    let status = Arc::new(SourceStatus::default());
    register_counters(&app.metrics, &settings.datapath.pin_path)?;
    register_watches(&app.metrics, &status)?;
    let stale = StaleSocketPasses::new(stale_pass(&datapath, settings.destroy_tcp_sockets));

    for server in servers {
        parts.spawn(part(server.flag, serve::run(server, Arc::clone(&limits))));
    }
    let probes = probes::run(datapath.probe_rows()?, app.clone(), settings.healthz.is_some());
    parts.spawn(part("answers to health probes", probes));
    let conditions = Conditions::new(Arc::clone(&app.health), &app.metrics)?;
    watch_kernel(&mut parts, &mut datapath, &settings, &app, &conditions, &asking)?;
    let outlets = attend(&mut parts, &settings, &app, limits, source.api_server(), asking)?;
    let (sender, changes) = mpsc::channel(CHANGES_AHEAD);
    let for_source =
        objects::Settings { node_name: settings.node_name.clone(), service_proxy_name: settings.service_proxy_name };
    parts.spawn(async move { ("--source", source.run(for_source, sender, status).await) });

    let inputs = Inputs {
        changes,
        network,
        nodeport_addresses: settings.nodeport_addresses,
        devices: settings.devices,
        pod_devices: settings.pod_devices,
        stale,
        destroy_tcp_sockets: settings.destroy_tcp_sockets,
        app,
        outlets,
        requests,
        started,
    };
    let (listeners, attached) = watch::channel(None);
    let pin_path = settings.datapath.pin_path.clone();
    let reach = reach::watch(pin_path, attached, inputs.network.clone(), inputs.devices.clone(), conditions.clone());
    parts.spawn(async move { ("reach", reach.await) });
    let core = Core::new(CoreSettings { node_name: settings.node_name, masquerade: settings.masquerade });
    let (maps, devices) = datapath.parts();
    let mut worker = Worker::new(core, maps, Wire::new(devices).telling(conditions, listeners), inputs)?;
    tokio::select! {
        signal = signals.next() => {
            info!("{signal}: the daemon exits; its programs stay attached and continue to serve (`kubelane cleanup` removes them)");
            Ok(())
        }
        ended = parts.join_next() => Err(why(ended)),
        result = worker.run() => {
            result?;
            // The worker ends when the source did, and the source knows better why.
            Err(why(tokio::time::timeout(LAST_WORDS, parts.join_next()).await.unwrap_or_default()))
        }
    }
}

/// Whoever reads that the daemon has failed wants to know first what that means for traffic.
fn what_remains(pin_path: &Path) -> &'static str {
    match bpf::attachments(pin_path).is_ok_and(|all| !all.is_empty()) {
        true => "the daemon ends; what is attached still serves, as of its last change",
        false => "the daemon ends, and nothing is attached",
    }
}

/// The servers for health and metrics. Where the daemon is to end if an address cannot be had, that is known now, before
/// anything is attached.
fn servers(settings: &Settings, app: &App, worker: &mpsc::Sender<Request>) -> anyhow::Result<Vec<serve::Server>> {
    let page = settings.metrics.filter(|address| settings.metrics_page.is_served_at(*address)).map(|address| {
        let (pins, ask) = (settings.datapath.pin_path.clone(), ask::within(worker.clone()));
        Page::new(pins, Arc::clone(&app.metrics), ask, address)
    });
    servers_at([settings.healthz, settings.metrics], app, page, settings.bind_hard_fail)
}

/// `addresses`: of health, and of metrics.
fn servers_at(
    addresses: [Option<SocketAddr>; 2],
    app: &App,
    page: Option<Arc<Page>>,
    bind_hard_fail: bool,
) -> anyhow::Result<Vec<serve::Server>> {
    let [healthz, metrics] = addresses;
    let all = [
        (HEALTHZ_FLAG, healthz, serve::health_router(app.clone())),
        (METRICS_FLAG, metrics, serve::metrics_router(app.clone(), page)),
    ];
    let wanted = all.into_iter().filter_map(|(flag, address, router)| Some((flag, address?, router)));
    let server = |(flag, address, router)| {
        let listener = bind_hard_fail.then(|| serve::bind(flag, address)).transpose()?;
        let health = (flag == HEALTHZ_FLAG).then(|| Arc::clone(&app.health));
        Ok(serve::Server { flag, address, router, listener, health })
    };
    wanted.map(server).collect()
}

/// A part that has no failure to tell of; that it ends is one.
async fn part(name: &'static str, work: impl Future<Output = ()>) -> (&'static str, anyhow::Result<()>) {
    work.await;
    (name, Ok(()))
}

/// Starts the passes over what is in the kernel: flows, routes, counts, drops, and audits of attachments and rows, which ask
/// the `worker`.
fn watch_kernel(
    parts: &mut JoinSet<(&'static str, anyhow::Result<()>)>,
    datapath: &mut Datapath,
    settings: &Settings,
    app: &App,
    conditions: &Conditions,
    worker: &mpsc::Sender<Request>,
) -> anyhow::Result<()> {
    let (collector, usage, metrics) = (datapath.flow_collector()?, datapath.map_usage()?, Arc::clone(&app.metrics));
    parts.spawn(async move { ("flows", flows::collect(collector, usage, metrics).await) });
    let by_service = outside::ByService::default();
    if let Some(counts) = datapath.service_counts() {
        let metrics = Arc::clone(&app.metrics);
        let watch = service_counts::watch(counts, settings.service_metrics, metrics, by_service.clone());
        parts.spawn(async move { ("counts of Services", watch.await) });
    }
    let outside = outside::watch(settings.datapath.pin_path.clone(), Arc::clone(&app.metrics), by_service);
    parts.spawn(async move { ("flows from outside", outside.await) });
    parts.spawn(conntrack::set(settings.conntrack));
    let reasons = routes::Reasons::new(datapath.route_epoch()?, settings.forward_through)?;
    let (epoch, for_routes) = (datapath.route_epoch()?, Arc::clone(&reasons));
    parts.spawn(async move { ("routes", routes::follow(epoch, for_routes).await) });
    parts.spawn(async move { ("IPsec policies", routes::follow_policies(reasons).await) });
    let counters = Maps::open(&settings.datapath.pin_path)?;
    parts.spawn(async move { ("drops", drops::watch(counters).await) });
    let pin_path = settings.datapath.pin_path.clone();
    parts.spawn(async move { ("listeners", listeners::watch(pin_path).await) });
    let links = links::watch(datapath.socket_hooks(), datapath.pins(), worker.clone(), conditions.clone());
    parts.spawn(async move { ("attachments", links.await) });
    let (pin_path, asked, shown) = (settings.datapath.pin_path.clone(), worker.clone(), Arc::clone(&app.metrics));
    parts.spawn(async move { ("answers", ask::serve(&pin_path, asked, shown).await) });
    let (pin_path, audited, worker) = (settings.datapath.pin_path.clone(), app.clone(), worker.clone());
    parts.spawn(async move { ("audits", audit::run(move || Maps::open(&pin_path), worker, audited).await) });
    Ok(())
}

/// Starts what goes on beside the worker: health checks of Services, the datapath's trial, events, the startup taint.
/// Without an API server there is nobody to tell. Returns what the worker tells them by.
fn attend(
    parts: &mut JoinSet<(&'static str, anyhow::Result<()>)>,
    settings: &Settings,
    app: &App,
    limits: Arc<Limits>,
    server: Option<ApiServer>,
    worker: mpsc::Sender<Request>,
) -> anyhow::Result<Outlets> {
    let node = || settings.node_name.clone();
    let (health_checks, wanted) = watch::channel(HealthChecks::default());
    let (notices, told) = mpsc::channel(k8s::events::WAITING);
    let service_health = serve::run_service_health(wanted, node(), app.clone(), limits, notices.clone());
    parts.spawn(part("health checks of Services", service_health));
    let trial = probe::run(worker, settings.datapath.cgroup.clone(), Arc::clone(&app.health));
    parts.spawn(async move {
        trial.await;
        std::future::pending().await
    });
    parts.spawn(conntrack::take_back(app.health.stage(), settings.datapath.pin_path.clone()));
    if settings.takeover {
        let stage = app.health.stage();
        parts.spawn(async move { ("--takeover", takeover::run(stage).await) });
    }
    let Some(server) = server else { return Ok(Outlets { health_checks, notices, startup_taint: None }) };
    let note = concat!("kubelane ", env!("CARGO_PKG_VERSION")).to_owned();
    let starting = Notice {
        about: About::Node,
        is_warning: false,
        reason: "Starting",
        action: "StartKubelane",
        note,
        is_of_cluster: false,
    };
    notices.try_send(starting).context("the first notice")?;
    parts.spawn(part("events", server.clone().post(node(), told)));
    let startup_taint = settings.startup_taint.clone().map(|key| {
        let (tainted, is_tainted) = watch::channel(false);
        let (mut stage, node, taint) = (app.health.stage(), node(), key.clone());
        parts.spawn(async move {
            let _ = stage.wait_for(|stage| *stage == Stage::Ready).await;
            server.take_taint(node, taint, is_tainted).await;
            ("--startup-taint", Ok(()))
        });
        (key, tainted)
    });
    Ok(Outlets { health_checks, notices, startup_taint })
}

/// The reason for the daemon's end, from the part that ended first. None of them ever should.
fn why(ended: Option<Result<(&'static str, anyhow::Result<()>), tokio::task::JoinError>>) -> anyhow::Error {
    match ended {
        Some(Ok((part, Ok(())))) => anyhow!("{part}: ended unexpectedly; the daemon must be restarted"),
        Some(Ok((part, Err(error)))) => error.context(format!("{part} failed")),
        Some(Err(error)) => anyhow!("a task of the daemon failed: {error}"),
        None => anyhow!("the source ended without an error"),
    }
}

/// A second set of handles on the maps: counters are read by whoever scrapes, while the worker writes.
fn register_counters(metrics: &Metrics, pin_path: &Path) -> anyhow::Result<()> {
    let maps = Mutex::new(Maps::open(pin_path)?);
    let read = move || -> Vec<Sample> {
        let counters = maps.lock().unwrap_or_else(PoisonError::into_inner).read_counters().unwrap_or_else(|error| {
            warn!("cannot read the datapath's counters: {error:#}");
            Vec::new()
        });
        counters.into_iter().map(|(verdict, count)| (vec![verdict.to_owned()], count as f64)).collect()
    };
    let meanings: Vec<String> =
        abi::counter::NAMES.iter().map(|(name, meaning)| format!("{name}: {meaning}")).collect();
    let help = format!("Decisions of the datapath. {}", meanings.join("; "));
    metrics.read_counters("kubelane_datapath_verdicts_total", &help, &["verdict"], read)
}

/// What a metric shows of a watch.
type Of = fn(&WatchState) -> f64;

fn register_watches(metrics: &Metrics, status: &Arc<SourceStatus>) -> anyhow::Result<()> {
    let read = |status: &Arc<SourceStatus>, of: Of| {
        let status = Arc::clone(status);
        move || -> Vec<Sample> { status.all().map(|(kind, watch)| (vec![kind.to_owned()], of(watch))).into() }
    };
    metrics.read_gauges(
        "kubelane_source_connected",
        "1 if the last response from the source was not an error, by kind",
        &["kind"],
        read(status, |watch| f64::from(u8::from(watch.connected()))),
    )?;
    metrics.read_gauges(
        "kubelane_source_last_event_timestamp_seconds",
        "Unix time of the last event or list, by kind; 0 before the first",
        &["kind"],
        read(status, |watch| watch.last_event() as f64),
    )?;
    let counters: [(&str, &str, Of); 3] = [
        ("kubelane_source_events_total", "Objects received, by kind", |watch| watch.events() as f64),
        ("kubelane_source_errors_total", "Failures of the source, by kind", |watch| watch.errors() as f64),
        ("kubelane_source_lists_total", "Lists completed, by kind; all but the first are relists", |watch| {
            watch.lists() as f64
        }),
    ];
    for (name, help, of) in counters {
        metrics.read_counters(name, help, &["kind"], read(status, of))?;
    }
    Ok(())
}

fn stale_pass(datapath: &Datapath, with_tcp: bool) -> Option<Pass> {
    let Some(sockets) = datapath.stale_sockets() else {
        warn!(
            "this kernel has no BTF, or refuses to iterate over sockets: connected UDP sockets keep a removed backend until they fail by themselves"
        );
        return None;
    };
    Some(Arc::new(move |unserved| sockets.settle(bpf::Search { with_tcp, unserved })))
}

/// The signals that end the daemon.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("listening for signals");
        Ok(Signals { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_of_any_part_is_a_failure_that_names_it() {
        type Part = fn() -> anyhow::Result<()>;
        let table: [(Part, &str); 3] = [
            (|| Ok(()), "--source: ended unexpectedly"),
            (|| Err(anyhow!("the directory is gone")), "--source failed: the directory is gone"),
            (|| panic!("index out of bounds"), "index out of bounds"),
        ];
        for (part, expected) in table {
            let mut parts = JoinSet::new();
            parts.spawn(async move { ("--source", part()) });
            let reason = format!("{:#}", why(parts.join_next().await));
            assert!(reason.contains(expected), "{reason}");
        }
        assert!(why(None).to_string().contains("the source ended"));
    }
}
