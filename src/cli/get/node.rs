//! `get node`: how kubelane is on this node, in one row.

use std::net::IpAddr;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::printer::Heads;
use super::record::{Record, or_dash, written};
use crate::abi::ServiceName;
use crate::bpf::{self, Maps};
use crate::cli::snapshot::{self, PortName};
use crate::cli::{host, status};
use crate::explain::{About, ask};
use crate::sync::MapName;

pub const HEADS: Heads = Heads {
    all: &[
        "NODE",
        "VERSION",
        "DAEMON",
        "LAST-SYNC",
        "SERVICES",
        "MAPS",
        "REFUSED",
        "DROPPED",
        "WARNINGS",
        "NOT-SERVED",
    ],
    narrow: 9,
};

/// This node.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeRecord {
    /// As the daemon knows it; without one the host's name.
    pub node: String,
    /// The daemon's.
    pub version: Option<String>,
    /// running, starting, behind (something waits to be written), none, or unknown (it cannot be asked).
    pub daemon: &'static str,
    /// Seconds since a sync left nothing waiting.
    pub last_sync_seconds: Option<u64>,
    pub services: usize,
    pub map_bytes: u64,
    /// Connections and packets since the maps were made.
    pub refused: u64,
    pub dropped: u64,
    /// That hold of objects now.
    pub warnings: Option<usize>,
    /// What is not served, as `/readyz` has it.
    pub not_served: Option<String>,
}

impl Record for NodeRecord {
    fn cells(&self) -> Vec<String> {
        vec![
            self.node.clone(),
            or_dash(self.version.as_deref().unwrap_or_default()),
            self.daemon.to_owned(),
            self.last_sync_seconds.map_or_else(|| "-".to_owned(), |seconds| format!("{seconds}s")),
            self.services.to_string(),
            format!("{:.1}MiB", self.map_bytes as f64 / status::MIB),
            self.refused.to_string(),
            self.dropped.to_string(),
            self.warnings.map_or_else(|| "-".to_owned(), |count| count.to_string()),
            or_dash(self.not_served.as_deref().unwrap_or_default()),
        ]
    }

    fn name(&self) -> String {
        format!("node/{}", self.node)
    }

    fn service(&self) -> Option<&PortName> {
        None
    }

    fn addresses(&self) -> Vec<IpAddr> {
        Vec::new()
    }

    fn state(&self) -> String {
        self.daemon.to_owned()
    }

    written!();
}

/// # Errors
/// When nothing is pinned there, or the maps cannot be read.
pub fn node(pin_path: &Path) -> Result<NodeRecord> {
    let mut maps = Maps::open(pin_path)?;
    let names: Vec<(u32, ServiceName)> = snapshot::rows(&mut maps, MapName::Services)?;
    let counters = maps.read_counters()?;
    let sum = |kind: &str| counters.iter().filter(|(label, _)| label.starts_with(kind)).map(|(_, count)| count).sum();
    let answer = ask(pin_path, About::Daemon);
    let known = answer.as_ref().ok().and_then(Option::as_ref);
    let daemon = match (&answer, known.map(|answer| &answer.daemon)) {
        (Err(_), _) => "unknown",
        (_, None) => "none",
        (_, Some(daemon)) if !daemon.is_ready => "starting",
        (_, Some(daemon)) if daemon.waits => "behind",
        _ => "running",
    };
    Ok(NodeRecord {
        node: known.map_or_else(|| host::node_name(None), |answer| Ok(answer.daemon.node.clone()))?,
        version: known.map(|answer| answer.release.clone()),
        daemon,
        last_sync_seconds: known.and_then(|answer| answer.daemon.last_sync_seconds),
        services: status::count_services(names.iter().map(|(_, name)| name.as_str())),
        map_bytes: bpf::map_memory(pin_path)?.iter().map(|map| map.bytes).sum(),
        refused: sum("refused_"),
        dropped: sum("dropped_"),
        warnings: known.map(|answer| answer.warnings.len()),
        not_served: known.and_then(|answer| answer.daemon.unserved.clone()),
    })
}
