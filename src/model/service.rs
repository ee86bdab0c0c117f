//! Services: what a frontend is asked to be.

use std::fmt;
use std::sync::Arc;

use super::{ClientSource, IpRange, Ipx};

/// `metadata.namespace` and `metadata.name`. Cheap to clone: both strings are shared.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectName {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl ObjectName {
    pub fn new(namespace: &str, name: &str) -> Self {
        ObjectName { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Transport protocols of the Service API, with their IP protocol numbers (IANA).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Protocol {
    Tcp = 6,
    Udp = 17,
    Sctp = 132,
}

impl Protocol {
    /// By IP protocol number; `None`: no Service has it.
    pub fn of_number(number: u8) -> Option<Protocol> {
        [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|protocol| *protocol as u8 == number)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        }
    }
}

/// `internalTrafficPolicy` and `externalTrafficPolicy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TrafficPolicy {
    #[default]
    Cluster,
    Local,
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// `name`; empty when the Service has one unnamed port. Slices are matched by it.
    pub name: Arc<str>,
    pub protocol: Protocol,
    /// Host order, never 0.
    pub port: u16,
    /// Host order; 0 means none.
    pub node_port: u16,
}

/// A Service that a proxy serves: never ExternalName, never headless, already filtered by selector.
/// Every list keeps the object's order and is free of duplicates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub name: ObjectName,
    /// `metadata.creationTimestamp`, Unix seconds; `i64::MAX` when absent (files). Decides who owns a contested frontend.
    pub created: i64,
    /// Both families may be present; each is its own address.
    pub cluster_ips: Vec<Ipx>,
    /// `spec.externalIPs`, only families the Service has.
    pub external_ips: Vec<Ipx>,
    /// `status.loadBalancer.ingress[].ip` with ipMode absent or VIP, only families the Service has.
    pub load_balancer_ips: Vec<Ipx>,
    pub ports: Vec<ServicePort>,
    /// `Some(seconds)` for ClientIP affinity, 1..=86400.
    pub affinity_seconds: Option<u32>,
    pub internal_policy: TrafficPolicy,
    pub external_policy: TrafficPolicy,
    /// `spec.loadBalancerSourceRanges`, trimmed. Applies to `load_balancer_ips`, by family.
    pub source_ranges: Vec<IpRange>,
    /// 0 means none.
    pub health_check_node_port: u16,
    /// The annotation `kubelane.io/cluster-policy-source`.
    pub client_source: Option<ClientSource>,
}
