//! The domain: what kubelane knows of a cluster, free of Kubernetes and of kernel types.
//!
//! Sources (`k8s`, `files`) produce [`Change`]s of these records; `plan` consumes them. Everything is plain data.

mod address;
mod change;
mod datapath;
mod endpoint;
mod notice;
mod probe;
mod service;

pub use address::{Family, IpRange, Ipx, SocketAddrx};
pub use change::{Change, Kind, Warning};
pub use datapath::{ClientSource, FlowTimeouts, ForwardThrough, HostConntrack, Masquerade, SocketLb};
pub use endpoint::{Endpoint, Hints, Slice, SlicePort};
pub use notice::{About, HealthCheck, Notice};
pub use probe::ProbeAnswer;
pub use service::{ObjectName, Protocol, Service, ServicePort, TrafficPolicy};

/// This node, as the API server describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// `metadata.name`.
    pub name: Box<str>,
    /// Label `topology.kubernetes.io/zone`; `None` when absent or empty.
    pub zone: Option<Box<str>>,
    /// `status.addresses` of type InternalIP, in order, both families.
    pub internal_ips: Vec<Ipx>,
    /// Set when the Node has a deletion timestamp or the taint `ToBeDeletedByClusterAutoscaler`.
    pub being_deleted: bool,
    /// Keys of `spec.taints`.
    pub taints: Box<[Box<str>]>,
}
