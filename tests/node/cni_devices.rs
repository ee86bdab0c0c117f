//! Outward devices of other kinds than Ethernet cards: VLANs and tunnels, with clients or another node's pods behind.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use crate::cni::outside::{self, By};
use crate::cni::tun::Cable;
use crate::cni::{BULK, WITNESS};
use crate::laboratory::cluster::Cluster;
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::lab::Place;
use crate::laboratory::manifests::port;
use crate::laboratory::{Lab, eventually, lab_or_skip, skip};
use serde_json::json;

/// The network behind the device: the client's addresses, and node1's.
const CLIENT: [&str; 2] = ["172.31.7.1", "fd37::1"];
const NODE1: [&str; 2] = ["172.31.7.11", "fd37::11"];
/// NodePorts: a pod on node1, one on node2, none. Those for bulk transfers are 100 higher.
const HERE: u16 = 30_001;
const THERE: u16 = 30_002;
const NOWHERE: u16 = 30_003;
const BOTH: &[usize] = &[0, 1];

/// A kind of device, as `ip link add` is told on two ends, and which families pass.
struct Kind {
    name: &'static str,
    device: &'static str,
    ends: [&'static str; 2],
    families: &'static [usize],
}

/// Between node1 and the client.
const UPLINKS: [Kind; 7] = [
    Kind {
        name: "VLANs (CONFIG_VLAN_8021Q)",
        device: "vlan7",
        ends: ["link eth0 type vlan id 7", "link br0 type vlan id 7"],
        families: BOTH,
    },
    Kind {
        name: "VXLAN (CONFIG_VXLAN)",
        device: "vxlan7",
        ends: [
            "type vxlan id 7 local 172.31.0.11 remote 172.31.0.1 dstport 4789 dev eth0",
            "type vxlan id 7 local 172.31.0.1 remote 172.31.0.11 dstport 4789 dev br0",
        ],
        families: BOTH,
    },
    Kind {
        name: "IPIP (CONFIG_NET_IPIP)",
        device: "ipip7",
        ends: ["type ipip local 172.31.0.11 remote 172.31.0.1", "type ipip local 172.31.0.1 remote 172.31.0.11"],
        families: &[0],
    },
    Kind {
        name: "SIT (CONFIG_IPV6_SIT)",
        device: "sit7",
        ends: ["type sit local 172.31.0.11 remote 172.31.0.1", "type sit local 172.31.0.1 remote 172.31.0.11"],
        families: &[1],
    },
    Kind {
        name: "GRE (CONFIG_NET_IPGRE)",
        device: "gre7",
        ends: ["type gre local 172.31.0.11 remote 172.31.0.1", "type gre local 172.31.0.1 remote 172.31.0.11"],
        families: BOTH,
    },
    Kind {
        name: "GRE over IPv6 (CONFIG_IPV6_GRE)",
        device: "gre67",
        ends: ["type ip6gre local fd31::11 remote fd31::1", "type ip6gre local fd31::1 remote fd31::11"],
        families: BOTH,
    },
    Kind {
        name: "IP over IPv6 (CONFIG_IPV6_TUNNEL)",
        device: "tnl67",
        ends: [
            "type ip6tnl mode any local fd31::11 remote fd31::1",
            "type ip6tnl mode any local fd31::1 remote fd31::11",
        ],
        families: BOTH,
    },
];

/// Between the nodes. The first has no fixed other end, as Calico's `tunl0`: the route names it.
const OVERLAYS: [Kind; 4] = [
    Kind {
        name: "IPIP (CONFIG_NET_IPIP)",
        device: "ipip8",
        ends: ["type ipip local 172.31.0.11", "type ipip local 172.31.0.12"],
        families: &[0],
    },
    Kind {
        name: "GRE (CONFIG_NET_IPGRE)",
        device: "gre8",
        ends: ["type gre local 172.31.0.11 remote 172.31.0.12", "type gre local 172.31.0.12 remote 172.31.0.11"],
        families: BOTH,
    },
    Kind {
        name: "GRE over IPv6 (CONFIG_IPV6_GRE)",
        device: "gre68",
        ends: ["type ip6gre local fd31::11 remote fd31::12", "type ip6gre local fd31::12 remote fd31::11"],
        families: BOTH,
    },
    Kind {
        name: "IP over IPv6 (CONFIG_IPV6_TUNNEL)",
        device: "tnl68",
        ends: [
            "type ip6tnl mode any local fd31::11 remote fd31::12",
            "type ip6tnl mode any local fd31::12 remote fd31::11",
        ],
        families: BOTH,
    },
];
/// node1's addresses on them.
const OVERLAY: [&str; 2] = ["10.244.1.0", "fd44:0:0:1::"];

/// Two nodes with a pod each, and Services.
fn cluster() -> Option<Cluster> {
    let lab = lab_or_skip(&[("node1", &["a"]), ("node2", &["b"])])?;
    let cluster = Cluster::on(lab, &["a", "b"], &format!("--seen {WITNESS} --bulk {BULK}"));
    for (number, node_port, pods) in [(1, HERE, &["a"][..]), (2, THERE, &["b"]), (3, NOWHERE, &[])] {
        let ports = [("tcp", "TCP", 80, 0), ("udp", "UDP", 80, 0), ("bulk", "TCP", 81, 100)];
        let ports = ports.map(|(name, protocol, service, more)| {
            let mut object = port(name, protocol, service);
            object["nodePort"] = json!(node_port + more);
            object
        });
        let targets = [("tcp", "TCP", WITNESS), ("udp", "UDP", WITNESS), ("bulk", "TCP", BULK)];
        let changes = json!({"spec": {"type": "NodePort"}});
        let endpoints = cluster.ready(pods);
        cluster.put_with(&format!("service-{number}"), number, json!(ports), changes, &targets, &endpoints);
    }
    Some(cluster)
}

fn start<'lab>(cluster: &'lab Cluster, options: &[&str]) -> Daemon<'lab> {
    Daemon::start_with(&cluster.lab, "node1", &cluster.manifests.dir, options).expect("the daemon starts")
}

fn ip(place: &Place, lines: &[String]) -> anyhow::Result<()> {
    place.ip(&lines.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Whether the device could be made; `false`, said aloud, where the kernel has no such kind.
fn is_made(kind: &Kind, result: anyhow::Result<()>) -> bool {
    let Err(error) = result else { return true };
    let said = format!("{error:#}");
    assert!(said.contains("Unknown device type") || said.contains("Operation not supported"), "{said}");
    skip(&format!("this kernel has no {}", kind.name));
    false
}

fn addresses(device: &str, own: [&str; 2]) -> Vec<String> {
    vec![
        format!("address add {}/24 dev {device}", own[0]),
        format!("address add {}/64 dev {device} nodad", own[1]),
        format!("link set {device} up"),
    ]
}

fn wait_until_attached(daemon: &Daemon<'_>, device: &str) {
    let line = format!("attached to this device device=\"{device}\"");
    assert!(eventually(PATIENCE, || daemon.log().contains(&line)), "{device} was not found; {}", daemon.log());
}

/// What is not as `seen` says, asked from outside at `node`: by `from`'s family, whom pod `a` and pod `b` see.
fn wrong_answers(lab: &Lab, from: [&str; 2], node: IpAddr, seen: [&str; 2]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut expect = |what: String, got: String, expected: &str| {
        if got != expected {
            wrong.push(format!("{what} at {node}: {got:?}, not {expected:?}"));
        }
    };
    for (port, expected) in [(HERE, format!("a {}", seen[0])), (THERE, format!("b {}", seen[1]))] {
        let to = SocketAddr::new(node, port);
        for by in [By::Tcp, By::Udp] {
            expect(format!("{by:?} {port}"), outside::ask(lab, from, by, to), &expected);
        }
        let large = outside::ask_large(lab, from, to, 3000).map_or_else(|error| format!("{error:#}"), |(text, _)| text);
        expect(format!("a large datagram to {port}"), large, &expected);
        let bulk = outside::transfer(lab, from, SocketAddr::new(node, port + 100), 4 << 20);
        expect(format!("4 MiB to and from {port}"), bulk.unwrap_or_else(|error| format!("{error:#}")), &expected);
    }
    for by in [By::Tcp, By::Udp] {
        let got = outside::ask(lab, from, by, SocketAddr::new(node, NOWHERE));
        expect(format!("{by:?} without an endpoint"), got, "refused");
    }
    wrong
}

#[test]
fn a_client_behind_a_vlan_or_a_tunnel_is_served_by_a_device_that_the_daemon_found() {
    let Some(cluster) = cluster() else { return };
    let (lab, daemon) = (&cluster.lab, start(&cluster, &[]));
    let node1 = &lab.node("node1").host;
    let mut wrong = Vec::new();
    for kind @ Kind { name, device, ends, families } in &UPLINKS {
        let made = ip(node1, &[format!("link add name {device} {}", ends[0])])
            .and_then(|()| lab.ip_outside(&[format!("link add name {device} {}", ends[1])]));
        if !is_made(kind, made) {
            continue;
        }
        ip(node1, &addresses(device, NODE1)).unwrap();
        lab.ip_outside(&addresses(device, CLIENT)).unwrap();
        wait_until_attached(&daemon, device);
        for family in *families {
            let sees_b = node1.addresses()[*family].to_string();
            let found = wrong_answers(lab, CLIENT, NODE1[*family].parse().unwrap(), [CLIENT[*family], &sees_b]);
            wrong.extend(found.into_iter().map(|what| format!("{name}: {what}")));
        }
        ip(node1, &[format!("link delete {device}")]).unwrap();
        lab.ip_outside(&[format!("link delete {device}")]).unwrap_or_default();
    }
    assert!(wrong.is_empty(), "{wrong:#?}\n{}\n{}", daemon.log(), daemon.metrics().unwrap());
}

#[test]
fn pods_of_another_node_behind_a_tunnel_are_reached_by_a_device_that_the_daemon_found() {
    let Some(cluster) = cluster() else { return };
    let (lab, daemon) = (&cluster.lab, start(&cluster, &[]));
    let nodes = ["node1", "node2"].map(|name| &lab.node(name).host);
    let mut wrong = Vec::new();
    for kind in &OVERLAYS {
        let add = |at: usize| ip(nodes[at], &[format!("link add name {} {}", kind.device, kind.ends[at])]);
        if !is_made(kind, add(0).and_then(|()| add(1))) {
            continue;
        }
        join_nodes(lab, kind.device, kind.families);
        wait_until_attached(&daemon, kind.device);
        let found = wrong_answers_outside(lab, kind.families);
        wrong.extend(found.into_iter().map(|what| format!("{}: {what}", kind.name)));
        for (at, node) in nodes.into_iter().enumerate() {
            ip(node, &[format!("link delete {}", kind.device)]).unwrap();
            // The routes went with the device; the laboratory's own are there again for the next.
            let other = nodes[1 - at].addresses();
            let back = kind
                .families
                .iter()
                .map(|family| format!("route add {} via {}", pods(1 - at, *family), other[*family]));
            ip(node, &back.collect::<Vec<_>>()).unwrap();
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}\n{}\n{}", daemon.log(), daemon.metrics().unwrap());
}

/// The range of a node's pods; nodes count from 0.
fn pods(node: usize, family: usize) -> String {
    [format!("10.244.{}.0/24", node + 1), format!("fd44:0:0:{}::/64", node + 1)][family].clone()
}

/// Sends what the nodes' pods say to each other through the device.
fn join_nodes(lab: &Lab, device: &str, families: &[usize]) {
    let nodes = ["node1", "node2"].map(|name| &lab.node(name).host);
    for at in [0, 1] {
        let (own, other) = (at + 1, nodes[1 - at]);
        let mut lines = vec![
            format!("address add 10.244.{own}.0/32 dev {device}"),
            format!("address add fd44:0:0:{own}::/128 dev {device} nodad"),
            format!("link set {device} up"),
        ];
        for family in families {
            let hop = if families.len() == 1 { format!("via {} onlink", other.v4) } else { String::new() };
            lines.push(format!("route replace {} dev {device} {hop}", pods(1 - at, *family)));
        }
        ip(nodes[at], &lines).unwrap();
    }
}

/// As [`wrong_answers`], of a client on the underlay at node1's own addresses, with pod `b` behind the overlay.
fn wrong_answers_outside(lab: &Lab, families: &[usize]) -> Vec<String> {
    let client = ["172.31.0.1", "fd31::1"];
    let node = lab.node("node1").host.addresses();
    let of = |family: &usize| wrong_answers(lab, client, node[*family], [client[*family], OVERLAY[*family]]);
    families.iter().flat_map(of).collect()
}

/// Devices without link headers on any kernel: the client is behind one, then the other node's pods behind another.
/// The daemon is told the name: a tun device may be anything.
#[test]
fn clients_and_pods_behind_tun_devices_are_served_when_the_devices_are_named() {
    let Some(cluster) = cluster() else { return };
    let lab = &cluster.lab;
    let [node1, node2] = ["node1", "node2"].map(|name| &lab.node(name).host);
    if !Path::new("/dev/net/tun").exists() {
        return skip("this kernel has no tun devices (CONFIG_TUN)");
    }
    let daemon = start(&cluster, &["--devices", "eth0,tun?"]);
    let _uplink = Cable::new("tun7", [node1.netns(), &lab.underlay()]).unwrap();
    ip(node1, &addresses("tun7", NODE1)).unwrap();
    lab.ip_outside(&addresses("tun7", CLIENT)).unwrap();
    wait_until_attached(&daemon, "tun7");
    let by_uplink = |sees_b: [&str; 2]| -> Vec<String> {
        let of = |family: usize| {
            wrong_answers(lab, CLIENT, NODE1[family].parse().unwrap(), [CLIENT[family], sees_b[family]])
        };
        [0, 1].into_iter().flat_map(of).collect()
    };
    let mut wrong = by_uplink(["172.31.0.11", "fd31::11"]);
    let _overlay = Cable::new("tun8", [node1.netns(), node2.netns()]).unwrap();
    join_nodes(lab, "tun8", BOTH);
    wait_until_attached(&daemon, "tun8");
    wrong.extend(by_uplink(OVERLAY));
    wrong.extend(wrong_answers_outside(lab, BOTH));
    assert!(wrong.is_empty(), "{wrong:#?}\n{}\n{}", daemon.log(), daemon.metrics().unwrap());
}

#[test]
fn a_change_of_rp_filter_is_followed() {
    let Some(cluster) = cluster() else { return };
    let node = cluster.lab.node("node1");
    let set =
        |device: &str, value: &str| node.host.sysctl(&[(&format!("ipv4/conf/{device}/rp_filter"), value)]).unwrap();
    set("all", "0");
    set("eth0", "0");
    let daemon = start(&cluster, &[]);
    let pins = node.pin_path.display().to_string();
    let template = "jsonpath={.items[?@.device=='eth0'].rpFilter}";
    let known = || node.kubelane(&["get", "devices", "-o", template, "--pin-path", &pins]).unwrap();
    assert_eq!(known(), "off");
    for (device, value, expected) in [("eth0", "1", "strict"), ("all", "2", "loose"), ("all", "0", "strict")] {
        set(device, value);
        assert!(eventually(PATIENCE, || known() == expected), "{device} {value}: {}; {}", known(), daemon.log());
    }
}

#[test]
fn check_tells_of_pods_whose_device_has_no_end_on_the_node() {
    let Some(cluster) = cluster() else { return };
    let (node, pod) = (cluster.lab.node("node1"), cluster.lab.pod("a"));
    let check = || node.kubelane(&["check", "--pin-path", &node.pin_path.display().to_string()]).unwrap();
    let netns = pod.netns().display().to_string();
    node.host.ip(&[&format!("link add mv0 link eth0 netns {netns} type macvlan mode bridge")]).unwrap();
    assert!(check().contains("devices of pods"), "{}", check());
    pod.ip(&["link set mv0 up", "route del default", "route add default dev mv0"]).unwrap();
    let told = check();
    assert!(told.contains("of kind macvlan -> their sockets are served"), "{told}");
}
