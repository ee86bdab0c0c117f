//! The Services of every shape, the pods that serve them, and a daemon on each node.

use std::cell::RefCell;
use std::net::SocketAddr;

use serde_json::{Value, json};

use super::outside::{self, By, CLIENT};
use super::{BULK, Shape, Sources, WITNESS};
use crate::laboratory::cluster::Cluster;
use crate::laboratory::daemon::Daemon;
use crate::laboratory::lab::Node;
use crate::laboratory::manifests::port;
use crate::laboratory::{Lab, preflight, process, skip};

/// One endpoint on node1 (`a`), on node2 (`b`), on both with externalTrafficPolicy Local; the same two with load
/// balancer IPs; the pod `wide` where the shape has one. The number is the Service's in addresses and NodePorts.
pub const HERE: u8 = 1;
pub const THERE: u8 = 2;
pub const LOCAL: u8 = 3;
pub const BALANCED_HERE: u8 = 4;
pub const BALANCED_THERE: u8 = 5;
pub const WIDE: u8 = 6;

/// Load balancer IPs, which the client reaches by node1.
const BALANCED: [&str; 2] = ["192.0.2.0/24", "2001:db8:80::/48"];

/// A laid-out shape with its Services; what was found wrong so far.
pub struct ShapedCluster {
    pub cluster: Cluster,
    pub sources: Sources,
    /// Whether packets between pods of one bridge pass iptables.
    pub bridges_are_filtered: bool,
    failures: RefCell<Vec<String>>,
}

impl ShapedCluster {
    /// `None`, said aloud, on a machine that cannot have this shape.
    pub fn or_skip(shape: &Shape) -> Option<ShapedCluster> {
        let lack = preflight().err().map(|error| format!("{error:#}"));
        if let Some(reason) = lack.or_else(no_iptables).or_else(shape.missing) {
            skip(&reason);
            return None;
        }
        let mut lab = Lab::without_cni(&shape.pods).expect("the laboratory can be laid out");
        outside::settle(&lab).expect("the clients outside have addresses");
        let bridges_are_filtered = (shape.lay_out)(&mut lab).expect("the CNI's part can be laid out");
        for network in BALANCED {
            lab.route_outside(network, "node1").expect("load balancer IPs lead to node1");
        }
        let servers: Vec<&str> = shape.pods.iter().flat_map(|(_, pods)| *pods).copied().filter(serves).collect();
        let sources = (shape.sources)(&lab);
        let cluster = Cluster::on(lab, &servers, &format!("--seen {WITNESS} --bulk {BULK}"));
        let world = ShapedCluster { cluster, sources, bridges_are_filtered, failures: RefCell::default() };
        world.put_services(servers.contains(&"wide"));
        Some(world)
    }

    fn put_services(&self, has_wide: bool) {
        let policy_local = json!({"spec": {"type": "NodePort", "externalTrafficPolicy": "Local"}});
        let node_port = || json!({"spec": {"type": "NodePort"}});
        self.put(HERE, node_port(), &["a"]);
        self.put(THERE, node_port(), &["b"]);
        self.put(LOCAL, policy_local, &["a", "b"]);
        for (number, pod) in [(BALANCED_HERE, "a"), (BALANCED_THERE, "b")] {
            let ips = balanced(number, 80).map(|to| json!({"ip": to.ip()}));
            let status = json!({"loadBalancer": {"ingress": ips}});
            self.put(number, json!({"spec": {"type": "LoadBalancer"}, "status": status}), &[pod]);
        }
        if has_wide {
            self.put(WIDE, node_port(), &["wide"]);
        }
    }

    /// A Service with cluster IPs and NodePorts for the witness (TCP and UDP) and for bulk transfers.
    fn put(&self, number: u8, changes: Value, pods: &[&str]) {
        let ports = [("tcp", "TCP", 80, 30_000), ("udp", "UDP", 80, 30_000), ("bulk", "TCP", 81, 30_100)];
        let ports = ports.map(|(name, protocol, service, first)| {
            let mut object = port(name, protocol, service);
            object["nodePort"] = json!(first + u16::from(number));
            object
        });
        let targets = [("tcp", "TCP", WITNESS), ("udp", "UDP", WITNESS), ("bulk", "TCP", BULK)];
        let endpoints = self.cluster.ready(pods);
        self.cluster.put_with(&format!("service-{number}"), number, json!(ports), changes, &targets, &endpoints);
    }

    /// The daemon of each node, as it runs without options.
    pub fn start(&self) -> Vec<Daemon<'_>> {
        let start = |node| Daemon::start(&self.cluster.lab, node, &self.cluster.manifests.dir);
        ["node1", "node2"].map(|node| start(node).expect("the daemon starts")).into()
    }

    pub fn lab(&self) -> &Lab {
        &self.cluster.lab
    }

    /// What a Service answers to the client outside that asks at node1, by the family of `to`.
    pub fn seen_by_node1(&self, number: u8, to: SocketAddr) -> String {
        let family = usize::from(to.is_ipv6());
        match number {
            HERE => format!("a {}", CLIENT[family]),
            THERE => format!("b {}", self.sources.outside_elsewhere[0][family]),
            _ => format!("wide {}", self.sources.outside_elsewhere[0][family]),
        }
    }

    /// Asks from outside by both protocols; every answer has to be `expected`.
    pub fn expect_outside(&self, what: &str, from: [&str; 2], to: SocketAddr, expected: &str) {
        for by in [By::Tcp, By::Udp] {
            let got = outside::ask(self.lab(), from, by, to);
            self.expect(&format!("{what}, {by:?} to {to}"), &got, expected);
        }
    }

    /// Notes what is not as expected; a shape is looked at whole before its test fails.
    pub fn expect(&self, what: &str, got: &str, expected: &str) {
        if got != expected {
            self.failures.borrow_mut().push(format!("{what}: {got:?}, not {expected:?}"));
        }
    }

    pub fn fail(&self, what: String) {
        self.failures.borrow_mut().push(what);
    }

    /// The end of a test.
    pub fn assert_no_failures(&self, daemons: &[Daemon<'_>]) {
        let failures = self.failures.borrow();
        let logs: Vec<String> = daemons.iter().map(Daemon::log).collect();
        assert!(failures.is_empty(), "{failures:#?}\n{}", logs.join("\n"));
    }
}

fn serves(pod: &&str) -> bool {
    !["client", "stranger"].contains(pod)
}

fn no_iptables() -> Option<String> {
    let lacks = |name: &&str| !process::in_path(name);
    let name = ["iptables-restore", "ip6tables-restore"].into_iter().find(lacks)?;
    Some(format!("needs {name} (Debian: apt-get install iptables; `make setup` does it)"))
}

/// A Service's NodePort for the witness, on a node's own addresses.
pub fn node_port(node: &Node, number: u8) -> [SocketAddr; 2] {
    node.host.addresses().map(|ip| (ip, 30_000 + u16::from(number)).into())
}

/// The same for bulk transfers.
pub fn bulk_port(node: &Node, number: u8) -> [SocketAddr; 2] {
    node.host.addresses().map(|ip| (ip, 30_100 + u16::from(number)).into())
}

/// A Service's load balancer IPs.
pub fn balanced(number: u8, port: u16) -> [SocketAddr; 2] {
    let ips = [format!("192.0.2.{number}"), format!("2001:db8:80::{number}")];
    ips.map(|ip| (ip.parse::<std::net::IpAddr>().expect("an address"), port).into())
}
