//! Connections of the busiest Services, for the metrics: asked of the kernel now and then, never by who scrapes.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use tokio::time::{MissedTickBehavior, interval};

use super::outside::ByService;
use crate::abi::ServiceName;
use crate::bpf::ServiceConnections;
use crate::serve::{Metrics, Sample};

const EVERY: Duration = Duration::from_secs(5);

/// What is exposed until the next look.
type Latest = Arc<Mutex<Vec<(ServiceName, u64)>>>;

/// Runs for ever, and exposes `most` Services at most; counts that cannot be read are told of when the reason is new.
///
/// # Errors
/// When the metric's name is taken, or a look breaks off.
pub async fn watch(
    connections: ServiceConnections,
    most: usize,
    metrics: Arc<Metrics>,
    flows: ByService,
) -> anyhow::Result<()> {
    let latest = Latest::default();
    let read = Arc::clone(&latest);
    metrics.read_counters(
        "kubelane_service_connections_total",
        "Connections, first datagrams and flows of the busiest Service ports",
        &["namespace", "service", "port"],
        move || {
            let busiest = read.lock().unwrap_or_else(PoisonError::into_inner);
            busiest.iter().map(|(name, count)| (labels(name.as_str()), *count as f64)).collect()
        },
    )?;
    let read = Arc::clone(&latest);
    metrics.read_gauges(
        "kubelane_service_flows",
        "Flows of packets from outside of the same Service ports, by state; counted once a minute",
        &["namespace", "service", "port", "state"],
        move || {
            let busiest = read.lock().unwrap_or_else(PoisonError::into_inner);
            busiest.iter().flat_map(|(name, _)| flow_samples(name, &flows)).collect()
        },
    )?;
    let connections = Arc::new(connections);
    let mut told = None;
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let look = Arc::clone(&connections);
        let busiest = tokio::task::spawn_blocking(move || look.busiest(most)).await;
        match busiest.context("counting connections broke off")? {
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
