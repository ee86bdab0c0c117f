//! kubelane under strace, which lists the system calls of a whole run, and in the next one kills it as it enters one of
//! them, or has that one fail.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::draw::Draw;
use crate::laboratory::cluster::Cluster;
use crate::laboratory::daemon::LOADING;
use crate::laboratory::process::Process;
use crate::laboratory::{eventually, kubelane_binary};
use crate::services::logged;

pub const STRACE: &str = "/usr/bin/strace";
const HEALTH: &str = "127.0.0.1:10256";

/// The first, second ... of the calls of this name that a thread makes.
#[derive(Clone, PartialEq, Eq)]
pub struct Call {
    pub name: String,
    pub number: usize,
}

/// A kind of run, and what goes wrong in it.
pub struct Plan<'a> {
    /// `run` or `cleanup`.
    pub what: &'static str,
    /// Names of the calls at which it may.
    pub calls: &'a str,
    /// So many points, if KUBELANE_POINTS says nothing else.
    pub points: usize,
    /// One more point, which is no matter of chance.
    pub also: Option<Call>,
    /// What happens at a call, as strace takes it: `error=EIO`.
    pub fault: &'a dyn Fn(&mut Draw, &Call) -> String,
}

/// A run that has ended, or is ready.
pub struct Outcome {
    pub is_ready: bool,
    /// It was killed at the call, and not afterwards by whoever waited for it.
    pub is_killed: bool,
    /// Its log.
    pub said: String,
}

/// A node whose kubelane is watched.
pub struct Traced<'c> {
    pub cluster: &'c Cluster,
    trace: PathBuf,
    pub draw: Draw,
    /// Calls that were made to fail so far.
    pub failed: usize,
}

impl<'c> Traced<'c> {
    pub fn new(cluster: &'c Cluster) -> Traced<'c> {
        Traced { cluster, trace: cluster.lab.dir.join("trace"), draw: Draw::new(), failed: 0 }
    }

    fn arguments(&self, what: &str) -> Vec<String> {
        let node = self.cluster.lab.node("node1");
        let pins = node.pin_path.display().to_string();
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        if what == "cleanup" {
            return words(&["cleanup", "--pin-path", &pins]);
        }
        let (cgroup, source) =
            (node.cgroup.display().to_string(), format!("dir:{}", self.cluster.manifests.dir.display()));
        let run = words(&["run", "--hostname-override", "node1", "--cgroup", &cgroup, "--pin-path", &pins]);
        let addresses = ["--healthz-bind-address", HEALTH, "--metrics-bind-address", "127.0.0.1:10249"];
        [run, words(&addresses), words(&["--source", &source])].concat()
    }

    fn strace(&self, words: &[&str], calls: &str, inject: Option<&str>, rest: &[String]) -> Process {
        let trace = self.trace.display().to_string();
        let _ = fs::remove_file(&self.trace);
        let all = ["-f", "-qq", "-o", &trace, "-e", "signal=none"].into_iter().chain(words.iter().copied());
        let mut all: Vec<String> = all.map(str::to_owned).collect();
        all.extend(["-e".to_owned(), format!("trace={calls}")]);
        all.extend(inject.into_iter().flat_map(|what| ["-e".to_owned(), format!("inject={what}")]));
        all.extend_from_slice(rest);
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        self.cluster.lab.node("node1").host.spawn(Path::new(STRACE), &all).unwrap()
    }

    /// `kubelane run` or `cleanup`, from its start to its end or until it is ready.
    fn run(&self, what: &str, calls: &str, inject: Option<&str>) -> Outcome {
        let before = logged(self.cluster, 0).len();
        let kubelane = kubelane_binary().unwrap().display().to_string();
        let words: Vec<String> = [vec![kubelane], self.arguments(what)].concat();
        // With a seccomp filter strace sees no other calls, which is faster, and injects no signal (strace 6.1).
        let is_signal = inject.is_some_and(|inject| inject.contains("signal="));
        let process = self.strace(if is_signal { &[] } else { &["--seccomp-bpf"] }, calls, inject, &words);
        let (is_ready, is_killed) = self.wait(process, what);
        Outcome { is_ready, is_killed, said: logged(self.cluster, before) }
    }

    /// `kubelane run` or `cleanup`, which has come to the first call of this name and is held there for so long.
    pub fn held_at(&self, what: &str, call: &str, delay: Duration) -> Process {
        let kubelane = kubelane_binary().unwrap().display().to_string();
        let words: Vec<String> = [vec![kubelane], self.arguments(what)].concat();
        let inject = format!("{call}:delay_enter={}:when=1", delay.as_micros());
        let process = self.strace(&["--seccomp-bpf"], call, Some(&inject), &words);
        let begun = || fs::read_to_string(&self.trace).is_ok_and(|text| text.contains(call));
        assert!(eventually(LOADING, begun), "{what} does not come to {call}: {}", self.log());
        process
    }

    /// Has calls of a daemon that runs fail for as long as `work` takes. Answers how many did.
    pub fn with_failing_calls(&mut self, daemon: u32, calls: &str, inject: &str, work: impl FnOnce()) -> usize {
        let pid = daemon.to_string();
        let mut strace = self.strace(&["-p", &pid], calls, Some(inject), &[]);
        let tracer = strace.pid().to_string();
        let is_traced = |task: &PathBuf| {
            let status = fs::read_to_string(task.join("status")).unwrap_or_default();
            status.lines().any(|line| line.split_once(':').is_some_and(|(k, v)| k == "TracerPid" && v.trim() == tracer))
        };
        let all = || fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten().all(|task| is_traced(&task.path()));
        assert!(eventually(LOADING, all), "strace does not hold the daemon: {}", self.log());
        work();
        strace.terminate(LOADING).unwrap();
        self.failed += self.injected();
        self.injected()
    }

    /// Calls of the last run that were made to fail.
    fn injected(&self) -> usize {
        fs::read_to_string(&self.trace).unwrap_or_default().matches("(INJECTED)").count()
    }

    /// The process that is watched, which is the first to make a call.
    fn watched(&self) -> Option<Pid> {
        let text = fs::read_to_string(&self.trace).ok()?;
        text.split_whitespace().next()?.parse().ok().map(Pid::from_raw)
    }

    /// Waits for the end. What is ready is killed then: a call that fails may do no harm, and threads that share work
    /// otherwise than the last time may never make it.
    fn wait(&self, mut process: Process, what: &str) -> (bool, bool) {
        let mut is_ready = false;
        let over = || {
            is_ready = what == "run" && self.is_ready();
            is_ready || process.ended().is_some()
        };
        let is_over = eventually(LOADING, over);
        // strace ends as what it watches does.
        let is_killed = process.ended().is_some_and(|status| status.signal() == Some(Signal::SIGKILL as i32));
        if process.ended().is_none()
            && let Some(watched) = self.watched()
        {
            let _ = kill(watched, Signal::SIGKILL);
        }
        assert!(is_over && eventually(LOADING, || process.ended().is_some()), "{what} goes on; {}", self.log());
        (is_ready && !is_killed, is_killed)
    }

    /// The calls of a whole run, in order: of the thread that makes the most.
    fn calls(&self, plan: &Plan<'_>) -> Vec<Call> {
        self.run(plan.what, plan.calls, None);
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
        let ask = || -> anyhow::Result<bool> {
            let mut stream = TcpStream::connect(HEALTH)?;
            stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: node1\r\nConnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer.starts_with("HTTP/1.1 200"))
        };
        self.cluster.lab.node("node1").host.inside(ask).unwrap_or(false)
    }

    /// One run after the other goes wrong; `prepare` before each is given its number, `check` after it that, where it
    /// went wrong, and what became of it. The first is a whole one. Of runs that are to be killed most are: threads may share
    /// work otherwise than the last time, so that the call is never made.
    pub fn at_each(&mut self, plan: &Plan<'_>, prepare: impl Fn(usize), mut check: impl FnMut(usize, &str, &Outcome)) {
        let what = plan.what;
        prepare(0);
        let calls = self.calls(plan);
        check(0, "a whole run", &Outcome { is_ready: true, is_killed: false, said: String::new() });
        assert!(calls.len() > 10, "{what} makes {} calls", calls.len());
        let mut chosen = self.draw.places(plan.points, calls.len());
        chosen.extend(calls.iter().position(|call| Some(call) == plan.also.as_ref()));
        println!("{what}: {} calls, chosen are {chosen:?}", calls.len());
        let (mut to_be_killed, mut killed) = (0, 0);
        for (number, at) in chosen.into_iter().enumerate() {
            let call = &calls[at];
            let fault = (plan.fault)(&mut self.draw, call);
            prepare(number + 1);
            let inject = format!("{}:{fault}:when={}", call.name, call.number);
            let outcome = self.run(what, plan.calls, Some(&inject));
            self.failed += self.injected();
            to_be_killed += usize::from(fault.contains("SIGKILL"));
            killed += usize::from(outcome.is_killed);
            let place = format!("{what}, at call {at} of {}: {inject}", calls.len());
            check(number + 1, &format!("{place}; {}", self.log()), &outcome);
        }
        if to_be_killed > 0 {
            println!("{what}: {killed} of {to_be_killed} were killed at their call");
            assert!(2 * killed > to_be_killed, "{what}: {killed} of {to_be_killed} were killed");
        }
    }

    pub fn log(&self) -> String {
        self.cluster.lab.node("node1").host.log_tail()
    }
}
