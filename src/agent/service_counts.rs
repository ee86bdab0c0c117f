//! Connections, refusals and drops of the busiest Services, for the metrics: asked of the kernel now and then, never by who scrapes.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use tokio::time::{MissedTickBehavior, interval};

use super::outside::ByService;
use crate::abi::ServiceName;
use crate::bpf::{ServiceCount, ServiceCounts};
use crate::serve::{Metrics, Sample};

const EVERY: Duration = Duration::from_secs(5);

/// What is exposed until the next look.
type Latest = Arc<Mutex<Vec<ServiceCount>>>;

/// Runs for ever, and exposes `most` Services at most; counts that cannot be read are told of when the reason is new.
///
/// # Errors
/// When the metric's name is taken, or a look breaks off.
pub async fn watch(counts: ServiceCounts, most: usize, metrics: Arc<Metrics>, flows: ByService) -> anyhow::Result<()> {
    let latest = Latest::default();
    let read = Arc::clone(&latest);
    metrics.read_counters(
        "kubelane_service_connections_total",
        "Connections, first datagrams and flows of the busiest Service ports",
        &["namespace", "service", "port"],
        move || {
            let busiest = read.lock().unwrap_or_else(PoisonError::into_inner);
            busiest.iter().map(|count| (labels(count.name.as_str()), count.connections as f64)).collect()
        },
    )?;
    let read = Arc::clone(&latest);
    metrics.read_counters(
        "kubelane_service_verdicts_total",
        "Refusals and drops of what asked for the same Service ports, by verdict",
        &["namespace", "service", "port", "verdict"],
        move || {
            let busiest = read.lock().unwrap_or_else(PoisonError::into_inner);
            busiest.iter().flat_map(verdict_samples).collect()
        },
    )?;
    let read = Arc::clone(&latest);
    metrics.read_gauges(
        "kubelane_service_flows",
        "Flows of packets from outside of the same Service ports, by state; counted once a minute",
        &["namespace", "service", "port", "state"],
        move || {
            let busiest = read.lock().unwrap_or_else(PoisonError::into_inner);
            busiest.iter().flat_map(|count| flow_samples(&count.name, &flows)).collect()
        },
    )?;
    let counts = Arc::new(counts);
    let mut told = None;
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let look = Arc::clone(&counts);
        let busiest = tokio::task::spawn_blocking(move || look.busiest(most)).await;
        match busiest.context("counting by Service broke off")? {
            Ok(busiest) => {
                *latest.lock().unwrap_or_else(PoisonError::into_inner) = busiest;
                told = None;
            }
            Err(error) => {
                let error = format!("{error:#}");
                if told.as_ref() != Some(&error) {
                    tracing::warn!("{error}; trying again");
                    told = Some(error);
                }
            }
        }
    }
}

fn verdict_samples(count: &ServiceCount) -> Vec<Sample> {
    let sample = |(verdict, times): (&str, u64)| {
        let mut labels = labels(count.name.as_str());
        labels.push(verdict.to_owned());
        (labels, times as f64)
    };
    count.verdicts().map(sample).collect()
}

fn flow_samples(name: &ServiceName, flows: &ByService) -> [Sample; 3] {
    flows.of(name).map(|(state, count)| {
        let mut labels = labels(name.as_str());
        labels.push(state.to_owned());
        (labels, count as f64)
    })
}

/// Of "namespace/name:port", or "namespace/name" for a port without a name.
fn labels(name: &str) -> Vec<String> {
    let (namespace, rest) = name.split_once('/').unwrap_or(("", name));
    let (service, port) = rest.split_once(':').unwrap_or((rest, ""));
    [namespace, service, port].map(str::to_owned).into()
}
