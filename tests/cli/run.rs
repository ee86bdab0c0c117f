//! The daemon as an operator meets it: started, asked, stopped, started again, cleaned up. Each test has a BPF file
//! system, an empty cgroup and ports of its own, so that no socket of the machine is touched.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use crate::laboratory::pins::Pins;
use crate::laboratory::{eventually, preflight, skip};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const PATIENCE: Duration = Duration::from_secs(20);

const MANIFEST: &str = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec:
  type: NodePort
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10]
  ipFamilies: [IPv4]
  ports: [{name: http, port: 80, targetPort: 8080, nodePort: 30080, protocol: TCP}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-abc, namespace: default, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints: [{addresses: [10.244.1.2]}, {addresses: [10.244.2.2]}]
";

/// A BPF file system and a cgroup without processes, manifests, two ports; and their end.
struct World {
    directory: tempfile::TempDir,
    pins: Pins,
    healthz: SocketAddr,
    metrics: SocketAddr,
}

/// A loopback address that is this process's alone (127.64.0.0/10 has one for each process id), with a port below those
/// that the kernel gives to clients: one that was asked for and let go again is anybody's until the daemon has it.
fn address_of(number: u16) -> SocketAddr {
    (Ipv4Addr::from_bits(0x7f40_0000 | std::process::id() & 0x3f_ffff), 20_000 + number).into()
}

impl World {
    fn or_skip() -> Option<World> {
        if let Err(reason) = preflight() {
            skip(&format!("{reason:#}"));
            return None;
        }
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("manifests")).unwrap();
        fs::write(directory.path().join("manifests/web.yaml"), MANIFEST).unwrap();
        let (healthz, metrics) = (address_of(2 * number), address_of(2 * number + 1));
        Some(World { directory, pins: Pins::new(), healthz, metrics })
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    fn pins(&self) -> String {
        self.pins.bpffs.join("kl").display().to_string()
    }

    /// A subcommand on this world's pin path, to its end.
    fn ask(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kubelane"));
        command.args(arguments).args(["--pin-path", &self.pins()]).stdin(Stdio::null()).output().unwrap()
    }

    fn start(&self, more: &[&str]) -> Daemon<'_> {
        let log = self.path("log");
        let child = Command::new(env!("CARGO_BIN_EXE_kubelane"))
            .args(["run", "--source", &format!("dir:{}", self.path("manifests")), "--hostname-override", "Node-A"])
            // This daemon runs in the machine's own namespace, whose traffic is not for a test to touch.
            .args(["--devices", "no-such-device"])
            .args(["--pin-path", &self.pins(), "--cgroup", &self.pins.cgroup.display().to_string()])
            .args(["--healthz-bind-address", &self.healthz.to_string()])
            .args(["--metrics-bind-address", &self.metrics.to_string()])
            .args(["--max-services", "256", "--max-endpoints", "4096"])
            .args(more)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Daemon { world: self, child }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    /// Status and body; `None` when nothing answers.
    fn http(&self, address: SocketAddr, path: &str) -> Option<(u16, String)> {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(2))).ok()?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.ask(&["cleanup"]);
    }
}

struct Daemon<'w> {
    world: &'w World,
    child: Child,
}

impl Daemon<'_> {
    fn wait_ready(&self) {
        let world = self.world;
        let ready = || world.http(world.healthz, "/readyz").is_some_and(|(status, _)| status == 200);
        assert!(eventually(PATIENCE, ready), "not ready: {}", world.log());
    }

    fn metric(&self, sample: &str) -> f64 {
        let (_, text) = self.world.http(self.world.metrics, "/metrics").unwrap();
        let value = text.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no {sample} in {text}")).parse().unwrap()
    }

    fn ended(&mut self) -> ExitStatus {
        let mut status = None;
        let ended = eventually(PATIENCE, || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        assert!(ended, "it does not end: {}", self.world.log());
        status.unwrap()
    }

    fn terminate(mut self) -> ExitStatus {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
        self.ended()
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_daemon_is_started_asked_stopped_started_again_and_cleaned_up() {
    let Some(world) = World::or_skip() else { return };
    let daemon = world.start(&[]);
    daemon.wait_ready();
    let (_, ready) = world.http(world.healthz, "/readyz").unwrap();
    assert!(ready.starts_with("ok; the datapath was not probed: this process is not in the cgroup"), "{ready}");
    assert_eq!(daemon.metric("kubelane_services"), 1.0);
    assert_eq!(daemon.metric("kubelane_map_entries{map=\"backends\"}"), 2.0);
    assert_eq!(daemon.metric("kubelane_source_connected{kind=\"services\"}"), 1.0);
    assert!(daemon.metric("kubelane_sync_rows_total{operation=\"write\"}") > 0.0);
    assert_eq!(world.http(world.metrics, "/proxyMode"), Some((200, "kubelane".to_owned())));
    let refused = world.ask(&["cleanup"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("a running kubelane holds"), "{}", text(&refused.stderr));
    assert_eq!(daemon.terminate().code(), Some(0));
    assert!(world.log().contains("SIGTERM") && world.log().contains("continue to serve"), "{}", world.log());

    let services = text(&world.ask(&["get", "services"]).stdout);
    let expected =
        ["default     web    http   TCP        10.96.0.10:80   ClusterIP   2", "0.0.0.0:30080   NodePort    2"];
    assert!(expected.iter().all(|row| services.contains(row)), "{services}");
    let backends: serde_json::Value =
        serde_json::from_slice(&world.ask(&["get", "backends", "-o", "json"]).stdout).unwrap();
    assert_eq!(backends["items"][1]["address"], "10.244.2.2:8080");

    let again = world.start(&[]);
    again.wait_ready();
    assert!(world.log().contains("took over the state"), "{}", world.log());
    for operation in ["write", "delete"] {
        assert_eq!(again.metric(&format!("kubelane_sync_rows_total{{operation=\"{operation}\"}}")), 0.0, "{operation}");
    }
    drop(again);
    let cleanup = world.ask(&["cleanup"]);
    assert_eq!(cleanup.status.code(), Some(0), "{}", text(&cleanup.stderr));
    assert!(text(&cleanup.stdout).contains("/links/connect4"), "{}", text(&cleanup.stdout));
    assert!(!PathBuf::from(world.pins()).exists());
    assert_eq!(world.ask(&["get", "services"]).status.code(), Some(1));
}

#[test]
fn a_port_that_is_taken_keeps_no_service_waiting_and_is_had_when_it_is_free() {
    let Some(world) = World::or_skip() else { return };
    let taken = TcpListener::bind(world.metrics).unwrap();
    let daemon = world.start(&[]);
    daemon.wait_ready();
    let services = text(&world.ask(&["get", "services"]).stdout);
    assert!(services.contains("10.96.0.10:80"), "{services}");
    let address = world.metrics.to_string();
    let expected = format!("--metrics-bind-address: cannot listen on {address}");
    let lines = || world.log().lines().filter(|line| line.contains(&expected)).count();
    assert_eq!(lines(), 1, "{}", world.log());

    let check = world.ask(&["check", "--metrics-bind-address", &address, "--healthz-bind-address", ""]);
    let said = text(&check.stdout);
    let line = said.lines().find(|line| line.contains("metrics port")).unwrap();
    assert!(line.starts_with("warn") && line.contains(&format!("(pid {})", std::process::id())), "{line}");

    drop(taken);
    assert!(eventually(PATIENCE, || world.http(world.metrics, "/proxyMode").is_some()), "{}", world.log());
    assert_eq!(lines(), 1, "told once");
}

#[test]
fn a_port_that_is_taken_ends_a_daemon_that_is_told_so_before_anything_is_attached() {
    let Some(world) = World::or_skip() else { return };
    let taken = TcpListener::bind(world.metrics).unwrap();
    let address = world.metrics.to_string();
    fs::write(
        world.path("config.conf"),
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nbindAddressHardFail: true\n",
    )
    .unwrap();
    let config = world.path("config.conf");
    for arguments in [&["--bind-address-hard-fail"][..], &["--config", &config]] {
        let status = world.start(arguments).ended();
        assert_eq!(status.code(), Some(1), "{}", world.log());
        let expected = format!("--metrics-bind-address: cannot listen on {address}");
        assert!(world.log().lines().last().is_some_and(|line| line.contains(&expected)), "{}", world.log());
        assert!(!PathBuf::from(world.pins()).exists(), "nothing was made");
    }
    let check = |more: &[&str]| {
        let line = [&["check", "--metrics-bind-address", &address, "--healthz-bind-address", ""], more].concat();
        let said = text(&world.ask(&line).stdout);
        said.lines().find(|line| line.contains("metrics port")).unwrap().to_owned()
    };
    assert!(check(&["--bind-address-hard-fail"]).starts_with("FAIL"));
    assert!(check(&["--config", &config, "--bind-address-hard-fail=false"]).starts_with("warn"), "the flag wins");

    drop(taken);
    let daemon = world.start(&["--bind-address-hard-fail"]);
    daemon.wait_ready();
    assert!(world.http(world.metrics, "/proxyMode").is_some(), "{}", world.log());
}

#[test]
fn json_logs_are_one_object_a_line_and_tell_of_the_first_sync() {
    let Some(world) = World::or_skip() else { return };
    let daemon = world.start(&["--log-format", "json"]);
    daemon.wait_ready();
    assert_eq!(daemon.terminate().code(), Some(0));
    let lines: Vec<serde_json::Value> =
        world.log().lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect();
    let first_sync = lines.iter().find(|line| line["message"] == "first sync").expect("the first sync is told");
    assert_eq!((&first_sync["services"], &first_sync["frontends"]), (&1.into(), &2.into()));
    assert!(first_sync["after_start"].as_str().is_some_and(|time| time.ends_with('s')), "{first_sync}");
    assert!(lines.iter().any(|line| line["node"] == "node-a"), "the node's name is told, in lower case");
}

#[test]
fn a_configuration_that_kube_proxy_would_read_is_read_with_one_warning_that_names_what_is_odd() {
    let Some(world) = World::or_skip() else { return };
    let header = "\u{feff}apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
    let body = "metadata: {}\nipvs: {schedular: rr}\nmode: ipvs\nconntrack: {udpTimeout: 5s, udpTimeout: 6s}\n";
    fs::write(world.path("config.conf"), format!("{header}{body}")).unwrap();
    let config = world.path("config.conf");
    let daemon = world.start(&["--config", &config, "-v=2", "-v=4", "--devices", "no-such-device"]);
    daemon.wait_ready();
    assert_eq!(daemon.terminate().code(), Some(0));
    let log = world.log();
    let told: Vec<&str> = log.lines().filter(|line| line.contains("these settings are malformed")).collect();
    assert_eq!(told.len(), 1, "{log}");
    let expected = "--devices (given twice: the last one counts), --v (given twice: the last one counts), a byte-order \
                    mark at the beginning (skipped), conntrack.udpTimeout (given twice: the last one counts), metadata \
                    (unknown field), ipvs.schedular (unknown field)";
    assert!(told[0].contains("WARN") && told[0].ends_with(expected), "{}", told[0]);
    let ignored = log.lines().find(|line| line.contains("have no effect here")).unwrap();
    assert!(ignored.ends_with("are ignored: mode"), "{ignored}");

    let check = world.ask(&["check", "--config", &config]);
    let line = text(&check.stdout).lines().find(|line| line.contains("configuration file")).map(str::to_owned);
    assert!(line.is_some_and(|line| line.starts_with("warn") && line.contains("metadata (unknown field)")));
}
