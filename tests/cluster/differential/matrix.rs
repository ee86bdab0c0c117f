//! The matrix of clients and targets, and what each of its cells sees.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;

use super::services::{PORTS, SERVICES, Spec};
use crate::laboratory::Lab;
use crate::laboratory::client::{Client, Counts};
use crate::laboratory::messages::Kind;

/// Clients: outside all nodes, processes of both nodes, and pods on both, of which `a` and `b` are endpoints, too. Of some
/// pods a client once more whose sockets kubelane does not see ([`PACKETS`]).
pub const PLACES: [&str; 10] = [
    "outside",
    "node1",
    "node2",
    "client",
    "stranger",
    "a",
    "b",
    "client's packets",
    "stranger's packets",
    "a's packets",
];
/// Behind the name of a pod.
const PACKETS: &str = "'s packets";
/// Client processes of a place, which share its cells: one that waits for nothing holds up only itself.
const CLIENTS: usize = 8;
/// Exchanges of a cell whose Service has two endpoints: that one of them is never met has a chance of 2^-23.
const DRAWS: u32 = 24;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    ClusterIp,
    /// A port of the cluster IP that the Service does not have.
    UnknownPort,
    /// On this node's address.
    NodePort(&'static str),
    LoadBalancerIp,
    ExternalIp,
    /// The NodePort at 127.0.0.1 and [::1].
    Loopback,
}

/// One client, one target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cell {
    pub place: &'static str,
    pub service: &'static str,
    /// Which of the Service's ports.
    pub port: usize,
    pub is_udp: bool,
    pub is_ipv6: bool,
    pub target: Target,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = if self.is_udp { "UDP" } else { "TCP" };
        let family = if self.is_ipv6 { 6 } else { 4 };
        write!(f, "{} -> {}[{}] {:?} {protocol}{family}", self.place, self.service, self.port, self.target)
    }
}

impl Cell {
    /// Whose address the client has.
    pub fn owner(&self) -> &'static str {
        self.place.strip_suffix(PACKETS).unwrap_or(self.place)
    }

    /// Whether the client is a pod whose sockets kubelane does not see.
    pub fn is_of_packets(&self) -> bool {
        self.place.ends_with(PACKETS)
    }
}

/// What became of a cell.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// Pods, each with the client's address as it saw it, by the name of its owner ([`Names`]).
    Answered(BTreeSet<(String, String)>),
    /// Answered by always the same one of several pods: a Service with affinity.
    AlwaysTheSame,
    /// ECONNREFUSED.
    Refused,
    /// EPERM: the packet was not let out.
    Denied,
    /// Silence, or ETIMEDOUT.
    Dropped,
    /// Anything else, as it was counted. Always a failure.
    Odd(Counts),
}

/// What a place has still to ask.
type Queue = Mutex<VecDeque<(&'static Spec, Vec<Cell>)>>;

/// Answers by cells.
pub type Answers = BTreeMap<Cell, Outcome>;

/// Who owns which address.
struct Names(BTreeMap<IpAddr, String>);

impl Names {
    fn of(lab: &Lab) -> Names {
        let mut names = BTreeMap::new();
        for address in ["172.31.0.1", "fd31::1"] {
            names.insert(address.parse().unwrap(), "outside".to_owned());
        }
        for (index, node) in lab.nodes.iter().enumerate() {
            let number = index + 1;
            for place in node.pods.iter().chain([&node.host]) {
                names.extend(place.addresses().map(|address| (address, place.name.clone())));
            }
            for bridge in [format!("10.244.{number}.1"), format!("fd44:0:0:{number}::1")] {
                names.insert(bridge.parse().unwrap(), format!("bridge{number}"));
            }
        }
        Names(names)
    }

    /// From "pod address", as pods answer.
    fn read(&self, answer: &str) -> Option<(String, String)> {
        let (pod, address) = answer.split_once(' ')?;
        let address: IpAddr = address.parse().ok()?;
        Some((pod.to_owned(), self.0.get(&address).cloned().unwrap_or_else(|| address.to_string())))
    }

    fn outcome(&self, service: &Spec, counts: Counts) -> Outcome {
        let failure = |name: &str| match name {
            "ECONNREFUSED" => Some(Outcome::Refused),
            "EPERM" => Some(Outcome::Denied),
            "EAGAIN" | "ETIMEDOUT" | "timed out" => Some(Outcome::Dropped),
            _ => None,
        };
        let answers: Option<BTreeSet<_>> = counts.keys().map(|answer| self.read(answer)).collect();
        match answers {
            Some(answers) if service.is_affine && answers.len() == 1 => Outcome::AlwaysTheSame,
            Some(answers) if !service.is_affine => Outcome::Answered(answers),
            // All failed the same way.
            None if counts.len() == 1 => {
                counts.keys().next().and_then(|name| failure(name)).unwrap_or(Outcome::Odd(counts))
            }
            _ => Outcome::Odd(counts),
        }
    }
}

/// Sockets are asked before packets: what they leave behind is at most a TIME_WAIT of the pod. A flow, which a node
/// remembers for a while after its end, has the pod's end and the client's in common with a direct connection from the
/// same port, and clients on nodes make both; so do pods whose packets are translated by their own node.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Sockets,
    PacketsOfPods,
    Packets,
}

impl Phase {
    fn of(cell: &Cell) -> Phase {
        match (cell.is_by_packets(), cell.is_of_packets()) {
            (true, _) => Phase::Packets,
            (false, true) => Phase::PacketsOfPods,
            (false, false) => Phase::Sockets,
        }
    }
}

/// The cells of a place in groups, whose members have to be asked one after another: clients with affinity would
/// otherwise draw twice at the same time.
fn groups(place: &'static str, phase: Phase) -> VecDeque<(&'static Spec, Vec<Cell>)> {
    let mut groups = VecDeque::new();
    for service in &SERVICES {
        for kind in 0..4 {
            let (is_udp, is_ipv6) = (kind & 1 != 0, kind & 2 != 0);
            let mut cells = Vec::new();
            for port in 0..service.ports {
                let of = |target| Cell { place, service: service.name, port, is_udp, is_ipv6, target };
                cells.extend(targets(place, service).into_iter().map(of));
            }
            cells.retain(|cell| Phase::of(cell) == phase);
            groups.push_back((service, cells));
        }
    }
    groups
}

fn targets(place: &str, service: &Spec) -> Vec<Target> {
    let mut targets = vec![Target::NodePort("node1"), Target::NodePort("node2"), Target::LoadBalancerIp];
    // For outside, one Service shows what a route to the cluster IPs leads to.
    if place != "outside" || service.name == "here" {
        targets.push(Target::ClusterIp);
    }
    if place != "outside" && service.name == "here" {
        targets.push(Target::UnknownPort);
    }
    if ["both", "local", "away", "nowhere", "open-in"].contains(&service.name) {
        targets.push(Target::ExternalIp);
    }
    if place.starts_with("node") && ["here", "there", "away", "nowhere"].contains(&service.name) {
        targets.push(Target::Loopback);
    }
    targets
}

fn address(lab: &Lab, service: &Spec, cell: &Cell) -> SocketAddr {
    let family = usize::from(cell.is_ipv6);
    let (node_port, port) = (service.node_port(cell.port), PORTS[cell.port]);
    let (ip, port) = match cell.target {
        Target::ClusterIp => (service.cluster_ips()[family], port),
        Target::UnknownPort => (service.cluster_ips()[family], 9),
        Target::NodePort(node) => (lab.node(node).host.addresses()[family], node_port),
        Target::LoadBalancerIp => (service.load_balancer_ips()[family], port),
        Target::ExternalIp => (service.external_ips()[family], port),
        Target::Loopback => (["127.0.0.1", "::1"][family].parse().unwrap(), node_port),
    };
    SocketAddr::new(ip, port)
}

fn ask(client: &mut Client, to: SocketAddr, is_udp: bool, times: u32) -> Counts {
    let kind = match (is_udp, to.is_ipv6()) {
        (false, false) => Kind::Tcp4,
        (false, true) => Kind::Tcp6,
        (true, false) => Kind::Udp4,
        (true, true) => Kind::Udp6,
    };
    let mut counts = client.ask(kind, to, 1);
    // Who gets no answer waits for it: once is enough.
    if counts.keys().any(|answer| answer.contains(' ') && !answer.starts_with("timed")) {
        for (answer, count) in client.ask(kind, to, times - 1) {
            *counts.entry(answer).or_insert(0) += count;
        }
    }
    counts
}

/// Asks every cell, all places at the same time.
pub fn observe(lab: &Lab) -> Answers {
    let names = Names::of(lab);
    let answers = Mutex::new(Answers::new());
    let mut clients = PLACES.map(|place| std::array::from_fn::<Client, CLIENTS, _>(|_| client(lab, place)));
    for phase in [Phase::Sockets, Phase::PacketsOfPods, Phase::Packets] {
        let queues = PLACES.map(|place| Mutex::new(groups(place, phase)));
        std::thread::scope(|scope| {
            for (clients, queue) in clients.iter_mut().zip(&queues) {
                for client in clients {
                    scope.spawn(|| work(lab, client, queue, &names, &answers));
                }
            }
        });
    }
    answers.into_inner().unwrap()
}

/// Has a client ask until nothing is left to ask.
fn work(lab: &Lab, client: &mut Client, queue: &Queue, names: &Names, answers: &Mutex<Answers>) {
    loop {
        let next = queue.lock().unwrap().pop_front();
        let Some((service, cells)) = next else { break };
        for cell in cells {
            let times = if service.is_drawn() { DRAWS } else { 1 };
            let counts = ask(client, address(lab, service, &cell), cell.is_udp, times);
            answers.lock().unwrap().insert(cell, names.outcome(service, counts));
        }
    }
}

fn client(lab: &Lab, place: &str) -> Client {
    match place {
        "outside" => lab.client_outside().unwrap(),
        _ if place.starts_with("node") => lab.node(place).host.client().unwrap(),
        _ => match place.strip_suffix(PACKETS) {
            Some(pod) => lab.pod_of_packets(pod).and_then(|pod| pod.client()).unwrap(),
            None => lab.pod(place).client().unwrap(),
        },
    }
}
