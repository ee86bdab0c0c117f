//! Nodes as Calico makes them without an overlay: a route to each pod, whose gateway is an address that nobody has and
//! the node answers for; blocks of pods routed between the nodes, as BGP would announce them; strict reverse-path
//! filtering (in IPv6, where the kernel has no such switch, by Calico's `rpfilter` rule); a chain for each pod.

use super::rules::{self, FAMILIES, Family};
use super::{Shape, Sources};
use crate::laboratory::Lab;
use crate::laboratory::lab::{Node, Place};

/// Of every pod's device on the node, and the link-local address that follows from it.
const MAC: &str = "ee:ee:ee:ee:ee:ee";
const GATEWAY: [&str; 2] = ["169.254.1.1", "fe80::ecee:eeff:feee:eeee"];

pub const SHAPE: Shape = Shape { pods: super::PODS, missing: || None, lay_out, sources };

fn lay_out(lab: &mut Lab) -> anyhow::Result<bool> {
    for node in &lab.nodes {
        rules::kubelet(node)?;
        for family in FAMILIES {
            rules::restore(node, family, &felix(lab, node, family))?;
        }
        for device in ["all", "default", "eth0"] {
            node.host.sysctl(&[(&format!("ipv4/conf/{device}/rp_filter"), "1")])?;
        }
        for pod in &node.pods {
            lab.cable_pod(node, &pod.name, &device(pod))?;
            connect(node, pod)?;
        }
        for other in &lab.nodes {
            node.host.ip(&blocks(node, other).each_ref().map(String::as_str))?;
        }
    }
    Ok(true)
}

fn device(pod: &Place) -> String {
    format!("cali{}", pod.name)
}

fn connect(node: &Node, pod: &Place) -> anyhow::Result<()> {
    let device = device(pod);
    for (key, value) in [("proxy_arp", "1"), ("rp_filter", "1"), ("route_localnet", "1")] {
        node.host.sysctl(&[(&format!("ipv4/conf/{device}/{key}"), value)])?;
    }
    node.host.sysctl(&[
        (&format!("ipv4/neigh/{device}/proxy_delay"), "0"),
        (&format!("ipv6/conf/{device}/proxy_ndp"), "1"),
        (&format!("ipv6/conf/{device}/accept_ra"), "0"),
    ])?;
    node.host.ip(&[
        &format!("link set dev {device} address {MAC}"),
        &format!("link set {device} up"),
        &format!("route add {}/32 dev {device} scope link", pod.v4),
        &format!("route add {}/128 dev {device}", pod.v6),
    ])?;
    pod.ip(&[
        "link set lo up",
        &format!("address add {}/32 dev eth0", pod.v4),
        &format!("address add {}/128 dev eth0 nodad", pod.v6),
        "link set eth0 up",
        &format!("route add {} dev eth0 scope link", GATEWAY[0]),
        &format!("route add default via {} dev eth0", GATEWAY[0]),
        &format!("route add default via {} dev eth0", GATEWAY[1]),
    ])
}

/// The ways to `owner`'s pods; on itself what is no pod's ends.
fn blocks(node: &Node, owner: &Node) -> [String; 2] {
    let number = owner.number;
    let blocks = [format!("10.244.{number}.0/26"), format!("fd44:0:0:{number}::/122")];
    if node.number == owner.number {
        return blocks.map(|block| format!("route add blackhole {block} proto bird"));
    }
    let by = owner.host.addresses();
    FAMILIES
        .map(|family| format!("route add {} via {} dev eth0 proto bird", blocks[family as usize], by[family as usize]))
}

/// Felix's chains, as far as they touch forwarded packets. Marks: 0x40000 from a pod, 0x10000 accepted by policy.
fn felix(lab: &Lab, node: &Node, family: Family) -> String {
    let all = family.pods();
    let (chains, rules) = workloads(lab, node, family);
    format!(
        "*raw
:cali-PREROUTING - [0:0]
-A PREROUTING -j cali-PREROUTING
-A cali-PREROUTING -j MARK --set-xmark 0x0/0xf0000
-A cali-PREROUTING -i cali+ -j MARK --set-xmark 0x40000/0x40000
-A cali-PREROUTING -m mark --mark 0x40000/0x40000 -m rpfilter --validmark --invert -j DROP
COMMIT
*nat
:cali-POSTROUTING - [0:0]
-A POSTROUTING -j cali-POSTROUTING
-A cali-POSTROUTING -s {all} ! -d {all} -j MASQUERADE --random-fully
COMMIT
*filter
:cali-FORWARD - [0:0]
:cali-from-wl-dispatch - [0:0]
:cali-to-wl-dispatch - [0:0]
{chains}-A FORWARD -j cali-FORWARD
-A FORWARD -m mark --mark 0x10000/0x10000 -j ACCEPT
-A cali-FORWARD -j MARK --set-xmark 0x0/0xe0000
-A cali-FORWARD -i cali+ -j cali-from-wl-dispatch
-A cali-FORWARD -o cali+ -j cali-to-wl-dispatch
{rules}COMMIT
"
    )
}

/// The chains for packets from and to each pod, and the rules in them and in the two that lead to them.
fn workloads(lab: &Lab, node: &Node, family: Family) -> (String, String) {
    let (mut chains, mut rules) = (String::new(), String::new());
    for pod in &node.pods {
        let device = device(pod);
        let (from, to) = (format!("cali-fw-{device}"), format!("cali-tw-{device}"));
        chains += &format!(":{from} - [0:0]\n:{to} - [0:0]\n");
        rules += &format!("-A cali-from-wl-dispatch -i {device} -g {from}\n");
        rules += &format!("-A cali-to-wl-dispatch -o {device} -g {to}\n");
        for chain in [&from, &to] {
            rules += &format!("-A {chain} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n");
            rules += &format!("-A {chain} -m conntrack --ctstate INVALID -j DROP\n");
            rules += &format!("-A {chain} -j MARK --set-xmark 0x0/0x10000\n");
            if chain == &to && pod.name == "a" {
                rules += &rules::policy(lab, family, chain);
            }
            rules += &format!("-A {chain} -j MARK --set-xmark 0x10000/0x10000\n");
        }
    }
    (chains, rules)
}

fn sources(lab: &Lab) -> Sources {
    let node = |name: &str| lab.node(name).host.addresses().map(|ip| ip.to_string());
    Sources {
        outside_elsewhere: [node("node1"), node("node2")],
        pod_elsewhere: lab.pod("client").addresses().map(|ip| ip.to_string()),
        host_here: node("node1"),
        host_elsewhere: node("node1"),
    }
}
