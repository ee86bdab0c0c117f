//! UDP clients that keep one socket, and so one source port, while the pods behind a Service change.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde_json::json;

use crate::case_cluster::{By, CaseCluster, From, Served};
use crate::laboratory::client::Socket;
use crate::laboratory::daemon::PATIENCE;
use crate::laboratory::eventually;
use crate::laboratory::manifests::Endpoint;

cases![
    udp_survives_a_server_that_cycles_behind_a_node_port,
    udp_survives_a_server_that_cycles_behind_a_cluster_ip,
    udp_of_the_host_survives_a_server_that_cycles,
    udp_reaches_endpoints_that_were_not_ready_at_first,
    udp_follows_the_target_port_of_a_node_port,
];

const DNS: [(&str, &str, u16); 1] = [("dns", "UDP", 9000)];

fn service(world: &CaseCluster, name: &str, kind: &str) -> Served {
    world.service(name, json!({"type": kind, "ports": [{"name": "dns", "protocol": "UDP", "port": 53}]}))
}

/// The socket that a case keeps, bound to a port of its own.
fn with_socket(world: &CaseCluster, from: From, to: SocketAddr, port: u16, work: impl FnOnce(&mut Socket)) {
    world.with_client(from, |client| {
        let mut socket = client.open(By::Udp.kind(to)).expect("a socket");
        socket.bind((IpAddr::from(Ipv4Addr::UNSPECIFIED), port).into()).expect("a source port");
        work(&mut socket);
        socket.close().expect("closing");
    });
}

/// Asks by this socket until that pod answers, and then only it.
fn answers(socket: &mut Socket, to: SocketAddr, pod: &str) {
    let mut last = Err(String::new());
    let is_so = eventually(PATIENCE, || {
        last = socket.ask_at(to);
        last.as_ref().is_ok_and(|(name, _)| name == pod)
    });
    assert!(is_so, "{to}: {last:?}, not {pod}");
    for _ in 0..5 {
        let (name, from) = socket.ask_at(to).expect("an answer");
        assert_eq!((name.as_str(), from), (pod, to));
    }
}

fn cycles(world: &CaseCluster, name: &str, kind: &str, from: From, to: impl Fn(&Served) -> SocketAddr, port: u16) {
    let served = service(world, name, kind);
    let to = to(&served);
    world.slices(name, &DNS, &world.ready(&["b"]));
    world.reaches(from, By::Udp, &[to], &["b"]);
    with_socket(world, from, to, port, |socket| {
        answers(socket, to, "b");
        // The next server is there before the last one goes, and after it went.
        world.slices(name, &DNS, &world.ready(&["c"]));
        answers(socket, to, "c");
        world.slices(name, &DNS, &[]);
        let is_refused = || socket.ask_at(to).is_err();
        assert!(eventually(PATIENCE, is_refused), "nobody is left to answer");
        world.slices(name, &DNS, &world.ready(&["a"]));
        answers(socket, to, "a");
    });
    world.gone(name);
}

fn udp_survives_a_server_that_cycles_behind_a_node_port(world: &CaseCluster) {
    cycles(world, "cycle-port", "NodePort", From::Outside, |served| served.at_node("dns")[0], 12345);
}

fn udp_survives_a_server_that_cycles_behind_a_cluster_ip(world: &CaseCluster) {
    cycles(world, "cycle-ip", "ClusterIP", From::Pod("client"), |served| served.at(53)[0], 12346);
}

fn udp_of_the_host_survives_a_server_that_cycles(world: &CaseCluster) {
    cycles(world, "cycle-host", "ClusterIP", From::Host, |served| served.at(53)[0], 12347);
}

/// The client talks before anybody is ready, by both ways.
fn udp_reaches_endpoints_that_were_not_ready_at_first(world: &CaseCluster) {
    let served = service(world, "not-yet", "NodePort");
    world.slices("not-yet", &DNS, &world.endpoints(Endpoint::unready, &["b"]));
    for (from, to, port) in
        [(From::Pod("client"), served.at(53)[0], 12348), (From::Outside, served.at_node("dns")[0], 12349)]
    {
        world.slices("not-yet", &DNS, &world.endpoints(Endpoint::unready, &["b"]));
        with_socket(world, from, to, port, |socket| {
            assert!(eventually(PATIENCE, || socket.ask_at(to).is_err()), "nobody is ready");
            world.slices("not-yet", &DNS, &world.ready(&["b"]));
            answers(socket, to, "b");
        });
    }
    world.gone("not-yet");
}

/// On port 7000 the answer also says who asked, which tells the two servers of one pod apart.
fn udp_follows_the_target_port_of_a_node_port(world: &CaseCluster) {
    let served = service(world, "target", "NodePort");
    let to = served.at_node("dns")[0];
    world.slices("target", &DNS, &world.ready(&["a"]));
    with_socket(world, From::Outside, to, 12350, |socket| {
        answers(socket, to, "a");
        world.slices("target", &[("dns", "UDP", 7000)], &world.ready(&["a"]));
        answers(socket, to, "a 172.31.0.1");
    });
    world.gone("target");
}
