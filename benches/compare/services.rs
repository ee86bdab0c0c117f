//! The Services of the comparison: the targets and the others, as objects of the Kubernetes API and as ports for rules.

use std::net::{IpAddr, SocketAddr};

use serde_json::{Value, json};

use crate::common::world::{BenchService, ENDPOINT_PORT, SERVICE_PORT};
use crate::laboratory::lab::{Lab, Node};
use crate::laboratory::manifests::{Endpoint, port, service, slice};
use crate::laboratory::rulesets::{self, Protocol, ServicePort, State};
use crate::path::{TARGETS, Target};
use crate::service_port::service_port;

/// Service and EndpointSlice of a target. The API server chooses the cluster IP when `cluster_ip` is `None`; `node_name`
/// says what the laboratory's nodes are called there.
pub fn target(target: Target, lab: &Lab, cluster_ip: Option<IpAddr>, node_name: impl Fn(&str) -> String) -> [Value; 2] {
    let ports = target.ports();
    let ports: Vec<(&str, &str, u16)> = ports
        .iter()
        .map(|(name, is_tcp, number)| (name.as_str(), if *is_tcp { "TCP" } else { "UDP" }, *number))
        .collect();
    let make = |(name, protocol, number): &(&str, &str, u16)| {
        let mut port = port(name, protocol, *number);
        port["nodePort"] = json!(number);
        port
    };
    let mut spec = json!({"type": "LoadBalancer", "ports": ports.iter().map(make).collect::<Vec<_>>()});
    if let Some(ip) = cluster_ip {
        spec["clusterIP"] = json!(ip.to_string());
    }
    let mut object = service(target.name, spec);
    object["status"] = load_balancer_status(target);
    let endpoint = Endpoint::ready(lab.pod(target.pod).v4.into(), &node_name(lab.node_of(target.pod)));
    [object, slice(&format!("{}-1", target.name), target.name, &ports, &[endpoint])]
}

/// What a load balancer's controller writes.
pub fn load_balancer_status(target: Target) -> Value {
    json!({"loadBalancer": {"ingress": [{"ip": target.load_balancer_ip.to_string()}]}})
}

/// Service and EndpointSlice of one of the others, whose cluster IP the API server chooses.
pub fn other(other: &BenchService) -> [Value; 2] {
    let name = other_name(other);
    let ports = [("http", "TCP", ENDPOINT_PORT)];
    let endpoints: Vec<Endpoint> =
        other.endpoints.iter().map(|at| Endpoint::ready(IpAddr::V4(*at), "elsewhere")).collect();
    let spec = json!({"ports": [port("http", "TCP", SERVICE_PORT)]});
    [service(&name, spec), slice(&format!("{name}-1"), &name, &ports, &endpoints)]
}

/// How many frontends kubelane has for the targets and so many others, all of one family: each port of a target has
/// three (cluster IP, load balancer IP and NodePort), the one port of another has its cluster IP.
pub fn frontends(others: usize) -> usize {
    others + 3 * target_port_count()
}

/// Ports of all targets.
pub fn target_port_count() -> usize {
    TARGETS.iter().map(|target| target.ports().len()).sum()
}

fn other_name(other: &BenchService) -> String {
    format!("service-{}", other.number)
}

/// All ports, for the rules of `node`.
pub fn ports(lab: &Lab, node: &Node, others: &[BenchService]) -> Vec<ServicePort> {
    let targets = TARGETS.iter().flat_map(|target| target_ports(*target, lab, node));
    others.iter().map(service_port).chain(targets).collect()
}

fn target_ports(target: Target, lab: &Lab, node: &Node) -> Vec<ServicePort> {
    let endpoint = |number: u16| rulesets::Endpoint {
        at: SocketAddr::new(lab.pod(target.pod).v4.into(), number),
        is_local: lab.node_of(target.pod) == node.name,
        state: State::Ready,
    };
    let make = |(name, is_tcp, number): (String, bool, u16)| ServicePort {
        namespace: "default".to_owned(),
        name: target.name.to_owned(),
        port_name: name,
        protocol: if is_tcp { Protocol::Tcp } else { Protocol::Udp },
        cluster_ips: vec![target.cluster_ip.into()],
        port: number,
        node_port: number,
        load_balancer_ips: vec![target.load_balancer_ip.into()],
        endpoints: vec![endpoint(number)],
        ..ServicePort::default()
    };
    target.ports().into_iter().map(make).collect()
}
