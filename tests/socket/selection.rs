//! Which endpoints a real client reaches through the real daemon, and what it meets where there are none.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use serde_json::{Value, json};

use crate::laboratory::client::Client;
use crate::laboratory::cluster::{Cluster, PODS, PORTS, all, mapped, names, vip};
use crate::laboratory::daemon::PATIENCE;
use crate::laboratory::eventually;
use crate::laboratory::manifests::{Endpoint, port, service, slice};
use crate::laboratory::messages::Kind::{self, *};

/// A connected socket of each kind that Services are asked by, for a TCP and a UDP port.
fn cases(tcp: [SocketAddr; 2], udp: [SocketAddr; 2]) -> [(Kind, SocketAddr); 6] {
    [(Tcp4, tcp[0]), (Tcp6, tcp[1]), (Tcp6, mapped(tcp[0])), (Udp4, udp[0]), (Udp6, udp[1]), (Udp6, mapped(udp[0]))]
}

/// The cases of a Service that [`Cluster::put`] made.
fn service_cases(number: u8) -> [(Kind, SocketAddr); 6] {
    cases(vip(number, 90), vip(number, 53))
}

/// The service's ports with NodePorts 30080 (TCP port 90) and 30053 (UDP).
fn node_ports() -> Value {
    let ports = PORTS.iter().map(|(name, protocol, number, _)| {
        let mut object = port(name, protocol, *number);
        match *number {
            90 => object["nodePort"] = json!(30090),
            53 => object["nodePort"] = json!(30053),
            _ => {}
        }
        object
    });
    ports.collect()
}

fn assert_only(client: &mut Client, number: u8, pods: &[&str]) {
    for (kind, to) in service_cases(number) {
        let counts = client.ask(kind, to, 40);
        assert_eq!(names(&counts), pods, "{kind:?} to {to}: {counts:?}");
    }
}

#[test]
fn without_endpoints_connect_and_sendto_are_refused_at_once() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("empty", 10, json!({}), &[]);
    cluster.put("unready", 11, json!({}), &cluster.endpoints(Endpoint::unready, &PODS));
    let _daemon = cluster.start();
    for (is_pod, mut client) in [(true, cluster.client("client")), (false, cluster.host_client())] {
        for number in [10, 11] {
            for (kind, to) in service_cases(number) {
                let mut socket = client.open(kind).unwrap();
                let connected = socket.connect(to);
                // A pod's is left to its packets, which are refused.
                let outcome = if is_pod && !kind.is_stream() {
                    connected.and_then(|()| socket.ask().map(drop))
                } else {
                    connected
                };
                assert_eq!(outcome, Err("ECONNREFUSED".to_owned()), "{kind:?} to {to}");
                if !kind.is_stream() {
                    let mut socket = client.open(kind).unwrap();
                    assert_eq!(socket.send_to(to), Err("ECONNREFUSED".to_owned()), "{kind:?} to {to}");
                }
            }
        }
    }
}

#[test]
fn a_port_of_a_cluster_ip_that_no_service_has_is_refused() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("echo", 10, json!({}), &cluster.ready(&PODS));
    let _daemon = cluster.start();
    let mut client = cluster.client("client");
    for (kind, to) in cases(vip(10, 4242), vip(10, 4242)) {
        assert_eq!(client.open(kind).unwrap().connect(to), Err("ECONNREFUSED".to_owned()), "{kind:?} to {to}");
    }
    assert_eq!(client.open(Udp4).unwrap().send_to(vip(10, 4242)[0]), Err("ECONNREFUSED".to_owned()));
    // The port exists for UDP, not for TCP.
    assert_eq!(client.open(Tcp4).unwrap().connect(vip(10, 53)[0]), Err("ECONNREFUSED".to_owned()));
}

#[test]
fn internal_policy_local_uses_this_nodes_pods_only() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("echo", 10, json!({"spec": {"internalTrafficPolicy": "Local"}}), &cluster.ready(&PODS));
    let _daemon = cluster.start();
    assert_only(&mut cluster.client("client"), 10, &["a"]);
}

#[test]
fn internal_policy_local_without_a_local_pod_drops_instead_of_refusing() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("echo", 10, json!({"spec": {"internalTrafficPolicy": "Local"}}), &cluster.ready(&["b", "c"]));
    let daemon = cluster.start();
    let mut client = cluster.client("client");
    for (kind, to) in service_cases(10) {
        if kind.is_stream() {
            assert_eq!(client.open(kind).unwrap().connect(to), Err("ETIMEDOUT".to_owned()), "{kind:?} to {to}");
            continue;
        }
        assert_eq!(client.open(kind).unwrap().send_to(to), Err("EPERM".to_owned()), "{kind:?} to {to}");
        // Left to its packets, which are dropped. (What an IPv6 socket sends to a v4-mapped address passes the hook.)
        let is_mapped = matches!(to.ip(), std::net::IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some());
        let expected = if is_mapped { "EPERM" } else { "EAGAIN" };
        let mut socket = client.open(kind).unwrap();
        assert_eq!((socket.connect(to), socket.ask()), (Ok(()), Err(expected.to_owned())), "{kind:?} to {to}");
    }
    drop(daemon);
}

#[test]
fn terminating_pods_serve_only_while_no_ready_one_exists() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let mixed = [cluster.endpoints(Endpoint::terminating, &["a", "c"]), cluster.ready(&["b"])].concat();
    let last = [cluster.endpoints(Endpoint::terminating, &["a", "c"]), cluster.endpoints(Endpoint::unready, &["b"])];
    cluster.put("mixed", 10, json!({}), &mixed);
    cluster.put("last", 11, json!({}), &last.concat());
    let _daemon = cluster.start();
    let mut client = cluster.client("client");
    assert_only(&mut client, 10, &["b"]);
    assert_only(&mut client, 11, &["a", "c"]);
}

#[test]
fn node_hints_then_zone_hints_choose_among_ready_pods() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "node1", "labels": {"topology.kubernetes.io/zone": "west"}},
    });
    cluster.manifests.save("node", &[node]);
    let hinted =
        |pod: &str, hints: Value| cluster.endpoints(|a, n| Endpoint::ready(a, n).hinted(hints.clone()), &[pod]);
    let nodes = [("a", "node1"), ("b", "node2"), ("c", "node2")];
    let by_node: Vec<_> = nodes.iter().flat_map(|(pod, n)| hinted(pod, json!({"forNodes": [{"name": n}]}))).collect();
    cluster.put("by-node", 10, json!({"spec": {"trafficDistribution": "PreferSameNode"}}), &by_node);
    let zones = [("a", "east"), ("b", "west"), ("c", "east")];
    let by_zone: Vec<_> = zones.iter().flat_map(|(pod, z)| hinted(pod, json!({"forZones": [{"name": z}]}))).collect();
    cluster.put("by-zone", 11, json!({"spec": {"trafficDistribution": "PreferClose"}}), &by_zone);
    let elsewhere: Vec<_> = PODS.iter().flat_map(|pod| hinted(pod, json!({"forZones": [{"name": "north"}]}))).collect();
    cluster.put("elsewhere", 12, json!({}), &elsewhere);
    let _daemon = cluster.start();
    let mut client = cluster.client("client");
    assert_only(&mut client, 10, &["a"]);
    assert_only(&mut client, 11, &["b"]);
    assert_only(&mut client, 12, &PODS);
}

#[test]
fn slices_of_one_service_merge_and_each_has_its_own_target_port() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let [to, _] = vip(10, 1234);
    let spec = json!({"clusterIP": to.ip(), "clusterIPs": [to.ip()], "ports": [port("line", "TCP", 1234)]});
    let endpoint = |pod: &str| Endpoint::ready(cluster.lab.pod(pod).v4.into(), cluster.lab.node_of(pod));
    cluster.manifests.save(
        "merged",
        &[
            service("merged", spec),
            slice("merged-1", "merged", &[("line", "TCP", 9000), ("other", "TCP", 9)], &[endpoint("a")]),
            slice("merged-2", "merged", &[("line", "TCP", 9001)], &[endpoint("b")]),
            slice("merged-3", "merged", &[("other", "TCP", 9000)], &[endpoint("c")]),
        ],
    );
    let _daemon = cluster.start();
    let counts = cluster.client("client").ask(Tcp4, to, 60);
    assert_eq!(names(&counts), ["a", "b"], "{counts:?}");
}

#[test]
fn node_ports_answer_on_the_nodes_addresses_to_pods_and_to_the_node_itself() {
    let Some(cluster) = Cluster::or_skip() else { return };
    // externalTrafficPolicy Local is about packets from outside: clients on the node use every endpoint.
    for (number, policy) in [(10, "Cluster"), (11, "Local")] {
        let changes = json!({"spec": {"type": "NodePort", "ports": node_ports(), "externalTrafficPolicy": policy}});
        cluster.put("echo", number, changes, &cluster.ready(&PODS));
        let daemon = cluster.start();
        let node = cluster.lab.node("node1").host.addresses();
        for mut client in [cluster.client("client"), cluster.host_client()] {
            for (kind, to) in cases(node.map(|ip| (ip, 30090).into()), node.map(|ip| (ip, 30053).into())) {
                let counts = client.ask(kind, to, 60);
                assert_eq!(names(&counts), PODS, "{policy}: {kind:?} to {to}: {counts:?}");
            }
            let counts = client.ask_unconnected(Udp4, (node[0], 30053).into(), 60);
            assert_eq!(names(&counts), PODS, "{policy}: {counts:?}");
            // Ports of the node that are no NodePort stay the node's own.
            assert_eq!(client.ask(Tcp4, (node[0], 30091).into(), 1), all("ECONNREFUSED", 1));
        }
        daemon.terminate().unwrap();
    }
}

#[test]
fn node_ports_answer_on_loopback_in_the_nodes_own_namespace_only() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let changes = json!({"spec": {"type": "NodePort", "ports": node_ports()}});
    cluster.put("echo", 10, changes, &cluster.ready(&PODS));
    let _daemon = cluster.start();
    let loopback = |port: u16| [SocketAddr::from(([127, 0, 0, 1], port)), (Ipv6Addr::LOCALHOST, port).into()];
    let mut host = cluster.host_client();
    let mut pod = cluster.client("client");
    for (kind, to) in cases(loopback(30090), loopback(30053)) {
        let counts = host.ask(kind, to, 60);
        assert_eq!(names(&counts), PODS, "{kind:?} to {to}: {counts:?}");
        assert_eq!(pod.ask(kind, to, 1), all("ECONNREFUSED", 1), "{kind:?} to {to} in a pod");
    }
}

#[test]
fn sockets_bound_to_loopback_reach_loopback_node_ports_where_the_kernel_lets_them_and_are_told_where_not() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let shifted = |shift: u64| {
        let mut ports = node_ports();
        for port in ports.as_array_mut().unwrap() {
            if let Some(node_port) = port["nodePort"].as_u64() {
                port["nodePort"] = json!(node_port + shift);
            }
        }
        json!({"spec": {"type": "NodePort", "ports": ports}})
    };
    let node = cluster.lab.node("node1");
    let _own = node.host.serve_as("own", "--tcp 9000 --udp 9000").unwrap();
    let own = node.host.addresses().map(|address| Endpoint::ready(address, "node1"));
    cluster.put("pods", 10, shifted(0), &cluster.ready(&PODS));
    cluster.put("mixed", 11, shifted(1), &[cluster.ready(&PODS), own.to_vec()].concat());
    let _daemon = cluster.start();
    let loopback = |port: u16| [SocketAddr::from(([127, 0, 0, 1], port)), (Ipv6Addr::LOCALHOST, port).into()];
    let mut host = cluster.host_client();
    for (kind, to) in cases(loopback(30090), loopback(30053)) {
        let from: SocketAddr = (to.ip(), 0).into();
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..20 {
            let mut socket = host.open(kind).unwrap();
            socket.bind_address(from).unwrap();
            socket.connect(to).unwrap_or_else(|errno| panic!("{kind:?} to {to}: {errno}"));
            assert_eq!(socket.peer().unwrap(), to);
            seen.insert(socket.ask().unwrap());
            socket.close().unwrap();
        }
        assert!(seen.len() > 1 && seen.iter().all(|name| PODS.contains(&name.as_str())), "{kind:?}: {seen:?}");

        let told = Err("EADDRNOTAVAIL".to_owned());
        let to_mixed = SocketAddr::from((to.ip(), to.port() + 1));
        for _ in 0..10 {
            let mut socket = host.open(kind).unwrap();
            socket.bind(from).unwrap();
            assert_eq!(socket.connect(to), told, "{kind:?} to {to}");
            if kind.is_stream() {
                socket.connect(to_mixed).unwrap_or_else(|errno| panic!("{kind:?} to {to_mixed}: {errno}"));
                assert_eq!((socket.peer().unwrap(), socket.ask().unwrap()), (to_mixed, "own".to_owned()));
            } else {
                assert_eq!(socket.send_to(to), told, "{kind:?} to {to}");
                assert_eq!(socket.connect(to_mixed), told, "{kind:?} to {to_mixed}");
            }
            socket.close().unwrap();
        }
    }
}

/// Sockets ask the maps only about what a byte of the filter lets pass: no kind of address may lack its byte.
#[test]
fn every_kind_of_address_is_served_before_and_after_a_restart_and_when_it_comes_late() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let put = |name: &str, number: u8, shift: u64| {
        let mut ports = node_ports();
        for port in ports.as_array_mut().unwrap() {
            if let Some(node_port) = port["nodePort"].as_u64() {
                port["nodePort"] = json!(node_port + shift);
            }
        }
        let changes = json!({
            "spec": {
                "type": "LoadBalancer",
                "externalIPs": [format!("203.0.113.{number}"), format!("2001:db8::{number}")],
                "ports": ports,
            },
            "status": {"loadBalancer": {"ingress": [
                {"ip": format!("198.51.100.{number}")}, {"ip": format!("2001:db8:1::{number}")},
            ]}},
        });
        cluster.put(name, number, changes, &cluster.ready(&PODS));
    };
    let node = cluster.lab.node("node1").host.addresses();
    let addresses = |number: u8| {
        [
            vip(number, 0).map(|vip| vip.ip()),
            [format!("203.0.113.{number}"), format!("2001:db8::{number}")].map(|ip| ip.parse().unwrap()),
            [format!("198.51.100.{number}"), format!("2001:db8:1::{number}")].map(|ip| ip.parse().unwrap()),
        ]
    };
    let assert_served = |number: u8, shift: u16| {
        let mut clients = [cluster.client("client"), cluster.host_client()];
        let node_port = |ips: [IpAddr; 2]| {
            cases(ips.map(|ip| (ip, 30090 + shift).into()), ips.map(|ip| (ip, 30053 + shift).into()))
        };
        let own = addresses(number).map(|ips| cases(ips.map(|ip| (ip, 90).into()), ips.map(|ip| (ip, 53).into())));
        let loopback = [IpAddr::from([127, 0, 0, 1]), Ipv6Addr::LOCALHOST.into()];
        for (client, with_loopback) in clients.iter_mut().zip([false, true]) {
            let loopback = with_loopback.then(|| node_port(loopback));
            for (kind, to) in own.into_iter().chain([node_port(node)]).chain(loopback).flatten() {
                let counts = client.ask(kind, to, 2);
                assert!(names(&counts).iter().all(|name| PODS.contains(name)), "{kind:?} to {to}: {counts:?}");
                if !kind.is_stream() {
                    let counts = client.ask_unconnected(kind, to, 2);
                    assert!(names(&counts).iter().all(|name| PODS.contains(name)), "{kind:?} to {to}: {counts:?}");
                }
            }
            assert_eq!(client.ask(Tcp4, vip(number, 4242)[0], 1), all("ECONNREFUSED", 1), "a port of nobody's");
        }
    };
    put("first", 10, 0);
    let daemon = cluster.start();
    assert_served(10, 0);
    daemon.terminate().unwrap();
    put("late", 11, 1);
    let daemon = cluster.start();
    assert_served(10, 0);
    assert_served(11, 1);
    put("later", 12, 2);
    let followed = eventually(PATIENCE, || {
        names(&cluster.client("client").ask(Tcp4, vip(12, 90)[0], 20)).iter().all(|name| PODS.contains(name))
    });
    assert!(followed);
    assert_served(12, 2);
    daemon.kill();
    assert_served(10, 0);
    let _daemon = cluster.start();
    (10..=12).zip(0..).for_each(|(number, shift)| assert_served(number, shift));
}

#[test]
fn external_and_load_balancer_addresses_work_from_inside() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let changes = json!({
        "spec": {"type": "LoadBalancer", "externalIPs": ["203.0.113.5", "2001:db8::5"], "externalTrafficPolicy": "Local"},
        "status": {"loadBalancer": {"ingress": [
            {"ip": "203.0.113.6", "ipMode": "VIP"}, {"ip": "2001:db8::6"}, {"ip": "203.0.113.7", "ipMode": "Proxy"},
        ]}},
    });
    cluster.put("echo", 10, changes, &cluster.ready(&PODS));
    let _daemon = cluster.start();
    for mut client in [cluster.client("client"), cluster.host_client()] {
        for number in [5, 6] {
            let ips =
                [format!("203.0.113.{number}"), format!("2001:db8::{number}")].map(|ip| ip.parse::<IpAddr>().unwrap());
            for (kind, to) in cases(ips.map(|ip| (ip, 90).into()), ips.map(|ip| (ip, 53).into())) {
                let counts = client.ask(kind, to, 60);
                assert_eq!(names(&counts), PODS, "{kind:?} to {to}: {counts:?}");
            }
        }
        // ipMode Proxy leaves the address to the real load balancer; here nothing answers.
        assert_eq!(client.ask(Udp4, ([203, 0, 113, 7], 53).into(), 1), all("EAGAIN", 1));
    }
}

#[test]
fn a_cluster_ip_that_the_node_itself_listens_on_is_left_alone() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("dns", 10, json!({}), &cluster.ready(&["b", "c"]));
    let _daemon = cluster.start();
    let to = vip(10, 53);
    let mut clients = [cluster.client("client"), cluster.host_client()];
    assert_eq!(names(&clients[0].ask(Udp4, to[0], 40)), ["b", "c"]);
    // As node-local DNS caches do it: a device of its own that holds the Service's addresses.
    let host = &cluster.lab.node("node1").host;
    host.ip(&["link add nodelocaldns type bridge", "link set nodelocaldns up"]).unwrap();
    let _caches = to.map(|to| {
        let nodad = if to.is_ipv6() { "nodad" } else { "" };
        host.ip(&[&format!("address add {} dev nodelocaldns {nodad}", to.ip())]).unwrap();
        host.serve_as("cache", &format!("--address {} --udp 53 --tcp 90", to.ip())).unwrap()
    });
    for client in &mut clients {
        for (kind, to) in cases(vip(10, 90), to) {
            let left_alone = eventually(PATIENCE, || client.ask(kind, to, 1) == all("cache", 1));
            assert!(left_alone, "{kind:?} to {to}");
            assert_eq!(client.ask(kind, to, 30), all("cache", 30), "{kind:?} to {to}");
        }
    }
    // The exception ends with the address.
    host.ip(&["link delete nodelocaldns"]).unwrap();
    let back = eventually(PATIENCE, || names(&clients[0].ask(Udp4, to[0], 30)) == ["b", "c"]);
    assert!(back, "the Service is served again");
}

#[test]
fn a_failed_choice_is_counted_by_its_reason() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("empty", 10, json!({}), &[]);
    cluster.put("away", 11, json!({"spec": {"internalTrafficPolicy": "Local"}}), &cluster.ready(&["b"]));
    cluster.put("echo", 12, json!({}), &cluster.ready(&["a"]));
    let daemon = cluster.start();
    let mut client = cluster.client("client");
    let reasons = [
        ("refused_no_endpoint", vip(10, 90)[0], "ECONNREFUSED"),
        ("dropped_no_local_endpoint", vip(11, 90)[0], "ETIMEDOUT"),
        ("refused_unknown_port", vip(12, 7)[0], "ECONNREFUSED"),
        ("connect_translated", vip(12, 90)[0], "a"),
    ];
    let sum = |reason: &str| -> f64 {
        let text = daemon.metrics().unwrap();
        let lines = text.lines().filter(|line| line.starts_with("kubelane_") && line.contains(reason));
        let values: Vec<f64> = lines.filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
        assert!(!values.is_empty(), "no metric names {reason}:\n{text}");
        values.iter().sum()
    };
    for (reason, to, result) in reasons {
        let before = sum(reason);
        assert_eq!(client.ask(Tcp4, to, 7), all(result, 7));
        assert_eq!(sum(reason) - before, 7.0, "{reason}");
    }
}
