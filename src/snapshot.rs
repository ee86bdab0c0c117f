//! What is programmed in the kernel, read back from the live maps and joined into records that a person can read.

use anyhow::Context as _;
use bytemuck::Pod;
use serde::{Deserialize, Serialize};

use crate::abi::{
    Backend, Frontend, FrontendKey, Pool, ServiceName, backend_flag, backend_state, frontend_flag, pool_empty,
    pool_member,
};
use crate::model::{Ipx, Protocol, SocketAddrx};
use crate::sync::{MapIo, MapName};
use crate::table::HashMap;

/// The maps' rows, by key.
pub struct Snapshot {
    names: HashMap<u32, String>,
    backends: HashMap<u32, Backend>,
    /// As far as pools reach.
    slots: Vec<u32>,
    frontends: Vec<(FrontendKey, Frontend)>,
    /// Backends and slots were not read.
    is_counted: bool,
}

/// A service port's name, in its parts.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "camelCase")]
pub struct PortName {
    pub namespace: String,
    pub name: String,
    /// The port's name; empty when it has none.
    pub port_name: String,
}

/// One frontend: an address that clients can connect to.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct FrontendRecord {
    #[serde(flatten)]
    pub service: PortName,
    pub protocol: String,
    /// "IP:port"; the wildcard address for NodePorts.
    pub address: String,
    /// ClusterIP, ExternalIP, LoadBalancer, NodePort.
    pub kinds: Vec<&'static str>,
    /// 0: no session affinity.
    pub affinity_seconds: u32,
    /// For clients on this node.
    pub inside: PoolRecord,
    /// For packets from the wire.
    pub outside: PoolRecord,
    pub service_id: u32,
}

/// A frontend's endpoints.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct PoolRecord {
    /// "IP:port", in the order of the slots; none when they were only counted.
    pub endpoints: Vec<String>,
    #[serde(skip)]
    pub count: usize,
    /// What a client gets when there are none: "refused" or "dropped".
    pub when_empty: &'static str,
}

/// One backend: where connections go.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct BackendRecord {
    #[serde(flatten)]
    pub service: PortName,
    pub protocol: String,
    /// "IP:port".
    pub address: String,
    /// Active or Terminating.
    pub state: &'static str,
    pub node_local: bool,
    /// The endpoint sets that it is in: Cluster, Local.
    pub sets: Vec<&'static str>,
    pub id: u32,
    pub generation: u32,
    pub service_id: u32,
}

impl Snapshot {
    /// Reads every map. The daemon may write meanwhile: a slot may then lead to a backend that is not in the snapshot,
    /// and is left out.
    ///
    /// # Errors
    /// When a map cannot be read to its end, or its rows are not those of this version.
    pub fn read(maps: &mut dyn MapIo) -> anyhow::Result<Self> {
        let mut counted = Snapshot::count(maps)?;
        let pools = counted.frontends.iter().flat_map(|(_, row)| [row.inside, row.outside]);
        let end = pools.map(|pool| pool.base.saturating_add(pool.count)).max().unwrap_or(0);
        let slots: Vec<(u32, u32)> = rows_of(maps, MapName::Slots, Some(end))?;
        counted.slots.resize(slots.last().map_or(0, |(slot, _)| *slot as usize + 1), 0);
        for (slot, id) in slots {
            if let Some(known) = counted.slots.get_mut(slot as usize) {
                *known = id;
            }
        }
        let backends: Vec<(u32, Backend)> = rows(maps, MapName::Backends)?;
        let living = backends.into_iter().filter(|(_, b)| u32::from(b.state) != backend_state::BACKEND_GONE);
        Ok(Snapshot { backends: living.collect(), is_counted: false, ..counted })
    }

    /// Reads no backends: frontends know how many they have.
    ///
    /// # Errors
    /// As for [`Snapshot::read`].
    pub fn count(maps: &mut dyn MapIo) -> anyhow::Result<Self> {
        let frontends = rows(maps, MapName::Frontends)?;
        let names: Vec<(u32, ServiceName)> = rows(maps, MapName::Services)?;
        let names = names.into_iter().map(|(id, name)| (id, name.as_str().to_owned())).collect();
        Ok(Snapshot { names, backends: HashMap::default(), slots: Vec::new(), frontends, is_counted: true })
    }

    /// Sorted by name, then as the kinds are declared, then by address.
    pub fn frontends(&self) -> Vec<FrontendRecord> {
        let mut sorted: Vec<_> =
            self.frontends.iter().map(|(key, row)| (self.port_name(row.service_id), key, row)).collect();
        sorted.sort_by(|(a, ak, ar), (b, bk, br)| (a, ar.flags, ak).cmp(&(b, br.flags, bk)));
        let record = |(service, key, row): (PortName, &FrontendKey, &Frontend)| FrontendRecord {
            service,
            protocol: protocol_name(key.protocol),
            address: address(key.address, key.port()),
            kinds: kinds(row.flags),
            affinity_seconds: row.affinity_seconds,
            inside: self.pool(&row.inside),
            outside: self.pool(&row.outside),
            service_id: row.service_id,
        };
        sorted.into_iter().map(record).collect()
    }

    /// Sorted by name, then by address. Backends that are gone are left out.
    pub fn backends(&self) -> Vec<BackendRecord> {
        let mut sorted: Vec<_> =
            self.backends.iter().map(|(id, row)| (self.port_name(row.service_id), *id, row)).collect();
        sorted.sort_by(|(a, ai, ar), (b, bi, br)| {
            (a, ar.protocol, ar.address, ar.port_be, ai).cmp(&(b, br.protocol, br.address, br.port_be, bi))
        });
        let record = |(service, id, row): (PortName, u32, &Backend)| BackendRecord {
            service,
            protocol: protocol_name(row.protocol),
            address: address(row.address, u16::from_be_bytes(row.port_be)),
            state: if u32::from(row.state) == backend_state::BACKEND_TERMINATING { "Terminating" } else { "Active" },
            node_local: u32::from(row.flags) & backend_flag::BACKEND_NODE_LOCAL != 0,
            sets: sets(row.pools.into()),
            id,
            generation: row.generation,
            service_id: row.service_id,
        };
        sorted.into_iter().map(record).collect()
    }

    fn pool(&self, pool: &Pool) -> PoolRecord {
        // A slot that holds backend 0 is all zeros, and so not in a dump.
        let id = |n| self.slots.get(pool.base.wrapping_add(n) as usize).copied().unwrap_or(0);
        let ids = (0..pool.count).filter(|_| !self.is_counted).map(id);
        let found = ids.filter_map(|id| self.backends.get(&id));
        let endpoints: Vec<String> = found.map(|b| address(b.address, u16::from_be_bytes(b.port_be))).collect();
        PoolRecord {
            count: if self.is_counted { pool.count as usize } else { endpoints.len() },
            endpoints,
            when_empty: if u32::from(pool.on_empty) == pool_empty::EMPTY_DROP { "dropped" } else { "refused" },
        }
    }

    /// A service that is being removed may have lost its name already.
    fn port_name(&self, service_id: u32) -> PortName {
        port_name(self.names.get(&service_id).map_or("-/-", String::as_str))
    }
}

/// Of "namespace/name:port".
pub fn port_name(text: &str) -> PortName {
    let (namespace, rest) = text.split_once('/').unwrap_or(("-", text));
    let (name, port) = rest.split_once(':').unwrap_or((rest, ""));
    PortName { namespace: namespace.to_owned(), name: name.to_owned(), port_name: port.to_owned() }
}

/// All rows of a map.
///
/// # Errors
/// When the map cannot be read to its end, or its rows are not those of this version.
pub fn rows<K: Pod, V: Pod>(maps: &mut dyn MapIo, map: MapName) -> anyhow::Result<Vec<(K, V)>> {
    rows_of(maps, map, None)
}

/// `first`: of an array so many only.
fn rows_of<K: Pod, V: Pod>(maps: &mut dyn MapIo, map: MapName, first: Option<u32>) -> anyhow::Result<Vec<(K, V)>> {
    let mut rows = Vec::new();
    let mut foreign = false;
    let mut take = |key: &[u8], value: &[u8]| match (
        bytemuck::try_pod_read_unaligned(key),
        bytemuck::try_pod_read_unaligned(value),
    ) {
        (Ok(key), Ok(value)) => rows.push((key, value)),
        _ => foreign = true,
    };
    let read = match first {
        Some(first) => maps.dump_first(map, first, &mut take),
        None => maps.dump(map, &mut take),
    };
    read.with_context(|| format!("reading the map {:?}", map.as_str()))?;
    anyhow::ensure!(!foreign, "the map {:?} has rows of another size: it is not this version's", map.as_str());
    Ok(rows)
}

fn address(ip: [u8; 16], port: u16) -> String {
    SocketAddrx { ip: Ipx(ip), port }.to_string()
}

pub fn protocol_name(number: u8) -> String {
    Protocol::of_number(number).map_or_else(|| number.to_string(), |p| p.as_str().to_owned())
}

pub fn kinds(flags: u32) -> Vec<&'static str> {
    let all = [
        (frontend_flag::FRONTEND_CLUSTER_IP, "ClusterIP"),
        (frontend_flag::FRONTEND_EXTERNAL_IP, "ExternalIP"),
        (frontend_flag::FRONTEND_LOAD_BALANCER, "LoadBalancer"),
        (frontend_flag::FRONTEND_NODE_PORT, "NodePort"),
    ];
    all.into_iter().filter(|(bit, _)| flags & bit != 0).map(|(_, name)| name).collect()
}

fn sets(pools: u32) -> Vec<&'static str> {
    let all = [(pool_member::POOL_CLUSTER, "Cluster"), (pool_member::POOL_LOCAL, "Local")];
    all.into_iter().filter(|(bit, _)| pools & bit != 0).map(|(_, name)| name).collect()
}
