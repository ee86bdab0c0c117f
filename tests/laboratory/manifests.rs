//! Manifests for tests: JSON objects of the Kubernetes API in a directory, each saved as editors do, by rename.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// A directory of manifests. Its methods panic: a test whose set-up fails has failed.
pub struct Manifests {
    pub dir: PathBuf,
}

impl Manifests {
    pub fn new(dir: PathBuf) -> Manifests {
        fs::create_dir_all(&dir).expect("the manifest directory can be made");
        Manifests { dir }
    }

    /// Saves `objects` as one `List` in the file `name`.json, at once.
    pub fn save(&self, name: &str, objects: &[Value]) {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        save_by_rename(&self.dir.join(format!("{name}.json")), &format!("{list:#}"));
    }

    /// Deletes the file `name`.json.
    pub fn delete(&self, name: &str) {
        fs::remove_file(self.dir.join(format!("{name}.json"))).expect("the manifest was there");
    }
}

/// Writes a new file and renames it over the old one. The new file's name begins with a dot, as editors' do.
pub fn save_by_rename(path: &Path, text: &str) {
    let name = path.file_name().and_then(|name| name.to_str()).expect("a file name");
    let fresh = path.with_file_name(format!(".{name}.new"));
    fs::write(&fresh, text).expect("the manifest can be written");
    fs::rename(&fresh, path).expect("the manifest can be renamed");
}

/// The text without the endpoint that has `address`: the list item from its dash to the next line that is not its own.
pub fn without_endpoint(yaml: &str, address: &str) -> String {
    let quoted = format!("\"{address}\"");
    let mut kept = String::new();
    let mut inside = false;
    for line in yaml.lines() {
        if line.starts_with("  - ") || !line.starts_with("    ") {
            inside = line.starts_with("  - addresses:") && line.contains(&quoted);
        }
        if !inside {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    kept
}

/// A v1 Service in the namespace `default`; `spec` is taken as it is.
pub fn service(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"}, "spec": spec})
}

/// One port of a Service: name, protocol, port.
pub fn port(name: &str, protocol: &str, port: u16) -> Value {
    json!({"name": name, "protocol": protocol, "port": port})
}

/// One endpoint for [`slice`].
#[derive(Clone, Debug)]
pub struct Endpoint {
    address: IpAddr,
    node: String,
    conditions: Value,
    hints: Option<Value>,
}

impl Endpoint {
    /// A ready endpoint.
    pub fn ready(address: IpAddr, node: &str) -> Endpoint {
        let conditions = json!({"ready": true, "serving": true, "terminating": false});
        Endpoint { address, node: node.to_owned(), conditions, hints: None }
    }

    /// An endpoint that is shutting down but still answers.
    pub fn terminating(address: IpAddr, node: &str) -> Endpoint {
        let conditions = json!({"ready": false, "serving": true, "terminating": true});
        Endpoint { conditions, ..Endpoint::ready(address, node) }
    }

    /// An endpoint that is not ready and not terminating.
    pub fn unready(address: IpAddr, node: &str) -> Endpoint {
        let conditions = json!({"ready": false, "serving": false, "terminating": false});
        Endpoint { conditions, ..Endpoint::ready(address, node) }
    }

    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// With hints, as the API writes them.
    pub fn hinted(self, hints: Value) -> Endpoint {
        Endpoint { hints: Some(hints), ..self }
    }
}

/// An EndpointSlice of `service`. All endpoints are of one family; ports are (name, protocol, port).
pub fn slice(name: &str, service: &str, ports: &[(&str, &str, u16)], endpoints: &[Endpoint]) -> Value {
    let is_ipv6 = endpoints.first().is_some_and(|endpoint| endpoint.address.is_ipv6());
    let items: Vec<Value> = endpoints
        .iter()
        .map(|endpoint| {
            let mut item = json!({
                "addresses": [endpoint.address],
                "nodeName": endpoint.node,
                "conditions": endpoint.conditions,
            });
            if let Some(hints) = &endpoint.hints {
                item["hints"] = hints.clone();
            }
            item
        })
        .collect();
    let ports: Vec<Value> = ports.iter().map(|(name, protocol, number)| port(name, protocol, *number)).collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": if is_ipv6 { "IPv6" } else { "IPv4" },
        "ports": ports,
        "endpoints": items,
    })
}
