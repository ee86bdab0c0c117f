//! What both sources share: the objects as they are written, in an API server's JSON and in files alike (`wire`), how they
//! become records (`convert`), and how a source tells of them (`outlet`, `status`).

pub mod convert;
mod intern;
pub mod outlet;
mod status;
pub mod wire;

pub use status::{SourceStatus, WatchState};

/// What both sources must know about the node and its place among proxies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// `metadata.name` of this node's Node.
    pub node_name: String,
    /// Serve the Services whose label `service.kubernetes.io/service-proxy-name` has this value, instead of those
    /// without the label.
    pub service_proxy_name: Option<String>,
}
