//! What a program sees of rows that change while it reads them.
#![cfg(feature = "lab")]

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kubelane::abi::{Frontend, FrontendKey};
use kubelane::bpf::Maps;
use kubelane::sync::{MapIo, MapName};
use serde_json::json;

use support::cluster::{Cluster, all, vip};
use support::wire::Kind::*;

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
                for (kind, to) in [(Udp4, v4), (Udp6, support::cluster::mapped(v4))] {
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
