//! Which ports a Service has, and which endpoints are behind each of them.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::case_cluster::{By, CaseCluster, From, HTTP};

cases![
    endpoints_come_and_go,
    multiport_endpoints,
    one_port_for_tcp_and_udp,
    ports_are_added_renamed_renumbered_and_deleted,
    several_slices_with_several_ports_and_addresses,
    services_go_up_and_down,
    new_endpoints_are_reached_soon,
    several_services_select_the_same_pods,
];

const CLIENT: From = From::Pod("client");

fn port(name: &str, protocol: &str, number: u16) -> Value {
    json!({"name": name, "protocol": protocol, "port": number})
}

fn endpoints_come_and_go(world: &CaseCluster) {
    let served = world.service("basic", json!({"ports": [port("http", "TCP", 80)]}));
    world.refused(CLIENT, By::Tcp, &served.at(80));
    for pods in [&["a"][..], &["a", "b"], &["b"], &["b", "c"]] {
        world.slices("basic", &HTTP, &world.ready(pods));
        world.reaches(CLIENT, By::Tcp, &served.at(80), pods);
    }
    world.slices("basic", &HTTP, &[]);
    world.refused(CLIENT, By::Tcp, &served.at(80));
    world.gone("basic");
}

/// Each pod serves one of the ports, in a slice of its own.
fn multiport_endpoints(world: &CaseCluster) {
    let ports = json!([port("portname1", "TCP", 80), port("portname2", "TCP", 81)]);
    let served = world.service("multi", json!({"ports": ports}));
    world.slices_as("multi", "multi", json!({}), &[("portname1", "TCP", 9000)], &world.ready(&["a"]));
    world.slices_as("multi-2", "multi", json!({}), &[("portname2", "TCP", 8080)], &world.ready(&["b"]));
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["a"]);
    world.reaches(CLIENT, By::Tcp, &served.at(81), &["b"]);
    world.gone("multi");
    world.listed("multi", false);
}

fn one_port_for_tcp_and_udp(world: &CaseCluster) {
    let ports = json!([port("tcp", "TCP", 80), port("udp", "UDP", 80)]);
    let served = world.service("both", json!({"ports": ports}));
    world.slices("both", &[("tcp", "TCP", 9000), ("udp", "UDP", 9000)], &world.ready(&["a", "c"]));
    for by in [By::Tcp, By::Udp] {
        world.reaches(CLIENT, by, &served.at(80), &["a", "c"]);
    }
    world.service("both", json!({"ports": [port("udp", "UDP", 80)]}));
    world.refused(CLIENT, By::Tcp, &served.at(80));
    world.reaches(CLIENT, By::Udp, &served.at(80), &["a", "c"]);
    world.gone("both");
}

fn ports_are_added_renamed_renumbered_and_deleted(world: &CaseCluster) {
    let targets = [("http", "TCP", 9000), ("web", "TCP", 8080), ("more", "TCP", 9000)];
    let put = |ports: Value| world.service("moving", json!({"ports": ports}));
    let served = put(json!([port("http", "TCP", 80)]));
    world.slices("moving", &targets, &world.ready(&["a", "b"]));
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["a", "b"]);
    put(json!([port("http", "TCP", 80), port("more", "TCP", 81)]));
    world.reaches(CLIENT, By::Tcp, &served.at(81), &["a", "b"]);
    // Renamed: the same number with another name has other targets.
    put(json!([port("web", "TCP", 80), port("more", "TCP", 81)]));
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["a", "b"]);
    put(json!([port("nowhere", "TCP", 80), port("more", "TCP", 81)]));
    world.refused(CLIENT, By::Tcp, &served.at(80));
    put(json!([port("nowhere", "TCP", 80), port("more", "TCP", 82)]));
    world.reaches(CLIENT, By::Tcp, &served.at(82), &["a", "b"]);
    world.refused(CLIENT, By::Tcp, &served.at(81));
    // Two ports that change places.
    put(json!([port("more", "TCP", 80), port("nowhere", "TCP", 82)]));
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["a", "b"]);
    world.refused(CLIENT, By::Tcp, &served.at(82));
    put(json!([port("more", "TCP", 80)]));
    world.refused(CLIENT, By::Tcp, &served.at(82));
    world.gone("moving");
}

/// The same address in two slices counts once; the target port differs from slice to slice.
fn several_slices_with_several_ports_and_addresses(world: &CaseCluster) {
    let ports = json!([port("http", "TCP", 80), port("dns", "UDP", 53)]);
    let served = world.service("sliced", json!({"ports": ports}));
    let first = [("http", "TCP", 9000), ("dns", "UDP", 9000)];
    let second = [("http", "TCP", 8080), ("dns", "UDP", 9053)];
    world.slices_as("sliced", "sliced", json!({}), &first, &world.ready(&["a", "b"]));
    world.slices_as("sliced-2", "sliced", json!({}), &second, &world.ready(&["c"]));
    world.slices_as("sliced-3", "sliced", json!({}), &first, &world.ready(&["b"]));
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["a", "b", "c"]);
    world.reaches(CLIENT, By::Udp, &served.at(53), &["a", "b", "c"]);
    world.slices_as("sliced", "sliced", json!({}), &first, &world.ready(&["a"]));
    world.slices_as("sliced-2", "sliced", json!({}), &second, &[]);
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["a", "b"]);
    world.slices_as("sliced-3", "sliced", json!({}), &first, &[]);
    world.reaches(CLIENT, By::Udp, &served.at(53), &["a"]);
    world.gone("sliced");
}

fn services_go_up_and_down(world: &CaseCluster) {
    let up = |name: &str, pods: &[&str]| world.simple(name, json!({}), pods);
    let (one, two) = (up("up-1", &["a", "b"]), up("up-2", &["c"]));
    for from in [CLIENT, From::Host] {
        world.reaches(from, By::Tcp, &one.at(80), &["a", "b"]);
        world.reaches(from, By::Tcp, &two.at(80), &["c"]);
    }
    world.gone("up-1");
    world.listed("up-1", false);
    world.reaches(CLIENT, By::Tcp, &two.at(80), &["c"]);
    let three = up("up-3", &["b"]);
    for (served, pods) in [(&two, ["c"]), (&three, ["b"])] {
        world.reaches(From::Host, By::Tcp, &served.at(80), &pods);
    }
    world.gone("up-2");
    world.gone("up-3");
}

/// From the request that makes the slice to the first answer. Upstream allows 50 s at the 99th percentile.
fn new_endpoints_are_reached_soon(world: &CaseCluster) {
    let mut times = Vec::new();
    for number in 0..10 {
        let name = format!("latency-{number}");
        let served = world.service(&name, json!({"ports": [port("http", "TCP", 80)]}));
        world.refused(CLIENT, By::Tcp, &served.at(80));
        let began = Instant::now();
        world.slices(&name, &HTTP, &world.ready(&["a"]));
        world.reaches(CLIENT, By::Tcp, &served.at(80), &["a"]);
        times.push(began.elapsed());
    }
    times.sort_unstable();
    println!("  endpoint latency: median {:.1?}, worst {:.1?}", times[5], times[9]);
    assert!(times[9] < Duration::from_secs(50), "{times:?}");
    (0..10).for_each(|number| world.gone(&format!("latency-{number}")));
}

fn several_services_select_the_same_pods(world: &CaseCluster) {
    let one = world.simple("same-1", json!({}), &["a", "b"]);
    let two = world.simple("same-2", json!({}), &["a", "b"]);
    for served in [&one, &two] {
        world.reaches(CLIENT, By::Tcp, &served.at(80), &["a", "b"]);
    }
    world.gone("same-1");
    world.listed("same-1", false);
    world.reaches(CLIENT, By::Tcp, &two.at(80), &["a", "b"]);
    world.gone("same-2");
}
