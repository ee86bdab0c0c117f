//! The daemon is killed as it enters a system call, again and again: while it starts on nothing, while it starts on what an
//! earlier one left and the world has changed meanwhile, and while `cleanup` takes everything away. Whatever was half
//! done, connections to Services that did not change never fail, the next start makes everything right, and the next
//! cleanup leaves nothing.
//!
//! strace lists the system calls of a whole run, and kills at one of them in the next. Which calls is drawn; a run prints its
//! seed. `KUBELANE_SEED=N` repeats it, `KUBELANE_POINTS=N` takes so many calls of each kind of run (0: all of them).
#![cfg(feature = "lab")]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use support::cluster::{Cluster, all, names, vip};
use support::daemon::{Daemon, LOADING};
use support::manifests::{Endpoint, port};
use support::process::Process;
use support::wire::Kind::{Tcp4, Tcp6, Udp4};
use support::{eventually, kubelane_binary, lab_or_skip, skip};

const STRACE: &str = "/usr/bin/strace";
/// All by which a daemon changes what outlives it: maps, programs and links, pins, files, qdiscs and filters (netlink).
const CALLS: &str = "bpf,rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,mount,umount2,\
                     sendto,sendmsg,ftruncate,write";
const LISTEN: &str = "--tcp 9000 --udp 9000 --echo 9100";
const NODE_PORT: u16 = 30_080;
/// Of each kind of run.
const POINTS: usize = 10;

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Draws a number below `most` (splitmix64).
fn draw(state: &mut u64, most: usize) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut value = *state;
    value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    (value ^ value >> 31) as usize % most
}

/// The first, second ... of the calls of this name that a thread makes.
struct Call {
    name: String,
    number: usize,
}

/// A node whose kubelane is killed.
struct Torture<'c> {
    cluster: &'c Cluster,
    trace: PathBuf,
    seed: u64,
}

impl<'c> Torture<'c> {
    fn arguments(&self, what: &str) -> Vec<String> {
        let node = self.cluster.lab.node("node1");
        let pins = node.pin_path.display().to_string();
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        if what == "cleanup" {
            return words(&["cleanup", "--pin-path", &pins]);
        }
        let (cgroup, source) =
            (node.cgroup.display().to_string(), format!("dir:{}", self.cluster.manifests.dir.display()));
        let [health, metrics] = ["127.0.0.1:10256", "127.0.0.1:10249"];
        let run = words(&["run", "--hostname-override", "node1", "--cgroup", &cgroup, "--pin-path", &pins]);
        let served = words(&["--healthz-bind-address", health, "--metrics-bind-address", metrics, "--source", &source]);
        [run, served].concat()
    }

    /// `kubelane run` or `cleanup`, watched; killed as one of its threads enters this call.
    fn spawn(&self, what: &str, at: Option<&Call>) -> Process {
        let trace = self.trace.display().to_string();
        let _ = fs::remove_file(&self.trace);
        let watch = ["-f", "--seccomp-bpf", "-qq", "-o", &trace, "-e", "signal=none"];
        let mut words: Vec<String> = watch.map(str::to_owned).into();
        words.extend(["-e".to_owned(), format!("trace={CALLS}")]);
        if let Some(Call { name, number }) = at {
            words.extend(["-e".to_owned(), format!("inject={name}:signal=SIGKILL:when={number}")]);
        }
        words.push(kubelane_binary().unwrap().display().to_string());
        words.extend(self.arguments(what));
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        self.cluster.lab.node("node1").host.spawn(Path::new(STRACE), &words).unwrap()
    }

    /// The process that is watched, which is the first to make a call.
    fn watched(&self) -> Option<Pid> {
        let text = fs::read_to_string(&self.trace).ok()?;
        text.split_whitespace().next()?.parse().ok().map(Pid::from_raw)
    }

    /// Waits for the end. What is ready without having made the call is killed then: threads may share work differently.
    fn wait(&self, mut process: Process, what: &str) {
        let over = || process.ended().is_some() || (what == "run" && self.is_ready());
        let is_over = eventually(LOADING, over);
        if process.ended().is_none()
            && let Some(watched) = self.watched()
        {
            let _ = kill(watched, Signal::SIGKILL);
        }
        assert!(is_over && eventually(LOADING, || process.ended().is_some()), "{what} goes on; {}", self.log());
    }

    /// The calls of a whole run, in order: of the thread that makes the most.
    fn calls(&self, what: &str) -> Vec<Call> {
        self.wait(self.spawn(what, None), what);
        let text = fs::read_to_string(&self.trace).unwrap();
        let begun = text.lines().filter(|line| !line.contains("resumed>"));
        let parsed = begun.filter_map(|line| {
            let (thread, call) = line.split_once(' ')?;
            Some((thread, call.trim_start().split_once('(')?.0))
        });
        let mut threads = BTreeMap::<&str, Vec<Call>>::new();
        for (thread, name) in parsed {
            let calls = threads.entry(thread).or_default();
            let number = 1 + calls.iter().filter(|call| call.name == name).count();
            calls.push(Call { name: name.to_owned(), number });
        }
        threads.into_values().max_by_key(Vec::len).unwrap_or_default()
    }

    fn is_ready(&self) -> bool {
        let host = &self.cluster.lab.node("node1").host;
        let ask = || -> anyhow::Result<bool> {
            use std::io::{Read as _, Write as _};
            let mut stream = std::net::TcpStream::connect("127.0.0.1:10256")?;
            stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: node1\r\nConnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer.starts_with("HTTP/1.1 200"))
        };
        host.inside(ask).unwrap_or(false)
    }

    /// Kills one run after the other; `prepare` and `check` around each are given the call's number and where it was.
    fn kill_at_each(&mut self, what: &str, prepare: impl Fn(usize), check: impl Fn(usize, &str)) {
        prepare(0);
        let calls = self.calls(what);
        check(0, "a whole run");
        assert!(calls.len() > 10, "{what} makes {} calls", calls.len());
        let points = setting("KUBELANE_POINTS").map_or(POINTS, |points| points as usize);
        let chosen: Vec<usize> = match points {
            0 => (0..calls.len()).collect(),
            points => (0..points).map(|_| draw(&mut self.seed, calls.len())).collect(),
        };
        println!("{what}: {} calls, killed at {chosen:?}", calls.len());
        for (number, at) in chosen.into_iter().enumerate() {
            prepare(number + 1);
            self.wait(self.spawn(what, Some(&calls[at])), what);
            let Call { name, number: nth } = &calls[at];
            let place = format!("{what}, killed at call {at} of {}, its {nth}th {name}", calls.len());
            check(number + 1, &format!("{place}; {}", self.log()));
        }
    }

    fn log(&self) -> String {
        self.cluster.lab.node("node1").host.log_tail()
    }
}

fn cluster_or_skip() -> Option<Cluster> {
    if !Path::new(STRACE).exists() {
        skip("needs strace (`make setup` installs it)");
        return None;
    }
    let lab = lab_or_skip(&[("node1", &["client", "other", "a"]), ("node2", &["b", "c"])])?;
    Some(Cluster::on(lab, &["a", "b", "c"], LISTEN))
}

/// A Service whose ports `tcp`, `udp` and `echo` are 90, 53 and 91.
fn put(cluster: &Cluster, name: &str, number: u8, node_port: Option<u16>, endpoints: &[Endpoint]) {
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

/// `steady` never changes. Of the others one has other endpoints in every second world, one is there in every second.
fn put_world(cluster: &Cluster, number: usize) {
    let is_odd = number % 2 == 1;
    put(cluster, "moving", 11, None, &cluster.ready(if is_odd { &["b", "c"] } else { &["a"] }));
    match is_odd {
        true => put(cluster, "passing", 12, Some(NODE_PORT + 200), &cluster.ready(&["c"])),
        false if cluster.manifests.dir.join("passing.json").exists() => cluster.manifests.delete("passing"),
        false => {}
    }
}

/// That the kernel has this world, and nothing of another.
fn assert_world(cluster: &Cluster, number: usize, what: &str) {
    let mut client = cluster.client("client");
    let is_odd = number % 2 == 1;
    for (kind, to) in [(Tcp4, vip(10, 90)[0]), (Tcp6, vip(10, 90)[1]), (Udp4, vip(10, 53)[0])] {
        assert_eq!(client.ask(kind, to, 5), all("a", 5), "{kind:?}: {what}");
    }
    let moving = client.ask(Tcp4, vip(11, 90)[0], 20);
    let right = if is_odd { ["b", "c"].as_slice() } else { &["a"] };
    assert!(names(&moving).iter().all(|name| right.contains(name)), "{moving:?}: {what}");
    if is_odd {
        assert_eq!(client.ask(Tcp4, vip(12, 90)[0], 3), all("c", 3), "{what}");
    }
    let listed = cluster.lab.node("node1").get("services", &[]).unwrap();
    assert_eq!(listed.contains("passing"), is_odd, "{listed}: {what}");
}

/// What goes on all the while: new connections of a pod and of a client outside, and one from outside that stays open.
/// Answers how many exchanges there were, and those that failed.
fn with_traffic(cluster: &Cluster, work: impl FnOnce()) -> (u64, Vec<String>) {
    let (stop, exchanges, failures) = (AtomicBool::new(false), AtomicU64::new(0), std::sync::Mutex::new(Vec::new()));
    let node: SocketAddr = (cluster.lab.node("node1").host.v4, NODE_PORT + 90).into();
    let note = |answers: support::client::Counts, whence: &str| {
        exchanges.fetch_add(answers.values().map(|count| u64::from(*count)).sum(), Ordering::Relaxed);
        if names(&answers) != ["a"] {
            failures.lock().unwrap().push(format!("{whence}: {answers:?}"));
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut pod = cluster.client("other");
            let mut outside = cluster.lab.client_outside().unwrap();
            while !stop.load(Ordering::Relaxed) {
                note(pod.ask(Tcp4, vip(10, 90)[0], 2), "a pod");
                note(pod.ask(Udp4, vip(10, 53)[0], 2), "a pod, UDP");
                note(outside.ask(Tcp4, node, 2), "outside");
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
                    failures.lock().unwrap().push(format!("the open connection: {errno}"));
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = ended {
            std::panic::resume_unwind(panic);
        }
    });
    (exchanges.into_inner(), failures.into_inner().unwrap())
}

#[test]
fn killed_at_any_system_call_it_leaves_what_served_serving_and_the_next_start_makes_all_right() {
    let Some(cluster) = cluster_or_skip() else { return };
    let drawn = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = setting("KUBELANE_SEED").unwrap_or(drawn);
    println!("KUBELANE_SEED={seed}");
    let trace = cluster.lab.dir.join("trace");
    let mut torture = Torture { cluster: &cluster, trace, seed };
    let node = cluster.lab.node("node1");
    let start = || Daemon::start(&cluster.lab, "node1", &cluster.manifests.dir);
    let began = Instant::now();
    put(&cluster, "steady", 10, Some(NODE_PORT), &cluster.ready(&["a"]));

    // A start on what an earlier daemon left, in a world that has changed meanwhile.
    put_world(&cluster, 1);
    start().expect("the daemon starts").kill();
    let (exchanges, failures) = with_traffic(&cluster, || {
        let check = |number: usize, what: &str| {
            let daemon = start().unwrap_or_else(|error| panic!("the next start: {error:#}: {what}"));
            assert_world(&cluster, number, what);
            daemon.kill();
        };
        torture.kill_at_each("run", |number| put_world(&cluster, number), check);
    });
    println!("{exchanges} exchanges meanwhile, {} failed", failures.len());
    assert!(failures.is_empty() && exchanges > 100, "{exchanges} exchanges: {failures:?}");

    // A start on nothing.
    let check = |number: usize, what: &str| {
        let daemon = start().unwrap_or_else(|error| panic!("the next start: {error:#}: {what}"));
        assert_world(&cluster, number, what);
        daemon.kill();
    };
    let prepare = |number: usize| {
        node.cleanup().unwrap();
        put_world(&cluster, number);
    };
    torture.kill_at_each("run", prepare, check);

    // A cleanup.
    let prepare = |number: usize| {
        put_world(&cluster, number);
        start().expect("the daemon starts").kill();
    };
    let check = |_: usize, what: &str| {
        node.cleanup().unwrap_or_else(|error| panic!("the next cleanup: {error:#}: {what}"));
        assert!(!node.pin_path.exists(), "{what}");
        assert_ne!(names(&cluster.client("client").ask(Tcp4, vip(10, 90)[0], 1)), ["a"], "{what}");
        let filters = node.host.inside(|| {
            let output =
                std::process::Command::new("tc").args(["filter", "show", "dev", "eth0", "ingress"]).output()?;
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        });
        assert_eq!(filters.unwrap(), "", "{what}");
    };
    torture.kill_at_each("cleanup", prepare, check);
    println!("took {:?}", began.elapsed());
}
