//! The API server, as a user of it: objects are made, replaced and deleted by HTTP requests, in a namespace of this run.

use std::cell::RefCell;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use http_body_util::BodyExt as _;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::apiserver::ApiServer;
use crate::relay;
use crate::support::lab::Place;

/// Names a kubeconfig of a real API server.
const KUBECONFIG: &str = "KUBELANE_TEST_KUBECONFIG";

/// Where the objects are.
pub enum Server {
    Double,
    Real,
}

/// A client of the server. What it made is deleted when it is dropped, also by a panic.
pub struct Api {
    pub server: Server,
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

impl Api {
    /// The real server, if one is asked for, else a double. Fails when the namespace cannot be made.
    pub fn open(run: &str) -> anyhow::Result<Api> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (server, path) = match std::env::var_os(KUBECONFIG) {
            Some(path) => (Server::Real, PathBuf::from(path)),
            None => (Server::Double, PathBuf::new()),
        };
        let kubeconfig = match server {
            Server::Real => serde_norway::from_str(&std::fs::read_to_string(&path)?)?,
            Server::Double => runtime.block_on(double())?,
        };
        let parsed: kube::config::Kubeconfig = serde_json::from_value(kubeconfig.clone())?;
        let client = runtime.block_on(async {
            let config = kube::Config::from_custom_kubeconfig(parsed, &Default::default()).await?;
            Ok::<_, anyhow::Error>(kube::Client::try_from(config)?)
        })?;
        let namespace = format!("kubelane-test-{run}");
        let api = Api { server, namespace, run: run.into(), client, kubeconfig, made: RefCell::default(), runtime };
        let object = json!({"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": api.namespace}});
        api.create("/api/v1/namespaces", &object).map_err(|status| anyhow::anyhow!("the namespace: {status}"))?;
        Ok(api)
    }

    pub fn is_real(&self) -> bool {
        matches!(self.server, Server::Real)
    }

    /// Creates or replaces an object; as the server has it now, or the status of a refusal.
    pub fn put(&self, mut object: Value) -> Result<Value, u16> {
        let all = self.collection(&object);
        let one = format!("{all}/{}", object["metadata"]["name"].as_str().expect("a name"));
        if object["kind"] != "Node" {
            object["metadata"]["namespace"] = json!(self.namespace);
        }
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
        let mut request = http::Request::builder().method(method).uri(path);
        if !content.is_empty() {
            request = request.header(http::header::CONTENT_TYPE, content);
        }
        let bytes = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
        let request = request.body(Body::from(bytes)).expect("a request");
        self.runtime.block_on(async {
            let response = self.client.send(request).await.unwrap_or_else(|error| panic!("{method} {path}: {error}"));
            let status = response.status();
            let bytes = response.into_body().collect().await.expect("a whole answer").to_bytes();
            if !status.is_success() {
                if !matches!((method, status.as_u16()), ("GET" | "DELETE", 404)) {
                    println!("{method} {path}: {status}: {}", String::from_utf8_lossy(&bytes));
                }
                return Err(status.as_u16());
            }
            Ok(serde_json::from_slice(&bytes).expect("JSON"))
        })
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        // The last first: the namespace goes when nothing is in it.
        for path in self.made.take().into_iter().rev() {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.remove(&path)));
            if outcome.is_err() {
                eprintln!("{path} was not deleted");
            }
        }
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
