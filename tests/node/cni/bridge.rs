//! Nodes as the `bridge`, `host-local` and `portmap` plugins make them, with routes between the nodes.
//!
//! The plugin masquerades what leaves the node's own range of pods (`ipMasq`).

use super::plugins::{self, Bridge};
use super::rules::{self, FAMILIES};
use super::{Shape, Sources};
use crate::laboratory::Lab;
use crate::laboratory::lab::Node;

/// Port of node1 that leads to the witness in pod `a`.
pub const HOST_PORT: u16 = 8088;

pub const SHAPE: Shape = Shape { pods: super::PODS, missing: plugins::missing, lay_out, sources };

fn lay_out(lab: &mut Lab) -> anyhow::Result<bool> {
    let mut bridges_are_filtered = true;
    for node in &lab.nodes {
        rules::kubelet(node)?;
        rules::policy_chain(lab, node)?;
        for family in FAMILIES {
            let accept = "*filter\n-A FORWARD -i cni0 -j ACCEPT\n-A FORWARD -o cni0 -j ACCEPT\nCOMMIT\n";
            rules::restore(node, family, accept)?;
        }
        bridges_are_filtered &= rules::filter_bridges(node)?;
        for pod in &node.pods {
            let result = plugins::add_to_bridge(lab, node, pod, Bridge { mtu: 1500, ip_masq: true })?;
            if pod.name == "a" {
                plugins::map_port(node, pod, &result, HOST_PORT, super::WITNESS)?;
            }
        }
        node.host.ip(&routes_to_others(lab, node).iter().map(String::as_str).collect::<Vec<_>>())?;
    }
    Ok(bridges_are_filtered)
}

fn routes_to_others(lab: &Lab, node: &Node) -> Vec<String> {
    let others = lab.nodes.iter().filter(|other| other.number != node.number);
    let to = |other: &Node| {
        let by = other.host.addresses();
        FAMILIES.map(|family| format!("route add {} via {}", family.pods_of(other), by[family as usize]))
    };
    others.flat_map(to).collect()
}

fn sources(lab: &Lab) -> Sources {
    let node = |name: &str| lab.node(name).host.addresses().map(|ip| ip.to_string());
    Sources {
        outside_elsewhere: [node("node1"), node("node2")],
        pod_elsewhere: node("node1"),
        host_here: ["10.244.1.1", "fd44:0:0:1::1"].map(str::to_owned),
        host_elsewhere: node("node1"),
    }
}
