//! Pods that are no processes of this kernel: a TCP/IP stack in userspace behind a tap device, as virtual machines (Kata,
//! KubeVirt) and gVisor have it. Only their packets can be served. Each question is asked by a pod in the node's bridge,
//! by one there that leaves checksums and segments to its device, and by one that is routed.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::laboratory::cluster::{Cluster, all, names, vip};
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::manifests::{Endpoint, port};
use crate::laboratory::messages::Kind::{self, Tcp4, Tcp6, Udp4, Udp6};
use crate::laboratory::messages::{IcmpError, IcmpKind};
use crate::laboratory::tap::{TapPod, Wiring};
use crate::laboratory::{eventually, lab_or_skip};
use serde_json::{Value, json};

/// Where backends tell whom they see, by TCP and UDP; and where they return what they get.
const SEEN: u16 = 9000;
const ECHO: u16 = 9100;
const LISTEN: &str = "--seen 9000 --echo 9100";
const NODE_PORT: u16 = 30_080;
/// The kinds of each family, TCP first.
const KINDS: [[Kind; 2]; 2] = [[Tcp4, Udp4], [Tcp6, Udp6]];
const MIB: u64 = 1 << 20;
/// A path that takes less than the pods' devices.
const SMALL_MTU: u32 = 1300;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Pods `client` and `a` on node1, where the tap pods will be, and `b` on node2.
fn cluster_or_skip() -> Option<Cluster> {
    let lab = lab_or_skip(&[("node1", &["client", "a"]), ("node2", &["b"])])?;
    Some(Cluster::on(lab, &["a", "b"], LISTEN))
}

fn start(cluster: &Cluster) -> [Daemon<'_>; 2] {
    ["node1", "node2"].map(|node| Daemon::start(&cluster.lab, node, &cluster.manifests.dir).expect("the daemon starts"))
}

/// A tap pod on node1, made while its daemon runs.
fn tap_pod(cluster: &Cluster, wiring: Wiring, number: u8) -> TapPod {
    let name = format!("pod{number}");
    let pod = TapPod::start(&cluster.lab, "node1", &name, number, wiring, LISTEN).expect("the pod starts");
    let is_served = || pod.is_served(&cluster.lab, "node1").unwrap();
    assert!(eventually(PATIENCE, is_served), "{}", cluster.lab.node("node1").host.log_tail());
    pod
}

/// One of each wiring.
fn tap_pods(cluster: &Cluster) -> [TapPod; 3] {
    let mut number = 50;
    Wiring::ALL.map(|wiring| {
        number += 1;
        tap_pod(cluster, wiring, number)
    })
}

/// A Service with the cluster IPs of `number`: port 80 of TCP and UDP, 81 of TCP for large transfers, and NodePorts.
fn put(cluster: &Cluster, number: u8, changes: Value, endpoints: &[Endpoint]) {
    let ports =
        [("tcp", "TCP", 80, 0), ("udp", "UDP", 80, 0), ("echo", "TCP", 81, 10)].map(|(name, protocol, at, more)| {
            let mut object = port(name, protocol, at);
            object["nodePort"] = json!(NODE_PORT + more + u16::from(number));
            object
        });
    let targets = [("tcp", "TCP", SEEN), ("udp", "UDP", SEEN), ("echo", "TCP", ECHO)];
    cluster.put_with(&format!("service-{number}"), number, json!(ports), changes, &targets, endpoints);
}

/// Load balancer IPs of a Service.
fn balancer(number: u8) -> [IpAddr; 2] {
    [IpAddr::from([192, 0, 2, number]), format!("2001:db8:80::{number}").parse().unwrap()]
}

fn balanced(number: u8) -> Value {
    let ingress = balancer(number).map(|ip| json!({"ip": ip}));
    json!({"spec": {"type": "LoadBalancer"}, "status": {"loadBalancer": {"ingress": ingress}}})
}

fn node_address(cluster: &Cluster, node: &str, family: usize) -> IpAddr {
    cluster.lab.node(node).host.addresses()[family]
}

#[test]
fn a_pod_with_a_stack_of_its_own_reaches_every_kind_of_address_as_itself() {
    let Some(cluster) = cluster_or_skip() else { return };
    put(&cluster, 1, balanced(1), &cluster.ready(&["a"]));
    put(&cluster, 2, balanced(2), &cluster.ready(&["b"]));
    let [daemon, _other] = start(&cluster);
    for mut pod in tap_pods(&cluster) {
        for (family, kinds) in KINDS.into_iter().enumerate() {
            let own = pod.addresses()[family];
            for (number, backend) in [(1, "a"), (2, "b")] {
                let node_port =
                    |node: &str| SocketAddr::new(node_address(&cluster, node, family), NODE_PORT + u16::from(number));
                let balanced = SocketAddr::new(balancer(number)[family], 80);
                for to in [vip(number, 80)[family], node_port("node1"), balanced] {
                    for kind in kinds {
                        let seen = all(&format!("{backend} {own}"), 5);
                        assert_eq!(pod.client.ask(kind, to, 5), seen, "{}, {kind:?} {to}: {}", pod.name, daemon.log());
                    }
                }
                // The other node forwards to a backend that is not its own in its own name.
                let seen = if backend == "a" { node_address(&cluster, "node2", family) } else { own };
                for kind in kinds {
                    let answers = pod.client.ask(kind, node_port("node2"), 5);
                    assert_eq!(answers, all(&format!("{backend} {seen}"), 5), "{}, {kind:?}", pod.name);
                }
            }
        }
        assert_eq!(pod.client.errors(), [], "nothing was refused");
    }
}

/// What an error about a packet of this pod to `to` has to say.
fn assert_about(errors: &[IcmpError], kind: IcmpKind, pod: &TapPod, protocol: u8, to: SocketAddr) {
    assert!(!errors.is_empty(), "{}: no ICMP about {to}", pod.name);
    for error in errors {
        let is_own = error.from.ip() == pod.addresses()[usize::from(to.is_ipv6())];
        let is_right = error.kind == kind && error.to == to && error.protocol == protocol;
        assert!(is_own && is_right && error.is_intact, "{} to {to}: {error:?}", pod.name);
    }
}

#[test]
fn what_nobody_serves_is_refused_by_icmp_that_names_the_services_address() {
    let Some(cluster) = cluster_or_skip() else { return };
    put(&cluster, 1, balanced(1), &[]);
    put(&cluster, 2, json!({}), &cluster.ready(&["a"]));
    let [daemon, _other] = start(&cluster);
    for mut pod in tap_pods(&cluster) {
        for (family, kinds) in KINDS.into_iter().enumerate() {
            let node_port = SocketAddr::new(node_address(&cluster, "node1", family), NODE_PORT + 1);
            let balanced = SocketAddr::new(balancer(1)[family], 80);
            let unknown_port = vip(2, 99)[family];
            for to in [vip(1, 80)[family], node_port, balanced, unknown_port] {
                for (kind, protocol) in kinds.into_iter().zip([TCP, UDP]) {
                    let answers = pod.client.ask(kind, to, 2);
                    assert_eq!(answers, all("ECONNREFUSED", 2), "{}, {kind:?} {to}: {}", pod.name, daemon.log());
                    assert_about(&pod.client.errors(), IcmpKind::PortUnreachable, &pod, protocol, to);
                }
            }
        }
    }
}

#[test]
fn policy_local_without_a_local_endpoint_drops_in_silence() {
    let Some(cluster) = cluster_or_skip() else { return };
    put(&cluster, 1, json!({"spec": {"internalTrafficPolicy": "Local"}}), &cluster.ready(&["b"]));
    let [daemon, _other] = start(&cluster);
    for mut pod in tap_pods(&cluster) {
        for (family, kinds) in KINDS.into_iter().enumerate() {
            let dropped = || daemon.metric("kubelane_datapath_verdicts_total{verdict=\"dropped_no_local_endpoint\"}");
            let before = dropped().unwrap();
            for (kind, silence) in kinds.into_iter().zip(["timed out", "EAGAIN"]) {
                assert_eq!(pod.client.ask(kind, vip(1, 80)[family], 1), all(silence, 1), "{}: {kind:?}", pod.name);
            }
            assert!(dropped().unwrap() >= before + 2.0, "the drops are counted");
        }
        assert_eq!(pod.client.errors(), [], "nothing was said");
    }
    put(&cluster, 1, json!({"spec": {"internalTrafficPolicy": "Local"}}), &cluster.ready(&["a", "b"]));
    cluster.wait_for_backend(cluster.lab.pod("a").v4.into(), true);
    let mut pod = tap_pod(&cluster, Wiring::Bridged, 70);
    let seen = all(&format!("a {}", pod.v4), 10);
    assert_eq!(pod.client.ask(Tcp4, vip(1, 80)[0], 10), seen, "the local one only: {}", daemon.log());
}

#[test]
fn large_transfers_arrive_as_they_were_sent() {
    let Some(cluster) = cluster_or_skip() else { return };
    for (number, backend) in [(1, "a"), (2, "b")] {
        put(&cluster, number, json!({"spec": {"type": "NodePort"}}), &cluster.ready(&[backend]));
    }
    let _daemons = start(&cluster);
    for mut pod in tap_pods(&cluster) {
        for family in 0..2 {
            // By the other node's port a packet is translated twice, and the second time it also gets another source.
            let by_port = SocketAddr::new(node_address(&cluster, "node2", family), NODE_PORT + 10 + 1);
            for to in [vip(1, 81)[family], vip(2, 81)[family], by_port] {
                assert_eq!(pod.client.transfer(to, 4 * MIB), Ok(()), "{} to {to}", pod.name);
            }
        }
    }
}

#[test]
fn a_smaller_mtu_on_the_way_is_told_to_the_pod_about_the_services_address() {
    let Some(cluster) = cluster_or_skip() else { return };
    put(&cluster, 1, json!({}), &cluster.ready(&["b"]));
    let _daemons = start(&cluster);
    let [v4, v6] = cluster.lab.node("node2").host.addresses();
    let routes = [format!("10.244.2.0/24 via {v4}"), format!("fd44:0:0:2::/64 via {v6}")];
    let change = routes.map(|route| format!("route change {route} mtu {SMALL_MTU}"));
    cluster.lab.node("node1").host.ip(&change.each_ref().map(String::as_str)).unwrap();
    let too_big = IcmpKind::TooBig { mtu: SMALL_MTU };
    let mut number = 50;
    let mut new_pod = |wiring| {
        number += 1;
        tap_pod(&cluster, wiring, number)
    };
    for wiring in Wiring::ALL {
        for family in 0..2 {
            // A pod keeps what it has learnt: each of these is a new one.
            let mut pod = new_pod(wiring);
            let to = vip(1, 81)[family];
            assert_eq!(pod.client.transfer(to, 2 * MIB), Ok(()), "{wiring:?}");
            assert_about(&pod.client.errors(), too_big, &pod, TCP, to);
            let mut pod = new_pod(wiring);
            let to = vip(1, 80)[family];
            assert_eq!(pod.client.ask_long(to, 1400), Err("EAGAIN".to_owned()), "{wiring:?}: it does not fit");
            assert_about(&pod.client.errors(), too_big, &pod, UDP, to);
            let fits = SMALL_MTU as usize - if family == 0 { 28 } else { 48 };
            let name = format!("b {}", pod.addresses()[family]);
            assert_eq!(pod.client.ask_long(to, fits).as_deref(), Ok(name.as_str()), "{wiring:?}");
            assert_eq!(pod.client.errors(), []);
        }
    }
}

/// The pod's stack fragments IPv4 (smoltcp does not fragment IPv6).
#[test]
fn datagrams_in_fragments_reach_the_backend_of_the_first_and_are_answered() {
    let Some(cluster) = cluster_or_skip() else { return };
    put(&cluster, 1, json!({}), &cluster.ready(&["a", "b"]));
    let [daemon, _other] = start(&cluster);
    for mut pod in tap_pods(&cluster) {
        for length in [1473, 4000, 7000] {
            let answer = pod.client.ask_long(vip(1, 80)[0], length);
            let is_right = answer.as_deref().is_ok_and(|text| text.ends_with(&pod.v4.to_string()));
            assert!(is_right, "{}, {length} bytes: {answer:?}; {}", pod.name, daemon.log());
        }
    }
}

#[test]
fn thousands_of_short_connections_are_served_without_a_stall() {
    const TIMES: u32 = 2000;
    let Some(cluster) = cluster_or_skip() else { return };
    put(&cluster, 1, json!({"spec": {"type": "NodePort"}}), &cluster.ready(&["a", "b"]));
    let [daemon, _other] = start(&cluster);
    for (mut pod, family) in tap_pods(&cluster).into_iter().zip([0, 1, 1]) {
        let by_port = SocketAddr::new(node_address(&cluster, "node2", family), NODE_PORT + 1);
        for (kind, to) in [(0, vip(1, 80)[family]), (1, vip(1, 80)[family]), (0, by_port)] {
            let kind = KINDS[family][kind];
            let (answers, slowest) = pod.client.ask_slowest(kind, to, TIMES);
            eprintln!("{}, {kind:?} to {to}: {answers:?}, the slowest took {slowest:?}", pod.name);
            assert!(names(&answers).iter().all(|name| name.starts_with(['a', 'b'])), "{answers:?}; {}", daemon.log());
            assert_eq!(answers.values().sum::<u32>(), TIMES);
            let (least, most) = (answers.values().min().unwrap(), answers.values().max().unwrap());
            assert!(answers.len() == 2 && most - least < TIMES / 4, "a fair choice gives each a half: {answers:?}");
            // A lost packet costs a second, smoltcp's first timeout.
            assert!(slowest < Duration::from_millis(900), "{}, {kind:?} to {to}: {slowest:?}", pod.name);
        }
    }
}

#[test]
fn a_pod_with_a_stack_of_its_own_serves_pods_the_node_and_clients_outside() {
    let Some(cluster) = cluster_or_skip() else { return };
    let [daemon, _other] = start(&cluster);
    for (pod, number) in tap_pods(&cluster).into_iter().zip([1, 2, 3]) {
        let endpoints = pod.addresses().map(|address| Endpoint::ready(address, "node1"));
        put(&cluster, number, json!({"spec": {"type": "NodePort"}}), &endpoints);
        cluster.wait_for_backend(pod.v6.into(), true);
        let by_packets = cluster.lab.pod_of_packets("client").unwrap();
        let clients = [
            ("client", cluster.client("client"), vip(number, 80)),
            ("client by packets", by_packets.client().unwrap(), vip(number, 80)),
            ("node1", cluster.host_client(), vip(number, 80)),
            (
                "outside",
                cluster.lab.client_outside().unwrap(),
                [0, 1].map(|family| {
                    SocketAddr::new(node_address(&cluster, "node1", family), NODE_PORT + u16::from(number))
                }),
            ),
        ];
        for (whence, mut client, to) in clients {
            for (family, kinds) in KINDS.into_iter().enumerate() {
                for kind in kinds {
                    let answers = client.ask(kind, to[family], 20);
                    let is_right = answers.len() == 1 && names(&answers)[0].starts_with(&pod.name);
                    assert!(is_right, "{whence}, {kind:?} to {}: {answers:?}; {}", pod.name, daemon.log());
                }
                let echo =
                    SocketAddr::new(to[family].ip(), if whence == "outside" { to[family].port() + 10 } else { 81 });
                assert_eq!(client.transfer(echo, 2 * MIB), Ok(()), "{whence} to {}", pod.name);
            }
        }
        let mut outside = cluster.lab.client_outside().unwrap();
        let by_node2 = SocketAddr::new(node_address(&cluster, "node2", 0), NODE_PORT + u16::from(number));
        let name = format!("{} {}", pod.name, node_address(&cluster, "node2", 0));
        assert!(eventually(PATIENCE, || outside.ask(Tcp4, by_node2, 1) == all(&name, 1)), "by the other node");
    }
}

#[test]
fn a_pod_reaches_itself_through_its_own_service() {
    let Some(cluster) = cluster_or_skip() else { return };
    let [daemon, _other] = start(&cluster);
    for (mut pod, number) in tap_pods(&cluster).into_iter().zip([1, 2, 3]) {
        let endpoints = pod.addresses().map(|address| Endpoint::ready(address, "node1"));
        put(&cluster, number, json!({"spec": {"type": "NodePort"}}), &endpoints);
        cluster.wait_for_backend(pod.v6.into(), true);
        for (family, kinds) in KINDS.into_iter().enumerate() {
            let node_port = SocketAddr::new(node_address(&cluster, "node1", family), NODE_PORT + u16::from(number));
            for to in [vip(number, 80)[family], node_port] {
                for kind in kinds {
                    let answers = pod.client.ask(kind, to, 3);
                    let own = format!("{} {}", pod.name, pod.addresses()[family]);
                    let is_right = answers.len() == 1 && names(&answers)[0].starts_with(&pod.name);
                    assert!(is_right, "{}, {kind:?} {to}: {answers:?}; {}", pod.name, daemon.log());
                    assert_ne!(names(&answers), [own.as_str()], "replies to itself would never leave the pod");
                }
            }
            assert_eq!(pod.client.transfer(vip(number, 81)[family], MIB), Ok(()), "{}", pod.name);
        }
    }
}

#[test]
fn session_affinity_goes_by_the_pods_address() {
    let Some(cluster) = cluster_or_skip() else { return };
    let sticky = json!({"spec": {"type": "NodePort", "sessionAffinity": "ClientIP"}});
    put(&cluster, 1, sticky, &cluster.ready(&["a", "b"]));
    let [daemon, _other] = start(&cluster);
    let mut chosen = Vec::new();
    for mut pod in tap_pods(&cluster) {
        for (family, kinds) in KINDS.into_iter().enumerate() {
            let node_port = SocketAddr::new(node_address(&cluster, "node1", family), NODE_PORT + 1);
            for kind in kinds {
                let first = pod.client.ask(kind, vip(1, 80)[family], 1);
                let (cluster_ip, by_port) = (first.keys().next().unwrap().clone(), node_port);
                let again = pod.client.ask(kind, vip(1, 80)[family], 15);
                assert_eq!(again, all(&cluster_ip, 15), "{}: {}", pod.name, daemon.log());
                assert_eq!(pod.client.ask(kind, by_port, 15), all(&cluster_ip, 15), "the same Service port");
                chosen.push(cluster_ip.chars().next());
            }
        }
    }
    // One of these eight is the same for all by chance in 128 runs; so more pods choose until two differ.
    let mut number = 70;
    while chosen.iter().all(|name| *name == chosen[0]) {
        assert!(number < 100, "everybody got the same: {chosen:?}");
        let mut pod = tap_pod(&cluster, Wiring::Bridged, number);
        chosen.push(names(&pod.client.ask(Tcp4, vip(1, 80)[0], 1))[0].chars().next());
        number += 1;
    }
}
