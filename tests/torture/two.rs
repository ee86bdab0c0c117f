//! Two daemons at once: one of them serves, the other says why it does not, and nothing changes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use kubelane::bpf::attachments;

use crate::draw::points;
use crate::laboratory::cluster::Cluster;
use crate::laboratory::daemon::{Daemon, LOADING};
use crate::laboratory::eventually;
use crate::services::{
    assert_world, cluster_or_skip, logged, put_steady, put_world, traced_cluster_or_skip, with_steady_traffic,
};
use crate::traced::Traced;

const RACERS: usize = 8;
const REFUSAL: &str = "stop it first, or give this one its own --pin-path";

/// Starts one as on every node, without waiting.
pub fn spawn(cluster: &Cluster) -> Daemon<'_> {
    let source = format!("dir:{}", cluster.manifests.dir.display());
    Daemon::spawn_on(&cluster.lab, "node1", &["--source", &source], &[]).unwrap()
}

/// Ids of links and programs, by pin.
pub type Attachments = BTreeMap<String, (Option<u32>, Option<u32>)>;

/// What is attached on node1.
pub fn attached(cluster: &Cluster) -> Attachments {
    let all = attachments(&cluster.lab.node("node1").pin_path).unwrap();
    all.into_iter().map(|pin| (pin.name, (pin.link_id, pin.program_id))).collect()
}

#[test]
fn a_second_daemon_on_the_same_pins_is_refused_at_once_and_changes_nothing() {
    let Some(cluster) = cluster_or_skip() else { return };
    put_steady(&cluster);
    put_world(&cluster, 1);
    let mut first = Daemon::start(&cluster.lab, "node1", &cluster.manifests.dir).unwrap();
    let before = attached(&cluster);
    with_steady_traffic(&cluster, "a second daemon", || {
        for _ in 0..5 {
            let (at, began) = (logged(&cluster, 0).len(), Instant::now());
            let mut second = spawn(&cluster);
            assert!(eventually(LOADING, || second.check_running().is_err()), "{}", second.log());
            let (took, said) = (began.elapsed(), logged(&cluster, at));
            assert!(took < Duration::from_secs(3), "{took:?}: {said}");
            assert!(said.contains("a running kubelane holds ") && said.contains(REFUSAL), "{said}");
        }
    });
    assert_eq!(attached(&cluster), before);
    assert_world(&cluster, 1, "after a second daemon");
    first.check_running().unwrap();
}

/// Starts [`RACERS`] at once, and answers the only one that is left.
fn race(cluster: &Cluster) -> Daemon<'_> {
    let at = logged(cluster, 0).len();
    let mut racers: Vec<Daemon<'_>> = (0..RACERS).map(|_| spawn(cluster)).collect();
    let is_over = eventually(LOADING, || {
        racers.retain_mut(|racer| racer.check_running().is_ok());
        racers.len() <= 1
    });
    let said = logged(cluster, at);
    assert!(is_over && racers.len() == 1, "{} are left: {said}", racers.len());
    assert_eq!(said.matches(REFUSAL).count(), RACERS - 1, "{said}");
    let mut winner = racers.remove(0);
    winner.wait_ready(Instant::now(), LOADING, Duration::from_millis(20)).unwrap();
    winner
}

#[test]
fn of_eight_starts_at_once_one_serves_and_when_it_is_killed_another_one_does() {
    let Some(cluster) = cluster_or_skip() else { return };
    put_steady(&cluster);
    put_world(&cluster, 0);
    race(&cluster).kill();
    with_steady_traffic(&cluster, "races", || {
        for number in 1..=points(3).max(1) {
            put_world(&cluster, number);
            let winner = race(&cluster);
            assert_world(&cluster, number, "the winner");
            winner.kill();
        }
    });
}

/// One that has opened the directory is slow to lock it; meanwhile the directory is taken away, and made by another.
#[test]
fn whoever_locks_a_directory_that_has_been_taken_away_holds_nothing() {
    let Some(cluster) = traced_cluster_or_skip() else { return };
    let traced = Traced::new(&cluster);
    put_steady(&cluster);
    put_world(&cluster, 0);
    let node = cluster.lab.node("node1");
    Daemon::start(&cluster.lab, "node1", &cluster.manifests.dir).unwrap().kill();
    for what in ["run", "cleanup"] {
        let mut slow = traced.held_at(what, "flock", Duration::from_secs(5));
        let at = logged(&cluster, 0).len();
        node.cleanup().unwrap();
        let mut daemon = Daemon::start(&cluster.lab, "node1", &cluster.manifests.dir).unwrap();
        let before = attached(&cluster);
        assert!(eventually(LOADING, || slow.ended().is_some()), "{what} goes on: {}", daemon.log());
        let said = logged(&cluster, at);
        assert!(said.contains("a running kubelane holds "), "{what}: {said}");
        daemon.check_running().unwrap();
        assert_eq!(attached(&cluster), before, "{what}");
        assert_world(&cluster, 0, what);
        daemon.kill();
    }
}
