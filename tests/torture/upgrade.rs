//! An upgrade from the former map ABI, under traffic.

use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::former::{FORMER, run_former};
use crate::kills::{self, check_start};
use crate::laboratory::client::Client;
use crate::laboratory::cluster::{Cluster, all, names, vip};
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::manifests::port;
use crate::laboratory::messages::Kind::{self, Tcp4, Tcp6, Udp4, Udp6};
use crate::laboratory::{eventually, lab_or_skip};
use crate::services::{put_steady, put_world, traced_cluster_or_skip};
use crate::traced::{Outcome, Plan, Traced};
use serde_json::json;

/// A Service with a NodePort for each of its ports, 90 (tcp), 53 (udp) and 91 (echo) above `node_port`.
fn put(cluster: &Cluster, name: &str, number: u8, node_port: u16, pod: &str) {
    let ports = [("tcp", "TCP", 90), ("udp", "UDP", 53), ("echo", "TCP", 91)].map(|(name, protocol, at)| {
        let mut object = port(name, protocol, at);
        object["nodePort"] = json!(node_port + at);
        object
    });
    let targets = [("tcp", "TCP", 9000), ("udp", "UDP", 9000), ("echo", "TCP", 9100)];
    let changes = json!({"spec": {"type": "NodePort"}});
    cluster.put_with(name, number, json!(ports), changes, &targets, &cluster.ready(&[pod]));
}

const LOCAL: u16 = 30_000;
const REMOTE: u16 = 30_200;

#[derive(Default)]
struct Traffic {
    ready: AtomicU64,
    stop: AtomicBool,
    exchanges: AtomicU64,
    failures: Mutex<Vec<String>>,
}

impl Traffic {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed) && self.failures.lock().unwrap().is_empty()
    }

    fn note(&self, what: &str, outcome: Result<(), String>) {
        self.exchanges.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = outcome {
            self.failures.lock().unwrap().push(format!("{what}: {error}"));
        }
    }

    /// One socket that stays open and asks again and again.
    fn keep(&self, mut client: Client, kind: Kind, to: SocketAddr, is_connected: bool) {
        let what = format!("{kind:?} to {to}, connected: {is_connected}");
        let mut socket = client.open(kind).unwrap();
        if is_connected {
            socket.connect(to).unwrap();
        }
        let mut is_first = true;
        while self.goes_on() {
            let outcome = match is_connected {
                true => socket.send().and_then(|()| socket.receive()).map(|_| to),
                false => socket.ask_at(to).map(|(_, from)| from),
            };
            self.note(
                &what,
                match outcome {
                    Ok(from) if from == to => Ok(()),
                    other => Err(format!("{other:?}")),
                },
            );
            if std::mem::take(&mut is_first) {
                self.ready.fetch_add(1, Ordering::Relaxed);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn ask_anew(&self, cluster: &Cluster) {
        let mut pod = cluster.client("other");
        self.ready.fetch_add(1, Ordering::Relaxed);
        while self.goes_on() {
            for (kind, to) in [(Tcp4, vip(10, 90)[0]), (Tcp6, vip(10, 90)[1]), (Udp4, vip(10, 53)[0])] {
                let answers = pod.ask(kind, to, 2);
                self.note("a pod", (answers == all("a", 2)).then_some(()).ok_or(format!("{kind:?} {answers:?}")));
            }
        }
    }
}

/// Sockets of all sorts: from outside by NodePorts to both backends, of both families, and of a pod.
fn all_sorts(cluster: &Cluster) -> Vec<(bool, Kind, SocketAddr, bool)> {
    let node = &cluster.lab.node("node1").host;
    let [v4, v6]: [IpAddr; 2] = [node.v4.into(), node.v6.into()];
    let mut sorts = Vec::new();
    for base in [LOCAL, REMOTE] {
        for (address, kinds) in [(v4, [Tcp4, Udp4]), (v6, [Tcp6, Udp6])] {
            sorts.push((true, kinds[0], SocketAddr::new(address, base + 91), true));
            sorts.push((true, kinds[1], SocketAddr::new(address, base + 53), true));
        }
    }
    sorts.push((false, Tcp4, vip(10, 91)[0], true));
    sorts.push((false, Udp4, vip(10, 53)[0], true));
    sorts.push((false, Udp6, vip(10, 53)[1], false));
    sorts
}

#[test]
fn what_the_former_version_has_begun_goes_on_while_the_present_one_takes_over() {
    let Some(lab) = lab_or_skip(&[("node1", &["client", "other", "a"]), ("node2", &["b"])]) else { return };
    let cluster = Cluster::on(lab, &["a", "b"], "--tcp 9000 --udp 9000 --echo 9100");
    put(&cluster, "local", 10, LOCAL, "a");
    put(&cluster, "remote", 11, REMOTE, "b");
    let node = cluster.lab.node("node1");
    run_former(&cluster);
    assert!(node.pin_path.join(FORMER).exists() && !node.pin_path.join("v3").exists());

    let (traffic, sorts) = (Traffic::default(), all_sorts(&cluster));
    let count = sorts.len() as u64 + 1;
    let ended = std::thread::scope(|scope| {
        let (traffic, cluster) = (&traffic, &cluster);
        for (is_outside, kind, to, is_connected) in sorts {
            let client = if is_outside { cluster.lab.client_outside().unwrap() } else { cluster.client("client") };
            scope.spawn(move || traffic.keep(client, kind, to, is_connected));
        }
        scope.spawn(|| traffic.ask_anew(cluster));
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let begun = || traffic.ready.load(Ordering::Relaxed) == count || !traffic.goes_on();
            assert!(eventually(PATIENCE, begun));
            let failures = traffic.failures.lock().unwrap().clone();
            assert!(failures.is_empty(), "before the upgrade: {failures:?}; {}", node.host.log_tail());
            // UDP flows count as assured after two seconds of both ways.
            std::thread::sleep(Duration::from_secs(3));
            let daemon = Daemon::start(&cluster.lab, "node1", &cluster.manifests.dir).expect("the upgrade");
            std::thread::sleep(Duration::from_secs(2));
            daemon
        }));
        traffic.stop.store(true, Ordering::Relaxed);
        ended
    });
    let (failures, exchanges) = (traffic.failures.into_inner().unwrap(), traffic.exchanges.into_inner());
    println!("{exchanges} exchanges, {} failed", failures.len());
    let daemon = ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    assert!(failures.is_empty(), "{failures:?}; {}", daemon.log());
    let log = daemon.log();
    assert!(log.contains("took over the state of map ABI v2") && !log.contains("version cannot be read"), "{log}");
    assert!(!node.pin_path.join(FORMER).exists(), "what was taken over is gone");

    // The sockets above have closed: their flows know it.
    let mut outside = cluster.lab.client_outside().unwrap();
    let echo = SocketAddr::new(node.host.v4.into(), REMOTE + 90);
    assert_eq!(outside.ask(Tcp4, echo, 3), all("b", 3));
    let flows = node.get("flows", &["-o", "wide"]).unwrap();
    println!("{flows}");
    assert_eq!(names(&cluster.client("client").ask(Tcp4, vip(11, 90)[0], 3)), ["b"]);
}

#[test]
fn killed_at_any_system_call_of_an_upgrade_it_leaves_what_the_next_start_finishes() {
    let Some(cluster) = traced_cluster_or_skip() else { return };
    let node = cluster.lab.node("node1");
    put_steady(&cluster);
    let prepare = |number: usize| {
        if node.pin_path.exists() {
            node.cleanup().unwrap();
        }
        put_world(&cluster, number + 1);
        run_former(&cluster);
        put_world(&cluster, number);
    };
    let check = |number: usize, what: &str, _: &Outcome| {
        check_start(&cluster, number, what);
        assert!(!node.pin_path.join(FORMER).exists(), "{what}");
    };
    let mut traced = Traced::new(&cluster);
    traced.at_each(&Plan { points: 4, ..kills::plan("run") }, prepare, check);
    // While the former version's state is taken away, which is a few calls of many.
    traced.at_each(&Plan { calls: "unlink,unlinkat,rmdir", points: 3, ..kills::plan("run") }, prepare, check);
}
