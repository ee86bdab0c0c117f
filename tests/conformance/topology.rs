//! Traffic distribution: hints of zones and nodes, a Node whose zone changes, and cluster IPs of several ranges.

use serde_json::{Value, json};

use crate::case_cluster::{By, CaseCluster, From, HTTP, node, node_name};
use crate::laboratory::manifests::Endpoint;
use crate::laboratory::skip;

cases![
    endpoints_of_the_same_zone,
    endpoints_of_the_same_node,
    a_node_whose_zone_changes,
    cluster_ips_of_several_ranges,
    one_family_only,
];

const CLIENT: From = From::Pod("client");

fn hinted(world: &CaseCluster, hints: &[(&str, Value)]) -> Vec<Endpoint> {
    let of = |(pod, hint): &(&str, Value)| {
        let endpoints = world.ready(&[pod]);
        endpoints.into_iter().map(|endpoint| endpoint.hinted(hint.clone())).collect::<Vec<_>>()
    };
    hints.iter().flat_map(of).collect()
}

fn zone(name: &str) -> Value {
    json!({"forZones": [{"name": name}]})
}

/// With a hint missing, or none for this zone, everybody answers.
fn endpoints_of_the_same_zone(world: &CaseCluster) {
    let served = world.simple("zoned", json!({"trafficDistribution": "PreferClose"}), &["a", "b", "c"]);
    let put = |hints: &[(&str, Value)]| world.slices("zoned", &HTTP, &hinted(world, hints));
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["a", "b", "c"]);
    put(&[("a", zone("zone-1")), ("b", zone("zone-1")), ("c", zone("zone-2"))]);
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["a", "b"]);
    world.reaches(From::Host, By::Tcp, &served.at(80), &["a", "b"]);
    put(&[
        ("a", zone("zone-2")),
        ("b", zone("zone-1")),
        ("c", json!({"forZones": [{"name": "zone-1"}, {"name": "zone-2"}]})),
    ]);
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["b", "c"]);
    put(&[("a", zone("zone-2")), ("b", zone("zone-3")), ("c", zone("zone-3"))]);
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["a", "b", "c"]);
    put(&[("a", zone("zone-1")), ("b", zone("zone-2")), ("c", json!({}))]);
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["a", "b", "c"]);
    world.gone("zoned");
}

/// Node hints win over those of zones; without one for this node those of zones count.
fn endpoints_of_the_same_node(world: &CaseCluster) {
    let served = world.simple("noded", json!({}), &["a", "b", "c"]);
    let on = |node: &str, zone: &str| json!({"forNodes": [{"name": node_name(&world.api.run, node)}], "forZones": [{"name": zone}]});
    let put = |hints: &[(&str, Value)]| world.slices("noded", &HTTP, &hinted(world, hints));
    put(&[("a", on("node1", "zone-1")), ("b", on("node2", "zone-1")), ("c", on("node2", "zone-1"))]);
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["a"]);
    put(&[("b", on("node2", "zone-1")), ("c", on("node2", "zone-2"))]);
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["b"]);
    put(&[("b", on("node2", "zone-2")), ("c", on("node2", "zone-2"))]);
    world.reaches(CLIENT, By::Tcp, &served.at(80), &["b", "c"]);
    world.gone("noded");
}

fn a_node_whose_zone_changes(world: &CaseCluster) {
    let served = world.simple("moved", json!({}), &[]);
    let hints = [("a", zone("zone-1")), ("b", zone("zone-2")), ("c", zone("zone-2"))];
    world.slices("moved", &HTTP, &hinted(world, &hints));
    let own = node(&world.api.run, 1, "zone-1");
    for (zone, who) in [
        (json!("zone-1"), &["a"][..]),
        (json!("zone-2"), &["b", "c"]),
        (Value::Null, &["a", "b", "c"]),
        (json!("zone-1"), &["a"]),
    ] {
        world.api.patch(&own, "", &json!({"metadata": {"labels": {"topology.kubernetes.io/zone": zone}}}));
        world.reaches(CLIENT, By::Tcp, &served.at(80), who);
    }
    world.gone("moved");
}

/// A second range, as a ServiceCIDR object adds one. A real server would have to be given one for itself alone.
fn cluster_ips_of_several_ranges(world: &CaseCluster) {
    if world.api.is_real() {
        return skip("cluster_ips_of_several_ranges: a real API server's ranges are not the test's to change");
    }
    for ips in [["10.97.200.1", "fd97::1"], ["192.168.200.9", "fd98:1::9"]] {
        let served = world.simple("ranged", json!({"clusterIP": ips[0], "clusterIPs": ips}), &["a", "b"]);
        world.reaches(CLIENT, By::Tcp, &served.at(80), &["a", "b"]);
        world.refused(CLIENT, By::Tcp, &served.at(81));
        world.gone("ranged");
    }
}

/// A Service of one family takes that family's endpoints only.
fn one_family_only(world: &CaseCluster) {
    for family in ["IPv4", "IPv6"] {
        let mut spec = json!({"ipFamilyPolicy": "SingleStack", "ipFamilies": [family]});
        spec["ports"] = json!([{"name": "http", "protocol": "TCP", "port": 80}]);
        let Ok(served) = world.try_service("single", json!({}), spec) else {
            skip(&format!("one_family_only: the API server has no {family} Services"));
            continue;
        };
        world.slices("single", &HTTP, &world.ready(&["a", "b"]));
        assert_eq!(served.at(80).len(), 1);
        world.reaches(CLIENT, By::Tcp, &served.at(80), &["a", "b"]);
        world.gone("single");
    }
}
