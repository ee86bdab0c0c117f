//! Ten thousand changes of Services: afterwards there is as much of everything as before.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use kubelane::abi::Backend;
use kubelane::abi::backend_state::BACKEND_GONE;
use kubelane::bpf::{Maps, attachments};
use kubelane::sync::{MapIo as _, MapName};
use libbpf_rs::query::{LinkInfoIter, LinkTypeInfo};
use serde_json::{Value, json};

use crate::draw::points;
use crate::laboratory::cluster::Cluster;
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::eventually;
use crate::laboratory::manifests::{Endpoint, port, service, slice};
use crate::services::{assert_world, cluster_or_skip, put_steady, put_world, with_steady_traffic};

/// Services that change at once.
const SERVICES: usize = 500;
const ROUNDS: usize = 20;
/// Rounds after which memory is what a daemon of this size needs.
const WARM_UP: usize = 8;
/// By how much memory may grow from then on: the allocator's own doing.
const GROWTH_KIB: u64 = 8 << 10;

/// The port of one of the Services in a round; each tenth is not there.
fn port_of(number: usize, round: usize) -> Option<u16> {
    let is_there = !(number + round).is_multiple_of(10);
    is_there.then_some(1000 + ((number + round) % 7) as u16)
}

/// How many Services are not the same in two rounds.
fn changes_between(from: usize, to: usize) -> usize {
    (0..SERVICES).filter(|number| port_of(*number, from) != port_of(*number, to)).count()
}

/// All objects of a round, in which endpoints are others, too, than in the last one.
fn objects(cluster: &Cluster, round: usize) -> Vec<Value> {
    let pods = [["a", "b"], ["b", "c"], ["c", "a"]][round % 3];
    let endpoints: Vec<Endpoint> =
        cluster.ready(&pods[..1 + round % 2]).into_iter().filter(|end| end.address().is_ipv4()).collect();
    let of = |number: usize| {
        let at = port_of(number, round)?;
        let (name, ip) = (format!("many-{number}"), format!("10.97.{}.{}", number / 200, 1 + number % 200));
        let ports = json!([port("tcp", "TCP", at), port("udp", "UDP", at)]);
        let spec = json!({"clusterIP": ip, "clusterIPs": [ip], "ports": ports});
        let targets = [("tcp", "TCP", 9000), ("udp", "UDP", 9000)];
        Some([service(&name, spec), slice(&format!("{name}-1"), &name, &targets, &endpoints)])
    };
    (0..SERVICES).filter_map(of).flatten().collect()
}

/// What there is, by what it is.
#[derive(Debug, Default, PartialEq, Eq)]
struct Holdings(BTreeMap<String, usize>);

impl Holdings {
    fn add(&mut self, what: impl Into<String>) {
        *self.0.entry(what.into()).or_default() += 1;
    }

    /// Of node1: rows, links on its cgroup, pins, and what the daemon holds.
    fn of(cluster: &Cluster, daemon: &Daemon<'_>) -> Holdings {
        let mut all = Holdings::default();
        let node = cluster.lab.node("node1");
        let mut maps = Maps::open(&node.pin_path).unwrap();
        for map in MapName::ALL {
            // Rows of arrays stay when nobody needs them.
            let is_kept = |value: &[u8]| match map {
                MapName::Slots => false,
                MapName::Backends => bytemuck::pod_read_unaligned::<Backend>(value).state != BACKEND_GONE as u8,
                _ => true,
            };
            let mut count = |_: &[u8], value: &[u8]| {
                if is_kept(value) {
                    all.add(format!("rows of {}", map.as_str()));
                }
            };
            maps.dump(map, &mut count).unwrap();
        }
        attachments(&node.pin_path).unwrap().into_iter().for_each(|pin| all.add(format!("pin {}", pin.name)));
        let cgroup = fs::metadata(&node.cgroup).unwrap().ino();
        let is_here = |link: &libbpf_rs::query::LinkInfo| matches!(&link.info, LinkTypeInfo::Cgroup(info) if info.cgroup_id == cgroup);
        LinkInfoIter::default().filter(is_here).for_each(|_| all.add("links on the cgroup"));
        for descriptor in fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().flatten() {
            let Ok(target) = fs::read_link(descriptor.path()) else { continue };
            let target = target.display().to_string();
            // Sockets of this very moment, such as of a look at the links, come and go.
            let kind = target.split_once(":[").map_or(target.as_str(), |(kind, _)| kind);
            if kind != "socket" {
                all.add(format!("descriptors of {kind}"));
            }
        }
        all
    }
}

fn sockets(daemon: &Daemon<'_>) -> usize {
    let all = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().flatten();
    let targets = all.filter_map(|descriptor| fs::read_link(descriptor.path()).ok());
    targets.filter(|target| target.display().to_string().starts_with("socket:")).count()
}

fn resident_kib(daemon: &Daemon<'_>) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn ten_thousand_changes_of_services_leave_no_row_link_descriptor_or_memory_behind() {
    let Some(cluster) = cluster_or_skip() else { return };
    put_steady(&cluster);
    put_world(&cluster, 1);
    cluster.manifests.save("many", &objects(&cluster, 0));
    let daemon = Daemon::start(&cluster.lab, "node1", &cluster.manifests.dir).unwrap();
    let counted = || daemon.metric("kubeproxy_sync_proxy_rules_service_changes_total").unwrap() as usize;
    let (first, made, last) = (counted(), Cell::new(0), Cell::new(0));
    let put = |round: usize| {
        let began = Instant::now();
        made.set(made.get() + changes_between(last.replace(round), round));
        cluster.manifests.save("many", &objects(&cluster, round));
        assert!(eventually(PATIENCE, || counted() == first + made.get()), "round {round}: {}", daemon.log());
        began.elapsed()
    };
    // What there is once nothing changes any more.
    let settled = |daemon: &Daemon<'_>| {
        let mut last = Holdings::default();
        let is_still = || {
            std::thread::sleep(Duration::from_millis(500));
            let now = Holdings::of(&cluster, daemon);
            std::mem::replace(&mut last, now) == last
        };
        assert!(eventually(PATIENCE, is_still), "{last:?}");
        last
    };
    with_steady_traffic(&cluster, "ten thousand changes", || {
        (1..=WARM_UP).for_each(|round| _ = put(round));
        put(0);
        let (before, memory, open) = (settled(&daemon), resident_kib(&daemon), sockets(&daemon));
        let (rounds, from) = (points(ROUNDS).max(ROUNDS), made.get());
        let slowest = (1..=rounds).map(put).max().unwrap();
        put(0);
        let (after, memory_after, open_after) = (settled(&daemon), resident_kib(&daemon), sockets(&daemon));
        let changes = made.get() - from;
        println!("{changes} changes, the slowest {SERVICES} within {slowest:?}; {memory} KiB, then {memory_after}");
        assert_eq!(before, after);
        assert!(open_after <= open + 2, "{open} sockets, then {open_after}");
        assert!(memory_after <= memory + GROWTH_KIB, "{memory} KiB, then {memory_after}");
        assert!(changes >= 10_000, "{changes}");
    });
    assert_world(&cluster, 1, "after all changes");
}
