//! Who serves the Services: each mode has two nodes and a client of its own, in namespaces that no other mode touches.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::Path as FilePath;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use serde_json::json;

use crate::common::world::{BenchService, BenchWorld, ENDPOINT_PORT, Layout, SERVICE_PORT, Style};
use crate::path::{Path, TARGETS, Target};
use crate::rulesets::{self, Family, Protocol, ServicePort, State, World, load};
use crate::support::daemon::Daemon;
use crate::support::lab::{Lab, Node};
use crate::support::manifests::{Endpoint, Manifests, port, service, slice};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Mode {
    /// Nobody: clients use the pods' addresses, and packets go the shortest way.
    Direct,
    /// The same, but by the node that proxies have to go by, which has no rules and only forwards, both ways.
    Routed,
    Kubelane,
    /// As kube-proxy's iptables mode has it, in legacy iptables: through nf_tables, 10,000 Services take ten minutes.
    Iptables,
    /// As kube-proxy's nftables mode has it.
    Nftables,
}

impl Mode {
    /// Nobody serves the Services.
    pub fn is_plain(self) -> bool {
        matches!(self, Mode::Direct | Mode::Routed)
    }

    /// Whether a path is one of its own in this mode: for most there is no other way than the direct one.
    pub fn has(self, path: Path) -> bool {
        self != Mode::Routed || path == Path::NodePortRemote
    }

    pub const ALL: [Mode; 5] = [Mode::Direct, Mode::Routed, Mode::Kubelane, Mode::Iptables, Mode::Nftables];
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Mode::Direct => "direct",
            Mode::Routed => "routed",
            Mode::Kubelane => "kubelane",
            Mode::Iptables => "iptables",
            Mode::Nftables => "nftables",
        })
    }
}

/// The namespaces of a mode.
pub fn lay_out(mode: Mode) -> anyhow::Result<Lab> {
    let lab = Lab::new(&[("node1", &["client", "here"]), ("node2", &["there"])])?;
    // As a load balancer's announcement would have it; the pods' networks are for the mode without a proxy.
    lab.route_outside("192.0.2.0/24", "node1")?;
    lab.route_outside("10.244.1.0/24", "node1")?;
    if mode == Mode::Routed {
        lab.route_outside("10.244.2.0/24", "node1")?;
        let (client, by) = (lab.outside_place()?.v4, lab.node("node1").host.v4);
        lab.node("node2").host.ip(&[&format!("route add {client}/32 via {by}")])?;
    } else {
        lab.route_outside("10.244.2.0/24", "node2")?;
    }
    // Connections end without TIME_WAIT, and begin without what an earlier one learned.
    let ends = [("ipv4/tcp_max_tw_buckets", "0"), ("ipv4/tcp_no_metrics_save", "1")];
    lab.sysctl_outside(&ends)?;
    // The wire between the nodes is a bridge, which is to be no more than a wire.
    if FilePath::new("/proc/sys/net/bridge").exists() {
        lab.sysctl_outside(&[("bridge/bridge-nf-call-iptables", "0")])?;
    }
    for node in &lab.nodes {
        node.pods.iter().try_for_each(|pod| pod.sysctl(&ends))?;
        // A client on the node's own network would be told of the shorter way, to the disadvantage of rules.
        let redirects = ["all", "eth0", "cbr0"].map(|device| format!("ipv4/conf/{device}/send_redirects"));
        redirects.iter().try_for_each(|name| node.host.sysctl(&[(name, "0")]))?;
    }
    Ok(lab)
}

/// A mode in force: the nodes of its laboratory serve the targets, and as many others as asked for.
pub struct Served<'a> {
    pub mode: Mode,
    pub lab: &'a Lab,
    /// Until everything was in the kernel of both nodes.
    pub loaded_after: Duration,
    _daemons: Vec<Daemon<'a>>,
}

impl<'a> Served<'a> {
    pub fn start(mode: Mode, lab: &'a Lab, others: usize) -> anyhow::Result<Served<'a>> {
        let dir = lab.dir.join("manifests");
        let others = BenchWorld::write(&dir, others, 1, Layout::Big, Style::Plain)?;
        let began = Instant::now();
        let mut daemons = Vec::new();
        for node in &lab.nodes {
            match mode {
                Mode::Direct | Mode::Routed => {}
                Mode::Kubelane => daemons.push(start_daemon(lab, node, &dir, others.services.len())?),
                Mode::Iptables | Mode::Nftables => load_rules(mode, lab, node, &others.services)?,
            }
        }
        Ok(Served { mode, lab, loaded_after: began.elapsed(), _daemons: daemons })
    }
}

fn start_daemon<'a>(lab: &'a Lab, node: &Node, dir: &FilePath, others: usize) -> anyhow::Result<Daemon<'a>> {
    let manifests = Manifests::new(dir.to_owned());
    for target in TARGETS {
        let ports = target.ports();
        let ports: Vec<(&str, &str, u16)> = ports
            .iter()
            .map(|(name, is_tcp, number)| (name.as_str(), if *is_tcp { "TCP" } else { "UDP" }, *number))
            .collect();
        let make = |(name, protocol, number): &(&str, &str, u16)| {
            let mut port = port(name, protocol, *number);
            port["nodePort"] = json!(number);
            port
        };
        let spec = json!({
            "type": "LoadBalancer",
            "clusterIP": target.cluster_ip.to_string(),
            "ports": ports.iter().map(make).collect::<Vec<_>>(),
        });
        let mut object = service(target.name, spec);
        object["status"] = json!({"loadBalancer": {"ingress": [{"ip": target.load_balancer_ip.to_string()}]}});
        let endpoint = Endpoint::ready(lab.pod(target.pod).v4.into(), lab.node_of(target.pod));
        manifests.save(target.name, &[object, slice(&format!("{}-1", target.name), target.name, &ports, &[endpoint])]);
    }
    let daemon = Daemon::start(lab, &node.name, dir)?;
    let known = daemon.metric("kubelane_frontends ")?;
    if known < (others + TARGETS.len()) as f64 {
        bail!("the daemon of {} has {known} frontends for {others} Services and {}", node.name, TARGETS.len());
    }
    Ok(daemon)
}

fn load_rules(mode: Mode, lab: &Lab, node: &Node, others: &[BenchService]) -> anyhow::Result<()> {
    let targets = TARGETS.iter().flat_map(|target| service_ports(*target, lab, node));
    let world = World {
        pods: vec!["10.244.0.0/16".parse()?],
        node: vec![node.host.v4.into()],
        services: others.iter().map(other).chain(targets).collect(),
    };
    let load = || match mode {
        Mode::Nftables => load::nftables(&rulesets::nftables::render(&world, Family::V4)),
        _ => load::iptables(Family::V4, &rulesets::iptables::render(&world, Family::V4)),
    };
    node.host.inside(load).with_context(|| format!("loading the rules of {}", node.name))?;
    // What kube-proxy asks of a node: replies between pods of one bridge must pass the rules, too.
    let setting = node.host.sysctl(&[("bridge/bridge-nf-call-iptables", "1")]);
    setting.context("the rules need the kernel's module br_netfilter (modprobe br_netfilter)")
}

/// The ports of a target, for the rules of `node`.
fn service_ports(target: Target, lab: &Lab, node: &Node) -> Vec<ServicePort> {
    let endpoint = |number: u16| rulesets::Endpoint {
        at: SocketAddr::new(lab.pod(target.pod).v4.into(), number),
        is_local: lab.node_of(target.pod) == node.name,
        state: State::Ready,
    };
    let make = |(name, is_tcp, number): (String, bool, u16)| ServicePort {
        namespace: "default".to_owned(),
        name: target.name.to_owned(),
        port_name: name,
        protocol: if is_tcp { Protocol::Tcp } else { Protocol::Udp },
        cluster_ips: vec![target.cluster_ip.into()],
        port: number,
        node_port: number,
        load_balancer_ips: vec![target.load_balancer_ip.into()],
        endpoints: vec![endpoint(number)],
        ..ServicePort::default()
    };
    target.ports().into_iter().map(make).collect()
}

/// One of the other Services, which no packet is for.
fn other(service: &BenchService) -> ServicePort {
    let endpoint = |at: &std::net::Ipv4Addr| rulesets::Endpoint {
        at: SocketAddr::new(IpAddr::V4(*at), ENDPOINT_PORT),
        is_local: false,
        state: State::Ready,
    };
    ServicePort {
        namespace: "bench".to_owned(),
        name: format!("service-{}", service.number),
        port_name: "http".to_owned(),
        cluster_ips: vec![service.cluster_ip().into()],
        port: SERVICE_PORT,
        endpoints: service.endpoints.iter().map(endpoint).collect(),
        ..ServicePort::default()
    }
}
