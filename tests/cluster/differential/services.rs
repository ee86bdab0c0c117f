//! The world of the comparison: Services, once as manifests for kubelane and once as input of the rules' generator.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::time::Duration;

use serde_json::json;

use crate::laboratory::Lab;
use crate::laboratory::cluster::{Cluster, vip};
use crate::laboratory::manifests::{Endpoint, port};
use crate::laboratory::rulesets::{self, FAMILIES, Protocol, ServicePort, State, World, iptables, load};

/// Where pods answer: the target of a Service's first port, and of its second.
const TARGETS: [u16; 2] = [7000, 7001];
/// The Service's ports that lead there.
pub const PORTS: [u16; 2] = [80, 81];

/// A Service. All have cluster IPs, node ports, load balancer IPs and external IPs of both families, and serve TCP and
/// UDP.
pub struct Spec {
    pub name: &'static str,
    /// Last part of its addresses and node ports.
    number: u8,
    pods: &'static [(&'static str, State)],
    pub internal_local: bool,
    pub external_local: bool,
    /// Clients that the load balancer IPs accept; everyone when empty.
    pub ranges: &'static [&'static str],
    pub is_affine: bool,
    /// How many of [`PORTS`] it has.
    pub ports: usize,
}

const PLAIN: Spec = Spec {
    name: "",
    number: 0,
    pods: &[],
    internal_local: false,
    external_local: false,
    ranges: &[],
    is_affine: false,
    ports: 1,
};

use State::{Leaving, Ready, Useless};

const AB: &[(&str, State)] = &[("a", Ready), ("b", Ready)];

/// Pod `a` is on node1, `b` and `c` are on node2.
pub const SERVICES: [Spec; 15] = [
    Spec { name: "here", number: 1, pods: &[("a", Ready)], ..PLAIN },
    Spec { name: "there", number: 2, pods: &[("b", Ready)], ..PLAIN },
    Spec { name: "both", number: 3, pods: AB, ..PLAIN },
    Spec { name: "local", number: 4, pods: AB, external_local: true, ..PLAIN },
    Spec { name: "away", number: 5, pods: &[("b", Ready)], external_local: true, ..PLAIN },
    Spec { name: "inside", number: 6, pods: AB, internal_local: true, ..PLAIN },
    Spec { name: "inside-away", number: 7, pods: &[("b", Ready)], internal_local: true, ..PLAIN },
    Spec { name: "nowhere", number: 8, pods: &[("a", Useless)], ..PLAIN },
    Spec { name: "nowhere-local", number: 9, external_local: true, internal_local: true, ..PLAIN },
    Spec { name: "leaving", number: 10, pods: &[("a", Leaving), ("b", Useless)], ..PLAIN },
    Spec {
        name: "left-here",
        number: 11,
        pods: &[("a", Leaving), ("b", Ready)],
        external_local: true,
        internal_local: true,
        ..PLAIN
    },
    Spec { name: "open-out", number: 12, pods: &[("a", Ready)], ranges: &["172.31.0.1/32", "fd31::1/128"], ..PLAIN },
    Spec { name: "open-in", number: 13, pods: &[("a", Ready)], ranges: &["10.244.0.0/16", "fd44::/48"], ..PLAIN },
    Spec { name: "affine", number: 14, pods: AB, is_affine: true, ..PLAIN },
    Spec { name: "ports", number: 15, pods: &[("c", Ready)], ranges: &["172.31.0.0/24"], ports: 2, ..PLAIN },
];

impl Spec {
    /// Of the given one of [`PORTS`].
    pub fn node_port(&self, port: usize) -> u16 {
        30_000 + 100 * port as u16 + u16::from(self.number)
    }

    pub fn cluster_ips(&self) -> [IpAddr; 2] {
        vip(self.number, 0).map(|address| address.ip())
    }

    pub fn load_balancer_ips(&self) -> [IpAddr; 2] {
        [format!("192.0.2.{}", self.number), format!("2001:db8::{}", self.number)].map(|ip| ip.parse().unwrap())
    }

    pub fn external_ips(&self) -> [IpAddr; 2] {
        [format!("198.51.100.{}", self.number), format!("2001:db8:1::{}", self.number)].map(|ip| ip.parse().unwrap())
    }

    /// Whether clients may meet different pods.
    pub fn is_drawn(&self) -> bool {
        self.pods.iter().filter(|(_, state)| *state == Ready).count() > 1
    }

    fn save(&self, cluster: &Cluster) {
        let policy = |is_local| if is_local { "Local" } else { "Cluster" };
        let mut ports = Vec::new();
        let mut targets = Vec::new();
        let names: Vec<(String, &str, usize)> = (0..self.ports)
            .flat_map(|index| {
                ["TCP", "UDP"].map(|protocol| (format!("{}{index}", protocol.to_lowercase()), protocol, index))
            })
            .collect();
        for (name, protocol, index) in &names {
            let mut object = port(name, protocol, PORTS[*index]);
            object["nodePort"] = json!(self.node_port(*index));
            ports.push(object);
            targets.push((name.as_str(), *protocol, TARGETS[*index]));
        }
        let mut changes = json!({
            "spec": {
                "type": "LoadBalancer",
                "externalIPs": self.external_ips(),
                "internalTrafficPolicy": policy(self.internal_local),
                "externalTrafficPolicy": policy(self.external_local),
                "loadBalancerSourceRanges": self.ranges,
            },
            "status": {"loadBalancer": {"ingress": self.load_balancer_ips().map(|ip| json!({"ip": ip}))}},
        });
        if self.is_affine {
            changes["spec"]["sessionAffinity"] = json!("ClientIP");
        }
        let of = |(pod, state): &(&str, State)| {
            let make = match state {
                Ready => Endpoint::ready,
                Leaving => Endpoint::terminating,
                Useless => Endpoint::unready,
            };
            cluster.endpoints(make, &[pod])
        };
        let endpoints: Vec<Endpoint> = self.pods.iter().flat_map(of).collect();
        cluster.put_with(self.name, self.number, json!(ports), changes, &targets, &endpoints);
    }

    fn service_ports(&self, lab: &Lab, node: &str) -> Vec<ServicePort> {
        let pairs = (0..self.ports).flat_map(|index| [Protocol::Tcp, Protocol::Udp].map(|protocol| (index, protocol)));
        let endpoint = |target: u16| {
            move |(pod, state): &(&'static str, State)| {
                lab.pod(pod).addresses().map(|address| rulesets::Endpoint {
                    at: SocketAddr::new(address, target),
                    is_local: lab.node_of(pod) == node,
                    state: *state,
                })
            }
        };
        let make = |(index, protocol): (usize, Protocol)| ServicePort {
            namespace: "default".to_owned(),
            name: self.name.to_owned(),
            port_name: format!("{}{index}", protocol.name()),
            protocol,
            cluster_ips: self.cluster_ips().into(),
            port: PORTS[index],
            node_port: self.node_port(index),
            external_ips: self.external_ips().into(),
            load_balancer_ips: self.load_balancer_ips().into(),
            source_ranges: self.ranges.iter().map(|range| range.parse().unwrap()).collect(),
            affinity: self.is_affine.then_some(10_800),
            internal_local: self.internal_local,
            external_local: self.external_local,
            health_check_node_port: 0,
            endpoints: self.pods.iter().flat_map(endpoint(TARGETS[index])).collect(),
        };
        pairs.map(make).collect()
    }
}

/// Saves all Services for kubelane.
pub fn save(cluster: &Cluster) {
    SERVICES.iter().for_each(|service| service.save(cluster));
    for node in &cluster.lab.nodes {
        let addresses = node.host.addresses().map(|ip| json!({"type": "InternalIP", "address": ip}));
        let object = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name}, "status": {"addresses": addresses},
        });
        cluster.manifests.save(&node.name, &[object]);
    }
}

/// Loads the rules for all Services into the nodes, and sets what kube-proxy and its CNI set besides.
pub fn load_rules(lab: &Lab) {
    for (index, node) in lab.nodes.iter().enumerate() {
        let number = index + 1;
        let world = World {
            // As with detectLocalMode NodeCIDR: kubelane, too, gives the pods of this node what clients inside get.
            pods: [format!("10.244.{number}.0/24"), format!("fd44:0:0:{number}::/64")]
                .map(|r| r.parse().unwrap())
                .into(),
            node: node.host.addresses().into(),
            services: SERVICES.iter().flat_map(|service| service.service_ports(lab, &node.name)).collect(),
        };
        let outcome = node.host.inside(|| {
            FAMILIES
                .iter()
                .try_for_each(|family| load::iptables(*family, &iptables::render(&world, *family), load::NO_HURRY))
        });
        outcome.unwrap();
        let settings = [
            // For NodePorts at 127.0.0.1.
            ("ipv4/conf/all/route_localnet", "1"),
            // Replies between pods of one bridge pass the rules, too.
            ("bridge/bridge-nf-call-iptables", "1"),
            ("bridge/bridge-nf-call-ip6tables", "1"),
            // Every refusal is to be seen, also many in a second.
            ("ipv4/icmp_ratelimit", "0"),
            ("ipv6/icmp/ratelimit", "0"),
        ];
        node.host.sysctl(&settings).unwrap();
        // As kubelet's hairpinMode: a pod's packets to itself come back by the port that they came from.
        for pod in &node.pods {
            node.host.ip(&[&format!("link set dev {} type bridge_slave hairpin on", pod.name)]).unwrap();
        }
    }
}

/// Lets the clients outside reach the Services' addresses by node1.
pub fn route(lab: &Lab) {
    for network in ["192.0.2.0/24", "198.51.100.0/24", "2001:db8::/32", "10.96.0.0/16", "fd96::/64"] {
        lab.route_outside(network, "node1").unwrap();
    }
}

/// Has a pod answer on all [`TARGETS`], by TCP and UDP: its name, and who asks. On the second one the name has a 2.
pub fn answer(lab: &Lab, pod: &str) {
    for (target, suffix) in TARGETS.into_iter().zip(["", "2"]) {
        let name = format!("{pod}{suffix}");
        let at = SocketAddr::new("::".parse().unwrap(), target);
        let bind = || Ok((TcpListener::bind(at)?, UdpSocket::bind(at)?));
        let (listener, datagrams) = lab.pod(pod).inside(bind).unwrap();
        let text = move |peer: SocketAddr| format!("{name} {}", peer.ip().to_canonical());
        let same = text.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = stream.set_read_timeout(Some(Duration::from_secs(1)));
                // The question first: closing with it unread would reset the connection.
                if let (Ok(_), Ok(peer)) = ((&stream).read(&mut [0; 16]), stream.peer_addr()) {
                    let _ = (&stream).write_all(text(peer).as_bytes());
                }
            }
        });
        std::thread::spawn(move || {
            while let Ok((_, peer)) = datagrams.recv_from(&mut [0; 16]) {
                let _ = datagrams.send_to(same(peer).as_bytes(), peer);
            }
        });
    }
}
