//! The real thing: a real API server has the Services, and a real kube-proxy writes the rules of its two modes.
//!
//! All modes read the same objects, in a namespace of the run: their laboratories have the same addresses. Connections to
//! the API server leave a laboratory by a relay on each node's loopback device.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::symlink;
use std::path::{Path as FilePath, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use crate::common::world::{BenchWorld, Layout, Style};
use crate::laboratory::api_client::connection::Connection;
use crate::laboratory::api_client::{self, Api};
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::lab::{Lab, Node};
use crate::laboratory::process::Process;
use crate::laboratory::rulesets::load::TooSlow;
use crate::mode::{Mode, count_rules};
use crate::path::TARGETS;
use crate::preconditions;
use crate::services;

/// What the options `--kube-proxy` and `--kubeconfig` name.
#[derive(Clone)]
pub struct RealProxy {
    program: PathBuf,
    kubeconfig: Value,
}

impl RealProxy {
    pub fn new(program: &FilePath, kubeconfig: &FilePath) -> anyhow::Result<RealProxy> {
        let program = program.canonicalize().with_context(|| format!("--kube-proxy {}", program.display()))?;
        let name = || format!("--kubeconfig {}", kubeconfig.display());
        let text = fs::read_to_string(kubeconfig).with_context(name)?;
        Ok(RealProxy { program, kubeconfig: serde_norway::from_str(&text).with_context(name)? })
    }

    /// Fails when the API server is not as it has to be for `others` Services and the targets.
    pub fn check(&self, others: usize) -> anyhow::Result<()> {
        let runtime = api_client::runtime()?;
        let server = Connection::open(&runtime, &self.kubeconfig).context("--kubeconfig")?;
        preconditions::check(&server, others)
    }
}

/// The objects on the API server; deleted when this is dropped, and after a signal.
pub struct RealCluster {
    api: Api,
    proxy: RealProxy,
    /// Which the API server has chosen, in the order of [`TARGETS`].
    pub cluster_ips: [Ipv4Addr; 2],
    /// Services beside the targets.
    others: usize,
}

/// Between two looks at what a node has: each look lists everything, which holds up whoever is loading it.
const PAUSE: Duration = Duration::from_secs(1);

/// Managers of EndpointSlices leave those of others alone.
const MANAGED_BY: (&str, &str) = ("endpointslice.kubernetes.io/managed-by", "kubelane-bench");

impl RealCluster {
    /// Makes the nodes, the targets and `others` Services, for laboratories like `lab`.
    pub fn fill(proxy: &RealProxy, lab: &Lab, others: usize) -> anyhow::Result<RealCluster> {
        // The laboratory's own name: no other in this run has it, while a namespace that was deleted lingers on.
        let run = lab.dir.file_name().context("a laboratory without a name")?.to_string_lossy().into_owned();
        let api = Api::open(api_client::runtime()?, proxy.kubeconfig.clone(), format!("kubelane-bench-{run}"), &run)?;
        for node in &lab.nodes {
            let addresses = json!([{"type": "InternalIP", "address": node.host.v4}]);
            let metadata = json!({"name": node_name(&run, &node.name)});
            let object =
                json!({"apiVersion": "v1", "kind": "Node", "metadata": metadata, "status": {"addresses": addresses}});
            api.put(object).map_err(|status| anyhow::anyhow!("the API server refuses a Node: {status}"))?;
        }
        let mut cluster_ips = [Ipv4Addr::UNSPECIFIED; 2];
        for (target, ip) in TARGETS.into_iter().zip(&mut cluster_ips) {
            let [mut object, slice] = services::target(target, lab, None, |node| node_name(&run, node));
            // No cloud's controller feels responsible.
            object["spec"]["loadBalancerClass"] = json!("kubelane.test/by-hand");
            let created = api.create_all(vec![single_stack(object), managed(slice)])?;
            api.patch(&created[0], "/status", &json!({"status": services::load_balancer_status(target)}));
            let chosen = created[0]["spec"]["clusterIP"].as_str().unwrap_or_default();
            *ip = chosen.parse().with_context(|| format!("the API server chose {chosen:?}"))?;
        }
        let world = BenchWorld::write(&lab.dir.join("others"), others, 1, Layout::Big, Style::Plain)?;
        let objects = world.services.iter().map(services::other);
        api.create_all(objects.flat_map(|[service, slice]| [single_stack(service), managed(slice)]).collect())?;
        Ok(RealCluster { api, proxy: proxy.clone(), cluster_ips, others })
    }

    /// kubelane on the API server.
    pub fn start_daemon<'l>(&self, lab: &'l Lab, node: &Node) -> anyhow::Result<Daemon<'l>> {
        let kubeconfig = self.kubeconfig(lab, node);
        let text = |path: &FilePath| path.display().to_string();
        let (cgroup, pins, kubeconfig) = (text(&node.cgroup), text(&node.pin_path), text(&kubeconfig));
        let name = node_name(&self.api.run, &node.name);
        let mut arguments = vec!["run", "--cgroup", &cgroup, "--pin-path", &pins, "--kubeconfig", &kubeconfig];
        arguments.extend(["--hostname-override", &name]);
        let daemon = Daemon::start_as(lab, &node.name, &arguments)?;
        // Its metrics count the cluster's own Services, too.
        let (wanted, mut known) = (services::frontends(self.others), 0);
        let has_all = now_and_then(PATIENCE, || {
            known = self.count_frontends(node)?;
            Ok(known == wanted)
        });
        if !has_all? {
            bail!("the daemon of {} has {known} frontends, not {wanted}; {}", node.name, daemon.log());
        }
        Ok(daemon)
    }

    /// How many frontends of the run's namespace are in the kernel of a node and lead to an endpoint.
    fn count_frontends(&self, node: &Node) -> anyhow::Result<usize> {
        let list: Value = serde_json::from_str(&node.get("services", &["-o", "json"])?)?;
        let items = list["items"].as_array().context("kubelane get services lists no items")?;
        let is_ours = |item: &&Value| item["namespace"] == self.api.namespace.as_str();
        let leads_on = |item: &&Value| item["inside"]["endpoints"].as_array().is_some_and(|all| !all.is_empty());
        Ok(items.iter().filter(is_ours).filter(leads_on).count())
    }

    /// kube-proxy in one of its modes; waits until its rules are there. [`TooSlow`] when they take longer than `limit`.
    pub fn start_kube_proxy(&self, mode: Mode, lab: &Lab, node: &Node, limit: Duration) -> anyhow::Result<Process> {
        let kubeconfig = self.kubeconfig(lab, node);
        let config = lab.dir.join(format!("kube-proxy-{}.conf", node.name));
        let name = node_name(&self.api.run, &node.name);
        fs::write(&config, configuration(mode, &name, &kubeconfig).to_string())
            .context("kube-proxy's configuration")?;
        let path = format!("PATH={}:{}", legacy_tools(lab)?.display(), std::env::var("PATH").unwrap_or_default());
        let (program, config) = (self.proxy.program.display().to_string(), config.display().to_string());
        let mut process = node.host.spawn(FilePath::new("env"), &[&path, &program, "--config", &config])?;
        let ports = self.others + services::target_port_count();
        let is_loaded = now_and_then(limit, || {
            if let Some(status) = process.ended() {
                bail!("kube-proxy of {} ended with {status}; {}", node.name, node.host.log_tail());
            }
            // There is nothing to list before its first sync.
            Ok(count_rules(mode, node, &self.api.namespace).is_ok_and(|count| count == ports))
        });
        if !is_loaded? {
            return Err(TooSlow { loader: "kube-proxy".to_owned(), limit }.into());
        }
        Ok(process)
    }

    /// The kubeconfig for processes of a node.
    fn kubeconfig(&self, lab: &Lab, node: &Node) -> PathBuf {
        let path = lab.dir.join(format!("kubeconfig-{}", node.name));
        self.api.write_kubeconfig(&node.host, &path);
        path
    }
}

/// Looks until something is so, with a [`PAUSE`] in between; `false` when it was not within `patience`.
fn now_and_then(patience: Duration, mut is_so: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<bool> {
    let deadline = Instant::now() + patience;
    while !is_so()? {
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::sleep(PAUSE);
    }
    Ok(true)
}

/// The name of a laboratory's node on the API server.
fn node_name(run: &str, node: &str) -> String {
    format!("kubelane-{node}-{run}")
}

fn single_stack(mut service: Value) -> Value {
    service["spec"]["ipFamilyPolicy"] = json!("SingleStack");
    service["spec"]["ipFamilies"] = json!(["IPv4"]);
    service
}

fn managed(mut slice: Value) -> Value {
    let (label, manager) = MANAGED_BY;
    slice["metadata"]["labels"][label] = json!(manager);
    slice
}

/// A KubeProxyConfiguration that leaves the machine's own settings (conntrack's) as they are.
fn configuration(mode: Mode, node: &str, kubeconfig: &FilePath) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": mode.to_string(),
        "hostnameOverride": node,
        "clusterCIDR": "10.244.0.0/16",
        "detectLocalMode": "ClusterCIDR",
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        "clientConnection": {"kubeconfig": kubeconfig},
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
            "udpTimeout": "0s",
            "udpStreamTimeout": "0s",
        },
    })
}

/// A directory in which `iptables` and its like are the legacy ones: kube-proxy takes the first that `PATH` leads to.
fn legacy_tools(lab: &Lab) -> anyhow::Result<PathBuf> {
    let directory = lab.dir.join("legacy");
    fs::create_dir_all(&directory).with_context(|| format!("creating {}", directory.display()))?;
    for family in ["iptables", "ip6tables"] {
        for suffix in ["", "-save", "-restore"] {
            let (name, legacy) = (format!("{family}{suffix}"), format!("{family}-legacy{suffix}"));
            let searched = ["/usr/sbin", "/sbin", "/usr/bin"].map(|at| FilePath::new(at).join(&legacy));
            let found = searched.iter().find(|path| path.exists());
            let found = found.with_context(|| format!("{legacy} is missing (`make setup` installs it)"))?;
            let link = directory.join(name);
            if !link.exists() {
                symlink(found, &link).with_context(|| format!("making {}", link.display()))?;
            }
        }
    }
    Ok(directory)
}
