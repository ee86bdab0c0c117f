//! The daemon without a datapath: the same source, the same plan, rows that go nowhere, and a look at kube-proxy's rules
//! once a minute.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, anyhow};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tracing::{debug, info, warn};

use super::source::Source;
use super::worker::sleep_until;
use super::worker_warnings::WarningLog;
use super::{CHANGES_AHEAD, LAST_WORDS, Signals, SourceSettings, register_watches, why};
use crate::bpf;
use crate::model::{Change, Ipx, Kind, Masquerade};
use crate::netdev::{self, Network, NodePortAddresses};
use crate::objects::{self, SourceStatus};
use crate::serve::{self, App, Limits, Metrics, Sample, Totals};
use crate::shadow::{self, Difference, KINDS, Key, Ledger, News, Nowhere, Rules, Unreadable};
use crate::sync::{Core, CoreSettings, MapName};

/// From one comparison to the next.
const PERIOD: Duration = Duration::from_secs(60);
/// The same when something was found that may still go away: kube-proxy lags behind.
const CONFIRMATION: Duration = Duration::from_secs(10);
/// As the worker has it.
const NODE_GRACE: Duration = Duration::from_secs(5);
const DRAIN: usize = 4096;
/// Rows that wait for ids to rest.
const RETRY: Duration = Duration::from_secs(1);
/// Lines of one comparison.
const LINES_MAX: usize = 50;

/// Everything it is told at its start.
#[derive(Clone, Debug)]
pub struct Shadow {
    pub source: SourceSettings,
    pub node_name: String,
    pub service_proxy_name: Option<String>,
    pub nodeport_addresses: NodePortAddresses,
    pub masquerade: Masquerade,
    /// Rows that the daemon's maps would have at most, by [`MapName`].
    pub capacity: [u32; MapName::ALL.len()],
    pub healthz: Option<SocketAddr>,
    pub metrics: Option<SocketAddr>,
    pub bind_hard_fail: bool,
    /// One comparison, and an end.
    pub is_once: bool,
}

/// Of one comparison.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub is_same: bool,
    /// Service, destination, kind, difference.
    pub differences: Vec<Vec<String>>,
    pub remarks: Vec<String>,
    pub summary: String,
}

/// Runs until a signal (`None`), or with `is_once` to the end of the comparison.
///
/// # Errors
/// When a part cannot start, or ends; with `is_once` also when there is nothing to compare with.
pub async fn run(settings: Shadow, started: Instant) -> anyhow::Result<Option<Outcome>> {
    let mut signals = Signals::listen()?;
    let app = App { health: Arc::default(), metrics: Arc::new(Metrics::new()?) };
    let counts = Arc::default();
    register(&app.metrics, &counts)?;
    let mut parts = JoinSet::new();
    let addresses = [settings.healthz, settings.metrics];
    for server in super::servers_at(addresses, &app, None, settings.bind_hard_fail)? {
        parts.spawn(super::part(server.flag, serve::run(server, Arc::new(Limits::default()))));
    }
    let source = Source::prepare(&settings.source).await?;
    let network = netdev::watch().await.context("reading the node's addresses and devices")?;
    let status = Arc::new(SourceStatus::default());
    register_watches(&app.metrics, &status)?;
    let (sender, changes) = mpsc::channel(CHANGES_AHEAD);
    let for_source =
        objects::Settings { node_name: settings.node_name.clone(), service_proxy_name: settings.service_proxy_name };
    parts.spawn(async move { ("--source", source.run(for_source, sender, status).await) });
    info!(version = env!("CARGO_PKG_VERSION"), node = settings.node_name, "kubelane compares, and serves nothing");
    let mut work = Work {
        core: Core::new(CoreSettings { node_name: settings.node_name, masquerade: settings.masquerade }),
        maps: Nowhere { capacity: settings.capacity },
        network,
        nodeport_addresses: settings.nodeport_addresses,
        app,
        counts,
        is_once: settings.is_once,
        started,
        node_listed: false,
        node_deadline: None,
        synced: false,
        warnings: WarningLog::default(),
        ledger: Ledger::default(),
        told: BTreeSet::new(),
        summary: String::new(),
        compared: 0,
    };
    tokio::select! {
        signal = signals.next() => match settings.is_once {
            true => Err(anyhow!("{signal}: ended before the comparison was")),
            false => {
                info!("{signal}: exits; there is nothing to remove");
                Ok(None)
            }
        },
        ended = parts.join_next() => Err(why(ended)),
        result = work.run(changes) => match result? {
            Some(outcome) => Ok(Some(outcome)),
            None => Err(why(tokio::time::timeout(LAST_WORDS, parts.join_next()).await.unwrap_or_default())),
        },
    }
}

/// Service ports, and differences by kind.
type Counts = Arc<Mutex<(usize, [usize; KINDS.len()])>>;

fn register(metrics: &Metrics, counts: &Counts) -> anyhow::Result<()> {
    let read = |counts: &Counts| *counts.lock().unwrap_or_else(PoisonError::into_inner);
    let ports = Arc::clone(counts);
    metrics.read_gauges(
        "kubelane_shadow_service_ports",
        "Service ports of the last comparison with kube-proxy's rules (--shadow)",
        &[],
        move || vec![(Vec::new(), read(&ports).0 as f64)],
    )?;
    let counts = Arc::clone(counts);
    metrics.read_gauges(
        "kubelane_shadow_differences",
        "Destinations for which two comparisons have found the same difference, by kind (--shadow)",
        &["kind"],
        move || -> Vec<Sample> {
            let of = read(&counts).1;
            KINDS.iter().zip(of).map(|((_, name), count)| (vec![(*name).to_owned()], count as f64)).collect()
        },
    )
}

struct Work {
    core: Core,
    maps: Nowhere,
    network: watch::Receiver<Network>,
    nodeport_addresses: NodePortAddresses,
    app: App,
    counts: Counts,
    is_once: bool,
    started: Instant,
    node_listed: bool,
    /// When the Node is waited for no longer.
    node_deadline: Option<Instant>,
    synced: bool,
    warnings: WarningLog,
    ledger: Ledger,
    /// What was said once: remarks about rules, and why there are none.
    told: BTreeSet<String>,
    summary: String,
    compared: usize,
}

/// Somebody reads the rules.
type Reading = JoinHandle<Result<Rules, Unreadable>>;

impl Work {
    /// `None`: the source has ended.
    async fn run(&mut self, mut changes: mpsc::Receiver<Change>) -> anyhow::Result<Option<Outcome>> {
        let mut buffer = Vec::with_capacity(DRAIN);
        let mut reading: Option<Reading> = None;
        let mut next = None;
        loop {
            let wake = self.wake_at();
            tokio::select! {
                received = changes.recv_many(&mut buffer, DRAIN) => {
                    if received == 0 {
                        return Ok(None);
                    }
                }
                changed = self.network.changed() => changed.context("the watch of the node's addresses ended")?,
                () = sleep_until(wake) => {}
                () = sleep_until(next.filter(|_| reading.is_none())) => {
                    let node = Arc::new(self.network.borrow().addresses.clone());
                    reading = Some(tokio::task::spawn_blocking(move || {
                        let began = Instant::now();
                        let rules = shadow::read(&node);
                        debug!(took = ?began.elapsed(), "rules read");
                        rules
                    }));
                    continue;
                }
                read = ended(&mut reading) => {
                    reading = None;
                    let (outcome, pause) = self.take(read?)?;
                    if let Some(outcome) = outcome {
                        return Ok(Some(outcome));
                    }
                    // The rules of a whole cluster are gone until then.
                    bpf::memory::release();
                    next = Some(Instant::now() + pause);
                    continue;
                }
            }
            self.round(&mut buffer);
            if self.synced && next.is_none() {
                next = Some(Instant::now());
            }
        }
    }

    /// Applies what was drained, and lays it out.
    fn round(&mut self, buffer: &mut Vec<Change>) {
        for change in buffer.drain(..) {
            self.node_listed |= change == Change::ListEnd(Kind::Node);
            self.core.apply(change);
        }
        self.follow_addresses();
        let now = Instant::now();
        if !self.core.ready() {
            return self.app.health.not_ready("Services and EndpointSlices have not been listed yet");
        }
        if !self.synced && !self.node_listed && self.core.node().is_none() {
            let deadline = *self.node_deadline.get_or_insert(now + NODE_GRACE);
            if now < deadline {
                return self.app.health.not_ready("the Node object has not been read yet");
            }
            warn!("this node's Node object could not be read within {} s: continuing without it", NODE_GRACE.as_secs());
        }
        let report = self.core.sync(&mut self.maps, now);
        self.warnings.tell(&report.warnings, &report.resolved, now);
        self.app.health.up_to_date(SystemTime::now());
        let counts = self.core.counts();
        self.app.metrics.set_totals(Totals {
            services: counts.services as u64,
            endpoints: counts.endpoints as u64,
            frontends: counts.frontends as u64,
            degraded: counts.degraded as u64,
        });
        if !std::mem::replace(&mut self.synced, true) {
            let (services, endpoints) = (counts.services, counts.endpoints);
            info!(after_start = ?self.started.elapsed(), services, endpoints, "first sync");
            bpf::memory::release();
        }
    }

    fn follow_addresses(&mut self) {
        let network = self.network.borrow_and_update();
        let internal_ips = self.core.node().map_or(&[][..], |node| &node.internal_ips);
        let node_ports: Vec<Ipx> = self.nodeport_addresses.select(&network.addresses, internal_ips);
        let bound = network.addresses.clone();
        drop(network);
        self.core.set_node_addresses(node_ports, bound);
    }

    fn wake_at(&self) -> Option<Instant> {
        match self.synced {
            false => self.node_deadline,
            true if self.core.pending() => Some(Instant::now() + RETRY),
            true => self.core.next_due(),
        }
    }

    /// What was read: the outcome, if that was all, or when to read again.
    fn take(&mut self, read: Result<Rules, Unreadable>) -> anyhow::Result<(Option<Outcome>, Duration)> {
        let rules = match read {
            Err(error) if self.is_once => return Err(error.into()),
            Err(error) => {
                if self.told.insert(error.to_string()) {
                    warn!("shadow: {error}; trying again every minute");
                }
                return Ok((None, PERIOD));
            }
            Ok(rules) => rules,
        };
        for remark in &rules.remarks {
            if !self.is_once && self.told.len() < 1000 && self.told.insert(remark.clone()) {
                warn!("shadow: {remark}");
            }
        }
        let began = Instant::now();
        let comparison = shadow::compare(self.core.tables(), &rules, &self.network.borrow().addresses);
        let service_ports = comparison.service_ports;
        debug!(took = ?began.elapsed(), service_ports, "compared");
        let news = self.ledger.take(comparison);
        self.compared += 1;
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner) =
            (service_ports, self.ledger.counts().map(|(_, count)| count));
        self.app.health.probed(None);
        let differ = self.ledger.service_ports();
        let summary = format!("{service_ports} Service ports compared with {} rules, {differ} differ", rules.mode);
        if self.is_once {
            let is_last = !news.is_open || self.compared > 1;
            return Ok((is_last.then(|| self.outcome(&rules, summary, differ)), CONFIRMATION));
        }
        tell(&news);
        if self.summary != summary && !(news.is_open && self.compared == 1) {
            info!("shadow: {summary}");
            self.summary = summary;
        }
        Ok((None, if news.is_open { CONFIRMATION } else { PERIOD }))
    }

    fn outcome(&self, rules: &Rules, summary: String, differ: usize) -> Outcome {
        let row = |(key, difference): (&Key, &Difference)| {
            let kind = KINDS.iter().find(|(kind, _)| *kind == key.kind).map_or("", |(_, name)| name);
            vec![difference.name.clone(), Difference::destination(key), kind.replace('_', " "), difference.text()]
        };
        let mut differences: Vec<Vec<String>> = self.ledger.differences().iter().map(row).collect();
        differences.sort();
        Outcome { is_same: differ == 0, differences, remarks: rules.remarks.iter().cloned().collect(), summary }
    }
}

fn tell(news: &News) {
    let line = |(key, difference): &(Key, Difference)| {
        format!("{} {}: {}", difference.name, Difference::destination(key), difference.text())
    };
    for difference in news.begun.iter().take(LINES_MAX) {
        match difference.0.kind {
            shadow::Kind::Known => info!("shadow: known: {}", line(difference)),
            _ => warn!("shadow: {}", line(difference)),
        }
    }
    for difference in news.over.iter().take(LINES_MAX) {
        info!("shadow: over: {}", line(difference));
    }
    for (count, what) in [(news.begun.len(), "began"), (news.over.len(), "are over")] {
        if count > LINES_MAX {
            warn!("shadow: {} more differences {what}", count - LINES_MAX);
        }
    }
}

async fn ended(reading: &mut Option<Reading>) -> anyhow::Result<Result<Rules, Unreadable>> {
    match reading {
        Some(reading) => reading.await.context("reading the rules"),
        None => std::future::pending().await,
    }
}
