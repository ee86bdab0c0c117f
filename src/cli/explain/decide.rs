//! What the datapath makes of the next connection, by the rows that it would read and in its order: `bpf/socket.h` for
//! clients on this node, `bpf/service.h` and `bpf/begin.h` for packets from outside. `tests/cli/explain.rs` asks both.

use std::collections::BTreeMap;

use anyhow::Result;

use super::kernel::{Kernel, is_this_host};
use super::target::Destination;
use crate::abi::address_flag::{ADDRESS_CLUSTER_IP, ADDRESS_NODE, ADDRESS_SERVICE_VIP};
use crate::abi::backend_state::{BACKEND_GONE, BACKEND_TERMINATING};
use crate::abi::frontend_flag::{
    FRONTEND_CLUSTER_IP, FRONTEND_EXTERNAL_IP, FRONTEND_LOAD_BALANCER, FRONTEND_NODE_ADMITTED, FRONTEND_NODE_PORT,
    FRONTEND_SOURCE_RANGES,
};
use crate::abi::pool_empty::EMPTY_DROP;
use crate::abi::{Affinity, AffinityKey, Backend, Frontend, FrontendKey, Pool, backend_flag};
use crate::model::{Ipx, Protocol, SocketAddrx};

/// Kinds of frontends that packets from outside ask for.
fn for_packets(kernel: &dyn Kernel) -> u32 {
    let always = FRONTEND_EXTERNAL_IP | FRONTEND_LOAD_BALANCER | FRONTEND_NODE_PORT;
    if kernel.configuration().external_cluster_ips { always | FRONTEND_CLUSTER_IP } else { always }
}

/// As `PICK_TRIES` of bpf/pick.h.
const PICK_TRIES: u32 = 8;

/// Who asks, as the datapath tells them apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Client {
    /// A socket of this node, at this address if it is a pod's. `cookies`: of its network namespace, where that is known,
    /// or of all that it may be.
    Socket { is_host: bool, ip: Option<Ipx>, cookies: Vec<u64> },
    /// A packet from outside.
    Packet(Option<Ipx>),
    /// A packet of a pod of this node.
    PodPacket(Option<Ipx>),
}

/// Why no backend gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A cluster IP's port that no Service has.
    UnknownPort,
    NoEndpoint,
    NoLocalEndpoint,
    SourceRange,
    /// SCTP to a backend with another port.
    SctpPort,
    /// There is no hook for sockets of SCTP.
    SctpSocket,
    /// The daemon was told to leave pods' sockets alone, and to keep off their devices.
    PodsNotServed,
    /// No Service has this address and port.
    NoService,
    /// A cluster IP, and the client is outside.
    ClusterIpOutside,
    /// Loopback is the node in its own namespace only.
    LoopbackInPod,
    LoopbackOutside,
    /// The filter that the programs ask first does not know of it.
    NotMarked,
    /// No slot leads to a backend.
    BackendMissing,
}

/// What becomes of the next connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Backend,
    Refused(Reason),
    Dropped(Reason),
    /// Left as it is: whatever has the destination gets it.
    Untouched(Reason),
}

/// A backend that new connections may get.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    pub at: SocketAddrx,
    /// Of all new connections without affinity.
    pub share: f64,
    pub is_terminating: bool,
    pub is_local: bool,
}

/// The backend that a client had before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remembered {
    pub at: SocketAddrx,
    pub left_seconds: u64,
}

/// The frontend that was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    pub key: FrontendKey,
    pub row: Frontend,
    /// The one of the client's side.
    pub pool: Pool,
    /// "namespace/name:port".
    pub name: Option<String>,
    pub candidates: Vec<Candidate>,
    pub remembered: Option<Remembered>,
    /// `None`: not asked, for want of ranges or of a client.
    pub is_admitted: Option<bool>,
}

/// The whole answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    pub found: Option<Found>,
    pub verdict: Verdict,
}

/// # Errors
/// When a map cannot be read.
pub fn decide(kernel: &dyn Kernel, to: Destination, client: &Client) -> Result<Decision> {
    let found = match client {
        Client::Socket { is_host, .. } => socket_look_up(kernel, to, *is_host)?,
        Client::PodPacket(_) if !kernel.configuration().has_pod_devices => {
            Err(Verdict::Untouched(Reason::PodsNotServed))
        }
        Client::PodPacket(_) => socket_look_up(kernel, to, false)?,
        Client::Packet(_) => packet_look_up(kernel, to)?,
    };
    match found {
        Ok((key, row)) => decide_found(kernel, to, key, row, client),
        Err(verdict) => Ok(Decision { found: None, verdict }),
    }
}

/// The same of a frontend that was found.
///
/// # Errors
/// When a map cannot be read.
pub fn decide_found(
    kernel: &dyn Kernel,
    to: Destination,
    key: FrontendKey,
    row: Frontend,
    client: &Client,
) -> Result<Decision> {
    let pool = if matches!(client, Client::Packet(_)) { row.outside } else { row.inside };
    let candidates = candidates(kernel, &row, &pool)?;
    // A pod's socket is left alone where there are ranges, and its packets are judged.
    let is_admitted = match client {
        _ if row.flags & FRONTEND_SOURCE_RANGES == 0 => None,
        Client::Socket { is_host: true, .. } => Some(row.flags & FRONTEND_NODE_ADMITTED != 0),
        Client::Socket { .. } if !kernel.configuration().has_pod_devices => None,
        Client::Packet(Some(ip)) | Client::PodPacket(Some(ip)) | Client::Socket { ip: Some(ip), .. } => {
            Some(kernel.admits(row.service_id, *ip)?)
        }
        _ => None,
    };
    let remembered = if row.affinity_seconds > 0 { remembered(kernel, to, &row, &pool, client)? } else { None };
    let name = kernel.name(row.service_id)?;
    let found = Found { key, row, pool, name, candidates, remembered, is_admitted };
    let verdict = verdict(kernel, &found, to, client);
    Ok(Decision { found: Some(found), verdict })
}

type LookUp = Result<std::result::Result<(FrontendKey, Frontend), Verdict>>;

/// As `request_lookup()` and `frontend_lookup()`.
fn socket_look_up(kernel: &dyn Kernel, to: Destination, is_host: bool) -> LookUp {
    let untouched = |reason| Ok(Err(Verdict::Untouched(reason)));
    if to.protocol == Protocol::Sctp && !is_sctp_served(kernel, is_host) {
        return untouched(Reason::SctpSocket);
    }
    let key = FrontendKey::new(to.at.ip, to.at.port, to.protocol);
    let node_port = FrontendKey::new(Ipx::any(to.at.ip.family()), to.at.port, to.protocol);
    let marked = |key: FrontendKey, row| match kernel.lets_look(&FrontendKey { address: to.at.ip.0, ..key }, true) {
        true => Ok(Ok((key, row))),
        false => untouched(Reason::NotMarked),
    };
    if is_this_host(to.at.ip) {
        return match kernel.frontend(&node_port)? {
            Some(_) if !is_host => untouched(Reason::LoopbackInPod),
            Some(row) => marked(node_port, row),
            None => untouched(Reason::NoService),
        };
    }
    if let Some(row) = kernel.frontend(&key)? {
        return marked(key, row);
    }
    let roles = kernel.roles(to.at.ip)?;
    if roles & ADDRESS_NODE != 0 {
        return match kernel.frontend(&node_port)? {
            Some(row) => marked(node_port, row),
            None => untouched(Reason::NoService),
        };
    }
    match roles & ADDRESS_CLUSTER_IP != 0 {
        true if kernel.lets_look(&key, true) => Ok(Err(Verdict::Refused(Reason::UnknownPort))),
        true => untouched(Reason::NotMarked),
        false => untouched(Reason::NoService),
    }
}

/// There is no hook for its sockets; of pods packets are served.
fn is_sctp_served(kernel: &dyn Kernel, is_host: bool) -> bool {
    !is_host && kernel.configuration().has_pod_devices
}

/// As `service_find()`.
fn packet_look_up(kernel: &dyn Kernel, to: Destination) -> LookUp {
    let untouched = |reason| Ok(Err(Verdict::Untouched(reason)));
    if is_this_host(to.at.ip) {
        return untouched(Reason::LoopbackOutside);
    }
    let roles = kernel.roles(to.at.ip)?;
    let key = FrontendKey::new(to.at.ip, to.at.port, to.protocol);
    let node_port = FrontendKey::new(Ipx::any(to.at.ip.family()), to.at.port, to.protocol);
    let mut found = None;
    let is_external = kernel.configuration().external_cluster_ips;
    let vips = if is_external { ADDRESS_SERVICE_VIP | ADDRESS_CLUSTER_IP } else { ADDRESS_SERVICE_VIP };
    if roles & vips != 0 {
        found = kernel.frontend(&key)?.map(|row| (key, row));
    }
    if found.is_none() && roles & ADDRESS_NODE != 0 {
        found = kernel.frontend(&node_port)?.map(|row| (node_port, row));
    }
    let lets_look = kernel.lets_look(&key, false) || (is_external && kernel.lets_look(&key, true));
    match found.filter(|(_, row)| row.flags & for_packets(kernel) != 0) {
        Some(_) if !lets_look => untouched(Reason::NotMarked),
        Some(found) => Ok(Ok(found)),
        None if roles & ADDRESS_CLUSTER_IP != 0 && is_external && lets_look => {
            Ok(Err(Verdict::Refused(Reason::UnknownPort)))
        }
        None if roles & ADDRESS_CLUSTER_IP != 0 => untouched(Reason::ClusterIpOutside),
        None => untouched(Reason::NoService),
    }
}

/// As `pick_slot()`: a slot that leads to no backend of the Service's leaves its share to a neighbour.
fn candidates(kernel: &dyn Kernel, row: &Frontend, pool: &Pool) -> Result<Vec<Candidate>> {
    let slots = (0..pool.count).map(|offset| {
        let id = kernel.slot(pool.base.wrapping_add(offset))?;
        Ok(kernel.backend(id)?.filter(|backend| backend.service_id == row.service_id))
    });
    let slots: Vec<Option<Backend>> = slots.collect::<Result<_>>()?;
    let mut counts: BTreeMap<SocketAddrx, (u32, Backend)> = BTreeMap::new();
    for offset in 0..pool.count {
        let mut near = (0..PICK_TRIES).map(|step| slots[((offset + step) % pool.count) as usize]);
        if let Some(backend) = near.find_map(|backend| backend) {
            counts.entry(at(&backend)).or_insert((0, backend)).0 += 1;
        }
    }
    let candidate = |(at, (count, backend)): (&SocketAddrx, &(u32, Backend))| Candidate {
        at: *at,
        share: f64::from(*count) / f64::from(pool.count),
        is_terminating: u32::from(backend.state) == BACKEND_TERMINATING,
        is_local: u32::from(backend.flags) & backend_flag::BACKEND_NODE_LOCAL != 0,
    };
    Ok(counts.iter().map(candidate).collect())
}

fn at(backend: &Backend) -> SocketAddrx {
    SocketAddrx { ip: Ipx(backend.address), port: u16::from_be_bytes(backend.port_be) }
}

/// As `backend_recall()`, in the places where the client's side looks.
fn remembered(
    kernel: &dyn Kernel,
    to: Destination,
    row: &Frontend,
    pool: &Pool,
    client: &Client,
) -> Result<Option<Remembered>> {
    let keys: Vec<AffinityKey> = match client {
        Client::Socket { cookies, .. } => {
            let key = |cookie: &u64| AffinityKey::of_namespace(*cookie, to.at.ip.family(), row.service_id);
            cookies.iter().map(key).collect()
        }
        Client::Packet(ip) | Client::PodPacket(ip) => {
            ip.iter().map(|ip| AffinityKey::of_address(*ip, row.service_id)).collect()
        }
    };
    for key in &keys {
        if let Some(found) = recall(kernel, kernel.affinity(key)?, row, pool)? {
            return Ok(Some(found));
        }
        if !matches!(client, Client::Socket { .. }) {
            return recall(kernel, kernel.new_affinity(key)?, row, pool);
        }
    }
    Ok(None)
}

fn recall(kernel: &dyn Kernel, row: Option<Affinity>, of: &Frontend, pool: &Pool) -> Result<Option<Remembered>> {
    let Some(affinity) = row else { return Ok(None) };
    let lasts = u64::from(of.affinity_seconds) * 1_000_000_000;
    // A clock that was read a moment before the row was written.
    let age = kernel.now_ns().saturating_sub(affinity.used_ns);
    if age >= lasts {
        return Ok(None);
    }
    let living = kernel.backend(affinity.backend_id)?.filter(|backend| {
        backend.generation == affinity.generation
            && u32::from(backend.state) != BACKEND_GONE
            && backend.pools & pool.member != 0
            && backend.service_id == of.service_id
    });
    Ok(living.map(|backend| Remembered { at: at(&backend), left_seconds: (lasts - age) / 1_000_000_000 }))
}

fn verdict(kernel: &dyn Kernel, found: &Found, to: Destination, client: &Client) -> Verdict {
    match client {
        Client::Packet(_) if found.row.flags & for_packets(kernel) == 0 => {
            return Verdict::Untouched(Reason::ClusterIpOutside);
        }
        Client::Socket { is_host, .. } if to.protocol == Protocol::Sctp && !is_sctp_served(kernel, *is_host) => {
            return Verdict::Untouched(Reason::SctpSocket);
        }
        _ => {}
    }
    if found.is_admitted == Some(false) {
        return Verdict::Dropped(Reason::SourceRange);
    }
    if found.pool.count == 0 {
        return match u32::from(found.pool.on_empty) == EMPTY_DROP {
            true => Verdict::Dropped(Reason::NoLocalEndpoint),
            false => Verdict::Refused(Reason::NoEndpoint),
        };
    }
    if found.candidates.is_empty() {
        return Verdict::Untouched(Reason::BackendMissing);
    }
    if to.protocol == Protocol::Sctp && found.candidates.iter().all(|candidate| candidate.at.port != to.at.port) {
        return Verdict::Dropped(Reason::SctpPort);
    }
    Verdict::Backend
}
