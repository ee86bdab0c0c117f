//! The BPF file system of the pins becomes read-only, or goes away.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use kubelane::explain::{About, ask};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::laboratory::cluster::Cluster;
use crate::laboratory::daemon::{Daemon, LOADING, PATIENCE};
use crate::laboratory::eventually;
use crate::services::{
    assert_answers_within, assert_world, assert_world_within, cluster_or_skip, logged, put_steady, put_world,
    with_steady_traffic,
};
use crate::two::{Attachments, attached, spawn};

const READ_ONLY: &str = "is mounted read-only: what is attached serves on";

fn remount(cluster: &Cluster, flags: MsFlags) {
    let at = cluster.lab.dir.join("bpf");
    mount(None::<&str>, &at, None::<&str>, MsFlags::MS_REMOUNT | flags, None::<&str>).unwrap();
}

fn mount_new(at: &Path) {
    mount(Some("bpffs"), at, Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
}

fn says(cluster: &Cluster, from: usize, what: &str) {
    assert!(eventually(PATIENCE, || logged(cluster, from).contains(what)), "no {what}: {}", logged(cluster, from));
}

/// That nobody is told that something is not served, which is.
fn is_well(cluster: &Cluster, daemon: &mut Daemon<'_>, from: usize) {
    daemon.check_running().unwrap();
    let (log, ready) = (logged(cluster, from), daemon.health("/readyz").unwrap());
    assert!(ready.ends_with("\r\n\r\nok\n") && !log.contains("not served"), "{ready}: {log}");
}

/// Everything that is pinned on node1: names of maps, and attachments.
fn pinned(cluster: &Cluster) -> (Vec<String>, Attachments) {
    let pins = &cluster.lab.node("node1").pin_path;
    let version = fs::read_dir(pins).unwrap().flatten().next().expect("a version").path();
    let name = |entry: fs::DirEntry| entry.file_name().into_string().unwrap();
    let mut maps: Vec<String> = fs::read_dir(version.join("maps")).unwrap().flatten().map(name).collect();
    maps.sort();
    (maps, attached(cluster))
}

#[test]
fn a_bpf_file_system_that_becomes_read_only_is_told_of_and_everything_goes_on() {
    let Some(cluster) = cluster_or_skip() else { return };
    put_steady(&cluster);
    put_world(&cluster, 0);
    let mut daemon = Daemon::start(&cluster.lab, "node1", &cluster.manifests.dir).unwrap();
    with_steady_traffic(&cluster, "a read-only BPF file system", || {
        let at = logged(&cluster, 0).len();
        remount(&cluster, MsFlags::MS_RDONLY);
        says(&cluster, at, READ_ONLY);
        for number in 1..=3 {
            put_world(&cluster, number);
            assert_answers_within(&cluster, number, PATIENCE, "read-only");
        }
        is_well(&cluster, &mut daemon, at);
        assert_eq!(logged(&cluster, at).matches(READ_ONLY).count(), 1, "once: {}", logged(&cluster, at));
        remount(&cluster, MsFlags::empty());
        says(&cluster, at, "resolved: the BPF file system");
        is_well(&cluster, &mut daemon, at);

        // A start finds it so.
        daemon.terminate().unwrap();
        remount(&cluster, MsFlags::MS_RDONLY);
        let (at, began) = (logged(&cluster, 0).len(), Instant::now());
        let mut next = spawn(&cluster);
        assert!(eventually(LOADING, || next.check_running().is_err()));
        let (took, said) = (began.elapsed(), logged(&cluster, at));
        assert!(took < Duration::from_secs(3) && said.contains(READ_ONLY), "{took:?}: {said}");
        remount(&cluster, MsFlags::empty());
        put_world(&cluster, 4);
        let _daemon = Daemon::start(&cluster.lab, "node1", &cluster.manifests.dir).unwrap();
        assert_world(&cluster, 4, "writable again");
    });
}

#[test]
fn a_bpf_file_system_that_goes_away_is_told_of_and_all_is_pinned_again_when_it_is_back() {
    let Some(cluster) = cluster_or_skip() else { return };
    put_steady(&cluster);
    put_world(&cluster, 0);
    let mut daemon = Daemon::start(&cluster.lab, "node1", &cluster.manifests.dir).unwrap();
    let bpffs = cluster.lab.dir.join("bpf");
    with_steady_traffic(&cluster, "no BPF file system", || {
        let (before, at) = (pinned(&cluster), logged(&cluster, 0).len());
        umount2(&bpffs, MntFlags::MNT_DETACH).unwrap();
        says(&cluster, at, "has been unmounted: all is served, but only for as long as this daemon runs");
        for number in 1..=3 {
            put_world(&cluster, number);
            assert_answers_within(&cluster, number, PATIENCE, "unmounted");
        }
        is_well(&cluster, &mut daemon, at);
        mount_new(&bpffs);
        says(&cluster, at, "are pinned again");
        assert_eq!(pinned(&cluster), before, "the same links, of the same programs");
        assert_world_within(&cluster, 3, PATIENCE, "pinned again");
        is_well(&cluster, &mut daemon, at);
        let pins = &cluster.lab.node("node1").pin_path;
        let answers = || ask(pins, About::Daemon).is_ok_and(|answer| answer.is_some());
        assert!(eventually(PATIENCE, answers), "the daemon's socket is named by the directory");

        // The state is the next daemon's: nothing is without a program when it takes over.
        let mut second = spawn(&cluster);
        assert!(eventually(LOADING, || second.check_running().is_err()), "the directory is held");
        daemon.kill();
        put_world(&cluster, 4);
        let next = Daemon::start(&cluster.lab, "node1", &cluster.manifests.dir).unwrap();
        assert_world(&cluster, 4, "the next daemon");
        assert!(next.log().contains("took over the state of an earlier daemon"), "{}", next.log());
    });
}

/// Links that lose their pins are detached: connections fail until they are attached again. Rows and flows stay.
#[test]
fn pins_that_somebody_has_removed_are_made_again() {
    let Some(cluster) = cluster_or_skip() else { return };
    put_steady(&cluster);
    put_world(&cluster, 1);
    let daemon = Daemon::start(&cluster.lab, "node1", &cluster.manifests.dir).unwrap();
    let pins = &cluster.lab.node("node1").pin_path;
    for all in [false, true] {
        let (before, at) = (pinned(&cluster), logged(&cluster, 0).len());
        match all {
            true => fs::remove_dir_all(pins).unwrap(),
            false => {
                fs::remove_dir_all(fs::read_dir(pins).unwrap().flatten().next().unwrap().path().join("maps")).unwrap()
            }
        }
        says(&cluster, at, "are pinned again");
        let (maps, links) = &before;
        let are_there = || pinned(&cluster).0 == *maps && pinned(&cluster).1.len() == links.len();
        assert!(eventually(PATIENCE, are_there), "{:?}; {}", pinned(&cluster), daemon.log());
        assert_world_within(&cluster, 1, PATIENCE, "pinned again");
    }
    daemon.kill();
    let next = Daemon::start(&cluster.lab, "node1", &cluster.manifests.dir).unwrap();
    assert!(next.log().contains("took over the state of an earlier daemon"), "{}", next.log());
    assert_world(&cluster, 1, "the next daemon");
}
