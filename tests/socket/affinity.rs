//! Session affinity ClientIP, seen by real clients: whom it binds to what, and for how long.

use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use kubelane::abi::Affinity;
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use serde_json::{Value, json};

use crate::laboratory::client::Client;
use crate::laboratory::cluster::{Cluster, PODS, names, vip};
use crate::laboratory::daemon::PATIENCE;
use crate::laboratory::eventually;
use crate::laboratory::manifests::port;
use crate::laboratory::messages::Kind::*;

/// Enough ports, each with an affinity of its own, that nothing is the same on all of them by chance (3^-20).
const PORTS: u16 = 20;

fn put(cluster: &Cluster, seconds: Option<u32>, pods: &[&str]) {
    let names: Vec<String> = (0..PORTS).map(|n| format!("p{n}")).collect();
    let ports: Vec<_> = (0..PORTS).map(|n| port(&names[usize::from(n)], "TCP", 5000 + n)).collect();
    let targets: Vec<_> = names.iter().map(|name| (name.as_str(), "TCP", 9000)).collect();
    let changes = match seconds {
        Some(seconds) => json!({"spec": {
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}},
        }}),
        None => Value::Null,
    };
    cluster.put_with("sticky", 10, json!(ports), changes, &targets, &cluster.ready(pods));
}

/// Who answers on each port: one connection each.
fn answers(client: &mut Client, family: usize) -> Vec<String> {
    let kind = [Tcp4, Tcp6][family];
    let ask = |n| names(&client.ask(kind, vip(10, 5000 + n)[family], 1)).concat();
    (0..PORTS).map(ask).collect()
}

/// A backend that one family remembered is none of the other's: an IPv4 socket cannot even have its address.
#[test]
fn each_family_remembers_backends_of_its_own_whichever_came_first() {
    let Some(cluster) = Cluster::or_skip() else { return };
    put(&cluster, Some(10800), &PODS);
    let _daemon = cluster.start();
    for families in [[1, 0], [0, 1]] {
        let mut client = cluster.client(["other", "client"][families[0]]);
        for family in families {
            let answers = answers(&mut client, family);
            assert!(answers.iter().all(|name| PODS.contains(&name.as_str())), "family {family}: {answers:?}");
        }
        let both = [0, 1].map(|family| answers(&mut client, family));
        // 3^-20 by chance; an IPv6 socket that was given the IPv4 backend would always find the same pod.
        assert_ne!(both[0], both[1]);
    }
}

/// Neither knows of the other when it looks. In every second round there is no row, in the others one whose backend has gone.
#[test]
fn two_sockets_of_a_pod_that_ask_at_the_same_time_get_the_same_pod() {
    const ROUNDS: usize = 3000;
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("sticky", 10, json!({"spec": {"sessionAffinity": "ClientIP"}}), &cluster.ready(&PODS));
    let daemon = cluster.start();
    let pin = kubelane::bpf::pinned::maps_directory(&cluster.lab.node("node1").pin_path).join("affinities");
    daemon.terminate().unwrap();
    let remembered = MapHandle::from_pinned_path(pin).unwrap();
    let barrier = Barrier::new(2);
    let together = |client: &mut Client, forget: bool| {
        let mut answers = Vec::new();
        for round in 0..ROUNDS {
            barrier.wait();
            for key in remembered.keys().filter(|_| forget) {
                if round % 2 == 0 {
                    remembered.delete(&key).unwrap();
                } else {
                    let row = remembered.lookup(&key, MapFlags::ANY).unwrap().unwrap();
                    let mut row: Affinity = bytemuck::pod_read_unaligned(&row);
                    row.generation = row.generation.wrapping_sub(1);
                    remembered.update(&key, bytemuck::bytes_of(&row), MapFlags::ANY).unwrap();
                }
            }
            barrier.wait();
            answers.push(names(&client.ask(Udp4, vip(10, 53)[0], 1)).concat());
        }
        answers
    };
    let [mut one, mut two] = [cluster.client("client"), cluster.client("client")];
    let (ones, twos) = thread::scope(|scope| {
        let ones = scope.spawn(|| together(&mut one, true));
        (together(&mut two, false), ones.join().unwrap())
    });
    let apart = ones.iter().zip(&twos).filter(|(one, two)| one != two).count();
    assert_eq!(apart, 0, "of {ROUNDS} rounds");
    assert!(PODS.iter().all(|pod| ones.iter().any(|answer| answer == pod)), "each round chooses anew");
}

#[test]
fn a_client_keeps_its_pod_for_each_service_port_in_both_families() {
    let Some(cluster) = Cluster::or_skip() else { return };
    put(&cluster, Some(10800), &PODS);
    let _daemon = cluster.start();
    let mut client = cluster.client("client");
    let first = [answers(&mut client, 0), answers(&mut client, 1)];
    assert!(first.iter().flatten().all(|name| PODS.contains(&name.as_str())), "{first:?}");
    for _ in 0..5 {
        // The families take turns: neither may disturb the other.
        assert_eq!(answers(&mut client, 0), first[0]);
        assert_eq!(answers(&mut client, 1), first[1]);
    }
    // Another process of the same pod is the same client; another pod, and the node, are others.
    assert_eq!(answers(&mut cluster.client("client"), 0), first[0]);
    let mut other = cluster.client("other");
    // IPv6 first: a family's memory holds pods of its own only.
    assert!(answers(&mut other, 1).iter().all(|name| PODS.contains(&name.as_str())));
    assert_ne!(answers(&mut other, 0), first[0]);
    assert!(answers(&mut other, 0).iter().all(|name| PODS.contains(&name.as_str())));
    assert_ne!(answers(&mut cluster.host_client(), 0), first[0]);
    // Each port has its own memory.
    let mut distinct = first[0].clone();
    distinct.sort();
    distinct.dedup();
    assert!(distinct.len() > 1, "{first:?}");
}

#[test]
fn affinity_is_refreshed_by_use_and_forgotten_after_its_timeout() {
    let Some(cluster) = Cluster::or_skip() else { return };
    put(&cluster, Some(2), &PODS);
    let _daemon = cluster.start();
    let mut client = cluster.client("client");
    let first = answers(&mut client, 0);
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(1200));
        assert_eq!(answers(&mut client, 0), first, "used every 1.2 s of 2");
    }
    std::thread::sleep(Duration::from_millis(2500));
    assert_ne!(answers(&mut client, 0), first, "not used for 2.5 s of 2");
}

#[test]
fn a_pod_that_is_gone_is_replaced_at_once_and_the_others_keep_their_clients() {
    let Some(cluster) = Cluster::or_skip() else { return };
    put(&cluster, Some(10800), &PODS);
    let _daemon = cluster.start();
    let mut client = cluster.client("client");
    let before = answers(&mut client, 0);
    put(&cluster, Some(10800), &["a", "c"]);
    cluster.wait_for_backend(cluster.lab.pod("b").v4.into(), false);
    let after = answers(&mut client, 0);
    for (old, new) in before.iter().zip(&after) {
        assert!(if old == "b" { new == "a" || new == "c" } else { new == old }, "{before:?} became {after:?}");
    }
    assert_eq!(answers(&mut client, 0), after, "the replacement is kept");
}

#[test]
fn affinity_goes_and_comes_with_the_next_connection() {
    let Some(cluster) = Cluster::or_skip() else { return };
    put(&cluster, Some(10800), &PODS);
    let _daemon = cluster.start();
    let mut client = cluster.client("client");
    let first = answers(&mut client, 0);
    assert_eq!(answers(&mut client, 0), first);
    put(&cluster, None, &PODS);
    let patience = PATIENCE;
    assert!(eventually(patience, || answers(&mut client, 0) != first), "connections spread again");
    put(&cluster, Some(10800), &PODS);
    let sticks = eventually(patience, || {
        let rounds: Vec<_> = (0..3).map(|_| answers(&mut client, 0)).collect();
        rounds.iter().all(|round| *round == rounds[0])
    });
    assert!(sticks, "connections stick again");
}
