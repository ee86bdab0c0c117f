//! `get affinities`: which backend each client of a Service with session affinity had.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::printer::Heads;
use super::record::{Record, or_dash, written};
use crate::abi::client_kind::CLIENT_ADDRESS;
use crate::abi::{Affinity, AffinityKey, Backend, Frontend, FrontendKey, ServiceName, backend_state};
use crate::bpf::PinnedMap;
use crate::cli::snapshot::{PortName, port_name, protocol_name};
use crate::model::Ipx;

pub const HEADS: Heads = Heads {
    all: &["NAMESPACE", "NAME", "PORT", "PROTOCOL", "CLIENT", "BACKEND", "STATE", "LEFT", "PROVED"],
    narrow: 8,
};

/// One client of one Service port.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AffinityRecord {
    #[serde(flatten)]
    pub service: PortName,
    pub protocol: String,
    /// An address, or of a client on this node the cookie of its network namespace: "netns:4711".
    pub client: String,
    pub backend: SocketAddr,
    /// holds, expired, or gone: the backend, or the Service's affinity.
    pub state: &'static str,
    /// Until it is forgotten if it is not used.
    pub left_seconds: u64,
    /// A client outside has answered. Those on this node are always there.
    pub is_proved: bool,
    #[serde(skip)]
    client_ip: Option<IpAddr>,
}

impl Record for AffinityRecord {
    fn cells(&self) -> Vec<String> {
        vec![
            self.service.namespace.clone(),
            self.service.name.clone(),
            or_dash(&self.service.port_name),
            self.protocol.clone(),
            self.client.clone(),
            self.backend.to_string(),
            self.state.to_owned(),
            format!("{}s", self.left_seconds),
            if self.is_proved { "yes" } else { "no" }.to_owned(),
        ]
    }

    fn name(&self) -> String {
        format!("affinity/{}/{}/{}", self.service.namespace, self.service.name, self.client)
    }

    fn service(&self) -> Option<&PortName> {
        Some(&self.service)
    }

    fn addresses(&self) -> Vec<IpAddr> {
        self.client_ip.into_iter().chain([self.backend.ip()]).collect()
    }

    fn state(&self) -> String {
        self.state.to_owned()
    }

    written!();
}

/// Every record, as it is met.
///
/// # Errors
/// When nothing is pinned there, or a map cannot be read; and what `each` fails with.
pub fn each(pin_path: &Path, each: &mut dyn FnMut(AffinityRecord) -> Result<()>) -> Result<()> {
    let open = |name| PinnedMap::open(pin_path, name);
    let (services, backends) = (open("services")?, open("backends")?);
    let mut seconds: HashMap<u32, u32> = HashMap::new();
    open("frontends")?.each(|_: FrontendKey, row: Frontend| {
        seconds.insert(row.service_id, row.affinity_seconds);
        Ok(())
    })?;
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map_or(0, |now| std::time::Duration::from(now).as_nanos() as u64);
    for (map, is_proved) in [("affinities", true), ("new_affinities", false)] {
        open(map)?.each(|key: AffinityKey, row: Affinity| {
            let backend: Backend = backends.get(&row.backend_id)?.unwrap_or_default();
            let name = services.get::<_, ServiceName>(&key.service_id)?;
            let lasts = seconds.get(&key.service_id).copied().unwrap_or(0);
            let service = port_name(name.as_ref().map_or("-/-", ServiceName::as_str));
            each(record(&key, &row, &backend, service, lasts, now, is_proved))
        })?;
    }
    Ok(())
}

fn record(
    key: &AffinityKey,
    row: &Affinity,
    backend: &Backend,
    service: PortName,
    lasts: u32,
    now: u64,
    is_proved: bool,
) -> AffinityRecord {
    let client_ip = (key.kind == CLIENT_ADDRESS).then(|| Ipx(key.client).to_ip());
    let mut cookie = [0; 8];
    cookie.copy_from_slice(&key.client[..8]);
    let left_ns = (u64::from(lasts) * 1_000_000_000).saturating_sub(now.saturating_sub(row.used_ns));
    let lives = backend.generation == row.generation
        && u32::from(backend.state) != backend_state::BACKEND_GONE
        && backend.service_id == key.service_id;
    let state = match (lives && lasts > 0, left_ns) {
        (false, _) => "gone",
        (true, 0) => "expired",
        (true, _) => "holds",
    };
    AffinityRecord {
        service,
        protocol: protocol_name(backend.protocol),
        client: client_ip.map_or_else(|| format!("netns:{}", u64::from_ne_bytes(cookie)), |ip| ip.to_string()),
        backend: SocketAddr::new(Ipx(backend.address).to_ip(), u16::from_be_bytes(backend.port_be)),
        state,
        left_seconds: if state == "holds" { left_ns / 1_000_000_000 } else { 0 },
        is_proved,
        client_ip,
    }
}
