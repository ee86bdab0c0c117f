//! Random clusters, and random things that happen to them, go through the daemon's real control path into the kernel's
//! maps. Packets of random clients, outside and in pods of this node, then go through the real programs
//! (BPF_PROG_TEST_RUN), and each must fare as a slow model of the Service API says.
//!
//! | file | |
//! |---|---|
//! | `random.rs` | choices that a seed brings back |
//! | `random_cluster.rs` | clusters and what happens to them |
//! | `semantics.rs` | the model: what becomes of a packet that begins a flow |
//! | `traffic.rs` | packets through the real programs, and what is known of their flows |
//! | `flow.rs` | a flow, and what its packets look like on either side |
//! | `memory.rs` | session affinity |
//! | `daemon.rs` | the real control path from a cluster to the kernel's maps |
//!
//! A failure names its seed, and what had happened; `KUBELANE_SEED=N KUBELANE_CASES=1` runs that one again, and
//! `KUBELANE_SECONDS` looks for longer.

mod daemon;
mod flow;
mod memory;
mod random;
mod random_cluster;
mod semantics;
mod traffic;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::laboratory::packets::{Node, PODS, ip_command};
use crate::laboratory::{preflight, skip};
use daemon::{Daemon, assert_empty};
use kubelane::bpf::FlowCollector;
use libbpf_rs::{MapCore, MapFlags};
use random::Random;
use random_cluster::{GATEWAY4, GATEWAY6, RandomCluster};
use traffic::Traffic;

/// How long to look; how many clusters that makes follows from the machine.
const SECONDS: u64 = 18;
/// What happens to a cluster before the next one.
const EVENTS: usize = 8;

/// A run that is only bounded by its time must come across all of these.
const WORTH_SEEING: [&str; 36] = [
    "a pod's dropped_no_local_endpoint",
    "a pod's dropped_sctp_port",
    "a pod's dropped_source_range",
    "a pod's dropped_unknown_reset",
    "a pod's external policy Local, from inside",
    "a pod's kept by affinity",
    "a pod's left its backend",
    "a pod's local",
    "a pod's local endpoints",
    "a pod's node hints",
    "a pod's opened again",
    "a pod's own backend",
    "a pod's ran on without its backend",
    "a pod's ready endpoints",
    "a pod's refused_no_endpoint",
    "a pod's refused_unknown_port",
    "a pod's remote",
    "a pod's terminating endpoints",
    "a pod's terminating local endpoints",
    "a pod's untouched",
    "a pod's zone hints",
    "dropped_no_local_endpoint",
    "dropped_sctp_port",
    "dropped_source_range",
    "dropped_unknown_reset",
    "its own client",
    "kept by affinity",
    "left its backend",
    "local",
    "node hints",
    "opened again",
    "ran on without its backend",
    "refused_no_endpoint",
    "remote",
    "untouched",
    "zone hints",
];

fn setting(name: &str) -> Option<u64> {
    Some(std::env::var(name).ok()?.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Says how to come back here, should the test fail.
struct Story {
    seed: u64,
    lines: Vec<String>,
}

impl Drop for Story {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("seed {}:\n  {}", self.seed, self.lines.join("\n  "));
        }
    }
}

/// One cluster from its beginning to its end.
fn one_case(node: &mut Node, daemon: &mut Daemon, seed: u64, traffic: &mut Traffic) {
    let mut random = Random::new(seed);
    let mut world = RandomCluster::random(&mut random);
    let mut story = Story { seed, lines: vec![format!("{world:#?}")] };
    for _ in 0..=EVENTS {
        daemon.follow(&world, node.datapath.maps());
        if random.percent(10) {
            story.lines.push("the daemon starts again".into());
            daemon.restart(node.datapath.maps());
        }
        traffic.world_changed(&world);
        traffic.run(node, &world, &mut random, 40, 30);
        for _ in 0..1 + random.below(3) {
            story.lines.push(world.happen(&mut random));
        }
    }
    daemon.follow(&RandomCluster::default(), node.datapath.maps());
    assert_empty(node.datapath.maps());
}

/// What the programs remember of a cluster that is no more: flows by the daemon's own collection, two days later.
fn forget(node: &Node, collector: &mut FlowCollector) {
    node.age_flows(2 * 86_400);
    collector.collect(usize::MAX / 4).unwrap();
    assert_eq!(node.flow_rows(), (0, 0), "every flow ends");
    for affinities in ["affinities", "new_affinities"].map(|map| node.pinned(map)) {
        affinities.keys().collect::<Vec<_>>().iter().for_each(|key| affinities.delete(key).unwrap());
    }
    let openings = node.pinned("flow_openings");
    let (rows, size) = (openings.max_entries(), openings.value_size() as usize);
    let indices: Vec<u8> = (0..rows).flat_map(u32::to_ne_bytes).collect();
    openings.update_batch(&indices, &vec![0; size * rows as usize], rows, MapFlags::ANY, MapFlags::ANY).unwrap();
    let ports = node.pinned("ports");
    ports.update(&0u32.to_ne_bytes(), &vec![0; ports.value_size() as usize], MapFlags::ANY).unwrap();
}

#[test]
fn packets_fare_as_the_service_api_says_in_random_clusters_that_change() {
    if let Err(reason) = preflight() {
        return skip(&format!("{reason:#}"));
    }
    let end = Instant::now() + Duration::from_secs(setting("KUBELANE_SECONDS").unwrap_or(SECONDS));
    let first = setting("KUBELANE_SEED").unwrap_or(1);
    let cases = setting("KUBELANE_CASES").unwrap_or(u64::MAX - first);
    let mut node = Node::new();
    ip_command(&format!("addr add {GATEWAY4}/32 dev {PODS}"));
    ip_command(&format!("addr add {GATEWAY6}/128 dev {PODS} nodad"));
    let mut daemon = Daemon::start(node.datapath.maps());
    assert_empty(node.datapath.maps());
    let mut collector = node.datapath.flow_collector().unwrap();
    let (mut clusters, mut packets) = (0u64, 0u64);
    let mut noted: BTreeMap<String, u64> = BTreeMap::new();
    for seed in first..first + cases {
        if Instant::now() >= end {
            break;
        }
        let mut traffic = Traffic::new(&mut node);
        one_case(&mut node, &mut daemon, seed, &mut traffic);
        forget(&node, &mut collector);
        clusters += 1;
        packets += traffic.packets;
        for (what, count) in traffic.noted {
            *noted.entry(what).or_default() += count;
        }
    }
    println!("{clusters} clusters, {} states of them, {packets} packets: {noted:?}", clusters * (EVENTS as u64 + 1));
    for what in WORTH_SEEING.iter().filter(|_| cases > clusters) {
        assert!(noted.get(*what).is_some_and(|count| *count > 0), "{what} was never seen: {noted:?}");
    }
}
