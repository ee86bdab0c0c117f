//! What a packet from the wire that belongs to no flow meets, told from the records alone and in the words of the
//! Kubernetes API. Nothing of the daemon's own planning is called: this is the second opinion.

use std::sync::Arc;

use kubelane::model::{Endpoint, Family, IpRange, Ipx, ObjectName, Protocol, Service, ServicePort, TrafficPolicy};

use super::world::{HERE, World, owner};
use crate::wire::{LOCAL4, LOCAL6};

/// A Service port: what session affinity is kept for, and what a backend belongs to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortId {
    pub service: ObjectName,
    pub name: Arc<str>,
    pub protocol: Protocol,
}

/// A pod and its port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    pub ip: Ipx,
    pub port: u16,
    /// Routes lead to it on this node, whatever its node's name: it sees the client's own address.
    pub local: bool,
}

/// What becomes of the packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing of a Service's: passes as it is.
    Untouched,
    /// Answered with port unreachable.
    Refused,
    /// For the reason that this counter is for.
    Dropped(&'static str),
    /// To one of these; the one that the client had before, if `affine` and it is among them.
    Sent { port: PortId, targets: Vec<Target>, affine: bool },
}

/// An endpoint of one Service port.
struct Candidate<'w> {
    target: Target,
    endpoint: &'w Endpoint,
    ready: bool,
    serving_and_terminating: bool,
}

/// What a packet of `client` to `to`, `number` meets.
pub fn verdict(world: &World, client: Ipx, to: Ipx, number: u16, protocol: Protocol, is_reset: bool) -> Verdict {
    let Some((service, port, by)) = served_by(world, to, number, protocol) else { return Verdict::Untouched };
    if is_reset {
        return Verdict::Dropped("dropped_unknown_reset");
    }
    // Source ranges hold for load balancer addresses only, and for the families that they name.
    let of_family = |range: &&IpRange| range.ip.family() == to.family();
    let ranges: Vec<&IpRange> = service.source_ranges.iter().filter(of_family).collect();
    let filtered = by == By::Vip && service.load_balancer_ips.contains(&to) && !ranges.is_empty();
    if filtered && !ranges.iter().any(|range| holds(range, client)) {
        return Verdict::Dropped("dropped_source_range");
    }
    let all = candidates(world, service, port, to.family());
    let targets = match service.external_policy {
        TrafficPolicy::Cluster => near(world, &all),
        TrafficPolicy::Local => local(&all),
    };
    if !targets.is_empty() {
        let port = PortId { service: service.name.clone(), name: port.name.clone(), protocol };
        return Verdict::Sent { port, targets, affine: service.affinity_seconds.is_some() };
    }
    // Elsewhere there are some: silence makes a load balancer try another node.
    if all.iter().any(|c| c.ready || c.serving_and_terminating) {
        return Verdict::Dropped("dropped_no_local_endpoint");
    }
    Verdict::Refused
}

/// Which Service port the address and port belong to at present.
pub fn port_at(world: &World, to: Ipx, number: u16, protocol: Protocol) -> Option<PortId> {
    let (service, port, _) = served_by(world, to, number, protocol)?;
    Some(PortId { service: service.name.clone(), name: port.name.clone(), protocol })
}

/// Whether the pod may still serve the Service port: ready, or serving while it terminates.
pub fn is_usable(world: &World, id: &PortId, ip: Ipx, number: u16) -> bool {
    let Some(service) = world.services.get(&id.service) else { return false };
    let mut addresses = service.cluster_ips.iter().chain(&service.external_ips).chain(&service.load_balancer_ips);
    let Some(port) = service.ports.iter().find(|p| p.name == id.name && p.protocol == id.protocol) else {
        return false;
    };
    addresses.any(|address| address.family() == ip.family())
        && candidates(world, service, port, ip.family())
            .iter()
            .any(|c| (c.target.ip, c.target.port) == (ip, number) && (c.ready || c.serving_and_terminating))
}

/// Whether the Service port keeps clients at their backends.
pub fn is_affine(world: &World, id: &PortId) -> bool {
    let port = |s: &&Service| s.ports.iter().any(|p| p.name == id.name && p.protocol == id.protocol);
    world.services.get(&id.service).filter(port).is_some_and(|s| s.affinity_seconds.is_some())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Vip,
    NodePort,
}

/// The Service port that serves an address and port: of those that claim it the oldest, then the first by name.
fn served_by(world: &World, to: Ipx, number: u16, protocol: Protocol) -> Option<(&Service, &ServicePort, By)> {
    let mut claims: Vec<(&Service, &ServicePort, By)> = Vec::new();
    for service in world.services.values() {
        for port in service.ports.iter().filter(|port| port.protocol == protocol) {
            let is_vip = service.external_ips.contains(&to) || service.load_balancer_ips.contains(&to);
            if is_vip && port.port == number {
                claims.push((service, port, By::Vip));
            }
        }
    }
    if claims.is_empty() && world.nodeport.contains(&to) {
        for service in world.services.values() {
            let has_family = service.cluster_ips.iter().any(|ip| ip.family() == to.family());
            for port in service.ports.iter().filter(|port| port.protocol == protocol) {
                if has_family && port.node_port == number && number != 0 {
                    claims.push((service, port, By::NodePort));
                }
            }
        }
    }
    claims.into_iter().min_by_key(|(service, port, _)| (service.created, service.name.clone(), port.name.clone()))
}

fn candidates<'w>(world: &'w World, service: &Service, port: &ServicePort, family: Family) -> Vec<Candidate<'w>> {
    let mut all: Vec<Candidate> = Vec::new();
    for slice in world.slices.values().filter(|slice| owner(slice) == service.name) {
        for number in slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol) {
            for endpoint in slice.endpoints.iter().filter(|e| e.ip.family() == family) {
                let local = is_pod_of_this_node(endpoint.ip);
                let target = Target { ip: endpoint.ip, port: number.port, local };
                let serving_and_terminating = endpoint.serving && endpoint.terminating;
                match all.iter_mut().find(|c| (c.target.ip, c.target.port) == (target.ip, target.port)) {
                    // Told of twice: the better news counts.
                    Some(known) => {
                        known.ready |= endpoint.ready;
                        known.serving_and_terminating |= serving_and_terminating;
                    }
                    None => all.push(Candidate { target, endpoint, ready: endpoint.ready, serving_and_terminating }),
                }
            }
        }
    }
    all
}

/// The Cluster set: ready endpoints, as hints narrow them; without any, those that serve while they terminate.
fn near(world: &World, all: &[Candidate]) -> Vec<Target> {
    let ready: Vec<&Candidate> = all.iter().filter(|c| c.ready).collect();
    if ready.is_empty() {
        return all.iter().filter(|c| c.serving_and_terminating).map(|c| c.target).collect();
    }
    let nodes = |c: &Candidate| -> Vec<Arc<str>> { c.endpoint.hints.iter().flat_map(|h| h.nodes.to_vec()).collect() };
    let zones = |c: &Candidate| -> Vec<Arc<str>> { c.endpoint.hints.iter().flat_map(|h| h.zones.to_vec()).collect() };
    if ready.iter().all(|c| !nodes(c).is_empty()) {
        let mine: Vec<Target> =
            ready.iter().filter(|c| nodes(c).iter().any(|n| &**n == HERE)).map(|c| c.target).collect();
        if !mine.is_empty() {
            return mine;
        }
    }
    if let Some(zone) = world.zone
        && ready.iter().all(|c| !zones(c).is_empty())
    {
        let mine: Vec<Target> =
            ready.iter().filter(|c| zones(c).iter().any(|z| &**z == zone)).map(|c| c.target).collect();
        if !mine.is_empty() {
            return mine;
        }
    }
    ready.iter().map(|c| c.target).collect()
}

/// The Local set, decided by itself and without hints.
fn local(all: &[Candidate]) -> Vec<Target> {
    let here = || all.iter().filter(|c| c.endpoint.node.as_deref() == Some(HERE));
    if here().any(|c| c.ready) {
        return here().filter(|c| c.ready).map(|c| c.target).collect();
    }
    here().filter(|c| c.serving_and_terminating).map(|c| c.target).collect()
}

/// Of the network that is routed to the pods' device: 16 bits of IPv4, 64 of IPv6.
pub fn is_pod_of_this_node(ip: Ipx) -> bool {
    let prefix = |address: &str| -> usize { if address.contains(':') { 8 } else { 14 } };
    [LOCAL4, LOCAL6].iter().any(|pod| {
        let network = super::world::ip(pod).0;
        ip.0[..prefix(pod)] == network[..prefix(pod)]
    })
}

/// Bit by bit.
fn holds(range: &IpRange, ip: Ipx) -> bool {
    let skipped = if range.ip.family() == Family::Ipv4 { 96 } else { 0 };
    let bit = |ip: Ipx, n: usize| ip.0[n / 8] >> (7 - n % 8) & 1;
    range.ip.family() == ip.family()
        && (skipped..skipped + usize::from(range.prefix)).all(|n| bit(range.ip, n) == bit(ip, n))
}
