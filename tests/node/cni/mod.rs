//! Nodes as other people's CNIs make them, the Services and daemons that run beside them, and what has to hold there.
//!
//! In every shape FORWARD's policy is DROP, pods are let through by the CNI's own rules, and a network policy in
//! iptables turns clients away by their addresses.

pub mod aws;
pub mod bridge;
pub mod calico;
pub mod checks;
pub mod flannel;
pub mod outside;
pub mod plugins;
pub mod rules;
pub mod shaped_cluster;
pub mod tun;

use crate::laboratory::Lab;

/// Where a pod's server says who asks (TCP and UDP).
pub const WITNESS: u16 = 7000;
/// Where it takes large transfers.
pub const BULK: u16 = 7001;

/// Nodes, and their pods: `a` and `b` serve, `client` and `stranger` ask.
pub type Pods = [(&'static str, &'static [&'static str]); 2];

const PODS: Pods = [("node1", &["client", "stranger", "a"]), ("node2", &["b"])];

/// A way to wire nodes and pods.
pub struct Shape {
    pub pods: Pods,
    /// Why it cannot be laid out on this machine.
    pub missing: fn() -> Option<String>,
    /// On a laboratory without a CNI. `false`: all but that packets between pods of one bridge pass iptables, which
    /// the kernel cannot.
    pub lay_out: fn(&mut Lab) -> anyhow::Result<bool>,
    pub sources: fn(&Lab) -> Sources,
}

/// Whom a backend sees, in both families, where it cannot be the client itself.
pub struct Sources {
    /// For a client outside that came by node1, node2, and a backend on the other node.
    pub outside_elsewhere: [[String; 2]; 2],
    /// For the pod `client` (node1) and a backend on node2.
    pub pod_elsewhere: [String; 2],
    /// For a process of node1 itself, and a backend on node1, node2.
    pub host_here: [String; 2],
    pub host_elsewhere: [String; 2],
}
