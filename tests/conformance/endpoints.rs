//! Endpoints in every condition: none, evicted, not ready, terminating; and clients that are endpoints themselves.

use serde_json::json;

use crate::case_cluster::{By, CaseCluster, From, HTTP, Served};
use crate::laboratory::daemon::PATIENCE;
use crate::laboratory::eventually;
use crate::laboratory::manifests::Endpoint;

cases![
    rejected_without_endpoints,
    rejected_for_evicted_pods,
    unready_endpoints_when_they_are_to_be_published,
    unready_endpoints_when_they_are_not,
    terminating_endpoints_as_a_last_resort_for_cluster_policies,
    terminating_endpoints_as_a_last_resort_for_internal_policy_local,
    terminating_endpoints_as_a_last_resort_for_external_policy_local,
    health_check_port_fails_with_terminating_endpoints_only,
    hairpin,
    source_address_through_a_cluster_ip,
    endpoints_in_the_hosts_network,
];

const CLIENT: From = From::Pod("client");

/// By socket, by packet, by both protocols.
fn is_rejected(world: &CaseCluster, served: &Served) {
    for (by, name) in [(By::Tcp, "tcp"), (By::Udp, "udp")] {
        for from in [CLIENT, From::Host] {
            world.refused(from, by, &served.at(80));
        }
        world.refused(From::Outside, by, &served.at_node(name));
    }
}

fn two_protocols(world: &CaseCluster, name: &str) -> Served {
    let ports = json!([{"name": "tcp", "protocol": "TCP", "port": 80}, {"name": "udp", "protocol": "UDP", "port": 80}]);
    world.service(name, json!({"type": "NodePort", "ports": ports}))
}

fn rejected_without_endpoints(world: &CaseCluster) {
    let served = two_protocols(world, "none");
    is_rejected(world, &served);
    world.gone("none");
}

/// An evicted pod stays in the slice, neither ready nor serving.
fn rejected_for_evicted_pods(world: &CaseCluster) {
    let served = two_protocols(world, "evicted");
    let targets = [("tcp", "TCP", 9000), ("udp", "UDP", 9000)];
    world.slices("evicted", &targets, &world.ready(&["a", "b"]));
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["a", "b"]);
    world.slices("evicted", &targets, &world.endpoints(Endpoint::unready, &["a", "b"]));
    is_rejected(world, &served);
    world.gone("evicted");
}

/// The controller calls such endpoints ready, also when they terminate.
fn unready_endpoints_when_they_are_to_be_published(world: &CaseCluster) {
    let served = world.simple("published", json!({"publishNotReadyAddresses": true}), &["a", "b"]);
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["a", "b"]);
    world.gone("published");
}

fn unready_endpoints_when_they_are_not(world: &CaseCluster) {
    let served = world.simple("unpublished", json!({}), &["a"]);
    let mut endpoints = world.ready(&["a"]);
    endpoints.extend(world.endpoints(Endpoint::unready, &["b"]));
    endpoints.extend(world.endpoints(Endpoint::terminating, &["c"]));
    world.slices("unpublished", &HTTP, &endpoints);
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["a"]);
    world.slices("unpublished", &HTTP, &world.endpoints(Endpoint::unready, &["b"]));
    world.refused(CLIENT, By::Tcp, &served.at(80));
    world.gone("unpublished");
}

fn terminating(world: &CaseCluster, pods: &[&str]) -> Vec<Endpoint> {
    world.endpoints(Endpoint::terminating, pods)
}

fn terminating_endpoints_as_a_last_resort_for_cluster_policies(world: &CaseCluster) {
    let served = world.simple("ending", json!({"type": "NodePort"}), &["c"]);
    let mixed = [world.ready(&["c"]), terminating(world, &["a", "b"])].concat();
    for (endpoints, who) in [(mixed, &["c"][..]), (terminating(world, &["a", "b"]), &["a", "b"])] {
        world.slices("ending", &HTTP, &endpoints);
        world.reaches(CLIENT, By::Tcp, &served.at(80), who);
        world.reaches(From::Host, By::Tcp, &served.at_node("http"), who);
        world.reaches(From::Outside, By::Tcp, &served.at_node("http"), who);
    }
    world.gone("ending");
}

/// The local set falls back for itself, though a ready endpoint is elsewhere.
fn terminating_endpoints_as_a_last_resort_for_internal_policy_local(world: &CaseCluster) {
    let served = world.simple("ending-here", json!({"internalTrafficPolicy": "Local"}), &["a", "b"]);
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["a"]);
    world.slices("ending-here", &HTTP, &[terminating(world, &["a"]), world.ready(&["b"])].concat());
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["a"]);
    world.slices("ending-here", &HTTP, &world.ready(&["b"]));
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["ETIMEDOUT"]);
    world.gone("ending-here");
}

fn terminating_endpoints_as_a_last_resort_for_external_policy_local(world: &CaseCluster) {
    let ports = json!([{"name": "udp", "protocol": "UDP", "port": 80}]);
    let spec = json!({"type": "NodePort", "externalTrafficPolicy": "Local", "ports": ports});
    let served = world.service("ending-out", spec);
    let put = |endpoints: Vec<Endpoint>| world.slices("ending-out", &[("udp", "UDP", 9000)], &endpoints);
    put(world.ready(&["a", "b"]));
    world.reaches(From::Outside, By::Udp, &served.at_node("udp"), &["a"]);
    put([terminating(world, &["a"]), world.ready(&["b"])].concat());
    world.reaches(From::Outside, By::Udp, &served.at_node("udp"), &["a"]);
    world.reaches(CLIENT, By::Udp, &served.at(80), &["b"]);
    put(world.ready(&["b"]));
    world.dropped_outside(&served.at_node("udp"));
    world.gone("ending-out");
}

fn health_check_port_fails_with_terminating_endpoints_only(world: &CaseCluster) {
    let spec = json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local"});
    let served = world.simple("checked", spec, &["a", "b"]);
    let port = served.object["spec"]["healthCheckNodePort"].as_u64().expect("a port for health checks");
    let status = || world.daemon.get(&format!("127.0.0.1:{port}"), "/").unwrap_or_default();
    assert!(eventually(PATIENCE, || status().starts_with("HTTP/1.1 200")), "{}", status());
    world.slices("checked", &HTTP, &[terminating(world, &["a"]), world.ready(&["b"])].concat());
    assert!(eventually(PATIENCE, || status().starts_with("HTTP/1.1 503")), "{}", status());
    // Which does not keep the last packets from their pod.
    world.reaches(From::Outside, By::Tcp, &served.at_node("http"), &["a"]);
    world.gone("checked");
}

/// The only endpoint asks its own Service, also by a node port.
fn hairpin(world: &CaseCluster) {
    let ports = json!([{"name": "tcp", "protocol": "TCP", "port": 80}, {"name": "udp", "protocol": "UDP", "port": 80}]);
    let served = world.service("hairpin", json!({"type": "NodePort", "ports": ports}));
    world.slices("hairpin", &[("tcp", "TCP", 9000), ("udp", "UDP", 9000)], &world.ready(&["a"]));
    for (by, name) in [(By::Tcp, "tcp"), (By::Udp, "udp")] {
        world.reaches(From::Pod("a"), by, &served.at(80), &["a"]);
        world.reaches(From::Pod("a"), by, &served.at_node(name), &["a"]);
    }
    world.gone("hairpin");
}

/// The pod says who asked; here and on the other node.
fn source_address_through_a_cluster_ip(world: &CaseCluster) {
    let served = world.simple("source", json!({}), &[]);
    for pod in ["a", "b"] {
        world.slices("source", &[("http", "TCP", 7000)], &world.ready(&[pod]));
        for to in served.at(80) {
            let ips = world.cluster.lab.pod("client").addresses();
            let expected = format!("{pod} {}", ips[usize::from(to.is_ipv6())]);
            world.reaches(CLIENT, By::Tcp, &[to], &[&expected]);
        }
    }
    world.gone("source");
}

fn endpoints_in_the_hosts_network(world: &CaseCluster) {
    let ports = json!([{"name": "tcp", "protocol": "TCP", "port": 80}, {"name": "udp", "protocol": "UDP", "port": 80}]);
    let served = world.service("hosts", json!({"type": "NodePort", "ports": ports}));
    let targets = [("tcp", "TCP", 9100), ("udp", "UDP", 9100)];
    for nodes in [&["node1"][..], &["node2"], &["node1", "node2"]] {
        world.slices("hosts", &targets, &world.ready(nodes));
        // Datagrams from outside only: to a pod of its own node, a server on all addresses would answer from another one.
        for from in [CLIENT, From::Host, From::Outside] {
            let to = if from == From::Outside { served.at_node("tcp") } else { served.at(80) };
            world.reaches(from, By::Tcp, &to, nodes);
        }
        world.reaches(From::Outside, By::Udp, &served.at_node("udp"), nodes);
    }
    world.gone("hosts");
}
