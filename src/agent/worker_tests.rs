//! The worker on a model of the kernel's maps, in virtual time.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::time::timeout;

use super::super::wire::Hooks;
use super::*;
use crate::abi::address_flag;
use crate::bpf::{Attached, Device, Fault, StalePass};
use crate::model::{Endpoint, Node, ObjectName, Service, ServicePort, Slice, SlicePort};
use crate::serve::Metrics;
use crate::sync::{CoreSettings, Failure};

type Rows = HashMap<MapName, BTreeMap<Vec<u8>, Vec<u8>>>;

/// Maps whose writes can be made to fail. Array rows of zeros are left out of dumps, as the real ones do.
#[derive(Default)]
struct State {
    rows: Rows,
    writes: usize,
    /// This many of the next calls fail for every row.
    failing: usize,
    /// There is no room in `frontends`.
    full: bool,
}

#[derive(Clone, Default)]
struct Model(Arc<Mutex<State>>);

impl Model {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// How often, and what.
    fn written(&self) -> (usize, Rows) {
        let state = self.state();
        (state.writes, state.rows.clone())
    }

    fn rows(&self, map: MapName) -> usize {
        self.state().rows.get(&map).map_or(0, BTreeMap::len)
    }
}

impl State {
    fn refuses(&mut self, map: MapName, rows: usize) -> Option<Vec<Failure>> {
        self.writes += 1;
        let errno = if self.full && map == MapName::Frontends { libc::E2BIG } else { libc::ENOMEM };
        if errno == libc::ENOMEM {
            self.failing = self.failing.checked_sub(1)?;
        }
        Some((0..rows).map(|row| Failure { row, error: io::Error::from_raw_os_error(errno) }).collect())
    }
}

impl MapIo for Model {
    fn write(&mut self, map: MapName, keys: &[u8], values: &[u8], rows: usize) -> Vec<Failure> {
        let mut state = self.state();
        if let Some(failures) = state.refuses(map, rows) {
            return failures;
        }
        let table = state.rows.entry(map).or_default();
        for (key, value) in keys.chunks(keys.len() / rows).zip(values.chunks(values.len() / rows)) {
            table.insert(key.to_vec(), value.to_vec());
        }
        Vec::new()
    }

    fn delete(&mut self, map: MapName, keys: &[u8], rows: usize) -> Vec<Failure> {
        let mut state = self.state();
        if let Some(failures) = state.refuses(map, rows) {
            return failures;
        }
        let table = state.rows.entry(map).or_default();
        keys.chunks(keys.len() / rows).for_each(|key| drop(table.remove(key)));
        Vec::new()
    }

    fn dump(&mut self, map: MapName, each: &mut dyn FnMut(&[u8], &[u8])) -> io::Result<()> {
        let is_array = matches!(map, MapName::Backends | MapName::Slots);
        let state = self.state();
        let rows = state.rows.get(&map).into_iter().flatten();
        rows.filter(|(_, v)| !is_array || v.iter().any(|b| *b != 0)).for_each(|(key, value)| each(key, value));
        Ok(())
    }

    fn note_new_owners(&mut self) -> std::io::Result<()> {
        Ok(())
    }

    fn capacity(&self, _: MapName) -> u32 {
        1 << 16
    }
}

/// No device at all.
struct NoHooks;

impl Hooks for NoHooks {
    fn attach(&mut self, device: &Device) -> anyhow::Result<Attached> {
        panic!("{device:?} was attached")
    }

    fn detach(&mut self, index: u32) -> anyhow::Result<()> {
        panic!("{index} was detached")
    }

    fn attached(&self) -> anyhow::Result<Vec<u32>> {
        Ok(vec![])
    }

    fn faults(&self, device: &Device) -> anyhow::Result<Vec<Fault>> {
        panic!("{device:?} was looked at")
    }
}

fn with_addresses(addresses: &[&str]) -> Network {
    Network { addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(), devices: vec![] }
}

/// The worker's surroundings.
struct Stage {
    maps: Model,
    changes: mpsc::Sender<Change>,
    network: watch::Sender<Network>,
    app: App,
    passes: Arc<AtomicUsize>,
    requests: mpsc::Sender<Request>,
    inputs: Option<Inputs>,
}

impl Stage {
    fn new(maps: &Model) -> Self {
        let (changes, receiver) = mpsc::channel(100_000);
        let (network, watched) = watch::channel(with_addresses(&["192.0.2.5"]));
        let app = App { health: Arc::default(), metrics: Arc::new(Metrics::new().unwrap()) };
        // These tests have no datapath to try.
        app.health.probed(None);
        let outlets =
            Outlets { health_checks: watch::Sender::default(), notices: mpsc::channel(1).0, startup_taint: None };
        let (requests, asked) = mpsc::channel(8);
        let passes = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&passes);
        let pass = move |_| {
            count.fetch_add(1, SeqCst);
            Ok(StalePass::default())
        };
        let inputs = Inputs {
            changes: receiver,
            network: watched,
            nodeport_addresses: NodePortAddresses::All,
            devices: DeviceSelection::Found,
            pod_devices: PodDevices::Found,
            stale: StaleSocketPasses::new(Some(Arc::new(pass))),
            destroy_tcp_sockets: false,
            app: app.clone(),
            outlets,
            requests: asked,
            started: Instant::now(),
        };
        Stage { maps: maps.clone(), changes, network, app, passes, requests, inputs: Some(inputs) }
    }

    fn worker<'m>(&mut self, maps: &'m mut Model) -> Worker<'m> {
        let core = Core::new(CoreSettings { node_name: "node-a".into(), ..CoreSettings::default() });
        let wire = Wire::new(Box::leak(Box::new(NoHooks)));
        Worker::new(core, maps, wire, self.inputs.take().unwrap()).unwrap()
    }

    fn send(&self, changes: impl IntoIterator<Item = Change>) {
        changes.into_iter().for_each(|change| self.changes.try_send(change).unwrap());
    }

    /// Syncs so far.
    fn syncs(&self) -> u64 {
        let text = self.app.metrics.text().unwrap();
        let name = "kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} ";
        text.lines().find_map(|l| l.strip_prefix(name)).unwrap().parse().unwrap()
    }

    async fn readyz(&self) -> u16 {
        use tower::ServiceExt as _;
        let request = axum::http::Request::get("/readyz").body(axum::body::Body::empty()).unwrap();
        crate::serve::health_router(self.app.clone()).oneshot(request).await.unwrap().status().as_u16()
    }
}

/// Lets the worker run for a while of virtual time.
async fn run_for(worker: &mut Worker<'_>, time: Duration) {
    let ended = timeout(time, worker.run()).await;
    assert!(ended.is_err(), "the worker ended: {ended:?}");
}

const MOMENT: Duration = Duration::from_millis(20);

fn service(n: u8, protocol: Protocol) -> Change {
    let port = ServicePort { name: "".into(), protocol, port: 80, node_port: 0 };
    Change::Service(Box::new(Service {
        name: ObjectName::new("default", &format!("web-{n}")),
        created: 1,
        cluster_ips: vec![format!("10.96.0.{n}").parse().unwrap()],
        external_ips: vec![],
        load_balancer_ips: vec![],
        ports: vec![port],
        affinity_seconds: None,
        internal_policy: Default::default(),
        external_policy: Default::default(),
        source_ranges: vec![],
        health_check_node_port: 0,
        client_source: None,
    }))
}

/// The slice of `service(n, protocol)` with endpoints 10.244.n.1 to 10.244.n.`count`.
fn slice(n: u8, protocol: Protocol, count: u8) -> Change {
    let endpoint = |last: u8| Endpoint {
        ip: format!("10.244.{n}.{last}").parse().unwrap(),
        ready: true,
        serving: true,
        terminating: false,
        node: None,
        hints: None,
    };
    Change::Slice(Box::new(Slice {
        name: ObjectName::new("default", &format!("web-{n}-abc")),
        service: format!("web-{n}").into(),
        is_controlled: false,
        ports: vec![SlicePort { name: "".into(), protocol, port: 8080 }],
        endpoints: (1..=count).map(endpoint).collect(),
        triggered: None,
    }))
}

fn list(kind: Kind, items: Vec<Change>) -> Vec<Change> {
    [vec![Change::ListBegin(kind)], items, vec![Change::ListEnd(kind)]].concat()
}

/// Three TCP Services with two endpoints each, and the Node.
fn world() -> Vec<Change> {
    let node = Node { name: "node-a".into(), ..Node::default() };
    [
        list(Kind::Services, (1..=3).map(|n| service(n, Protocol::Tcp)).collect()),
        list(Kind::EndpointSlices, (1..=3).map(|n| slice(n, Protocol::Tcp, 2)).collect()),
        list(Kind::Node, vec![Change::Node(Box::new(node))]),
    ]
    .concat()
}

#[tokio::test(start_paused = true)]
async fn nothing_is_written_before_services_and_slices_are_listed() {
    let mut maps = Model::default();
    let mut stage = Stage::new(&maps);
    let mut worker = stage.worker(&mut maps);
    let world = world();
    let (last, rest) = world.split_at(world.iter().position(|c| *c == Change::ListEnd(Kind::EndpointSlices)).unwrap());
    stage.send(last.to_vec());
    run_for(&mut worker, Duration::from_secs(60)).await;
    assert_eq!((stage.maps.written().0, stage.syncs(), stage.readyz().await), (0, 0, 503));
    stage.send(rest.to_vec());
    run_for(&mut worker, MOMENT).await;
    assert_eq!((stage.maps.rows(MapName::Frontends), stage.syncs(), stage.readyz().await), (3, 1, 200));
}

#[tokio::test(start_paused = true)]
async fn a_burst_becomes_one_sync() {
    let mut maps = Model::default();
    let mut stage = Stage::new(&maps);
    let mut worker = stage.worker(&mut maps);
    stage.send(world());
    run_for(&mut worker, MOMENT).await;
    assert_eq!(stage.syncs(), 1);
    for count in 1..=200 {
        stage.send([slice(1, Protocol::Tcp, count), slice(2, Protocol::Tcp, count)]);
    }
    run_for(&mut worker, MOMENT).await;
    assert_eq!(stage.syncs(), 2);
    // One event alone is not held back.
    stage.send([slice(3, Protocol::Tcp, 1)]);
    run_for(&mut worker, Duration::from_millis(1)).await;
    assert_eq!(stage.syncs(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_flood_does_not_keep_writes_waiting() {
    let mut maps = Model::default();
    let mut stage = Stage::new(&maps);
    let mut worker = stage.worker(&mut maps);
    stage.send(world());
    run_for(&mut worker, MOMENT).await;
    for n in 0..3 * DRAIN {
        stage.send([slice(1, Protocol::Tcp, (n % 5) as u8)]);
    }
    run_for(&mut worker, MOMENT).await;
    assert_eq!(stage.syncs(), 4);
}

#[tokio::test(start_paused = true)]
async fn failed_writes_are_tried_again_until_they_are_in() {
    let mut maps = Model::default();
    let mut stage = Stage::new(&maps);
    stage.maps.state().failing = 10;
    let mut worker = stage.worker(&mut maps);
    stage.send(world());
    run_for(&mut worker, MOMENT).await;
    assert_eq!((stage.syncs(), stage.readyz().await), (1, 503), "the first attempt fails and is not repeated at once");
    run_for(&mut worker, Duration::from_secs(300)).await;
    assert_eq!((stage.maps.rows(MapName::Frontends), stage.readyz().await), (3, 200));
    assert!((4..20).contains(&stage.syncs()), "{} syncs", stage.syncs());
    let settled = stage.syncs();
    run_for(&mut worker, Duration::from_secs(300)).await;
    assert_eq!(stage.syncs(), settled, "it goes on though all is in");
}

/// Asks for the rows of a trial, and returns what became of it.
async fn ask_for_trial(worker: &mut Worker<'_>, stage: &Stage, trial: Option<Trial>) -> anyhow::Result<()> {
    let (reply, mut answer) = tokio::sync::oneshot::channel();
    stage.requests.try_send(Request::Trial(trial, reply)).unwrap_or_else(|_| panic!("too many requests"));
    run_for(worker, MOMENT).await;
    answer.try_recv().unwrap()
}

#[tokio::test(start_paused = true)]
async fn the_rows_of_a_trial_are_there_while_it_goes_on_and_no_longer() {
    let mut maps = Model::default();
    let mut stage = Stage::new(&maps);
    let mut worker = stage.worker(&mut maps);
    stage.send(world());
    run_for(&mut worker, MOMENT).await;
    let services = stage.maps.written().1;
    let trial = |address: &str| Trial { frontend: address.parse().unwrap(), listener: "127.0.0.1:7".parse().unwrap() };

    ask_for_trial(&mut worker, &stage, Some(trial("192.0.0.8:1"))).await.unwrap();
    assert_eq!(stage.maps.rows(MapName::Frontends), 4);
    ask_for_trial(&mut worker, &stage, Some(trial("[100::c000:8]:1"))).await.unwrap();
    assert_eq!(stage.maps.rows(MapName::Frontends), 4, "one trial at a time");
    ask_for_trial(&mut worker, &stage, None).await.unwrap();
    assert_eq!(stage.maps.rows(MapName::Frontends), 3);

    stage.maps.state().full = true;
    assert!(ask_for_trial(&mut worker, &stage, Some(trial("192.0.0.8:1"))).await.is_err());
    stage.maps.state().full = false;
    ask_for_trial(&mut worker, &stage, Some(trial("192.0.0.8:1"))).await.unwrap();
    drop(worker);
    let mut left = stage.maps.written().1;
    // An array keeps a row of zeros.
    left.get_mut(&MapName::Backends).unwrap().retain(|_, row| row.iter().any(|byte| *byte != 0));
    assert_eq!(left, services, "a worker that ends leaves nothing of it");
}

#[tokio::test(start_paused = true)]
async fn a_map_without_room_keeps_nobody_from_getting_ready_and_is_tried_again() {
    let mut maps = Model::default();
    let mut stage = Stage::new(&maps);
    stage.maps.state().full = true;
    let mut worker = stage.worker(&mut maps);
    stage.send(world());
    run_for(&mut worker, MOMENT).await;
    assert_eq!((stage.maps.rows(MapName::Frontends), stage.readyz().await), (0, 200));
    let text = stage.app.metrics.text().unwrap();
    assert!(text.contains("kubeproxy_sync_proxy_rules_service_changes_pending 0"), "{text}");
    stage.maps.state().full = false;
    run_for(&mut worker, Duration::from_secs(300)).await;
    assert_eq!(stage.maps.rows(MapName::Frontends), 3);
}

#[tokio::test(start_paused = true)]
async fn the_first_sync_waits_for_the_node_but_not_for_ever() {
    let mut maps = Model::default();
    let mut stage = Stage::new(&maps);
    let mut worker = stage.worker(&mut maps);
    stage.send(world().into_iter().filter(|c| !matches!(c, Change::Node(_) | Change::ListEnd(Kind::Node))));
    run_for(&mut worker, NODE_GRACE - MOMENT).await;
    assert_eq!((stage.syncs(), stage.readyz().await), (0, 503));
    run_for(&mut worker, 2 * MOMENT).await;
    assert_eq!((stage.syncs(), stage.maps.rows(MapName::Frontends)), (1, 3));
}

#[tokio::test(start_paused = true)]
async fn a_restart_with_an_unchanged_world_writes_nothing_and_serves_at_once() {
    let mut maps = Model::default();
    let mut first = Stage::new(&maps);
    first.send(world());
    run_for(&mut first.worker(&mut maps), MOMENT).await;
    let before = first.maps.written();
    let mut second = Stage::new(&maps);
    let mut worker = second.worker(&mut maps);
    assert_eq!(second.readyz().await, 503);
    second.send(world());
    run_for(&mut worker, Duration::from_secs(60)).await;
    assert_eq!(second.readyz().await, 200);
    assert_eq!(second.maps.written(), before);
}

#[tokio::test(start_paused = true)]
async fn node_addresses_are_followed() {
    let mut maps = Model::default();
    let mut stage = Stage::new(&maps);
    let mut worker = stage.worker(&mut maps);
    stage.send(world());
    let node_rows = || {
        let state = stage.maps.state();
        let rows = state.rows.get(&MapName::Addresses).into_iter().flatten();
        let flags = |v: &[u8]| u32::from_ne_bytes(v.try_into().unwrap());
        let nodes = rows.filter(|(_, v)| flags(v) & address_flag::ADDRESS_NODE != 0);
        nodes.map(|(k, _)| Ipx(k.as_slice().try_into().unwrap()).to_string()).collect::<Vec<_>>()
    };
    run_for(&mut worker, MOMENT).await;
    assert_eq!(node_rows(), ["192.0.2.5"]);
    stage.network.send(with_addresses(&["192.0.2.7", "2001:db8::1"])).unwrap();
    run_for(&mut worker, MOMENT).await;
    let mut rows = node_rows();
    rows.sort();
    assert_eq!(rows, ["192.0.2.7", "2001:db8::1"]);
}

#[tokio::test(start_paused = true)]
async fn sockets_are_searched_at_the_start_and_when_a_udp_backend_goes() {
    for (protocol, destroy_tcp, expected) in
        [(Protocol::Udp, false, 1), (Protocol::Tcp, false, 0), (Protocol::Tcp, true, 1)]
    {
        let mut maps = Model::default();
        let mut stage = Stage::new(&maps);
        stage.inputs.as_mut().unwrap().destroy_tcp_sockets = destroy_tcp;
        let mut worker = stage.worker(&mut maps);
        stage.send(world());
        stage.send([service(9, protocol), slice(9, protocol, 2)]);
        run_for(&mut worker, MOMENT).await;
        assert_eq!(stage.passes.swap(0, SeqCst), 1, "{protocol:?}: an earlier daemon may have left some");
        stage.send([slice(9, protocol, 1)]);
        run_for(&mut worker, MOMENT).await;
        assert_eq!(stage.passes.load(SeqCst), expected, "{protocol:?}, TCP too: {destroy_tcp}");
    }
}

#[tokio::test(start_paused = true)]
async fn sockets_are_searched_when_a_udp_frontend_is_anothers_from_now_on() {
    for (protocol, expected) in [(Protocol::Udp, 1), (Protocol::Tcp, 0)] {
        let mut maps = Model::default();
        let mut stage = Stage::new(&maps);
        let mut worker = stage.worker(&mut maps);
        let move_to = |to: u8, from: u8| match service(from, protocol) {
            Change::Service(mut moved) => {
                moved.cluster_ips = vec![format!("10.96.0.{to}").parse().unwrap()];
                Change::Service(moved)
            }
            other => other,
        };
        stage.send(world());
        stage.send([service(8, protocol), service(9, protocol)]);
        run_for(&mut worker, MOMENT).await;
        stage.passes.store(0, SeqCst);
        stage.send([move_to(9, 8), move_to(8, 9)]);
        run_for(&mut worker, MOMENT).await;
        assert_eq!(stage.passes.load(SeqCst), expected, "{protocol:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_worker_ends_with_its_source() {
    let mut maps = Model::default();
    let mut stage = Stage::new(&maps);
    let mut worker = stage.worker(&mut maps);
    let Stage { changes, network, .. } = stage;
    drop(changes);
    timeout(Duration::from_secs(1), worker.run()).await.unwrap().unwrap();
    drop(network);
    let mut maps = Model::default();
    let mut stage = Stage::new(&maps);
    let mut worker = stage.worker(&mut maps);
    stage.network = watch::channel(Network::default()).0;
    let error = timeout(Duration::from_secs(1), worker.run()).await.unwrap().unwrap_err();
    assert!(error.to_string().contains("addresses ended"), "{error}");
}

#[path = "worker_measures_tests.rs"]
mod measures;
