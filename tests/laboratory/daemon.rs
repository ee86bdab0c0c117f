//! The real `kubelane run` of a node, on a directory of manifests or an API server.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use super::cgroup::MemoryGroup;
use super::kubelane_binary;
use super::lab::{Lab, Node};
use super::process::Process;

/// Health and metrics addresses, in the node's own namespace.
const HEALTH: &str = "127.0.0.1:10256";
const METRICS: &str = "127.0.0.1:10249";
/// How long a daemon may take to get ready or to follow a change on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How long it may take to load its programs: an emulated processor needs half a minute for that.
pub const LOADING: Duration = Duration::from_secs(60);

/// A running daemon. Dropping it kills it; its maps and programs stay, as after a crash, until the laboratory goes.
#[derive(Debug)]
pub struct Daemon<'a> {
    pub node: &'a Node,
    process: Process,
    /// From the start of the process to the first 200 of /readyz.
    pub ready_after: Duration,
}

impl<'a> Daemon<'a> {
    /// Starts the node's daemon on the directory `manifests` and waits until its first sync is in the kernel.
    pub fn start(lab: &'a Lab, node: &str, manifests: &Path) -> anyhow::Result<Daemon<'a>> {
        Daemon::start_with(lab, node, manifests, &[])
    }

    /// As [`Daemon::start`], with more options.
    pub fn start_with(lab: &'a Lab, node: &str, manifests: &Path, options: &[&str]) -> anyhow::Result<Daemon<'a>> {
        let source = format!("dir:{}", manifests.display());
        Daemon::start_on(lab, node, &["--source", &source], options)
    }

    /// As [`Daemon::start_with`], on the source that these options name.
    pub fn start_on(lab: &'a Lab, node: &str, source: &[&str], options: &[&str]) -> anyhow::Result<Daemon<'a>> {
        let arguments = arguments(lab.node(node), source, options);
        Daemon::start_as(lab, node, &arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// As [`Daemon::start_on`], without waiting.
    pub fn spawn_on(lab: &'a Lab, node: &str, source: &[&str], options: &[&str]) -> anyhow::Result<Daemon<'a>> {
        let arguments = arguments(lab.node(node), source, options);
        Daemon::spawn_as(lab, node, &arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Starts `kubelane` with these arguments and no others, and waits until it is ready.
    pub fn start_as(lab: &'a Lab, node: &str, arguments: &[&str]) -> anyhow::Result<Daemon<'a>> {
        Daemon::start_program(lab, node, &kubelane_binary()?, arguments)
    }

    /// As [`Daemon::start`], without this capability: "sys_ptrace".
    pub fn start_without(lab: &'a Lab, node: &str, manifests: &Path, capability: &str) -> anyhow::Result<Daemon<'a>> {
        let source = format!("dir:{}", manifests.display());
        let (kubelane, bounds) = (kubelane_binary()?.display().to_string(), format!("-{capability}"));
        let arguments = arguments(lab.node(node), &["--source", &source], &[]);
        let words = ["--bounding-set", &bounds, &kubelane];
        let all: Vec<&str> = words.into_iter().chain(arguments.iter().map(String::as_str)).collect();
        Daemon::start_program(lab, node, Path::new("/usr/bin/setpriv"), &all)
    }

    /// As [`Daemon::start`], in this group, too.
    pub fn start_in(lab: &'a Lab, node: &str, manifests: &Path, group: &MemoryGroup) -> anyhow::Result<Daemon<'a>> {
        let source = format!("dir:{}", manifests.display());
        let (kubelane, processes) =
            (kubelane_binary()?.display().to_string(), group.path.join("cgroup.procs").display().to_string());
        let arguments = arguments(lab.node(node), &["--source", &source], &[]);
        let words = ["-c", "echo $$ > \"$0\" && exec \"$@\"", &processes, &kubelane];
        let all: Vec<&str> = words.into_iter().chain(arguments.iter().map(String::as_str)).collect();
        Daemon::start_program(lab, node, Path::new("/bin/sh"), &all)
    }

    /// As [`Daemon::start_as`], where `program` is another binary, or becomes the daemon.
    pub fn start_program(lab: &'a Lab, node: &str, program: &Path, arguments: &[&str]) -> anyhow::Result<Daemon<'a>> {
        let began = Instant::now();
        let node = lab.node(node);
        let process = node.host.spawn(program, arguments)?;
        let mut daemon = Daemon { node, process, ready_after: Duration::ZERO };
        daemon.wait_ready(began, LOADING, Duration::from_millis(2))?;
        Ok(daemon)
    }

    /// As [`Daemon::start_as`], without waiting.
    pub fn spawn_as(lab: &'a Lab, node: &str, arguments: &[&str]) -> anyhow::Result<Daemon<'a>> {
        let node = lab.node(node);
        let process = node.host.spawn(&kubelane_binary()?, arguments)?;
        Ok(Daemon { node, process, ready_after: Duration::ZERO })
    }

    /// Waits for a daemon that was only spawned; asks once in a `pause`, which costs the daemon something, too. `began`:
    /// when it was.
    pub fn wait_ready(&mut self, began: Instant, patience: Duration, pause: Duration) -> anyhow::Result<()> {
        loop {
            self.check_running()?;
            if self.get(HEALTH, "/readyz").is_ok_and(|answer| answer.starts_with("HTTP/1.1 200")) {
                self.ready_after = began.elapsed();
                return Ok(());
            }
            if began.elapsed() > patience {
                bail!(
                    "the daemon of {} is not ready after {patience:?}; {}",
                    self.node.name,
                    self.node.host.log_tail()
                );
            }
            std::thread::sleep(pause);
        }
    }

    /// Fails when the daemon has ended, with what it said.
    pub fn check_running(&mut self) -> anyhow::Result<()> {
        match self.process.ended() {
            None => Ok(()),
            Some(status) => {
                bail!("the daemon of {} ended with {status}; {}", self.node.name, self.node.host.log_tail())
            }
        }
    }

    /// One HTTP request to the daemon, from its own namespace: status line, headers and body.
    pub fn get(&self, address: &str, path: &str) -> anyhow::Result<String> {
        let address: SocketAddr = address.parse()?;
        self.node.host.inside(|| {
            let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
            stream.set_read_timeout(Some(Duration::from_secs(2)))?;
            write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        })
    }

    /// Status line, headers and body of a path behind the health address.
    pub fn health(&self, path: &str) -> anyhow::Result<String> {
        self.get(HEALTH, path)
    }

    /// The text of /metrics.
    pub fn metrics(&self) -> anyhow::Result<String> {
        self.get(METRICS, "/metrics")
    }

    /// The sum of a metric's samples, by the start of their lines.
    pub fn metric(&self, sample: &str) -> anyhow::Result<f64> {
        let text = self.metrics()?;
        let lines = text.lines().filter(|line| line.starts_with(sample));
        let values: Vec<f64> = lines.filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
        if values.is_empty() {
            bail!("no metric {sample} in:\n{text}");
        }
        Ok(values.iter().sum())
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Ends the daemon with SIGTERM.
    pub fn terminate(mut self) -> anyhow::Result<ExitStatus> {
        self.process.terminate(Duration::from_secs(10)).with_context(|| self.node.host.log_tail())
    }

    /// Ends the daemon as a crash does.
    pub fn kill(mut self) {
        self.process.kill();
    }

    pub fn log(&self) -> String {
        self.node.host.log_tail()
    }
}

/// The command line of a node's daemon on the source that these options name.
pub fn arguments(node: &Node, source: &[&str], options: &[&str]) -> Vec<String> {
    let (cgroup, pins) = (node.cgroup.display().to_string(), node.pin_path.display().to_string());
    let own = ["run", "--hostname-override", &node.name, "--cgroup", &cgroup, "--pin-path", &pins];
    let own = own.into_iter().chain(["--healthz-bind-address", HEALTH, "--metrics-bind-address", METRICS]);
    own.chain(source.iter().copied()).chain(options.iter().copied()).map(str::to_owned).collect()
}

impl Node {
    /// `kubelane get services|backends` of this node, from the live maps.
    pub fn get(&self, what: &str, options: &[&str]) -> anyhow::Result<String> {
        let pins = self.pin_path.display().to_string();
        let mut arguments = vec!["get", what, "--pin-path", &pins];
        arguments.extend(options);
        self.kubelane(&arguments)
    }

    /// `kubelane cleanup` of this node.
    pub fn cleanup(&self) -> anyhow::Result<String> {
        let pins = self.pin_path.display().to_string();
        self.kubelane(&["cleanup", "--pin-path", &pins])
    }
}
