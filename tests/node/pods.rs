//! Real daemons, and pods that no socket program has seen connect: what their packets get, and what is left to them.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use crate::laboratory::client::Client;
use crate::laboratory::cluster::{Cluster, all, names, vip};
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::lab_or_skip;
use crate::laboratory::manifests::port;
use crate::laboratory::messages::Kind::{Tcp4, Tcp6, Udp4, Udp6};
use crate::laboratory::{
    eventually,
    lab::{Lab, Place},
};
use serde_json::json;

/// Where a backend tells whom it sees.
const SEEN: u16 = 9000;
const NODE_PORT: u16 = 30_080;
/// Addresses of load balancers, which lead to node1.
const BALANCED: [&str; 2] = ["192.0.2.1", "2001:db8:80::1"];

fn cluster_or_skip() -> Option<Cluster> {
    let lab = lab_or_skip(&[("node1", &["client", "other", "a"]), ("node2", &["b"])])?;
    Some(Cluster::on(lab, &["a", "b"], &format!("--seen {SEEN}")))
}

/// A Service for TCP and UDP, with cluster IPs of `number`, a NodePort and load balancer IPs.
fn put(cluster: &Cluster, number: u8, changes: serde_json::Value, pods: &[&str]) {
    let ports = ["TCP", "UDP"].map(|protocol| {
        let mut object = port(&protocol.to_lowercase(), protocol, 80);
        object["nodePort"] = json!(NODE_PORT + u16::from(number));
        object
    });
    let targets = [("tcp", "TCP", SEEN), ("udp", "UDP", SEEN)];
    let name = format!("service-{number}");
    cluster.put_with(&name, number, json!(ports), changes, &targets, &cluster.ready(pods));
}

fn balanced(ranges: &[&str]) -> serde_json::Value {
    let ingress = BALANCED.map(|ip| json!({"ip": ip}));
    json!({
        "spec": {"type": "LoadBalancer", "loadBalancerSourceRanges": ranges},
        "status": {"loadBalancer": {"ingress": ingress}},
    })
}

fn start<'l>(cluster: &'l Cluster, options: &[&str]) -> Daemon<'l> {
    Daemon::start_with(&cluster.lab, "node1", &cluster.manifests.dir, options).expect("the daemon starts")
}

fn packets(lab: &Lab, pod: &str) -> Client {
    lab.pod_of_packets(pod).and_then(|place| place.client()).expect("a client starts")
}

fn answer(client: &mut Client, to: SocketAddr) -> String {
    let kind = if to.is_ipv4() { Tcp4 } else { Tcp6 };
    names(&client.ask(kind, to, 1)).join(" and ")
}

#[test]
fn load_balancer_source_ranges_hold_for_pods_and_for_the_nodes_own_processes() {
    let Some(cluster) = cluster_or_skip() else { return };
    let [own4, own6] = cluster.lab.pod("client").addresses();
    put(&cluster, 1, balanced(&[&format!("{own4}/32"), &format!("{own6}/128")]), &["a"]);
    let daemon = start(&cluster, &[]);
    let (mut served, mut barred) = (cluster.client("client"), cluster.client("other"));
    let mut node = cluster.host_client();
    let (mut served_packets, mut barred_packets) = (packets(&cluster.lab, "client"), packets(&cluster.lab, "other"));
    for (ip, own) in BALANCED.iter().zip([own4, own6]) {
        let to = SocketAddr::new(ip.parse().unwrap(), 80);
        let expected = format!("a {own}");
        assert_eq!(answer(&mut served, to), expected, "{}", daemon.log());
        assert_eq!(answer(&mut served_packets, to), expected);
        for client in [&mut barred, &mut barred_packets] {
            assert_eq!(answer(client, to), "timed out", "{to}");
        }
        // Its address is in no range. As a drop in the end would be, and at once.
        assert_eq!(answer(&mut node, to), "ETIMEDOUT", "{to}");
        // Cluster IPs have no ranges.
        assert_eq!(answer(&mut barred, vip(1, 80)[usize::from(to.is_ipv6())]).split(' ').next(), Some("a"));
    }
    drop(daemon);
    let host = cluster.lab.node("node1").host.addresses();
    let node_object = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": "node1"},
        "status": {"addresses": host.map(|ip| json!({"type": "InternalIP", "address": ip}))},
    });
    cluster.manifests.save("node1", &[node_object]);
    put(&cluster, 1, balanced(&["172.31.0.0/24", "fd31::/64"]), &["a"]);
    let daemon = start(&cluster, &[]);
    for ip in BALANCED {
        let to = SocketAddr::new(ip.parse().unwrap(), 80);
        assert!(answer(&mut node, to).starts_with("a "), "{to}: {}", daemon.log());
        assert_eq!(answer(&mut served, to), "timed out", "{to}");
    }
}

/// What a sidecar asks: where was this connection going, before iptables sent it here?
fn original_destination(stream: &std::net::TcpStream) -> SocketAddr {
    const SO_ORIGINAL_DST: libc::c_int = 80;
    let mut address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::sockaddr_in>() as libc::socklen_t;
    let pointer: *mut libc::sockaddr_in = &mut address;
    // SAFETY: the option writes at most `length` bytes to `address`, which is that long.
    let result =
        unsafe { libc::getsockopt(stream.as_raw_fd(), libc::SOL_IP, SO_ORIGINAL_DST, pointer.cast(), &mut length) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    (IpAddr::from(address.sin_addr.s_addr.to_ne_bytes()), u16::from_be(address.sin_port)).into()
}

#[test]
fn a_sidecar_sees_the_services_address_when_sockets_of_pods_are_left_alone() {
    let Some(cluster) = cluster_or_skip() else { return };
    put(&cluster, 1, json!({}), &["a"]);
    let pod = cluster.lab.pod("client");
    let redirect = "-t nat -A OUTPUT -p tcp --dport 80 -j REDIRECT --to-ports 15001";
    let to = vip(1, 80)[0];
    for (options, expected) in [(&[][..], None), (&["--socket-lb", "host"][..], Some(to))] {
        let daemon = start(&cluster, options);
        // Without the sidecar the pod is served either way; by its packets if not by its socket.
        let mut client = cluster.client("client");
        for (kind, family) in [(Tcp4, 0), (Tcp6, 1), (Udp4, 0), (Udp6, 1)] {
            let name = format!("a {}", pod.addresses()[family]);
            assert_eq!(client.ask(kind, vip(1, 80)[family], 2), all(&name, 2), "{options:?}: {}", daemon.log());
        }
        if expected.is_some() {
            let by_sockets = daemon.metric("kubelane_datapath_verdicts_total{verdict=\"connect_translated\"}").unwrap();
            let mut node = cluster.host_client();
            assert!(answer(&mut node, to).starts_with("a "), "the node's own sockets are served as before");
            let after = daemon.metric("kubelane_datapath_verdicts_total{verdict=\"connect_translated\"}").unwrap();
            assert_eq!(after - by_sockets, 1.0);
        }
        pod.run("iptables", &redirect.split(' ').collect::<Vec<_>>(), "").expect("iptables works in a pod");
        let listener = pod.inside(|| Ok(TcpListener::bind("0.0.0.0:15001")?)).unwrap();
        listener.set_nonblocking(true).unwrap();
        // A sidecar that says nothing; a socket that was translated goes past it, to the backend's port.
        let _ = client.ask(Tcp4, to, 1);
        let seen = listener.accept().ok().map(|(stream, _)| original_destination(&stream));
        pod.run("iptables", &redirect.replace("-A", "-D").split(' ').collect::<Vec<_>>(), "").unwrap();
        assert_eq!(seen, expected);
    }
}

#[test]
fn policy_cluster_hides_the_client_from_a_backend_on_the_node_where_that_is_asked_for() {
    let Some(cluster) = cluster_or_skip() else { return };
    put(&cluster, 1, json!({"spec": {"type": "NodePort"}}), &["a"]);
    put(&cluster, 2, json!({"spec": {"type": "NodePort", "externalTrafficPolicy": "Local"}}), &["a"]);
    let daemon = start(&cluster, &["--cluster-policy-source", "node"]);
    let mut outside = cluster.lab.client_outside().unwrap();
    let host = cluster.lab.node("node1").host.addresses();
    let client: [IpAddr; 2] = [[172, 31, 0, 1].into(), "fd31::1".parse().unwrap()];
    for family in 0..2 {
        let node_port = |number: u16| SocketAddr::new(host[family], NODE_PORT + number);
        for kind in [[Tcp4, Udp4], [Tcp6, Udp6]][family] {
            let hidden = all(&format!("a {}", host[family]), 3);
            assert_eq!(outside.ask(kind, node_port(1), 3), hidden, "{kind:?}: {}", daemon.log());
            assert_eq!(outside.ask(kind, node_port(2), 3), all(&format!("a {}", client[family]), 3), "policy Local");
        }
    }
    // What the switch is for: a pod whose default route does not lead to the node.
    let pod = cluster.lab.pod("a");
    pod.ip(&["route del default via 10.244.1.1", "route del default via fd44:0:0:1::1"]).unwrap();
    pod.ip(&["route add 172.31.0.11 via 10.244.1.1", "route add fd31::11 via fd44:0:0:1::1"]).unwrap();
    for (family, kind) in [Tcp4, Tcp6].into_iter().enumerate() {
        let to = SocketAddr::new(host[family], NODE_PORT + 1);
        assert_eq!(outside.ask(kind, to, 1), all(&format!("a {}", host[family]), 1), "{}", daemon.log());
    }
}

#[test]
fn cluster_ips_serve_clients_outside_where_that_is_asked_for() {
    let Some(cluster) = cluster_or_skip() else { return };
    put(&cluster, 1, json!({}), &["a"]);
    put(&cluster, 2, json!({}), &["b"]);
    for network in ["10.96.0.0/16", "fd96::/64"] {
        cluster.lab.route_outside(network, "node1").unwrap();
    }
    let mut outside = cluster.lab.client_outside().unwrap();
    let daemon = start(&cluster, &["--external-cluster-ip"]);
    let host = cluster.lab.node("node1").host.addresses();
    for (family, client) in ["172.31.0.1", "fd31::1"].into_iter().enumerate() {
        assert_eq!(answer(&mut outside, vip(1, 80)[family]), format!("a {client}"), "{}", daemon.log());
        assert_eq!(answer(&mut outside, vip(2, 80)[family]), format!("b {}", host[family]), "{}", daemon.log());
        assert_eq!(answer(&mut outside, vip(1, 81)[family]), "ECONNREFUSED");
    }
    drop(daemon);
    let _daemon = start(&cluster, &[]);
    assert_eq!(answer(&mut outside, vip(1, 81)[0]), "timed out", "nobody answers for it");
}

/// Seen from the device's birth: its programs are there before a pod can use it.
#[test]
fn a_new_pods_device_is_served_within_milliseconds_and_one_that_goes_leaves_nothing() {
    let Some(cluster) = cluster_or_skip() else { return };
    put(&cluster, 1, json!({}), &["a"]);
    let _daemon = start(&cluster, &[]);
    let node = cluster.lab.node("node1");
    let links = || std::fs::read_dir(node.pin_path.join("v3/links")).unwrap().count();
    let before = links();
    let netns = cluster.lab.pod("other").netns().display().to_string();
    let mut waits = Vec::new();
    for round in 0..20 {
        let began = Instant::now();
        node.host.ip(&[&format!("link add pod{round} type veth peer name peer{round} netns {netns}")]).unwrap();
        let made = began.elapsed();
        while links() != before + 2 {
            assert!(began.elapsed() < PATIENCE, "a program for each direction");
            std::thread::sleep(Duration::from_micros(100));
        }
        waits.push(began.elapsed() - made);
        node.host.ip(&[&format!("link del pod{round}")]).unwrap();
        assert!(eventually(PATIENCE, || links() == before), "its pins are gone");
    }
    waits.sort_unstable();
    eprintln!("from a device's birth to its programs: {:?} in the middle, {:?} at most", waits[10], waits[19]);
    assert!(waits[10] < Duration::from_millis(50), "{waits:?}");
}

/// To be deleted at once: one by one, each costs the kernel an RCU grace period.
const GROUPS: [u32; 2] = [71, 72];

/// Pins of programs on node1's devices.
fn links(cluster: &Cluster) -> usize {
    std::fs::read_dir(cluster.lab.node("node1").pin_path.join("v3/links")).map_or(0, Iterator::count)
}

/// Devices whose other end is in a pod, half of them in each of two groups: lines for `ip`.
fn pairs(cluster: &Cluster, numbers: std::ops::Range<usize>) -> Vec<String> {
    let netns = cluster.lab.pod("other").netns().display().to_string();
    let add = |n| format!("link add many{n} group {} type veth peer name peer{n} netns {netns}", GROUPS[n % 2]);
    numbers.map(add).collect()
}

#[test]
fn five_hundred_pods_are_served_within_a_second_of_the_start() {
    let Some(cluster) = cluster_or_skip() else { return };
    put(&cluster, 1, json!({}), &["a"]);
    let node = cluster.lab.node("node1");
    let lines = pairs(&cluster, 0..500);
    node.host.ip(&lines.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    // Two for each device, two for the uplink and the three pods' each, and those of the cgroup.
    let daemon = start(&cluster, &[]);
    let ready = Instant::now();
    assert!(eventually(PATIENCE, || links(&cluster) >= 1000 + 8), "{} links: {}", links(&cluster), daemon.log());
    let waited = ready.elapsed();
    eprintln!("500 pods' devices: ready {:?} after the start, all attached {waited:?} after that", daemon.ready_after);
    assert!(waited < Duration::from_secs(1), "{waited:?}");
    // The next daemon adopts them.
    let all = links(&cluster);
    drop(daemon);
    let daemon = start(&cluster, &[]);
    assert!(!daemon.log().contains("trying again"), "{}", daemon.log());
    assert_eq!(links(&cluster), all);
}

#[test]
fn a_thousand_pods_that_come_and_go_leave_nothing_behind() {
    let Some(cluster) = cluster_or_skip() else { return };
    put(&cluster, 1, json!({}), &["a"]);
    let daemon = start(&cluster, &[]);
    let node = cluster.lab.node("node1");
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    let (links_before, descriptors_before) = (links(&cluster), descriptors());
    let began = Instant::now();
    for round in 0..20 {
        let numbers = round * 50..(round + 1) * 50;
        let lines = pairs(&cluster, numbers);
        node.host.ip(&lines.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
        // Half of them go before anybody can have looked at them.
        node.host.ip(&[&format!("link del group {}", GROUPS[0])]).unwrap();
        assert!(eventually(PATIENCE, || links(&cluster) == links_before + 50), "{}: {}", links(&cluster), daemon.log());
        node.host.ip(&[&format!("link del group {}", GROUPS[1])]).unwrap();
    }
    eprintln!("1,000 devices came and went within {:?}", began.elapsed());
    assert!(eventually(PATIENCE, || links(&cluster) == links_before), "{}: {}", links(&cluster), daemon.log());
    assert!(eventually(PATIENCE, || descriptors() <= descriptors_before), "{} of {descriptors_before}", descriptors());
    let left =
        node.kubelane(&["get", "devices", "-o", "name", "--pin-path", &node.pin_path.display().to_string()]).unwrap();
    assert!(!left.contains("many"), "{left}");
}

#[test]
fn a_restarted_daemon_takes_over_pods_devices_and_one_without_them_lets_go() {
    let Some(cluster) = cluster_or_skip() else { return };
    put(&cluster, 1, json!({}), &["b"]);
    let mut client = packets(&cluster.lab, "client");
    let daemon = start(&cluster, &[]);
    assert!(answer(&mut client, vip(1, 80)[0]).starts_with("b "), "{}", daemon.log());
    daemon.kill();
    assert!(answer(&mut client, vip(1, 80)[0]).starts_with("b "), "programs serve without a daemon");
    let daemon = start(&cluster, &[]);
    assert!(answer(&mut client, vip(1, 80)[0]).starts_with("b "), "{}", daemon.log());
    drop(daemon);
    let daemon = start(&cluster, &["--pod-devices", "none"]);
    assert_eq!(answer(&mut client, vip(1, 80)[0]), "timed out", "{}", daemon.log());
    drop(daemon);
    cluster.lab.node("node1").cleanup().unwrap();
}

/// A container in a container, or a client of a VPN server that is a pod: its packets come out of the pod's device, and no
/// program of the node sees its sockets. Behind MASQUERADE it is the pod; otherwise the node has a route to it by the pod.
#[test]
fn a_network_behind_a_pod_reaches_services_as_the_pod_or_as_itself() {
    let Some(cluster) = cluster_or_skip() else { return };
    put(&cluster, 1, json!({"spec": {"type": "NodePort"}}), &["a"]);
    put(&cluster, 2, json!({}), &["b"]);
    put(&cluster, 3, json!({}), &[]);
    let daemon = start(&cluster, &[]);
    // The pod that the network is behind, and the one that is in it: only its device is another.
    let (gateway, nested) = (cluster.lab.pod("client"), cluster.lab.pod("other"));
    let inner = nest(&cluster.lab, gateway, nested);
    let host = cluster.lab.node("node1").host.addresses();
    for masquerades in [true, false] {
        if masquerades {
            masquerade(gateway, "-A");
        } else {
            masquerade(gateway, "-D");
            route_to_nested(&cluster.lab, gateway);
        }
        let mut client = packets(&cluster.lab, "other");
        for (family, kinds) in [[Tcp4, Udp4], [Tcp6, Udp6]].into_iter().enumerate() {
            let seen = if masquerades { gateway.addresses()[family] } else { inner[family] };
            for kind in kinds {
                let node_port = SocketAddr::new(host[family], NODE_PORT + 1);
                for (name, to) in [("a", vip(1, 80)[family]), ("b", vip(2, 80)[family]), ("a", node_port)] {
                    let expected = all(&format!("{name} {seen}"), 10);
                    assert_eq!(client.ask(kind, to, 10), expected, "{kind:?} {masquerades}: {}", daemon.log());
                }
                // Refused as anybody else; what answers is translated twice on its way in.
                assert_eq!(client.ask(kind, vip(3, 80)[family], 1), all("ECONNREFUSED", 1), "{kind:?} {masquerades}");
            }
        }
    }
}

/// Takes `nested` off its node and connects it to `gateway`, which routes for it: its new addresses.
fn nest(lab: &Lab, gateway: &Place, nested: &Place) -> [IpAddr; 2] {
    let netns = nested.netns().display().to_string();
    lab.node("node1").host.ip(&[&format!("link del {}", nested.name)]).unwrap();
    gateway
        .ip(&[
            &format!("link add inner type veth peer name eth0 netns {netns}"),
            "address add 10.99.0.1/24 dev inner",
            "address add fd99::1/64 dev inner nodad",
            "link set inner up",
        ])
        .unwrap();
    nested
        .ip(&[
            "address add 10.99.0.2/24 dev eth0",
            "address add fd99::2/64 dev eth0 nodad",
            "link set eth0 up",
            "route add default via 10.99.0.1",
            "route add default via fd99::1",
        ])
        .unwrap();
    [[10, 99, 0, 2].into(), "fd99::2".parse().unwrap()]
}

fn masquerade(gateway: &Place, change: &str) {
    for program in ["iptables", "ip6tables"] {
        let words = ["-t", "nat", change, "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE"];
        gateway.run(program, &words, "").expect("iptables works in a pod");
    }
}

/// Lets both nodes reach what is behind the pod.
fn route_to_nested(lab: &Lab, gateway: &Place) {
    let [v4, v6] = gateway.addresses();
    let [host4, host6] = lab.node("node1").host.addresses();
    for (node, v4, v6) in [("node1", v4, v6), ("node2", host4, host6)] {
        let routes = [format!("route add 10.99.0.0/24 via {v4}"), format!("route add fd99::/64 via {v6}")];
        lab.node(node).host.ip(&routes.each_ref().map(String::as_str)).unwrap();
    }
}
