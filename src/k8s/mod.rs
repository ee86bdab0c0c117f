//! The Kubernetes source: watches Services, EndpointSlices and this node's Node, and says what it sees as domain
//! changes. Kubernetes types stop in this module.

mod certificate;
mod client;
mod connect;
mod envelope;
pub mod events;
mod exec;
mod first;
mod follow;
pub mod inquiry;
mod insecure;
mod list;
mod proxy;
mod renewal;
pub mod startup_taint;
mod transport;
mod trouble;
mod watch;

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::mpsc;

pub use client::config;
pub use connect::client;
pub use renewal::renewing;

use crate::model::{Change, Notice};
use crate::objects::{Settings, SourceStatus, wire};

/// The API server, as the rest of the daemon knows it.
#[derive(Clone)]
pub struct ApiServer(kube::Client);

impl ApiServer {
    /// Reads the configuration ([`config`]); the server itself need not answer yet.
    ///
    /// # Errors
    /// When the kubeconfig or the service account cannot be used.
    pub async fn configured(kubeconfig: Option<PathBuf>, master: Option<String>) -> anyhow::Result<Self> {
        let address = config(kubeconfig.as_deref(), master.as_deref()).await?.cluster_url;
        tracing::info!("source: the API server at {address}");
        Ok(ApiServer(renewing(kubeconfig, master).await?))
    }

    /// As [`run`].
    pub async fn follow(self, settings: Settings, changes: mpsc::Sender<Change>, status: Arc<SourceStatus>) {
        run(self.0, settings, changes, status).await;
    }

    /// As [`events::run`].
    pub async fn post(self, node: String, notices: mpsc::Receiver<Notice>) {
        events::run(self.0, node, notices).await;
    }

    /// As [`startup_taint::run`].
    pub async fn take_taint(self, node: String, key: String, tainted: tokio::sync::watch::Receiver<bool>) {
        startup_taint::run(self.0, node, key, tainted).await;
    }
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
