//! Objects in few words.

use std::sync::Arc;

use kubelane::model::{
    Change, Endpoint, Hints, Ipx, Kind, Node, ObjectName, Protocol, Service, ServicePort, Slice, SlicePort,
    TrafficPolicy,
};
use kubelane::sync::{Core, CoreSettings};

pub const NODE: &str = "node-a";

pub fn ip(text: &str) -> Ipx {
    text.parse().unwrap()
}

pub fn name(name: &str) -> ObjectName {
    ObjectName::new("default", name)
}

/// A TCP Service with one port 80 named "http".
pub fn service(object: &str, cluster_ip: &str) -> Service {
    Service {
        name: name(object),
        created: 100,
        cluster_ips: vec![ip(cluster_ip)],
        external_ips: vec![],
        load_balancer_ips: vec![],
        ports: vec![port("http", Protocol::Tcp, 80)],
        affinity_seconds: None,
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        source_ranges: vec![],
        health_check_node_port: 0,
        client_source: None,
    }
}

pub fn port(name: &str, protocol: Protocol, number: u16) -> ServicePort {
    ServicePort { name: name.into(), protocol, port: number, node_port: 0 }
}

/// A slice with the port "http" 8080.
pub fn slice(object: &str, of: &str, endpoints: Vec<Endpoint>) -> Slice {
    Slice {
        name: name(object),
        service: of.into(),
        is_controlled: false,
        ports: vec![SlicePort { name: "http".into(), protocol: Protocol::Tcp, port: 8080 }],
        endpoints,
        triggered: None,
    }
}

/// A ready endpoint on this node ("@") or another.
pub fn ready(address: &str) -> Endpoint {
    let (address, node) = address.strip_suffix('@').map_or((address, "node-b"), |a| (a, NODE));
    Endpoint { ip: ip(address), ready: true, serving: true, terminating: false, node: Some(node.into()), hints: None }
}

pub fn terminating(address: &str) -> Endpoint {
    Endpoint { ready: false, terminating: true, ..ready(address) }
}

pub fn unready(address: &str) -> Endpoint {
    Endpoint { ready: false, serving: false, ..ready(address) }
}

pub fn zones(zones: &[&str]) -> Option<Arc<Hints>> {
    Some(Arc::new(Hints { zones: zones.iter().map(|z| (*z).into()).collect(), nodes: Box::default() }))
}

pub fn node(zone: Option<&str>) -> Change {
    Change::Node(Box::new(Node { name: NODE.into(), zone: zone.map(Into::into), ..Node::default() }))
}

pub fn new_core() -> Core {
    Core::new(CoreSettings { node_name: NODE.into(), ..CoreSettings::default() })
}

/// A whole list of both kinds.
pub fn list(core: &mut Core, services: impl IntoIterator<Item = Service>, slices: impl IntoIterator<Item = Slice>) {
    core.apply(Change::ListBegin(Kind::Services));
    core.apply(Change::ListBegin(Kind::EndpointSlices));
    services.into_iter().for_each(|s| core.apply(Change::Service(Box::new(s))));
    slices.into_iter().for_each(|s| core.apply(Change::Slice(Box::new(s))));
    core.apply(Change::ListEnd(Kind::Services));
    core.apply(Change::ListEnd(Kind::EndpointSlices));
}
