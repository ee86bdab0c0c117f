//! Services that change their type, are made again, and ask for node ports.

use serde_json::json;

use crate::case_cluster::{By, CaseCluster, From, HTTP, REFUSED, Served};

cases![
    from_external_name_to_cluster_ip,
    from_external_name_to_node_port,
    from_cluster_ip_to_external_name,
    from_node_port_to_external_name,
    every_type_becomes_every_other,
    headless_services_come_and_go,
    a_service_made_again_with_the_same_name_and_address,
    node_ports_are_not_given_twice_and_are_free_after_a_delete,
    a_functioning_node_port,
    a_node_port_for_tcp_and_then_udp_on_the_same_port,
];

const CLIENT: From = From::Pod("client");

fn external_name() -> serde_json::Value {
    json!({"type": "ExternalName", "externalName": "example.com", "ports": [{"name": "http", "port": 80}]})
}

fn serves(world: &CaseCluster, served: &Served) {
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["a", "b"]);
    world.listed(&served.name, true);
}

fn from_external_name_to_cluster_ip(world: &CaseCluster) {
    world.simple("name-to-ip", external_name(), &["a", "b"]);
    world.listed("name-to-ip", false);
    let served = world.simple("name-to-ip", json!({"type": "ClusterIP"}), &["a", "b"]);
    serves(world, &served);
    world.gone("name-to-ip");
}

fn from_external_name_to_node_port(world: &CaseCluster) {
    world.simple("name-to-port", external_name(), &["a", "b"]);
    let served = world.simple("name-to-port", json!({"type": "NodePort"}), &["a", "b"]);
    serves(world, &served);
    world.reaches(From::Outside, By::Tcp, &served.at_node("http"), &["a", "b"]);
    world.gone("name-to-port");
}

fn from_cluster_ip_to_external_name(world: &CaseCluster) {
    let served = world.simple("ip-to-name", json!({"type": "ClusterIP"}), &["a", "b"]);
    serves(world, &served);
    world.service("ip-to-name", external_name());
    world.listed("ip-to-name", false);
    world.gone("ip-to-name");
}

fn from_node_port_to_external_name(world: &CaseCluster) {
    let served = world.simple("port-to-name", json!({"type": "NodePort"}), &["a", "b"]);
    serves(world, &served);
    world.reaches(From::Outside, By::Tcp, &served.at_node("http"), &["a", "b"]);
    world.service("port-to-name", external_name());
    world.listed("port-to-name", false);
    world.refused(From::Outside, By::Tcp, &served.at_node("http"));
    world.gone("port-to-name");
}

/// All twelve changes, in one walk.
fn every_type_becomes_every_other(world: &CaseCluster) {
    let walk = "C N C L C E N L N E L E C";
    let mut last: Option<Served> = None;
    for step in walk.split(' ') {
        let (kind, is_exposed) = match step {
            "C" => ("ClusterIP", false),
            "N" => ("NodePort", true),
            "L" => ("LoadBalancer", true),
            _ => ("ExternalName", false),
        };
        let spec = if step == "E" { external_name() } else { json!({"type": kind}) };
        let served = world.simple("changing", spec, &["a", "b"]);
        println!("  now {kind}");
        if step == "E" {
            world.listed("changing", false);
        } else {
            serves(world, &served);
        }
        if is_exposed {
            world.reaches(From::Outside, By::Tcp, &served.at_node("http"), &["a", "b"]);
        }
        match &last {
            Some(before) if before.object["spec"]["ports"][0]["nodePort"].is_u64() && !is_exposed => {
                world.reaches(From::Outside, By::Tcp, &before.at_node("http"), &[REFUSED]);
            }
            _ => {}
        }
        last = Some(served);
    }
    world.gone("changing");
}

fn headless_services_come_and_go(world: &CaseCluster) {
    let headless = json!({"clusterIP": "None", "ports": [{"name": "http", "port": 80}]});
    world.simple("maybe-headless", headless.clone(), &["a", "b"]);
    world.listed("maybe-headless", false);
    world.gone("maybe-headless");
    let served = world.simple("maybe-headless", json!({}), &["a", "b"]);
    serves(world, &served);
    world.gone("maybe-headless");
    world.simple("maybe-headless", headless, &["a", "b"]);
    world.listed("maybe-headless", false);
    world.gone("maybe-headless");
}

/// The slices stay; with another port the second time, on the very same address.
fn a_service_made_again_with_the_same_name_and_address(world: &CaseCluster) {
    let first = world.simple("again", json!({}), &["a", "b"]);
    serves(world, &first);
    world.gone_but_slices(&first);
    world.listed("again", false);
    let ips = first.object["spec"]["clusterIPs"].clone();
    let ports = json!([{"name": "http", "protocol": "TCP", "port": 81}]);
    let second = world.service("again", json!({"clusterIP": ips[0], "clusterIPs": ips, "ports": ports}));
    world.reaches(CLIENT, By::Tcp, &second.at(81), &["a", "b"]);
    world.refused(CLIENT, By::Tcp, &second.at(80));
    world.gone_but_slices(&second);
    let third = world.simple("again", json!({}), &["a", "b"]);
    serves(world, &third);
    world.gone("again");
}

fn node_ports_are_not_given_twice_and_are_free_after_a_delete(world: &CaseCluster) {
    let first = world.simple("first-there", json!({"type": "NodePort"}), &["a"]);
    let asks = |port: u16| {
        let ports = json!([{"name": "http", "protocol": "TCP", "port": 80, "nodePort": port}]);
        json!({"type": "NodePort", "ports": ports})
    };
    let taken = first.node_port("http");
    world.slices("second", &HTTP, &world.ready(&["b"]));
    assert_eq!(world.try_service("second", json!({}), asks(taken)).err(), Some(422));
    assert_eq!(world.try_service("second", json!({}), asks(8080)).err(), Some(422), "out of range");
    world.reaches(From::Outside, By::Tcp, &first.at_node("http"), &["a"]);
    world.gone("first-there");
    let second = world.service("second", asks(taken));
    world.reaches(From::Outside, By::Tcp, &second.at_node("http"), &["b"]);
    world.gone("second");
    world.refused(From::Outside, By::Tcp, &second.at_node("http"));
}

fn a_functioning_node_port(world: &CaseCluster) {
    let served = world.simple("node-port", json!({"type": "NodePort"}), &["a", "b", "c"]);
    for from in [CLIENT, From::Host, From::Outside] {
        world.reaches(from, By::Tcp, &served.at_node("http"), &["a", "b", "c"]);
    }
    let loopback = [([127, 0, 0, 1], served.node_port("http")).into()];
    world.reaches(From::Host, By::Tcp, &loopback, &["a", "b", "c"]);
    world.gone("node-port");
}

fn a_node_port_for_tcp_and_then_udp_on_the_same_port(world: &CaseCluster) {
    let tcp = json!({"name": "tcp", "protocol": "TCP", "port": 80});
    let udp = json!({"name": "udp", "protocol": "UDP", "port": 80});
    let targets = [("tcp", "TCP", 9000), ("udp", "UDP", 9000)];
    let first = world.service("two-protocols", json!({"ports": [tcp]}));
    world.slices("two-protocols", &targets, &world.ready(&["a", "b"]));
    world.reaches(CLIENT, By::Tcp, &first.at(80), &["a", "b"]);
    world.refused(CLIENT, By::Udp, &first.at(80));
    let both = world.service("two-protocols", json!({"type": "NodePort", "ports": [tcp, udp]}));
    for (by, name) in [(By::Tcp, "tcp"), (By::Udp, "udp")] {
        world.reaches(CLIENT, by, &both.at(80), &["a", "b"]);
        world.reaches(From::Outside, by, &both.at_node(name), &["a", "b"]);
    }
    world.gone("two-protocols");
}
