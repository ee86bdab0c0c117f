//! Memory runs out: of the group that the maps are charged to, while a large world arrives.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use serde_json::{Value, json};

use crate::laboratory::cluster::{Cluster, all, names};
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::manifests::{Endpoint, port, service, slice};
use crate::laboratory::messages::Kind::Tcp4;
use crate::laboratory::{eventually, skip};
use crate::services::{
    NODE_PORT, Whose, assert_world, cluster_or_skip, logged, put_steady, put_world, with_steady_traffic,
    with_traffic_of,
};

/// As many as fit into maps that have not grown: larger ones would be another group's.
const FEW: usize = 2500;
const MANY: usize = 6000;
/// For how long there is no memory.
const HELD: Duration = Duration::from_secs(2);

/// Cluster IPs and port of one of them.
fn address(number: usize) -> SocketAddr {
    (Ipv4Addr::new(10, 97, (number / 200) as u8, (1 + number % 200) as u8), 90).into()
}

fn all_are_there(daemon: &Daemon<'_>, services: usize) -> bool {
    daemon.metric("kubelane_frontends").is_ok_and(|frontends| frontends >= services as f64)
}

/// Services with an endpoint each.
fn large_world(cluster: &Cluster, services: usize) -> Vec<Value> {
    let endpoints: Vec<Endpoint> = cluster.ready(&["b"]).into_iter().filter(|end| end.address().is_ipv4()).collect();
    let of = |number: usize| {
        let (name, ip) = (format!("many-{number}"), address(number).ip());
        let spec = json!({"clusterIP": ip, "clusterIPs": [ip], "ports": [port("tcp", "TCP", 90)]});
        [service(&name, spec), slice(&format!("{name}-1"), &name, &[("tcp", "TCP", 9000)], &endpoints)]
    };
    (0..services).flat_map(of).collect()
}

#[test]
fn maps_without_memory_are_told_of_what_is_there_is_served_and_the_rest_comes_with_more() {
    let Some(cluster) = cluster_or_skip() else { return };
    let Some(group) = cluster.lab.memory_group("node1") else {
        return skip("no hierarchy of cgroups has the memory controller");
    };
    put_steady(&cluster);
    put_world(&cluster, 1);
    // Who makes the maps is charged for them for ever.
    Daemon::start_in(&cluster.lab, "node1", &cluster.manifests.dir, &group).unwrap().kill();
    let daemon = Daemon::start(&cluster.lab, "node1", &cluster.manifests.dir).unwrap();
    with_traffic_of(&cluster, Whose::AllButNewFromOutside, "no memory for maps", || {
        let at = logged(&cluster, 0).len();
        group.leave(64 << 10).unwrap();
        cluster.manifests.save("many", &large_world(&cluster, FEW));
        let is_told = || logged(&cluster, at).contains("map entries (map ");
        assert!(eventually(PATIENCE, is_told), "{}", logged(&cluster, at));
        let said = logged(&cluster, at);
        assert!(said.contains("Cannot allocate memory") && said.contains("raise the one or free the other"), "{said}");
        assert_world(&cluster, 1, "no memory");
        std::thread::sleep(HELD);
        assert!(!all_are_there(&daemon, FEW), "the limit was no limit");
        group.limit(None).unwrap();
        assert!(eventually(PATIENCE, || all_are_there(&daemon, FEW)), "{}", daemon.log());
        let mut client = cluster.client("client");
        for number in [0, FEW / 2, FEW - 1] {
            let answers = client.ask(Tcp4, address(number), 5);
            assert_eq!(names(&answers), ["b"], "{number}: {answers:?}");
        }
        let node = (cluster.lab.node("node1").host.v4, NODE_PORT + 90).into();
        assert_eq!(cluster.lab.client_outside().unwrap().ask(Tcp4, node, 10), all("a", 10));
    });
}

/// The daemon itself is in the group: the kernel may kill it, or refuse it memory for maps. What it has served goes on.
#[test]
fn a_daemon_that_is_killed_for_want_of_memory_is_not_missed_and_the_next_one_makes_all_right() {
    let Some(cluster) = cluster_or_skip() else { return };
    let Some(group) = cluster.lab.memory_group("node1") else {
        return skip("no hierarchy of cgroups has the memory controller");
    };
    put_steady(&cluster);
    put_world(&cluster, 1);
    // Maps that are another group's: only the daemon's own memory is short, and flows have all they need.
    Daemon::start(&cluster.lab, "node1", &cluster.manifests.dir).unwrap().kill();
    let mut daemon = Daemon::start_in(&cluster.lab, "node1", &cluster.manifests.dir, &group).unwrap();
    with_steady_traffic(&cluster, "no memory for the daemon", || {
        group.leave(4 << 20).unwrap();
        cluster.manifests.save("many", &large_world(&cluster, MANY));
        assert!(eventually(PATIENCE, || daemon.check_running().is_err()), "it takes no memory: {}", daemon.log());
        group.limit(None).unwrap();
        let next = Daemon::start_in(&cluster.lab, "node1", &cluster.manifests.dir, &group).unwrap();
        assert!(eventually(PATIENCE, || all_are_there(&next, MANY)), "{}", next.log());
        assert_world(&cluster, 1, "the next daemon");
    });
}
