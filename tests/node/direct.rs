//! A client on one node that reaches a pod of the other both by a NodePort there and directly, from the same port.

use std::net::SocketAddr;

use serde_json::json;

use crate::laboratory::cluster::{Cluster, vip};
use crate::laboratory::daemon::Daemon;
use crate::laboratory::manifests::port;
use crate::laboratory::messages::Kind;

/// Where pods serve, TCP without closing anything by themselves.
const TARGET: u16 = 9000;

/// Daemons of both nodes, and a NodePort that leads to pod `b` on node2.
fn serve(cluster: &Cluster) -> [Daemon<'_>; 2] {
    let ports = [("tcp", "TCP"), ("udp", "UDP")].map(|(name, protocol)| {
        let mut object = port(name, protocol, 80);
        object["nodePort"] = json!(30_001);
        object
    });
    let changes = json!({"spec": {"type": "NodePort"}});
    let targets = [("tcp", "TCP", TARGET), ("udp", "UDP", TARGET)];
    cluster.put_with("one", 1, json!(ports), changes, &targets, &cluster.ready(&["b"]));
    ["node1", "node2"].map(|node| Daemon::start(&cluster.lab, node, &cluster.manifests.dir).unwrap())
}

#[test]
fn a_port_that_served_for_a_node_port_serves_for_the_pod_itself_next() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let _daemons = serve(&cluster);
    let host = &cluster.lab.node("node1").host;
    let mut client = host.client().unwrap();
    for (family, kind) in [Kind::Tcp4, Kind::Tcp6].into_iter().enumerate() {
        let by_node_port = SocketAddr::new(cluster.lab.node("node2").host.addresses()[family], 30_001);
        let directly = SocketAddr::new(cluster.lab.pod("b").addresses()[family], TARGET);
        for (local, then) in [(20_001, directly), (20_002, vip(1, 80)[family])] {
            for to in [by_node_port, then, by_node_port] {
                let mut socket = client.open(kind).unwrap();
                socket.bind(SocketAddr::new(host.addresses()[family], local)).unwrap();
                socket.connect(to).unwrap_or_else(|errno| panic!("{local} -> {to}: {errno}"));
                assert_eq!(socket.ask().as_deref(), Ok("b"), "{local} -> {to}");
                socket.abort().unwrap();
            }
        }
    }
}

#[test]
fn a_node_port_is_reached_from_the_port_of_an_open_connection_to_its_pod() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let _daemons = serve(&cluster);
    let host = &cluster.lab.node("node1").host;
    let [mut one, mut two] = [(); 2].map(|()| host.client().unwrap());
    for (family, kind) in [Kind::Tcp4, Kind::Tcp6].into_iter().enumerate() {
        let by_node_port = SocketAddr::new(cluster.lab.node("node2").host.addresses()[family], 30_001);
        let directly = SocketAddr::new(cluster.lab.pod("b").addresses()[family], TARGET);
        let own = SocketAddr::new(host.addresses()[family], 20_003);
        let mut direct = one.open(kind).unwrap();
        direct.bind(own).unwrap();
        direct.connect(directly).unwrap();
        let mut other = two.open(kind).unwrap();
        other.bind(own).unwrap();
        // The first SYN meets the connection that is there; the second, a second later, gets another port.
        other.connect(by_node_port).unwrap();
        assert_eq!(other.ask().as_deref(), Ok("b"));
        assert_eq!(direct.ask().as_deref(), Ok("b"), "the direct connection goes on");
        other.abort().unwrap();
        direct.abort().unwrap();
    }
}

/// The pod's answers to both would have the same ends if the NodePort's flow kept the client's port.
#[test]
fn a_datagram_socket_asks_a_node_port_and_its_pod_in_turn_and_each_answers_for_itself() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let _daemons = serve(&cluster);
    let mut client = cluster.host_client();
    for (family, kind) in [Kind::Udp4, Kind::Udp6].into_iter().enumerate() {
        let by_node_port = SocketAddr::new(cluster.lab.node("node2").host.addresses()[family], 30_001);
        let directly = SocketAddr::new(cluster.lab.pod("b").addresses()[family], TARGET);
        let mut socket = client.open(kind).unwrap();
        for to in [directly, by_node_port, directly, by_node_port, directly] {
            assert_eq!(socket.ask_at(to), Ok(("b".to_owned(), to)), "{to}");
        }
    }
}
