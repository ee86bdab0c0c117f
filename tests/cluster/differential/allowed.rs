//! Where kubelane is meant to answer otherwise than kube-proxy's iptables mode, and why.

use std::collections::BTreeSet;

use super::matrix::{Cell, Outcome, Target};
use super::services::Spec;

/// A difference that is meant.
pub struct Difference {
    pub reason: &'static str,
    /// Whether these two outcomes, kubelane's and iptables', differ in this way.
    pub applies: fn(&Cell, &Spec, &Outcome, &Outcome) -> bool,
}

pub const DIFFERENCES: [Difference; 8] = [
    Difference {
        reason: "policy Cluster: an endpoint on the node that packets come in at sees the client (better)",
        applies: |cell, spec, kubelane, iptables| {
            let kept = |pod: &str| if number(pod) == cell.entry() { cell.owner().into() } else { node(cell.entry()) };
            cell.is_by_packets()
                && !spec.external_local
                && is_seen(kubelane, iptables, kept, |pod| masqueraded(pod, cell.entry()))
        },
    },
    Difference {
        reason: "policy Cluster: a pod's connection to an external address goes straight to the endpoint",
        applies: |cell, spec, kubelane, iptables| {
            let of_pod = !cell.is_by_packets() && !cell.is_of_host() && cell.target != Target::ClusterIp;
            // Packets that a pod sends to itself get the bridge's address either way.
            let is_back = |pod: &str| cell.is_of_packets() && pod == cell.owner();
            let kept = |pod: &str| if is_back(pod) { masqueraded(pod, cell.entry()) } else { cell.owner().into() };
            of_pod && !spec.external_local && is_seen(kubelane, iptables, kept, |pod| masqueraded(pod, cell.entry()))
        },
    },
    Difference {
        reason: "a pod that reaches itself sees its own address: no packet leaves it",
        applies: |cell, spec, kubelane, iptables| {
            let back =
                |pod: &str| if pod == cell.owner() { masqueraded(pod, cell.entry()) } else { cell.owner().into() };
            !cell.is_of_packets()
                && (cell.target == Target::ClusterIp || spec.external_local)
                && is_seen(kubelane, iptables, |_| cell.owner().into(), back)
        },
    },
    Difference {
        reason: "a cluster IP's port that no Service has is refused, as kube-proxy's nftables mode does",
        applies: |cell, _, kubelane, iptables| {
            cell.target == Target::UnknownPort && (kubelane, iptables) == (&Outcome::Refused, &Outcome::Dropped)
        },
    },
    Difference {
        reason: "[::1]:nodePort works (better): packets cannot be masqueraded away from ::1",
        applies: |cell, _, kubelane, iptables| {
            let is_failure = matches!(iptables, Outcome::Refused | Outcome::Dropped);
            cell.target == Target::Loopback && cell.is_ipv6 && matches!(kubelane, Outcome::Answered(_)) && is_failure
        },
    },
    Difference {
        reason: "no endpoint: a host's datagram is refused, as a pod's is; after a REJECT in OUTPUT it is EPERM",
        applies: |cell, _, kubelane, iptables| {
            let is_hosts = cell.target == Target::ClusterIp && cell.is_udp && cell.is_of_host();
            is_hosts && (kubelane, iptables) == (&Outcome::Refused, &Outcome::Denied)
        },
    },
    Difference {
        reason: "no endpoint: hosts are refused at external IPs, too; OUTPUT has no KUBE-EXTERNAL-SERVICES",
        applies: |cell, _, kubelane, iptables| {
            let is_external = matches!(cell.target, Target::LoadBalancerIp | Target::ExternalIp);
            is_external && cell.is_of_host() && (kubelane, iptables) == (&Outcome::Refused, &Outcome::Dropped)
        },
    },
    Difference {
        reason: "cluster IPs serve nobody outside the nodes, even where a route leads to them",
        applies: |cell, _, kubelane, iptables| {
            let is_outside = cell.place == "outside" && cell.target == Target::ClusterIp;
            is_outside && *kubelane == Outcome::Dropped && matches!(iptables, Outcome::Answered(_))
        },
    },
];

/// Whether both were answered by the same pods, and these saw the clients that the functions say of each.
fn is_seen(
    kubelane: &Outcome,
    iptables: &Outcome,
    by_kubelane: impl Fn(&str) -> String,
    by_iptables: impl Fn(&str) -> String,
) -> bool {
    let (Outcome::Answered(kubelane), Outcome::Answered(iptables)) = (kubelane, iptables) else { return false };
    let pods =
        |answers: &BTreeSet<(String, String)>| answers.iter().map(|(pod, _)| pod.clone()).collect::<BTreeSet<_>>();
    pods(kubelane) == pods(iptables)
        && kubelane.iter().all(|(pod, client)| *client == by_kubelane(pod))
        && iptables.iter().all(|(pod, client)| *client == by_iptables(pod))
}

/// Number of the node that a pod (or a server of it), or a host, is on.
pub fn number(place: &str) -> usize {
    if ["node1", "client", "a"].contains(&place) { 1 } else { 2 }
}

fn node(number: usize) -> String {
    format!("node{number}")
}

/// The address that MASQUERADE gives a packet to `pod` on the node of that number: that of the device it leaves by.
fn masqueraded(pod: &str, number_of_node: usize) -> String {
    if number(pod) == number_of_node { format!("bridge{number_of_node}") } else { node(number_of_node) }
}

impl Cell {
    /// Number of the node whose rules decide.
    fn entry(&self) -> usize {
        match (self.target, self.place) {
            (Target::NodePort(node), _) => number(node),
            (_, "outside") => 1,
            _ => number(self.owner()),
        }
    }

    fn is_of_host(&self) -> bool {
        self.place.starts_with("node")
    }

    /// Packets to the Service's address come in at a node: the client is on none, or on another one.
    pub fn is_by_packets(&self) -> bool {
        self.place == "outside" || number(self.owner()) != self.entry()
    }
}
