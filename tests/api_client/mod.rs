//! An API server, as a user of it: objects are made, replaced and deleted by HTTP requests, in a namespace of this run.
//! For a real server or the tests' double.
// Tests and benches compile this module for themselves and use a part of it.
#![allow(dead_code)]

mod relay;

use std::cell::RefCell;
use std::path::Path;
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use http_body_util::BodyExt as _;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::support::lab::Place;

/// Requests under way at a time when many objects are made or deleted.
const AT_ONCE: usize = 32;
/// How often a server may say that it has too much to do, with a second in between.
const BUSY: u32 = 30;

/// A client of the server. What it made is deleted when it is dropped, also by a panic.
pub struct Api {
    /// Of this run.
    pub namespace: String,
    /// The suffix of names that have no namespace.
    pub run: String,
    client: kube::Client,
    kubeconfig: Value,
    /// Paths of what is to be deleted, in the order in which it was made.
    made: RefCell<Vec<String>>,
    runtime: Runtime,
}

/// A runtime for a client, on which a double can be served, too.
pub fn runtime() -> anyhow::Result<Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?)
}

impl Api {
    /// A client of the server that `kubeconfig` leads to. Fails when the namespace cannot be made.
    pub fn open(runtime: Runtime, kubeconfig: Value, namespace: String, run: &str) -> anyhow::Result<Api> {
        let parsed: kube::config::Kubeconfig = serde_json::from_value(kubeconfig.clone())?;
        let client = runtime.block_on(async {
            let config = kube::Config::from_custom_kubeconfig(parsed, &Default::default()).await?;
            Ok::<_, anyhow::Error>(kube::Client::try_from(config)?)
        })?;
        let api = Api { namespace, run: run.into(), client, kubeconfig, made: RefCell::default(), runtime };
        let object = json!({"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": api.namespace}});
        api.create("/api/v1/namespaces", &object).map_err(|status| anyhow::anyhow!("the namespace: {status}"))?;
        Ok(api)
    }

    /// Creates or replaces an object; as the server has it now, or the status of a refusal.
    pub fn put(&self, mut object: Value) -> Result<Value, u16> {
        let all = self.collection(&object);
        let one = format!("{all}/{}", object["metadata"]["name"].as_str().expect("a name"));
        self.place(&mut object);
        match self.call("GET", &one, "", None) {
            Ok(old) => {
                object["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"].clone();
                self.call("PUT", &one, "application/json", Some(&object))
            }
            Err(404) => self.create(&all, &object),
            Err(status) => Err(status),
        }
    }

    /// Changes fields of an object, by a merge patch; `part` is empty or `/status`.
    pub fn patch(&self, object: &Value, part: &str, patch: &Value) {
        let path =
            format!("{}/{}{part}", self.collection(object), object["metadata"]["name"].as_str().expect("a name"));
        self.call("PATCH", &path, "application/merge-patch+json", Some(patch)).expect("the server takes a patch");
    }

    /// Deletes an object if it is there.
    pub fn delete(&self, object: &Value) {
        let path = format!("{}/{}", self.collection(object), object["metadata"]["name"].as_str().expect("a name"));
        self.remove(&path);
        self.made.borrow_mut().retain(|made| *made != path);
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
        cluster["cluster"]["server"] = json!(format!("{scheme}://{at}"));
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
                let created = self.request("POST", &all, "application/json", Some(&object)).await;
                let name = object["metadata"]["name"].as_str().unwrap_or_default();
                let created = created.map_err(|status| anyhow::anyhow!("{} {name}: {status}", object["kind"]))?;
                self.made.borrow_mut().push(format!("{all}/{name}"));
                Ok(created)
            }
        };
        let requests = futures::stream::iter(objects).map(make).buffered(AT_ONCE);
        self.runtime.block_on(requests.try_collect())
    }

    fn create(&self, all: &str, object: &Value) -> Result<Value, u16> {
        let created = self.call("POST", all, "application/json", Some(object))?;
        let name = object["metadata"]["name"].as_str().expect("a name");
        self.made.borrow_mut().push(format!("{all}/{name}"));
        Ok(created)
    }

    fn remove(&self, path: &str) {
        let outcome = self.call("DELETE", path, "", None);
        assert!(matches!(outcome, Ok(_) | Err(404)), "DELETE {path}: {outcome:?}");
    }

    /// One request. A refusal is a status; anything else that goes wrong ends the test.
    fn call(&self, method: &str, path: &str, content: &str, body: Option<&Value>) -> Result<Value, u16> {
        self.runtime.block_on(self.request(method, path, content, body))
    }

    /// As [`Api::call`]. A server that has too much to do is asked again.
    async fn request(&self, method: &str, path: &str, content: &str, body: Option<&Value>) -> Result<Value, u16> {
        let bytes = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
        let mut patience = BUSY;
        let (status, bytes) = loop {
            let mut request = http::Request::builder().method(method).uri(path);
            if !content.is_empty() {
                request = request.header(http::header::CONTENT_TYPE, content);
            }
            let request = request.body(Body::from(bytes.clone())).expect("a request");
            let response = self.client.send(request).await.unwrap_or_else(|error| panic!("{method} {path}: {error}"));
            if response.status() != http::StatusCode::TOO_MANY_REQUESTS || patience == 0 {
                let status = response.status();
                break (status, response.into_body().collect().await.expect("a whole answer").to_bytes());
            }
            patience -= 1;
            tokio::time::sleep(Duration::from_secs(1)).await;
        };
        if !status.is_success() {
            if !matches!((method, status.as_u16()), ("GET" | "DELETE", 404)) {
                println!("{method} {path}: {status}: {}", String::from_utf8_lossy(&bytes));
            }
            return Err(status.as_u16());
        }
        Ok(serde_json::from_slice(&bytes).expect("JSON"))
    }

    /// Deletes these, many at once, and tells of those that stay.
    fn remove_all(&self, paths: Vec<String>) {
        let remove = |path: String| async move {
            let outcome = self.request("DELETE", &path, "", None).await;
            if !matches!(outcome, Ok(_) | Err(404)) {
                eprintln!("{path} was not deleted");
            }
        };
        let requests = futures::stream::iter(paths).for_each_concurrent(AT_ONCE, remove);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.runtime.block_on(requests)));
        if outcome.is_err() {
            eprintln!("not everything in the namespace {} was deleted", self.namespace);
        }
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        let mut paths = self.made.take();
        // The namespace was made first, and goes when nothing is in it.
        let namespace: Vec<String> = paths.drain(..paths.len().min(1)).collect();
        self.remove_all(paths);
        self.remove_all(namespace);
    }
}
