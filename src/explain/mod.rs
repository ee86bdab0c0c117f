//! What the daemon tells of itself when it is asked why: the records that go over its socket (`agent/ask.rs` answers,
//! `cli/explain` asks). `plan/explain.rs` fills them with the planner's own decisions.

pub mod recent;
mod socket;
pub mod words;

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::model::{Protocol, TrafficPolicy};
pub use crate::plan::select::{HintsIgnored, LeftOut};
pub use socket::{DIRECTORY, ask, sockets_path};

/// Raised when the records change, so that a daemon and a command of different releases say so instead of guessing.
pub const VERSION: u32 = 1;
/// Of a question, in bytes with its newline.
pub const QUESTION_MAX: usize = 4096;
/// Services that one answer tells of.
pub const SERVICES_MAX: usize = 16;

/// One line of JSON, to which one JSON object is the answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Question {
    /// [`VERSION`].
    pub version: u32,
    pub about: About,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum About {
    /// The Service of this name.
    Service { namespace: String, name: String },
    /// Whatever Service has to do with this address and port.
    Destination { ip: IpAddr, port: u16, protocol: Transport },
    /// The daemon alone: with its arguments, the warnings that hold and its latest log.
    Daemon,
    /// What /metrics has.
    Metrics,
}

/// A transport protocol by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Transport {
    Tcp,
    Udp,
    Sctp,
}

impl From<Protocol> for Transport {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tcp => Transport::Tcp,
            Protocol::Udp => Transport::Udp,
            Protocol::Sctp => Transport::Sctp,
        }
    }
}

impl From<Transport> for Protocol {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Tcp => Protocol::Tcp,
            Transport::Udp => Protocol::Udp,
            Transport::Sctp => Protocol::Sctp,
        }
    }
}

/// The answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// The daemon's [`VERSION`].
    pub version: u32,
    /// Its release.
    pub release: String,
    /// Set when the question could not be answered; the rest is empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    #[serde(default)]
    pub daemon: Daemon,
    /// Sorted by name, [`SERVICES_MAX`] at most.
    #[serde(default)]
    pub services: Vec<Service>,
    /// How many more there are.
    #[serde(default)]
    pub services_left_out: usize,
    /// Of all objects.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// How the daemon was started.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub arguments: Vec<String>,
    /// The latest lines, the oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub log: Vec<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub metrics: String,
}

impl Answer {
    /// Of this release, and empty.
    pub fn new() -> Self {
        Answer { version: VERSION, release: env!("CARGO_PKG_VERSION").to_owned(), ..Answer::default() }
    }
}

/// How the daemon is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Daemon {
    pub node: String,
    pub zone: Option<String>,
    /// Services and EndpointSlices have been listed.
    pub is_ready: bool,
    /// Something that is wanted is not in the kernel yet.
    pub waits: bool,
    /// What is not served on this node, as `/readyz` has it.
    pub unserved: Option<String>,
    /// Seconds since a sync left nothing waiting.
    #[serde(default)]
    pub last_sync_seconds: Option<u64>,
}

/// A Service as the daemon knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    pub namespace: String,
    pub name: String,
    pub internal_policy: Policy,
    pub external_policy: Policy,
    /// 0: no session affinity.
    pub affinity_seconds: u32,
    /// CIDRs.
    pub source_ranges: Vec<String>,
    /// Cluster IPs that are left alone, because a device of the node has them.
    pub left_alone: Vec<IpAddr>,
    /// What holds of the Service now, as in the log.
    pub warnings: Vec<String>,
    /// As they are laid out: those beyond the Service's share are missing.
    pub ports: Vec<Port>,
}

/// A traffic policy by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Policy {
    Cluster,
    Local,
}

impl From<TrafficPolicy> for Policy {
    fn from(policy: TrafficPolicy) -> Self {
        match policy {
            TrafficPolicy::Cluster => Policy::Cluster,
            TrafficPolicy::Local => Policy::Local,
        }
    }
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Port {
    /// Empty when it has none.
    pub name: String,
    pub protocol: Transport,
    pub port: u16,
    pub frontends: Vec<Frontend>,
    /// Of each family that the Service has.
    pub choices: Vec<Choice>,
    /// Sorted by address. Those without a port of the Service port's name are at port 0.
    pub endpoints: Vec<Endpoint>,
}

/// One frontend that the Service port asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Frontend {
    /// The wildcard for a NodePort.
    pub at: SocketAddr,
    /// Bits of `abi::frontend_flag`.
    pub flags: u32,
    pub inside: Pool,
    pub outside: Pool,
    /// "namespace/name:port" of another Service port that has it.
    pub owner: Option<String>,
}

/// Which set a frontend uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pool {
    pub set: Policy,
    /// An empty set drops; else it refuses.
    pub drops: bool,
}

/// What the endpoints of one family decide together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Choice {
    pub is_ipv6: bool,
    pub any_ready: bool,
    pub any_local_ready: bool,
    pub hints: Hints,
}

/// Which hints are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Hints {
    None,
    Ignored(HintsIgnored),
    Nodes,
    Zones,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    pub at: SocketAddr,
    pub node: Option<String>,
    pub state: State,
    /// Why it is not in the Cluster set; `None`: it is.
    pub not_in_cluster: Option<LeftOut>,
    /// Why it is not in the Local set.
    pub not_in_local: Option<LeftOut>,
}

/// An endpoint's conditions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum State {
    Ready,
    /// And still serving.
    Terminating,
    NotReady,
}
