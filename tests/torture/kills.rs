//! The daemon is killed as it enters a system call, again and again: while it starts on nothing, while it starts on what an
//! earlier one left and the world has changed meanwhile, and while `cleanup` takes everything away. Whatever was half
//! done, connections to Services that did not change never fail, the next start makes everything right, and the next
//! cleanup leaves nothing.

use std::cell::{Cell, RefCell};
use std::process::Command;

use crate::laboratory::cluster::{Cluster, names, vip};
use crate::laboratory::daemon::Daemon;
use crate::laboratory::messages::Kind::Tcp4;
use crate::services::{
    NODE_PORT, STEADY, assert_world, put_steady, put_world, traced_cluster_or_skip, with_steady_traffic,
};
use crate::traced::{Outcome, Plan, Traced};

/// All by which a daemon changes what outlives it: maps, programs and links, pins, files, qdiscs and filters (netlink).
const CALLS: &str = "bpf,rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,mount,umount2,\
                     sendto,sendmsg,ftruncate,write";
const POINTS: usize = 8;

/// Killed as it enters a call.
pub fn plan(what: &'static str) -> Plan<'static> {
    Plan { what, calls: CALLS, points: POINTS, also: None, fault: &|_, _| "signal=SIGKILL".to_owned() }
}

fn start<'c>(cluster: &'c Cluster, what: &str) -> Daemon<'c> {
    let daemon = Daemon::start(&cluster.lab, "node1", &cluster.manifests.dir);
    daemon.unwrap_or_else(|error| panic!("the next start: {error:#}: {what}"))
}

/// The next start makes everything right.
pub fn check_start(cluster: &Cluster, number: usize, what: &str) {
    let daemon = start(cluster, what);
    assert_world(cluster, number, what);
    daemon.kill();
}

/// What `cleanup` is to take away.
pub fn prepare_cleanup(cluster: &Cluster, number: usize) {
    put_world(cluster, number);
    start(cluster, "before a cleanup").kill();
}

/// The next cleanup leaves nothing.
pub fn check_cleanup(cluster: &Cluster, what: &str) {
    let node = cluster.lab.node("node1");
    node.cleanup().unwrap_or_else(|error| panic!("the next cleanup: {error:#}: {what}"));
    assert!(!node.pin_path.exists(), "{what}");
    assert_ne!(names(&cluster.client("client").ask(Tcp4, vip(STEADY, 90)[0], 1)), ["a"], "{what}");
    let filters = node.host.inside(|| {
        let output = Command::new("tc").args(["filter", "show", "dev", "eth0", "ingress"]).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    });
    assert_eq!(filters.unwrap(), "", "{what}");
}

#[test]
fn killed_at_any_system_call_it_leaves_what_served_serving_and_the_next_start_makes_all_right() {
    let Some(cluster) = traced_cluster_or_skip() else { return };
    let mut traced = Traced::new(&cluster);
    let check = |number: usize, what: &str, _: &Outcome| check_start(&cluster, number, what);
    put_steady(&cluster);
    put_world(&cluster, 1);
    start(&cluster, "the first").kill();
    with_steady_traffic(&cluster, "starts on what an earlier daemon left", || {
        traced.at_each(&plan("run"), |number| put_world(&cluster, number), check);
    });
    let prepare = |number: usize| {
        cluster.lab.node("node1").cleanup().unwrap();
        put_world(&cluster, number);
    };
    traced.at_each(&plan("run"), prepare, check);

    // A connection from outside goes on by netfilter, wherever the cleanup was killed. Any rule that translates makes it
    // look at packets.
    let host = &cluster.lab.node("node1").host;
    let rule = ["-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "1", "-j", "DNAT", "--to", "192.0.2.1"];
    host.run("iptables-legacy", &rule, "").unwrap();
    let outside = RefCell::new(cluster.lab.client_outside().unwrap());
    let number_of_open = Cell::new(0);
    let prepare = |number: usize| {
        prepare_cleanup(&cluster, number);
        let mut outside = outside.borrow_mut();
        let mut open = outside.open(Tcp4).unwrap();
        open.connect((host.v4, NODE_PORT + 91).into()).and_then(|()| open.ask()).unwrap();
        number_of_open.set(open.number());
    };
    let check = |_: usize, what: &str, _: &Outcome| {
        check_cleanup(&cluster, what);
        let mut outside = outside.borrow_mut();
        let mut open = outside.socket(number_of_open.get());
        let answer = open.ask();
        assert!(answer.is_ok(), "the open connection: {answer:?}: {what}");
        open.close().unwrap();
    };
    traced.at_each(&plan("cleanup"), prepare, check);

    // Somebody starts the daemon again instead: its programs and netfilter must not both have the connection.
    let check = |_: usize, what: &str, _: &Outcome| {
        let daemon = start(&cluster, what);
        let mut outside = outside.borrow_mut();
        let mut open = outside.socket(number_of_open.get());
        let answer = open.ask();
        assert!(answer.is_ok(), "the open connection: {answer:?}: {what}; {}", daemon.log());
        open.close().unwrap();
        daemon.kill();
    };
    traced.at_each(&plan("cleanup"), prepare, check);
}
