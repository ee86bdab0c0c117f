//! The Kubernetes source on the double, for tests that watch what it says.

use std::sync::Arc;
use std::time::Duration;

use kubelane::k8s;
use kubelane::model::{Change, Kind};
use kubelane::objects::{Settings, SourceStatus};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::ApiServer;
use super::seen::Seen;

pub const KINDS: [Kind; 3] = [Kind::Services, Kind::EndpointSlices, Kind::Node];
/// Virtual time in which anything must have happened.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The Kubernetes source, and what it has said.
pub struct Source {
    pub server: ApiServer,
    pub changes: mpsc::Receiver<Change>,
    pub status: Arc<SourceStatus>,
    pub seen: Seen,
}

impl Source {
    pub fn start(server: ApiServer) -> Self {
        Source::with(server, Settings { node_name: "n1".into(), service_proxy_name: None })
    }

    pub fn with(server: ApiServer, settings: Settings) -> Self {
        let (sender, changes) = mpsc::channel(16);
        let status = Arc::new(SourceStatus::default());
        tokio::spawn(k8s::run(server.client(), settings, sender, status.clone()));
        Source { server, changes, status, seen: Seen::default() }
    }

    pub async fn until(&mut self, what: &str, done: impl Fn(&Seen) -> bool) {
        self.seen.until(&mut self.changes, PATIENCE, what, done).await;
    }

    pub async fn listed(&mut self) {
        self.until("all lists are complete", |seen| KINDS.iter().all(|k| seen.lists(*k) > 0)).await;
    }

    pub async fn settle(&mut self, seconds: u64) {
        self.seen.settle(&mut self.changes, Duration::from_secs(seconds)).await;
    }
}

pub fn service(name: &str, cluster_ip: &str) -> Value {
    json!({
        "kind": "Service", "apiVersion": "v1",
        "metadata": {"namespace": "test", "name": name},
        "spec": {"clusterIP": cluster_ip, "clusterIPs": [cluster_ip], "type": "ClusterIP",
                 "ports": [{"port": 80, "protocol": "TCP"}]},
    })
}
