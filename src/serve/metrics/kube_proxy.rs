//! The families that kube-proxy 1.36 has, under its names and with its types, labels and buckets, so that dashboards and
//! alerts go on working (kubernetes: pkg/proxy/metrics). kube-proxy is one proxier for each family of addresses; here
//! one sync does both, so that both series of a family say the same.

use std::time::{Duration, SystemTime};

use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Registry,
};

use super::make::{counter, counters, gauges, int_gauge, kept};
use super::{signed, unix_seconds};
use crate::model::Family;

const FAMILIES: [Family; 2] = [Family::Ipv4, Family::Ipv6];

/// As the API spells them.
fn label(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "IPv4",
        Family::Ipv6 => "IPv6",
    }
}

/// Changes of one kind of object.
#[derive(Clone, Copy, Debug, Default)]
pub struct Changes {
    /// Since the daemon started.
    pub total: u64,
    /// Not in the kernel yet.
    pub pending: u64,
}

/// A metric for each family of addresses.
type ByFamily<M> = [M; 2];

pub struct KubeProxy {
    sync_seconds: ByFamily<Histogram>,
    full_sync_seconds: ByFamily<Histogram>,
    partial_sync_seconds: ByFamily<Histogram>,
    programming_seconds: ByFamily<Histogram>,
    last_sync: ByFamily<Gauge>,
    last_queued: ByFamily<Gauge>,
    endpoint_changes: (IntCounter, IntGauge),
    service_changes: (IntCounter, IntGauge),
    no_local_endpoints: GaugeVec,
    pub healthz: IntCounterVec,
    pub livez: IntCounterVec,
}

impl KubeProxy {
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let syncs = |name: &str, help: &str| histogram(registry, name, help, sync_buckets());
        let seconds = "Unix time of the last sync that left nothing pending";
        let queued = "Unix time at which a change was last received";
        let changes = |kind: &str, what: &str| -> prometheus::Result<(IntCounter, IntGauge)> {
            let name = |end: &str| format!("kubeproxy_sync_proxy_rules_{kind}_changes_{end}");
            let total = counter(registry, &name("total"), &format!("{what} added, changed or deleted"))?;
            let pending = int_gauge(registry, &name("pending"), &format!("Changes of {what} not in the kernel yet"))?;
            Ok((total, pending))
        };
        Ok(KubeProxy {
            sync_seconds: syncs("kubeproxy_sync_proxy_rules_duration_seconds", "Duration of a sync")?,
            full_sync_seconds: syncs(
                "kubeproxy_sync_full_proxy_rules_duration_seconds",
                "Duration of a sync of all Services: the first one, and those after a change of the node's zone",
            )?,
            partial_sync_seconds: syncs(
                "kubeproxy_sync_partial_proxy_rules_duration_seconds",
                "Duration of a sync of the Services that changed",
            )?,
            programming_seconds: histogram(
                registry,
                "kubeproxy_network_programming_duration_seconds",
                "Time from a change of endpoints, according to their slice's annotation, until it was in the kernel",
                programming_buckets(),
            )?,
            last_sync: by_family(registry, "kubeproxy_sync_proxy_rules_last_timestamp_seconds", seconds)?,
            last_queued: by_family(registry, "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds", queued)?,
            endpoint_changes: changes("endpoint", "EndpointSlices")?,
            service_changes: changes("service", "Services")?,
            no_local_endpoints: gauges(
                registry,
                "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
                "Service ports with traffic policy Local (internal or external) whose endpoints are all on other nodes",
                &["ip_family", "traffic_policy"],
            )?,
            healthz: counters(registry, "kubeproxy_proxy_healthz_total", "Responses of /healthz, by code", &["code"])?,
            livez: counters(registry, "kubeproxy_proxy_livez_total", "Responses of /livez, by code", &["code"])?,
        })
    }

    pub fn synced(&self, duration: Duration, full: bool) {
        let by_extent = if full { &self.full_sync_seconds } else { &self.partial_sync_seconds };
        for histogram in self.sync_seconds.iter().chain(by_extent) {
            histogram.observe(duration.as_secs_f64());
        }
    }

    pub fn programmed(&self, family: Family, duration: Duration) {
        self.programming_seconds[usize::from(family == Family::Ipv6)].observe(duration.as_secs_f64());
    }

    pub fn up_to_date(&self, now: SystemTime) {
        self.last_sync.iter().for_each(|gauge| gauge.set(unix_seconds(now)));
    }

    pub fn queued(&self, now: SystemTime) {
        self.last_queued.iter().for_each(|gauge| gauge.set(unix_seconds(now)));
    }

    pub fn set_changes(&self, services: Changes, endpoints: Changes) {
        for ((total, pending), changes) in [(&self.service_changes, services), (&self.endpoint_changes, endpoints)] {
            total.inc_by(changes.total.saturating_sub(total.get()));
            pending.set(signed(changes.pending));
        }
    }

    /// IPv4, IPv6.
    pub fn set_no_local(&self, internal: [u64; 2], external: [u64; 2]) {
        for (policy, counts) in [("internal", internal), ("external", external)] {
            for (family, count) in FAMILIES.into_iter().zip(counts) {
                self.no_local_endpoints.with_label_values(&[label(family), policy]).set(count as f64);
            }
        }
    }
}

fn by_family(registry: &Registry, name: &str, help: &str) -> prometheus::Result<ByFamily<Gauge>> {
    let family = gauges(registry, name, help, &["ip_family"])?;
    Ok(FAMILIES.map(|of| family.with_label_values(&[label(of)])))
}

fn histogram(
    registry: &Registry,
    name: &str,
    help: &str,
    buckets: Vec<f64>,
) -> prometheus::Result<ByFamily<Histogram>> {
    let options = HistogramOpts::new(name, help).buckets(buckets);
    let family = kept(registry, HistogramVec::new(options, &["ip_family"])?)?;
    Ok(FAMILIES.map(|of| family.with_label_values(&[label(of)])))
}

/// kube-proxy's, 1 ms to 16 s, and three below them: a sync of one change takes a fraction of the lowest.
fn sync_buckets() -> Vec<f64> {
    let below = [0.000_125, 0.000_25, 0.000_5];
    below.into_iter().chain((0..15).map(|n| 0.001 * f64::from(1u32 << n))).collect()
}

/// kube-proxy's: the annotation that they are measured from is precise to the second.
fn programming_buckets() -> Vec<f64> {
    let steps = |first: u32, step: usize, last: u32| (first..=last).step_by(step).map(f64::from);
    [0.0, 0.25, 0.5].into_iter().chain(steps(1, 1, 59)).chain(steps(60, 5, 115)).chain(steps(120, 30, 300)).collect()
}
