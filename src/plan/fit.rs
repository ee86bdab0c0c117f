//! What a Service asks for, brought down to its quota of the maps. What a cluster needs most stays: cluster IPs before
//! NodePorts, these before load balancer IPs, and external IPs last.

use super::quotas::{Amounts, Resource};
use super::ranges;
use crate::model::{Family, IpRange, Ipx, Service, ServicePort, Slice};

/// A Service as far as it is served.
#[derive(Debug)]
pub struct Fitted<'a> {
    pub ports: &'a [ServicePort],
    pub cluster_ips: &'a [Ipx],
    pub external_ips: &'a [Ipx],
    pub load_balancer_ips: &'a [Ipx],
    pub node_ports: bool,
    /// As the trie needs them. Empty when they do not fit: load balancer IPs with ranges are closed then, not open.
    pub source_ranges: Vec<IpRange>,
    /// Endpoints of each port.
    pub endpoints_each: usize,
    /// What is left out, each with the flag that would help.
    pub left_out: Vec<String>,
}

/// How many rows of each map a Service asks for; `endpoint_rows`: [`endpoint_rows`] of all its slices.
pub fn demand(service: &Service, endpoint_rows: u32) -> Amounts {
    let ports = service.ports.len();
    let addresses = service.cluster_ips.len() + service.external_ips.len() + service.load_balancer_ips.len();
    let ranges = if is_filtered(service) { ranges::disjoint_families(&service.source_ranges).len() } else { 0 };
    let mut rows = Amounts::default();
    let mut ask = |resource: Resource, count: usize| rows[resource as usize] = u32::try_from(count).unwrap_or(u32::MAX);
    ask(Resource::Ports, ports);
    ask(Resource::Frontends, ports.saturating_mul(addresses) + node_port_rows(service, &service.ports));
    ask(Resource::Addresses, addresses);
    ask(Resource::Endpoints, endpoint_rows as usize);
    ask(Resource::SourceRanges, ports.saturating_mul(ranges));
    rows
}

/// The most backends that a slice can come to.
pub fn endpoint_rows(slice: &Slice) -> u32 {
    u32::try_from(slice.endpoints.len().saturating_mul(slice.ports.len())).unwrap_or(u32::MAX)
}

/// `endpoint_rows`: as for [`demand`].
pub fn fit<'a>(service: &'a Service, endpoint_rows: u32, limits: &Amounts) -> Fitted<'a> {
    let limit = |resource: Resource| limits[resource as usize] as usize;
    let mut left_out = Vec::new();
    let fitting = limit(Resource::Ports).min(limit(Resource::Frontends) / service.cluster_ips.len().max(1));
    let ports = &service.ports[..service.ports.len().min(fitting)];
    if ports.len() < service.ports.len() {
        left_out.push(says(&format!("ports beyond the first {}", ports.len()), "--max-services"));
    }
    let (mut rows, mut addresses) = (limit(Resource::Frontends), limit(Resource::Addresses));
    let mut take = |ips: &'a [Ipx], what: &str, rows: &mut usize| {
        let count = ips.len().min(addresses).min(*rows / ports.len().max(1));
        addresses -= count;
        *rows -= count * ports.len();
        if count < ips.len() && !ports.is_empty() {
            left_out.push(says(&format!("{what} beyond the first {count}"), "--max-services"));
        }
        &ips[..count]
    };
    let cluster_ips = take(&service.cluster_ips, "cluster IPs", &mut rows);
    let wanted = node_port_rows(service, ports);
    let node_ports = wanted <= rows;
    rows -= if node_ports { wanted } else { 0 };
    let load_balancer_ips = take(&service.load_balancer_ips, "load balancer IPs", &mut rows);
    let external_ips = take(&service.external_ips, "external IPs", &mut rows);
    if !node_ports {
        left_out.push(says("NodePorts", "--max-services"));
    }
    let mut source_ranges =
        if is_filtered(service) { ranges::disjoint_families(&service.source_ranges) } else { vec![] };
    if source_ranges.len().saturating_mul(ports.len()) > limit(Resource::SourceRanges) {
        source_ranges = Vec::new();
        let what = "loadBalancerSourceRanges, so that its load balancer IPs serve no client outside the node,";
        left_out.push(says(what, "--max-source-ranges"));
    }
    let mut endpoints_each = usize::MAX;
    if endpoint_rows as usize > limit(Resource::Endpoints) {
        endpoints_each = limit(Resource::Endpoints) / ports.len().max(1);
        left_out.push(says(&format!("endpoints beyond {endpoints_each} of each port"), "--max-endpoints"));
    }
    Fitted { ports, cluster_ips, external_ips, load_balancer_ips, node_ports, source_ranges, endpoints_each, left_out }
}

/// Its load balancer IPs ask for source ranges.
fn is_filtered(service: &Service) -> bool {
    let has = |ip: &Ipx| service.source_ranges.iter().any(|range| range.ip.family() == ip.family());
    service.load_balancer_ips.iter().any(has)
}

/// NodePorts have a frontend for each family of the Service.
fn node_port_rows(service: &Service, ports: &[ServicePort]) -> usize {
    let has = |family: &Family| service.cluster_ips.iter().any(|ip| ip.family() == *family);
    let families = [Family::Ipv4, Family::Ipv6].iter().filter(|family| has(family)).count();
    families * ports.iter().filter(|port| port.node_port != 0).count()
}

fn says(what: &str, flag: &str) -> String {
    format!(
        "{what} are left out: they exceed this Service's quota of the maps; use fewer, or start kubelane with a higher \
         {flag}"
    )
}
