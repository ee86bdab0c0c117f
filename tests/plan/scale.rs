//! How the control plane carries 10,000 Services of 10 endpoints: times and memory are printed (`--nocapture`, and
//! `--release` for figures that mean something); what is asserted is that the cost of a change does not grow with them.

use std::io;
use std::time::{Duration, Instant};

use crate::model_kernel::ModelKernel;
use crate::records::{self, new_core, service, slice};
use kubelane::model::{Change, Endpoint, Ipx, Kind, Protocol, Service, ServicePort, Slice};
use kubelane::sync::{Core, Failure, MapIo, MapName};
use nix::time::{ClockId, clock_gettime};

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

    fn note_new_owners(&mut self) -> std::io::Result<()> {
        Ok(())
    }

    fn capacity(&self, map: MapName) -> u32 {
        match map {
            MapName::Services => 20_000,
            MapName::Backends => 262_144,
            MapName::Slots => 524_288,
            MapName::Frontends | MapName::Addresses | MapName::SourceRanges => 131_072,
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

/// What this thread has run, apart from what others took of the processor.
fn processor_time() -> Duration {
    Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap())
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
    records::list(&mut core, (0..count).map(contender), (0..count).map(|n| one_slice(n, 1)));
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

/// A Service of so many endpoints in slices of a hundred: the processor time of its first sync, and of one endpoint that
/// goes, comes, or becomes unready.
fn one_large_service(endpoints: u32) -> (Duration, [Duration; 3]) {
    let (mut core, mut sink) = (new_core(), Sink::default());
    let last = endpoints / 100 - 1;
    let part = |n: u32, count: u32| {
        let mut part = one_slice(n * 10, count);
        (part.name, part.service) = (records::name(&format!("part-{n}")), "service-0".into());
        part
    };
    let before = processor_time();
    records::list(&mut core, [one_service(0)], (0..=last).map(|n| part(n, 100)));
    let mut now = Instant::now();
    let report = core.sync(&mut sink, now);
    let first = processor_time() - before;
    assert_eq!((report.failures.len(), core.counts().slots as u32), (0, endpoints));
    let mut unready = part(last / 2, 100);
    unready.endpoints[50].ready = false;
    let steps = [(part(last, 99), 2), (part(last, 100), 2), (unready, 3)];
    let changes = steps.map(|(part, calls)| {
        now += Duration::from_secs(2);
        let before = processor_time();
        core.apply(Change::Slice(Box::new(part)));
        let report = core.sync(&mut sink, now);
        let time = processor_time() - before;
        assert_eq!((report.services, report.calls), (1, calls));
        assert!(report.rows_written <= 3, "{report:?}");
        time
    });
    (first, changes)
}

#[test]
fn a_change_of_one_endpoint_costs_little_however_many_its_service_has() {
    one_large_service(2000);
    for endpoints in [100, 5000, 50_000] {
        let (first, changes) = one_large_service(endpoints);
        println!("{endpoints} endpoints in one Service: first sync {first:?}, one gone, back, unready: {changes:?}");
        let each = changes.iter().sum::<Duration>() / 3;
        assert!(endpoints < 5000 || each * 20 < first, "{each:?} each, all at once {first:?}");
    }
}

#[test]
fn changes_of_a_large_service_end_where_a_compile_as_a_whole_does() {
    let kernels = [1, usize::MAX].map(|large_from| {
        let (mut core, mut kernel) = (new_core(), ModelKernel::default());
        kernel.judging = false;
        core.set_large_from(large_from);
        let part = |n: u32, count| {
            slice(&format!("part-{n}"), "web", crate::bench::hosts(n as u16 * 100..n as u16 * 100 + count))
        };
        records::list(&mut core, [service("web", "10.96.0.1")], (0..8).map(|n| part(n, 100)));
        for (n, count) in [(7, 99), (3, 0), (0, 50), (5, 1), (3, 100), (6, 0), (1, 99), (0, 100)] {
            core.apply(Change::Slice(Box::new(part(n, count))));
            let now = kernel.now;
            let report = core.sync(&mut kernel, now);
            assert_eq!((report.failures.len(), core.pending()), (0, false));
            kernel.check();
            kernel.now += Duration::from_secs(1);
        }
        (kernel.meaning(), core.counts())
    });
    assert_eq!(kernels[0], kernels[1]);
}
