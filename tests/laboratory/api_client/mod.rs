//! An API server, as a user of it: objects are made, replaced and deleted by HTTP requests, in a namespace of this run.
//! For a real server or the tests' double.

pub mod connection;
mod relay;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use futures::{StreamExt as _, TryStreamExt as _};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::laboratory::lab::Place;
use connection::{AT_ONCE, Connection};

/// A client of the server. What it made is deleted when it is dropped, also by a panic.
pub struct Api {
    /// Of this run.
    pub namespace: String,
    /// The suffix of names that have no namespace.
    pub run: String,
    connection: Arc<Connection>,
    kubeconfig: Value,
    runtime: Runtime,
}

/// A runtime for a client, on which a double can be served, too.
pub fn runtime() -> anyhow::Result<Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?)
}

impl Api {
    /// A client of the server that `kubeconfig` leads to. Fails when the namespace cannot be made.
    pub fn open(runtime: Runtime, kubeconfig: Value, namespace: String, run: &str) -> anyhow::Result<Api> {
        let connection = Connection::open(&runtime, &kubeconfig)?;
        let api = Api { namespace, run: run.into(), connection, kubeconfig, runtime };
        let object = json!({"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": api.namespace}});
        let made = api.connection.create("/api/v1/namespaces", &object);
        made.map_err(|status| anyhow::anyhow!("the namespace: {status}"))?;
        Ok(api)
    }

    /// Creates or replaces an object; as the server has it now, or the status of a refusal.
    pub fn put(&self, mut object: Value) -> Result<Value, u16> {
        let all = self.collection(&object);
        let one = format!("{all}/{}", object["metadata"]["name"].as_str().expect("a name"));
        self.place(&mut object);
        match self.connection.call("GET", &one, "", None) {
            Ok(old) => {
                object["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"].clone();
                self.connection.call("PUT", &one, "application/json", Some(&object))
            }
            Err(404) => self.connection.create(&all, &object),
            Err(status) => Err(status),
        }
    }

    /// Changes fields of an object, by a merge patch; `part` is empty or `/status`.
    pub fn patch(&self, object: &Value, part: &str, patch: &Value) {
        let path =
            format!("{}/{}{part}", self.collection(object), object["metadata"]["name"].as_str().expect("a name"));
        self.connection
            .call("PATCH", &path, "application/merge-patch+json", Some(patch))
            .expect("the server takes a patch");
    }

    /// Deletes an object if it is there.
    pub fn delete(&self, object: &Value) {
        let path = format!("{}/{}", self.collection(object), object["metadata"]["name"].as_str().expect("a name"));
        self.connection.delete(&path);
    }

    /// Writes a kubeconfig with which a daemon in `place` reaches the server.
    pub fn write_kubeconfig(&self, place: &Place, path: &Path) {
        let mut config = self.kubeconfig.clone();
        let context = self.kubeconfig["contexts"]
            .as_array()
            .and_then(|contexts| contexts.iter().find(|context| context["name"] == config["current-context"]).cloned());
        let wanted = context.expect("the kubeconfig has a current context")["context"]["cluster"].clone();
        let clusters = config["clusters"].as_array_mut().expect("clusters");
        let cluster = clusters.iter_mut().find(|cluster| cluster["name"] == wanted).expect("the context's cluster");
        let server: http::Uri = cluster["cluster"]["server"].as_str().expect("a server").parse().expect("a URL");
        let (scheme, host) = (server.scheme_str().unwrap_or("https"), server.host().expect("a host"));
        let port = server.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
        let at = relay::open(place, format!("{host}:{port}"));
        cluster["cluster"]["server"] = json!(moved(&server, at));
        if scheme == "https" && cluster["cluster"]["tls-server-name"].is_null() {
            cluster["cluster"]["tls-server-name"] = json!(host.trim_matches(['[', ']']));
        }
        std::fs::write(path, config.to_string()).expect("the kubeconfig can be written");
    }

    /// Puts an object into the run's namespace, if it is of a kind that has one.
    fn place(&self, object: &mut Value) {
        if object["kind"] != "Node" {
            object["metadata"]["namespace"] = json!(self.namespace);
        }
    }

    fn collection(&self, object: &Value) -> String {
        match object["kind"].as_str() {
            Some("Service") => format!("/api/v1/namespaces/{}/services", self.namespace),
            Some("EndpointSlice") => {
                format!("/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices", self.namespace)
            }
            Some("Node") => "/api/v1/nodes".into(),
            other => panic!("kind {other:?}"),
        }
    }

    /// Creates new objects, many at once; as the server has them, in the order of `objects`.
    pub fn create_all(&self, objects: Vec<Value>) -> anyhow::Result<Vec<Value>> {
        let make = |mut object: Value| {
            let all = self.collection(&object);
            self.place(&mut object);
            async move {
                let created = self.connection.create_beside(&all, &object).await;
                let what = || format!("{} {}", object["kind"], object["metadata"]["name"]);
                created.map_err(|status| anyhow::anyhow!("{}: {status}", what()))
            }
        };
        let requests = futures::stream::iter(objects).map(make).buffered(AT_ONCE);
        self.runtime.block_on(requests.try_collect())
    }
}

/// The URL of a server that is reached at another address: its path stays (a proxy of many servers has one for each).
pub fn moved(server: &http::Uri, at: SocketAddr) -> String {
    format!("{}://{at}{}", server.scheme_str().unwrap_or("https"), server.path().trim_end_matches('/'))
}

impl Drop for Api {
    fn drop(&mut self) {
        self.connection.finish();
    }
}
