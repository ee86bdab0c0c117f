//! What a proxy writes: Events, and the taints of its Node. What users write is in `objects.rs`.

use std::sync::Arc;

use axum::body::Body;
use http::Response;
use serde_json::{Value, json};

use super::respond::response;
use super::{ApiServer, Resource, State, key};

impl ApiServer {
    /// A request for one object, or one that changes something.
    pub(super) fn write(&self, head: &http::request::Parts, body: &[u8]) -> std::io::Result<Response<Body>> {
        let mut state = self.lock();
        if state.down {
            return Err(std::io::ErrorKind::ConnectionRefused.into());
        }
        if head.method != http::Method::GET {
            state.writes.push(tokio::time::Instant::now());
        }
        let content = head.headers.get("content-type").and_then(|v| v.to_str().ok()).unwrap_or_default();
        let steps: Vec<&str> = head.uri.path().split('/').skip(1).collect();
        if head.method != http::Method::GET
            && let Some(status) = state.write_failures.pop_front()
        {
            return Ok(failure(status, "as the test wants it"));
        }
        let sent = || serde_json::from_slice::<Value>(body).expect("a body in JSON");
        if content != "application/json-patch+json" {
            drop(state);
            if let Some(response) = self.object(head.method.as_str(), &steps, body) {
                return Ok(response);
            }
            state = self.lock();
        }
        Ok(match (head.method.as_str(), steps.as_slice(), content) {
            ("POST", ["apis", "events.k8s.io", "v1", "namespaces", namespace, "events"], "application/json") => {
                state.create_event(namespace, sent())
            }
            (
                "PATCH",
                ["apis", "events.k8s.io", "v1", "namespaces", namespace, "events", name],
                "application/merge-patch+json",
            ) => state.merge_event(namespace, name, &sent()),
            ("PATCH", ["api", "v1", "nodes", name], "application/json-patch+json") => state.patch_node(name, &sent()),
            _ => failure(405, "this double does not know that"),
        })
    }
}

impl ApiServer {
    pub(super) fn version(&self) -> Response<Body> {
        let now = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(self.lock().ahead);
        let mut answer = response(200, json!({"major": "1", "minor": "36", "gitVersion": "v1.36.2"}).to_string());
        let date = jiff::fmt::rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&now).expect("a date");
        answer.headers_mut().insert("date", date.parse().expect("a header's value"));
        answer
    }

    /// Whether the account that asks has a right.
    pub(super) fn review(&self, body: &[u8]) -> Response<Body> {
        let mut review: Value = serde_json::from_slice(body).expect("a body in JSON");
        let asked = &review["spec"]["resourceAttributes"];
        let text = |field: &str| asked[field].as_str().expect("an attribute");
        let is_denied = self.lock().denied.contains(&format!("{} {}", text("verb"), text("resource")));
        review["status"] = json!({"allowed": !is_denied});
        response(201, review.to_string())
    }
}

impl State {
    /// With the rules of the API server that a client may break (validation of events.k8s.io/v1).
    fn create_event(&mut self, namespace: &str, mut event: Value) -> Response<Body> {
        let text = |field: &Value| field.as_str().unwrap_or_default().to_owned();
        let regarding = text(&event["regarding"]["namespace"]);
        let belongs = if regarding.is_empty() { "default" } else { &regarding };
        let required = ["reportingController", "reportingInstance", "action", "reason", "eventTime"];
        if let Some(field) = required.iter().find(|field| text(&event[**field]).is_empty()) {
            return failure(422, &format!("{field} is required"));
        }
        if belongs != namespace || text(&event["note"]).len() > 1024 || text(&event["metadata"]["name"]).is_empty() {
            return failure(422, "namespace, note or name");
        }
        event["metadata"]["namespace"] = json!(namespace);
        if self.events.iter().any(|known| key(known) == key(&event)) {
            return failure(409, "it exists");
        }
        self.events.push(event.clone());
        response(201, event.to_string())
    }

    fn merge_event(&mut self, namespace: &str, name: &str, patch: &Value) -> Response<Body> {
        let is = |event: &&mut Value| key(event) == format!("{namespace}/{name}");
        let Some(event) = self.events.iter_mut().find(is) else { return failure(404, "no such Event") };
        for (field, value) in patch.as_object().into_iter().flatten() {
            if field != "metadata" {
                event[field] = value.clone();
            }
        }
        response(200, event.to_string())
    }

    /// Tests and removals of list items, all or none.
    fn patch_node(&mut self, name: &str, patch: &Value) -> Response<Body> {
        let place = (Resource::Nodes, format!("/{name}"));
        let Some(before) = self.objects.get(&place).cloned() else { return failure(404, "no such Node") };
        let mut node = (*before).clone();
        for step in patch.as_array().expect("a list of operations") {
            let path = step["path"].as_str().expect("a path");
            match step["op"].as_str() {
                Some("test") if node.pointer(path) == Some(&step["value"]) => {}
                Some("test") => return failure(422, "the test failed"),
                Some("remove") => {
                    let (list, index) = path.rsplit_once('/').expect("a path of several steps");
                    let list = node.pointer_mut(list).and_then(Value::as_array_mut).expect("a list");
                    list.remove(index.parse().expect("an index"));
                }
                other => panic!("operation {other:?}"),
            }
        }
        self.version += 1;
        node["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let node = Arc::new(node);
        self.objects.insert(place, Arc::clone(&node));
        self.record(Resource::Nodes, Some(before), Some(Arc::clone(&node)));
        response(200, node.to_string())
    }
}

pub(super) fn failure(status: u16, message: &str) -> Response<Body> {
    let object = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": status});
    response(status, object.to_string())
}
