//! The API server of the cases: the tests' double, or the real one that a kubeconfig leads to.

use std::net::Ipv4Addr;
use std::ops::Deref;

use serde_json::{Value, json};

use crate::laboratory::api_client::{self, Api};
use crate::laboratory::apiserver::ApiServer;

/// Names a kubeconfig of a real API server.
const KUBECONFIG: &str = "KUBELANE_TEST_KUBECONFIG";

/// A client of one or the other.
pub struct Server {
    api: Api,
    is_real: bool,
}

impl Server {
    /// The real server, if one is asked for, else a double. Fails when the namespace cannot be made.
    pub fn open(run: &str) -> anyhow::Result<Server> {
        let runtime = api_client::runtime()?;
        let path = std::env::var_os(KUBECONFIG);
        let kubeconfig = match &path {
            Some(path) => serde_norway::from_str(&std::fs::read_to_string(path)?)?,
            None => runtime.block_on(double())?,
        };
        let api = Api::open(runtime, kubeconfig, format!("kubelane-test-{run}"), run)?;
        Ok(Server { api, is_real: path.is_some() })
    }

    pub fn is_real(&self) -> bool {
        self.is_real
    }
}

impl Deref for Server {
    type Target = Api;

    fn deref(&self) -> &Api {
        &self.api
    }
}

/// A double on the machine's loopback device, for as long as the runtime; its kubeconfig.
async fn double() -> anyhow::Result<Value> {
    let server = ApiServer::with_recorded_lists();
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let at = listener.local_addr()?;
    tokio::spawn(server.serve(listener));
    Ok(json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "lab",
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "tester"}}],
        "clusters": [{"name": "lab", "cluster": {"server": format!("http://{at}")}}],
        "users": [{"name": "tester", "user": {"token": "a-token"}}],
    }))
}

#[test]
fn a_server_that_is_reached_by_a_relay_keeps_its_path() {
    let at = "127.0.0.1:4711".parse().unwrap();
    for (server, wanted) in [
        ("https://rancher.example:8443/k8s/clusters/x", "https://127.0.0.1:4711/k8s/clusters/x"),
        ("https://10.0.0.1:6443/", "https://127.0.0.1:4711"),
        ("http://[::1]:8080", "http://127.0.0.1:4711"),
    ] {
        assert_eq!(api_client::moved(&server.parse().unwrap(), at), wanted);
    }
}
