//! Session affinity ClientIP: sockets on the node, packets from outside, its timeout, and switching it.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};

use crate::case_cluster::{By, CaseCluster, From};
use crate::laboratory::daemon::PATIENCE;
use crate::laboratory::eventually;

cases![
    affinity_for_cluster_ip,
    affinity_for_node_port,
    affinity_for_load_balancer,
    affinity_is_switched_for_cluster_ip,
    affinity_is_switched_for_node_port,
    affinity_times_out_for_cluster_ip_and_node_port,
];

const CLIENT: From = From::Pod("client");
const PODS: [&str; 3] = ["a", "b", "c"];

fn spec(kind: &str, affinity: &str, seconds: u32) -> Value {
    let config = json!({"clientIP": {"timeoutSeconds": seconds}});
    match affinity {
        "ClientIP" => json!({"type": kind, "sessionAffinity": affinity, "sessionAffinityConfig": config}),
        _ => json!({"type": kind, "sessionAffinity": affinity}),
    }
}

/// All of thirty connections meet the same pod; which one.
fn stays(world: &CaseCluster, from: From, by: By, to: &[SocketAddr]) {
    for to in to {
        let mut last = Default::default();
        let is_so = eventually(PATIENCE, || {
            last = world.ask(from, by, *to, 30);
            last.len() == 1 && last.keys().all(|name| PODS.contains(&name.as_str()))
        });
        assert!(is_so, "{from:?} at {to}: {last:?}");
    }
}

fn affinity_for_cluster_ip(world: &CaseCluster) {
    let served = world.simple("sticky-ip", spec("ClusterIP", "ClientIP", 600), &PODS);
    for from in [CLIENT, From::Host] {
        stays(world, from, By::Tcp, &served.at(80));
    }
    world.gone("sticky-ip");
}

fn affinity_for_node_port(world: &CaseCluster) {
    let served = world.simple("sticky-port", spec("NodePort", "ClientIP", 600), &PODS);
    for from in [CLIENT, From::Host, From::Outside] {
        stays(world, from, By::Tcp, &served.at_node("http"));
    }
    world.gone("sticky-port");
}

/// Also by policy Local, where only the pod here answers; and by datagrams.
fn affinity_for_load_balancer(world: &CaseCluster) {
    for policy in ["Cluster", "Local"] {
        let mut with = spec("LoadBalancer", "ClientIP", 600);
        with["externalTrafficPolicy"] = json!(policy);
        with["ports"] = json!([{"name": "udp", "protocol": "UDP", "port": 80}]);
        let served = world.service("sticky-lb", with);
        world.slices("sticky-lb", &[("udp", "UDP", 9000)], &world.ready(&PODS));
        stays(world, From::Outside, By::Udp, &served.at_node("udp"));
    }
    world.gone("sticky-lb");
}

fn switches(world: &CaseCluster, kind: &str, from: From, to: impl Fn(&crate::case_cluster::Served) -> Vec<SocketAddr>) {
    let served = world.simple("switched", spec(kind, "None", 0), &PODS);
    world.reaches(from, By::Tcp, &to(&served), &PODS);
    for _ in 0..2 {
        world.service("switched", spec_with_ports(kind, "ClientIP"));
        stays(world, from, By::Tcp, &to(&served));
        world.service("switched", spec_with_ports(kind, "None"));
        world.reaches(from, By::Tcp, &to(&served), &PODS);
    }
    world.gone("switched");
}

fn spec_with_ports(kind: &str, affinity: &str) -> Value {
    let mut spec = spec(kind, affinity, 600);
    spec["ports"] = json!([{"name": "http", "protocol": "TCP", "port": 80}]);
    spec
}

fn affinity_is_switched_for_cluster_ip(world: &CaseCluster) {
    switches(world, "ClusterIP", CLIENT, |served| served.at(80));
}

fn affinity_is_switched_for_node_port(world: &CaseCluster) {
    switches(world, "NodePort", From::Outside, |served| served.at_node("http"));
}

/// While it is used it lasts; after a pause longer than the timeout the next pod is drawn anew.
fn affinity_times_out_for_cluster_ip_and_node_port(world: &CaseCluster) {
    let served = world.simple("short", spec("NodePort", "ClientIP", 2), &PODS);
    let ways = [(CLIENT, served.at(80)[0]), (From::Outside, served.at_node("http")[0])];
    for (from, to) in ways {
        stays(world, from, By::Tcp, &[to]);
    }
    let mut met = [Vec::new(), Vec::new()];
    let has_moved = eventually(Duration::from_secs(60), || {
        std::thread::sleep(Duration::from_millis(3200));
        for ((from, to), met) in ways.iter().zip(&mut met) {
            let name = world.ask(*from, By::Tcp, *to, 5);
            assert_eq!(name.len(), 1, "five in a row stay together: {name:?}");
            met.extend(name.into_keys());
            met.sort_unstable();
            met.dedup();
        }
        met.iter().all(|names| names.len() > 1)
    });
    assert!(has_moved, "{met:?}");
    world.gone("short");
}
