//! What a packet that belongs to no flow meets, from the wire or from a pod of this node, told from the records alone and in
//! the words of the Kubernetes API. Nothing of the daemon's own planning is called: this is the second opinion.

use std::sync::Arc;

use kubelane::model::{Endpoint, Family, IpRange, Ipx, ObjectName, Protocol, Service, ServicePort, TrafficPolicy};

use super::random_cluster::{HERE, RandomCluster, owner};
use crate::laboratory::packets::{LOCAL4, LOCAL6};

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

impl Target {
    pub fn end(&self) -> (Ipx, u16) {
        (self.ip, self.port)
    }
}

/// What a packet asks for, and who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    pub client: Ipx,
    pub to: Ipx,
    pub number: u16,
    pub protocol: Protocol,
    /// By the device of a pod of this node. Else from outside, whoever the client is.
    pub from_pod: bool,
    /// TCP's RST.
    pub is_reset: bool,
}

/// What becomes of the packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing of a Service's: passes as it is.
    Untouched,
    /// Answered with port unreachable, for the reason that this counter is for.
    Refused(&'static str),
    /// The same of a packet that vanishes.
    Dropped(&'static str),
    Sent(Sent),
}

/// To one of the targets; the one that the client had before, if `affine` and it is among them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sent {
    pub port: PortId,
    pub targets: Vec<Target>,
    pub affine: bool,
    /// By which rules they were found.
    pub rules: Vec<&'static str>,
}

/// An endpoint of one Service port.
struct Candidate<'w> {
    target: Target,
    endpoint: &'w Endpoint,
    ready: bool,
    serving_and_terminating: bool,
}

/// What the packet meets.
pub fn verdict(world: &RandomCluster, asked: &Asked) -> Verdict {
    let Some((service, port, by)) = served_by(world, asked) else {
        let is_cluster_ip = world.services.values().any(|service| service.cluster_ips.contains(&asked.to));
        return match (asked.from_pod && is_cluster_ip, asked.is_reset) {
            (false, _) => Verdict::Untouched,
            (true, true) => Verdict::Dropped("dropped_unknown_reset"),
            (true, false) => Verdict::Refused("refused_unknown_port"),
        };
    };
    if asked.is_reset {
        return Verdict::Dropped("dropped_unknown_reset");
    }
    if !is_admitted(service, asked, by) {
        return Verdict::Dropped("dropped_source_range");
    }
    let all = candidates(world, service, port, asked.to.family());
    let set = match policy(service, asked, by) {
        TrafficPolicy::Cluster => near(world, &all),
        TrafficPolicy::Local => local(&all),
    };
    if !set.targets.is_empty() {
        let mut rules = vec![set.rule];
        let is_elsewhere = |target: &Target| !local(&all).targets.contains(target);
        let is_external = by != By::ClusterIp && service.external_policy == TrafficPolicy::Local;
        if asked.from_pod && is_external && set.targets.iter().any(is_elsewhere) {
            rules.push("external policy Local, from inside");
        }
        let port = PortId { service: service.name.clone(), name: port.name.clone(), protocol: asked.protocol };
        let affine = service.affinity_seconds.is_some();
        return Verdict::Sent(Sent { port, targets: set.targets, affine, rules });
    }
    // Elsewhere there are some: silence makes a load balancer try another node.
    if all.iter().any(|c| c.ready || c.serving_and_terminating) {
        return Verdict::Dropped("dropped_no_local_endpoint");
    }
    Verdict::Refused("refused_no_endpoint")
}

/// The internal policy is for cluster IPs alone, the external one for all else that is asked from outside. A client on this
/// node has the Cluster set there.
fn policy(service: &Service, asked: &Asked, by: By) -> TrafficPolicy {
    match (by, asked.from_pod) {
        (By::ClusterIp, _) => service.internal_policy,
        (By::Vip | By::NodePort, true) => TrafficPolicy::Cluster,
        (By::Vip | By::NodePort, false) => service.external_policy,
    }
}

/// Source ranges hold for load balancer addresses only, for the families that they name, and for clients inside as well.
fn is_admitted(service: &Service, asked: &Asked, by: By) -> bool {
    let of_family = |range: &&IpRange| range.ip.family() == asked.to.family();
    let mut ranges = service.source_ranges.iter().filter(of_family).peekable();
    let is_filtered = by == By::Vip && service.load_balancer_ips.contains(&asked.to) && ranges.peek().is_some();
    !is_filtered || ranges.any(|range| holds(range, asked.client))
}

/// Which Service port the address and port belong to at present.
pub fn port_at(world: &RandomCluster, asked: &Asked) -> Option<PortId> {
    let (service, port, _) = served_by(world, asked)?;
    Some(PortId { service: service.name.clone(), name: port.name.clone(), protocol: asked.protocol })
}

/// Whether the pod may still serve the Service port: ready, or serving while it terminates.
pub fn is_usable(world: &RandomCluster, id: &PortId, ip: Ipx, number: u16) -> bool {
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    ClusterIp,
    Vip,
    NodePort,
}

/// The Service port that serves what is asked for: of those that claim it the oldest, then the first by name. Cluster IPs
/// are for clients inside only.
fn served_by<'w>(world: &'w RandomCluster, asked: &Asked) -> Option<(&'w Service, &'w ServicePort, By)> {
    let Asked { to, number, protocol, from_pod, .. } = *asked;
    let mut claims: Vec<(&Service, &ServicePort, By)> = Vec::new();
    for service in world.services.values() {
        for port in service.ports.iter().filter(|port| (port.protocol, port.port) == (protocol, number)) {
            if from_pod && service.cluster_ips.contains(&to) {
                claims.push((service, port, By::ClusterIp));
            } else if service.external_ips.contains(&to) || service.load_balancer_ips.contains(&to) {
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

fn candidates<'w>(
    world: &'w RandomCluster,
    service: &Service,
    port: &ServicePort,
    family: Family,
) -> Vec<Candidate<'w>> {
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

/// Where new connections go, and why there.
struct Set {
    targets: Vec<Target>,
    rule: &'static str,
}

/// The Cluster set: ready endpoints, as hints narrow them; without any, those that serve while they terminate.
fn near(world: &RandomCluster, all: &[Candidate]) -> Set {
    let ready: Vec<&Candidate> = all.iter().filter(|c| c.ready).collect();
    if ready.is_empty() {
        let targets = all.iter().filter(|c| c.serving_and_terminating).map(|c| c.target).collect();
        return Set { targets, rule: "terminating endpoints" };
    }
    let nodes = |c: &Candidate| -> Vec<Arc<str>> { c.endpoint.hints.iter().flat_map(|h| h.nodes.to_vec()).collect() };
    let zones = |c: &Candidate| -> Vec<Arc<str>> { c.endpoint.hints.iter().flat_map(|h| h.zones.to_vec()).collect() };
    if ready.iter().all(|c| !nodes(c).is_empty()) {
        let mine: Vec<Target> =
            ready.iter().filter(|c| nodes(c).iter().any(|n| &**n == HERE)).map(|c| c.target).collect();
        if !mine.is_empty() {
            return Set { targets: mine, rule: "node hints" };
        }
    }
    if let Some(zone) = world.zone
        && ready.iter().all(|c| !zones(c).is_empty())
    {
        let mine: Vec<Target> =
            ready.iter().filter(|c| zones(c).iter().any(|z| &**z == zone)).map(|c| c.target).collect();
        if !mine.is_empty() {
            return Set { targets: mine, rule: "zone hints" };
        }
    }
    Set { targets: ready.iter().map(|c| c.target).collect(), rule: "ready endpoints" }
}

/// The Local set, decided by itself and without hints.
fn local(all: &[Candidate]) -> Set {
    let here = || all.iter().filter(|c| c.endpoint.node.as_deref() == Some(HERE));
    if here().any(|c| c.ready) {
        return Set { targets: here().filter(|c| c.ready).map(|c| c.target).collect(), rule: "local endpoints" };
    }
    let targets = here().filter(|c| c.serving_and_terminating).map(|c| c.target).collect();
    Set { targets, rule: "terminating local endpoints" }
}

/// Of the network that is routed to the pods' device: 16 bits of IPv4, 64 of IPv6.
pub fn is_pod_of_this_node(ip: Ipx) -> bool {
    let prefix = |address: &str| -> usize { if address.contains(':') { 8 } else { 14 } };
    [LOCAL4, LOCAL6].iter().any(|pod| {
        let network = super::random_cluster::ip(pod).0;
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
