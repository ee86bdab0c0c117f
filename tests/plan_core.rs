//! The control plane from events to rows, case by case: what a change costs, who owns what is contested, what survives
//! a restart and a damaged map, and what happens when there is no room. The model kernel judges every row written.

#[path = "support/model_kernel.rs"]
mod model_kernel;
#[path = "support/objects.rs"]
mod objects;

use std::time::Duration;

use kubelane::abi::{Backend, Frontend, FrontendKey, ServiceName};
use kubelane::model::{Change, Endpoint, Kind, Protocol, Service, Slice, SocketAddrx, TrafficPolicy, Warning};
use kubelane::sync::{Core, MapName, SyncReport};
use model_kernel::ModelKernel;
use objects::{ip, list, name, new_core, node, port, ready, service, slice, terminating, unready, zones};

const SECOND: Duration = Duration::from_secs(1);

struct Bench {
    kernel: ModelKernel,
    core: Core,
}

impl Bench {
    /// A core that has listed these and synced them.
    fn with(services: &[Service], slices: &[Slice]) -> Self {
        Bench::on(ModelKernel::default(), services, slices)
    }

    fn on(kernel: ModelKernel, services: &[Service], slices: &[Slice]) -> Self {
        let mut bench = Bench { kernel, core: new_core() };
        list(&mut bench.core, services.to_vec(), slices.to_vec());
        bench.sync();
        bench
    }

    fn sync(&mut self) -> SyncReport {
        self.kernel.calls.clear();
        let now = self.kernel.now;
        self.core.sync(&mut self.kernel, now)
    }

    fn slice(&mut self, slice: Slice) -> SyncReport {
        self.core.apply(Change::Slice(Box::new(slice)));
        self.sync()
    }

    fn service(&mut self, service: Service) -> SyncReport {
        self.core.apply(Change::Service(Box::new(service)));
        self.sync()
    }

    /// Adopts in a new core and tells it the same world.
    fn restart(&mut self, services: &[Service], slices: &[Slice]) -> SyncReport {
        self.core = new_core();
        self.core.adopt(&mut self.kernel).unwrap();
        list(&mut self.core, services.to_vec(), slices.to_vec());
        self.sync()
    }

    /// The calls of the last sync as "map rows".
    fn calls(&self) -> Vec<String> {
        self.kernel.calls.iter().map(|(map, rows)| format!("{} {rows}", map.as_str())).collect()
    }

    fn row(&self, address: &str, port: u16) -> Option<&Frontend> {
        self.kernel.frontends.get(&FrontendKey::new(ip(address), port, Protocol::Tcp))
    }

    fn owner(&self, address: &str, port: u16) -> &str {
        self.row(address, port).map_or("", |row| self.kernel.services[&row.service_id].as_str())
    }

    /// The endpoints behind the inside pool, in slot order.
    fn inside(&self, address: &str, port: u16) -> Vec<String> {
        let pool = self.row(address, port).expect("the frontend is there").inside;
        let backends = (pool.base..pool.base + pool.count).map(|slot| self.kernel.backends[&self.kernel.slots[&slot]]);
        backends.map(|b| kubelane::model::Ipx(b.address).to_string()).collect()
    }
}

fn hosts(range: std::ops::Range<u16>) -> Vec<Endpoint> {
    range.map(|host| ready(&format!("10.1.{}.{}", host / 250, host % 250 + 1))).collect()
}

fn web(range: std::ops::Range<u16>) -> Slice {
    slice("web-1", "web", hosts(range))
}

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
fn a_new_tenant_of_an_id_has_the_next_generation_also_after_a_restart() {
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
    let loses = |loser: &str, winner: &str| Warning {
        subject: format!("Service default/{loser}"),
        message: format!(
            "192.0.2.1:80/TCP belongs to Service default/{winner}, which is older or first by name: not served here"
        ),
    };
    assert_eq!(report.warnings, [loses("a", "b"), loses("c", "b")]);
    assert!(bench.sync().warnings.is_empty(), "warned of once");

    bench.core.apply(Change::ServiceGone(name("b")));
    let report = bench.sync();
    assert_eq!(bench.owner("192.0.2.1", 80), "default/c:http");
    assert_eq!((report.warnings, report.resolved), (vec![loses("a", "c")], vec![loses("a", "b"), loses("c", "b")]));

    bench.service(contender("a", "10.96.0.1", 100));
    assert_eq!(bench.owner("192.0.2.1", 80), "default/a:http");
    bench.core.apply(Change::ServiceGone(name("a")));
    bench.core.apply(Change::ServiceGone(name("c")));
    let report = bench.sync();
    assert_eq!((bench.row("192.0.2.1", 80), report.resolved), (None, vec![loses("c", "a")]));
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
    // Meanwhile it comes back: nothing is left to do, and it is the same tenant.
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
            message: "1 endpoints are left out: the map backends is full; raise --max-endpoints and restart".into(),
        }]
    );
    assert_eq!((bench.inside("10.96.0.1", 80).len(), bench.inside("10.96.0.2", 80).len()), (2, 1));
    assert_eq!(bench.core.next_due(), None, "nothing rests that could be waited for");

    // An endpoint of the other goes; after its rest the id serves the one that waits.
    bench.slice(slice("a-1", "a", hosts(0..1)));
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

    bench.kernel.capacity.insert(MapName::Frontends, 1);
    let report = bench.service(service("b", "10.96.0.2"));
    assert_eq!((report.failures.len(), report.warnings[0].subject.as_str()), (1, "map frontends"));
    bench.core.apply(Change::ServiceGone(name("a")));
    let report = bench.sync();
    let resolved = |report: &SyncReport| report.resolved.iter().any(|w| w.subject == "map frontends");
    assert!(!resolved(&report), "the row that failed was tried before the old one was deleted");
    let report = bench.sync();
    assert!(resolved(&report));
    assert_eq!(bench.owner("10.96.0.2", 80), "default/b:http");
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

/// Something that no daemon wrote.
type Damage = fn(&mut ModelKernel);

#[test]
fn damage_in_the_pinned_maps_is_repaired() {
    let table: &[(&str, Damage)] = &[
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
    let services = [service("a", "10.96.0.1"), service("b", "10.96.0.2")];
    let slices = [slice("a-1", "a", hosts(0..2)), slice("b-1", "b", hosts(0..2))];
    let healthy = Bench::with(&services, &slices).kernel.meaning();
    for (sentence, damage) in table {
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

#[test]
fn counts_say_what_is_there() {
    let mut bench = Bench::with(&[service("web", "10.96.0.1")], &[slice("web-1", "web", hosts(0..3))]);
    let counts = bench.core.counts();
    assert_eq!((counts.services, counts.slices, counts.endpoints), (1, 1, 3));
    assert_eq!((counts.frontends, counts.backends, counts.slots), (1, 3, 3));
    bench.core.apply(node(Some("z")));
    assert_eq!(bench.core.node().and_then(|n| n.zone.as_deref()), Some("z"));
}
