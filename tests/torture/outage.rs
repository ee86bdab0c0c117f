//! The API server goes away for long, in all ways that servers do, and comes back with another world.

use std::fs;
use std::time::Duration;

use serde_json::Value;

use crate::draw::points;
use crate::laboratory::api_cluster::ApiCluster;
use crate::laboratory::apiserver::{Answer, Resource, Verb};
use crate::laboratory::daemon::PATIENCE;
use crate::laboratory::eventually;
use crate::services::{assert_world, assert_world_within, cluster_or_skip, put_steady, put_world, with_steady_traffic};

/// Attempts are up to half a minute apart by then.
const RETURN: Duration = Duration::from_secs(150);

/// Attempts are seconds apart by then. (Hours of them are in `sources/kubernetes.rs`, whose clock is the test's.)
const AWAY: Duration = Duration::from_secs(5);

/// The server has what the directory of manifests has.
fn upload(cluster: &ApiCluster) {
    let mut there = Vec::new();
    for file in fs::read_dir(&cluster.manifests.dir).unwrap().flatten() {
        let list: Value = serde_json::from_str(&fs::read_to_string(file.path()).unwrap()).unwrap();
        there.extend(list["items"].as_array().unwrap().clone());
    }
    for (kind, resource) in [("Service", Resource::Services), ("EndpointSlice", Resource::EndpointSlices)] {
        for object in there.iter().filter(|object| object["kind"] == kind) {
            cluster.server.upsert(object.clone());
        }
        for gone in ["passing", "passing-v4", "passing-v6"] {
            let is_wanted = there.iter().any(|object| object["kind"] == kind && object["metadata"]["name"] == gone);
            if !is_wanted && cluster.server.get(resource, "default", gone).is_some() {
                cluster.server.delete(resource, "default", gone);
            }
        }
    }
}

/// Puts this world on the server.
pub fn change(cluster: &ApiCluster, number: usize) {
    put_world(cluster, number);
    upload(cluster);
}

#[test]
fn an_api_server_that_is_away_for_long_and_returns_with_another_world_costs_nobody_a_connection() {
    let Some(cluster) = cluster_or_skip() else { return };
    let cluster = ApiCluster::on(cluster);
    put_steady(&cluster);
    change(&cluster, 1);
    let mut daemon = cluster.start();
    assert_world(&cluster, 1, "before");
    with_steady_traffic(&cluster, "an outage of the API server", || {
        cluster.server.set_down(true);
        let is_away = || daemon.metric("kubelane_source_connected").unwrap() == 0.0;
        assert!(eventually(PATIENCE, is_away), "{}", daemon.log());
        std::thread::sleep(AWAY);
        assert_world(&cluster, 1, "nobody is there");
        // It has forgotten what happened meanwhile. (Versions that begin anew are in `sources/lists.rs`.)
        change(&cluster, 2);
        cluster.server.compact();
        for resource in [Resource::Services, Resource::EndpointSlices] {
            let error = |status: u16| Answer::Body(status, "{}".to_owned());
            // One that nobody answers is given up after half a minute: in longer runs only.
            let answers = match points(1) {
                1 => vec![error(500)],
                _ => vec![Answer::Hang, error(503), error(500)],
            };
            cluster.server.script(resource, Verb::StreamingList, answers);
        }
        cluster.server.set_down(false);
        let took = assert_world_within(&cluster, 2, RETURN, "another world");
        println!("right {took:.1?} after its return");
        daemon.check_running().unwrap();
        change(&cluster, 3);
        assert_world_within(&cluster, 3, PATIENCE, "watched again");
    });
}
