//! The wall clock is set while a daemon runs: by hours, by months and by years, forward and back, as by NTP after a battery
//! was empty or a virtual machine slept. Its process is shown another one (libfaketime): the machine's is everybody's. The
//! programs ask for the monotonic clock only.

use std::fs;
use std::path::Path;

use jiff::Timestamp;

use crate::laboratory::api_cluster::ApiCluster;
use crate::laboratory::daemon::{self, Daemon, PATIENCE};
use crate::laboratory::{eventually, kubelane_binary, skip};
use crate::outage::change;
use crate::services::{assert_world, assert_world_within, cluster_or_skip, put_steady, with_steady_traffic};

/// Of Debian's package faketime, for a process of several threads.
const LIBRARY: &str = match cfg!(target_arch = "aarch64") {
    true => "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
    false => "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
};

/// From the machine's clock, in seconds: three hours ahead, behind, five years ahead, a year before today, and right again.
const OFFSETS: [i64; 5] = [3 * 3600, -3 * 3600, 5 * 366 * 86_400, -366 * 86_400, 0];

/// What the daemon takes for the time, in seconds from the machine's.
fn offset(daemon: &Daemon) -> i64 {
    let answer = daemon.health("/healthz").unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let (_, rest) = answer.split_once(r#""currentTime":""#).expect("it says the time");
    let time: Timestamp = rest.split('"').next().unwrap().parse().unwrap();
    time.as_second() - Timestamp::now().as_second()
}

#[test]
fn a_wall_clock_that_is_set_while_the_daemon_runs_changes_nothing() {
    if !Path::new(LIBRARY).exists() {
        return skip("needs libfaketime (`make setup` installs it)");
    }
    let Some(cluster) = cluster_or_skip() else { return };
    let cluster = ApiCluster::on(cluster);
    put_steady(&cluster);
    change(&cluster, 1);
    let clock = cluster.lab.dir.join("clock");
    let set = |seconds: i64| fs::write(&clock, format!("{seconds:+}")).unwrap();
    set(0);
    let variables = [
        format!("LD_PRELOAD={LIBRARY}"),
        format!("FAKETIME_TIMESTAMP_FILE={}", clock.display()),
        "FAKETIME_NO_CACHE=1".to_owned(),
        "FAKETIME_DONT_FAKE_MONOTONIC=1".to_owned(),
        kubelane_binary().unwrap().display().to_string(),
    ];
    let source = ["--kubeconfig", cluster.kubeconfig.to_str().unwrap()];
    let arguments = daemon::arguments(cluster.lab.node("node1"), &source, &[]);
    let words: Vec<&str> = variables.iter().chain(&arguments).map(String::as_str).collect();
    let mut daemon = Daemon::start_program(&cluster.lab, "node1", Path::new("/usr/bin/env"), &words).unwrap();
    assert_world(&cluster, 1, "before");
    with_steady_traffic(&cluster, "a wall clock that is set", || {
        for (number, seconds) in (2..).zip(OFFSETS) {
            set(seconds);
            let is_set = || (offset(&daemon) - seconds).abs() < 5;
            assert!(eventually(PATIENCE, is_set), "{seconds} s: {}", daemon.health("/healthz").unwrap());
            change(&cluster, number);
            let took = assert_world_within(&cluster, number, PATIENCE, "the clock was set");
            assert!(daemon.health("/readyz").unwrap().starts_with("HTTP/1.1 200 "), "{seconds} s");
            println!("{seconds:+} s: the next change is right after {took:.1?}");
        }
    });
    daemon.check_running().unwrap();
}
