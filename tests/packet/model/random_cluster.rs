//! Random clusters in the project's own records, and random things that happen to them. The pools of names, addresses
//! and ports are small, so that Services contest frontends and flows contest ports.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kubelane::model::{
    Endpoint, Family, Hints, IpRange, Ipx, Node, ObjectName, Protocol, Service, ServicePort, Slice, SlicePort,
    TrafficPolicy,
};

use super::random::Random;
use crate::laboratory::packets::{NODE4, NODE6, TUNNEL4, TUNNEL6};

/// The node's addresses on the device of its pods, to which these are the gateway.
pub const GATEWAY4: &str = "10.1.0.1";
pub const GATEWAY6: &str = "fd01::1";
/// This node, as endpoints and hints name it.
pub const HERE: &str = "here";
const NODES: [&str; 3] = [HERE, "there", "yonder"];
const ZONES: [&str; 2] = ["z0", "z1"];
const SERVICES: usize = 6;
const PORT_NAMES: [&str; 4] = ["http", "dns", "alt", "new"];
const PORTS: [u16; 3] = [80, 53, 443];
const RANGES: [(&str, u8); 12] = [
    ("198.51.100.0", 24),
    ("198.51.100.0", 25),
    ("198.51.100.9", 32),
    ("203.0.113.0", 24),
    ("0.0.0.0", 0),
    ("10.0.0.0", 8),
    ("10.1.0.20", 32),
    ("2001:db8:7::", 48),
    ("2001:db8:7::7", 128),
    ("2001:db8:8::", 64),
    ("fd01::", 64),
    ("::", 0),
];

/// What the sources tell, and the addresses that serve NodePorts.
#[derive(Clone, Debug, Default)]
pub struct RandomCluster {
    pub services: BTreeMap<ObjectName, Service>,
    pub slices: BTreeMap<ObjectName, Slice>,
    pub zone: Option<&'static str>,
    pub nodeport: BTreeSet<Ipx>,
}

pub fn ip(text: &str) -> Ipx {
    text.parse().unwrap()
}

/// The addresses of this node: those of the outward devices, and of its pods' one.
pub fn bound() -> Vec<Ipx> {
    [NODE4, NODE6, TUNNEL4, TUNNEL6, GATEWAY4, GATEWAY6].map(ip).into()
}

fn service_name(which: usize) -> ObjectName {
    ObjectName::new(if which < 4 { "default" } else { "another" }, &format!("s{which}"))
}

fn cluster_ip(which: usize, family: Family) -> Ipx {
    match family {
        Family::Ipv4 => ip(&format!("10.96.0.{}", which + 1)),
        Family::Ipv6 => ip(&format!("fd96::{}", which + 1)),
    }
}

fn vip(random: &mut Random, family: Family) -> Ipx {
    let last = 1 + random.below(6);
    match family {
        Family::Ipv4 => ip(&format!("192.0.2.{last}")),
        Family::Ipv6 => ip(&format!("2001:db8:80::{last}")),
    }
}

fn policy(random: &mut Random) -> TrafficPolicy {
    if random.percent(35) { TrafficPolicy::Local } else { TrafficPolicy::Cluster }
}

fn families(service: &Service) -> Vec<Family> {
    service.cluster_ips.iter().map(Ipx::family).collect()
}

fn service_ports(random: &mut Random) -> Vec<ServicePort> {
    let mut ports: Vec<ServicePort> = Vec::new();
    let wanted = 1 + random.below(3);
    for name in PORT_NAMES.into_iter().take(wanted) {
        let protocol = match random.below(20) {
            0 | 1 => Protocol::Sctp,
            n if n < 11 => Protocol::Tcp,
            _ => Protocol::Udp,
        };
        let node_port = if random.percent(60) { 30_000 + random.below(8) as u16 } else { 0 };
        let port = random.pick(&PORTS);
        // As the API server has it: a port, and a NodePort, is of one protocol once.
        let clash = |p: &ServicePort| {
            p.protocol == protocol && (p.port == port || (p.node_port == node_port && node_port != 0))
        };
        if !ports.iter().any(clash) {
            let name = if wanted == 1 && random.percent(50) { "" } else { name };
            ports.push(ServicePort { name: name.into(), protocol, port, node_port });
        }
    }
    ports
}

fn push_new(list: &mut Vec<Ipx>, ip: Ipx) {
    if !list.contains(&ip) {
        list.push(ip);
    }
}

fn random_service(random: &mut Random, which: usize) -> Service {
    let families = match random.below(5) {
        0 => vec![Family::Ipv4],
        1 => vec![Family::Ipv6],
        2 => vec![Family::Ipv6, Family::Ipv4],
        _ => vec![Family::Ipv4, Family::Ipv6],
    };
    let mut service = Service {
        name: service_name(which),
        created: random.below(3) as i64,
        cluster_ips: families.iter().map(|family| cluster_ip(which, *family)).collect(),
        external_ips: vec![],
        load_balancer_ips: vec![],
        ports: service_ports(random),
        affinity_seconds: random.percent(35).then(|| 60 + random.below(86_340) as u32),
        internal_policy: policy(random),
        external_policy: policy(random),
        source_ranges: vec![],
        health_check_node_port: 0,
        client_source: None,
    };
    expose(random, &mut service);
    service
}

/// Other external addresses: what a change of type, or of the load balancer's mind, does.
fn expose(random: &mut Random, service: &mut Service) {
    service.external_ips.clear();
    service.load_balancer_ips.clear();
    service.source_ranges.clear();
    for family in families(service) {
        if random.percent(30) {
            push_new(&mut service.external_ips, vip(random, family));
        }
        if random.percent(8) {
            push_new(&mut service.external_ips, ip(if family == Family::Ipv4 { NODE4 } else { NODE6 }));
        }
        while random.percent(40) {
            push_new(&mut service.load_balancer_ips, vip(random, family));
        }
    }
    restrict(random, service);
}

fn restrict(random: &mut Random, service: &mut Service) {
    let count = if random.percent(40) { 1 + random.below(3) } else { 0 };
    let mut ranges: Vec<IpRange> = Vec::new();
    for _ in 0..count {
        let (network, prefix) = random.pick(&RANGES);
        let range = IpRange { ip: ip(network), prefix };
        if !ranges.contains(&range) {
            ranges.push(range);
        }
    }
    service.source_ranges = ranges;
}

/// A pod's address: here, behind the tunnel, or a host's own beside the uplink. Where it runs mostly fits.
fn place(random: &mut Random, family: Family) -> (Ipx, Option<Arc<str>>) {
    let last = 20 + random.below(7);
    let (address, node) = match (random.below(5), family) {
        (0 | 1, Family::Ipv4) => (format!("10.1.0.{last}"), HERE),
        (0 | 1, Family::Ipv6) => (format!("fd01::{last}"), HERE),
        (2 | 3, Family::Ipv4) => (format!("10.244.1.{last}"), NODES[1]),
        (2 | 3, Family::Ipv6) => (format!("fd44::1:{last}"), NODES[1]),
        (_, Family::Ipv4) => (format!("10.0.0.{last}"), NODES[2]),
        (_, Family::Ipv6) => (format!("fd00::{last}"), NODES[2]),
    };
    let node = if random.percent(90) { Some(node.into()) } else { random.pick(&[None, Some(HERE.into())]) };
    (ip(&address), node)
}

fn set_condition(random: &mut Random, endpoint: &mut Endpoint) {
    (endpoint.ready, endpoint.serving, endpoint.terminating) = match random.below(20) {
        0..11 => (true, true, false),
        // Published although it terminates.
        11 => (true, true, true),
        12..17 => (false, true, true),
        17 => (false, true, false),
        18 => (false, false, true),
        _ => (false, false, false),
    };
}

fn hints(random: &mut Random, kind: usize) -> Option<Arc<Hints>> {
    let mut some = |of: &[&str]| -> Box<[Arc<str>]> {
        let first = random.below(of.len());
        let count = 1 + random.below(of.len());
        (first..first + count).map(|n| of[n % of.len()].into()).collect()
    };
    let (zones, nodes) = match kind {
        0 => (some(&ZONES), Box::default()),
        1 => (Box::default(), some(&NODES)),
        2 => (some(&ZONES), some(&NODES)),
        _ => return None,
    };
    Some(Arc::new(Hints { zones, nodes }))
}

impl RandomCluster {
    pub fn random(random: &mut Random) -> RandomCluster {
        let mut world = RandomCluster::default();
        world.move_node(random);
        world.choose_node_addresses(random);
        for which in 0..1 + random.below(SERVICES) {
            world.replace_service(random, which);
        }
        world
    }

    /// This node's object.
    pub fn node(&self) -> Node {
        Node { name: HERE.into(), zone: self.zone.map(Into::into), ..Node::default() }
    }

    /// Changes something; says what.
    pub fn happen(&mut self, random: &mut Random) -> String {
        let which = random.below(SERVICES);
        let name = service_name(which);
        match random.below(15) {
            0 => {
                self.replace_service(random, which);
                format!("{name} is made anew")
            }
            1 => {
                self.services.remove(&name);
                format!("{name} is deleted")
            }
            2 => self.move_node(random),
            3 => self.choose_node_addresses(random),
            4 => self.rename_port(random, &name),
            5 => self.renew_slices(random, &name),
            6 => self.delete_slice(random),
            7..11 => self.change_endpoint(random),
            _ => self.change_service(random, &name),
        }
    }

    fn replace_service(&mut self, random: &mut Random, which: usize) {
        let service = random_service(random, which);
        let name = service.name.clone();
        self.services.insert(name.clone(), service);
        self.renew_slices(random, &name);
    }

    fn move_node(&mut self, random: &mut Random) -> String {
        self.zone = random.pick(&[None, Some(ZONES[0]), Some(ZONES[1])]);
        format!("this node is in zone {:?}", self.zone)
    }

    fn choose_node_addresses(&mut self, random: &mut Random) -> String {
        let choices: [&[&str]; 5] =
            [&[NODE4, NODE6], &[NODE4, NODE6], &[NODE4, NODE6, TUNNEL4, TUNNEL6], &[NODE4], &[TUNNEL4, NODE6]];
        self.nodeport = random.pick(&choices).iter().copied().map(ip).collect();
        format!("NodePorts are served on {:?}", self.nodeport)
    }

    /// In the Service and in its slices, or in one of both alone for a while.
    fn rename_port(&mut self, random: &mut Random, name: &ObjectName) -> String {
        let Some(service) = self.services.get_mut(name) else { return format!("{name} has no port to rename") };
        let at = random.below(service.ports.len());
        let (old, new): (Arc<str>, Arc<str>) = (service.ports[at].name.clone(), random.pick(&PORT_NAMES).into());
        if service.ports.iter().any(|port| port.name == new) {
            return format!("{name} has a port {new} already");
        }
        let (in_service, in_slices) = random.pick(&[(true, true), (true, true), (true, false), (false, true)]);
        if in_service {
            service.ports[at].name = new.clone();
        }
        let slices = self.slices.values_mut().filter(|slice| in_slices && owner(slice) == *name);
        for port in slices.flat_map(|slice| &mut slice.ports).filter(|port| port.name == old) {
            port.name = new.clone();
        }
        format!("{name}: port {old:?} becomes {new:?} (Service {in_service}, slices {in_slices})")
    }

    fn change_service(&mut self, random: &mut Random, name: &ObjectName) -> String {
        let Some(service) = self.services.get_mut(name) else { return format!("{name} is not there to be changed") };
        match random.below(6) {
            0 => service.external_policy = policy(random),
            1 => service.affinity_seconds = if service.affinity_seconds.is_none() { Some(10_800) } else { None },
            2 => expose(random, service),
            3 => restrict(random, service),
            4 => {
                let at = random.below(service.ports.len());
                let (protocol, number) = (service.ports[at].protocol, 30_000 + random.below(8) as u16);
                let taken = service.ports.iter().any(|p| p.protocol == protocol && p.node_port == number);
                service.ports[at].node_port = if taken || random.percent(30) { 0 } else { number };
            }
            _ => service.internal_policy = policy(random),
        }
        format!("now {service:?}")
    }

    fn renew_slices(&mut self, random: &mut Random, name: &ObjectName) -> String {
        self.slices.retain(|_, slice| owner(slice) != *name);
        let Some(service) = self.services.get(name).cloned() else { return format!("{name} loses its slices") };
        let hint_kind = random.below(6);
        for family in families(&service) {
            for number in 0..random.pick(&[0, 1, 1, 2, 2]) {
                let slice = self.random_slice(random, &service, family, number, hint_kind);
                self.slices.insert(slice.name.clone(), slice);
            }
        }
        format!("{name} has new slices")
    }

    fn random_slice(
        &self,
        random: &mut Random,
        service: &Service,
        family: Family,
        number: usize,
        hint_kind: usize,
    ) -> Slice {
        let mut ports = Vec::new();
        for port in &service.ports {
            if random.percent(90) {
                let (name, protocol) = (port.name.clone(), port.protocol);
                // SCTP goes where the port is the same only.
                let same = protocol == Protocol::Sctp && random.percent(70);
                let port = if same { port.port } else { random.pick(&[8080, 8081, 9000]) };
                ports.push(SlicePort { name, protocol, port });
            }
        }
        let mut endpoints: Vec<Endpoint> = Vec::new();
        for _ in 0..random.below(6) {
            let (ip, node) = place(random, family);
            let hints = if random.percent(92) { hints(random, hint_kind) } else { None };
            let mut endpoint = Endpoint { ip, ready: true, serving: true, terminating: false, node, hints };
            set_condition(random, &mut endpoint);
            // One pod in two slices is one pod: only its conditions may be told at different times.
            if let Some(known) = self.known(&service.name, ip) {
                (endpoint.node, endpoint.hints) = (known.node.clone(), known.hints.clone());
            }
            if !endpoints.iter().any(|e| e.ip == ip) {
                endpoints.push(endpoint);
            }
        }
        let name = ObjectName {
            namespace: service.name.namespace.clone(),
            name: format!("{}-{family:?}-{number}", service.name.name).into(),
        };
        Slice { name, service: service.name.name.clone(), is_controlled: false, ports, endpoints, triggered: None }
    }

    fn known(&self, service: &ObjectName, ip: Ipx) -> Option<&Endpoint> {
        self.slices.values().filter(|s| owner(s) == *service).flat_map(|s| &s.endpoints).find(|e| e.ip == ip)
    }

    fn delete_slice(&mut self, random: &mut Random) -> String {
        let names: Vec<ObjectName> = self.slices.keys().cloned().collect();
        if names.is_empty() {
            return "there is no slice to delete".into();
        }
        let name = random.pick(&names);
        self.slices.remove(&name);
        format!("slice {name} is deleted")
    }

    fn change_endpoint(&mut self, random: &mut Random) -> String {
        let names: Vec<ObjectName> =
            self.slices.iter().filter(|(_, s)| !s.endpoints.is_empty()).map(|(name, _)| name.clone()).collect();
        if names.is_empty() {
            return "there is no endpoint to change".into();
        }
        let name = random.pick(&names);
        let Some(slice) = self.slices.get_mut(&name) else { return String::new() };
        let at = random.below(slice.endpoints.len());
        match random.below(3) {
            0 => {
                let gone = slice.endpoints.remove(at);
                format!("{} leaves slice {name}", gone.ip)
            }
            1 => {
                // As a rolling update ends: terminating, and nothing in its place yet.
                let leaving = &mut slice.endpoints[at];
                (leaving.ready, leaving.terminating) = (false, true);
                format!("{} of slice {name} terminates", leaving.ip)
            }
            _ => {
                set_condition(random, &mut slice.endpoints[at]);
                format!("slice {name} has {:?}", slice.endpoints[at])
            }
        }
    }
}

/// The Service that a slice belongs to.
pub fn owner(slice: &Slice) -> ObjectName {
    ObjectName { namespace: slice.name.namespace.clone(), name: slice.service.clone() }
}
