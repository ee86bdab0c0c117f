//! The four invariants of the control plane, over any sequence of events: incremental equals full rebuild, a restart
//! writes nothing, failures heal, and every single write leaves the kernel valid (the model kernel judges that).

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use crate::model_kernel::ModelKernel;
use crate::records::{self, NODE, ip, name, new_core, port, ready, service, slice, zones};
use kubelane::abi::pool_empty::EMPTY_DROP;
use kubelane::abi::{Backend, FrontendKey, Pool};
use kubelane::explain::{About, Policy, Port};
use kubelane::model::{
    Change, Endpoint, IpRange, Ipx, Kind, Node, ObjectName, Protocol, Service, Slice, TrafficPolicy,
};
use kubelane::sync::{Core, MapName, SyncReport};
use proptest::prelude::*;

const SECOND: Duration = Duration::from_secs(1);

/// The cluster as the test knows it: what a fresh daemon would be told.
#[derive(Clone, Debug, Default)]
struct Truth {
    services: BTreeMap<ObjectName, Service>,
    slices: BTreeMap<ObjectName, Slice>,
    node: Option<Node>,
    nodeport: BTreeSet<Ipx>,
    bound: BTreeSet<Ipx>,
}

impl Truth {
    fn tell(&self, core: &mut Core) {
        records::list(core, self.services.values().cloned(), self.slices.values().cloned());
        core.apply(Change::ListBegin(Kind::Node));
        self.node.iter().for_each(|node| core.apply(Change::Node(Box::new(node.clone()))));
        core.apply(Change::ListEnd(Kind::Node));
        core.set_node_addresses(self.nodeport.iter().copied().collect(), self.bound.iter().copied().collect());
        core.set_outward_addresses(self.bound.iter().copied().collect());
    }
}

#[derive(Clone, Debug)]
enum Event {
    Service(Service),
    ServiceGone(u8),
    Slice(Slice),
    SliceGone(u8),
    Node(Option<u8>),
    NodeGone,
    Addresses(u8, u8),
    /// Both kinds are listed again; what the masks have was deleted while nobody watched.
    Relist(u8, u8),
    Sync,
    /// Syncs while every n-th row fails, as the numbers say.
    FailingSync(u64),
    Restart,
    Wait(u16),
}

fn any_service() -> impl Strategy<Value = Service> {
    let shape = (0u8..5, 0u8..4, any::<bool>(), any::<bool>(), any::<bool>(), 0u8..6);
    let more = (prop::option::of(Just(60u32)), 0i64..3, any::<bool>(), 0u8..5);
    (shape, more).prop_map(|((which, ips, internal, external, vip, ports), (affinity, created, node_port, ranges))| {
        let local = |is| if is { TrafficPolicy::Local } else { TrafficPolicy::Cluster };
        let mut all = service(&format!("s{which}"), &format!("10.96.0.{which}"));
        match ips {
            0 => {}
            1 => all.cluster_ips = vec![ip(&format!("fd00::{which}"))],
            _ => all.cluster_ips.push(ip(&format!("fd00::{which}"))),
        }
        if vip && ips != 1 {
            // Contested by all that have it.
            all.external_ips = vec![ip("192.0.2.1")];
            all.load_balancer_ips = vec![ip("192.0.2.2"), ip("fd02::2")];
            let range = |at: &str, prefix| IpRange { ip: ip(at), prefix };
            all.source_ranges = match ranges {
                0 | 1 => vec![],
                2 => vec![range("10.0.0.0", 8)],
                3 => vec![range("10.0.0.0", 8), range("10.1.0.0", 16)],
                _ => vec![range("::", 0), range("10.1.0.0", 16)],
            };
        }
        all.ports = match ports {
            0 => vec![port("http", Protocol::Tcp, 80), port("dns", Protocol::Udp, 53)],
            1 => vec![port("http", Protocol::Udp, 80)],
            2 => vec![port("dns", Protocol::Tcp, 80), port("http", Protocol::Tcp, 81)],
            _ => vec![port("http", Protocol::Tcp, 80)],
        };
        if node_port {
            all.ports[0].node_port = 30000 + u16::from(which % 3);
        }
        (all.affinity_seconds, all.created) = (affinity, created);
        (all.internal_policy, all.external_policy) = (local(internal), local(external));
        all
    })
}

fn any_slice() -> impl Strategy<Value = Slice> {
    let endpoint = (0u8..24, 0u8..6, any::<bool>(), 0u8..4);
    (0u8..8, 0u8..5, any::<bool>(), prop::collection::vec(endpoint, 0..12)).prop_map(|(which, of, six, ends)| {
        let mut seen = BTreeSet::new();
        let endpoints = ends.into_iter().filter(|e| seen.insert(e.0)).map(|(host, kind, here, hint)| {
            let at = if six { format!("fd01::{host}") } else { format!("10.1.0.{host}") };
            let mut end: Endpoint = ready(&format!("{at}{}", if here { "@" } else { "" }));
            match kind {
                0 => (end.ready, end.serving) = (false, false),
                1 | 2 => (end.ready, end.terminating) = (false, true),
                _ => {}
            }
            end.hints = match hint {
                0 | 1 => zones(&["z0"]),
                2 => zones(&["z1", "z0"]),
                _ => None,
            };
            end
        });
        let mut all = slice(&format!("e{which}"), &format!("s{of}"), endpoints.collect());
        let mut dns = all.ports[0].clone();
        (dns.name, dns.protocol, dns.port) = ("dns".into(), Protocol::Udp, 5353);
        let mut http_over_udp = dns.clone();
        http_over_udp.name = "http".into();
        all.ports.extend([dns, http_over_udp]);
        all
    })
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => any_service().prop_map(Event::Service),
        2 => (0u8..5).prop_map(Event::ServiceGone),
        12 => any_slice().prop_map(Event::Slice),
        3 => (0u8..8).prop_map(Event::SliceGone),
        2 => prop::option::of(0u8..3).prop_map(Event::Node),
        1 => Just(Event::NodeGone),
        2 => (0u8..8, 0u8..8).prop_map(|(a, b)| Event::Addresses(a, b)),
        2 => (any::<u8>(), any::<u8>()).prop_map(|(a, b)| Event::Relist(a, b)),
        8 => Just(Event::Sync),
        5 => any::<u64>().prop_map(Event::FailingSync),
        2 => Just(Event::Restart),
        4 => (0u16..1500).prop_map(Event::Wait),
    ]
}

struct Bench {
    kernel: ModelKernel,
    core: Core,
    truth: Truth,
    /// Services with as many endpoints are changed one by one.
    large_from: usize,
    /// There is less room than all may ask for: what comes may have to wait for what goes.
    is_scarce: bool,
}

impl Bench {
    fn new() -> Self {
        Bench::with(ModelKernel::default())
    }

    fn with(kernel: ModelKernel) -> Self {
        let mut bench =
            Bench { kernel, core: new_core(), truth: Truth::default(), large_from: usize::MAX, is_scarce: false };
        bench.truth.tell(&mut bench.core);
        bench
    }

    fn sync(&mut self) -> SyncReport {
        let now = self.kernel.now;
        self.core.sync(&mut self.kernel, now)
    }

    fn play(&mut self, event: Event) {
        match event {
            Event::Service(service) => {
                self.truth.services.insert(service.name.clone(), service.clone());
                self.core.apply(Change::Service(Box::new(service)));
            }
            Event::ServiceGone(which) => {
                let gone = name(&format!("s{which}"));
                self.truth.services.remove(&gone);
                self.core.apply(Change::ServiceGone(gone));
            }
            Event::Slice(slice) => {
                self.truth.slices.insert(slice.name.clone(), slice.clone());
                self.core.apply(Change::Slice(Box::new(slice)));
            }
            Event::SliceGone(which) => {
                let gone = name(&format!("e{which}"));
                self.truth.slices.remove(&gone);
                self.core.apply(Change::SliceGone(gone));
            }
            Event::Node(zone) => {
                let zone = zone.map(|z| format!("z{z}").into());
                let node = Node { name: NODE.into(), zone, ..Node::default() };
                self.truth.node = Some(node.clone());
                self.core.apply(Change::Node(Box::new(node)));
            }
            Event::NodeGone => {
                self.truth.node = None;
                self.core.apply(Change::NodeGone);
            }
            Event::Addresses(nodeport, bound) => self.addresses(nodeport, bound),
            Event::Relist(services, slices) => {
                let kept = |mask: u8| move |at: usize| mask >> (at % 8) & 1 == 0;
                keep(&mut self.truth.services, kept(services));
                keep(&mut self.truth.slices, kept(slices));
                self.truth.tell(&mut self.core);
            }
            Event::Sync => {
                let report = self.sync();
                assert!(self.is_scarce || report.failures.is_empty() && !self.core.pending());
                assert!(!report.waits, "a full map is no update that waits");
            }
            Event::FailingSync(seed) => {
                let mut state = seed | 1;
                self.kernel.fails = Box::new(move |_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    state >> 62 == 0
                });
                let failures = self.sync().failures.len();
                self.kernel.never_fails();
                // A failed row is not always pending: a later phase may have written what is wanted.
                assert!(failures > 0 || !self.core.pending());
            }
            Event::Restart => self.restart(),
            Event::Wait(milliseconds) => self.kernel.now += Duration::from_millis(milliseconds.into()),
        }
    }

    fn addresses(&mut self, nodeport: u8, bound: u8) {
        let pick = |mask: u8, from: [&str; 3]| {
            (0..3).filter(|bit| mask >> bit & 1 == 1).map(|bit| ip(from[bit])).collect::<BTreeSet<_>>()
        };
        self.truth.nodeport = pick(nodeport, ["198.51.100.1", "198.51.100.2", "192.0.2.1"]);
        self.truth.bound = pick(bound, ["10.96.0.0", "10.96.0.1", "fd00::1"]);
        let (nodeport, bound) = (&self.truth.nodeport, &self.truth.bound);
        self.core.set_node_addresses(nodeport.iter().copied().collect(), bound.iter().copied().collect());
        self.core.set_outward_addresses(bound.iter().copied().collect());
    }

    fn restart(&mut self) {
        self.core = new_core();
        self.core.set_large_from(self.large_from);
        let truth = self.truth.clone();
        // The agent may know the node's addresses before or after it adopts.
        if truth.services.len().is_multiple_of(2) {
            truth.tell(&mut self.core);
            self.core.adopt(&mut self.kernel).unwrap();
        } else {
            self.core.adopt(&mut self.kernel).unwrap();
            truth.tell(&mut self.core);
        }
    }

    /// The state after a clean sync is what a fresh daemon on empty maps would make of the truth.
    fn assert_equals_full_rebuild(&mut self) {
        self.play(Event::Sync);
        let mut fresh = Bench::new();
        self.truth.tell(&mut fresh.core);
        fresh.play(Event::Sync);
        assert_eq!(self.kernel.meaning(), fresh.kernel.meaning());
        assert_eq!(self.core.counts(), fresh.core.counts());

        for map in MapName::ALL {
            let snapshot = self.core.snapshot(map).unwrap();
            assert_eq!(snapshot.compare(&mut self.kernel).unwrap(), Vec::<Vec<u8>>::new(), "{map:?}: no drift");
        }

        self.assert_explained();

        // A restart, and so a recompile of everything, writes nothing.
        self.restart();
        let report = self.sync();
        assert_eq!(report.calls, 0, "{report:?}");
        assert!(!self.core.pending());
        assert_eq!(self.core.counts(), fresh.core.counts());
    }
}

impl Bench {
    /// What the planner tells of each Service is what the kernel has of it, and of nobody else.
    fn assert_explained(&self) {
        let mut told = 0;
        for name in self.truth.services.keys() {
            let about = About::Service { namespace: name.namespace.to_string(), name: name.name.to_string() };
            let answer = self.core.explain(&about);
            for port in &answer.services[0].ports {
                for frontend in port.frontends.iter().filter(|frontend| frontend.owner.is_none()) {
                    let key = FrontendKey::new(frontend.at.ip().into(), frontend.at.port(), port.protocol.into());
                    let row = self.kernel.frontends[&key];
                    told += 1;
                    for (pool, wanted) in [(row.inside, frontend.inside), (row.outside, frontend.outside)] {
                        assert_eq!(self.addresses_of(&pool), explained(port, wanted.set, frontend.at.is_ipv6()));
                        assert_eq!(u32::from(pool.on_empty) == EMPTY_DROP, wanted.drops, "{frontend:?}");
                    }
                }
            }
        }
        assert_eq!(told, self.kernel.frontends.len());
    }

    fn addresses_of(&self, pool: &Pool) -> BTreeSet<SocketAddr> {
        let backend = |slot: u32| self.kernel.backends[&self.kernel.slots[&slot]];
        let address = |row: Backend| SocketAddr::new(Ipx(row.address).to_ip(), u16::from_be_bytes(row.port_be));
        (pool.base..pool.base + pool.count).map(|slot| address(backend(slot))).collect()
    }
}

fn explained(port: &Port, set: Policy, is_ipv6: bool) -> BTreeSet<SocketAddr> {
    let is_in = |endpoint: &&kubelane::explain::Endpoint| {
        let reason = if set == Policy::Local { endpoint.not_in_local } else { endpoint.not_in_cluster };
        reason.is_none() && endpoint.at.is_ipv6() == is_ipv6
    };
    port.endpoints.iter().filter(is_in).map(|endpoint| endpoint.at).collect()
}

fn keep<V>(all: &mut BTreeMap<ObjectName, V>, kept: impl Fn(usize) -> bool) {
    let mut at = 0;
    all.retain(|_, _| {
        at += 1;
        kept(at - 1)
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_history_ends_where_a_full_rebuild_would_and_a_restart_there_writes_nothing(
        events in prop::collection::vec(any_event(), 1..60),
        large_from in prop_oneof![Just(1), Just(3), Just(usize::MAX)],
    ) {
        let mut bench = Bench::new();
        bench.large_from = large_from;
        bench.core.set_large_from(large_from);
        for event in events {
            bench.play(event);
        }
        bench.assert_equals_full_rebuild();
    }

    #[test]
    fn shares_of_a_scarce_map_are_those_of_a_full_rebuild_whatever_came_before(
        events in prop::collection::vec(any_event(), 1..40),
        frontends in 1u32..12,
    ) {
        let scarce = || {
            let mut kernel = ModelKernel::default();
            kernel.capacity.insert(MapName::Frontends, frontends);
            let mut bench = Bench::with(kernel);
            bench.is_scarce = true;
            bench
        };
        let (mut bench, mut fresh) = (scarce(), scarce());
        for event in events {
            bench.play(event);
        }
        fresh.truth = bench.truth.clone();
        fresh.truth.tell(&mut fresh.core);
        for bench in [&mut bench, &mut fresh] {
            // What goes makes room for what comes.
            (0..3).for_each(|_| bench.play(Event::Sync));
            prop_assert!(!bench.core.pending());
        }
        prop_assert_eq!(bench.kernel.meaning(), fresh.kernel.meaning());
        prop_assert_eq!(bench.core.counts(), fresh.core.counts());
    }

    #[test]
    fn everything_that_was_given_up_can_be_used_again_after_its_rest_even_where_room_is_scarce(
        events in prop::collection::vec(any_event(), 1..40),
        scarce in any::<bool>(),
    ) {
        let kernel = if scarce { ModelKernel::with_capacity(6, 14, 21) } else { ModelKernel::default() };
        let mut bench = Bench::with(kernel);
        for event in events {
            bench.play(event);
        }
        bench.play(Event::Relist(255, 255));
        bench.play(Event::Addresses(0, 0));
        for _ in 0..3 {
            bench.play(Event::Sync);
            bench.kernel.now += SECOND;
        }
        // All is free: the same small world gets the same low ids whatever came before.
        let (services, slices) = ([service("s1", "10.96.0.1")], [slice("e1", "s1", vec![ready("10.1.0.1")])]);
        records::list(&mut bench.core, services, slices);
        bench.play(Event::Sync);
        let row = bench.kernel.frontends.values().next().unwrap();
        // Of 21 slots the single one at the end is the best fit.
        let base = if scarce { 20 } else { 0 };
        prop_assert_eq!((row.service_id, row.inside.base, bench.kernel.slots[&base]), (1, base, 1));
        prop_assert_eq!(bench.core.counts().backends, 1);
    }
}
