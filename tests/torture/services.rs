//! The Services that are asked all the while, and those that change.

use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::laboratory::client::Counts;
use crate::laboratory::cluster::{Cluster, all, names, vip};
use crate::laboratory::manifests::{Endpoint, port};
use crate::laboratory::messages::Kind::{Tcp4, Tcp6, Udp4};
use crate::laboratory::{eventually, lab_or_skip, skip};
use crate::traced::STRACE;

const LISTEN: &str = "--tcp 9000 --udp 9000 --echo 9100";
pub const NODE_PORT: u16 = 30_080;
/// Of the Services: their cluster IPs.
pub const STEADY: u8 = 20;
const MOVING: u8 = 21;
const PASSING: u8 = 22;

pub fn cluster_or_skip() -> Option<Cluster> {
    let lab = lab_or_skip(&[("node1", &["client", "other", "a"]), ("node2", &["b", "c"])])?;
    Some(Cluster::on(lab, &["a", "b", "c"], LISTEN))
}

/// As [`cluster_or_skip`], for a test that takes strace.
pub fn traced_cluster_or_skip() -> Option<Cluster> {
    if !Path::new(STRACE).exists() {
        skip("needs strace (`make setup` installs it)");
        return None;
    }
    cluster_or_skip()
}

/// A Service whose ports `tcp`, `udp` and `echo` are 90, 53 and 91.
pub fn put(cluster: &Cluster, name: &str, number: u8, node_port: Option<u16>, endpoints: &[Endpoint]) {
    let ports = [("tcp", "TCP", 90), ("udp", "UDP", 53), ("echo", "TCP", 91)].map(|(name, protocol, at)| {
        let mut object = port(name, protocol, at);
        if let Some(first) = node_port {
            object["nodePort"] = json!(first + at);
        }
        object
    });
    let changes = json!({"spec": {"type": if node_port.is_some() { "NodePort" } else { "ClusterIP" }}});
    let targets = [("tcp", "TCP", 9000), ("udp", "UDP", 9000), ("echo", "TCP", 9100)];
    cluster.put_with(name, number, json!(ports), changes, &targets, endpoints);
}

/// The Service that never changes, and which is asked all the while.
pub fn put_steady(cluster: &Cluster) {
    put(cluster, "steady", STEADY, Some(NODE_PORT), &cluster.ready(&["a"]));
}

/// Of the others one has other endpoints in every second world, one is there in every second.
pub fn put_world(cluster: &Cluster, number: usize) {
    let is_odd = number % 2 == 1;
    put(cluster, "moving", MOVING, None, &cluster.ready(if is_odd { &["b", "c"] } else { &["a"] }));
    match is_odd {
        true => put(cluster, "passing", PASSING, Some(NODE_PORT + 200), &cluster.ready(&["c"])),
        false if cluster.manifests.dir.join("passing.json").exists() => cluster.manifests.delete("passing"),
        false => {}
    }
}

/// What clients get that is not of this world.
fn wrong_answers(cluster: &Cluster, number: usize) -> Result<(), String> {
    let mut client = cluster.client("client");
    let is_odd = number % 2 == 1;
    let [v4, v6] = vip(STEADY, 90);
    let mut expect = |kind, to, name| {
        let answers = client.ask(kind, to, 5);
        (answers == all(name, 5)).then_some(()).ok_or_else(|| format!("{kind:?} at {to}: {answers:?}"))
    };
    for (kind, to) in [(Tcp4, v4), (Tcp6, v6), (Udp4, vip(STEADY, 53)[0])] {
        expect(kind, to, "a")?;
    }
    if is_odd {
        expect(Tcp4, vip(PASSING, 90)[0], "c")?;
    }
    let moving = client.ask(Tcp4, vip(MOVING, 90)[0], 20);
    let right = if is_odd { ["b", "c"].as_slice() } else { &["a"] };
    let is_right = names(&moving).iter().all(|name| right.contains(name));
    is_right.then_some(()).ok_or_else(|| format!("moving: {moving:?}"))
}

/// What of this world is not in the kernel, or is of another's.
fn wrong_in_world(cluster: &Cluster, number: usize) -> Result<(), String> {
    wrong_answers(cluster, number)?;
    let listed = cluster.lab.node("node1").get("services", &[]).map_err(|error| format!("{error:#}"))?;
    if listed.contains("passing") != (number % 2 == 1) { Err(listed) } else { Ok(()) }
}

/// That the kernel has this world, and nothing of another.
pub fn assert_world(cluster: &Cluster, number: usize, what: &str) {
    if let Err(wrong) = wrong_in_world(cluster, number) {
        panic!("{wrong}: {what}");
    }
}

/// That it has within this time; answers after which.
pub fn assert_world_within(cluster: &Cluster, number: usize, patience: Duration, what: &str) -> Duration {
    within(cluster, patience, || wrong_in_world(cluster, number), what)
}

/// The same as far as clients can tell: while maps cannot be opened.
pub fn assert_answers_within(cluster: &Cluster, number: usize, patience: Duration, what: &str) -> Duration {
    within(cluster, patience, || wrong_answers(cluster, number), what)
}

fn within(cluster: &Cluster, patience: Duration, wrong: impl Fn() -> Result<(), String>, what: &str) -> Duration {
    let (began, mut last) = (Instant::now(), Ok(()));
    let is_right = eventually(patience, || {
        last = wrong();
        last.is_ok()
    });
    assert!(is_right, "{last:?} after {:?}: {what}; {}", began.elapsed(), logged(cluster, 0));
    began.elapsed()
}

/// All that node1's processes have logged from this byte on.
pub fn logged(cluster: &Cluster, from: usize) -> String {
    let text = std::fs::read(cluster.lab.dir.join("node1.log")).unwrap_or_default();
    String::from_utf8_lossy(text.get(from..).unwrap_or_default()).into_owned()
}

/// Whose connections are to succeed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    Everybodys,
    /// All but new ones from outside, which take memory for a flow.
    AllButNewFromOutside,
}

/// Runs `work` while clients ask, and fails if an exchange did.
pub fn with_steady_traffic(cluster: &Cluster, what: &str, work: impl FnOnce()) {
    with_traffic_of(cluster, Whose::Everybodys, what, work);
}

/// As [`with_steady_traffic`], of these clients.
pub fn with_traffic_of(cluster: &Cluster, whose: Whose, what: &str, work: impl FnOnce()) {
    let began = Instant::now();
    let (exchanges, failures) = with_traffic(cluster, whose, work);
    println!("{what}: {exchanges} exchanges meanwhile, {} failed; {:.1?}", failures.len(), began.elapsed());
    let log = cluster.lab.node("node1").host.log_tail();
    assert!(failures.is_empty() && exchanges > 100, "{what}: {exchanges} exchanges: {failures:?}; {log}");
}

/// What goes on all the while: new connections of a pod and of a client outside, and one from outside that stays open.
/// Answers how many exchanges there were, and those that failed.
fn with_traffic(cluster: &Cluster, whose: Whose, work: impl FnOnce()) -> (u64, Vec<String>) {
    let (stop, exchanges, failures) = (AtomicBool::new(false), AtomicU64::new(0), Mutex::new(Vec::new()));
    let node: SocketAddr = (cluster.lab.node("node1").host.v4, NODE_PORT + 90).into();
    let began = Instant::now();
    let fail = |what: String| failures.lock().unwrap().push(format!("after {:.2?}, {what}", began.elapsed()));
    let note = |answers: Counts, whence: &str| {
        exchanges.fetch_add(answers.values().map(|count| u64::from(*count)).sum(), Ordering::Relaxed);
        if names(&answers) != ["a"] {
            fail(format!("{whence}: {answers:?}"));
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut pod = cluster.client("other");
            let mut outside = cluster.lab.client_outside().unwrap();
            while !stop.load(Ordering::Relaxed) {
                note(pod.ask(Tcp4, vip(STEADY, 90)[0], 2), "a pod");
                note(pod.ask(Udp4, vip(STEADY, 53)[0], 2), "a pod, UDP");
                if whose == Whose::Everybodys {
                    note(outside.ask(Tcp4, node, 2), "outside");
                }
            }
        });
        scope.spawn(|| {
            let mut outside = cluster.lab.client_outside().unwrap();
            let echo = SocketAddr::new(node.ip(), NODE_PORT + 91);
            let mut long = outside.open(Tcp4).unwrap();
            long.connect(echo).unwrap();
            while !stop.load(Ordering::Relaxed) {
                let exchange = long.send().and_then(|()| long.receive().map(drop));
                exchanges.fetch_add(1, Ordering::Relaxed);
                if let Err(errno) = exchange {
                    fail(format!("the open connection: {errno}"));
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        let ended = catch_unwind(AssertUnwindSafe(work));
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = ended {
            resume_unwind(panic);
        }
    });
    (exchanges.into_inner(), failures.into_inner().unwrap())
}
