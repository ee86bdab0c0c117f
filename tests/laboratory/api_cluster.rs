//! A cluster of the laboratory whose node1 takes its objects from the API server's double, on the loopback device.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::ops::Deref;
use std::path::PathBuf;

use serde_json::json;

use crate::laboratory::apiserver::ApiServer;
use crate::laboratory::client::Counts;
use crate::laboratory::cluster::{Cluster, vip};
use crate::laboratory::daemon::Daemon;
use crate::laboratory::manifests::{port, service, slice};
use crate::laboratory::messages::Kind::Tcp4;

/// A cluster whose node1 can reach an API server. The server's task ends with the runtime.
pub struct ApiCluster {
    cluster: Cluster,
    pub server: ApiServer,
    pub kubeconfig: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Deref for ApiCluster {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        &self.cluster
    }
}

impl ApiCluster {
    /// The recorded objects, this laboratory's node, and the Service `echo` on pods `a` and `b`.
    pub fn or_skip() -> Option<ApiCluster> {
        Cluster::or_skip().map(ApiCluster::on)
    }

    /// The same on any laboratory.
    pub fn on(cluster: Cluster) -> ApiCluster {
        let server = ApiServer::with_recorded_lists();
        let labels = json!({"topology.kubernetes.io/zone": "zone-1"});
        server.upsert(json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": "node1", "labels": labels}}));
        let kubeconfig = cluster.lab.dir.join("kubeconfig");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let cluster = ApiCluster { cluster, server, kubeconfig, runtime };
        cluster.listen();
        cluster.put_service("echo", 10);
        cluster.put_slice("echo", &["a", "b"]);
        cluster
    }

    /// A socket belongs to the namespace in which it was made, whoever serves it.
    fn listen(&self) {
        let host = &self.cluster.lab.node("node1").host;
        let listener = host.inside(|| Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?)).unwrap();
        let at = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        let server = self.server.clone();
        self.runtime.spawn(async move { server.serve(tokio::net::TcpListener::from_std(listener).unwrap()).await });
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "lab",
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "node"}}],
            "clusters": [{"name": "lab", "cluster": {"server": format!("http://{at}")}}],
            "users": [{"name": "node", "user": {"token": "a-token"}}],
        });
        fs::write(&self.kubeconfig, config.to_string()).unwrap();
    }

    pub fn start(&self) -> Daemon<'_> {
        self.start_with(&[])
    }

    /// As [`ApiCluster::start`], with more options.
    pub fn start_with(&self, options: &[&str]) -> Daemon<'_> {
        let kubeconfig = self.kubeconfig.to_str().unwrap();
        Daemon::start_on(&self.cluster.lab, "node1", &["--kubeconfig", kubeconfig], options).expect("the daemon starts")
    }

    pub fn put_service(&self, name: &str, number: u8) {
        let address = vip(number, 0)[0].ip();
        let spec = json!({"clusterIP": address, "clusterIPs": [address], "ports": [port("tcp", "TCP", 90)]});
        self.server.upsert(service(name, spec));
    }

    pub fn put_slice(&self, of: &str, pods: &[&str]) {
        let endpoints: Vec<_> =
            self.cluster.ready(pods).into_iter().filter(|endpoint| endpoint.address().is_ipv4()).collect();
        self.server.upsert(slice(&format!("{of}-1"), of, &[("tcp", "TCP", 9000)], &endpoints));
    }

    pub fn address(&self, pod: &str) -> IpAddr {
        self.cluster.lab.pod(pod).v4.into()
    }

    /// Who answers at the cluster IP of `number`.
    pub fn ask(&self, number: u8) -> Counts {
        self.cluster.client("client").ask(Tcp4, vip(number, 90)[0], 40)
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.cluster.lab.dir.join("node1.log")).unwrap()
    }
}
