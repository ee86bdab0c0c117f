//! How the control plane carries 10,000 Services of 10 endpoints: times and memory are printed (`--nocapture`, and
//! `--release` for figures that mean something); what is asserted is that the cost of a change does not grow with them.

#[path = "support/objects.rs"]
mod objects;

use std::io;
use std::time::{Duration, Instant};

use kubelane::model::{Change, Endpoint, Ipx, Kind, Protocol, Service, ServicePort, Slice};
use kubelane::sync::{Core, Failure, MapIo, MapName};
use objects::{new_core, service, slice};

const SERVICES: u32 = 10_000;
const ENDPOINTS: u32 = 10;

/// Takes every row and keeps the bytes of the last one, so that handing them over is not optimised away.
#[derive(Default)]
struct Sink {
    rows: usize,
    last: Vec<u8>,
}

impl MapIo for Sink {
    fn write(&mut self, _: MapName, keys: &[u8], values: &[u8], rows: usize) -> Vec<Failure> {
        self.rows += rows;
        self.last.clear();
        self.last.extend_from_slice(&keys[keys.len() - keys.len() / rows..]);
        self.last.extend_from_slice(&values[values.len() - values.len() / rows..]);
        Vec::new()
    }

    fn delete(&mut self, _: MapName, _: &[u8], rows: usize) -> Vec<Failure> {
        self.rows += rows;
        Vec::new()
    }

    fn dump(&mut self, _: MapName, _: &mut dyn FnMut(&[u8], &[u8])) -> io::Result<()> {
        Ok(())
    }

    fn note_changed_hands(&mut self) -> std::io::Result<()> {
        Ok(())
    }

    fn capacity(&self, map: MapName) -> u32 {
        match map {
            MapName::Services => 20_000,
            MapName::Slots => 524_288,
            MapName::Backends | MapName::Frontends | MapName::Addresses | MapName::SourceRanges => 131_072,
        }
    }
}

fn address(base: [u8; 2], n: u32) -> Ipx {
    let [_, _, high, low] = n.to_be_bytes();
    let [a, b] = base;
    Ipx::from(std::net::Ipv4Addr::new(a, b + (n >> 16) as u8, high, low))
}

fn one_service(n: u32) -> Service {
    let mut one = service(&format!("service-{n}"), "10.96.0.1");
    one.cluster_ips = vec![address([10, 96], n + 1)];
    one.ports = vec![ServicePort { name: "http".into(), protocol: Protocol::Tcp, port: 80, node_port: 0 }];
    one
}

fn one_slice(n: u32, endpoints: u32) -> Slice {
    let node = std::sync::Arc::<str>::from("node-b");
    let endpoint = |m: u32| Endpoint {
        ip: address([10, 128], n * ENDPOINTS + m),
        ready: true,
        serving: true,
        terminating: false,
        node: Some(node.clone()),
        hints: None,
    };
    slice(&format!("service-{n}-x"), &format!("service-{n}"), (0..endpoints).map(endpoint).collect())
}

fn resident_mib() -> f64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: f64 = statm.split_whitespace().nth(1).unwrap().parse().unwrap();
    pages * 4096.0 / 1048576.0
}

/// What this thread has run, apart from what others took of the processor (the scheduler's own figure, nanoseconds).
fn processor_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    Duration::from_nanos(stat.split_whitespace().next().and_then(|ns| ns.parse().ok()).unwrap_or(0))
}

fn load(core: &mut Core) -> Duration {
    let started = Instant::now();
    for kind in [Kind::Services, Kind::EndpointSlices] {
        core.apply(Change::ListBegin(kind));
    }
    for n in 0..SERVICES {
        core.apply(Change::Service(Box::new(one_service(n))));
        core.apply(Change::Slice(Box::new(one_slice(n, ENDPOINTS))));
    }
    for kind in [Kind::Services, Kind::EndpointSlices] {
        core.apply(Change::ListEnd(kind));
    }
    started.elapsed()
}

#[test]
fn a_change_among_ten_thousand_services_costs_as_much_as_among_one() {
    let before = resident_mib();
    let (mut core, mut sink) = (new_core(), Sink::default());
    let loaded = load(&mut core);
    let world = resident_mib();
    let now = Instant::now();
    let processor = processor_time();
    let report = core.sync(&mut sink, now);
    let processor = processor_time() - processor;
    println!("objects made and applied: {loaded:?}; world {:.1} MiB", world - before);
    println!(
        "first sync: {:?} ({processor:?} of processor time), {} rows in {} calls; all {:.1} MiB",
        report.duration,
        report.rows_written,
        report.calls,
        resident_mib() - before
    );
    assert_eq!((report.services, report.failures.len()), (SERVICES as usize, 0));
    assert_eq!(report.rows_written as u32, SERVICES * (2 * ENDPOINTS + 3));

    let started = Instant::now();
    core.apply(Change::Slice(Box::new(one_slice(SERVICES / 2, ENDPOINTS - 1))));
    let report = core.sync(&mut sink, now + Duration::from_secs(2));
    println!("one endpoint removed: {:?} from event to map, {} calls", started.elapsed(), report.calls);
    assert_eq!((report.services, report.calls, report.rows_written), (1, 2, 2));

    let reloaded = load(&mut core);
    let report = core.sync(&mut sink, now + Duration::from_secs(4));
    println!("relist of an unchanged world: {reloaded:?}, then a sync of {:?}", report.duration);
    // Its id has rested and still stands in the slot: the backend and the count are all there is to write.
    assert_eq!((report.services, report.calls), (1, 2), "the endpoint that was removed is back, nothing else");
}

/// Processor time of a first sync of `count` Services that all ask for one external IP and port, and its warnings.
fn contest(count: u32) -> (Duration, usize) {
    let (mut core, mut sink) = (new_core(), Sink::default());
    let contender =
        |n| Service { external_ips: vec![address([192, 0], 513)], created: i64::from(n % 7), ..one_service(n) };
    objects::list(&mut core, (0..count).map(contender), (0..count).map(|n| one_slice(n, 1)));
    let before = processor_time();
    let report = core.sync(&mut sink, Instant::now());
    assert_eq!(report.services, count as usize);
    (processor_time() - before, report.warnings.len())
}

#[test]
fn a_contested_frontend_costs_each_claimant_the_same_and_is_warned_of_once() {
    contest(200);
    let runs = [200, 400, 800, 1600].map(|count| (count, contest(count)));
    for (count, (time, warnings)) in runs {
        println!("{count} Services with one external IP and port: {time:?} of processor time, {warnings} warnings");
        assert_eq!(warnings, 1);
    }
    let each = runs.map(|(count, (time, _))| time / count);
    assert!(each[3] < each[0] * 4, "{each:?}");
}

#[test]
fn a_change_in_a_service_of_five_thousand_endpoints_is_two_rows() {
    let (mut core, mut sink) = (new_core(), Sink::default());
    let part = |n: u32, endpoints| {
        let mut part = one_slice(n, endpoints);
        part.service = "service-0".into();
        part
    };
    objects::list(&mut core, [one_service(0)], (0..500).map(|n| part(n, ENDPOINTS)));
    let now = Instant::now();
    println!("5,000 endpoints in one Service: first sync {:?}", core.sync(&mut sink, now).duration);
    let started = Instant::now();
    core.apply(Change::Slice(Box::new(part(499, ENDPOINTS - 1))));
    let report = core.sync(&mut sink, now);
    println!("one of 5,000 removed: {:?} from event to map, {} calls", started.elapsed(), report.calls);
    assert_eq!((report.calls, report.rows_written), (2, 2));
}
