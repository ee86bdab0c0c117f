//! A cluster that becomes larger than the maps: these grow while connections go on, and nobody notices; also not when the
//! daemon is killed meanwhile.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::kills;
use crate::laboratory::cluster::{Cluster, all, names, vip};
use crate::laboratory::daemon::{Daemon, LOADING};
use crate::laboratory::manifests::{Endpoint, port, service, slice};
use crate::laboratory::messages::Kind::{Tcp4, Tcp6, Udp4};
use crate::laboratory::{eventually, lab_or_skip};
use crate::services::{self, traced_cluster_or_skip};
use crate::traced::{Outcome, Plan, Traced};
use serde_json::{Value, json};

const NODE_PORT: u16 = 30_090;
const REMOTE_NODE_PORT: u16 = 30_091;

/// Services 0.. with an endpoint each, that nobody asks for but the last, whose endpoint is pod `a`.
fn put_many(cluster: &Cluster, count: u32) {
    let mut objects = Vec::new();
    for number in 0..count {
        let name = format!("many-{number}");
        let ip = Ipv4Addr::from_bits(u32::from(Ipv4Addr::new(10, 97, 0, 0)) + number);
        let spec = json!({"clusterIP": ip, "clusterIPs": [ip], "ipFamilies": ["IPv4"],
            "ports": [port("tcp", "TCP", 90)]});
        let pod = match number + 1 == count {
            true => cluster.lab.pod("a").addresses()[0],
            false => IpAddr::V4(Ipv4Addr::from_bits(u32::from(Ipv4Addr::new(10, 240, 0, 0)) + number)),
        };
        objects.push(service(&name, spec));
        objects.push(slice(&name, &name, &[("tcp", "TCP", 9000)], &[Endpoint::ready(pod, "node1")]));
    }
    cluster.manifests.save("many", &objects);
}

fn put_steady(cluster: &Cluster, name: &str, number: u8, node_port: u16, pod: &str) {
    let mut echo: Value = port("echo", "TCP", 91);
    echo["nodePort"] = json!(node_port);
    let ports = json!([port("tcp", "TCP", 90), port("udp", "UDP", 53), echo]);
    let targets = [("tcp", "TCP", 9000), ("udp", "UDP", 9000), ("echo", "TCP", 9100)];
    let changes = json!({"spec": {"type": "NodePort"}});
    cluster.put_with(name, number, ports, changes, &targets, &cluster.ready(&[pod]));
}

/// What goes on all the while.
#[derive(Default)]
struct Traffic {
    stop: AtomicBool,
    exchanges: AtomicU64,
    failures: Mutex<Vec<String>>,
    /// How long each new connection of a pod took, with what the test itself adds.
    times: Mutex<Vec<Duration>>,
}

impl Traffic {
    fn fail(&self, what: String) {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).push(what);
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// New connections of a pod, and datagrams.
    fn ask_from_pod(&self, cluster: &Cluster) {
        let mut pod = cluster.client("other");
        while self.goes_on() {
            for (kind, to) in [(Tcp4, vip(10, 90)[0]), (Tcp6, vip(10, 90)[1]), (Udp4, vip(10, 53)[0])] {
                let (answers, took) = pod.ask_timed(kind, to, 4);
                if answers != all("a", 4) {
                    self.fail(format!("a pod, {kind:?}: {answers:?}"));
                }
                self.exchanges.fetch_add(4, Ordering::Relaxed);
                self.times.lock().unwrap().push(took / 4);
            }
        }
    }

    /// Connections from outside that stay open, to a backend on the node and to one elsewhere.
    fn keep_open_from_outside(&self, cluster: &Cluster) {
        let node: IpAddr = cluster.lab.node("node1").host.v4.into();
        let mut clients = [NODE_PORT, REMOTE_NODE_PORT].map(|at| (at, cluster.lab.client_outside().unwrap()));
        let mut open: Vec<_> = clients.iter_mut().map(|(at, client)| (*at, client.open(Tcp4).unwrap())).collect();
        for (at, socket) in &mut open {
            socket.connect(SocketAddr::new(node, *at)).unwrap();
        }
        while self.goes_on() {
            for (at, socket) in &mut open {
                if let Err(errno) = socket.send().and_then(|()| socket.receive()) {
                    self.fail(format!("the open connection to NodePort {at}: {errno}"));
                    return;
                }
                self.exchanges.fetch_add(1, Ordering::Relaxed);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The slowest of a hundred, since this was last asked.
    fn p99(&self) -> Duration {
        let mut times = std::mem::take(&mut *self.times.lock().unwrap());
        times.sort_unstable();
        times.get(times.len() * 99 / 100).copied().unwrap_or_default()
    }
}

/// Whether the last of so many Services is served.
fn is_served(cluster: &Cluster, count: u32) -> bool {
    let last = Ipv4Addr::from_bits(u32::from(Ipv4Addr::new(10, 97, 0, 0)) + count - 1);
    let mut client = cluster.client("client");
    eventually(LOADING, || names(&client.ask(Tcp4, SocketAddr::new(last.into(), 90), 1)) == ["a"])
}

#[test]
fn maps_grow_under_traffic_and_a_daemon_killed_meanwhile_leaves_nothing_wrong() {
    let Some(lab) = lab_or_skip(&[("node1", &["client", "other", "a"]), ("node2", &["b"])]) else { return };
    let cluster = Cluster::on(lab, &["a", "b"], "--tcp 9000 --udp 9000 --echo 9100");
    put_steady(&cluster, "steady", 10, NODE_PORT, "a");
    put_steady(&cluster, "remote", 11, REMOTE_NODE_PORT, "b");
    put_many(&cluster, 1000);
    let start = || Daemon::start(&cluster.lab, "node1", &cluster.manifests.dir).expect("the daemon starts");
    let daemon = start();
    let traffic = Traffic::default();
    let ended = std::thread::scope(|scope| {
        scope.spawn(|| traffic.ask_from_pod(&cluster));
        scope.spawn(|| traffic.keep_open_from_outside(&cluster));
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            std::thread::sleep(Duration::from_secs(2));
            let quiet = traffic.p99();
            let began = Instant::now();
            put_many(&cluster, 4000);
            assert!(is_served(&cluster, 4000), "{}", daemon.log());
            println!(
                "1000 to 4000 Services took {:?}; a new connection, p99: {quiet:?} before, {:?} meanwhile",
                began.elapsed(),
                traffic.p99()
            );
            daemon.log().lines().filter(|line| line.contains("room for more")).for_each(|line| println!("{line}"));
            assert!(daemon.log().contains("gave maps room for more entries: services to 8192"), "{}", daemon.log());
            // A look at all attachments, of sockets and devices, takes two seconds.
            std::thread::sleep(Duration::from_millis(2500));
            assert!(!daemon.log().contains("detached"), "each has its new program: {}", daemon.log());
            let listed = cluster.lab.node("node1").get("services", &[]).unwrap();
            assert_eq!(listed.matches(" many-").count(), 4000, "{}", daemon.log());

            let mut daemon = daemon;
            for (number, count) in [7000, 13_000].into_iter().enumerate() {
                put_many(&cluster, count);
                // Somewhere between reading the file and being done.
                std::thread::sleep(Duration::from_millis(300 + 250 * number as u64));
                daemon.kill();
                daemon = start();
                assert!(is_served(&cluster, count), "{}", daemon.log());
                daemon.log().lines().filter(|line| line.contains("room for more")).for_each(|line| println!("{line}"));
            }
        }));
        traffic.stop.store(true, Ordering::Relaxed);
        ended
    });
    let failures = traffic.failures.into_inner().unwrap();
    let exchanges = traffic.exchanges.into_inner();
    println!("{exchanges} exchanges meanwhile, {} failed", failures.len());
    if let Err(panic) = ended {
        std::panic::resume_unwind(panic);
    }
    assert!(failures.is_empty() && exchanges > 100, "{exchanges} exchanges: {failures:?}");
    assert_eq!(names(&cluster.client("client").ask(Tcp4, vip(11, 90)[0], 3)), ["b"]);
}

#[test]
fn killed_at_any_system_call_while_maps_grow_it_leaves_maps_that_the_next_start_takes_over() {
    const MANY: u32 = 3200;
    let Some(cluster) = traced_cluster_or_skip() else { return };
    services::put_steady(&cluster);
    let prepare = |number: usize| {
        let node = cluster.lab.node("node1");
        if node.pin_path.exists() {
            node.cleanup().unwrap();
        }
        services::put_world(&cluster, number);
        put_many(&cluster, 1);
        Daemon::start(&cluster.lab, "node1", &cluster.manifests.dir).expect("the daemon starts").kill();
        put_many(&cluster, MANY);
    };
    let check = |number: usize, what: &str, _: &Outcome| {
        let daemon = Daemon::start(&cluster.lab, "node1", &cluster.manifests.dir);
        let daemon = daemon.unwrap_or_else(|error| panic!("the next start: {error:#}: {what}"));
        assert!(is_served(&cluster, MANY), "{what}: {}", daemon.log());
        services::assert_world(&cluster, number, what);
        daemon.kill();
    };
    let plan = Plan { points: 4, ..kills::plan("run") };
    Traced::new(&cluster).at_each(&plan, prepare, check);
}
