//! The daemon's metrics: kube-proxy's names where dashboards expect them (`kubeproxy_`), our own beside them
//! (`kubelane_`). What the kernel or another task counts is read when it is scraped.

use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{
    CounterVec, Encoder as _, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder, exponential_buckets,
};

/// What one sync did.
#[derive(Clone, Copy, Debug, Default)]
pub struct SyncSample {
    pub duration: Duration,
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
}

/// One sample of a family that is read when it is scraped: label values, value.
pub type Sample = (Vec<String>, f64);

/// Every metric of the daemon, in a registry of its own.
pub struct Metrics {
    registry: Registry,
    sync_seconds: Histogram,
    last_sync: Gauge,
    last_queued: Gauge,
    rows: IntCounterVec,
    calls: IntCounter,
    failures: IntCounter,
    services: IntGauge,
    endpoints: IntGauge,
    frontends: IntGauge,
    warnings: IntGauge,
    map_entries: IntGaugeVec,
    map_capacity: IntGaugeVec,
    healthz: IntCounterVec,
    livez: IntCounterVec,
}

impl Metrics {
    /// # Errors
    /// When a metric's name is not valid or not unique: a mistake in this file.
    pub fn new() -> anyhow::Result<Self> {
        let registry = Registry::new();
        let metrics = Metrics {
            sync_seconds: kept(&registry, sync_histogram()?)?,
            last_sync: gauge(
                &registry,
                "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
                "Unix time of the last sync after which nothing was waiting",
            )?,
            last_queued: gauge(
                &registry,
                "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
                "Unix time when a change last came",
            )?,
            rows: counters(
                &registry,
                "kubelane_sync_rows_total",
                "Map rows changed, by operation (write, delete)",
                "operation",
            )?,
            calls: counter(&registry, "kubelane_sync_calls_total", "System calls made to change maps")?,
            failures: counter(
                &registry,
                "kubelane_sync_failures_total",
                "Map rows that the kernel did not take (they are tried again)",
            )?,
            services: int_gauge(&registry, "kubelane_services", "Services known")?,
            endpoints: int_gauge(&registry, "kubelane_endpoints", "Backends programmed")?,
            frontends: int_gauge(&registry, "kubelane_frontends", "Frontends programmed")?,
            warnings: int_gauge(&registry, "kubelane_warnings", "Warnings about objects that hold now")?,
            map_entries: int_gauges(&registry, "kubelane_map_entries", "Rows in use, by map", "map")?,
            map_capacity: int_gauges(&registry, "kubelane_map_capacity", "Rows that fit, by map", "map")?,
            healthz: counters(&registry, "kubeproxy_proxy_healthz_total", "Answers of /healthz, by code", "code")?,
            livez: counters(&registry, "kubeproxy_proxy_livez_total", "Answers of /livez, by code", "code")?,
            registry,
        };
        let build =
            int_gauges(&metrics.registry, "kubelane_build_info", "Always 1; the version is a label", "version")?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        Ok(metrics)
    }

    /// A sync ended.
    pub fn synced(&self, sample: SyncSample) {
        self.sync_seconds.observe(sample.duration.as_secs_f64());
        self.rows.with_label_values(&["write"]).inc_by(sample.rows_written);
        self.rows.with_label_values(&["delete"]).inc_by(sample.rows_deleted);
        self.calls.inc_by(sample.calls);
        self.failures.inc_by(sample.failures);
    }

    /// A sync left nothing waiting.
    pub fn up_to_date(&self, now: SystemTime) {
        self.last_sync.set(unix_seconds(now));
    }

    /// A change came.
    pub fn queued(&self, now: SystemTime) {
        self.last_queued.set(unix_seconds(now));
    }

    /// What is programmed now.
    pub fn set_totals(&self, totals: Totals) {
        self.services.set(signed(totals.services));
        self.endpoints.set(signed(totals.endpoints));
        self.frontends.set(signed(totals.frontends));
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

    pub(super) fn healthz_answered(&self, code: u16) {
        self.healthz.with_label_values(&[&code.to_string()]).inc();
    }

    pub(super) fn livez_answered(&self, code: u16) {
        self.livez.with_label_values(&[&code.to_string()]).inc();
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
        self.read_at_scrape(name, help, labels, true, Box::new(read))
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
        self.read_at_scrape(name, help, labels, false, Box::new(read))
    }

    fn read_at_scrape(
        &self,
        name: &str,
        help: &str,
        labels: &[&'static str],
        counts: bool,
        read: Read,
    ) -> anyhow::Result<()> {
        let options = Opts::new(name, help);
        let desc = GaugeVec::new(options.clone(), labels)?.desc().into_iter().cloned().collect();
        self.registry.register(Box::new(ReadAtScrape { options, labels: labels.to_vec(), counts, desc, read }))?;
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

type Read = Box<dyn Fn() -> Vec<Sample> + Send + Sync>;

/// A family whose samples are made anew at each scrape, so that two scrapes at once share nothing.
struct ReadAtScrape {
    options: Opts,
    labels: Vec<&'static str>,
    counts: bool,
    desc: Vec<Desc>,
    read: Read,
}

impl ReadAtScrape {
    fn families(&self) -> prometheus::Result<Vec<MetricFamily>> {
        let samples = (self.read)();
        if self.counts {
            let family = CounterVec::new(self.options.clone(), &self.labels)?;
            for (labels, value) in samples {
                family.get_metric_with_label_values(&labels)?.inc_by(value);
            }
            return Ok(family.collect());
        }
        let family = GaugeVec::new(self.options.clone(), &self.labels)?;
        for (labels, value) in samples {
            family.get_metric_with_label_values(&labels)?.set(value);
        }
        Ok(family.collect())
    }
}

impl Collector for ReadAtScrape {
    fn desc(&self) -> Vec<&Desc> {
        self.desc.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.families().unwrap_or_else(|error| {
            tracing::warn!("metric {}: {error}", self.options.name);
            Vec::new()
        })
    }
}

fn sync_histogram() -> prometheus::Result<Histogram> {
    let options = HistogramOpts::new("kubeproxy_sync_proxy_rules_duration_seconds", "Time that a sync took");
    // 100 us to 13 s: a sync of one change takes a fraction of kube-proxy's lowest bucket, 1 ms.
    Histogram::with_opts(options.buckets(exponential_buckets(0.0001, 2.0, 18)?))
}

fn kept<C: Collector + Clone + 'static>(registry: &Registry, metric: C) -> prometheus::Result<C> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

fn gauge(registry: &Registry, name: &str, help: &str) -> prometheus::Result<Gauge> {
    kept(registry, Gauge::new(name, help)?)
}

fn int_gauge(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntGauge> {
    kept(registry, IntGauge::new(name, help)?)
}

fn int_gauges(registry: &Registry, name: &str, help: &str, label: &str) -> prometheus::Result<IntGaugeVec> {
    kept(registry, IntGaugeVec::new(Opts::new(name, help), &[label])?)
}

fn counter(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntCounter> {
    kept(registry, IntCounter::new(name, help)?)
}

fn counters(registry: &Registry, name: &str, help: &str, label: &str) -> prometheus::Result<IntCounterVec> {
    kept(registry, IntCounterVec::new(Opts::new(name, help), &[label])?)
}

fn unix_seconds(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Sample lines by "name{labels}", checked against the exposition format as they are read.
    fn parse(text: &str) -> BTreeMap<String, f64> {
        let mut typed = Vec::new();
        let mut samples = BTreeMap::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                typed.push(name.to_owned());
            } else if !line.starts_with("# HELP ") {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let name = series.split('{').next().unwrap();
                assert!(typed.iter().any(|t| name.starts_with(t.as_str())), "no TYPE before {line}");
                assert!(samples.insert(series.to_owned(), value.parse().unwrap()).is_none(), "twice: {series}");
            }
        }
        samples
    }

    #[test]
    fn what_was_observed_is_in_the_exposition() {
        let metrics = Metrics::new().unwrap();
        let duration = Duration::from_millis(3);
        metrics.synced(SyncSample { duration, rows_written: 7, rows_deleted: 2, calls: 4, failures: 1 });
        metrics.queued(SystemTime::UNIX_EPOCH + Duration::from_millis(1_500));
        metrics.up_to_date(SystemTime::UNIX_EPOCH + Duration::from_secs(2));
        metrics.set_totals(Totals { services: 3, endpoints: 9, frontends: 5 });
        metrics.set_map("frontends", 5, 1000);
        metrics.healthz_answered(503);
        let samples = parse(&metrics.text().unwrap());
        let version = format!("kubelane_build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"));
        for (series, value) in [
            ("kubeproxy_sync_proxy_rules_duration_seconds_count", 1.0),
            ("kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.0032\"}", 1.0),
            ("kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.0016\"}", 0.0),
            ("kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds", 1.5),
            ("kubeproxy_sync_proxy_rules_last_timestamp_seconds", 2.0),
            ("kubeproxy_proxy_healthz_total{code=\"503\"}", 1.0),
            ("kubelane_sync_rows_total{operation=\"write\"}", 7.0),
            ("kubelane_sync_rows_total{operation=\"delete\"}", 2.0),
            ("kubelane_sync_calls_total", 4.0),
            ("kubelane_sync_failures_total", 1.0),
            ("kubelane_services", 3.0),
            ("kubelane_endpoints", 9.0),
            ("kubelane_frontends", 5.0),
            ("kubelane_map_entries{map=\"frontends\"}", 5.0),
            ("kubelane_map_capacity{map=\"frontends\"}", 1000.0),
            (version.as_str(), 1.0),
        ] {
            assert_eq!(samples.get(series), Some(&value), "{series} in {samples:#?}");
        }
    }

    #[test]
    fn what_others_count_is_read_at_each_scrape() {
        let metrics = Metrics::new().unwrap();
        let scrapes = std::sync::atomic::AtomicU32::new(0);
        let read = move || {
            let n = scrapes.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1;
            vec![(vec!["refused".to_owned()], f64::from(n) * 10.0)]
        };
        metrics.read_counters("kubelane_test_total", "Counts", &["verdict"], read).unwrap();
        metrics.read_gauges("kubelane_test", "Measures", &[], || vec![(vec![], 0.5)]).unwrap();
        parse(&metrics.text().unwrap());
        let samples = parse(&metrics.text().unwrap());
        assert_eq!(samples["kubelane_test_total{verdict=\"refused\"}"], 20.0);
        assert_eq!(samples["kubelane_test"], 0.5);
    }

    #[test]
    fn a_name_is_taken_once() {
        let metrics = Metrics::new().unwrap();
        let error = metrics.read_gauges("kubelane_services", "again", &[], Vec::new).unwrap_err();
        assert!(error.to_string().contains("Duplicate"), "{error}");
    }
}
