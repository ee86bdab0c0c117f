//! What the daemon measures, out of the text of /metrics.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::exposition::{Sample, samples};
use crate::table::HashMap;

const FAMILIES: [&str; 19] = [
    "kubelane_build_info",
    "kubelane_services",
    "kubelane_degraded_services",
    "kubelane_warnings",
    "kubelane_unserved",
    "kubelane_map_entries",
    "kubelane_map_capacity",
    "kubelane_flows",
    "kubelane_source_connected",
    "kubelane_source_last_event_timestamp_seconds",
    "kubelane_source_errors_total",
    "kubelane_service_connections_total",
    "kubelane_service_bytes_total",
    "kubelane_service_connect_duration_seconds_sum",
    "kubelane_service_connect_duration_seconds_count",
    "kubelane_service_connect_failures_total",
    "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
    "kubeproxy_sync_proxy_rules_service_changes_pending",
    "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
];

/// The daemon, its maps, flows and watches.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Measures {
    pub release: String,
    pub services: u64,
    pub degraded: u64,
    pub warnings: u64,
    /// Reasons why something is not served on this node, as `kubelane_unserved` has them.
    pub unserved: Vec<String>,
    /// Since a sync left nothing waiting. `None`: none has yet.
    pub last_sync_seconds: Option<u64>,
    /// Changes that are not in the kernel yet.
    pub pending: u64,
    /// The fullest first.
    pub maps: Vec<MapFill>,
    /// Those that there are.
    pub flows: Vec<Flows>,
    pub watches: Vec<Watch>,
    /// By "namespace/name:port". `None`: the daemon does not count them.
    #[serde(skip)]
    pub connections: Option<HashMap<String, f64>>,
    /// The same.
    #[serde(skip)]
    pub traffic: Option<HashMap<String, PortTraffic>>,
}

/// What the clients and backends of a Service port have sent each other, since the daemon started.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PortTraffic {
    /// In both directions.
    pub bytes: f64,
    /// Sockets that were connected.
    pub connects: f64,
    /// And how long that took, together.
    pub connect_seconds: f64,
    /// Sockets that never were.
    pub connects_failed: f64,
}

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MapFill {
    pub name: String,
    pub entries: u64,
    pub capacity: u64,
}

impl MapFill {
    /// 1 is full.
    pub fn share(&self) -> f64 {
        self.entries as f64 / self.capacity.max(1) as f64
    }
}

/// How many flows of packets are in a state.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Flows {
    pub protocol: String,
    pub state: String,
    pub count: u64,
}

/// One watch of the source.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Watch {
    pub kind: String,
    pub is_connected: bool,
    /// Since the last event or list. `None`: there was none.
    pub event_seconds: Option<u64>,
    pub errors: u64,
}

impl Measures {
    /// `now`: of the clock that the text has its times from.
    pub fn read(text: &str, now: SystemTime) -> Measures {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let age = |at: f64| (at > 0.0).then(|| (now - at).max(0.0) as u64);
        let mut measures = Measures::default();
        for sample in samples(text, &FAMILIES) {
            let (value, count) = (sample.value, sample.value as u64);
            match sample.name {
                "kubelane_build_info" => measures.release = sample.label("version").to_owned(),
                "kubelane_services" => measures.services = count,
                "kubelane_degraded_services" => measures.degraded = count,
                "kubelane_warnings" => measures.warnings = count,
                "kubelane_unserved" if count > 0 => measures.unserved.push(sample.label("reason").to_owned()),
                "kubelane_map_entries" => measures.map(sample.label("map")).entries = count,
                "kubelane_map_capacity" => measures.map(sample.label("map")).capacity = count,
                "kubelane_flows" if count > 0 => {
                    let (protocol, state) = (sample.label("protocol").to_owned(), sample.label("state").to_owned());
                    measures.flows.push(Flows { protocol, state, count });
                }
                "kubelane_source_connected" => measures.watch(sample.label("kind")).is_connected = count > 0,
                "kubelane_source_last_event_timestamp_seconds" => {
                    measures.watch(sample.label("kind")).event_seconds = age(value);
                }
                "kubelane_source_errors_total" => measures.watch(sample.label("kind")).errors = count,
                "kubelane_service_connections_total" => {
                    measures.connections.get_or_insert_default().insert(port_of(&sample), value);
                }
                "kubelane_service_bytes_total" => measures.port(&sample).bytes += value,
                "kubelane_service_connect_duration_seconds_sum" => measures.port(&sample).connect_seconds = value,
                "kubelane_service_connect_duration_seconds_count" => measures.port(&sample).connects = value,
                "kubelane_service_connect_failures_total" => measures.port(&sample).connects_failed = value,
                "kubeproxy_sync_proxy_rules_last_timestamp_seconds" => measures.last_sync_seconds = age(value),
                "kubeproxy_sync_proxy_rules_service_changes_pending"
                | "kubeproxy_sync_proxy_rules_endpoint_changes_pending" => measures.pending += count,
                _ => {}
            }
        }
        measures.maps.retain(|map| map.capacity > 0);
        measures.maps.sort_by(|a, b| b.share().total_cmp(&a.share()).then_with(|| a.name.cmp(&b.name)));
        measures
    }

    fn port(&mut self, sample: &Sample) -> &mut PortTraffic {
        self.traffic.get_or_insert_default().entry(port_of(sample)).or_default()
    }

    fn map(&mut self, name: &str) -> &mut MapFill {
        let at = self.maps.iter().position(|map| map.name == name).unwrap_or_else(|| {
            self.maps.push(MapFill { name: name.to_owned(), entries: 0, capacity: 0 });
            self.maps.len() - 1
        });
        &mut self.maps[at]
    }

    fn watch(&mut self, kind: &str) -> &mut Watch {
        let at = self.watches.iter().position(|watch| watch.kind == kind).unwrap_or_else(|| {
            self.watches.push(Watch { kind: kind.to_owned(), ..Watch::default() });
            self.watches.len() - 1
        });
        &mut self.watches[at]
    }
}

fn port_of(sample: &Sample) -> String {
    full_name((sample.label("namespace"), sample.label("service"), sample.label("port")))
}

/// Of a namespace, a Service and a port.
pub fn full_name((namespace, name, port): (&str, &str, &str)) -> String {
    if port.is_empty() { format!("{namespace}/{name}") } else { format!("{namespace}/{name}:{port}") }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::serve::Metrics;

    #[test]
    fn the_daemons_own_text_is_understood() {
        let metrics = Metrics::new().unwrap();
        let now = UNIX_EPOCH + Duration::from_secs(1000);
        assert_eq!(Measures::read(&metrics.text().unwrap(), now).last_sync_seconds, None);
        metrics.up_to_date(now - Duration::from_secs(7));
        metrics.set_warnings(3);
        metrics.set_map("frontends", 10, 100);
        metrics.set_map("backends", 90, 100);
        metrics.set_flows("TCP", "established", 12);
        metrics.set_flows("UDP", "opening", 0);
        let labels = ["namespace", "service", "port"];
        let counts = || vec![(vec!["shop".to_owned(), "web".to_owned(), String::new()], 5.0)];
        metrics.read_counters("kubelane_service_connections_total", "x", &labels, counts).unwrap();
        let watch = |value: f64| move || vec![(vec!["services".to_owned()], value)];
        metrics.read_gauges("kubelane_source_connected", "x", &["kind"], watch(1.0)).unwrap();
        let last = "kubelane_source_last_event_timestamp_seconds";
        metrics.read_gauges(last, "x", &["kind"], watch(990.0)).unwrap();
        let measures = Measures::read(&metrics.text().unwrap(), now);
        assert_eq!((measures.last_sync_seconds, measures.warnings), (Some(7), 3));
        assert_eq!(measures.release, env!("CARGO_PKG_VERSION"));
        let maps: Vec<(&str, f64)> = measures.maps.iter().map(|map| (map.name.as_str(), map.share())).collect();
        assert_eq!(maps, [("backends", 0.9), ("frontends", 0.1)]);
        let flows = Flows { protocol: "TCP".into(), state: "established".into(), count: 12 };
        assert_eq!(measures.flows, [flows]);
        let watch = Watch { kind: "services".into(), is_connected: true, event_seconds: Some(10), errors: 0 };
        assert_eq!(measures.watches, [watch]);
        assert_eq!(measures.connections.unwrap().into_iter().collect::<Vec<_>>(), [("shop/web".to_owned(), 5.0)]);
    }
}
