//! `kubelane run --shadow` beside the rules that kube-proxy writes for the same Services: no difference; and beside rules
//! with one thing changed: that difference, and no other. Each test has a network namespace of its own.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::laboratory::manifests::Manifests;
use crate::laboratory::rulesets::{
    Endpoint, FAMILIES, Family, Protocol, ServicePort, State, World, iptables, load, nftables,
};
use crate::laboratory::{eventually, netns, process, skip};

/// A comparison, ten seconds, another one.
const PATIENCE: Duration = Duration::from_secs(60);
const KUBELANE: &str = env!("CARGO_BIN_EXE_kubelane");

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Iptables,
    /// The same rules, which the kernel has as nftables'.
    IptablesNft,
    Nftables,
}

impl Mode {
    fn name(self) -> &'static str {
        if self == Mode::Nftables { "nftables" } else { "iptables" }
    }

    fn command(self) -> &'static str {
        match self {
            Mode::Iptables => load::iptables_command(Family::V4),
            Mode::IptablesNft => "iptables-nft-restore",
            Mode::Nftables => "nft",
        }
    }

    /// Replaces the rules of both families.
    fn load(self, world: &World) {
        for (family, table) in FAMILIES.into_iter().zip(["ip", "ip6"]) {
            match self {
                Mode::Iptables => load::iptables(family, &iptables::render(world, family), load::NO_HURRY).unwrap(),
                Mode::IptablesNft => {
                    let command = if family == Family::V4 { "iptables-nft-restore" } else { "ip6tables-nft-restore" };
                    netns::run(command, &["-w"], &iptables::render(world, family)).unwrap();
                }
                Mode::Nftables => {
                    let delete = format!("add table {table} kube-proxy\ndelete table {table} kube-proxy\n");
                    let rules = delete + &nftables::render(world, family);
                    load::nftables(&rules, load::NO_HURRY).unwrap();
                }
            }
        }
    }

    fn saved(self) -> String {
        let saved = match self {
            Mode::Iptables => netns::run("iptables-legacy-save", &[], ""),
            Mode::IptablesNft | Mode::Nftables => netns::run("nft", &["list", "ruleset"], ""),
        };
        let text = saved.unwrap();
        // Without times, and numbers of packets.
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines.map(|line| format!("{}\n", line.split(" [").next().unwrap())).collect()
    }
}

fn ends(pods: &[(u8, bool, State)]) -> Vec<Endpoint> {
    let of = |(number, is_local, state): &(u8, bool, State)| {
        let node = if *is_local { 1 } else { 2 };
        [format!("10.244.{node}.{number}:8080"), format!("[fd44::{node}:{number}]:8080")].map(|at| Endpoint {
            at: at.parse().unwrap(),
            is_local: *is_local,
            state: *state,
        })
    };
    pods.iter().flat_map(of).collect()
}

fn service(name: &str, number: u8, pods: &[(u8, bool, State)]) -> ServicePort {
    ServicePort {
        namespace: "shop".to_owned(),
        name: name.to_owned(),
        port_name: "http".to_owned(),
        cluster_ips: addresses(&[format!("10.96.0.{number}"), format!("fd96::{number}")]),
        port: 80,
        endpoints: ends(pods),
        ..ServicePort::default()
    }
}

fn addresses(all: &[String]) -> Vec<IpAddr> {
    all.iter().map(|ip| ip.parse().unwrap()).collect()
}

/// With a NodePort, a load balancer IP and an external IP of both families.
fn everywhere(number: u8, service: ServicePort) -> ServicePort {
    let of = |v4: &str, v6: &str| addresses(&[format!("{v4}.{number}"), format!("{v6}::{number}")]);
    ServicePort {
        node_port: 30_000 + u16::from(number),
        load_balancer_ips: of("192.0.2", "2001:db8:1"),
        external_ips: of("198.51.100", "2001:db8:2"),
        ..service
    }
}

fn world() -> World {
    use State::{Leaving, Ready, Useless};
    let two = [(1, true, Ready), (2, false, Ready)];
    let away = [(3, false, Ready), (4, false, Ready)];
    let services = vec![
        service("plain", 1, &two),
        ServicePort { protocol: Protocol::Udp, ..service("datagrams", 2, &two) },
        service("none", 3, &[(5, false, Useless)]),
        everywhere(4, service("cluster", 4, &two)),
        ServicePort {
            external_local: true,
            health_check_node_port: 31_005,
            ..everywhere(5, service("local", 5, &two))
        },
        ServicePort { external_local: true, ..everywhere(6, service("away", 6, &away)) },
        ServicePort { external_local: true, ..everywhere(7, service("nowhere", 7, &[])) },
        ServicePort { internal_local: true, ..service("inside", 8, &two) },
        ServicePort { internal_local: true, ..service("inside-away", 9, &away) },
        ServicePort { affinity: Some(60), ..everywhere(10, service("sticky", 10, &two)) },
        ServicePort { affinity: Some(7200), external_local: true, ..everywhere(11, service("both", 11, &two)) },
        everywhere(12, service("leaving", 12, &[(6, true, Leaving), (7, false, Leaving)])),
        ServicePort {
            source_ranges: vec!["172.31.0.0/24".parse().unwrap(), "fd31::/64".parse().unwrap()],
            ..everywhere(13, service("guarded", 13, &two))
        },
        ServicePort { port_name: String::new(), ..service("nameless", 14, &away) },
    ];
    World {
        pods: vec!["10.244.1.0/24".parse().unwrap(), "fd44::1:0/112".parse().unwrap()],
        node: addresses(&["172.31.0.11".to_owned(), "fd31::11".to_owned()]),
        services,
    }
}

/// The same for kubelane.
fn save(manifests: &Manifests, world: &World) {
    let internal = world.node.iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect::<Vec<_>>();
    let node =
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"}, "status": {"addresses": internal}});
    manifests.save("node", &[node]);
    for service in &world.services {
        manifests.save(&service.name, &objects(service));
    }
}

fn objects(service: &ServicePort) -> Vec<Value> {
    let policy = |is_local: bool| if is_local { "Local" } else { "Cluster" };
    let protocol = service.protocol.name().to_uppercase();
    let mut port = json!({"port": service.port, "protocol": protocol, "targetPort": 8080});
    let mut slice_port = json!({"port": 8080, "protocol": protocol});
    if !service.port_name.is_empty() {
        port["name"] = json!(service.port_name);
        slice_port["name"] = json!(service.port_name);
    }
    let mut spec = json!({
        "type": "ClusterIP", "clusterIP": service.cluster_ips[0], "clusterIPs": service.cluster_ips,
        "ipFamilies": ["IPv4", "IPv6"], "internalTrafficPolicy": policy(service.internal_local),
    });
    if service.node_port != 0 {
        port["nodePort"] = json!(service.node_port);
        spec["type"] = json!("LoadBalancer");
        spec["externalTrafficPolicy"] = json!(policy(service.external_local));
        spec["externalIPs"] = json!(service.external_ips);
        let ranges: Vec<String> = service.source_ranges.iter().map(ToString::to_string).collect();
        spec["loadBalancerSourceRanges"] = json!(ranges);
    }
    if service.health_check_node_port != 0 {
        spec["healthCheckNodePort"] = json!(service.health_check_node_port);
    }
    if let Some(seconds) = service.affinity {
        spec["sessionAffinity"] = json!("ClientIP");
        spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": seconds}});
    }
    spec["ports"] = json!([port]);
    let ingress: Vec<Value> = service.load_balancer_ips.iter().map(|ip| json!({"ip": ip})).collect();
    let mut objects = vec![json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": service.name, "namespace": service.namespace}, "spec": spec,
        "status": {"loadBalancer": {"ingress": ingress}},
    })];
    for family in FAMILIES {
        let endpoint = |end: &Endpoint| {
            let (ready, serving, terminating) = match end.state {
                State::Ready => (true, true, false),
                State::Leaving => (false, true, true),
                State::Useless => (false, false, false),
            };
            json!({
                "addresses": [end.at.ip()], "nodeName": if end.is_local { "node-a" } else { "node-b" },
                "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
            })
        };
        let of_family: Vec<Value> = service.endpoints.iter().filter(|e| family.has(e.at.ip())).map(endpoint).collect();
        let kind = if family == Family::V4 { "IPv4" } else { "IPv6" };
        objects.push(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": kind,
            "metadata": {"name": format!("{}-{}", service.name, kind.to_lowercase()), "namespace": service.namespace,
                "labels": {"kubernetes.io/service-name": service.name}},
            "ports": [slice_port], "endpoints": of_family,
        }));
    }
    objects
}

/// A directory with the Services of `world()`, and a place for pins that are never made.
struct Site {
    directory: tempfile::TempDir,
}

impl Site {
    fn new() -> Site {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("manifests")).unwrap();
        let site = Site { directory };
        save(&site.manifests(), &world());
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn manifests(&self) -> Manifests {
        Manifests::new(self.path("manifests"))
    }

    fn command(&self, shadow: &str) -> Command {
        let mut command = Command::new(KUBELANE);
        command.args(["run", shadow, "--hostname-override", "node-a"]);
        command.arg("--source").arg(format!("dir:{}", self.path("manifests").display()));
        command.arg("--pin-path").arg(self.path("pins")).env_remove("RUST_LOG").stdin(Stdio::null());
        command
    }

    /// Exit code and standard output of `--shadow=once`.
    fn once(&self) -> (Option<i32>, String, String) {
        self.once_with(&[])
    }

    fn once_with(&self, options: &[&str]) -> (Option<i32>, String, String) {
        let Output { status, stdout, stderr } = self.command("--shadow=once").args(options).output().unwrap();
        (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
    }

    /// The differences that it prints, with single blanks; asserts the exit code.
    fn differences(&self, mode: Mode) -> Vec<String> {
        let (code, stdout, stderr) = self.once();
        assert_eq!(code, Some(1), "{stdout}{stderr}");
        let lines: Vec<String> = stdout.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert!(lines.last().unwrap().contains(&format!("compared with {} rules", mode.name())), "{stdout}");
        lines.into_iter().filter(|line| !line.starts_with("SERVICE ")).collect()
    }
}

/// Runs `work` in a network namespace that goes away with it, with the rules of `world()`.
fn beside(mode: Mode, work: impl FnOnce() + Send) {
    if !nix::unistd::geteuid().is_root() {
        return skip("needs root: it makes a network namespace");
    }
    if !process::in_path(mode.command()) {
        return skip(&format!("needs {} (`make setup` installs it)", mode.command()));
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            mode.load(&world());
            work();
        });
        thread.join().unwrap();
    });
}

fn nothing_differs(mode: Mode) {
    beside(mode, || {
        let site = Site::new();
        let (code, stdout, stderr) = site.once();
        let ports = world().services.len();
        let expected = format!("{ports} Service ports compared with {} rules, 0 differ\n", mode.name());
        assert_eq!((code, stdout), (Some(0), expected), "{stderr}");
    });
}

#[test]
fn nothing_differs_from_the_iptables_rules_of_the_same_services() {
    nothing_differs(Mode::Iptables);
}

#[test]
fn nothing_differs_from_iptables_rules_by_way_of_nftables() {
    nothing_differs(Mode::IptablesNft);
}

#[test]
fn nothing_differs_from_the_nftables_rules_of_the_same_services() {
    nothing_differs(Mode::Nftables);
}

/// The rules have lost an endpoint, remember for another time, lack a Service and have one too many.
fn each_change_is_reported(mode: Mode) {
    beside(mode, || {
        let mut changed = world();
        let of = |changed: &mut World, name: &str| changed.services.iter().position(|s| s.name == name).unwrap();
        let plain = of(&mut changed, "plain");
        changed.services[plain].endpoints.remove(0);
        let sticky = of(&mut changed, "both");
        changed.services[sticky].affinity = Some(90);
        let missing = of(&mut changed, "datagrams");
        changed.services.remove(missing);
        let inside = of(&mut changed, "inside-away");
        changed.services[inside].endpoints.clear();
        changed.services.push(service("stranger", 99, &[(9, false, State::Ready)]));
        mode.load(&changed);
        let found = Site::new().differences(mode);
        let sticky =
            |at: &str| format!("shop/both:http {at} affinity session affinity: 90 s in the rules, 7200 s in kubelane");
        let mut expected = vec![
            "shop/plain:http 10.96.0.1:80/TCP endpoints endpoints only in kubelane: 10.244.1.1:8080".to_owned(),
            "shop/datagrams:http 10.96.0.2:80/UDP only in kubelane no rule answers here; kubelane has the endpoints \
             10.244.1.1:8080, 10.244.2.2:8080"
                .to_owned(),
            "shop/datagrams:http [fd96::2]:80/UDP only in kubelane no rule answers here; kubelane has the endpoints \
             [fd44::1:1]:8080, [fd44::2:2]:8080"
                .to_owned(),
            "shop/inside-away:http 10.96.0.9:80/TCP verdict the rules refuse; kubelane drops".to_owned(),
            "shop/inside-away:http [fd96::9]:80/TCP verdict the rules refuse; kubelane drops".to_owned(),
            "shop/stranger:http 10.96.0.99:80/TCP only in rules kubelane has no such Service port; the rules have the \
             endpoints 10.244.2.9:8080"
                .to_owned(),
            "shop/stranger:http [fd96::99]:80/TCP only in rules kubelane has no such Service port; the rules have the \
             endpoints [fd44::2:9]:8080"
                .to_owned(),
        ];
        for at in ["10.96.0.11", "192.0.2.11", "198.51.100.11", "[fd96::11]", "[2001:db8:1::11]", "[2001:db8:2::11]"] {
            expected.push(sticky(&format!("{at}:80/TCP")));
        }
        expected.extend(["IPv4", "IPv6"].map(|family| sticky(&format!("NodePort 30011/TCP ({family})"))));
        expected.sort();
        let mut found = found;
        let summary = found.pop().unwrap();
        found.sort();
        assert_eq!(found, expected);
        assert_eq!(
            summary,
            format!("{} Service ports compared with {} rules, 5 differ", world().services.len() + 1, mode.name())
        );
    });
}

#[test]
fn each_change_of_iptables_rules_is_reported_and_nothing_else() {
    each_change_is_reported(Mode::Iptables);
}

#[test]
fn each_change_of_nftables_rules_is_reported_and_nothing_else() {
    each_change_is_reported(Mode::Nftables);
}

#[test]
fn rules_of_others_are_ignored_and_what_is_not_understood_is_said() {
    beside(Mode::Iptables, || {
        let mut rules =
            "*nat\n-A OUTPUT -d 10.9.9.9/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.1.1.1:80\n".to_owned();
        rules += "-A KUBE-SERVICES -m mark --mark 0x7/0x7 -m comment --comment \"it's \\\"odd\\\" -j DROP\" -j KUBE-NODEPORTS\n";
        // One endpoint of "plain" serves some clients only.
        let saved = Mode::Iptables.saved();
        let chain = saved.lines().find(|l| l.contains("-d 10.96.0.1/32") && l.contains("-A KUBE-SERVICES")).unwrap();
        let chain = chain.rsplit(' ').next().unwrap();
        rules += &format!("-I {chain} 1 -p tcp -m mark --mark 0x8/0x8 -j DNAT --to-destination 10.1.1.1:80\nCOMMIT\n");
        netns::run("iptables-legacy-restore", &["-w", "--noflush"], &rules).unwrap();
        let (code, stdout, stderr) = Site::new().once();
        assert_eq!(code, Some(0), "{stdout}{stderr}");
        let lines: Vec<&str> = stdout.lines().collect();
        assert_eq!(lines.len(), 3, "{stdout}");
        assert!(
            lines[0].starts_with("a rule of KUBE-SERVICES in the table nat is not understood: -m mark"),
            "{stdout}"
        );
        assert!(
            lines[1].starts_with("the iptables rules of 10.96.0.1:80/TCP are not understood and not compared"),
            "{stdout}"
        );
    });
}

#[test]
fn without_rules_there_is_nothing_to_compare_with() {
    beside(Mode::Iptables, || {
        netns::run("iptables-legacy-restore", &[], "*nat\n-A OUTPUT -j ACCEPT\nCOMMIT\n*filter\nCOMMIT\n").unwrap();
        netns::run("ip6tables-legacy-restore", &[], "*nat\nCOMMIT\n*filter\nCOMMIT\n").unwrap();
        let (code, stdout, stderr) = Site::new().once();
        assert_eq!((code, stdout.as_str()), (Some(1), ""));
        assert!(
            stderr.contains("no rules of kube-proxy are found on this node: kube-proxy has written none"),
            "{stderr}"
        );
    });
}

/// Ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn http(at: &str, path: &str) -> String {
    use std::io::{Read as _, Write as _};
    let Ok(mut stream) = std::net::TcpStream::connect(at) else { return String::new() };
    let _ = write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    answer
}

/// Every sysctl of this namespace, with its value.
fn sysctls(directory: &Path, found: &mut Vec<(PathBuf, String)>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        match path.is_dir() {
            true => sysctls(&path, found),
            // What the kernel counts, and what is everybody's.
            false if ["count", "conntrack_max", "bpf_jit"].iter().any(|of| path.to_string_lossy().contains(of)) => {}
            false => found.push((path.clone(), fs::read_to_string(&path).unwrap_or_default())),
        }
    }
    found.sort();
}

#[test]
fn a_difference_is_logged_and_measured_and_the_node_stays_as_it_is() {
    beside(Mode::Iptables, || {
        netns::run("ip", &["link", "set", "lo", "up"], "").unwrap();
        let mut world = world();
        world.services.remove(0);
        Mode::Iptables.load(&world);
        let site = Site::new();
        let state = || {
            let mut all = Vec::new();
            sysctls(Path::new("/proc/sys/net"), &mut all);
            (all, Mode::Iptables.saved(), netns::run("ip", &["address"], "").unwrap())
        };
        let before = state();
        let log = site.path("log");
        let (healthz, metrics) = ("127.0.0.1:20256", "127.0.0.1:20249");
        let mut command = site.command("--shadow");
        command.args(["--healthz-bind-address", healthz, "--metrics-bind-address", metrics, "--startup-taint", "x"]);
        let mut daemon = Running(command.stderr(fs::File::create(&log).unwrap()).spawn().unwrap());
        let logged = || fs::read_to_string(&log).unwrap();
        let began = Instant::now();
        assert!(
            eventually(PATIENCE, || logged().contains("shadow: shop/plain:http 10.96.0.1:80/TCP: no rule")),
            "{}",
            logged()
        );
        assert!(began.elapsed() > Duration::from_secs(10), "it has to last");
        assert!(logged().contains("shadow: 14 Service ports compared with iptables rules, 1 differ"), "{}", logged());
        assert!(http(healthz, "/readyz").starts_with("HTTP/1.1 200"), "{}", logged());
        let text = http(metrics, "/metrics");
        for sample in [
            "kubelane_shadow_service_ports 14",
            "kubelane_shadow_differences{kind=\"only_in_kubelane\"} 2",
            "kubelane_shadow_differences{kind=\"endpoints\"} 0",
        ] {
            assert!(text.contains(&format!("{sample}\n")), "{sample}: {text}");
        }
        let descriptors = fs::read_dir(format!("/proc/{}/fd", daemon.0.id())).unwrap().flatten();
        let bpf: Vec<_> = descriptors
            .filter_map(|d| fs::read_link(d.path()).ok())
            .filter(|t| t.to_string_lossy().contains("bpf"))
            .collect();
        assert!(bpf.is_empty(), "{bpf:?}");
        assert!(!site.path("pins").exists());
        kill(Pid::from_raw(daemon.0.id() as i32), Signal::SIGTERM).unwrap();
        assert!(daemon.0.wait().unwrap().success(), "{}", logged());
        assert!(state() == before, "it has changed something");
    });
}

/// So many Services with 10 endpoints each, in IPv4.
fn many(services: u32) -> World {
    let service = |number: u32| {
        let end = |n: u32| {
            let ip = std::net::Ipv4Addr::from_bits(0x0af4_0000 + number * 10 + n);
            Endpoint { at: (ip, 8080).into(), is_local: n == 0, state: State::Ready }
        };
        ServicePort {
            name: format!("web-{number}"),
            cluster_ips: vec![std::net::Ipv4Addr::from_bits(0x0a60_0000 + number).into()],
            endpoints: (0..10).map(end).collect(),
            ..service("", 1, &[])
        }
    };
    World { services: (1..=services).map(service).collect(), ..World::default() }
}

/// For figures: `KUBELANE_SERVICES=10000 cargo test --release --features lab --test shadow many -- --nocapture`.
fn many_services_are_compared(mode: Mode) {
    let services = std::env::var("KUBELANE_SERVICES").map_or(500, |text| text.parse().expect("a number of Services"));
    beside(mode, || {
        let began = Instant::now();
        let world = many(services);
        mode.load(&world);
        let loaded = began.elapsed();
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("manifests")).unwrap();
        let site = Site { directory };
        let all: Vec<Value> =
            world.services.iter().flat_map(objects).filter(|o| o["addressType"] != "IPv6").map(single_stack).collect();
        site.manifests().save("all", &all);
        let began = Instant::now();
        let (code, stdout, stderr) = site.once_with(&["-v", "4"]);
        println!("{mode:?}: loaded in {loaded:?}, compared {:?} after the start\n{stderr}", began.elapsed());
        assert_eq!(
            (code, stdout.as_str()),
            (Some(0), &*format!("{services} Service ports compared with {} rules, 0 differ\n", mode.name()))
        );
    });
}

fn single_stack(mut object: Value) -> Value {
    if object["kind"] == "Service" {
        object["spec"]["ipFamilies"] = json!(["IPv4"]);
    }
    object
}

#[test]
fn many_services_are_compared_with_iptables_rules() {
    many_services_are_compared(Mode::Iptables);
}

#[test]
fn many_services_are_compared_with_nftables_rules() {
    many_services_are_compared(Mode::Nftables);
}
