//! Objects with every field wrong in turn: all paths of an object that has everything, times all that can stand there. And
//! Services that are right in every field, and ask for more than a node has.

use serde_json::{Value, json};

/// What is put in a field's place, as raw JSON: other types, limits of numbers and text, escapes that are no character.
pub fn wrongs() -> Vec<String> {
    let mut wrongs: Vec<String> = [
        "null",
        "true",
        "-1",
        "0",
        "65536",
        "99999999999999999999999",
        "1e308",
        "1.5",
        "\"\"",
        "\" \"",
        "\"\\u0000\"",
        "\"\\ud800\"",
        "\"\\udfff\\ud800\"",
        "\"\\u202e\\ufeff\"",
        "\"a/b:c\"",
        "\"256.1.1.1\"",
        "\"0.0.0.0\"",
        "\"fe80::1%eth0\"",
        "\"10.0.0.0/33\"",
        "\"9999-99-99T99:99:99Z\"",
        "[]",
        "[null]",
        "[[]]",
        "[\"\"]",
        "{}",
        "{\"\":null}",
        "[{}]",
    ]
    .map(str::to_owned)
    .into();
    wrongs.push(format!("\"{}\"", "x".repeat(20_000)));
    wrongs.push(format!("[{}1]", "1,".repeat(2000)));
    // Deeper than any parser that calls itself would go.
    wrongs.push(format!("{}{}", "[".repeat(2000), "]".repeat(2000)));
    wrongs
}

/// A Service, an EndpointSlice and a Node in which every field that a proxy reads is set.
pub fn whole_objects() -> [Value; 3] {
    let service = json!({
        "kind": "Service", "apiVersion": "v1",
        "metadata": {
            "name": "victim", "namespace": "test", "resourceVersion": "7", "creationTimestamp": "2026-01-01T00:00:00Z",
            "deletionTimestamp": null, "labels": {"app": "victim"}, "annotations": {"note": "x"},
        },
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.88.8", "clusterIPs": ["10.96.88.8", "fd96::888"],
            "ipFamilies": ["IPv4", "IPv6"], "externalIPs": ["192.0.2.88", "2001:db8::88"],
            "ports": [
                {"name": "http", "protocol": "TCP", "port": 80, "nodePort": 30888, "targetPort": 8080},
                {"name": "dns", "protocol": "UDP", "port": 53, "nodePort": 30889, "appProtocol": "dns"},
            ],
            "sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}},
            "internalTrafficPolicy": "Cluster", "externalTrafficPolicy": "Local",
            "loadBalancerSourceRanges": ["203.0.113.0/24", "2001:db8::/32"], "healthCheckNodePort": 32888,
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.89", "ipMode": "VIP"}, {"hostname": "x.example"}]}},
    });
    let slice = json!({
        "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1",
        "metadata": {
            "name": "victim-1", "namespace": "test", "resourceVersion": "7",
            "labels": {"kubernetes.io/service-name": "victim"},
            "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:00.5Z"},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}, {"name": "dns", "protocol": "UDP", "port": 53}],
        "endpoints": [
            {
                "addresses": ["10.244.8.8"], "nodeName": "n1", "zone": "z",
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "hints": {"forZones": [{"name": "z"}], "forNodes": [{"name": "n1"}]},
            },
            {"addresses": ["10.244.8.9"], "conditions": {"ready": false, "serving": true, "terminating": true}},
        ],
    });
    let node = json!({
        "kind": "Node", "apiVersion": "v1",
        "metadata": {"name": "n1", "resourceVersion": "7", "labels": {"topology.kubernetes.io/zone": "z"}},
        "spec": {"taints": [{"key": "k", "effect": "NoSchedule"}], "podCIDRs": ["10.244.1.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "172.31.0.11"}]},
    });
    [service, slice, node]
}

/// Every path into a value, itself left out.
fn paths(value: &Value, prefix: &str, into: &mut Vec<String>) {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(fields) => {
            let escape = |name: &String| name.replace('~', "~0").replace('/', "~1");
            fields.iter().map(|(name, child)| (format!("{prefix}/{}", escape(name)), child)).collect()
        }
        Value::Array(items) => items.iter().enumerate().map(|(n, child)| (format!("{prefix}/{n}"), child)).collect(),
        _ => return,
    };
    for (path, child) in children {
        paths(child, &path, into);
        into.push(path);
    }
}

/// The object as text, with each field in turn replaced by everything wrong. The version stays, because a watch hangs on
/// it; what a wrong one does has a test of its own.
pub fn mutants(object: &Value) -> Vec<String> {
    const MARK: &str = "@here@";
    let mut all = Vec::new();
    paths(object, "", &mut all);
    let keeps_version = |path: &&String| !matches!(path.as_str(), "/metadata" | "/metadata/resourceVersion" | "/kind");
    let mut mutants = Vec::new();
    for path in all.iter().filter(keeps_version) {
        let mut marked = object.clone();
        *marked.pointer_mut(path).expect("a path of this object") = json!(MARK);
        let text = marked.to_string();
        let mark = format!("\"{MARK}\"");
        mutants.extend(wrongs().into_iter().map(|wrong| text.replace(&mark, &wrong)));
    }
    mutants
}

/// So many numbered TCP ports.
fn ports(count: u16) -> Vec<Value> {
    (1..=count).map(|n| json!({"name": format!("p{n}"), "port": n})).collect()
}

/// 1,000 ports at 300 external IPs each, in 56 KB.
pub fn many_frontends() -> Value {
    let external: Vec<String> = (0..300).map(|n| format!("203.0.{}.{}", n / 250, n % 250)).collect();
    json!({
        "kind": "Service", "apiVersion": "v1", "metadata": {"name": "frontends", "namespace": "default"},
        "spec": {
            "clusterIP": "10.99.0.1", "clusterIPs": ["10.99.0.1"], "ports": ports(1000), "externalIPs": external,
        },
    })
}

/// 12 ports for clients of 6,000 ranges each, in 104 KB.
pub fn many_source_ranges() -> Value {
    let ranges: Vec<String> = (0..6000).map(|n| format!("172.{}.{}.0/24", 16 + n / 250, n % 250)).collect();
    json!({
        "kind": "Service", "apiVersion": "v1", "metadata": {"name": "ranges", "namespace": "default"},
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.99.0.2", "clusterIPs": ["10.99.0.2"], "ports": ports(12),
            "loadBalancerSourceRanges": ranges,
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.77"}]}},
    })
}
