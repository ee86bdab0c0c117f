//! Nodes as flannel's vxlan backend makes them, dual-stack: a vxlan device per family whose neighbours, forwarding
//! entries and routes are all written by the daemon, pods on `cni0` by the `bridge` plugin, and flannel's masquerading.

use super::plugins::{self, Bridge};
use super::rules::{self, FAMILIES, Family};
use super::{Pods, Shape, Sources};
use crate::laboratory::Lab;
use crate::laboratory::lab::Node;

/// The uplink's 1500 bytes less 20 + 8 + 8 + 14 (IPv4, UDP, VXLAN, Ethernet), and as much less 20 by IPv6.
const MTU: [u32; 2] = [1450, 1430];
const DEVICES: [&str; 2] = ["flannel.1", "flannel-v6.1"];

/// `wide` has a larger MTU than the overlay, as pods have whose CNI does not know it.
const PODS: Pods = [("node1", &["client", "stranger", "a"]), ("node2", &["b", "wide"])];

pub const SHAPE: Shape = Shape { pods: PODS, missing: plugins::missing, lay_out, sources };

fn lay_out(lab: &mut Lab) -> anyhow::Result<bool> {
    let mut bridges_are_filtered = true;
    for node in &lab.nodes {
        rules::kubelet(node)?;
        rules::policy_chain(lab, node)?;
        for family in FAMILIES {
            rules::restore(node, family, &masquerade(family, node))?;
        }
        bridges_are_filtered &= rules::filter_bridges(node)?;
        for pod in &node.pods {
            let mtu = if pod.name == "wide" { 1500 } else { MTU[0] };
            plugins::add_to_bridge(lab, node, pod, Bridge { mtu, ip_masq: false })?;
        }
        node.host.ip(&devices(node).iter().map(String::as_str).collect::<Vec<_>>())?;
        for other in lab.nodes.iter().filter(|other| other.number != node.number) {
            join(node, other)?;
        }
    }
    Ok(bridges_are_filtered)
}

/// The addresses of a node's own vxlan devices: the first of its ranges.
fn tunnel_addresses(node: &Node) -> [String; 2] {
    [format!("10.244.{}.0", node.number), format!("fd44:0:0:{}::", node.number)]
}

fn hardware_address(node: &Node, family: Family) -> String {
    format!("0e:00:00:00:{:02x}:{:02x}", family as u8, node.number)
}

fn devices(node: &Node) -> Vec<String> {
    let of = |family: Family| {
        let at = family as usize;
        let (device, own, mtu) = (DEVICES[at], tunnel_addresses(node)[at].clone(), MTU[at]);
        let (mac, local) = (hardware_address(node, family), node.host.addresses()[at]);
        let kind = format!("type vxlan id 1 local {local} dev eth0 dstport 8472 nolearning");
        [
            format!("link add {device} address {mac} mtu {mtu} {kind}"),
            format!("address add {own}/{} dev {device}", [32, 128][at]),
            format!("link set {device} up"),
        ]
    };
    FAMILIES.into_iter().flat_map(of).collect()
}

/// What flannel writes when it learns of another node.
fn join(node: &Node, other: &Node) -> anyhow::Result<()> {
    for family in FAMILIES {
        let at = family as usize;
        let (device, gateway) = (DEVICES[at], tunnel_addresses(other)[at].clone());
        let (mac, to) = (hardware_address(other, family), other.host.addresses()[at].to_string());
        node.host.run("bridge", &["fdb", "append", &mac, "dev", device, "dst", &to], "")?;
        node.host.ip(&[
            &format!("neigh replace {gateway} lladdr {mac} dev {device} nud permanent"),
            &format!("route add {} via {gateway} dev {device} onlink", family.pods_of(other)),
        ])?;
    }
    Ok(())
}

/// flannel's rules (0.24): pods to pods as they are, pods to the world and the world to pods behind the node's address,
/// but not the world to this node's own pods.
fn masquerade(family: Family, node: &Node) -> String {
    let (all, own, multicast) = (family.pods(), family.pods_of(node), family.multicast());
    format!(
        "*nat
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG -s {own} -d {all} -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG -s {all} -d {own} -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG ! -s {all} -d {own} -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG -s {all} ! -d {multicast} -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s {all} -d {all} -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully
COMMIT
*filter
:FLANNEL-FWD - [0:0]
-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD
-A FLANNEL-FWD -s {all} -m comment --comment \"flanneld forward\" -j ACCEPT
-A FLANNEL-FWD -d {all} -m comment --comment \"flanneld forward\" -j ACCEPT
COMMIT
"
    )
}

fn sources(lab: &Lab) -> Sources {
    let tunnel = |name: &str| tunnel_addresses(lab.node(name));
    Sources {
        outside_elsewhere: [tunnel("node1"), tunnel("node2")],
        pod_elsewhere: lab.pod("client").addresses().map(|ip| ip.to_string()),
        host_here: ["10.244.1.1", "fd44:0:0:1::1"].map(str::to_owned),
        host_elsewhere: tunnel("node1"),
    }
}
