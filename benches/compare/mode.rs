//! Who serves the Services: each mode has two nodes and a client of its own, in namespaces that no other mode touches.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::Path as FilePath;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::ValueEnum;

use crate::common::world::{BenchService, BenchWorld, Layout, Style};
use crate::laboratory::daemon::Daemon;
use crate::laboratory::lab::{Lab, Node};
use crate::laboratory::manifests::Manifests;
use crate::laboratory::process::Process;
use crate::laboratory::rulesets::{self, Family, World, load};
use crate::path::{Path, TARGETS};
use crate::real_cluster::RealCluster;
use crate::service_port;
use crate::services;

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

    /// kube-proxy's rules serve them.
    pub fn has_rules(self) -> bool {
        matches!(self, Mode::Iptables | Mode::Nftables)
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
    /// Services beside the targets.
    pub others: usize,
    /// Until everything was in the kernel of both nodes.
    pub loaded_after: Duration,
    /// Of the targets, in their order.
    cluster_ips: [Ipv4Addr; 2],
    _daemons: Vec<Daemon<'a>>,
    _proxies: Vec<Process>,
}

impl<'a> Served<'a> {
    /// Services come from `cluster`, with kube-proxy's own rules, or else from files, with rules that are written here.
    /// [`load::TooSlow`] when a node's rules take longer than `limit`.
    pub fn start(
        mode: Mode,
        lab: &'a Lab,
        others: usize,
        cluster: Option<&RealCluster>,
        limit: Duration,
    ) -> anyhow::Result<Served<'a>> {
        let dir = lab.dir.join("manifests");
        let world = BenchWorld::write(&dir, others, 1, Layout::Big, Style::Plain)?;
        let began = Instant::now();
        let (mut daemons, mut proxies) = (Vec::new(), Vec::new());
        for node in &lab.nodes {
            match (mode, cluster) {
                (Mode::Direct | Mode::Routed, _) => {}
                (Mode::Kubelane, None) => daemons.push(start_daemon(lab, node, &dir, others)?),
                (Mode::Kubelane, Some(cluster)) => daemons.push(cluster.start_daemon(lab, node)?),
                (Mode::Iptables | Mode::Nftables, None) => load_rules(mode, lab, node, &world.services, limit)?,
                (Mode::Iptables | Mode::Nftables, Some(cluster)) => {
                    proxies.push(cluster.start_kube_proxy(mode, lab, node, limit)?);
                }
            }
            if mode.has_rules() {
                // What kube-proxy asks of a node: replies between pods of one bridge must pass the rules, too.
                let setting = node.host.sysctl(&[("bridge/bridge-nf-call-iptables", "1")]);
                setting.context("the rules need the kernel's module br_netfilter (modprobe br_netfilter)")?;
            }
        }
        let cluster_ips = cluster.map_or(TARGETS.map(|target| target.cluster_ip), |cluster| cluster.cluster_ips);
        let loaded_after = began.elapsed();
        if mode.has_rules() && cluster.is_none() {
            for node in &lab.nodes {
                let loaded = count_rules(mode, node, service_port::NAMESPACE)?;
                if loaded != others {
                    bail!("the rules of {} are for {loaded} Services, not {others}", node.name);
                }
            }
        }
        Ok(Served { mode, lab, others, loaded_after, cluster_ips, _daemons: daemons, _proxies: proxies })
    }

    /// What the client of a path connects to. Without a proxy it is the pod itself, from the same client.
    pub fn address(&self, path: Path) -> Ipv4Addr {
        let target = path.target();
        match path {
            _ if self.mode.is_plain() => self.lab.pod(target.pod).v4,
            Path::Pod => self.lab.pod(target.pod).v4,
            Path::ClusterIpRemote | Path::ClusterIpLocal | Path::PacketPod => {
                let at = TARGETS.iter().position(|other| other.name == target.name);
                at.map_or(target.cluster_ip, |at| self.cluster_ips[at])
            }
            Path::NodePortLocal | Path::NodePortRemote => self.lab.node("node1").host.v4,
            Path::LoadBalancerIp => target.load_balancer_ip,
        }
    }
}

fn start_daemon<'a>(lab: &'a Lab, node: &Node, dir: &FilePath, others: usize) -> anyhow::Result<Daemon<'a>> {
    let manifests = Manifests::new(dir.to_owned());
    for target in TARGETS {
        let objects = services::target(target, lab, Some(target.cluster_ip.into()), str::to_owned);
        manifests.save(target.name, &objects);
    }
    let daemon = Daemon::start(lab, &node.name, dir)?;
    check_complete(&daemon, others)?;
    Ok(daemon)
}

/// Fails unless the daemon has the whole world in the kernel, and nothing else.
fn check_complete(daemon: &Daemon, others: usize) -> anyhow::Result<()> {
    // Each Service has one endpoint, which is a backend of each of its ports.
    let services = others + TARGETS.len();
    let wanted = [
        ("kubelane_services ", services),
        ("kubelane_endpoints ", services),
        ("kubelane_frontends ", services::frontends(others)),
        ("kubelane_map_entries{map=\"backends\"}", others + services::target_port_count()),
    ];
    for (metric, wanted) in wanted {
        let known = daemon.metric(metric)?;
        if known != wanted as f64 {
            bail!("the daemon of {} has {known} as {}, not {wanted}", daemon.node.name, metric.trim_end());
        }
    }
    Ok(())
}

fn load_rules(mode: Mode, lab: &Lab, node: &Node, others: &[BenchService], limit: Duration) -> anyhow::Result<()> {
    let world = World {
        pods: vec!["10.244.0.0/16".parse()?],
        node: vec![node.host.v4.into()],
        services: services::ports(lab, node, others),
    };
    let load = || match mode {
        Mode::Nftables => load::nftables(&rulesets::nftables::render(&world, Family::V4), limit),
        _ => load::iptables(Family::V4, &rulesets::iptables::render(&world, Family::V4), limit),
    };
    node.host.inside(load).with_context(|| format!("loading the rules of {}", node.name))
}

/// Of how many ports of Services in `namespace` the node's rules have the cluster IP.
pub fn count_rules(mode: Mode, node: &Node, namespace: &str) -> anyhow::Result<usize> {
    if mode == Mode::Nftables {
        let list = node.host.run("nft", &["list", "map", "ip", "kube-proxy", "service-ips"], "")?;
        let ours = format!("-{namespace}/");
        let chains = list.split("goto service-").skip(1);
        return Ok(chains.filter(|chain| chain.split_whitespace().next().is_some_and(|c| c.contains(&ours))).count());
    }
    let list = node.host.run("iptables-legacy-save", &["-t", "nat"], "")?;
    let ours = format!("\"{namespace}/");
    let is_ours = |line: &&str| line.starts_with("-A KUBE-SERVICES ") && line.contains(&ours);
    Ok(list.lines().filter(is_ours).filter(|line| line.contains(" cluster IP\"")).count())
}
