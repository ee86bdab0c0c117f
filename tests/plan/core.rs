//! The control plane from events to rows, case by case: what a change costs, who owns what is contested, and
//! what happens when rows fail or there is no room. The model kernel judges every row written.

use std::time::Duration;

use crate::bench::{Bench, hosts, web};
use crate::model_kernel::ModelKernel;
use crate::records::{ip, list, name, new_core, node, port, ready, service, slice, terminating, unready, zones};
use kubelane::abi::FrontendKey;
use kubelane::abi::frontend_flag::FRONTEND_SOURCE_RANGES;
use kubelane::model::{Change, Endpoint, IpRange, Kind, Protocol, Service, Slice, SocketAddrx, Warning};
use kubelane::sync::MapName;

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn nothing_is_written_before_both_kinds_have_listed() {
    let mut bench = Bench { kernel: ModelKernel::default(), core: new_core() };
    bench.core.apply(Change::ListBegin(Kind::Services));
    bench.core.apply(Change::Service(Box::new(service("web", "10.96.0.1"))));
    bench.core.apply(Change::ListEnd(Kind::Services));
    assert_eq!((bench.core.ready(), bench.sync().calls), (false, 0));
    bench.core.apply(Change::ListBegin(Kind::EndpointSlices));
    bench.core.apply(Change::ListEnd(Kind::EndpointSlices));
    assert_eq!((bench.core.ready(), bench.sync().calls), (true, 3));
}

#[test]
fn a_change_costs_what_it_changes_and_not_what_is_there() {
    type Step = (&'static str, Vec<Endpoint>, &'static [&'static str]);
    let table: Vec<Step> = vec![
        ("one added", hosts(0..101), &["backends 1", "slots 1", "frontends 2"]),
        ("one replaced", hosts(1..101), &["backends 1", "slots 1", "backends 1"]),
        ("the last removed", hosts(0..99), &["frontends 2", "backends 1"]),
        (
            "one removed from the middle",
            [hosts(0..50), hosts(51..100)].concat(),
            &["slots 1", "frontends 2", "backends 1"],
        ),
        ("nothing changed", hosts(0..100), &[]),
        ("grown beyond its region", hosts(0..129), &["backends 29", "slots 129", "frontends 2"]),
    ];
    for (sentence, endpoints, calls) in table {
        let mut both = service("web", "10.96.0.1");
        both.external_ips = vec![ip("192.0.2.1")];
        let mut bench = Bench::with(&[both, service("other", "10.96.0.2")], &[web(0..100)]);
        let report = bench.slice(slice("web-1", "web", endpoints));
        assert_eq!(bench.calls(), *calls, "{sentence}");
        assert_eq!(report.calls, calls.len(), "{sentence}");
        assert!(report.services <= 1, "{sentence}");
    }
}

#[test]
fn a_backend_that_is_drained_and_comes_back_keeps_its_id() {
    let mut bench = Bench::with(&[service("web", "10.96.0.1")], &[slice("web-1", "web", vec![ready("10.1.0.1")])]);
    bench.slice(slice("web-1", "web", vec![terminating("10.1.0.1"), ready("10.1.0.2")]));
    assert_eq!(bench.inside("10.96.0.1", 80), ["10.1.0.2"]);
    assert_eq!((bench.kernel.backends[&1].state, bench.kernel.backends[&1].pools), (2, 0));
    bench.slice(slice("web-1", "web", vec![ready("10.1.0.1"), ready("10.1.0.2")]));
    assert_eq!((bench.kernel.backends[&1].state, bench.kernel.backends[&1].generation), (1, 1));
}

#[test]
fn a_backend_that_goes_is_reported_with_its_protocol() {
    let mut bench = Bench::with(&[service("web", "10.96.0.1")], &[web(0..2)]);
    let report = bench.slice(slice("web-1", "web", vec![unready("10.1.0.1"), ready("10.1.0.2")]));
    assert_eq!(report.backends_gone, [(Protocol::Tcp, SocketAddrx { ip: ip("10.1.0.1"), port: 8080 })]);
    assert_eq!(bench.inside("10.96.0.1", 80), ["10.1.0.2"]);
}

#[test]
fn the_oldest_service_owns_a_contested_frontend_and_the_next_takes_over() {
    let contender = |object: &str, cluster_ip: &str, created: i64| Service {
        external_ips: vec![ip("192.0.2.1")],
        created,
        ..service(object, cluster_ip)
    };
    let all = [contender("a", "10.96.0.1", 300), contender("b", "10.96.0.2", 200), contender("c", "10.96.0.3", 200)];
    let slices = ["a", "b", "c"].map(|s| slice(&format!("{s}-1"), s, vec![ready("10.1.0.1")]));
    let mut bench = Bench { kernel: ModelKernel::default(), core: new_core() };
    list(&mut bench.core, all.clone(), slices);
    let report = bench.sync();
    assert_eq!(bench.owner("192.0.2.1", 80), "default/b:http");
    let loses = |loser: &str, winner: &str, also: &str| Warning {
        subject: format!("Service default/{loser}"),
        message: format!(
            "192.0.2.1:80/TCP belongs to Service default/{winner}, which is older or first by name: not served here{also}"
        ),
    };
    let of_three = loses("a", "b", ", nor for default/c");
    assert_eq!(report.warnings, std::slice::from_ref(&of_three));
    assert!(bench.sync().warnings.is_empty(), "warned of once");

    bench.core.apply(Change::ServiceGone(name("b")));
    let report = bench.sync();
    assert_eq!(bench.owner("192.0.2.1", 80), "default/c:http");
    assert_eq!((report.warnings, report.resolved), (vec![loses("a", "c", "")], vec![of_three]));

    bench.service(contender("a", "10.96.0.1", 100));
    assert_eq!(bench.owner("192.0.2.1", 80), "default/a:http");
    bench.core.apply(Change::ServiceGone(name("a")));
    bench.core.apply(Change::ServiceGone(name("c")));
    let report = bench.sync();
    assert_eq!((bench.row("192.0.2.1", 80), report.resolved), (None, vec![loses("c", "a", "")]));
    assert!(bench.kernel.addresses.is_empty());
}

#[test]
fn an_address_stays_while_one_service_still_claims_it() {
    let with_vip = |object: &str, cluster_ip: &str, number: u16| Service {
        external_ips: vec![ip("192.0.2.1")],
        ports: vec![port("http", Protocol::Tcp, number)],
        ..service(object, cluster_ip)
    };
    let mut bench = Bench::with(&[with_vip("a", "10.96.0.1", 80), with_vip("b", "10.96.0.2", 81)], &[]);
    bench.core.apply(Change::ServiceGone(name("a")));
    bench.sync();
    assert_eq!(
        bench.kernel.addresses.keys().map(|a| kubelane::model::Ipx(*a).to_string()).collect::<Vec<_>>(),
        ["10.96.0.2", "192.0.2.1"]
    );
}

#[test]
fn node_addresses_follow_the_agent_and_keep_their_other_roles() {
    let mut vip = service("web", "10.96.0.1");
    vip.external_ips = vec![ip("192.0.2.1")];
    let mut bench = Bench::with(&[vip], &[]);
    bench.core.set_node_addresses(vec![ip("192.0.2.1"), ip("198.51.100.1")], vec![]);
    bench.sync();
    let flags = |bench: &Bench, address| bench.kernel.addresses.get(&ip(address).0).copied();
    assert_eq!((flags(&bench, "192.0.2.1"), flags(&bench, "198.51.100.1")), (Some(6), Some(4)));
    bench.core.set_node_addresses(vec![], vec![]);
    bench.sync();
    assert_eq!((flags(&bench, "192.0.2.1"), flags(&bench, "198.51.100.1")), (Some(2), None));
}

#[test]
fn a_cluster_ip_refuses_unknown_ports_only_while_all_its_frontends_are_in() {
    let mut bench = Bench { kernel: ModelKernel::default(), core: new_core() };
    list(&mut bench.core, [service("web", "10.96.0.1")], [web(0..1)]);
    bench.kernel.fails = Box::new(|map| map == MapName::Frontends);
    bench.sync();
    assert!(!bench.kernel.refuses(ip("10.96.0.1")), "the frontend failed, so the port must not be refused");
    bench.kernel.never_fails();
    bench.sync();
    assert!(bench.kernel.refuses(ip("10.96.0.1")));

    // A node-local cache now listens on the address: the refusal goes first, or the frontend stays.
    bench.core.set_node_addresses(vec![], vec![ip("10.96.0.1")]);
    bench.kernel.fails = Box::new(|map| map == MapName::Addresses);
    bench.sync();
    assert!(bench.row("10.96.0.1", 80).is_some(), "without its frontend the address would refuse");
    bench.kernel.never_fails();
    bench.sync();
    assert_eq!((bench.row("10.96.0.1", 80), bench.kernel.refuses(ip("10.96.0.1"))), (None, false));
}

#[test]
fn a_failing_service_does_not_hold_back_the_others() {
    for map in [MapName::Services, MapName::Backends, MapName::Slots, MapName::Frontends] {
        let mut bench = Bench { kernel: ModelKernel::default(), core: new_core() };
        let services = [service("a", "10.96.0.1"), service("b", "10.96.0.2")];
        list(&mut bench.core, services, [slice("a-1", "a", hosts(0..1)), slice("b-1", "b", hosts(0..1))]);
        let mut first = true;
        bench.kernel.fails = Box::new(move |m| m == map && std::mem::take(&mut first));
        let report = bench.sync();
        assert_eq!((report.failures.len(), report.failures[0].0), (1, map));
        assert!(bench.row("10.96.0.1", 80).is_none() && bench.core.pending(), "{map:?}");
        assert_eq!(bench.inside("10.96.0.2", 80), ["10.1.0.1"], "{map:?}");
        bench.sync();
        assert_eq!(bench.inside("10.96.0.1", 80), ["10.1.0.1"], "{map:?}");
        assert!(!bench.core.pending());
    }
}

#[test]
fn a_backend_is_not_gone_while_a_frontend_that_failed_may_lead_to_it() {
    let mut bench = Bench::with(&[service("web", "10.96.0.1")], &[web(0..3)]);
    bench.kernel.fails = Box::new(|map| map == MapName::Frontends);
    let report = bench.slice(web(0..2));
    assert_eq!((report.backends_gone.len(), bench.kernel.backends[&3].state), (0, 1));
    // Meanwhile it comes back: nothing is left to do, and it is the same assignment.
    let report = bench.slice(web(0..3));
    assert_eq!((report.calls, bench.core.pending(), bench.kernel.backends[&3].generation), (0, false, 1));
}

#[test]
fn five_thousand_endpoints_in_one_service_are_all_served() {
    let slices: Vec<Slice> =
        (0..50).map(|n| slice(&format!("web-{n}"), "web", hosts(n * 100..(n + 1) * 100))).collect();
    let mut kernel = ModelKernel::default();
    kernel.judging = false;
    let mut bench = Bench::on(kernel, &[service("web", "10.96.0.1")], &slices);
    bench.kernel.check();
    assert_eq!(bench.row("10.96.0.1", 80).unwrap().inside.count, 5000);
    let mut one_less = slices[7].clone();
    one_less.endpoints.remove(50);
    bench.slice(one_less);
    assert_eq!(bench.calls(), ["slots 1", "frontends 1", "backends 1"]);
    bench.kernel.check();
}

#[test]
fn a_map_that_could_not_grow_is_waited_for_and_not_called_full() {
    let services = [service("a", "10.96.0.1"), service("b", "10.96.0.2")];
    let slices = [slice("a-1", "a", hosts(0..1)), slice("b-1", "b", hosts(1..2))];
    let mut bench = Bench { kernel: ModelKernel::default(), core: new_core() };
    bench.kernel.room.insert(MapName::Frontends, 1);
    list(&mut bench.core, services, slices);
    let report = bench.sync();
    assert_eq!((report.failures.len(), report.rows_without_room, report.waits), (1, 0, true));
    assert_eq!(report.warnings, [], "no flag would help");
    assert_eq!(bench.inside("10.96.0.1", 80).len(), 1);

    bench.kernel.room.clear();
    let report = bench.sync();
    assert_eq!((report.failures.len(), report.waits), (0, false));
    assert_eq!(bench.inside("10.96.0.2", 80).len(), 1);
}

#[test]
fn a_full_map_is_warned_of_with_its_remedy_and_the_rest_goes_on() {
    // Three backends (index 0 is never used), plenty of slots.
    let services = [service("a", "10.96.0.1"), service("b", "10.96.0.2")];
    let slices = [slice("a-1", "a", hosts(0..2)), slice("b-1", "b", hosts(0..2))];
    let mut bench = Bench { kernel: ModelKernel::with_capacity(100, 4, 100), core: new_core() };
    list(&mut bench.core, services, slices);
    let report = bench.sync();
    assert_eq!(
        report.warnings,
        [Warning {
            subject: "Service default/b".into(),
            message: "endpoints beyond 1 of each port are left out: they exceed this Service's quota of the maps; use \
                      fewer, or start kubelane with a higher --max-endpoints"
                .into(),
        }]
    );
    assert_eq!((bench.inside("10.96.0.1", 80).len(), bench.inside("10.96.0.2", 80).len()), (2, 1));
    assert_eq!(bench.core.next_due(), None, "nothing rests that could be waited for");

    // An endpoint of the other goes; after its rest the id serves the one that waits.
    let report = bench.slice(slice("a-1", "a", hosts(0..1)));
    assert_eq!(
        report.warnings[0].message.split(';').next(),
        Some("1 endpoints are left out: the map backends is full")
    );
    assert_eq!(bench.core.next_due(), Some(bench.kernel.now + SECOND));
    bench.kernel.now += SECOND;
    let report = bench.sync();
    assert_eq!((report.resolved.len(), bench.inside("10.96.0.2", 80).len(), bench.core.next_due()), (1, 2, None));
}

#[test]
fn full_slots_leave_what_fits_and_a_full_hash_map_is_named() {
    let mut bench = Bench::on(ModelKernel::with_capacity(100, 100, 6), &[service("a", "10.96.0.1")], &[]);
    let report = bench.slice(slice("a-1", "a", hosts(0..7)));
    assert_eq!(report.warnings.len(), 1);
    assert!(report.warnings[0].message.starts_with("3 endpoints get no connections: the map slots is full"));
    assert_eq!(bench.inside("10.96.0.1", 80).len(), 4);
}

#[test]
fn a_map_that_others_have_filled_is_a_shortage_and_no_update_that_waits() {
    let mut bench = Bench::with(&[service("a", "10.96.0.1")], &[]);
    let foreign = FrontendKey::new(ip("10.96.9.9"), 1, Protocol::Udp);
    let row = *bench.row("10.96.0.1", 80).unwrap();
    bench.kernel.judging = false;
    bench.kernel.frontends.insert(foreign, row);
    bench.kernel.capacity.insert(MapName::Frontends, 2);
    let report = bench.service(service("b", "10.96.0.2"));
    assert_eq!((report.failures.len(), report.warnings[0].subject.as_str()), (1, "map frontends"));
    assert!(bench.core.pending() && !report.waits, "it is tried again, but nothing waits");
    bench.kernel.frontends.remove(&foreign);
    let report = bench.sync();
    assert_eq!((report.resolved.len(), bench.core.pending()), (1, false));
    assert_eq!(bench.owner("10.96.0.2", 80), "default/b:http");

    bench.kernel.capacity.insert(MapName::Frontends, 10);
    bench.kernel.fails = Box::new(|map| map == MapName::Frontends);
    assert!(bench.service(service("c", "10.96.0.3")).waits, "an error of another kind");
}

#[test]
fn one_service_that_asks_for_more_than_there_is_disturbs_no_other_and_leaves_nothing_waiting() {
    let (mut hog, last) = (service("hog", "10.96.0.1"), service("last", "10.96.0.2"));
    hog.ports = (1..=1000).map(|n| port(&format!("p{n}"), Protocol::Tcp, n)).collect();
    hog.external_ips = (0..300).map(|n| ip(&format!("192.0.{}.{}", n / 250, n % 250))).collect();
    let mut kernel = ModelKernel::default();
    kernel.judging = false;
    let report = {
        let mut bench = Bench { kernel, core: new_core() };
        list(&mut bench.core, [hog.clone(), last.clone()], [slice("last-1", "last", hosts(0..1))]);
        let report = bench.sync();
        assert_eq!(bench.inside("10.96.0.2", 80), ["10.1.0.1"]);
        assert_eq!((bench.kernel.frontends.len(), bench.core.counts().degraded), (2001, 1), "a sixteenth of 40,000");
        assert!(!bench.core.pending() && !report.waits);
        hog.external_ips.truncate(1);
        let resolved = bench.service(hog).resolved;
        assert_eq!((resolved, bench.core.counts().degraded), (report.warnings.clone(), 0));
        report
    };
    assert_eq!(report.warnings.len(), 1);
    assert_eq!(report.warnings[0].subject, "Service default/hog");
    assert!(report.warnings[0].message.starts_with("external IPs beyond the first 1 are left out"));
}

/// A Service with the load balancer IP 192.0.2.1 for clients of these ranges, all /16.
fn filtered(ranges: &[&str]) -> Service {
    let range = |at: &&str| IpRange { ip: ip(at), prefix: 16 };
    Service {
        load_balancer_ips: vec![ip("192.0.2.1")],
        source_ranges: ranges.iter().map(range).collect(),
        ..service("web", "10.96.0.1")
    }
}

/// Clients of which ranges the load balancer IP lets in; `None`: all.
fn lets_in(bench: &Bench) -> Option<Vec<String>> {
    let row = bench.row("192.0.2.1", 80).expect("the frontend");
    let ranges = bench.kernel.source_ranges.keys().filter(|key| key.service_id == row.service_id);
    let ranges = ranges.map(|key| kubelane::model::Ipx(key.address).to_string()).collect();
    (row.flags & FRONTEND_SOURCE_RANGES != 0).then_some(ranges)
}

#[test]
fn a_service_that_begins_to_ask_for_source_ranges_is_never_left_open_whatever_fails() {
    for failing in [MapName::SourceRanges, MapName::Backends, MapName::Slots] {
        let mut bench = Bench::with(&[filtered(&[])], &[web(0..1)]);
        assert_eq!(lets_in(&bench), None);
        bench.kernel.fails = Box::new(move |map| map == failing);
        bench.core.apply(Change::Service(Box::new(filtered(&["10.1.0.0", "10.2.0.0"]))));
        assert!(bench.slice(web(0..3)).waits, "{failing:?}");
        let ranges = if failing == MapName::SourceRanges { 0 } else { 2 };
        assert_eq!(lets_in(&bench).map(|ranges| ranges.len()), Some(ranges), "{failing:?}");
        bench.kernel.never_fails();
        bench.sync();
        assert_eq!(lets_in(&bench).unwrap(), ["10.1.0.0", "10.2.0.0"], "{failing:?}");
        assert_eq!(bench.inside("192.0.2.1", 80).len(), 3, "{failing:?}");
    }
}

#[test]
fn a_source_range_that_is_taken_away_lets_nobody_in_whatever_else_fails() {
    for failing in [MapName::Backends, MapName::Slots, MapName::Frontends] {
        let mut bench = Bench::with(&[filtered(&["10.1.0.0", "10.2.0.0"])], &[web(0..1)]);
        bench.kernel.fails = Box::new(move |map| map == failing);
        bench.core.apply(Change::Service(Box::new(filtered(&["10.2.0.0"]))));
        assert!(bench.slice(web(0..3)).waits, "{failing:?}");
        assert_eq!(lets_in(&bench).unwrap(), ["10.2.0.0"], "{failing:?}");
        // No longer asked for at all: the frontend opens first, or nobody would get in.
        bench.core.apply(Change::Service(Box::new(filtered(&[]))));
        bench.sync();
        assert_eq!(lets_in(&bench).unwrap(), ["10.2.0.0"], "{failing:?}");
        bench.kernel.never_fails();
        bench.sync();
        assert_eq!((lets_in(&bench), bench.kernel.source_ranges.len()), (None, 0), "{failing:?}");
    }
}

#[test]
fn a_service_with_more_source_ranges_than_its_share_is_closed_and_others_have_theirs() {
    let (mut large, small) = (filtered(&[]), filtered(&["10.1.0.0"]));
    large.name = name("large");
    (large.cluster_ips, large.load_balancer_ips) = (vec![ip("10.96.0.9")], vec![ip("192.0.2.9")]);
    large.ports = (1..=12).map(|n| port(&format!("p{n}"), Protocol::Tcp, n)).collect();
    let ranges =
        |count: u32| (0..count).map(|n| IpRange { ip: ip(&format!("10.{}.{}.0", n / 250, n % 250)), prefix: 24 });
    let mut kernel = ModelKernel::default();
    kernel.judging = false;
    let mut bench = Bench::on(kernel, &[large.clone(), small.clone()], &[web(0..1)]);
    let flags = |bench: &Bench| bench.row("192.0.2.9", 7).unwrap().flags & FRONTEND_SOURCE_RANGES;
    assert_eq!(flags(&bench), 0);
    large.source_ranges = ranges(6000).collect();
    let report = bench.service(large.clone());
    assert_eq!((report.failures.len(), report.waits, bench.core.pending()), (0, false, false));
    assert_eq!((flags(&bench) != 0, bench.kernel.source_ranges.len()), (true, 1), "closed, the other's range is there");
    assert!(report.warnings[0].message.starts_with("loadBalancerSourceRanges, so that its load balancer IPs serve no"));
    assert_eq!(bench.core.counts().degraded, 1);
    large.source_ranges = ranges(200).collect();
    assert_eq!(bench.service(large).resolved, report.warnings);
    assert_eq!(bench.kernel.source_ranges.len(), 12 * 200 + 1);
}

#[test]
fn warnings_of_sources_pass_through_once_and_before_anything_is_listed() {
    let mut bench = Bench { kernel: ModelKernel::default(), core: new_core() };
    let warning = Warning { subject: "Service default/web".into(), message: "port 0 is not valid".into() };
    let say = |warnings| Change::Warnings { subject: "Service default/web".into(), warnings };
    bench.core.apply(say(vec![warning.clone()]));
    assert_eq!(bench.sync().warnings, std::slice::from_ref(&warning));
    bench.core.apply(say(vec![warning.clone()]));
    assert!(bench.sync().warnings.is_empty());
    bench.core.apply(say(vec![]));
    assert_eq!(bench.sync().resolved, [warning]);
}

#[test]
fn topology_follows_the_node_as_its_zone_changes() {
    let hinted = |address, zone: &str| Endpoint { hints: zones(&[zone]), ..ready(address) };
    let both = vec![hinted("10.1.0.1", "a"), hinted("10.1.0.2", "b")];
    let mut bench = Bench::with(&[service("web", "10.96.0.1")], &[slice("web-1", "web", both)]);
    for (zone, inside) in [
        (Some("a"), &["10.1.0.1"][..]),
        (Some("b"), &["10.1.0.2"]),
        (Some("c"), &["10.1.0.1", "10.1.0.2"]),
        (None, &["10.1.0.1", "10.1.0.2"]),
    ] {
        bench.core.apply(node(zone));
        bench.sync();
        let mut found = bench.inside("10.96.0.1", 80);
        found.sort();
        assert_eq!(found, inside, "{zone:?}");
    }
}

#[test]
fn a_protocol_that_changes_under_one_port_name_leaves_the_old_frontend_valid_to_its_end() {
    let mut web_slice = web(0..2);
    let mut over_udp = web_slice.ports[0].clone();
    over_udp.protocol = Protocol::Udp;
    web_slice.ports.push(over_udp);
    let mut bench = Bench::with(&[service("web", "10.96.0.1")], &[web_slice]);
    bench.service(Service { ports: vec![port("http", Protocol::Udp, 80)], ..service("web", "10.96.0.1") });
    assert!(bench.row("10.96.0.1", 80).is_none());
    assert_eq!(bench.kernel.frontends.len(), 1);
    assert_eq!(bench.kernel.services.len(), 1);
}

#[test]
fn counts_say_what_is_there() {
    let mut bench = Bench::with(&[service("web", "10.96.0.1")], &[slice("web-1", "web", hosts(0..3))]);
    let counts = bench.core.counts();
    assert_eq!((counts.services, counts.slices, counts.endpoints), (1, 1, 3));
    assert_eq!((counts.frontends, counts.backends, counts.slots), (1, 3, 3));
    bench.core.apply(node(Some("z")));
    assert_eq!(bench.core.node().and_then(|n| n.zone.as_deref()), Some("z"));
}
