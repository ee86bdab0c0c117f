//! The Service ports that are in the kernel, one line each.

use std::cmp::Reverse;

use anyhow::Result;

use crate::abi::frontend_flag::{FRONTEND_CLUSTER_IP, FRONTEND_EXTERNAL_IP, FRONTEND_LOAD_BALANCER};
use crate::abi::pool_empty::EMPTY_DROP;
use crate::abi::{Frontend, FrontendKey, ServiceName};
use crate::escape;
use crate::model::{Family, SocketAddrx};
use crate::snapshot::{PortName, kinds, port_name, protocol_name, rows};
use crate::sync::{MapIo, MapName};
use crate::table::HashMap;

/// One Service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    pub name: PortName,
    pub protocol: String,
    /// "IP:port" of the frontend that stands for all: a cluster IP before others, IPv4 before IPv6.
    pub address: String,
    /// How many more there are.
    pub more_addresses: usize,
    /// ClusterIP, ExternalIP, LoadBalancer, NodePort.
    pub kinds: Vec<&'static str>,
    /// Of that frontend, for clients on this node.
    pub endpoints: u32,
    /// What a client gets when there are none: refused or dropped.
    pub when_empty: &'static str,
    pub id: u32,
    /// "namespace/name:port", as it is in the kernel.
    pub full_name: String,
    /// The name, address and kinds in lower case, without what a terminal would act upon.
    pub searched: String,
}

/// Reads two maps; sorted by name.
///
/// # Errors
/// When a map cannot be read to its end, or its rows are not those of this version.
pub fn service_ports(maps: &mut dyn MapIo) -> Result<Vec<ServicePort>> {
    let names: Vec<(u32, ServiceName)> = rows(maps, MapName::Services)?;
    let frontends: Vec<(FrontendKey, Frontend)> = rows(maps, MapName::Frontends)?;
    let mut found: HashMap<u32, Found> = HashMap::default();
    for row in frontends {
        found.entry(row.1.service_id).and_modify(|found| found.add(row)).or_insert(Found {
            best: row,
            flags: row.1.flags,
            count: 1,
        });
    }
    let port = |(id, name): (u32, ServiceName)| Some(service_port(id, &name, found.get(&id)?));
    let mut all: Vec<ServicePort> = names.into_iter().filter_map(port).collect();
    all.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
    // A row that was met twice, while others came or went.
    all.dedup_by_key(|port| port.id);
    Ok(all)
}

/// The frontends of one Service port.
struct Found {
    best: (FrontendKey, Frontend),
    flags: u32,
    count: usize,
}

impl Found {
    fn add(&mut self, row: (FrontendKey, Frontend)) {
        self.flags |= row.1.flags;
        self.count += usize::from(row.0 != self.best.0);
        if rank(&row) < rank(&self.best) {
            self.best = row;
        }
    }
}

fn rank((key, row): &(FrontendKey, Frontend)) -> (Reverse<bool>, Reverse<bool>, Reverse<bool>, bool, [u8; 16], u16) {
    let is = |kind: u32| Reverse(row.flags & kind != 0);
    let of_outside = is(FRONTEND_LOAD_BALANCER | FRONTEND_EXTERNAL_IP);
    let is_ipv6 = key.ip().family() == Family::Ipv6;
    (is(FRONTEND_CLUSTER_IP), of_outside, Reverse(row.inside.count > 0), is_ipv6, key.address, key.port())
}

fn service_port(id: u32, name: &ServiceName, found: &Found) -> ServicePort {
    let (key, row) = &found.best;
    let address = SocketAddrx { ip: key.ip(), port: key.port() }.to_string();
    let kinds = kinds(found.flags);
    let searched = format!("{} {address} {}", escape::line(name.as_str()), kinds.join(",")).to_lowercase();
    ServicePort {
        name: port_name(name.as_str()),
        protocol: protocol_name(key.protocol),
        address,
        more_addresses: found.count - 1,
        kinds,
        endpoints: row.inside.count,
        when_empty: if u32::from(row.inside.on_empty) == EMPTY_DROP { "dropped" } else { "refused" },
        id,
        full_name: name.as_str().to_owned(),
        searched,
    }
}
