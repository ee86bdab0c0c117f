//! What makes which Service dirty, and what a relist leaves.

use super::*;
use crate::model::{Endpoint, Family, Masquerade, TrafficPolicy};

fn name(text: &str) -> ObjectName {
    ObjectName::new("default", text)
}

fn service(object: &str, cluster_ip: &str) -> Change {
    Change::Service(Box::new(Service {
        name: name(object),
        created: 0,
        cluster_ips: vec![cluster_ip.parse().unwrap()],
        external_ips: vec![],
        load_balancer_ips: vec![],
        ports: vec![],
        affinity_seconds: None,
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        source_ranges: vec![],
        health_check_node_port: 0,
        client_source: None,
    }))
}

fn slice(object: &str, of: &str, hosts: u8) -> Change {
    let endpoint = |host: u8| Endpoint {
        ip: std::net::Ipv4Addr::new(10, 1, 0, host).into(),
        ready: true,
        serving: true,
        terminating: false,
        node: None,
        hints: None,
    };
    let endpoints = (0..hosts).map(endpoint).collect();
    Change::Slice(Box::new(Slice {
        name: name(object),
        service: of.into(),
        is_controlled: false,
        ports: vec![],
        endpoints,
        triggered: None,
    }))
}

fn node(object: &str, zone: Option<&str>) -> Change {
    Change::Node(Box::new(Node { name: object.into(), zone: zone.map(Into::into), ..Node::default() }))
}

/// A world with Services a and b, each with a slice; nothing dirty.
fn world() -> World {
    let mut world = World::new("here", Masquerade::default());
    let changes = [service("a", "10.96.0.1"), service("b", "10.96.0.2"), slice("a-1", "a", 2), slice("b-1", "b", 1)];
    apply(&mut world, changes);
    world.take_dirty();
    world
}

fn apply(world: &mut World, changes: impl IntoIterator<Item = Change>) {
    let mut book = WarningBook::default();
    changes.into_iter().for_each(|change| world.apply(change, &mut book));
}

fn dirty(world: &mut World) -> String {
    world.take_dirty().iter().map(|n| &*n.name).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_change_makes_dirty_what_it_touches_and_nothing_else() {
    let mut retriggered = slice("a-1", "a", 2);
    if let Change::Slice(slice) = &mut retriggered {
        slice.triggered = Some(1);
    }
    let table: Vec<(&str, Vec<Change>, &str)> = vec![
        ("a Service that changed", vec![service("a", "10.96.0.9")], "a"),
        ("a Service as it was", vec![service("a", "10.96.0.1")], ""),
        ("a Service that went", vec![Change::ServiceGone(name("b"))], "b"),
        ("a Service nobody knew", vec![Change::ServiceGone(name("x"))], ""),
        ("a slice that changed", vec![slice("b-1", "b", 3)], "b"),
        ("a slice as it was", vec![slice("b-1", "b", 1)], ""),
        ("a slice with another trigger time only", vec![retriggered], ""),
        ("a slice that moved to another Service", vec![slice("a-1", "b", 2)], "a b"),
        ("a slice that went", vec![Change::SliceGone(name("a-1"))], "a"),
        ("a slice nobody knew", vec![Change::SliceGone(name("x"))], ""),
        ("the Node with a zone", vec![node("here", Some("z"))], "a b"),
        ("the Node without a zone", vec![node("here", None)], ""),
        ("another Node", vec![node("there", Some("z"))], ""),
    ];
    for (sentence, changes, expected) in table {
        let mut world = world();
        apply(&mut world, changes);
        assert_eq!(dirty(&mut world), expected, "{sentence}");
    }
}

#[test]
fn the_zone_going_with_the_node_touches_everything_again() {
    let mut world = world();
    apply(&mut world, [node("here", Some("z"))]);
    assert_eq!(dirty(&mut world), "a b");
    apply(&mut world, [Change::ListBegin(Kind::Node), node("here", Some("z")), Change::ListEnd(Kind::Node)]);
    assert_eq!(dirty(&mut world), "");
    apply(&mut world, [Change::ListBegin(Kind::Node), Change::ListEnd(Kind::Node)]);
    assert_eq!((dirty(&mut world).as_str(), world.node()), ("a b", None));
}

#[test]
fn a_bound_address_touches_only_services_with_that_cluster_ip() {
    let mut world = world();
    let bound = |all: &[&str]| all.iter().map(|a| a.parse().unwrap()).collect();
    world.set_bound(bound(&["10.96.0.2", "10.9.9.9"]));
    assert_eq!(dirty(&mut world), "b");
    world.set_bound(bound(&["10.96.0.2"]));
    assert_eq!(dirty(&mut world), "");
    world.set_bound(bound(&["10.96.0.1"]));
    assert_eq!(dirty(&mut world), "a b");
}

#[test]
fn a_relist_sweeps_what_it_did_not_name_and_only_of_its_kind() {
    let mut world = world();
    apply(&mut world, [Change::ListBegin(Kind::Services), service("a", "10.96.0.1"), service("c", "10.96.0.3")]);
    assert_eq!(dirty(&mut world), "c", "nothing is swept before the end");
    apply(&mut world, [Change::ListEnd(Kind::Services)]);
    assert_eq!((dirty(&mut world).as_str(), world.counts()), ("b", (2, 2, 3)));
    apply(&mut world, [Change::ListBegin(Kind::EndpointSlices), slice("b-1", "b", 1)]);
    apply(&mut world, [Change::ListEnd(Kind::EndpointSlices)]);
    assert_eq!((dirty(&mut world).as_str(), world.counts()), ("a", (2, 1, 1)));
}

#[test]
fn a_list_that_starts_again_counts_from_its_last_start() {
    let mut world = world();
    apply(&mut world, [Change::ListBegin(Kind::Services), service("a", "10.96.0.1")]);
    apply(&mut world, [Change::ListBegin(Kind::Services), service("b", "10.96.0.2"), Change::ListEnd(Kind::Services)]);
    assert_eq!(dirty(&mut world), "a");
}

#[test]
fn the_world_is_ready_when_services_and_slices_have_listed() {
    let mut world = World::new("here", Masquerade::default());
    for (change, ready) in [
        (Change::ListBegin(Kind::Services), false),
        (Change::ListEnd(Kind::Services), false),
        (Change::ListEnd(Kind::Node), false),
        (Change::ListBegin(Kind::EndpointSlices), false),
        (Change::ListEnd(Kind::EndpointSlices), true),
        (Change::ListBegin(Kind::Services), true),
    ] {
        apply(&mut world, [change.clone()]);
        assert_eq!(world.ready(), ready, "{change:?}");
    }
}

#[test]
fn slices_may_come_before_their_service_and_stay_after_it() {
    let mut world = World::new("here", Masquerade::default());
    apply(&mut world, [slice("a-1", "a", 2)]);
    assert!(world.compile(&name("a")).is_none());
    apply(&mut world, [service("a", "10.96.0.1")]);
    assert!(world.compile(&name("a")).is_some());
    apply(&mut world, [Change::ServiceGone(name("a"))]);
    assert_eq!((world.counts(), world.entries.len()), ((0, 1, 2), 1));
    apply(&mut world, [Change::SliceGone(name("a-1"))]);
    assert_eq!((world.counts(), world.entries.len()), ((0, 0, 0), 0));
}

fn retriggered(object: &str, of: &str, hosts: u8, triggered: i64) -> Change {
    match slice(object, of, hosts) {
        Change::Slice(slice) => Change::Slice(Box::new(Slice { triggered: Some(triggered), ..*slice })),
        other => other,
    }
}

#[test]
fn triggers_count_when_their_slice_changed_and_the_daemon_was_there() {
    let ipv4 = |at: i64| (Family::Ipv4, at);
    type Row = (&'static str, Vec<Change>, Vec<(Family, i64)>);
    let table: Vec<Row> = vec![
        ("a new slice", vec![retriggered("a-2", "a", 1, 101)], vec![ipv4(101)]),
        (
            "two changes of one",
            vec![retriggered("a-1", "a", 1, 101), retriggered("a-1", "a", 3, 102)],
            vec![ipv4(101), ipv4(102)],
        ),
        ("all endpoints gone", vec![retriggered("a-1", "a", 0, 101)], vec![ipv4(101)]),
        ("before the daemon", vec![retriggered("a-1", "a", 1, 100)], vec![]),
        ("without an annotation", vec![slice("a-1", "a", 1)], vec![]),
        ("nothing but the annotation", vec![retriggered("a-1", "a", 2, 101)], vec![]),
        ("never an endpoint", vec![retriggered("a-2", "a", 0, 101)], vec![]),
        ("a slice that went", vec![retriggered("a-1", "a", 1, 101), Change::SliceGone(name("a-1"))], vec![]),
    ];
    for (what, changes, expected) in table {
        let mut world = world();
        world.arrivals_mut().measure_after(100);
        apply(&mut world, changes);
        assert_eq!(world.arrivals_mut().settle(), expected, "{what}");
        assert_eq!(world.arrivals_mut().settle(), [], "{what}: twice");
    }
}

#[test]
fn what_comes_is_counted_and_waits_for_a_sync_when_it_changed_anything() {
    let mut world = world();
    world.arrivals_mut().settle();
    let before = (world.arrivals().services, world.arrivals().slices);
    apply(
        &mut world,
        [service("a", "10.96.0.1"), service("b", "10.96.0.9"), slice("a-1", "a", 2), slice("a-1", "a", 3)],
    );
    apply(
        &mut world,
        [Change::ListBegin(Kind::Services), Change::ListEnd(Kind::Services), Change::SliceGone(name("b-1"))],
    );
    let Arrivals { services, slices, .. } = world.arrivals();
    assert_eq!((services.total - before.0.total, services.pending), (4, 3));
    assert_eq!((slices.total - before.1.total, slices.pending), (3, 2));
    world.arrivals_mut().settle();
    assert_eq!((world.arrivals().services.pending, world.arrivals().slices.pending), (0, 0));
}
