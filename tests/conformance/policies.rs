//! Traffic policies, load balancers, other proxies' Services, and what is headless.

use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::case_cluster::{By, CaseCluster, From, HTTP};
use crate::laboratory::daemon::PATIENCE;
use crate::laboratory::eventually;

cases![
    internal_policy_local_from_a_pod,
    internal_policy_local_from_the_host,
    internal_policy_local_to_the_hosts_network,
    external_policy_local_at_a_node_port,
    external_policies_change_with_their_health_checks,
    load_balancer_addresses_and_their_source_ranges,
    external_addresses,
    services_of_another_proxy,
    headless_labels,
];

const CLIENT: From = From::Pod("client");

fn local() -> Value {
    json!({"internalTrafficPolicy": "Local"})
}

fn internal_policy_local_from_a_pod(world: &CaseCluster) {
    let served = world.simple("inside", local(), &["a", "b", "c"]);
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["a"]);
    world.slices("inside", &HTTP, &world.ready(&["b", "c"]));
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["ETIMEDOUT"]);
    world.simple("inside", json!({"internalTrafficPolicy": "Cluster"}), &["b", "c"]);
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["b", "c"]);
    world.gone("inside");
}

fn internal_policy_local_from_the_host(world: &CaseCluster) {
    let served = world.simple("inside-host", local(), &["a", "b", "c"]);
    world.reaches(From::Host, By::Tcp, &served.at(80), &["a"]);
    world.slices("inside-host", &HTTP, &world.ready(&["b"]));
    world.reaches(From::Host, By::Tcp, &served.at(80), &["ETIMEDOUT"]);
    world.gone("inside-host");
}

fn internal_policy_local_to_the_hosts_network(world: &CaseCluster) {
    let served = world.simple("to-host", local(), &[]);
    for (nodes, who) in [(&["node1", "node2"][..], "node1"), (&["node2"], "ETIMEDOUT")] {
        world.slices("to-host", &[("http", "TCP", 9100)], &world.ready(nodes));
        for from in [CLIENT, From::Host] {
            world.reaches(from, By::Tcp, &served.at(80), &[who]);
        }
    }
    world.gone("to-host");
}

/// The pod here sees the client; where none is here, nothing answers. Clients on the node are in the cluster.
fn external_policy_local_at_a_node_port(world: &CaseCluster) {
    let ports = json!([{"name": "udp", "protocol": "UDP", "port": 80}]);
    let served =
        world.service("outside", json!({"type": "NodePort", "externalTrafficPolicy": "Local", "ports": ports}));
    world.slices("outside", &[("udp", "UDP", 7000)], &world.ready(&["a", "b"]));
    for (to, client) in served.at_node("udp").into_iter().zip(["172.31.0.1", "fd31::1"]) {
        world.reaches(From::Outside, By::Udp, &[to], &[&format!("a {client}")]);
    }
    world.slices("outside", &[("udp", "UDP", 9000)], &world.ready(&["b", "c"]));
    world.dropped_outside(&served.at_node("udp"));
    world.reaches(CLIENT, By::Udp, &served.at_node("udp"), &["b", "c"]);
    world.gone("outside");
}

fn external_policies_change_with_their_health_checks(world: &CaseCluster) {
    let mut served = world.simple("policy", json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local"}), &["a"]);
    let port = served.object["spec"]["healthCheckNodePort"].as_u64().expect("a port for health checks");
    let is_up = || world.daemon.get(&format!("127.0.0.1:{port}"), "/").is_ok_and(|answer| answer.contains(" 200 "));
    assert!(eventually(PATIENCE, is_up), "{}", world.daemon.log());
    world.reaches(From::Outside, By::Tcp, &served.at_node("http"), &["a"]);
    served = world.simple("policy", json!({"type": "LoadBalancer", "externalTrafficPolicy": "Cluster"}), &["b"]);
    world.reaches(From::Outside, By::Tcp, &served.at_node("http"), &["b"]);
    assert!(eventually(PATIENCE, || !is_up()), "policy Cluster has no health check");
    world.gone("policy");
}

/// Sets the load balancer's addresses, as its controller would.
fn announce(world: &CaseCluster, object: &Value, ingress: &Value) {
    let status = json!({"status": {"loadBalancer": {"ingress": ingress}}});
    world.api.patch(object, "/status", &status);
}

fn load_balancer_addresses_and_their_source_ranges(world: &CaseCluster) {
    let spec = |ranges: Value| json!({"type": "LoadBalancer", "loadBalancerSourceRanges": ranges});
    world.cluster.lab.route_outside("192.0.2.77/32", "node1").expect("a route");
    let to: SocketAddr = "192.0.2.77:80".parse().expect("an address");
    let udp = json!([{"name": "udp", "protocol": "UDP", "port": 80}]);
    let put = |ranges: Value| {
        let mut spec = spec(ranges);
        spec["ports"] = udp.clone();
        world.service("balanced", spec)
    };
    let served = put(json!([]));
    world.slices("balanced", &[("udp", "UDP", 9000)], &world.ready(&["a", "b"]));
    announce(world, &served.object, &json!([{"ip": "192.0.2.77"}]));
    for from in [CLIENT, From::Outside] {
        world.reaches(from, By::Udp, &[to], &["a", "b"]);
    }
    put(json!(["203.0.113.0/24"]));
    world.dropped_outside(&[to]);
    put(json!(["203.0.113.0/24", "172.31.0.1/32"]));
    world.reaches(From::Outside, By::Udp, &[to], &["a", "b"]);
    // Traffic to ipMode Proxy goes to the load balancer itself, which here is nobody.
    announce(world, &served.object, &json!([{"ip": "192.0.2.77", "ipMode": "Proxy"}]));
    let is_quiet = || !world.ask(From::Outside, By::Udp, to, 1).contains_key("a");
    assert!(eventually(PATIENCE, is_quiet), "ipMode Proxy is not ours");
    world.gone("balanced");
}

fn external_addresses(world: &CaseCluster) {
    world.cluster.lab.route_outside("192.0.2.78/32", "node1").expect("a route");
    let to: SocketAddr = "192.0.2.78:80".parse().expect("an address");
    world.simple("external", json!({"externalIPs": ["192.0.2.78"]}), &["a", "b"]);
    for from in [CLIENT, From::Host, From::Outside] {
        world.reaches(from, By::Tcp, &[to], &["a", "b"]);
    }
    world.gone("external");
}

fn services_of_another_proxy(world: &CaseCluster) {
    let name = "proxied";
    let ports = json!([{"name": "http", "protocol": "TCP", "port": 80}]);
    let label = json!({"service.kubernetes.io/service-proxy-name": "foo-bar"});
    world.slices(name, &HTTP, &world.ready(&["a", "b"]));
    let put = |labels: &Value| world.try_service(name, labels.clone(), json!({"ports": ports})).expect("a Service");
    for _ in 0..2 {
        put(&label);
        world.listed(name, false);
        let served = put(&json!({}));
        world.reaches(CLIENT, By::Tcp, &served.at(80), &["a", "b"]);
    }
    put(&label);
    world.listed(name, false);
    world.gone(name);
}

/// A headless label is the endpoints controller's, who hands it on to the slices.
fn headless_labels(world: &CaseCluster) {
    let served = world.simple("unheaded", json!({}), &["a", "b"]);
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["a", "b"]);
    let label = json!({"service.kubernetes.io/headless": ""});
    world.slices_as("unheaded", "unheaded", label, &HTTP, &world.ready(&["a", "b"]));
    world.refused(CLIENT, By::Tcp, &served.at(80));
    world.slices("unheaded", &HTTP, &world.ready(&["a", "b"]));
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["a", "b"]);
    world.gone("unheaded");
}
