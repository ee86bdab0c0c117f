//! What a program sees of rows that change while it reads them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kubelane::abi::{Backend, Frontend, FrontendKey, Pool};
use kubelane::bpf::Maps;
use kubelane::model::{Ipx, Protocol};
use kubelane::sync::{MapIo, MapName};
use serde_json::json;

use crate::laboratory::cluster::{self, Cluster, all, vip};
use crate::laboratory::daemon::Daemon;
use crate::laboratory::messages::Kind::*;

/// Every row under `key` is rewritten as it is, as fast as one processor can: the kernel gives the memory of one
/// frontend's former row to the next one's.
fn rewrite_until(stop: &AtomicBool, maps: &mut Maps, rows: &[(FrontendKey, Frontend)]) -> usize {
    let keys: Vec<FrontendKey> = rows.iter().map(|(key, _)| *key).collect();
    let values: Vec<Frontend> = rows.iter().map(|(_, row)| *row).collect();
    let mut rounds = 0;
    let deadline = Instant::now() + Duration::from_secs(60);
    while !stop.load(Ordering::Relaxed) && Instant::now() < deadline {
        let failures =
            maps.write(MapName::Frontends, bytemuck::cast_slice(&keys), bytemuck::cast_slice(&values), keys.len());
        assert!(failures.is_empty());
        rounds += 1;
    }
    rounds
}

#[test]
fn a_frontend_that_is_rewritten_while_it_is_read_never_leads_to_another_service() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("one", 10, json!({}), &cluster.ready(&["a"]));
    cluster.put("two", 11, json!({"spec": {"sessionAffinity": "ClientIP"}}), &cluster.ready(&["b"]));
    cluster.start().terminate().unwrap();
    let mut maps = Maps::open(&cluster.lab.node("node1").pin_path).unwrap();
    let mut rows: Vec<(FrontendKey, Frontend)> = Vec::new();
    maps.dump(MapName::Frontends, &mut |key, value| {
        rows.push((bytemuck::pod_read_unaligned(key), bytemuck::pod_read_unaligned(value)));
    })
    .unwrap();
    rows.retain(|(key, _)| key.port() == 53 && key.ip().family() == kubelane::model::Family::Ipv4);
    assert_eq!(rows.len(), 2);
    let stop = AtomicBool::new(false);
    let mut clients = [cluster.client("client"), cluster.client("other")];
    let rounds = std::thread::scope(|scope| {
        let writer = scope.spawn(|| rewrite_until(&stop, &mut maps, &rows));
        let mut wrong = Vec::new();
        for _ in 0..20 {
            for (client, (number, pod)) in clients.iter_mut().zip([(10, "a"), (11, "b")]) {
                let [v4, _] = vip(number, 53);
                for (kind, to) in [(Udp4, v4), (Udp6, cluster::mapped(v4))] {
                    let counts = client.ask(kind, to, 100);
                    if counts != all(pod, 100) {
                        wrong.push((to, counts));
                    }
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
        let rounds = writer.join().unwrap();
        assert!(wrong.is_empty(), "after {rounds} rounds: {wrong:?}");
        rounds
    });
    assert!(rounds > 1000, "{rounds} rounds are too few to meet a reader");
}

/// A row is rewritten by putting the new one at the head of its bucket, and then taking out the old one further down: a
/// look-up that is between the two finds neither. The map is small here and nearly full, so that rows share buckets.
#[test]
fn a_frontend_that_is_rewritten_is_always_found() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let numbers = 20..27;
    for number in numbers.clone() {
        cluster.put(&format!("s{number}"), number, json!({}), &cluster.ready(&["a"]));
    }
    let daemon = Daemon::start_with(&cluster.lab, "node1", &cluster.manifests.dir, &["--max-services", "16"]).unwrap();
    daemon.terminate().unwrap();
    let mut maps = Maps::open(&cluster.lab.node("node1").pin_path).unwrap();
    let mut rows: Vec<(FrontendKey, Frontend)> = Vec::new();
    maps.dump(MapName::Frontends, &mut |key, value| {
        rows.push((bytemuck::pod_read_unaligned(key), bytemuck::pod_read_unaligned(value)));
    })
    .unwrap();
    assert_eq!(rows.len(), 8 * numbers.len());
    let before = maps.read_counters().unwrap();
    let to: Vec<_> = numbers.map(|number| vip(number, 53)[0]).collect();
    let mut client = cluster.client("client");
    let stop = AtomicBool::new(false);
    let (counts, rounds) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| rewrite_until(&stop, &mut maps, &rows));
        let counts = client.connect_all(&to, 30_000);
        stop.store(true, Ordering::Relaxed);
        (counts, writer.join().unwrap())
    });
    let times = 30_000 * to.len() as u32;
    let refused =
        maps.read_counters().unwrap().into_iter().zip(before).map(|((name, now), (_, then))| (name, now - then));
    let moved: Vec<_> = refused.filter(|(_, count)| *count > 0).collect();
    assert_eq!(moved, [("connect_translated", u64::from(times))], "{counts:?} in {rounds} rounds");
    assert_eq!(counts, all("connected", times));
    assert!(rounds > 1000, "{rounds} rounds are too few to meet a reader");
}

/// The slots of `pool` name the backends `ids`, whoever these belong to.
fn point_slots(maps: &mut Maps, pool: &Pool, ids: &[u32]) {
    let indices: Vec<u32> = (pool.base..).take(ids.len()).collect();
    let failures = maps.write(MapName::Slots, bytemuck::cast_slice(&indices), bytemuck::cast_slice(ids), indices.len());
    assert!(failures.is_empty());
}

/// Of cluster IPs that no other test has. A daemon looks in all network namespaces that it finds, so those of other tests
/// beside this one do in this one's, for UDP sockets that were connected to its Services before they were served. One that is
/// let through looks like that, and is connected anew.
const FIRST: u8 = 230;

#[test]
fn a_slot_that_leads_to_another_services_backend_is_passed_over() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("one", FIRST, json!({}), &cluster.ready(&["a", "b"]));
    cluster.put("two", FIRST + 1, json!({}), &cluster.ready(&["c"]));
    cluster.start().terminate().unwrap();
    let mut maps = Maps::open(&cluster.lab.node("node1").pin_path).unwrap();
    let [v4, _] = vip(FIRST, 53);
    let key = FrontendKey::new(v4.ip().into(), 53, Protocol::Udp);
    let row: Frontend =
        bytemuck::pod_read_unaligned(&maps.read(MapName::Frontends, bytemuck::bytes_of(&key)).unwrap().unwrap());
    assert_eq!(row.inside.count, 2);
    let mut backends: Vec<(u32, Backend)> = Vec::new();
    maps.dump(MapName::Backends, &mut |id, backend| {
        backends.push((bytemuck::pod_read_unaligned(id), bytemuck::pod_read_unaligned(backend)));
    })
    .unwrap();
    let of = |service: bool, pod: &str| {
        let address = Ipx::from(cluster.lab.pod(pod).addresses()[0]).0;
        let wanted = |b: &&(u32, Backend)| b.1.address == address && (b.1.service_id == row.service_id) == service;
        backends.iter().find(wanted).expect("the pod is a backend").0
    };
    let missing = |maps: &Maps| {
        let counters = maps.read_counters().unwrap();
        counters.iter().find(|(label, _)| *label == "failed_backend_missing").expect("the counter exists").1
    };
    let mut client = cluster.client("client");

    point_slots(&mut maps, &row.inside, &[of(true, "a"), of(false, "c")]);
    assert_eq!(client.ask(Udp4, v4, 60), all("a", 60));
    assert_eq!(client.ask_unconnected(Udp4, v4, 60), all("a", 60));
    assert_eq!(missing(&maps), 0);

    // Nothing in the pool is the Service's: let through as it is, and counted, of the socket and of its packet.
    point_slots(&mut maps, &row.inside, &[of(false, "c"), of(false, "c")]);
    assert_eq!(client.ask(Udp4, v4, 1), all("EAGAIN", 1));
    assert_eq!(missing(&maps), 2);
}
