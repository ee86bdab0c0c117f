//! Nodes as the AWS VPC CNI makes them: pods have addresses of the nodes' own network, which for some are brought in by
//! a second uplink (eth1). A rule and a routing table of their own send what those pods say out by eth1 again, unless
//! its connection is marked (0x80) as one that came in by eth0. The underlay is the VPC's router.
//!
//! As `aws-node` does for the sake of NodePorts, eth0 filters reverse paths loosely (2): the kernel looks from the
//! pod's address, whose table does not know eth0. All other devices filter strictly. AWS gives IPv6 no second uplink;
//! here both families are treated alike, which asks for more.

use super::rules::{self, FAMILIES, Family};
use super::{Shape, Sources};
use crate::laboratory::Lab;
use crate::laboratory::lab::{Node, Place};

const VPC: [&str; 2] = ["172.31.0.0/16", "fd31::/32"];
const ROUTER: [&str; 2] = ["172.31.0.1", "fd31::1"];
const GATEWAY: [&str; 2] = ["169.254.1.1", "fe80::1"];
/// Of every pod's device on the node.
const MAC: &str = "02:00:00:00:00:01";

pub const SHAPE: Shape = Shape { pods: super::PODS, missing: || None, lay_out, sources };

/// The node's addresses on eth1.
pub fn second_addresses(node: &Node) -> [String; 2] {
    let last = 110 + u16::from(node.number);
    [format!("172.31.0.{last}"), format!("fd31::{last}")]
}

fn lay_out(lab: &mut Lab) -> anyhow::Result<bool> {
    for node in &mut lab.nodes {
        for (index, pod) in node.pods.iter_mut().enumerate() {
            let last = 20 + 20 * node.number + u8::try_from(index)?;
            pod.v4 = [172, 31, 0, last].into();
            pod.v6 = format!("fd31::{last}").parse()?;
        }
    }
    lab.sysctl_outside(&[
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv4/conf/all/send_redirects", "0"),
        ("ipv4/conf/br0/send_redirects", "0"),
    ])?;
    for node in &lab.nodes {
        rules::kubelet(node)?;
        rules::policy_chain(lab, node)?;
        for family in FAMILIES {
            rules::restore(node, family, &marks(node, family))?;
        }
        lab.add_uplink(node, "eth1", 1)?;
        second_uplink(node)?;
        for pod in &node.pods {
            lab.cable_pod(node, &pod.name, &device(pod))?;
            connect(node, pod)?;
        }
    }
    Ok(true)
}

fn device(pod: &Place) -> String {
    format!("eni{}", pod.name)
}

/// Which uplink brings in a pod's address.
fn uplink(pod: &Place) -> &'static str {
    if ["client", "stranger"].contains(&pod.name.as_str()) { "eth0" } else { "eth1" }
}

fn second_uplink(node: &Node) -> anyhow::Result<()> {
    for (device, filter) in [("eth0", "2"), ("eth1", "1"), ("default", "1"), ("all", "0")] {
        // A device answers for its own addresses only, as those of the VPC do.
        node.host.sysctl(&[
            (&format!("ipv4/conf/{device}/rp_filter"), filter),
            (&format!("ipv4/conf/{device}/arp_ignore"), "1"),
            (&format!("ipv4/conf/{device}/arp_announce"), "2"),
            (&format!("ipv6/conf/{device}/proxy_ndp"), "1"),
        ])?;
    }
    for device in ["eth0", "eth1"] {
        for family in ["ipv4", "ipv6"] {
            node.host.sysctl(&[(&format!("{family}/neigh/{device}/proxy_delay"), "0")])?;
        }
    }
    let [v4, v6] = second_addresses(node);
    node.host.ip(&[
        &format!("address add {v4}/24 dev eth1 noprefixroute"),
        &format!("address add {v6}/64 dev eth1 nodad noprefixroute"),
        "link set eth1 up",
        &format!("route add {} dev eth1 scope link table 2", ROUTER[0]),
        &format!("route add default via {} dev eth1 table 2", ROUTER[0]),
        &format!("route add {} dev eth1 table 2", ROUTER[1]),
        &format!("route add default via {} dev eth1 table 2", ROUTER[1]),
    ])?;
    for family in FAMILIES {
        add_rule(node, family, "pref 1024 fwmark 0x80/0x80 lookup main")?;
    }
    Ok(())
}

fn add_rule(node: &Node, family: Family, rule: &str) -> anyhow::Result<()> {
    let words = [["-4", "-6"][family as usize], "rule", "add"].into_iter().chain(rule.split_whitespace());
    node.host.run("ip", &words.collect::<Vec<_>>(), "").map(drop)
}

fn connect(node: &Node, pod: &Place) -> anyhow::Result<()> {
    let (device, uplink) = (device(pod), uplink(pod));
    node.host.ip(&[
        &format!("link set dev {device} address {MAC}"),
        &format!("link set {device} up"),
        &format!("address add {}/64 dev {device} nodad", GATEWAY[1]),
        &format!("route add {}/32 dev {device} scope link", pod.v4),
        &format!("route add {}/128 dev {device}", pod.v6),
        // The VPC answers for the addresses of an uplink.
        &format!("neigh add proxy {} dev {uplink}", pod.v4),
        &format!("neigh add proxy {} dev {uplink}", pod.v6),
    ])?;
    for family in FAMILIES {
        let ip = family.of(pod);
        add_rule(node, family, &format!("pref 512 to {ip} lookup main"))?;
        if uplink == "eth1" {
            add_rule(node, family, &format!("pref 1536 from {ip} lookup 2"))?;
        }
    }
    pod.ip(&[
        "link set lo up",
        &format!("address add {}/32 dev eth0", pod.v4),
        &format!("address add {}/128 dev eth0 nodad", pod.v6),
        "link set eth0 up",
        &format!("neigh add {} lladdr {MAC} dev eth0 nud permanent", GATEWAY[0]),
        &format!("route add {} dev eth0 scope link", GATEWAY[0]),
        &format!("route add default via {} dev eth0", GATEWAY[0]),
        &format!("route add default via {} dev eth0", GATEWAY[1]),
    ])
}

/// `aws-node`'s rules: connections that come in by eth0 for the node (NodePorts, before DNAT) are marked, the mark is
/// restored for what pods answer; pods leave the VPC behind eth0's address.
fn marks(node: &Node, family: Family) -> String {
    let (vpc, own) = (VPC[family as usize], family.of(&node.host));
    format!(
        "*mangle
-A PREROUTING -i eth0 -m comment --comment \"AWS, primary ENI\" -m addrtype --dst-type LOCAL --limit-iface-in \
-j CONNMARK --set-xmark 0x80/0x80
-A PREROUTING -i eni+ -m comment --comment \"AWS, primary ENI\" -j CONNMARK --restore-mark --nfmask 0x80 --ctmask 0x80
COMMIT
*nat
:AWS-CONNMARK-CHAIN-0 - [0:0]
:AWS-SNAT-CHAIN-0 - [0:0]
-A PREROUTING -i eni+ -m comment --comment \"AWS, outbound connections\" -j AWS-CONNMARK-CHAIN-0
-A PREROUTING -m comment --comment \"AWS, CONNMARK\" -j CONNMARK --restore-mark --nfmask 0x80 --ctmask 0x80
-A AWS-CONNMARK-CHAIN-0 -d {vpc} -m comment --comment \"AWS CONNMARK CHAIN, VPC CIDR\" -j RETURN
-A AWS-CONNMARK-CHAIN-0 -m comment --comment \"AWS, CONNMARK\" -j CONNMARK --set-xmark 0x80/0x80
-A POSTROUTING -m comment --comment \"AWS SNAT CHAIN\" -j AWS-SNAT-CHAIN-0
-A AWS-SNAT-CHAIN-0 -d {vpc} -m comment --comment \"AWS SNAT CHAIN\" -j RETURN
-A AWS-SNAT-CHAIN-0 ! -o vlan+ -m comment --comment \"AWS, SNAT\" -m addrtype ! --dst-type LOCAL \
-j SNAT --to-source {own} --random-fully
COMMIT
*filter
-A FORWARD -i eni+ -j ACCEPT
-A FORWARD -o eni+ -j ACCEPT
COMMIT
"
    )
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
