//! A node with kube-proxy's real rules moves to kubelane and back, as manifests/MIGRATION.md has it: `kubelane run --shadow`
//! finds no difference; with `--takeover` connections that the rules have begun go on, new ones are kubelane's, and when
//! kube-proxy has ended its rules go, and nothing of anybody else's; and after the way back kubelane's connections go on,
//! by kube-proxy's rules.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::laboratory::client::{Client, Socket};
use crate::laboratory::cluster::{Cluster, vip};
use crate::laboratory::daemon::{Daemon, PATIENCE, arguments};
use crate::laboratory::manifests::port;
use crate::laboratory::messages::Kind::{self, Tcp4, Tcp6, Udp4, Udp6};
use crate::laboratory::rulesets::{
    Endpoint, FAMILIES, Family, Protocol, ServicePort, State, World, iptables, load, nftables,
};
use crate::laboratory::{eventually, kubelane_binary, lab_or_skip, netns};
use serde_json::json;

const LOCAL: u16 = 30_091;
const REMOTE: u16 = 30_191;
const DATAGRAMS: u16 = 30_291;
/// Of somebody else, and to stay. (So is KUBE-FIREWALL, which is kubelet's.)
const FOREIGN: &str = "*nat
:FOREIGN - [0:0]
-A PREROUTING -p tcp -m tcp --dport 7 -m comment --comment \"-j KUBE-SERVICES\" -j FOREIGN
-A FOREIGN -p tcp -j DNAT --to-destination 192.0.2.7:7
COMMIT
*filter
-A FORWARD -s 198.51.100.0/24 -j DROP
COMMIT
";

fn put(cluster: &Cluster, number: u8, protocol: Protocol, node_port: u16, pods: &[&str]) -> ServicePort {
    let (name, protocol_name, target) = match protocol {
        Protocol::Tcp => (format!("echo-{number}"), "TCP", 9100),
        Protocol::Udp => (format!("datagrams-{number}"), "UDP", 9000),
    };
    let mut object = port("port", protocol_name, 91);
    object["nodePort"] = json!(node_port);
    let changes = json!({"spec": {"type": "NodePort"}});
    let targets = [("port", protocol_name, target)];
    cluster.put_with(&name, number, json!([object]), changes, &targets, &cluster.ready(pods));
    let endpoint = |pod: &&str| {
        let is_local = cluster.lab.node_of(pod) == "node1";
        let at = |address| Endpoint { at: SocketAddr::new(address, target), is_local, state: State::Ready };
        cluster.lab.pod(pod).addresses().map(at)
    };
    ServicePort {
        namespace: "default".to_owned(),
        name,
        port_name: "port".to_owned(),
        protocol,
        cluster_ips: vip(number, 0).map(|address| address.ip()).into(),
        port: 91,
        node_port,
        endpoints: pods.iter().flat_map(endpoint).collect(),
        ..ServicePort::default()
    }
}

/// All rules but their counters.
fn rules(cluster: &Cluster) -> String {
    let host = &cluster.lab.node("node1").host;
    let legacy =
        host.run("iptables-legacy-save", &[], "").unwrap() + &host.run("ip6tables-legacy-save", &[], "").unwrap();
    let nft = host.run("nft", &["list", "ruleset"], "").unwrap();
    let lines = legacy.lines().filter(|line| !line.starts_with('#') && !line.contains("KUBE-FIREWALL"));
    let without_counters = lines.map(|line| line.split(" [").next().unwrap_or_default().to_owned());
    without_counters.collect::<Vec<_>>().join("\n") + &nft
}

/// Where the daemon's tools are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tools {
    Here,
    /// As for a container that is in the host's PID namespace: in the mount namespace of process 1 only.
    OnTheNode,
}

fn start<'c>(cluster: &'c Cluster, tools: Tools) -> Daemon<'c> {
    let source = format!("dir:{}", cluster.manifests.dir.display());
    let arguments = arguments(cluster.lab.node("node1"), &["--source", &source], &["--takeover"]);
    let kubelane = kubelane_binary().unwrap().display().to_string();
    // The first process of a PID namespace has the tools, and the daemon in it another mount namespace, without.
    let hide = "unshare --mount sh -c 'mount -t tmpfs none /usr/sbin && exec \"$@\"' sh \"$@\" & wait";
    let hidden = ["--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "sh", "-c", hide, "sh"];
    let words = if tools == Tools::Here { &[][..] } else { &hidden[..] };
    let all = words.iter().copied().chain([kubelane.as_str()]).chain(arguments.iter().map(String::as_str));
    let all: Vec<&str> = all.collect();
    let (program, arguments) = match tools {
        Tools::Here => (kubelane.as_str(), &all[1..]),
        Tools::OnTheNode => ("/usr/bin/unshare", &all[..]),
    };
    Daemon::start_program(&cluster.lab, "node1", Path::new(program), arguments).unwrap()
}

fn migrate(render: impl Fn(&World, Family) -> anyhow::Result<()> + Sync, leaves_tables: bool, tools: Tools) {
    let Some(lab) = lab_or_skip(&[("node1", &["client", "a"]), ("node2", &["b"])]) else { return };
    let cluster = Cluster::on(lab, &["a", "b"], "--udp 9000 --echo 9100");
    let services = vec![
        put(&cluster, 10, Protocol::Tcp, LOCAL, &["a"]),
        put(&cluster, 11, Protocol::Tcp, REMOTE, &["b"]),
        put(&cluster, 12, Protocol::Udp, DATAGRAMS, &["a", "b"]),
    ];
    let node = cluster.lab.node("node1");
    let world = World {
        pods: vec!["10.244.1.0/24".parse().unwrap(), "fd44:0:0:1::/64".parse().unwrap()],
        node: node.host.addresses().into(),
        services,
    };
    // Tables stay when their last rule goes: they are there before, too.
    let add_foreign = || node.host.run("iptables-legacy-restore", &["--noflush"], FOREIGN).unwrap();
    let empty = || {
        for restore in ["iptables-legacy-restore", "ip6tables-legacy-restore"] {
            node.host.run(restore, &[], "*nat\nCOMMIT\n*filter\nCOMMIT\n").unwrap();
        }
    };
    empty();
    add_foreign();
    let before = rules(&cluster);
    empty();
    let sync = || node.host.inside(|| FAMILIES.iter().try_for_each(|family| render(&world, *family))).unwrap();
    sync();
    add_foreign();
    assert_ne!(rules(&cluster), before);

    // "Before you start".
    let kubelane = kubelane_binary().unwrap();
    let source = format!("dir:{}", cluster.manifests.dir.display());
    let shadow = ["run", "--shadow=once", "--hostname-override", "node1", "--source", &source];
    let said = node.host.run(&kubelane.display().to_string(), &shadow, "").unwrap();
    assert!(said.contains("3 Service ports compared") && said.contains(" 0 differ"), "{said}");

    let at = |number: u16| SocketAddr::new(IpAddr::V4(node.host.v4), number);
    let mut clients: [Client; 3] =
        [cluster.lab.client_outside().unwrap(), cluster.lab.client_outside().unwrap(), cluster.client("client")];
    let to = [at(LOCAL), at(REMOTE), vip(10, 91)[0]];
    let mut open: Vec<_> = clients.iter_mut().zip(to).map(|(client, to)| (client.open(Tcp4).unwrap(), to)).collect();
    for (socket, to) in &mut open {
        socket.connect(*to).unwrap();
        socket.send().and_then(|()| socket.receive()).unwrap_or_else(|error| panic!("by the rules, {to}: {error}"));
    }

    // Whatever is called so counts as kube-proxy, if it can be seen.
    let stand_in = cluster.lab.dir.join("kube-proxy");
    fs::copy("/bin/sleep", &stand_in).unwrap();
    let kube_proxy = (tools == Tools::Here).then(|| node.host.spawn(&stand_in, &["600"]).unwrap());
    let daemon = start(&cluster, tools);
    let says = |text: &str| eventually(PATIENCE, || daemon.log().contains(text));
    if kube_proxy.is_some() {
        assert!(says("--takeover: kube-proxy still runs (pid "), "{}", daemon.log());
        assert!(rules(&cluster).contains("KUBE-") || rules(&cluster).contains("kube-proxy"), "not while it runs");
    }
    drop(kube_proxy);
    assert!(says("--takeover: removed kube-proxy's rules"), "{}", daemon.log());
    match leaves_tables {
        false => assert_eq!(rules(&cluster), before, "{}", daemon.log()),
        true => assert!(!rules(&cluster).contains("KUBE-SVC"), "{}", rules(&cluster)),
    }

    for (socket, to) in &mut open {
        for _ in 0..3 {
            socket.send().and_then(|()| socket.receive()).unwrap_or_else(|error| panic!("afterwards, {to}: {error}"));
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let mut outside = cluster.lab.client_outside().unwrap();
    let mut new = outside.open(Tcp4).unwrap();
    new.connect(at(REMOTE)).unwrap();
    new.send().and_then(|()| new.receive()).unwrap();
    let flows = node.get("flows", &[]).unwrap();
    assert_eq!(flows.matches(&format!(":{REMOTE}")).count(), 1, "the new one only: {flows}");
    if tools == Tools::Here {
        move_back(&cluster, daemon, sync);
    }
}

/// "Go back": kube-proxy has its rules again, kubelane's pod ends, the job runs.
fn move_back(cluster: &Cluster, daemon: Daemon, sync: impl Fn()) {
    let node = cluster.lab.node("node1");
    let kinds = |port: u16| if port == DATAGRAMS { [Udp4, Udp6] } else { [Tcp4, Tcp6] };
    let ports = [LOCAL, REMOTE].into_iter().chain([DATAGRAMS; 4]);
    let ends: Vec<(Kind, SocketAddr)> = ports
        .flat_map(|port| kinds(port).into_iter().zip(node.host.addresses().map(|ip| SocketAddr::new(ip, port))))
        .collect();
    let mut clients: Vec<Client> = ends.iter().map(|_| cluster.lab.client_outside().unwrap()).collect();
    let mut open: Vec<Socket> =
        clients.iter_mut().zip(&ends).map(|(client, (kind, _))| client.open(*kind).unwrap()).collect();
    for (socket, (_, to)) in open.iter_mut().zip(&ends) {
        socket.connect(*to).unwrap();
    }
    let mut ask_all = |when: &str| -> Vec<String> {
        let asked = open.iter_mut().zip(&ends);
        asked.map(|(socket, to)| socket.ask().unwrap_or_else(|error| panic!("{when}, {to:?}: {error}"))).collect()
    };
    let first = ask_all("by kubelane");
    // Datagrams are a stream when they have gone both ways for two seconds, as for conntrack.
    for _ in 0..3 {
        std::thread::sleep(Duration::from_secs(1));
        assert_eq!(ask_all("by kubelane"), first);
    }

    // Without a pause, to a local pod and to one elsewhere.
    let mut busy = [LOCAL, REMOTE].map(|_| cluster.lab.client_outside().unwrap());
    let numbers: Vec<u32> = busy
        .iter_mut()
        .zip([LOCAL, REMOTE])
        .map(|(client, port)| {
            let mut socket = client.open(Tcp4).unwrap();
            socket.connect(SocketAddr::new(IpAddr::V4(node.host.v4), port)).and_then(|()| socket.ask()).unwrap();
            socket.number()
        })
        .collect();

    sync();
    assert!(daemon.terminate().unwrap().success());
    let job =
        fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/manifests/migration/kubelane-cleanup.yaml")).unwrap();
    assert!(job.contains("args: [cleanup]") && job.contains("hostNetwork: true"));
    let is_over = AtomicBool::new(false);
    let ask = |mut socket: Socket| {
        while !is_over.load(Ordering::Relaxed) {
            socket.ask().unwrap_or_else(|error| panic!("while it is handed over: {error}"));
        }
    };
    let said = thread::scope(|scope| {
        for (client, number) in busy.iter_mut().zip(numbers) {
            scope.spawn(move || ask(client.socket(number)));
        }
        thread::sleep(Duration::from_millis(100));
        let said = node.cleanup();
        thread::sleep(Duration::from_millis(300));
        is_over.store(true, Ordering::Relaxed);
        said.unwrap()
    });
    // And those without a pause, and the one that the caller has open.
    assert!(said.starts_with(&format!("handed {} connections over to netfilter", ends.len() + 3)), "{said}");
    assert!(!said.contains("ends:"), "{said}");
    for _ in 0..5 {
        assert_eq!(ask_all("by kube-proxy's rules"), first);
    }
    assert!(!node.pin_path.exists());
    for (kind, to) in &ends {
        let mut client = cluster.lab.client_outside().unwrap();
        let mut socket = client.open(*kind).unwrap();
        socket.connect(*to).and_then(|()| socket.ask()).unwrap_or_else(|error| panic!("a new one, {to}: {error}"));
    }
}

#[test]
fn rules_of_the_iptables_mode_go_and_their_connections_go_on() {
    migrate(
        |world, family| load::iptables(family, &iptables::render(world, family), load::NO_HURRY),
        false,
        Tools::Here,
    );
}

#[test]
fn so_do_those_of_the_iptables_mode_that_are_in_nftables() {
    let load = |world: &World, family| {
        let restore = if family == Family::V4 { "iptables-nft-restore" } else { "ip6tables-nft-restore" };
        netns::run(restore, &[], &iptables::render(world, family)).map(drop)
    };
    migrate(load, true, Tools::Here);
}

#[test]
fn rules_of_the_nftables_mode_go_and_their_connections_go_on() {
    migrate(|world, family| load::nftables(&nftables::render(world, family), load::NO_HURRY), false, Tools::Here);
}

#[test]
fn a_container_that_has_no_tools_runs_the_nodes() {
    let load = |world: &World, family| load::iptables(family, &iptables::render(world, family), load::NO_HURRY);
    migrate(load, false, Tools::OnTheNode);
}
