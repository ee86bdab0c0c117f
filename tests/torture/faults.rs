//! The kernel refuses system calls: one of a start or of a cleanup, or a tenth of all that a running daemon makes for some
//! seconds. A start says what failed or goes on; a running daemon tries again. Nobody's connection fails, and afterwards
//! all is right.

use std::time::Duration;

use crate::draw::{Draw, points};
use crate::kills::{check_cleanup, check_start, prepare_cleanup};
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::eventually;
use crate::services::{
    assert_world, assert_world_within, logged, put_steady, put_world, traced_cluster_or_skip, with_steady_traffic,
};
use crate::traced::{Call, Outcome, Plan, Traced};

/// bpf(2), and what changes a BPF file system.
const CALLS: &str = "bpf,rename,renameat,renameat2,link,linkat,symlink,unlink,unlinkat,mkdir,mkdirat,rmdir";
const BPF_ERRORS: [&str; 8] = ["ENOMEM", "ENOSPC", "E2BIG", "EPERM", "EBUSY", "EINTR", "EAGAIN", "EINVAL"];
const FILE_ERRORS: [&str; 4] = ["EROFS", "ENOSPC", "EACCES", "EIO"];
const POINTS: usize = 8;
/// Of Services while calls of a running daemon are refused, and the time between two.
const CHANGES: usize = 5;
const PAUSE: Duration = Duration::from_millis(300);

fn error(draw: &mut Draw, call: &Call) -> String {
    let errors = if call.name == "bpf" { BPF_ERRORS.as_slice() } else { &FILE_ERRORS };
    format!("error={}", draw.one_of(errors))
}

fn plan(what: &'static str) -> Plan<'static> {
    // By its second call libbpf finds out whether maps can have names.
    let also = (what == "run").then(|| Call { name: "bpf".to_owned(), number: 2 });
    Plan { what, calls: CALLS, points: POINTS, also, fault: &error }
}

/// Whether somebody who reads this at night knows what the kernel has refused, and what that means for traffic.
fn is_of_use(said: &str) -> bool {
    let Some(last) = said.lines().rfind(|line| line.contains(" ERROR ") || line.starts_with("error: ")) else {
        return false;
    };
    let of_libbpf = said.lines().filter(|line| line.contains("libbpf: "));
    let named_above =
        of_libbpf.clone().any(|line| ["map '", "prog '", "/v3/", "BTF"].iter().any(|name| line.contains(name)));
    let names = ["/bpf/node1", " map ", " to the cgroup", "BPF program", "socket iterator"];
    let is_named = match last.contains("the lines above say which part") {
        true => named_above,
        false => names.iter().any(|name| last.contains(name)),
    };
    let has_reason = ["(os error ", "by their names"].iter().any(|reason| last.contains(reason));
    is_named && has_reason && (last.starts_with("error: ") || last.contains("the daemon ends"))
}

#[test]
fn a_start_whose_calls_are_refused_says_which_and_the_next_start_makes_all_right() {
    let Some(cluster) = traced_cluster_or_skip() else { return };
    let mut traced = Traced::new(&cluster);
    let mut ended = 0;
    let mut check = |number: usize, what: &str, outcome: &Outcome| {
        match outcome.is_ready {
            true => assert_world(&cluster, number, what),
            false => {
                ended += 1;
                assert!(is_of_use(&outcome.said), "{}: {what}", outcome.said);
            }
        }
        check_start(&cluster, number, what);
    };
    put_steady(&cluster);
    put_world(&cluster, 1);
    check_start(&cluster, 1, "the first");
    with_steady_traffic(&cluster, "starts on what an earlier daemon left", || {
        traced.at_each(&plan("run"), |number| put_world(&cluster, number), &mut check);
    });
    let prepare = |number: usize| {
        cluster.lab.node("node1").cleanup().unwrap();
        put_world(&cluster, number);
    };
    traced.at_each(&plan("run"), prepare, &mut check);
    println!("{} calls refused, {ended} daemons ended", traced.failed);
}

#[test]
fn a_cleanup_whose_calls_are_refused_says_which_and_the_next_one_leaves_nothing() {
    let Some(cluster) = traced_cluster_or_skip() else { return };
    let mut traced = Traced::new(&cluster);
    put_steady(&cluster);
    let check = |_: usize, what: &str, outcome: &Outcome| {
        let said = &outcome.said;
        assert!(said.is_empty() || is_of_use(said), "{said}: {what}");
        check_cleanup(&cluster, what);
    };
    traced.at_each(&plan("cleanup"), |number| prepare_cleanup(&cluster, number), check);
    println!("{} calls refused", traced.failed);
}

#[test]
fn a_daemon_whose_map_calls_are_refused_for_a_while_serves_on_and_converges() {
    let Some(cluster) = traced_cluster_or_skip() else { return };
    let mut traced = Traced::new(&cluster);
    put_steady(&cluster);
    put_world(&cluster, 0);
    let mut daemon = Daemon::start(&cluster.lab, "node1", &cluster.manifests.dir).unwrap();
    let rounds = match points(BPF_ERRORS.len()) {
        0 => 10 * BPF_ERRORS.len(),
        rounds => rounds,
    };
    let at = logged(&cluster, 0).len();
    with_steady_traffic(&cluster, "a tenth of all calls refused, or all", || {
        let mut number = 0;
        for error in BPF_ERRORS.iter().cycle().take(rounds) {
            // Each tenth call of a thread, from one of the first ten on; now and then, all.
            let when = match traced.draw.below(4) {
                0 => "1+1".to_owned(),
                _ => format!("{}+10", 1 + traced.draw.below(10)),
            };
            let inject = format!("bpf:error={error}:when={when}");
            let failed = traced.with_failing_calls(daemon.pid(), "bpf", &inject, || {
                for _ in 0..CHANGES {
                    number += 1;
                    put_world(&cluster, number);
                    std::thread::sleep(PAUSE);
                }
            });
            let took = assert_world_within(&cluster, number, PATIENCE, &inject);
            println!("{inject}: {failed} calls refused; right after {took:.1?}");
            assert!(failed > 0);
            daemon.check_running().unwrap();
        }
    });
    let log = logged(&cluster, at);
    assert!(log.contains("the kernel rejected ") && log.contains(" map entries (map "), "{log}");
    // Nobody had detached anything, and nothing was unserved.
    for lie in ["another process detached", "are not served there", "there is no external device"] {
        assert!(!log.contains(lie), "{lie}: {log}");
    }
    let is_well = || daemon.health("/readyz").is_ok_and(|answer| answer.ends_with("\r\n\r\nok\n"));
    assert!(eventually(Duration::from_secs(40), is_well), "{}", daemon.log());
}
