//! The daemon's metrics: kube-proxy's names where dashboards expect them (`kubeproxy_`), our own beside them
//! (`kubelane_`). What the kernel or another task counts is read when it is scraped.

mod at_scrape;
mod kube_proxy;
mod make;

use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use prometheus::core::Collector as _;
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    Encoder as _, Gauge, GaugeVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

use at_scrape::{Read, ReadAtScrape};
use kube_proxy::KubeProxy;
use make::{counter, counters, gauge, int_gauge, int_gauges};

pub use at_scrape::{Durations, Sample};
pub use kube_proxy::Changes;

use crate::model::Family;

/// What one sync did.
#[derive(Clone, Copy, Debug, Default)]
pub struct SyncSample {
    pub duration: Duration,
    /// All Services were compiled.
    pub full: bool,
    pub rows_written: u64,
    pub rows_deleted: u64,
    /// System calls.
    pub calls: u64,
    /// Rows that the kernel did not take.
    pub failures: u64,
}

/// How much is programmed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    pub services: u64,
    pub endpoints: u64,
    pub frontends: u64,
    /// Services that have not got all the rows that they ask for.
    pub degraded: u64,
}

/// Every metric of the daemon, in a registry of its own.
pub struct Metrics {
    registry: Registry,
    kube_proxy: KubeProxy,
    rows: IntCounterVec,
    calls: IntCounter,
    failures: IntCounter,
    services: IntGauge,
    endpoints: IntGauge,
    frontends: IntGauge,
    degraded: IntGauge,
    warnings: IntGauge,
    map_entries: IntGaugeVec,
    map_capacity: IntGaugeVec,
    flows: IntGaugeVec,
    drift: IntCounterVec,
    last_audit: Gauge,
}

impl Metrics {
    /// # Errors
    /// When a metric's name is not valid or not unique: a mistake in this file.
    pub fn new() -> anyhow::Result<Self> {
        let registry = Registry::new();
        registry.register(Box::new(ProcessCollector::for_self()))?;
        let metrics = Metrics {
            kube_proxy: KubeProxy::new(&registry)?,
            rows: counters(
                &registry,
                "kubelane_sync_rows_total",
                "Map entries changed, by operation (write, delete)",
                &["operation"],
            )?,
            calls: counter(&registry, "kubelane_sync_calls_total", "System calls made to change maps")?,
            failures: counter(
                &registry,
                "kubelane_sync_failures_total",
                "Map entries that the kernel rejected (they are retried)",
            )?,
            services: int_gauge(&registry, "kubelane_services", "Services known")?,
            endpoints: int_gauge(&registry, "kubelane_endpoints", "Endpoints in EndpointSlices, usable or not")?,
            frontends: int_gauge(&registry, "kubelane_frontends", "Frontends programmed")?,
            degraded: int_gauge(
                &registry,
                "kubelane_degraded_services",
                "Services that exceed their quota of the maps, or found no room in them",
            )?,
            warnings: int_gauge(&registry, "kubelane_warnings", "Active warnings about objects")?,
            map_entries: int_gauges(&registry, "kubelane_map_entries", "Entries in use, by map", &["map"])?,
            map_capacity: int_gauges(
                &registry,
                "kubelane_map_capacity",
                "Maximum number of entries, by map",
                &["map"],
            )?,
            flows: int_gauges(
                &registry,
                "kubelane_flows",
                "Flows of translated packets: opening (not confirmed by both ends yet), established, closing",
                &["protocol", "state"],
            )?,
            drift: counters(
                &registry,
                "kubelane_drift_total",
                "Map entries that an audit found different from what was written, and repaired",
                &["map"],
            )?,
            last_audit: gauge(
                &registry,
                "kubelane_last_audit_timestamp_seconds",
                "Unix time of the last complete audit of the maps; 0 before the first",
            )?,
            registry,
        };
        let build =
            int_gauges(&metrics.registry, "kubelane_build_info", "Always 1; the version is a label", &["version"])?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Ok(metrics)
    }

    /// A sync ended.
    pub fn synced(&self, sample: SyncSample) {
        self.kube_proxy.synced(sample.duration, sample.full);
        self.rows.with_label_values(&["write"]).inc_by(sample.rows_written);
        self.rows.with_label_values(&["delete"]).inc_by(sample.rows_deleted);
        self.calls.inc_by(sample.calls);
        self.failures.inc_by(sample.failures);
    }

    /// A sync left nothing waiting.
    pub fn up_to_date(&self, now: SystemTime) {
        self.kube_proxy.up_to_date(now);
    }

    /// A change came.
    pub fn queued(&self, now: SystemTime) {
        self.kube_proxy.queued(now);
    }

    /// A change of endpoints is in the kernel, this long after it was triggered.
    pub fn programmed(&self, family: Family, duration: Duration) {
        self.kube_proxy.programmed(family, duration);
    }

    /// How much came, and how much of it waits.
    pub fn set_changes(&self, services: Changes, endpoints: Changes) {
        self.kube_proxy.set_changes(services, endpoints);
    }

    /// Service ports with a policy of Local and endpoints on other nodes only: IPv4, IPv6.
    pub fn set_no_local(&self, internal: [u64; 2], external: [u64; 2]) {
        self.kube_proxy.set_no_local(internal, external);
    }

    /// What is programmed now.
    pub fn set_totals(&self, totals: Totals) {
        self.services.set(signed(totals.services));
        self.endpoints.set(signed(totals.endpoints));
        self.frontends.set(signed(totals.frontends));
        self.degraded.set(signed(totals.degraded));
    }

    /// How many warnings hold now.
    pub fn set_warnings(&self, count: usize) {
        self.warnings.set(signed(count as u64));
    }

    /// How full a map is, in rows.
    pub fn set_map(&self, map: &str, entries: u64, capacity: u64) {
        self.map_entries.with_label_values(&[map]).set(signed(entries));
        self.map_capacity.with_label_values(&[map]).set(signed(capacity));
    }

    /// How many flows are in a state.
    pub fn set_flows(&self, protocol: &str, state: &str, count: usize) {
        self.flows.with_label_values(&[protocol, state]).set(signed(count as u64));
    }

    /// An audit found rows of a map, as many as this (none, too), that were not what had been written.
    pub fn drifted(&self, map: &str, rows: u64) {
        self.drift.with_label_values(&[map]).inc_by(rows);
    }

    /// All maps have been audited.
    pub fn audited(&self, now: SystemTime) {
        self.last_audit.set(unix_seconds(now));
    }

    pub(super) fn healthz_answered(&self, code: u16) {
        self.kube_proxy.healthz.with_label_values(&[&code.to_string()]).inc();
    }

    pub(super) fn livez_answered(&self, code: u16) {
        self.kube_proxy.livez.with_label_values(&[&code.to_string()]).inc();
    }

    /// A family of counters that `read` reports at each scrape.
    ///
    /// # Errors
    /// When the name is not valid or taken.
    pub fn read_counters(
        &self,
        name: &str,
        help: &str,
        labels: &[&'static str],
        read: impl Fn() -> Vec<Sample> + Send + Sync + 'static,
    ) -> anyhow::Result<()> {
        self.read_at_scrape(name, help, labels, Read::Counters(Box::new(read)))
    }

    /// A family of gauges that `read` reports at each scrape.
    ///
    /// # Errors
    /// When the name is not valid or taken.
    pub fn read_gauges(
        &self,
        name: &str,
        help: &str,
        labels: &[&'static str],
        read: impl Fn() -> Vec<Sample> + Send + Sync + 'static,
    ) -> anyhow::Result<()> {
        self.read_at_scrape(name, help, labels, Read::Gauges(Box::new(read)))
    }

    /// A family of histograms that `read` reports at each scrape.
    ///
    /// # Errors
    /// When the name is not valid or taken.
    pub fn read_histograms(
        &self,
        name: &str,
        help: &str,
        labels: &[&'static str],
        read: impl Fn() -> Vec<(Vec<String>, Durations)> + Send + Sync + 'static,
    ) -> anyhow::Result<()> {
        self.read_at_scrape(name, help, labels, Read::Histograms(Box::new(read)))
    }

    fn read_at_scrape(&self, name: &str, help: &str, labels: &[&'static str], read: Read) -> anyhow::Result<()> {
        let options = Opts::new(name, help);
        let desc = GaugeVec::new(options.clone(), labels)?.desc().into_iter().cloned().collect();
        self.registry.register(Box::new(ReadAtScrape { options, labels: labels.to_vec(), desc, read }))?;
        Ok(())
    }

    /// The text exposition.
    ///
    /// # Errors
    /// When a family cannot be encoded.
    pub fn text(&self) -> anyhow::Result<String> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).context("encoding the metrics")?;
        String::from_utf8(text).context("encoding the metrics")
    }
}

fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
