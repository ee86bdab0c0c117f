//! The Kubernetes source: watches Services, EndpointSlices and this node's Node, and says what it sees as domain
//! changes. Kubernetes types stop in this module; the directory source shares its wire types and conversion.

mod backoff;
mod certificate;
mod client;
mod connect;
pub mod convert;
mod envelope;
pub mod events;
mod exec;
mod follow;
pub mod inquiry;
mod insecure;
mod intern;
mod list;
pub mod outlet;
mod proxy;
mod renewal;
pub mod startup_taint;
pub mod status;
mod transport;
mod trouble;
mod watch;
pub mod wire;

use std::sync::Arc;

use tokio::sync::mpsc;

pub use client::config;
pub use connect::client;
pub use renewal::renewing;
pub use status::{SourceStatus, WatchState};

use crate::model::Change;

/// What both sources must know about the node and its place among proxies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// `metadata.name` of this node's Node.
    pub node_name: String,
    /// Serve the Services whose label `service.kubernetes.io/service-proxy-name` has this value, instead of those
    /// without the label.
    pub service_proxy_name: Option<String>,
}

/// Watches until the receiver of `changes` is dropped. Nothing the API server does ends it: every failure is retried
/// with backoff, told once per change of state, and shown in `status`.
pub async fn run(client: kube::Client, settings: Settings, changes: mpsc::Sender<Change>, status: Arc<SourceStatus>) {
    tokio::join!(
        watch::run::<wire::Service>(&client, &settings, &changes, &status.services),
        watch::run::<wire::EndpointSlice>(&client, &settings, &changes, &status.slices),
        watch::run::<wire::Node>(&client, &settings, &changes, &status.node),
    );
}
