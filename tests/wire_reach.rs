//! Where clients outside reach NodePorts: every device with an address of the node, and what is told of those where they
//! are not served.
#![cfg(feature = "lab")]

mod support;

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use serde_json::json;

use support::cluster::Cluster;
use support::daemon::PATIENCE;
use support::eventually;
use support::manifests::port;

const NODE_PORT: u16 = 30_001;

/// A Service with a NodePort, whose only endpoint is pod `a` on node1.
fn cluster() -> Option<Cluster> {
    let cluster = Cluster::or_skip()?;
    let mut udp = port("udp", "UDP", 53);
    udp["nodePort"] = json!(NODE_PORT);
    let changes = json!({"spec": {"type": "NodePort"}});
    cluster.put_with("echo", 10, json!([udp]), changes, &[("udp", "UDP", 9000)], &cluster.ready(&["a"]));
    Some(cluster)
}

/// Whether pod `a` answers a client outside at this address of node1.
fn answers_at(cluster: &Cluster, address: &str) -> bool {
    let to = SocketAddr::new(address.parse().unwrap(), NODE_PORT);
    let ask = || -> anyhow::Result<bool> {
        let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(Duration::from_millis(300)))?;
        socket.send(b"?")?;
        let mut answer = [0; 16];
        let length = socket.recv(&mut answer)?;
        Ok(answer[..length].starts_with(b"a"))
    };
    cluster.lab.outside(ask).unwrap_or(false)
}

#[test]
fn node_ports_answer_on_a_second_card_without_a_default_route_and_on_a_bridge_that_holds_a_card() {
    let Some(cluster) = cluster() else { return };
    let lab = &cluster.lab;
    let node = lab.node("node1");
    lab.add_uplink(node, "eth1", 1).unwrap();
    lab.ip_outside(&[
        "address add 172.31.5.1/24 dev br0".to_owned(),
        "address add fd35::1/64 dev br0 nodad".to_owned(),
        "address add 172.31.7.1/24 dev br0".to_owned(),
        "address add fd37::1/64 dev br0 nodad".to_owned(),
    ])
    .unwrap();
    node.host
        .ip(&[
            "address add 172.31.5.11/24 dev eth1",
            "address add fd35::11/64 dev eth1 nodad",
            "link set eth1 up",
            "link add name host0 type bridge mcast_snooping 0",
            "link add link eth1 name card0 type macvlan mode bridge",
            "link set card0 master host0 up",
            "address add 172.31.7.11/24 dev host0",
            "address add fd37::11/64 dev host0 nodad",
            "link set host0 up",
        ])
        .unwrap();
    let daemon = cluster.start();
    for address in ["172.31.0.11", "fd31::11", "172.31.5.11", "fd35::11", "172.31.7.11", "fd37::11"] {
        assert!(eventually(PATIENCE, || answers_at(&cluster, address)), "{address}: {}", daemon.log());
    }
    let log = daemon.log();
    assert!(
        log.contains("device=\"host0\"") && !log.contains("device=\"cbr0\""),
        "pods' bridges are left alone: {log}"
    );
    assert!(!log.contains("device=\"card0\""), "a bridge's member is met on the bridge: {log}");
}
