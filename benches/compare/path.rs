//! The ways from a client to a pod that are compared.
//!
//! Each has ports of its own on the servers, so that no connection meets another path's in TIME_WAIT. A Service's port,
//! its NodePort and the pod's port are one number: netperf asks netserver for a data port and then connects to that
//! number at the address of the control connection.

use std::fmt;
use std::net::Ipv4Addr;

use clap::ValueEnum;

use crate::laboratory::lab::{Lab, Place};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Path {
    /// By the pod's address, whatever the mode: what a mode costs those who do not use it.
    Pod,
    ClusterIpRemote,
    ClusterIpLocal,
    NodePortLocal,
    NodePortRemote,
    LoadBalancerIp,
    /// From a pod whose sockets no program sees, as of a virtual machine.
    PacketPod,
}

/// A Service of the comparison: all paths to one pod.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    pub name: &'static str,
    pub pod: &'static str,
    pub cluster_ip: Ipv4Addr,
    pub load_balancer_ip: Ipv4Addr,
}

/// Its pod is on node1, as the client pod is; clients outside come to node1, too.
const NEAR: Target = Target {
    name: "near",
    pod: "here",
    cluster_ip: Ipv4Addr::new(10, 96, 0, 51),
    load_balancer_ip: Ipv4Addr::new(192, 0, 2, 51),
};

/// Its pod is on node2.
const FAR: Target = Target {
    name: "far",
    pod: "there",
    cluster_ip: Ipv4Addr::new(10, 96, 0, 52),
    load_balancer_ip: Ipv4Addr::new(192, 0, 2, 52),
};

pub const TARGETS: [Target; 2] = [NEAR, FAR];

impl Target {
    /// The ports that lead to it: name, whether TCP, number.
    pub fn ports(self) -> Vec<(String, bool, u16)> {
        let paths = Path::ALL.into_iter().filter(|path| path.target().name == self.name);
        let ports = paths.flat_map(|path| {
            let (control, data) = path.ports();
            [
                (format!("c{control}"), true, control),
                (format!("t{data}"), true, data),
                (format!("u{data}"), false, data),
            ]
        });
        ports.collect()
    }
}

impl Path {
    pub const ALL: [Path; 7] = [
        Path::Pod,
        Path::ClusterIpRemote,
        Path::ClusterIpLocal,
        Path::NodePortLocal,
        Path::NodePortRemote,
        Path::LoadBalancerIp,
        Path::PacketPod,
    ];

    pub fn target(self) -> Target {
        match self {
            Path::ClusterIpLocal | Path::NodePortLocal | Path::LoadBalancerIp => NEAR,
            Path::Pod | Path::ClusterIpRemote | Path::NodePortRemote | Path::PacketPod => FAR,
        }
    }

    /// Control and data port: both within the range of NodePorts.
    pub fn ports(self) -> (u16, u16) {
        let number = self as u16;
        (30_010 + number, 31_010 + number)
    }

    /// Where the client is.
    pub fn client(self, lab: &Lab) -> anyhow::Result<Place> {
        match self {
            Path::Pod | Path::ClusterIpRemote | Path::ClusterIpLocal => Ok(lab.pod("client").clone()),
            Path::NodePortLocal | Path::NodePortRemote | Path::LoadBalancerIp => lab.outside_place(),
            Path::PacketPod => lab.pod_of_packets("client"),
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Path::Pod => "pod to pod",
            Path::ClusterIpRemote => "cluster IP, other node",
            Path::ClusterIpLocal => "cluster IP, same node",
            Path::NodePortLocal => "NodePort, pod there",
            Path::NodePortRemote => "NodePort, pod elsewhere",
            Path::LoadBalancerIp => "load balancer IP",
            Path::PacketPod => "cluster IP by packets",
        })
    }
}
