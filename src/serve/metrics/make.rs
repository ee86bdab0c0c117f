//! Making families and keeping them in a registry.

use prometheus::core::Collector;
use prometheus::{Gauge, GaugeVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

pub fn kept<C: Collector + Clone + 'static>(registry: &Registry, metric: C) -> prometheus::Result<C> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

pub fn gauge(registry: &Registry, name: &str, help: &str) -> prometheus::Result<Gauge> {
    kept(registry, Gauge::new(name, help)?)
}

pub fn gauges(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<GaugeVec> {
    kept(registry, GaugeVec::new(Opts::new(name, help), labels)?)
}

pub fn int_gauge(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntGauge> {
    kept(registry, IntGauge::new(name, help)?)
}

pub fn int_gauges(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntGaugeVec> {
    kept(registry, IntGaugeVec::new(Opts::new(name, help), labels)?)
}

pub fn counter(registry: &Registry, name: &str, help: &str) -> prometheus::Result<IntCounter> {
    kept(registry, IntCounter::new(name, help)?)
}

pub fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
    kept(registry, IntCounterVec::new(Opts::new(name, help), labels)?)
}
