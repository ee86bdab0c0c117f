//! Real sockets of every kind through the real daemon: who answers, and whom the application believes it speaks to.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde_json::json;

use crate::laboratory::client::Client;
use crate::laboratory::cluster::{Cluster, PODS, all, mapped, names, vip};
use crate::laboratory::manifests::port;
use crate::laboratory::messages::Kind::{self, *};
use crate::laboratory::skip;

/// Whether this kernel has such sockets.
fn has(client: &mut Client, kind: Kind) -> bool {
    let opened = client.open(kind).map(drop);
    if let Err(errno) = &opened {
        skip(&format!("no {kind:?} sockets in this kernel: {errno}"));
    }
    opened.is_ok()
}

#[test]
fn connected_sockets_of_both_families_spread_over_all_pods_and_see_the_service_as_their_peer() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("echo", 10, json!({}), &cluster.ready(&PODS));
    let _daemon = cluster.start();
    let cases: [(Kind, SocketAddr); 9] = [
        (Tcp4, vip(10, 90)[0]),
        (Tcp6, vip(10, 90)[1]),
        (Tcp6, mapped(vip(10, 90)[0])),
        (Udp4, vip(10, 53)[0]),
        (Udp6, vip(10, 53)[1]),
        (Udp6, mapped(vip(10, 53)[0])),
        (Mptcp4, vip(10, 91)[0]),
        (Mptcp6, vip(10, 91)[1]),
        (Mptcp6, mapped(vip(10, 91)[0])),
    ];
    for mut client in [cluster.client("client"), cluster.host_client()] {
        for (kind, to) in cases {
            if has(&mut client, kind) {
                let counts = client.ask(kind, to, 60);
                assert_eq!(names(&counts), PODS, "{kind:?} to {to}: {counts:?}");
            }
        }
        for to in vip(10, 80) {
            let counts = client.http(to, 60);
            assert_eq!(names(&counts), PODS, "HTTP to {to}: {counts:?}");
        }
    }
}

#[test]
fn unconnected_datagrams_spread_over_sockets_and_their_replies_come_from_the_service() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("echo", 10, json!({}), &cluster.ready(&PODS));
    let _daemon = cluster.start();
    let [v4, v6] = vip(10, 53);
    let cases = [(Udp4, v4), (Udp6, v6), (Udp6, mapped(v4)), (UdpLite4, v4), (UdpLite6, v6), (UdpLite6, mapped(v4))];
    let mut client = cluster.client("client");
    for (kind, to) in cases {
        if has(&mut client, kind) {
            let counts = client.ask_unconnected(kind, to, 60);
            assert_eq!(names(&counts), PODS, "{kind:?} to {to}: {counts:?}");
        }
    }
}

#[test]
fn an_unconnected_socket_keeps_its_pod_for_each_destination() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("echo", 10, json!({}), &cluster.ready(&PODS));
    let _daemon = cluster.start();
    let mut client = cluster.client("client");
    for (kind, to) in [(Udp4, vip(10, 53)[0]), (Udp6, vip(10, 53)[1]), (Udp6, mapped(vip(10, 53)[0]))] {
        let mut socket = client.open(kind).unwrap();
        let first = socket.ask_at(to).unwrap();
        assert_eq!(first.1, to);
        for _ in 0..30 {
            assert_eq!(socket.ask_at(to).unwrap(), first, "{kind:?} to {to}");
        }
    }
}

#[test]
fn one_socket_may_speak_to_more_destinations_than_its_own_table_holds() {
    let Some(cluster) = Cluster::or_skip() else { return };
    // Each Service port has its own target, so that a reply's source says which destination it belongs to.
    let numbers: Vec<u16> = (0..20).collect();
    let names: Vec<String> = numbers.iter().map(|n| format!("p{n}")).collect();
    let ports: Vec<_> = numbers.iter().zip(&names).map(|(n, name)| port(name, "UDP", 5300 + n)).collect();
    let targets: Vec<_> = numbers.iter().zip(&names).map(|(n, name)| (name.as_str(), "UDP", 9100 + n)).collect();
    let listen: String = numbers.iter().map(|n| format!("--udp {} ", 9100 + n)).collect();
    let _servers = PODS.map(|pod| cluster.lab.pod(pod).serve(&listen).unwrap());
    cluster.put_with("many", 11, json!(ports), json!({}), &targets, &cluster.ready(&PODS));
    let _daemon = cluster.start();

    let mut client = cluster.client("client");
    for (kind, family) in [(Udp4, 0), (Udp6, 1)] {
        let mut socket = client.open(kind).unwrap();
        let mut pods = BTreeMap::new();
        for round in 0..4 {
            for n in &numbers {
                let to = vip(11, 5300 + n)[family];
                let (pod, from) = socket.ask_at(to).unwrap_or_else(|errno| panic!("{to} in round {round}: {errno}"));
                assert_eq!(from, to, "round {round}");
                assert_eq!(*pods.entry(to).or_insert_with(|| pod.clone()), pod, "{to} in round {round}");
            }
        }
    }
}

#[test]
fn a_connected_datagram_socket_sees_the_service_in_getpeername_and_recvfrom() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("echo", 10, json!({}), &cluster.ready(&PODS));
    let _daemon = cluster.start();
    let mut client = cluster.client("client");
    for (kind, to) in [(Udp4, vip(10, 53)[0]), (Udp6, vip(10, 53)[1]), (Udp6, mapped(vip(10, 53)[0]))] {
        let mut socket = client.open(kind).unwrap();
        socket.connect(to).unwrap();
        assert_eq!(socket.peer().unwrap(), to);
        socket.send().unwrap();
        assert_eq!(socket.receive().unwrap().1, Some(to), "{kind:?}");
    }
}

#[test]
fn a_datagram_socket_may_be_connected_again_and_forgets_the_service_it_left() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("first", 10, json!({}), &cluster.ready(&["a"]));
    cluster.put("second", 12, json!({}), &cluster.ready(&["b"]));
    let _daemon = cluster.start();
    let pod = SocketAddr::from((cluster.lab.pod("a").v4, 9000));
    let mut client = cluster.client("client");
    let mut socket = client.open(Udp4).unwrap();
    for (to, name) in [(vip(10, 53)[0], "a"), (vip(12, 53)[0], "b"), (pod, "a"), (vip(12, 53)[0], "b")] {
        socket.connect(to).unwrap();
        assert_eq!(socket.peer().unwrap(), to);
        assert_eq!(socket.ask().unwrap(), name);
    }
}

#[test]
fn traffic_to_addresses_that_are_no_service_is_left_alone() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("echo", 10, json!({}), &cluster.ready(&["a"]));
    let _daemon = cluster.start();
    let mut client = cluster.client("client");
    for (kind, address) in [(Tcp4, cluster.lab.pod("b").addresses()[0]), (Tcp6, cluster.lab.pod("b").addresses()[1])] {
        assert_eq!(client.ask(kind, (address, 9000).into(), 5), all("b", 5));
        assert_eq!(client.ask(kind, (address, 9).into(), 1), all("ECONNREFUSED", 1));
    }
    assert_eq!(client.ask_unconnected(Udp4, (cluster.lab.pod("b").v4, 9000).into(), 5), all("b", 5));
}

#[test]
fn pods_of_another_node_are_none_of_this_daemons_business() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("echo", 10, json!({}), &cluster.ready(&PODS));
    let _daemon = cluster.start();
    assert_eq!(names(&cluster.client("client").ask(Udp4, vip(10, 53)[0], 60)), PODS);
    // node2 has no daemon: its cluster IPs are addresses that nothing answers.
    assert_eq!(cluster.client("stranger").ask(Udp4, vip(10, 53)[0], 1), all("EAGAIN", 1));
}

#[test]
fn a_pod_reaches_itself_through_its_own_service() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("echo", 10, json!({}), &cluster.ready(&["a"]));
    let _daemon = cluster.start();
    let mut client = cluster.client("a");
    for (kind, to) in [(Tcp4, vip(10, 90)[0]), (Tcp6, vip(10, 90)[1]), (Udp4, vip(10, 53)[0]), (Udp6, vip(10, 53)[1])] {
        assert_eq!(client.ask(kind, to, 3), all("a", 3), "{kind:?}");
    }
    assert_eq!(client.ask_unconnected(Udp4, vip(10, 53)[0], 3), all("a", 3));
}

#[test]
fn one_sockets_many_destinations_push_out_its_own_oldest_only() {
    let Some(cluster) = Cluster::or_skip() else { return };
    // One target port: which pod answers tells whether the destination was remembered.
    let numbers: Vec<u16> = (0..300).collect();
    let names: Vec<String> = numbers.iter().map(|n| format!("p{n}")).collect();
    let ports: Vec<_> = numbers.iter().zip(&names).map(|(n, name)| port(name, "UDP", 5300 + n)).collect();
    let targets: Vec<_> = names.iter().map(|name| (name.as_str(), "UDP", 9000)).collect();
    cluster.put_with("many", 11, json!(ports), json!({}), &targets, &cluster.ready(&PODS));
    let _daemon = cluster.start();
    let mut client = cluster.client("client");
    let mut greedy = cluster.client("other");
    let to = |n: u16| vip(11, 5300 + n)[0];
    let mut socket = client.open(Udp4).unwrap();
    let pods: Vec<_> = (0..60).map(|n| socket.ask_at(to(n)).unwrap()).collect();
    // Sockets of another pod ask as many Services as there are, and more than any table of all sockets would hold.
    for _ in 0..60 {
        let mut other = greedy.open(Udp4).unwrap();
        for n in &numbers {
            other.send_to(to(*n)).unwrap();
        }
        other.close().unwrap();
    }
    let again: Vec<_> = (0..60).map(|n| socket.ask_at(to(n)).unwrap()).collect();
    assert_eq!(again, pods, "nobody else's destinations are its business");
    // Its own many destinations: each reply is still shown as the Service's that was asked.
    for n in &numbers {
        assert_eq!(socket.ask_at(to(*n)).unwrap().1, to(*n));
    }
}

/// A client with a port of its own, so that a reply finds its socket whatever became of its association.
fn open_bound(client: &mut Client, kind: Kind) -> u32 {
    let any: SocketAddr = if kind.is_ipv6() { "[::]:7000" } else { "0.0.0.0:7000" }.parse().unwrap();
    let mut socket = client.open(kind).unwrap();
    socket.bind(any).unwrap();
    socket.number()
}

/// A Service's address and its only pod's own, as a socket of this kind writes them.
fn both_ways(cluster: &Cluster) -> [(Kind, SocketAddr, SocketAddr); 3] {
    let [v4, v6] = cluster.lab.pod("a").addresses().map(|address| SocketAddr::from((address, 9000)));
    let service = vip(10, 53);
    [(Udp4, service[0], v4), (Udp6, service[1], v6), (Udp6, mapped(service[0]), mapped(v4))]
}

#[test]
fn one_socket_may_ask_a_service_and_its_pod_and_each_reply_comes_from_where_it_asked_last() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("echo", 10, json!({}), &cluster.ready(&["a"]));
    let _daemon = cluster.start();
    let mut client = cluster.client("client");
    for (kind, service, pod) in both_ways(&cluster) {
        let mut socket = client.open(kind).unwrap();
        for to in [service, pod, pod, service, service, pod, service] {
            assert_eq!(socket.ask_at(to).unwrap(), ("a".to_owned(), to), "{kind:?}");
        }
    }
}

#[test]
fn beyond_its_first_table_too_a_socket_may_ask_a_pod_itself() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let numbers: Vec<u16> = (0..20).collect();
    let names: Vec<String> = numbers.iter().map(|n| format!("p{n}")).collect();
    let ports: Vec<_> = numbers.iter().zip(&names).map(|(n, name)| port(name, "UDP", 5300 + n)).collect();
    let targets: Vec<_> = numbers.iter().zip(&names).map(|(n, name)| (name.as_str(), "UDP", 9100 + n)).collect();
    let listen: String = numbers.iter().map(|n| format!("--udp {} ", 9100 + n)).collect();
    let _server = cluster.lab.pod("a").serve(&listen).unwrap();
    cluster.put_with("many", 11, json!(ports), json!({}), &targets, &cluster.ready(&["a"]));
    let _daemon = cluster.start();
    let mut client = cluster.client("client");
    let mut socket = client.open(Udp4).unwrap();
    for n in &numbers {
        let [service, pod] = [vip(11, 5300 + n)[0], (cluster.lab.pod("a").v4, 9100 + n).into()];
        for to in [service, pod, service, pod] {
            assert_eq!(socket.ask_at(to).unwrap(), ("a".to_owned(), to));
        }
    }
}

#[test]
fn a_socket_that_is_not_connected_to_a_service_any_more_sees_the_pod_that_it_asks() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("echo", 10, json!({}), &cluster.ready(&["a"]));
    let _daemon = cluster.start();
    let mut client = cluster.client("client");
    for (kind, service, pod) in both_ways(&cluster) {
        let number = open_bound(&mut client, kind);
        let mut socket = client.socket(number);
        socket.connect(service).unwrap();
        assert_eq!(socket.ask().unwrap(), "a");
        socket.disconnect().unwrap();
        for to in [pod, service, pod] {
            assert_eq!(socket.ask_at(to).unwrap(), ("a".to_owned(), to), "{kind:?}");
        }
        // To be connected to the pod is to have asked it.
        assert_eq!(socket.ask_at(service).unwrap().1, service, "{kind:?}");
        socket.connect(pod).unwrap();
        assert_eq!(socket.peer().unwrap(), pod);
        socket.send().unwrap();
        assert_eq!(socket.receive().unwrap().1, Some(pod), "{kind:?}");
        socket.close().unwrap();
    }
}

#[test]
fn a_connected_socket_that_names_its_service_keeps_its_pod_and_its_peer_is_who_answers() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("echo", 10, json!({}), &cluster.ready(&PODS));
    let _daemon = cluster.start();
    let mut client = cluster.client("client");
    for (kind, to) in [(Udp4, vip(10, 53)[0]), (Udp6, vip(10, 53)[1]), (Udp6, mapped(vip(10, 53)[0]))] {
        // Three pods: by chance all would go well once in 3^10 times.
        for _ in 0..10 {
            let mut socket = client.open(kind).unwrap();
            socket.connect(to).unwrap();
            let pod = socket.ask().unwrap();
            assert_eq!(socket.ask_at(to).unwrap(), (pod.clone(), to), "{kind:?}");
            assert_eq!(socket.ask().unwrap(), pod, "{kind:?}");
            socket.close().unwrap();
        }
    }
}
