//! `get services`, `backends` and `nodeports`: what the daemon has written.

use std::net::IpAddr;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::printer::Heads;
use super::record::{Record, ip, or_dash, written};
use crate::abi::address_flag::ADDRESS_NODE;
use crate::bpf::{Maps, PinnedMap};
use crate::cli::snapshot::{BackendRecord, FrontendRecord, PoolRecord, PortName, Snapshot};
use crate::model::Ipx;

pub const SERVICE_HEADS: Heads = Heads {
    all: &["NAMESPACE", "NAME", "PORT", "PROTOCOL", "FRONTEND", "KIND", "ENDPOINTS", "AFFINITY", "ID", "ADDRESSES"],
    narrow: 7,
};

pub const BACKEND_HEADS: Heads = Heads {
    all: &[
        "NAMESPACE",
        "NAME",
        "PORT",
        "PROTOCOL",
        "BACKEND",
        "STATE",
        "LOCAL",
        "SETS",
        "ID",
        "GENERATION",
        "SERVICE-ID",
    ],
    narrow: 7,
};

pub const NODE_PORT_HEADS: Heads = Heads {
    all: &["NAMESPACE", "NAME", "PORT", "PROTOCOL", "NODEPORT", "FAMILY", "ENDPOINTS", "ADDRESSES"],
    narrow: 7,
};

/// Reads the live maps.
///
/// # Errors
/// When nothing is pinned there, or the maps cannot be read.
pub fn snapshot(pin_path: &Path) -> Result<Snapshot> {
    Snapshot::read(&mut Maps::open(pin_path)?)
}

/// As [`snapshot`], of frontends only; endpoints are counted, and not read.
///
/// # Errors
/// As for [`snapshot`].
pub fn counted(pin_path: &Path) -> Result<Snapshot> {
    Snapshot::count(&mut Maps::open(pin_path)?)
}

impl Record for FrontendRecord {
    fn cells(&self) -> Vec<String> {
        let affinity = Some(self.affinity_seconds).filter(|s| *s != 0).map(|s| format!("{s}s"));
        vec![
            self.service.namespace.clone(),
            self.service.name.clone(),
            or_dash(&self.service.port_name),
            self.protocol.clone(),
            self.address.clone(),
            or_dash(&self.kinds.join(",")),
            endpoints(&self.inside, &self.outside),
            or_dash(&affinity.unwrap_or_default()),
            self.service_id.to_string(),
            or_dash(&self.inside.endpoints.join(",")),
        ]
    }

    fn name(&self) -> String {
        format!("service/{}/{}", self.service.namespace, self.service.name)
    }

    fn service(&self) -> Option<&PortName> {
        Some(&self.service)
    }

    /// Its own, and those of its endpoints.
    fn addresses(&self) -> Vec<IpAddr> {
        let endpoints = self.inside.endpoints.iter().chain(&self.outside.endpoints);
        std::iter::once(&self.address).chain(endpoints).filter_map(|at| ip(at)).collect()
    }

    fn state(&self) -> String {
        let is_empty = self.inside.count == 0 && self.outside.count == 0;
        if is_empty { self.inside.when_empty } else { "serving" }.to_owned()
    }

    written!();
}

impl Record for BackendRecord {
    fn cells(&self) -> Vec<String> {
        vec![
            self.service.namespace.clone(),
            self.service.name.clone(),
            or_dash(&self.service.port_name),
            self.protocol.clone(),
            self.address.clone(),
            self.state.to_owned(),
            if self.node_local { "yes" } else { "no" }.to_owned(),
            or_dash(&self.sets.join(",")),
            self.id.to_string(),
            self.generation.to_string(),
            self.service_id.to_string(),
        ]
    }

    fn name(&self) -> String {
        format!("backend/{}/{}", self.address, self.protocol)
    }

    fn service(&self) -> Option<&PortName> {
        Some(&self.service)
    }

    fn addresses(&self) -> Vec<IpAddr> {
        ip(&self.address).into_iter().collect()
    }

    fn state(&self) -> String {
        self.state.to_lowercase()
    }

    written!();
}

/// The number of endpoints for clients on this node, and that for packets from the wire where it differs.
fn endpoints(inside: &PoolRecord, outside: &PoolRecord) -> String {
    let count = |pool: &PoolRecord| match pool.count {
        0 => format!("0 ({})", pool.when_empty),
        n => n.to_string(),
    };
    if (inside.count, inside.when_empty) == (outside.count, outside.when_empty) {
        return count(inside);
    }
    format!("{}, from outside {}", count(inside), count(outside))
}

/// A NodePort with the addresses that serve it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodePortRecord {
    #[serde(flatten)]
    pub service: PortName,
    pub protocol: String,
    pub node_port: u16,
    /// IPv4 or IPv6.
    pub family: &'static str,
    /// Of this node.
    pub addresses: Vec<IpAddr>,
    pub inside: PoolRecord,
    pub outside: PoolRecord,
}

impl Record for NodePortRecord {
    fn cells(&self) -> Vec<String> {
        let addresses: Vec<String> = self.addresses.iter().map(IpAddr::to_string).collect();
        vec![
            self.service.namespace.clone(),
            self.service.name.clone(),
            or_dash(&self.service.port_name),
            self.protocol.clone(),
            self.node_port.to_string(),
            self.family.to_owned(),
            endpoints(&self.inside, &self.outside),
            or_dash(&addresses.join(",")),
        ]
    }

    fn name(&self) -> String {
        format!("nodeport/{}/{}", self.node_port, self.protocol)
    }

    fn service(&self) -> Option<&PortName> {
        Some(&self.service)
    }

    fn addresses(&self) -> Vec<IpAddr> {
        self.addresses.clone()
    }

    fn state(&self) -> String {
        let is_empty = self.inside.count == 0 && self.outside.count == 0;
        if is_empty { self.inside.when_empty } else { "serving" }.to_owned()
    }

    written!();
}

/// NodePorts, sorted by name.
pub fn node_ports(frontends: Vec<FrontendRecord>, addresses: &[IpAddr]) -> Vec<NodePortRecord> {
    let record = |frontend: FrontendRecord| {
        let at: std::net::SocketAddr =
            frontend.address.parse().ok().filter(|_| frontend.kinds.contains(&"NodePort"))?;
        Some(NodePortRecord {
            service: frontend.service,
            protocol: frontend.protocol,
            node_port: at.port(),
            family: if at.is_ipv6() { "IPv6" } else { "IPv4" },
            addresses: addresses.iter().filter(|ip| ip.is_ipv6() == at.is_ipv6()).copied().collect(),
            inside: frontend.inside,
            outside: frontend.outside,
        })
    };
    frontends.into_iter().filter_map(record).collect()
}

/// The addresses of this node that serve NodePorts, sorted.
///
/// # Errors
/// When the map cannot be read.
pub fn node_addresses(pin_path: &Path) -> Result<Vec<IpAddr>> {
    let mut found = Vec::new();
    PinnedMap::open(pin_path, "addresses")?.each(|address: [u8; 16], roles: u32| {
        if roles & ADDRESS_NODE != 0 {
            found.push(Ipx(address).to_ip());
        }
        Ok(())
    })?;
    found.sort_unstable();
    found.dedup();
    Ok(found)
}
