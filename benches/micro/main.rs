//! Criterion: the pure parts of the daemon, one by one. compile() of a Service, the first sync of 10,000 Services and
//! one change against a map in memory, and the parsing of one EndpointSlice.

mod memory;
mod objects;

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kubelane::model::{Change, Kind, Masquerade};
use kubelane::objects::convert::{Convert as _, Converter};
use kubelane::objects::{Settings, wire};
use kubelane::plan::compile::{Context, compile};
use kubelane::plan::quotas::UNLIMITED;
use kubelane::plan::select::Place;
use kubelane::sync::{Core, CoreSettings};

use memory::Memory;

/// The size that the targets are given for.
const SERVICES: u32 = 10_000;
const ENDPOINTS: u32 = 10;
const NODE: &str = "node-1";

fn compile_one_service(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("compile one Service");
    let bound = Default::default();
    for endpoints in [10, 100, 5_000] {
        let (service, slices) = objects::service(0, endpoints);
        let slices: Vec<_> = slices.iter().collect();
        let place = Place { node: NODE, zone: None };
        let masquerade = Masquerade::default();
        let context = Context { place, bound: &bound, limits: UNLIMITED, masquerade, internal_ips: &[] };
        group.throughput(Throughput::Elements(endpoints.into()));
        group.bench_function(BenchmarkId::new("endpoints", endpoints), |bencher| {
            bencher.iter(|| compile(black_box(&service), black_box(&slices), context));
        });
    }
    group.finish();
}

/// A core that has the world but has not written it.
fn listed() -> Core {
    let mut core = Core::new(CoreSettings { node_name: NODE.to_owned(), ..CoreSettings::default() });
    for kind in [Kind::Services, Kind::EndpointSlices] {
        core.apply(Change::ListBegin(kind));
    }
    for number in 0..SERVICES {
        let (service, slices) = objects::service(number, ENDPOINTS);
        core.apply(Change::Service(Box::new(service)));
        for slice in slices {
            core.apply(Change::Slice(Box::new(slice)));
        }
    }
    for kind in [Kind::Services, Kind::EndpointSlices] {
        core.apply(Change::ListEnd(kind));
    }
    core
}

fn sync(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sync, 10,000 Services with 10 endpoints");
    group.sample_size(10);
    group.bench_function("first", |bencher| {
        bencher.iter_batched(
            || (listed(), Memory::default()),
            |(mut core, mut maps)| {
                let report = core.sync(&mut maps, Instant::now());
                assert_eq!(report.services, SERVICES as usize);
                (core, maps)
            },
            BatchSize::PerIteration,
        );
    });
    group.sample_size(100);
    let (mut core, mut maps) = (listed(), Memory::default());
    core.sync(&mut maps, Instant::now());
    // A clock of its own: ids rest for seconds before they are used again, and changes come faster here than they rest.
    let (mut number, mut now) = (0, Instant::now());
    group.bench_function("one endpoint gets another address", |bencher| {
        bencher.iter_batched(
            || {
                number += 1;
                objects::changed_slice(number % SERVICES, number)
            },
            |slice| {
                now += Duration::from_millis(10);
                core.apply(Change::Slice(Box::new(slice)));
                let report = core.sync(&mut maps, now);
                assert_eq!(report.services, 1);
                report
            },
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

fn parse(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("parse one EndpointSlice of 10 endpoints");
    let json = objects::slice_as_returned(10);
    let yaml = serde_norway::to_string(&json).expect("JSON is YAML");
    let json = json.to_string();
    let mut converter = Converter::new(Settings { node_name: NODE.to_owned(), service_proxy_name: None });
    group.throughput(Throughput::Bytes(json.len() as u64));
    group.bench_function("JSON", |bencher| {
        bencher.iter(|| {
            let slice: wire::EndpointSlice = serde_json::from_str(black_box(&json)).expect("it is a slice");
            slice.convert(&mut converter)
        });
    });
    group.throughput(Throughput::Bytes(yaml.len() as u64));
    group.bench_function("YAML", |bencher| {
        bencher.iter(|| {
            let slice: wire::EndpointSlice = serde_norway::from_str(black_box(&yaml)).expect("it is a slice");
            slice.convert(&mut converter)
        });
    });
    group.finish();
}

criterion_group!(benches, compile_one_service, sync, parse);
criterion_main!(benches);
