//! The rules that kube-proxy 1.36 would write on a node, as text for `iptables-restore`, `ip6tables-restore` and
//! `nft -f`: what kubelane is compared with, in answers and in speed.
//!
//! Independent of kubelane on purpose: neither its types nor its choice of endpoints are used here, so that a mistake
//! in them shows up as a difference. Facts are from kubernetes/kubernetes, `pkg/proxy/{iptables,nftables}/proxier.go`
//! and `pkg/proxy/topology.go`. Topology hints and SCTP are left out.

pub mod iptables;
pub mod load;
pub mod nftables;

use std::net::{IpAddr, SocketAddr};

use data_encoding::BASE32;
use ipnet::IpNet;
use sha2::{Digest as _, Sha256};

/// The mark on packets that shall get the node's address as their source.
const MASQUERADE_MARK: &str = "0x4000";

/// Every rule set is of one family, as kube-proxy's are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

pub const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

impl Family {
    pub fn has(self, address: IpAddr) -> bool {
        address.is_ipv6() == (self == Family::V6)
    }

    /// Those of `addresses` that are of this family.
    fn of(self, addresses: &[IpAddr]) -> impl Iterator<Item = IpAddr> {
        addresses.iter().copied().filter(move |address| self.has(*address))
    }
}

/// What a node's kube-proxy knows.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// Ranges whose clients count as pods of this node, at most one of a family: `--cluster-cidr`, or with
    /// `detectLocalMode: NodeCIDR` the node's own. Without one, kube-proxy takes no client for a pod.
    pub pods: Vec<IpNet>,
    /// The node's primary addresses.
    pub node: Vec<IpAddr>,
    pub services: Vec<ServicePort>,
}

impl World {
    fn pods(&self, family: Family) -> Option<&IpNet> {
        self.pods.iter().find(|range| family.has(range.addr()))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Protocol {
    #[default]
    Tcp,
    Udp,
}

impl Protocol {
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }
}

/// One port of a Service. Lists may mix families; each rule set takes its own.
#[derive(Clone, Debug, Default)]
pub struct ServicePort {
    pub namespace: String,
    pub name: String,
    /// Name of the port; may be empty.
    pub port_name: String,
    pub protocol: Protocol,
    pub cluster_ips: Vec<IpAddr>,
    pub port: u16,
    /// 0 means none.
    pub node_port: u16,
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` with ipMode VIP.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges`.
    pub source_ranges: Vec<IpNet>,
    /// Seconds of ClientIP affinity.
    pub affinity: Option<u32>,
    /// internalTrafficPolicy is Local.
    pub internal_local: bool,
    /// externalTrafficPolicy is Local.
    pub external_local: bool,
    /// 0 means none.
    pub health_check_node_port: u16,
    pub endpoints: Vec<Endpoint>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    pub at: SocketAddr,
    /// Runs on the node that the rules are for.
    pub is_local: bool,
    pub state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    Ready,
    /// Terminating, but still serving.
    Leaving,
    /// Neither ready nor serving.
    Useless,
}

/// The endpoints of one family, by what they are for, and the consequences. The lists are in the order of the input.
struct Choice {
    /// For traffic policy Cluster.
    cluster: Vec<Endpoint>,
    /// For traffic policy Local.
    local: Vec<Endpoint>,
}

/// The ready ones, or else the serving ones that terminate.
fn best(endpoints: Vec<Endpoint>) -> Vec<Endpoint> {
    let in_state = |state| endpoints.iter().copied().filter(|e| e.state == state).collect::<Vec<_>>();
    let ready = in_state(State::Ready);
    if ready.is_empty() { in_state(State::Leaving) } else { ready }
}

impl ServicePort {
    fn choice(&self, family: Family) -> Choice {
        let all: Vec<Endpoint> = self.endpoints.iter().copied().filter(|e| family.has(e.at.ip())).collect();
        let local = all.iter().copied().filter(|e| e.is_local).collect();
        Choice { cluster: best(all), local: best(local) }
    }

    fn is_external(&self, family: Family) -> bool {
        self.node_port != 0 || family.of(&self.external_ips).chain(family.of(&self.load_balancer_ips)).next().is_some()
    }

    /// Traffic policy Cluster applies to something. Clients on the node need it for external addresses even when these
    /// have policy Local.
    fn uses_cluster(&self, family: Family) -> bool {
        !self.internal_local || self.is_external(family)
    }

    fn uses_local(&self, family: Family) -> bool {
        self.internal_local || (self.external_local && self.is_external(family))
    }

    fn source_ranges(&self, family: Family) -> Vec<&IpNet> {
        self.source_ranges.iter().filter(|range| family.has(range.addr())).collect()
    }

    /// The clients that load balancer IPs accept, written as ranges; empty when they accept everyone. When the node is
    /// among them, so is the IP itself, which the node's own connections to it may have as their source.
    fn accepted(&self, family: Family, node: &[IpAddr]) -> Vec<String> {
        let ranges = self.source_ranges(family);
        let mut accepted: Vec<String> = ranges.iter().map(ToString::to_string).collect();
        if family.of(node).any(|address| ranges.iter().any(|range| range.contains(&address))) {
            accepted.extend(family.of(&self.load_balancer_ips).map(|address| address.to_string()));
        }
        accepted
    }

    /// `namespace/name:port`, as comments have it.
    fn title(&self) -> String {
        let colon = if self.port_name.is_empty() { "" } else { ":" };
        format!("{}/{}{colon}{}", self.namespace, self.name, self.port_name)
    }
}

/// The begin of a name's hash that kube-proxy puts into names of chains: `length` characters of base 32.
fn hash(name: &str, length: usize) -> String {
    let mut text = BASE32.encode(&Sha256::digest(name));
    text.truncate(length);
    text
}

/// A rule set in the making, a line at a time.
#[derive(Default)]
struct Lines(String);

impl Lines {
    fn add(&mut self, line: std::fmt::Arguments) {
        // Writing to a String does not fail.
        let _ = std::fmt::Write::write_fmt(&mut self.0, line);
        self.0.push('\n');
    }
}
