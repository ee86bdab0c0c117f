//! What a user writes: Services, EndpointSlices and Nodes, with what the real server adds to a Service (cluster IPs of
//! both families, node ports, a port for health checks) and what it refuses (node ports that are taken or out of range).

use axum::body::Body;
use http::Response;
use serde_json::{Value, json};

use super::respond::response;
use super::write::failure;
use super::{ApiServer, Resource, State, key};

/// `--service-node-port-range` as it is by default.
const NODE_PORTS: std::ops::RangeInclusive<u64> = 30_000..=32_767;

impl ApiServer {
    /// A request for an object of a namespace, or for a Node as a whole; `None` when it is none of these.
    pub(super) fn object(&self, method: &str, steps: &[&str], body: &[u8]) -> Option<Response<Body>> {
        let sent = || serde_json::from_slice::<Value>(body).expect("a body in JSON");
        let (resource, namespace, rest) = match steps {
            ["api", "v1", "namespaces"] => return Some(response(201, sent().to_string())),
            ["api", "v1", "namespaces", namespace] => return Some(self.delete_namespace(namespace)),
            ["api", "v1", "namespaces", namespace, "services", rest @ ..] => (Resource::Services, *namespace, rest),
            ["apis", "discovery.k8s.io", "v1", "namespaces", namespace, "endpointslices", rest @ ..] => {
                (Resource::EndpointSlices, *namespace, rest)
            }
            ["api", "v1", "nodes", rest @ ..] => (Resource::Nodes, "", rest),
            _ => return None,
        };
        let name = rest.first().copied().unwrap_or_default();
        let old = self.get(resource, namespace, name);
        Some(match (method, rest, old) {
            ("POST", [], _) => self.save(resource, None, sent(), 201),
            ("GET", [_], Some(old)) => response(200, old.to_string()),
            ("PUT", [_], Some(old)) => self.save(resource, Some(&old), sent(), 200),
            // The status is written for itself, with a merge patch.
            ("PATCH", [_, "status"] | [_], Some(mut old)) => {
                merge(&mut old, &sent());
                self.save(resource, Some(&old.clone()), old, 200)
            }
            ("DELETE", [_], Some(old)) => {
                self.delete(resource, namespace, name);
                response(200, old.to_string())
            }
            _ => failure(404, "no such object"),
        })
    }

    fn save(&self, resource: Resource, old: Option<&Value>, mut new: Value, status: u16) -> Response<Body> {
        let place = (resource, key(&new));
        if old.is_none() && self.lock().objects.contains_key(&place) {
            return failure(409, "it is there already");
        }
        if let Some(old) = old {
            // As from a real server: the status has a place of its own, and the time of creation stays.
            new["metadata"]["creationTimestamp"] = old["metadata"]["creationTimestamp"].clone();
            if resource == Resource::Services && new["status"].is_null() {
                new["status"] = old["status"].clone();
            }
        } else {
            new["metadata"]["creationTimestamp"] = json!("2026-01-01T00:00:00Z");
        }
        if resource == Resource::Services
            && let Err(problem) = self.lock().admit_service(old, &mut new)
        {
            return failure(422, &problem);
        }
        self.upsert(new);
        response(status, self.lock().objects[&place].to_string())
    }

    fn delete_namespace(&self, namespace: &str) -> Response<Body> {
        let of = |object: &Value| object["metadata"]["namespace"] == namespace;
        let left: Vec<_> = self.lock().objects.iter().filter(|(_, o)| of(o)).map(|(place, _)| place.clone()).collect();
        for (resource, place) in left {
            self.delete(resource, namespace, place.split_once('/').expect("a namespace and a name").1);
        }
        response(200, json!({"kind": "Namespace"}).to_string())
    }
}

impl State {
    /// Fills in what the server allots, from the old version where it has it.
    fn admit_service(&mut self, old: Option<&Value>, new: &mut Value) -> Result<(), String> {
        let old = old.map_or(json!({}), |old| old["spec"].clone());
        let place = key(new);
        let spec = &mut new["spec"];
        let kind = spec["type"].as_str().unwrap_or("ClusterIP").to_owned();
        spec["type"] = json!(kind);
        if kind == "ExternalName" {
            for field in ["clusterIP", "clusterIPs", "ipFamilies", "healthCheckNodePort"] {
                spec.as_object_mut().expect("a spec").remove(field);
            }
            return Ok(());
        }
        if spec["clusterIP"].as_str().is_none_or(str::is_empty) {
            if old["clusterIP"].is_string() {
                (spec["clusterIP"], spec["clusterIPs"]) = (old["clusterIP"].clone(), old["clusterIPs"].clone());
            } else {
                let number = self.allot();
                let v4 = format!("10.96.{}.{}", 100 + number / 200, 1 + number % 200);
                let mut ips = vec![v4, format!("fd96::1:{number:x}")];
                if spec["ipFamilyPolicy"] == "SingleStack" {
                    let is_ipv6 = spec["ipFamilies"][0] == "IPv6";
                    ips.retain(|ip| ip.contains(':') == is_ipv6);
                }
                spec["clusterIP"] = json!(ips[0]);
                spec["clusterIPs"] = json!(ips);
            }
        } else if spec["clusterIPs"].is_null() {
            spec["clusterIPs"] = json!([spec["clusterIP"]]);
        }
        let is_exposed = kind != "ClusterIP";
        if kind == "LoadBalancer" && spec["externalTrafficPolicy"] == "Local" {
            let port = old["healthCheckNodePort"].as_u64().unwrap_or_else(|| 32_000 + self.allot() % 700);
            spec["healthCheckNodePort"] = json!(port);
        }
        if is_exposed {
            self.admit_node_ports(&place, &old, spec)?;
        }
        Ok(())
    }

    fn admit_node_ports(&mut self, place: &str, old: &Value, spec: &mut Value) -> Result<(), String> {
        let taken: Vec<(u64, String)> = self
            .objects
            .iter()
            .filter(|((resource, at), _)| *resource == Resource::Services && at != place)
            .flat_map(|(_, object)| object["spec"]["ports"].as_array().into_iter().flatten())
            .filter_map(|port| Some((port["nodePort"].as_u64()?, protocol(port))))
            .collect();
        for port in spec["ports"].as_array_mut().into_iter().flatten() {
            let same = |other: &&Value| other["port"] == port["port"] && protocol(other) == protocol(port);
            let before = old["ports"].as_array().into_iter().flatten().find(same).and_then(|p| p["nodePort"].as_u64());
            let number = match port["nodePort"].as_u64().or(before) {
                Some(number) => number,
                None => 31_000 + self.allot() % 900,
            };
            if !NODE_PORTS.contains(&number) {
                return Err(format!("nodePort {number} is not in the valid range"));
            }
            if taken.contains(&(number, protocol(port))) {
                return Err(format!("nodePort {number} is already allocated"));
            }
            port["nodePort"] = json!(number);
        }
        Ok(())
    }

    fn allot(&mut self) -> u64 {
        self.allotted += 1;
        self.allotted
    }
}

fn protocol(port: &Value) -> String {
    port["protocol"].as_str().unwrap_or("TCP").to_owned()
}

/// RFC 7386.
pub(super) fn merge(into: &mut Value, patch: &Value) {
    let Some(fields) = patch.as_object() else { return *into = patch.clone() };
    if !into.is_object() {
        *into = json!({});
    }
    for (name, value) in fields {
        if value.is_null() {
            into.as_object_mut().expect("an object").remove(name);
        } else {
            merge(&mut into[name.as_str()], value);
        }
    }
}
