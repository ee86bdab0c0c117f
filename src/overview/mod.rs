//! What `kubelane top` and the page on the metrics port show: Service ports with their connections, what is refused and
//! dropped, and how the daemon, its maps and its watches are. It is read from the maps, as `kubelane get` does, and from the
//! text of /metrics; nothing is counted for it, and nothing is read while nobody looks.

mod exposition;
mod measures;
mod open;
mod pace;
mod rates;
mod services;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use anyhow::Result;
use serde::Serialize;

use crate::abi::counter;
use crate::bpf::Maps;
use crate::table::HashMap;
pub use measures::{Flows, MapFill, Measures, PortTraffic, Watch};
pub use open::Open;
use pace::Paced;
use rates::{Rates, ServiceRates};
pub use services::ServicePort;

/// Looks at the maps, and remembers what rates need.
#[derive(Debug)]
pub struct Reader {
    pin_path: PathBuf,
    services: Paced<Vec<ServicePort>>,
    open: Paced<Open>,
    verdicts: Rates,
    connections: ServiceRates,
    bytes: ServiceRates,
}

/// One look.
#[derive(Clone, Debug, Default)]
pub struct Overview {
    services: Arc<Vec<ServicePort>>,
    pub open: Arc<Open>,
    /// New connections in a second, by "namespace/name:port". `None`: the daemon does not count them.
    connections: Option<HashMap<String, f64>>,
    /// Bytes in a second, likewise.
    bytes: Option<HashMap<String, f64>>,
    pub verdicts: Vec<Verdict>,
    /// `None`: no daemon answers.
    pub measures: Option<Measures>,
}

/// A counter of what the datapath refused, dropped, or could not do.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Verdict {
    pub name: &'static str,
    pub meaning: &'static str,
    /// Since the maps were made.
    pub total: u64,
    /// In a second. `None`: not known yet.
    pub rate: Option<f64>,
}

impl Reader {
    pub fn new(pin_path: &Path) -> Reader {
        Reader {
            pin_path: pin_path.to_owned(),
            services: Paced::default(),
            open: Paced::default(),
            verdicts: Rates::default(),
            connections: ServiceRates::default(),
            bytes: ServiceRates::default(),
        }
    }

    /// Looks once. `metrics`: the text of /metrics; `None`: no daemon answers. Maps are opened anew, because a cleanup and
    /// another daemon may have come between two looks.
    ///
    /// # Errors
    /// When nothing of this version is pinned there, or the maps cannot be read.
    pub fn look(&mut self, metrics: Option<&str>) -> Result<Overview> {
        let now = Instant::now();
        let mut maps = Maps::open(&self.pin_path)?;
        let counters = maps.read_counters()?;
        let services = self.services.get(now, || services::service_ports(&mut maps))?;
        let open = self.open.get(now, || Open::read(&self.pin_path))?;
        let totals: Vec<u64> = counters.iter().map(|(_, total)| *total).collect();
        let rates = self.verdicts.note(&totals, now);
        let all = counter::NAMES.iter().zip(totals).zip(rates);
        let verdict = |(((name, meaning), total), rate): ((&(&'static str, &'static str), u64), Option<f64>)| Verdict {
            name,
            meaning,
            total,
            rate,
        };
        let measures = metrics.map(|text| Measures::read(text, SystemTime::now()));
        let counted = measures.as_ref().and_then(|measures| measures.connections.clone());
        let traffic = measures.as_ref().and_then(|measures| measures.traffic.as_ref());
        let bytes = |traffic: &HashMap<String, PortTraffic>| -> HashMap<String, f64> {
            traffic.iter().map(|(name, traffic)| (name.clone(), traffic.bytes)).collect()
        };
        Ok(Overview {
            services,
            open,
            connections: counted.map(|counts| self.connections.note(counts, now).clone()),
            bytes: traffic.map(|traffic| self.bytes.note(bytes(traffic), now).clone()),
            verdicts: all.map(verdict).filter(|verdict| is_shown(verdict.name)).collect(),
            measures,
        })
    }
}

/// Whether somebody did not get what they asked for.
fn is_shown(counter: &str) -> bool {
    ["refused_", "dropped_", "failed_"].iter().any(|start| counter.starts_with(start))
}

/// By what Service ports are ordered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    #[default]
    Name,
    /// The most new connections first.
    New,
    /// The most open connections first.
    Open,
}

/// A Service port as it is shown.
#[derive(Clone, Debug)]
pub struct Row<'a> {
    pub port: &'a ServicePort,
    /// New connections in a second. `None`: not counted, or not among the busiest.
    pub rate: Option<f64>,
    /// Bytes in a second, likewise.
    pub bytes: Option<f64>,
    pub open: Option<u64>,
}

impl Overview {
    /// The Service ports in which every word of `search` is found.
    pub fn rows(&self, search: &str, order: Order) -> Vec<Row<'_>> {
        let search = search.to_lowercase();
        let words: Vec<&str> = search.split_whitespace().collect();
        let found = self.services.iter().filter(|port| words.iter().all(|word| port.searched.contains(word)));
        let of = |rates: &Option<HashMap<String, f64>>, port: &ServicePort| -> Option<f64> {
            rates.as_ref()?.get(&port.full_name).copied()
        };
        let row = |port| Row {
            port,
            rate: of(&self.connections, port),
            bytes: of(&self.bytes, port),
            open: self.open.of_port(port.id),
        };
        let mut rows: Vec<Row> = found.map(row).collect();
        // Stable: those that are alike stay in the order of their names.
        match order {
            Order::Name => {}
            Order::New => rows.sort_by(|a, b| b.rate.unwrap_or(-1.0).total_cmp(&a.rate.unwrap_or(-1.0))),
            Order::Open => rows.sort_by_key(|row| std::cmp::Reverse(row.open)),
        }
        rows
    }

    /// How many Service ports there are.
    pub fn count(&self) -> usize {
        self.services.len()
    }

    pub fn counts_connections(&self) -> bool {
        self.connections.is_some()
    }

    pub fn counts_traffic(&self) -> bool {
        self.bytes.is_some()
    }
}

#[cfg(test)]
mod tests;
