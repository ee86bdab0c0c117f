//! Connections, refusals, drops and traffic of the busiest Services, for the metrics: asked of the kernel now and then, never
//! by who scrapes.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use tokio::time::{MissedTickBehavior, interval};

use super::outside::ByService;
use crate::bpf::{ServiceCount, ServiceCounts, Traffic};
use crate::serve::{Durations, Metrics};

const EVERY: Duration = Duration::from_secs(5);
/// From clients to backends, and from backends to clients.
const DIRECTIONS: [&str; 2] = ["request", "reply"];

/// What is exposed until the next look.
#[derive(Clone, Default)]
struct Latest(Arc<Mutex<Vec<ServiceCount>>>);

impl Latest {
    /// `labelled` for all: label values behind those of the Service port, and a value.
    fn read<T, S>(
        &self,
        samples: impl Fn(&ServiceCount) -> S + Send + Sync + 'static,
    ) -> impl Fn() -> Vec<(Vec<String>, T)> + Send + Sync + 'static
    where
        S: IntoIterator<Item = (Vec<&'static str>, T)>,
    {
        let latest = self.clone();
        move || {
            let busiest = latest.0.lock().unwrap_or_else(PoisonError::into_inner);
            let of_one = |count: &ServiceCount| -> Vec<(Vec<String>, T)> {
                let named = |(more, value): (Vec<&'static str>, T)| {
                    let mut labels = labels(count.name.as_str());
                    labels.extend(more.into_iter().map(str::to_owned));
                    (labels, value)
                };
                samples(count).into_iter().map(named).collect()
            };
            busiest.iter().flat_map(of_one).collect()
        }
    }

    fn set(&self, busiest: Vec<ServiceCount>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = busiest;
    }
}

/// Runs for ever, and exposes `most` Services at most; counts that cannot be read are told of when the reason is new.
///
/// # Errors
/// When the metric's name is taken, or a look breaks off.
pub async fn watch(counts: ServiceCounts, most: usize, metrics: Arc<Metrics>, flows: ByService) -> anyhow::Result<()> {
    let latest = Latest::default();
    expose(&latest, &metrics, flows)?;
    if counts.has_traffic() {
        expose_traffic(&latest, &metrics)?;
    }
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
                latest.set(busiest);
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

fn expose(latest: &Latest, metrics: &Metrics, flows: ByService) -> anyhow::Result<()> {
    metrics.read_counters(
        "kubelane_service_connections_total",
        "Connections, first datagrams and flows of the busiest Service ports",
        &["namespace", "service", "port"],
        latest.read(|count| [(Vec::new(), count.connections as f64)]),
    )?;
    metrics.read_counters(
        "kubelane_service_verdicts_total",
        "Refusals and drops of what asked for the same Service ports, by verdict",
        &["namespace", "service", "port", "verdict"],
        latest.read(|count| count.verdicts().map(|(verdict, times)| (vec![verdict], times as f64)).collect::<Vec<_>>()),
    )?;
    metrics.read_gauges(
        "kubelane_service_flows",
        "Flows of packets from outside of the same Service ports, by state; counted once a minute",
        &["namespace", "service", "port", "state"],
        latest.read(move |count| flows.of(&count.name).map(|(state, number)| (vec![state], number as f64))),
    )
}

fn expose_traffic(latest: &Latest, metrics: &Metrics) -> anyhow::Result<()> {
    metrics.read_counters(
        "kubelane_service_packets_total",
        "Translated packets of the same Service ports, by direction (request, reply)",
        &["namespace", "service", "port", "direction"],
        latest.read(|count| {
            let packets = count.traffic.map(|traffic| traffic.packets()).unwrap_or_default();
            DIRECTIONS.into_iter().zip(packets).map(|(direction, n)| (vec![direction], n as f64)).collect::<Vec<_>>()
        }),
    )?;
    metrics.read_counters(
        "kubelane_service_bytes_total",
        "Bytes of translated packets, and of translated TCP sockets that have closed, of the same Service ports",
        &["namespace", "service", "port", "path", "direction"],
        latest.read(|count| {
            let of = |path: &'static str, bytes: fn(&Traffic) -> [u64; 2]| {
                let bytes = count.traffic.as_ref().map(bytes).unwrap_or_default();
                DIRECTIONS.into_iter().zip(bytes).map(move |(direction, n)| (vec![path, direction], n as f64))
            };
            of("packets", Traffic::packet_bytes).chain(of("sockets", Traffic::socket_bytes)).collect::<Vec<_>>()
        }),
    )?;
    metrics.read_histograms(
        "kubelane_service_connect_duration_seconds",
        "How long translated TCP sockets took to connect, of the same Service ports",
        &["namespace", "service", "port"],
        latest.read(|count| {
            let durations =
                |traffic: Traffic| Durations { buckets: traffic.connects().collect(), sum: traffic.connect_seconds() };
            count.traffic.map(|traffic| (Vec::new(), durations(traffic)))
        }),
    )?;
    metrics.read_counters(
        "kubelane_service_connect_failures_total",
        "Translated TCP sockets that closed before they were connected, of the same Service ports",
        &["namespace", "service", "port"],
        latest.read(|count| count.traffic.map(|traffic| (Vec::new(), traffic.connects_failed() as f64))),
    )
}

/// Of "namespace/name:port", or "namespace/name" for a port without a name.
fn labels(name: &str) -> Vec<String> {
    let (namespace, rest) = name.split_once('/').unwrap_or(("", name));
    let (service, port) = rest.split_once(':').unwrap_or((rest, ""));
    [namespace, service, port].map(str::to_owned).into()
}
