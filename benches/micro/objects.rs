//! The records and the text that the benches feed.

use std::net::Ipv4Addr;
use std::sync::Arc;

use kubelane::model::{Endpoint, ObjectName, Protocol, Service, ServicePort, Slice, SlicePort, TrafficPolicy};
use serde_json::{Value, json};

/// As many endpoints as Kubernetes puts into one slice.
const ENDPOINTS_OF_A_SLICE: u32 = 100;

/// A Service with one port and one cluster IP, and its slices.
pub fn service(number: u32, endpoints: u32) -> (Service, Vec<Slice>) {
    let service = Service {
        name: ObjectName::new("bench", &format!("service-{number}")),
        created: 1_767_225_600,
        cluster_ips: vec![Ipv4Addr::from_bits(Ipv4Addr::new(10, 96, 1, 0).to_bits() + number).into()],
        external_ips: vec![],
        load_balancer_ips: vec![],
        ports: vec![ServicePort { name: "http".into(), protocol: Protocol::Tcp, port: 80, node_port: 0 }],
        affinity_seconds: None,
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        source_ranges: vec![],
        health_check_node_port: 0,
        client_source: None,
    };
    let firsts = (0..endpoints).step_by(ENDPOINTS_OF_A_SLICE as usize);
    let slices = firsts.map(|first| slice(number, first, (endpoints - first).min(ENDPOINTS_OF_A_SLICE))).collect();
    (service, slices)
}

fn slice(number: u32, first: u32, count: u32) -> Slice {
    let base = Ipv4Addr::new(10, 128, 0, 1).to_bits() + number * 10;
    let node: Arc<str> = "node-2".into();
    let endpoint = |index: u32| Endpoint {
        ip: Ipv4Addr::from_bits(base + first + index).into(),
        ready: true,
        serving: true,
        terminating: false,
        node: Some(node.clone()),
        hints: None,
    };
    Slice {
        name: ObjectName::new("bench", &format!("service-{number}-{first}")),
        service: format!("service-{number}").into(),
        is_controlled: false,
        ports: vec![SlicePort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }],
        endpoints: (0..count).map(endpoint).collect(),
        triggered: None,
    }
}

/// The slice of a Service with ten endpoints, one of them with an address that it has not had before.
pub fn changed_slice(number: u32, edition: u32) -> Slice {
    let mut slice = slice(number, 0, 10);
    slice.endpoints[3].ip = Ipv4Addr::from_bits(Ipv4Addr::new(11, 0, 0, 0).to_bits() + edition).into();
    slice
}

/// An EndpointSlice as an API server returns it.
pub fn slice_as_returned(endpoints: usize) -> Value {
    let endpoint = |index: usize| {
        json!({
            "addresses": [format!("10.128.0.{index}")],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": format!("node-{index}"),
            "targetRef": {
                "kind": "Pod",
                "name": format!("web-5c9d7b9c4-p{index}"),
                "namespace": "bench",
                "uid": "77b3a1d0-0000-4000-8000-000000000001",
            },
            "zone": format!("zone-{}", index % 3),
        })
    };
    json!({
        "addressType": "IPv4",
        "apiVersion": "discovery.k8s.io/v1",
        "endpoints": (0..endpoints).map(endpoint).collect::<Vec<_>>(),
        "kind": "EndpointSlice",
        "metadata": {
            "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:07Z"},
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "generateName": "web-",
            "generation": 2,
            "labels": {
                "app": "web",
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                "kubernetes.io/service-name": "web",
            },
            "name": "web-x7k2p",
            "namespace": "bench",
            "ownerReferences": [{
                "apiVersion": "v1",
                "blockOwnerDeletion": true,
                "controller": true,
                "kind": "Service",
                "name": "web",
                "uid": "5f0f1c52-0000-4000-8000-000000000001",
            }],
            "resourceVersion": "1207",
            "uid": "9a6d7c11-0000-4000-8000-000000000001",
        },
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    })
}
