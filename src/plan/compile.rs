//! What one Service asks of the kernel, as a pure function of the Service, its EndpointSlices and where this node is.
//! This is the only definition of the desired state; ids and places are added by `layout`.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::fit::{self, Fitted};
use super::quotas::Amounts;
use super::select::{Candidate, Choice, Place, choose, merge_duplicates};
use super::warnings::service_warning;
use crate::abi::address_flag::{ADDRESS_CLUSTER_IP, ADDRESS_SERVICE_VIP};
use crate::abi::frontend_flag::{
    FRONTEND_CLUSTER_IP, FRONTEND_EXTERNAL_IP, FRONTEND_LOAD_BALANCER, FRONTEND_NODE_ADMITTED, FRONTEND_NODE_PORT,
    FRONTEND_SOURCE_NODE, FRONTEND_SOURCE_RANGES,
};
use crate::abi::pool_empty::{EMPTY_DROP, EMPTY_REFUSE};
use crate::abi::pool_member::{POOL_CLUSTER, POOL_LOCAL};
use crate::abi::{FrontendKey, backend_flag, backend_state};
use crate::model::{
    ClientSource, Family, IpRange, Ipx, Masquerade, Protocol, Service, ServicePort, Slice, SlicePort, SocketAddrx,
    TrafficPolicy, Warning,
};
use crate::table::HashSet;

/// So many of the ports that nobody asks for are named in a warning.
const NAMED: usize = 3;

/// What all Services are compiled against.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    pub place: Place<'a>,
    /// Addresses bound on this node's own devices: a cluster IP among them is left alone (a node-local DNS cache).
    pub bound: &'a HashSet<Ipx>,
    /// The Service's quota of the maps.
    pub limits: Amounts,
    pub masquerade: Masquerade,
    /// The Node object's InternalIPs, which its own processes have as their address.
    pub internal_ips: &'a [Ipx],
}

/// One Service's quota of the maps, without ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// As `Service::created`.
    pub created: i64,
    pub ports: Vec<CompiledPort>,
    /// Bits of `abi::address_flag`, sorted by address.
    pub addresses: Vec<(Ipx, u32)>,
    pub warnings: Vec<Warning>,
    /// Something is left out, because it is more than the Service's quota.
    pub is_cut: bool,
}

/// One Service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompiledPort {
    pub name: Arc<str>,
    pub protocol: Protocol,
    /// 0: no affinity.
    pub affinity_seconds: u32,
    /// Which clients its load balancer IPs serve; sorted. Read only where a frontend asks for it; if it is
    /// empty there, they serve none.
    pub source_ranges: Vec<IpRange>,
    /// Every endpoint that deserves a backend row, sorted by address and port.
    pub endpoints: Vec<CompiledEndpoint>,
    /// Sorted by key.
    pub frontends: Vec<CompiledFrontend>,
}

/// An endpoint with the fields of its backend row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompiledEndpoint {
    pub at: SocketAddrx,
    /// One of `abi::backend_state`, never gone.
    pub state: u8,
    /// Bits of `abi::pool_member`.
    pub pools: u8,
    /// Bits of `abi::backend_flag`.
    pub flags: u8,
}

/// A frontend; its pools are named by the set, the family is that of the key's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompiledFrontend {
    pub key: FrontendKey,
    /// Bits of `abi::frontend_flag`.
    pub flags: u8,
    pub inside: PoolUse,
    pub outside: PoolUse,
}

/// Which set a frontend uses, and what a client gets when it is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolUse {
    /// One of `abi::pool_member`.
    pub member: u8,
    /// One of `abi::pool_empty`.
    pub on_empty: u8,
}

/// Compiles one Service. `slices` are its EndpointSlices; their order decides nothing.
pub fn compile(service: &Service, slices: &[&Slice], context: Context) -> Compiled {
    let endpoint_rows = slices.iter().fold(0u32, |sum, slice| sum.saturating_add(fit::endpoint_rows(slice)));
    let fitted = fit::fit(service, endpoint_rows, &context.limits);
    let is_cut = !fitted.left_out.is_empty();
    let mut warnings = fitted.left_out.clone();
    let mut ports: Vec<CompiledPort> = Vec::with_capacity(fitted.ports.len());
    for port in fitted.ports {
        if ports.iter().any(|p| p.name == port.name) {
            warnings.push(format!("port {}: another port has this name already: left out", port_label(port)));
            continue;
        }
        if port.protocol == Protocol::Sctp {
            warnings.push(format!(
                "port {}: SCTP is served for packets of pods and from outside if the endpoints have the Service's \
                 port (its checksum rules out another), but not for the node's own sockets, for which the kernel \
                 has no hook",
                port_label(port)
            ));
        }
        if let Some(others) = names_beside(service, port, slices) {
            warnings.push(format!(
                "Service port {}: no EndpointSlice has a {} port of that name; they have {others}, which the Service does not have",
                port_label(port),
                port.protocol.as_str()
            ));
        }
        ports.push(compile_port(service, &fitted, port, slices, context));
    }
    let warnings = warnings.into_iter().map(|message| service_warning(&service.name, message)).collect();
    Compiled { created: service.created, ports, addresses: addresses(&fitted, context), warnings, is_cut }
}

fn port_label(port: &ServicePort) -> String {
    if port.name.is_empty() { port.port.to_string() } else { port.name.to_string() }
}

/// The ports that slices have endpoints for and the Service does not know, if none is for `port`: somebody who wrote these
/// slices meant another name. A port without endpoints is nothing to warn of, nor are slices without ports: their pods may
/// come and go, each with ports of its own. The control plane's slices name ports as the Service does, or as it did a moment
/// ago.
fn names_beside(service: &Service, port: &ServicePort, slices: &[&Slice]) -> Option<String> {
    let filled = || slices.iter().filter(|slice| !slice.endpoints.is_empty());
    let is_for = |target: &SlicePort, port: &ServicePort| target.name == port.name && target.protocol == port.protocol;
    if filled().any(|slice| slice.ports.iter().any(|target| is_for(target, port))) {
        return None;
    }
    let written = filled().filter(|slice| !slice.is_controlled).flat_map(|slice| &slice.ports);
    let strange = written.filter(|target| !service.ports.iter().any(|port| is_for(target, port)));
    let names: BTreeSet<String> = strange.map(|t| format!("{:?} ({})", &*t.name, t.protocol.as_str())).collect();
    (!names.is_empty()).then(|| names.into_iter().take(NAMED).collect::<Vec<_>>().join(", "))
}

/// The cluster IPs that kubelane serves on this node.
fn cluster_ips<'a>(service: &Fitted<'a>, context: Context<'a>) -> impl Iterator<Item = Ipx> + use<'a> {
    service.cluster_ips.iter().copied().filter(move |ip| !context.bound.contains(ip))
}

fn addresses(service: &Fitted, context: Context) -> Vec<(Ipx, u32)> {
    let vips = service.external_ips.iter().chain(service.load_balancer_ips).map(|ip| (*ip, ADDRESS_SERVICE_VIP));
    let mut all: Vec<(Ipx, u32)> =
        cluster_ips(service, context).map(|ip| (ip, ADDRESS_CLUSTER_IP)).chain(vips).collect();
    all.sort_unstable();
    all.dedup_by(|next, kept| {
        let same = next.0 == kept.0;
        kept.1 |= if same { next.1 } else { 0 };
        same
    });
    all
}

fn compile_port(
    service: &Service,
    fitted: &Fitted,
    port: &ServicePort,
    slices: &[&Slice],
    context: Context,
) -> CompiledPort {
    let mut frontends = frontends(service, fitted, port, context);
    let mut endpoints = Vec::new();
    for family in [Family::Ipv4, Family::Ipv6] {
        let mut every_ip = fitted.cluster_ips.iter().chain(fitted.external_ips).chain(fitted.load_balancer_ips);
        if !every_ip.any(|ip| ip.family() == family) {
            continue;
        }
        let of_family = |f: &&mut CompiledFrontend| f.key.ip().family() == family;
        let needed = frontends.iter_mut().filter(of_family).fold(0, |set, f| set | f.inside.member | f.outside.member);
        let choice = compile_endpoints(port, slices, family, context.place, needed, &mut endpoints);

        // Endpoints elsewhere are enough for a drop: a load balancer moves on, where a refusal would reach the client.
        let on_empty = if choice.local_is_empty && !choice.is_empty { EMPTY_DROP } else { EMPTY_REFUSE };
        for frontend in frontends.iter_mut().filter(of_family) {
            for pool in [&mut frontend.inside, &mut frontend.outside] {
                if u32::from(pool.member) == POOL_LOCAL {
                    pool.on_empty = on_empty as u8;
                }
            }
        }
    }
    keep(&mut endpoints, fitted.endpoints_each);
    endpoints.sort_unstable_by_key(|e| e.at);
    let affinity_seconds = service.affinity_seconds.unwrap_or(0);
    let filters = frontends.iter().any(|f| u32::from(f.flags) & FRONTEND_SOURCE_RANGES != 0);
    let source_ranges = if filters { fitted.source_ranges.clone() } else { Vec::new() };
    CompiledPort {
        name: port.name.clone(),
        protocol: port.protocol,
        affinity_seconds,
        source_ranges,
        endpoints,
        frontends,
    }
}

/// The frontends of one port, sorted by key. One address in two roles is one frontend with both flags: the first role
/// (cluster IP before the others) decides for clients on this node, the last for packets from the wire.
fn frontends(service: &Service, fitted: &Fitted, port: &ServicePort, context: Context) -> Vec<CompiledFrontend> {
    let pool = |policy| {
        let member = if policy == TrafficPolicy::Local { POOL_LOCAL } else { POOL_CLUSTER };
        PoolUse { member: member as u8, on_empty: EMPTY_REFUSE as u8 }
    };
    let internal = pool(service.internal_policy);
    let (cluster, external) = (pool(TrafficPolicy::Cluster), pool(service.external_policy));
    let hide = |is_hidden: bool| if is_hidden { FRONTEND_SOURCE_NODE } else { 0 };
    let client_source = service.client_source.unwrap_or(context.masquerade.external);
    let hidden = hide(client_source == ClientSource::Node && service.external_policy == TrafficPolicy::Cluster);
    let mut all = Vec::new();
    let mut add = |ip: Ipx, number: u16, flag: u32, inside: PoolUse, outside: PoolUse| {
        all.push(CompiledFrontend {
            key: FrontendKey::new(ip, number, port.protocol),
            flags: flag as u8,
            inside,
            outside,
        });
    };
    for ip in cluster_ips(fitted, context) {
        add(ip, port.port, FRONTEND_CLUSTER_IP | hide(context.masquerade.all), internal, internal);
    }
    for ip in fitted.external_ips {
        add(*ip, port.port, FRONTEND_EXTERNAL_IP | hidden, cluster, external);
    }
    for ip in fitted.load_balancer_ips {
        // A list without a range of this family leaves the family open (kube-proxy).
        let is_filtered = service.source_ranges.iter().any(|range| range.ip.family() == ip.family());
        let filter = if is_filtered { FRONTEND_SOURCE_RANGES | node_admitted(fitted, context) } else { 0 };
        add(*ip, port.port, FRONTEND_LOAD_BALANCER | filter | hidden, cluster, external);
    }
    if port.node_port != 0 && fitted.node_ports {
        for family in [Family::Ipv4, Family::Ipv6] {
            if service.cluster_ips.iter().any(|ip| ip.family() == family) {
                add(Ipx::any(family), port.node_port, FRONTEND_NODE_PORT | hidden, cluster, external);
            }
        }
    }
    all.sort_by_key(|f| f.key);
    all.dedup_by(|next, kept| {
        let same = next.key == kept.key;
        if same {
            kept.flags |= next.flags;
            kept.outside = next.outside;
        }
        same
    });
    all
}

/// Whether the node's own processes are clients that the source ranges admit.
fn node_admitted(service: &Fitted, context: Context) -> u32 {
    let admits = |range: &IpRange| context.internal_ips.iter().any(|ip| range.contains(*ip));
    if service.source_ranges.iter().any(admits) { FRONTEND_NODE_ADMITTED } else { 0 }
}

/// Leaves out what is too much: those that get no new connections first, those of this node last.
fn keep(endpoints: &mut Vec<CompiledEndpoint>, most: usize) {
    if endpoints.len() > most {
        endpoints.sort_unstable_by_key(|e| (e.pools == 0, u32::from(e.pools) & POOL_LOCAL == 0, e.at));
        endpoints.truncate(most);
    }
}

/// The endpoints of one Service port and family, each address and port once.
pub fn candidates<'a>(port: &ServicePort, slices: &[&'a Slice], family: Family, place: Place) -> Vec<Candidate<'a>> {
    let mut candidates = Vec::with_capacity(slices.iter().map(|s| s.endpoints.len()).sum());
    for slice in slices {
        for target in slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol) {
            let endpoints = slice.endpoints.iter().filter(|e| e.ip.family() == family);
            candidates.extend(endpoints.map(|endpoint| Candidate::new(endpoint, target.port, place)));
        }
    }
    merge_duplicates(&mut candidates);
    candidates
}

/// Adds the usable endpoints of one family, and says what they decide together.
fn compile_endpoints(
    port: &ServicePort,
    slices: &[&Slice],
    family: Family,
    place: Place,
    needed: u8,
    into: &mut Vec<CompiledEndpoint>,
) -> Choice {
    let candidates = candidates(port, slices, family, place);
    let choice = choose(&candidates, place);
    let usable = candidates.iter().filter(|candidate| candidate.is_usable());
    into.extend(usable.map(|candidate| compile_endpoint(candidate, choice, place, needed)));
    choice
}

/// A usable endpoint, as its backend row has it.
pub fn compile_endpoint(candidate: &Candidate, choice: Choice, place: Place, needed: u8) -> CompiledEndpoint {
    let state = if candidate.ready { backend_state::BACKEND_ACTIVE } else { backend_state::BACKEND_TERMINATING };
    let flags = if candidate.node_local { backend_flag::BACKEND_NODE_LOCAL } else { 0 };
    let pools = choice.sets(candidate, place, needed.into());
    CompiledEndpoint { at: candidate.at, state: state as u8, pools, flags: flags as u8 }
}

#[cfg(test)]
#[path = "compile_tests.rs"]
mod tests;
