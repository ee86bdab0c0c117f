//! The one task that owns the world: it drains every event that waits, applies all, and syncs. The first event waits
//! for nothing; what comes while a sync runs is drained together afterwards, so that a burst coalesces by itself.

use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use tokio::sync::{mpsc, watch};
use tracing::{debug, info, warn};

use super::outlets::Outlets;
use super::request::Request;
use super::retry::Retry;
use super::stale::StaleSocketPasses;
use super::trial::{Trial, TrialRows};
use super::wire::Wire;
use super::worker_warnings::WarningLog;
use crate::bpf;
use crate::explain::{About, recent};
use crate::model::{Change, Family, Ipx, Kind, Protocol};
use crate::netdev::{DeviceSelection, Network, NodePortAddresses, PodDevices};
use crate::plan::arrivals::Tally;
use crate::serve::{App, Changes, SyncSample, Totals};
use crate::sync::{Core, MapIo, MapName, SyncReport};

/// Events applied before the next sync, so that a flood cannot keep writes waiting for ever. A relist that is split
/// this way is safe: nothing is swept before its end.
const DRAIN: usize = 4096;
/// How long the first sync waits for the Node object, which may choose other endpoints (its zone) and NodePort
/// addresses (`primary`). The Node may be missing, or not be ours to read.
const NODE_GRACE: Duration = Duration::from_secs(5);
/// A sync of this many rows, or of this length, is worth a line in the log.
const NOTABLE_ROWS: usize = 100;
const NOTABLE_DURATION: Duration = Duration::from_millis(50);
/// How often the worker vouches for what load balancers are told. Their probes are answered for some seconds longer.
const VOUCHING: Duration = Duration::from_millis(500);

/// What the worker listens to, and what it serves.
pub struct Inputs {
    pub changes: mpsc::Receiver<Change>,
    pub network: watch::Receiver<Network>,
    pub nodeport_addresses: NodePortAddresses,
    pub devices: DeviceSelection,
    pub pod_devices: PodDevices,
    pub stale: StaleSocketPasses,
    /// Whether a pass ends TCP sockets, too.
    pub destroy_tcp_sockets: bool,
    pub app: App,
    pub outlets: Outlets,
    pub requests: mpsc::Receiver<Request>,
    /// When the process started.
    pub started: Instant,
}

/// The addresses that the core knows.
#[derive(Debug, Default, PartialEq, Eq)]
struct Addresses {
    nodeport: Vec<Ipx>,
    outward: Vec<Ipx>,
    bound: Vec<Ipx>,
}

/// Owner of the core and the maps.
pub struct Worker<'m> {
    core: Core,
    maps: &'m mut dyn MapIo,
    wire: Wire<'m>,
    inputs: Inputs,
    buffer: Vec<Change>,
    retry: Retry,
    addresses: Addresses,
    node_listed: bool,
    /// When the first sync waits for the Node no longer; set when all else is there.
    node_deadline: Option<Instant>,
    synced: bool,
    warnings: usize,
    warning_log: WarningLog,
    /// Of a trial of the datapath that goes on.
    trial: Option<TrialRows>,
}

impl<'m> Worker<'m> {
    /// Takes over what the maps hold.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn new(mut core: Core, maps: &'m mut dyn MapIo, wire: Wire<'m>, inputs: Inputs) -> anyhow::Result<Self> {
        core.measure_after(SystemTime::now() - inputs.started.elapsed());
        let found = core.adopt(maps).context("reading the pinned maps")?;
        if found.frontends > 0 {
            inputs.app.health.state_adopted();
            info!(
                services = found.services,
                frontends = found.frontends,
                backends = found.backends,
                unusable = found.unusable,
                "took over the state of an earlier daemon, which continues to be served"
            );
        }
        Ok(Worker {
            core,
            maps,
            wire,
            inputs,
            buffer: Vec::with_capacity(DRAIN),
            retry: Retry::default(),
            addresses: Addresses::default(),
            node_listed: false,
            node_deadline: None,
            synced: false,
            warnings: 0,
            warning_log: WarningLog::default(),
            trial: None,
        })
    }

    /// Works until the source's end of `changes` is dropped.
    ///
    /// # Errors
    /// When the watch of the node's addresses ended.
    pub async fn run(&mut self) -> anyhow::Result<()> {
        let mut vouching = tokio::time::interval(VOUCHING);
        vouching.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let wake = self.wake_at();
            tokio::select! {
                _ = vouching.tick(), if self.synced => {
                    self.inputs.outlets.vouch(bpf::clock_ns());
                    continue;
                }
                received = self.inputs.changes.recv_many(&mut self.buffer, DRAIN) => {
                    if received == 0 {
                        return Ok(());
                    }
                }
                changed = self.inputs.network.changed() => {
                    changed.context("the watch of the node's addresses ended")?;
                }
                () = sleep_until(wake) => {}
                () = self.inputs.stale.finished() => continue,
                Some(request) = self.inputs.requests.recv() => {
                    if !self.answer(request) {
                        continue;
                    }
                }
            }
            self.round(tokio::time::Instant::now().into_std());
        }
    }

    /// True when there is something to repair.
    fn answer(&mut self, request: Request) -> bool {
        let (map, keys) = match request {
            Request::Snapshot(map, reply) => {
                // Whoever asked may have gone.
                let _ = reply.send(self.core.snapshot(map));
                return false;
            }
            Request::Explain(about, reply) => {
                let mut answer = self.core.explain(&about);
                answer.daemon.unserved = self.inputs.app.health.what_is_unserved();
                let synced = self.inputs.app.health.last_updated();
                answer.daemon.last_sync_seconds = synced.and_then(|at| at.elapsed().ok()).map(|age| age.as_secs());
                if about == About::Daemon {
                    answer.arguments = std::env::args().collect();
                    answer.log = recent::lines();
                }
                let _ = reply.send(answer);
                return false;
            }
            Request::Correct(map, keys) => (map, keys),
            Request::Devices => {
                self.wire.audit(tokio::time::Instant::now().into_std());
                return false;
            }
            Request::Trial(trial, reply) => {
                let _ = reply.send(self.put_trial(trial));
                return false;
            }
        };
        match self.core.correct(map, &keys, self.maps) {
            Ok(0) => false,
            Ok(rows) => {
                warn!(map = map.as_str(), rows, "another process has changed these map entries: writing them again");
                self.inputs.app.metrics.drifted(map.as_str(), rows as u64);
                true
            }
            Err(error) => {
                warn!("cannot read the entries that an audit found changed: {error:#}");
                true
            }
        }
    }

    fn put_trial(&mut self, trial: Option<Trial>) -> anyhow::Result<()> {
        if let Some(rows) = self.trial.take() {
            rows.remove(self.maps);
        }
        let rows = trial.map(|trial| TrialRows::write(self.maps, &trial)).transpose()?;
        self.trial = rows;
        Ok(())
    }

    /// Applies what was drained, and syncs.
    fn round(&mut self, now: Instant) {
        self.apply(now);
        self.follow_addresses();
        if !self.core.ready() {
            self.inputs.app.health.not_ready("Services and EndpointSlices have not been listed yet");
        } else if !self.node_is_known_or_late(now) {
            self.inputs.app.health.not_ready("the Node object has not been read yet");
            return;
        }
        let report = self.core.sync(self.maps, now);
        if let Some(trial) = self.trial.as_ref().and_then(|rows| rows.is_to_move(self.maps))
            && let Err(error) = self.put_trial(Some(trial))
        {
            warn!("the test connection finds no map entries: {error:#}");
        }
        self.tell_warnings(&report, now);
        let Inputs { outlets, nodeport_addresses, .. } = &self.inputs;
        outlets.tell(&self.core, &report, nodeport_addresses, &self.addresses.nodeport);
        if self.core.ready() {
            self.follow_devices(now);
            self.after_sync(&report, now);
            self.inputs.outlets.vouch(bpf::clock_ns());
        }
    }

    fn apply(&mut self, now: Instant) {
        if self.buffer.is_empty() {
            return;
        }
        for change in self.buffer.drain(..) {
            self.node_listed |= change == Change::ListEnd(Kind::Node);
            self.core.apply(change);
        }
        self.measure_changes();
        let App { health, metrics } = &self.inputs.app;
        metrics.queued(SystemTime::now());
        // Before that it is the source that is waited for, and a restart would not help.
        if self.core.ready() {
            health.update_waits(now);
        }
        health.node_leaves(self.core.node().is_some_and(|node| node.being_deleted));
    }

    fn follow_addresses(&mut self) {
        let network = self.inputs.network.borrow_and_update();
        let internal_ips = self.core.node().map_or(&[][..], |node| &node.internal_ips);
        let outward = self.inputs.devices.select(&network.devices, internal_ips);
        let pods = self.inputs.pod_devices.select(&network.devices, &outward);
        // By these clients are hidden: answers to them are looked at.
        let of_pods = pods.iter().flat_map(|end| [Family::Ipv4, Family::Ipv6].map(|family| end.first(family)));
        let of_pods: BTreeSet<Ipx> = of_pods.flatten().collect();
        let of_outward = outward.iter().flat_map(|device| &device.addresses).copied();
        let addresses = Addresses {
            nodeport: self.inputs.nodeport_addresses.select(&network.addresses, internal_ips),
            outward: of_outward.chain(of_pods).collect(),
            bound: network.addresses.clone(),
        };
        drop(network);
        if self.addresses == addresses {
            return;
        }
        debug!(?addresses, "node addresses");
        self.core.set_node_addresses(addresses.nodeport.clone(), addresses.bound.clone());
        self.core.set_outward_addresses(addresses.outward.clone());
        self.addresses = addresses;
    }

    /// After the rows are there: packets that the programs meet find their Services. The addresses of a new device are
    /// in the kernel before its programs, and those of one that goes are taken away first; until then its packets
    /// are none of a Service's.
    fn follow_devices(&mut self, now: Instant) {
        let network = self.inputs.network.borrow();
        let internal_ips = self.core.node().map_or(&[][..], |node| &node.internal_ips);
        let outward = self.inputs.devices.select(&network.devices, internal_ips);
        let pods = self.inputs.pod_devices.select(&network.devices, &outward);
        self.wire.follow(&outward, &pods, now);
    }

    fn node_is_known_or_late(&mut self, now: Instant) -> bool {
        if self.synced || self.node_listed || self.core.node().is_some() {
            return true;
        }
        let late = now >= *self.node_deadline.get_or_insert(now + NODE_GRACE);
        if late {
            warn!("this node's Node object could not be read within {} s: continuing without it", NODE_GRACE.as_secs());
        }
        late
    }

    fn after_sync(&mut self, report: &SyncReport, now: Instant) {
        // Before anybody is told that it is ready, and scrapes.
        self.measure(report);
        let tell = self.retry.due().is_none_or(|due| now >= due);
        match self.core.pending() {
            true => self.retry.failed(now),
            false => self.retry.succeeded(),
        }
        if report.waits {
            self.inputs.app.health.update_waits(now);
            self.inputs.app.health.not_ready("the kernel rejects some map entries; see the log");
        } else {
            self.inputs.app.health.up_to_date(SystemTime::now());
            self.inputs.app.metrics.up_to_date(SystemTime::now());
        }
        if let Some((map, error)) = report.failures.first().filter(|_| tell) {
            let failed = report.failures.len();
            warn!(failed, "the kernel rejected {failed} map entries (map {}: {error}); trying again", map.as_str());
        }
        self.tell(report);
        let datagrams = |gone: &(Protocol, _)| gone.0 == Protocol::Udp;
        let gone = report.backends_gone.iter().any(|gone| self.inputs.destroy_tcp_sockets || datagrams(gone));
        // An earlier daemon may have ended between a write and the pass that it called for.
        let unserved = report.datagram_frontends_served || !self.synced;
        if gone || report.datagram_frontends_changed_owner || unserved {
            self.inputs.stale.request(unserved);
        }
        if !self.synced {
            self.synced = true;
            // The first sync holds a whole cluster's objects at once; nothing after it needs as much.
            bpf::memory::release();
        }
    }

    fn measure(&self, report: &SyncReport) {
        let metrics = &self.inputs.app.metrics;
        metrics.synced(SyncSample {
            duration: report.duration,
            full: report.full,
            rows_written: report.rows_written as u64,
            rows_deleted: report.rows_deleted as u64,
            calls: report.calls as u64,
            failures: report.failures.len() as u64,
        });
        let counts = self.core.counts();
        metrics.set_totals(Totals {
            services: counts.services as u64,
            endpoints: counts.endpoints as u64,
            frontends: counts.frontends as u64,
            degraded: counts.degraded as u64,
        });
        let maps = [
            (MapName::Services, counts.names),
            (MapName::Frontends, counts.frontends),
            (MapName::Backends, counts.backends),
            (MapName::Slots, counts.slots),
            (MapName::Addresses, counts.addresses),
            (MapName::SourceRanges, counts.source_ranges),
        ];
        for (map, entries) in maps {
            metrics.set_map(map.as_str(), entries as u64, self.maps.capacity(map).into());
        }
        let no_local = self.core.no_local();
        metrics.set_no_local(no_local.internal, no_local.external);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        for (family, triggered) in &report.triggers {
            // A clock of the control plane that is ahead of this node's counts as no time at all.
            let since = now.saturating_sub(Duration::from_nanos(u64::try_from(*triggered).unwrap_or(0)));
            metrics.programmed(*family, since);
        }
        self.measure_changes();
    }

    fn measure_changes(&self) {
        let changes = |tally: Tally| Changes { total: tally.total, pending: tally.pending };
        let (services, slices) = self.core.tallies();
        self.inputs.app.metrics.set_changes(changes(services), changes(slices));
    }

    fn tell(&self, report: &SyncReport) {
        let (written, deleted, calls) = (report.rows_written, report.rows_deleted, report.calls);
        let took = report.duration;
        if !self.synced {
            let counts = self.core.counts();
            info!(
                after_start = ?self.inputs.started.elapsed(),
                services = counts.services,
                endpoints = counts.endpoints,
                frontends = counts.frontends,
                written,
                deleted,
                calls,
                ?took,
                "first sync"
            );
        } else if written + deleted >= NOTABLE_ROWS || took >= NOTABLE_DURATION {
            info!(services = report.services, written, deleted, calls, ?took, "sync");
        } else if report.services > 0 || calls > 0 {
            debug!(services = report.services, written, deleted, calls, ?took, "sync");
        }
    }

    fn tell_warnings(&mut self, report: &SyncReport, now: Instant) {
        self.warning_log.tell(&report.warnings, &report.resolved, now);
        self.warnings = (self.warnings + report.warnings.len()).saturating_sub(report.resolved.len());
        self.inputs.app.metrics.set_warnings(self.warnings);
    }

    /// When the next round is due without an event.
    fn wake_at(&self) -> Option<Instant> {
        if !self.synced {
            return self.node_deadline;
        }
        [self.retry.due(), self.core.next_due(), self.wire.due()].into_iter().flatten().min()
    }
}

impl Drop for Worker<'_> {
    fn drop(&mut self) {
        if let Some(rows) = self.trial.take() {
            rows.remove(self.maps);
        }
    }
}

/// `None`: for ever.
pub(super) async fn sleep_until(wake: Option<Instant>) {
    match wake {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
