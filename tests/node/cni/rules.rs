//! What others write into iptables on a node: kubelet, CNIs, network policies. By iptables-restore, as they do.

use std::net::IpAddr;

use super::outside::BARRED;
use crate::laboratory::Lab;
use crate::laboratory::lab::{Node, Place};

/// One of the two rule sets of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

pub const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

impl Family {
    pub fn of(self, place: &Place) -> IpAddr {
        place.addresses()[self as usize]
    }

    /// The range of all pods.
    pub fn pods(self) -> &'static str {
        ["10.244.0.0/16", "fd44::/48"][self as usize]
    }

    /// The range of one node's pods.
    pub fn pods_of(self, node: &Node) -> String {
        let number = node.number;
        [format!("10.244.{number}.0/24"), format!("fd44:0:0:{number}::/64")][self as usize].clone()
    }

    pub fn multicast(self) -> &'static str {
        ["224.0.0.0/4", "ff00::/8"][self as usize]
    }
}

/// Adds `rules` (the input of iptables-restore) to what is there.
pub fn restore(node: &Node, family: Family, rules: &str) -> anyhow::Result<()> {
    let program = ["/usr/sbin/iptables-restore", "/usr/sbin/ip6tables-restore"][family as usize];
    node.host.run(program, &["--noflush"], rules).map(drop)
}

/// FORWARD's policy becomes DROP, and kubelet bars the loopback range from outside.
pub fn kubelet(node: &Node) -> anyhow::Result<()> {
    let localnet = "-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"block incoming localnet connections\" \
-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP";
    for (family, own) in [(Family::V4, localnet), (Family::V6, "")] {
        restore(node, family, &format!("*filter\n:FORWARD DROP [0:0]\n:KUBE-FIREWALL - [0:0]\n{own}\nCOMMIT\n"))?;
    }
    Ok(())
}

/// The rules of a network policy of pod `a`, to be put in `chain`: a client outside, and the pod `stranger`, are turned
/// away by their addresses. (Refused rather than dropped, as kube-router does: an answer is sooner seen than none.)
pub fn policy(lab: &Lab, family: Family, chain: &str) -> String {
    let a = family.of(lab.pod("a"));
    let reset = ["icmp-port-unreachable", "tcp-reset"][family as usize];
    let barred = [BARRED[family as usize].to_owned(), family.of(lab.pod("stranger")).to_string()];
    let mut rules = String::new();
    for client in barred {
        rules += &format!("-A {chain} -s {client} -d {a} -p tcp -j REJECT --reject-with {reset}\n");
        rules += &format!("-A {chain} -s {client} -d {a} -j REJECT\n");
    }
    rules
}

/// A policy engine that has a chain of its own before everything in FORWARD.
pub fn policy_chain(lab: &Lab, node: &Node) -> anyhow::Result<()> {
    for family in FAMILIES {
        let rules = policy(lab, family, "POLICY");
        restore(
            node,
            family,
            &format!(
                "*filter\n:POLICY - [0:0]\n-I FORWARD 1 -j POLICY\n\
-A POLICY -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
-A POLICY -m conntrack --ctstate INVALID -j DROP\n{rules}COMMIT\n"
            ),
        )?;
    }
    Ok(())
}

/// Bridged packets pass iptables as well, as kubelet's hosts are set up. `false` where the kernel cannot.
pub fn filter_bridges(node: &Node) -> anyhow::Result<bool> {
    if !std::path::Path::new("/proc/sys/net/bridge").exists() {
        return Ok(false);
    }
    node.host.sysctl(&[("bridge/bridge-nf-call-iptables", "1"), ("bridge/bridge-nf-call-ip6tables", "1")])?;
    Ok(true)
}
