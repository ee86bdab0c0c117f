//! `get flows` and `snat`: connections of packets from outside, read as they are in the kernel's tables. A walk holds one
//! batch of rows, and the names of Services and the backends that it has met.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::printer::Heads;
use super::record::{Record, or_dash, written};
use crate::abi::flow_flag::{FLOW_FIN, FLOW_PROVED, FLOW_REPLY, FLOW_RESET};
use crate::abi::flow_state::FLOW_SECOND_MASK;
use crate::abi::{Backend, Ends, Flow, FlowKey, FlowKey4, ServiceName};
use crate::bpf::PinnedMap;
use crate::cli::snapshot::{PortName, port_name, protocol_name};
use crate::model::Ipx;

pub const FLOW_HEADS: Heads = Heads {
    all: &[
        "NAMESPACE",
        "NAME",
        "PORT",
        "PROTOCOL",
        "CLIENT",
        "FRONTEND",
        "BACKEND",
        "STATE",
        "IDLE",
        "SOURCE",
        "BACKEND-ON",
    ],
    narrow: 9,
};

pub const SNAT_HEADS: Heads = Heads { all: &["BACKEND", "PROTOCOL", "SOURCE", "PORTS"], narrow: 4 };

/// A flow, by its requests.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowRecord {
    /// Of the backend; "-" when it is gone.
    #[serde(flatten)]
    pub service: PortName,
    pub protocol: String,
    pub client: SocketAddr,
    /// What the client asks for.
    pub frontend: SocketAddr,
    pub backend: SocketAddr,
    /// opening, established or closing.
    pub state: &'static str,
    /// Since the client's last packet.
    pub idle_seconds: u32,
    /// Whom the backend sees as its client.
    pub source: SocketAddr,
    /// The backend is on another node.
    pub is_remote: bool,
}

impl Record for FlowRecord {
    fn cells(&self) -> Vec<String> {
        vec![
            self.service.namespace.clone(),
            self.service.name.clone(),
            or_dash(&self.service.port_name),
            self.protocol.clone(),
            self.client.to_string(),
            self.frontend.to_string(),
            self.backend.to_string(),
            self.state.to_owned(),
            format!("{}s", self.idle_seconds),
            self.source.to_string(),
            if self.is_remote { "another node" } else { "this node" }.to_owned(),
        ]
    }

    fn name(&self) -> String {
        format!("flow/{}/{}-{}", self.protocol, self.client, self.frontend)
    }

    fn service(&self) -> Option<&PortName> {
        Some(&self.service)
    }

    fn addresses(&self) -> Vec<IpAddr> {
        vec![self.client.ip(), self.frontend.ip(), self.backend.ip()]
    }

    fn state(&self) -> String {
        self.state.to_owned()
    }

    written!();
}

/// Who a backend id belongs to.
struct Owners {
    names: HashMap<u32, PortName>,
    backends: PinnedMap,
    met: HashMap<u32, (u32, u32)>,
}

impl Owners {
    fn open(pin_path: &Path) -> Result<Owners> {
        let mut names = HashMap::new();
        PinnedMap::open(pin_path, "services")?.each(|id: u32, name: ServiceName| {
            names.insert(id, port_name(name.as_str()));
            Ok(())
        })?;
        Ok(Owners { names, backends: PinnedMap::open(pin_path, "backends")?, met: HashMap::new() })
    }

    fn of(&mut self, id: u32, generation: u32) -> Result<PortName> {
        let (service, current) = match self.met.get(&id) {
            Some(known) => *known,
            None => {
                let row: Backend = self.backends.get(&id)?.unwrap_or_default();
                *self.met.entry(id).or_insert((row.service_id, row.generation))
            }
        };
        let name = self.names.get(&service).filter(|_| current == generation);
        Ok(name.cloned().unwrap_or_else(|| port_name("-/-")))
    }
}

/// Every flow, as it is met.
///
/// # Errors
/// When nothing is pinned there, or a map cannot be read; and what `each` fails with.
pub fn each(pin_path: &Path, each: &mut dyn FnMut(FlowRecord) -> Result<()>) -> Result<()> {
    let mut owners = Owners::open(pin_path)?;
    let second = now();
    let mut meet = |key: FlowKey, flow: Flow| -> Result<()> {
        if flow.has(FLOW_REPLY) {
            return Ok(());
        }
        let service = owners.of(flow.backend_or_first, flow.generation_or_interface)?;
        each(record(&key, &flow, service, second))
    };
    PinnedMap::open(pin_path, "flows4")?.each(|key: FlowKey4, flow: Flow| meet(key.into(), flow))?;
    PinnedMap::open(pin_path, "flows6")?.each(meet)
}

/// The second of CLOCK_MONOTONIC, as flows have it.
fn now() -> u32 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    now.map_or(0, |now| now.tv_sec() as u32 & FLOW_SECOND_MASK)
}

fn record(key: &FlowKey, flow: &Flow, service: PortName, second: u32) -> FlowRecord {
    let source = |ends: &Ends| SocketAddr::new(Ipx(ends.source).to_ip(), u16::from_be_bytes(ends.source_port_be));
    let destination =
        |ends: &Ends| SocketAddr::new(Ipx(ends.destination).to_ip(), u16::from_be_bytes(ends.destination_port_be));
    let state = match () {
        () if flow.has(FLOW_FIN | FLOW_RESET) => "closing",
        () if flow.has(FLOW_PROVED) => "established",
        () => "opening",
    };
    FlowRecord {
        service,
        protocol: protocol_name(key.protocol),
        client: source(&key.ends),
        frontend: destination(&key.ends),
        backend: destination(&flow.ends),
        state,
        idle_seconds: flow.idle(second),
        source: source(&flow.ends),
        is_remote: flow.is_routed(),
    }
}

/// Source ports that are in use towards one backend on another node.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SnatRecord {
    pub backend: SocketAddr,
    pub protocol: String,
    /// The node's address that the backend sees.
    pub source: IpAddr,
    pub ports: u64,
}

impl Record for SnatRecord {
    fn cells(&self) -> Vec<String> {
        vec![self.backend.to_string(), self.protocol.clone(), self.source.to_string(), self.ports.to_string()]
    }

    fn name(&self) -> String {
        format!("snat/{}/{}", self.backend, self.protocol)
    }

    fn service(&self) -> Option<&PortName> {
        None
    }

    fn addresses(&self) -> Vec<IpAddr> {
        vec![self.backend.ip(), self.source]
    }

    fn state(&self) -> String {
        String::new()
    }

    written!();
}

/// Those with the most ports first. `wanted`: which flows count.
///
/// # Errors
/// As for [`each`].
pub fn snat(pin_path: &Path, wanted: impl Fn(&FlowRecord) -> bool) -> Result<Vec<SnatRecord>> {
    let mut counts: BTreeMap<(SocketAddr, String, IpAddr), u64> = BTreeMap::new();
    each(pin_path, &mut |flow| {
        if flow.is_remote && wanted(&flow) {
            *counts.entry((flow.backend, flow.protocol, flow.source.ip())).or_default() += 1;
        }
        Ok(())
    })?;
    let record = |((backend, protocol, source), ports)| SnatRecord { backend, protocol, source, ports };
    let mut all: Vec<SnatRecord> = counts.into_iter().map(record).collect();
    all.sort_by_key(|record| std::cmp::Reverse(record.ports));
    Ok(all)
}
