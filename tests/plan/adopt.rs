//! Taking over pinned maps: what a restart keeps, what it clears away, and how it mends what no daemon wrote.

use std::time::Duration;

use crate::bench::{Bench, hosts, web};
use crate::model_kernel::ModelKernel;
use crate::records::{self, ip, name, new_core, port, ready, service, slice};
use kubelane::abi::{Backend, FrontendKey, ServiceName};
use kubelane::model::{Ipx, Protocol, Service, ServicePort, Slice, TrafficPolicy};
use kubelane::sync::{Core, CoreSettings, MapName};

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_new_assignment_of_an_id_has_the_next_generation_also_after_a_restart() {
    let web_service = service("web", "10.96.0.1");
    let mut bench = Bench::with(std::slice::from_ref(&web_service), &[web(0..1)]);
    bench.slice(web(0..0));
    assert_eq!((bench.kernel.backends[&1].state, bench.kernel.backends[&1].generation), (0, 1));
    bench.restart(std::slice::from_ref(&web_service), &[web(0..0)]);
    bench.kernel.now += SECOND;
    bench.slice(web(1..2));
    assert_eq!((bench.kernel.backends[&1].state, bench.kernel.backends[&1].generation), (1, 2));
}

#[test]
fn an_id_given_up_just_before_a_restart_is_not_used_right_after_it() {
    let web_service = service("web", "10.96.0.1");
    let mut bench = Bench::with(std::slice::from_ref(&web_service), &[web(0..1)]);
    bench.slice(web(0..0));
    bench.restart(std::slice::from_ref(&web_service), &[web(1..2)]);
    assert_eq!(bench.kernel.slots[&bench.row("10.96.0.1", 80).unwrap().inside.base], 2);
}

/// More Services than one pass of a first sync lays out, each with one endpoint.
fn many_services() -> (Vec<Service>, Vec<Slice>) {
    let one = |n: u32| {
        let (name, [_, _, third, fourth]) = (format!("service-{n}"), n.to_be_bytes());
        let endpoint = ready(&format!("10.1.{third}.{fourth}"));
        (service(&name, &format!("10.96.{third}.{fourth}")), slice(&format!("{name}-1"), &name, vec![endpoint]))
    };
    (1..=4500).map(one).unzip()
}

/// To judge each single write takes minutes with so many rows.
fn unjudging() -> ModelKernel {
    let mut kernel = ModelKernel::default();
    kernel.judging = false;
    kernel
}

#[test]
fn a_first_sync_of_thousands_of_services_finishes_some_before_it_lays_out_others() {
    let (services, slices) = many_services();
    let bench = Bench::on(unjudging(), &services, &slices);
    assert_eq!(bench.kernel.frontends.len(), 4500);
    let place = |map: MapName| bench.kernel.calls.iter().position(|(called, _)| *called == map).unwrap();
    let last_names = bench.kernel.calls.iter().rposition(|(called, _)| *called == MapName::Services).unwrap();
    assert!(place(MapName::Services) < place(MapName::Addresses) && place(MapName::Addresses) < last_names);
}

#[test]
fn a_frontend_that_several_of_thousands_want_is_written_once_for_the_oldest() {
    let (mut services, slices) = many_services();
    // By name the first and the last.
    for (service, created) in [("service-1", 200), ("service-999", 50)] {
        let service = services.iter_mut().find(|s| s.name == name(service)).unwrap();
        (service.external_ips, service.created) = (vec![ip("192.0.2.1")], created);
    }
    let bench = Bench::on(unjudging(), &services, &slices);
    assert_eq!(bench.owner("192.0.2.1", 80), "default/service-999:http");
    let written = bench.kernel.calls.iter().filter(|(map, _)| *map == MapName::Frontends).map(|(_, rows)| rows);
    assert_eq!(written.sum::<usize>(), bench.kernel.frontends.len());
}

#[test]
fn a_restart_lays_out_thousands_of_services_before_it_judges_what_it_found() {
    let (services, slices) = many_services();
    let mut bench = Bench::on(unjudging(), &services, &slices);
    let report = bench.restart(&services, &slices);
    assert_eq!((report.services, report.rows_written, report.rows_deleted), (4500, 0, 0));
    bench.kernel.check();
}

#[test]
fn a_dump_that_fails_is_an_error_and_never_an_empty_world() {
    let mut bench = Bench::with(&[service("web", "10.96.0.1")], &[web(0..2)]);
    for map in MapName::ALL {
        bench.kernel.fails = Box::new(move |m| m == map);
        let error = new_core().adopt(&mut bench.kernel).unwrap_err();
        assert!(error.to_string().contains(map.as_str()), "{error:#}");
    }
}

#[test]
fn orphans_of_a_former_world_go_with_the_first_sync() {
    let mut vip = service("old", "10.96.0.2");
    vip.external_ips = vec![ip("192.0.2.1")];
    let kept = service("web", "10.96.0.1");
    let slices = [web(0..2), slice("old-1", "old", hosts(5..7))];
    let mut bench = Bench::with(&[kept.clone(), vip], &slices);
    bench.core.set_node_addresses(vec![ip("198.51.100.1")], vec![]);
    bench.sync();
    let report = bench.restart(&[kept], &slices[..1]);
    assert_eq!(report.backends_gone.len(), 2);
    assert_eq!((bench.kernel.services.len(), bench.kernel.frontends.len(), bench.kernel.addresses.len()), (1, 1, 1));
    assert_eq!(bench.kernel.slots[&0], 1, "what stays keeps its place");
}

#[test]
fn a_daemon_with_another_node_name_and_other_node_addresses_mends_what_differs_and_nothing_else() {
    let local = Service {
        internal_policy: TrafficPolicy::Local,
        ports: vec![ServicePort { node_port: 30_080, ..port("http", Protocol::Tcp, 80) }],
        ..service("web", "10.96.0.1")
    };
    let other = service("other", "10.96.0.2");
    let slices =
        [slice("web-1", "web", vec![ready("10.1.0.1@"), ready("10.1.0.2")]), slice("other-1", "other", hosts(5..9))];
    let mut bench = Bench::with(&[local.clone(), other.clone()], &slices);
    bench.core.set_node_addresses(vec![ip("198.51.100.1"), ip("198.51.100.2")], vec![]);
    bench.sync();
    assert_eq!(bench.inside("10.96.0.1", 80), ["10.1.0.1"]);
    let untouched = *bench.row("10.96.0.2", 80).unwrap();

    bench.core = Core::new(CoreSettings { node_name: "node-b".into(), ..CoreSettings::default() });
    bench.core.adopt(&mut bench.kernel).unwrap();
    records::list(&mut bench.core, [local, other], slices);
    bench.core.set_node_addresses(vec![ip("198.51.100.2"), ip("198.51.100.3")], vec![]);
    let report = bench.sync();
    assert_eq!((report.failures.len(), report.backends_gone.len(), bench.core.pending()), (0, 0, false));
    assert_eq!(bench.inside("10.96.0.1", 80), ["10.1.0.2"]);
    assert_eq!(bench.row("10.96.0.2", 80), Some(&untouched));
    let node_flag = kubelane::abi::address_flag::ADDRESS_NODE;
    let on_node: Vec<String> = bench
        .kernel
        .addresses
        .iter()
        .filter(|(_, flags)| **flags & node_flag != 0)
        .map(|(a, _)| Ipx(*a).to_string())
        .collect();
    assert_eq!(on_node, ["198.51.100.2", "198.51.100.3"]);
    assert_eq!(bench.calls(), ["backends 6", "slots 1", "addresses 1", "addresses 1"], "all of node-b is local now");
}

/// Something that no daemon wrote.
type Damage = fn(&mut ModelKernel);

#[rustfmt::skip]
const DAMAGES: &[(&str, Damage)] = &[
    ("a slot beyond the backends", |k| {
        k.slots.insert(0, 99_999);
    }),
    ("a slot of another Service's backend", |k| {
        k.slots.insert(0, k.slots[&2]);
    }),
    ("one backend twice in a pool", |k| {
        k.slots.insert(0, k.slots[&1]);
    }),
    ("an empty slot", |k| {
        k.slots.remove(&1);
    }),
    ("a backend of another Service", |k| k.backends.get_mut(&1).unwrap().service_id = 2),
    ("a backend of no Service", |k| k.backends.get_mut(&1).unwrap().service_id = 4_000_000_000),
    ("a backend gone while in use", |k| k.backends.get_mut(&1).unwrap().state = 0),
    ("a backend in no known state", |k| k.backends.get_mut(&1).unwrap().state = 9),
    ("a backend without generation", |k| k.backends.get_mut(&1).unwrap().generation = 0),
    ("a backend of another protocol", |k| k.backends.get_mut(&1).unwrap().protocol = 17),
    ("an unknown backend", |k| {
        let stray = Backend { address: ip("10.9.9.9").0, ..k.backends[&1] };
        k.backends.insert(50, stray);
    }),
    ("one endpoint with two ids", |k| {
        k.backends.insert(50, k.backends[&1]);
    }),
    ("two names alike", |k| {
        k.services.insert(9, k.services[&1]);
    }),
    ("a name that is none", |k| {
        k.services.insert(9, ServiceName::new("nonsense"));
    }),
    ("a name with an id out of range", |k| {
        k.services.insert(4_000_000_000, k.services[&1]);
    }),
    ("a name missing", |k| {
        k.services.remove(&1);
    }),
    ("a name of bytes that are no text", |k| k.services.get_mut(&1).unwrap().text[3] = 0xff),
    ("a name with a tail", |k| k.services.get_mut(&1).unwrap().text[100] = b'x'),
    ("names swapped", |k| {
        let (one, two) = (k.services[&1], k.services[&2]);
        k.services.extend([(1, two), (2, one)]);
    }),
    ("a pool out of range", |k| k.frontends.values_mut().for_each(|f| f.inside.base = u32::MAX - 1)),
    ("a pool too long", |k| k.frontends.values_mut().for_each(|f| f.inside.count = 40_000)),
    ("a pool that is not aligned", |k| k.frontends.values_mut().for_each(|f| f.inside.base += 1)),
    ("pools that overlap", |k| k.frontends.values_mut().for_each(|f| f.inside.base = 0)),
    ("a pool of no set", |k| k.frontends.values_mut().for_each(|f| f.inside.member = 7)),
    ("a frontend of an unknown Service", |k| k.frontends.values_mut().for_each(|f| f.service_id = 77)),
    ("frontends of one Service only", |k| k.frontends.values_mut().for_each(|f| f.service_id = 1)),
    ("a frontend nobody asked for", |k| {
        let row = *k.frontends.values().next().unwrap();
        k.frontends.insert(FrontendKey::new(ip("10.96.9.9"), 1, Protocol::Udp), row);
    }),
    ("a frontend missing", |k| {
        k.frontends.pop_first();
    }),
    ("flags and time-outs", |k| k.frontends.values_mut().for_each(|f| (f.flags, f.affinity_seconds) = (99, 1))),
    ("an address nobody asked for", |k| {
        k.addresses.insert(ip("10.9.9.9").0, 1);
    }),
    ("an address in the wrong role", |k| k.addresses.values_mut().for_each(|f| *f = 255)),
    ("addresses missing", |k| k.addresses.clear()),
    ("all frontends missing", |k| k.frontends.clear()),
    ("all backends missing", |k| k.backends.clear()),
    ("all slots missing", |k| k.slots.clear()),
    ("all names missing", |k| k.services.clear()),
];

#[test]
fn damage_in_the_pinned_maps_is_repaired() {
    let services = [service("a", "10.96.0.1"), service("b", "10.96.0.2")];
    let slices = [slice("a-1", "a", hosts(0..2)), slice("b-1", "b", hosts(0..2))];
    let healthy = Bench::with(&services, &slices).kernel.meaning();
    for (sentence, damage) in DAMAGES {
        let mut bench = Bench::with(&services, &slices);
        bench.kernel.judging = false;
        damage(&mut bench.kernel);
        let report = bench.restart(&services, &slices);
        assert!(report.failures.is_empty() && !bench.core.pending(), "{sentence}");
        bench.kernel.check();
        assert_eq!(bench.kernel.meaning(), healthy, "{sentence}");
        assert_eq!(bench.restart(&services, &slices).calls, 0, "{sentence}: a second restart finds nothing to do");
    }
}

#[test]
fn a_restart_in_the_middle_of_a_flip_ends_where_an_undisturbed_sync_would() {
    let mut both = service("web", "10.96.0.1");
    both.external_ips = vec![ip("192.0.2.1")];
    both.external_policy = TrafficPolicy::Local;
    let mut bench = Bench::with(std::slice::from_ref(&both), &[web(0..4)]);
    let mut rows = 0;
    bench.kernel.fails = Box::new(move |map| {
        rows += u32::from(map == MapName::Frontends);
        map == MapName::Frontends && rows == 2
    });
    bench.slice(web(1..6));
    bench.kernel.never_fails();
    assert!(bench.core.pending());
    bench.restart(std::slice::from_ref(&both), &[web(1..6)]);
    let fresh = Bench::with(&[both], &[web(1..6)]);
    assert_eq!(bench.kernel.meaning(), fresh.kernel.meaning());
}
