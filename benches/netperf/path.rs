//! The paths that are compared, and one run of netperf on one of them.
//!
//! A socket load balancer makes cluster IP and direct the same path on the wire, so that connections of one would meet
//! the other's in TIME_WAIT: each path has a netserver and a data port of its own, and the pods keep no TIME_WAIT.
//!
//! netperf's option for a separate data address asks netserver to bind it, which no pod can do with a cluster IP. The
//! data connection goes to the control connection's address when none is given, so the Service has the control port
//! too; netserver is then asked to bind only the data port.

use std::fmt;
use std::io::Read as _;
use std::net::Ipv4Addr;
use std::path::{Path as FilePath, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use kubelane::bpf::Maps;

use crate::common::health::Trouble;
use crate::laboratory::eventually;
use crate::laboratory::lab::Lab;
use crate::laboratory::netns;
use crate::laboratory::process::Process;

pub const CLUSTER_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 50);

/// How a client reaches the server's pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// By the pod's address; client and server in a cgroup that the daemon does not serve.
    Without,
    /// By the pod's address; kubelane's programs look and find no Service.
    Direct,
    ClusterIp,
}

impl Path {
    pub const ALL: [Path; 3] = [Path::Without, Path::Direct, Path::ClusterIp];

    /// Control and data port, on the server and of the Service.
    pub fn ports(self) -> (u16, u16) {
        match self {
            Path::Without => (12001, 41001),
            Path::Direct => (12002, 41002),
            Path::ClusterIp => (12003, 41003),
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Path::Without => "without kubelane",
            Path::Direct => "direct",
            Path::ClusterIp => "cluster IP",
        })
    }
}

/// What came of a run.
pub enum Run {
    /// Transactions per second.
    Good(f64),
    /// Why its figure says nothing about the path.
    Spoiled(String),
}

/// Servers that listen, and what a client needs.
pub struct Bench<'a> {
    lab: &'a Lab,
    netperf: String,
    processors: (u32, u32),
    seconds: u32,
    _servers: Vec<Process>,
}

impl<'a> Bench<'a> {
    /// Starts one netserver for each path, in the pod `server`.
    pub fn start(lab: &'a Lab, programs: PathBuf, processors: (u32, u32), seconds: u32) -> anyhow::Result<Self> {
        for pod in ["client", "server"] {
            netns::sysctl(&pod_netns(lab, pod)?, &[("ipv4/tcp_max_tw_buckets", "0")])?;
        }
        let netserver = programs.join("netserver").display().to_string();
        let mut servers = Vec::new();
        for path in Path::ALL {
            let (control, processor) = (path.ports().0.to_string(), processors.1.to_string());
            let arguments = ["-c", &processor, &netserver, "-D", "-4", "-p", &control];
            servers.push(spawn(lab, path, "server", "taskset", &arguments)?);
        }
        let bench = Bench {
            lab,
            netperf: programs.join("netperf").display().to_string(),
            processors,
            seconds,
            _servers: servers,
        };
        for path in Path::ALL {
            let to = (lab.pod("server").v4, path.ports().0);
            let listens = || lab.pod("client").inside(|| Ok(std::net::TcpStream::connect(to)?)).is_ok();
            if !eventually(Duration::from_secs(5), listens) {
                bail!("the netserver of {path} does not listen");
            }
        }
        Ok(bench)
    }

    /// One run; fails only when netperf itself does.
    pub fn run(&self, path: Path, test: &str) -> anyhow::Result<Run> {
        let (control, data) = path.ports();
        let to = if path == Path::ClusterIp { CLUSTER_IP } else { self.lab.pod("server").v4 };
        // -P 0 -v 0: the rate alone. -r 1,1: one byte each way.
        let options = format!(
            "-4 -H {to} -p {control} -t {test} -l {} -T {},{} -P 0 -v 0 -- -P ,{data} -r 1,1",
            self.seconds, self.processors.0, self.processors.1
        );
        let arguments: Vec<&str> = options.split(' ').collect();
        let before = (self.trouble()?, self.translated()?);
        let mut process = spawn(self.lab, path, "client", &self.netperf, &arguments)?;
        let mut said = String::new();
        process.stdout()?.read_to_string(&mut said).context("reading what netperf says")?;
        let status = process.wait()?;
        if !status.success() {
            return Ok(Run::Spoiled(format!("netperf ended with {status}: {}", said.trim())));
        }
        let rate: f64 = said.trim().parse().with_context(|| format!("netperf said {said:?}"))?;
        if let Some(why) = self.trouble()?.since(&before.0, &[]) {
            return Ok(Run::Spoiled(why));
        }
        let translated = self.translated()? - before.1;
        match (path, translated) {
            (Path::ClusterIp, 0) => bail!("a run on the cluster IP was not translated"),
            (Path::Without | Path::Direct, 1..) => bail!("a run on the path {path} was translated"),
            _ => Ok(Run::Good(rate)),
        }
    }

    fn trouble(&self) -> anyhow::Result<Trouble> {
        let read = |pod: &str| self.lab.pod(pod).inside(Trouble::read);
        Ok(read("client")?.and(read("server")?))
    }

    /// Connections and datagrams that the programs have translated so far.
    fn translated(&self) -> anyhow::Result<u64> {
        let counters = Maps::open(&self.lab.node("node1").pin_path)?.read_counters()?;
        Ok(counters.iter().filter(|(name, _)| name.ends_with("_translated")).map(|(_, count)| count).sum())
    }
}

/// Starts a program in a pod's namespace; for [`Path::Without`] in a cgroup beside the node's. It gets the processor
/// whenever it wants it, so that what else runs on the machine disturbs less.
fn spawn(lab: &Lab, path: Path, pod: &str, program: &str, arguments: &[&str]) -> anyhow::Result<Process> {
    let chrt = FilePath::new("chrt");
    let arguments = [&["--fifo", "10", program], arguments].concat();
    if path != Path::Without {
        return lab.pod(pod).spawn(chrt, &arguments);
    }
    let outside = lab.node("node1").cgroup.with_file_name("without");
    std::fs::create_dir_all(&outside).with_context(|| format!("creating {}", outside.display()))?;
    Process::spawn(&pod_netns(lab, pod)?, &outside, &lab.dir.join("without.log"), chrt, &arguments)
}

/// The namespace of a pod.
fn pod_netns(lab: &Lab, pod: &str) -> anyhow::Result<PathBuf> {
    let id = lab.dir.file_name().and_then(|id| id.to_str()).context("a laboratory has a name")?;
    let names = netns::with_prefix(&format!("kllab-{id}-"));
    let name = names.iter().find(|name| name.ends_with(&format!("-{pod}")));
    Ok(netns::path(name.with_context(|| format!("no namespace of {pod}"))?))
}
