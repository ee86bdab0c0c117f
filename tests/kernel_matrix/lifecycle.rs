//! The BPF object in the real kernel, without the daemon: loading, pinning, adopting, the account of map writes, and
//! leaving nothing behind. Each test has a BPF file system and a cgroup of its own.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::laboratory::pins::Pins;
use crate::laboratory::records;
use kubelane::abi::{Backend, FrontendKey, ServiceName, SourceRangeKey, abi_version};
use kubelane::bpf::{self, Datapath, Maps, Settings};
use kubelane::model::{IpRange, Protocol};
use kubelane::sync::{Failure, MapIo, MapName};
use libbpf_rs::{Link, MapCore, MapHandle};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

fn settings(pins: &Pins) -> Settings {
    Settings { max_source_ranges: 64, ..pins.settings() }
}

/// How many programs are linked to this cgroup's connect4 hook.
fn attached_to_connect4(pins: &Pins) -> usize {
    // Not `bpftool cgroup show`: on kernels older than itself it shows nothing.
    let out = std::process::Command::new("bpftool").args(["link", "show"]).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let cgroup = format!("cgroup_id {} ", fs::metadata(&pins.cgroup).unwrap().ino());
    let is_here = |line: &&str| line.contains(&cgroup) && line.contains("attach_type cgroup_inet4_connect");
    String::from_utf8_lossy(&out.stdout).lines().filter(is_here).count()
}

fn frontend_keys(n: u16) -> Vec<u8> {
    let key = |port| FrontendKey::new("10.96.0.1".parse().unwrap(), port, Protocol::Tcp);
    (1..=n).flat_map(|port| bytemuck::bytes_of(&key(port)).to_vec()).collect()
}

fn rows(maps: &mut Maps, map: MapName) -> usize {
    let mut n = 0;
    maps.dump(map, &mut |_, _| n += 1).unwrap();
    n
}

#[test]
fn rows_that_do_not_fit_are_named_one_by_one_and_the_others_are_written() {
    let place = Pins::new();
    let mut datapath = Datapath::open(&settings(&place)).unwrap();
    let maps = datapath.maps();
    // 64 services give 256 frontends.
    let failures = maps.write(MapName::Frontends, &frontend_keys(300), &[0u8; 300 * 36], 300);
    assert_eq!(failures.iter().map(|f| f.row).collect::<Vec<_>>(), (256..300).collect::<Vec<_>>());
    assert!(failures.iter().all(|f| f.error.raw_os_error() == Some(libc::E2BIG)));
    assert_eq!(rows(maps, MapName::Frontends), 256);
}

fn ip_range(text: &str, prefix: u8) -> IpRange {
    IpRange { ip: records::ip(text), prefix }
}

#[test]
fn deleting_what_is_not_there_counts_as_deleted_and_the_rest_goes_on() {
    let place = Pins::new();
    let mut datapath = Datapath::open(&settings(&place)).unwrap();
    let maps = datapath.maps();
    let keys = frontend_keys(10);
    assert!(maps.write(MapName::Frontends, &keys[..5 * 20], &[0u8; 5 * 36], 5).is_empty());
    let mut shuffled = keys[5 * 20..].to_vec();
    shuffled.extend_from_slice(&keys[..5 * 20]);
    assert!(maps.delete(MapName::Frontends, &shuffled, 10).is_empty());
    assert_eq!(rows(maps, MapName::Frontends), 0);
}

#[test]
fn a_map_of_any_kind_that_is_full_takes_what_fits_and_says_that_it_is_full() {
    let place = Pins::new();
    let mut datapath = Datapath::open(&settings(&place)).unwrap();
    let maps = datapath.maps();
    let ranges: Vec<SourceRangeKey> = (0..100).map(|n| SourceRangeKey::new(n, ip_range("10.0.0.0", 8))).collect();
    let ids: Vec<u32> = (0..200).collect();
    let addresses: Vec<u8> = (0u128..200).flat_map(|n| (n + 1).to_be_bytes()).collect();
    let table: [(MapName, &[u8], usize, usize); 4] = [
        (MapName::SourceRanges, bytemuck::cast_slice(&ranges), 4, 100),
        (MapName::Services, bytemuck::cast_slice(&ids), size_of::<ServiceName>(), 200),
        (MapName::Frontends, &frontend_keys(300), 36, 300),
        (MapName::Addresses, &addresses, 4, 200),
    ];
    for (map, keys, value_size, rows) in table {
        let failures = maps.write(map, keys, &vec![1u8; rows * value_size], rows);
        assert_eq!(failures.len(), rows - maps.capacity(map) as usize, "{map:?}");
        let is_full = |failure: &Failure| failure.is_full();
        assert!(failures.iter().all(is_full), "{map:?}: {:?}", failures[0]);
        assert!(failures[0].error.raw_os_error().is_some(), "{map:?}: {:?}", failures[0]);
    }
}

#[test]
fn a_dump_holds_every_row_of_a_hash_and_every_row_of_an_array_that_is_not_zero() {
    let place = Pins::new();
    let mut settings = settings(&place);
    settings.max_services = 10_000;
    settings.max_endpoints = 10_000;
    let mut datapath = Datapath::open(&settings).unwrap();
    let maps = datapath.maps();
    maps.reserve(&[(MapName::Services, 20_000), (MapName::Slots, 40_000)]);
    let ids: Vec<u32> = (0..20_000).collect();
    let names: Vec<ServiceName> = ids.iter().map(|i| ServiceName::new(&format!("ns/s{i}"))).collect();
    assert!(maps.write(MapName::Services, bytemuck::cast_slice(&ids), bytemuck::cast_slice(&names), 20_000).is_empty());
    let mut seen = vec![false; 20_000];
    maps.dump(MapName::Services, &mut |key, value| {
        let id: u32 = bytemuck::pod_read_unaligned(key);
        let name: ServiceName = bytemuck::pod_read_unaligned(value);
        assert_eq!(name.as_str(), format!("ns/s{id}"));
        assert!(!std::mem::replace(&mut seen[id as usize], true), "{id} twice");
    })
    .unwrap();
    assert!(seen.iter().all(|s| *s));

    let index = [7u32, 9_999, 39_999];
    assert!(
        maps.write(MapName::Slots, bytemuck::cast_slice(&index), bytemuck::cast_slice(&[1u32, 2, 3]), 3).is_empty()
    );
    let mut found = Vec::new();
    maps.dump(MapName::Slots, &mut |k, v| {
        found.push((bytemuck::pod_read_unaligned(k), bytemuck::pod_read_unaligned(v)))
    })
    .unwrap();
    assert_eq!(found, [(7u32, 1u32), (9_999, 2), (39_999, 3)]);
}

#[test]
fn a_second_daemon_takes_the_programs_and_rows_over_and_two_at_once_are_refused() {
    let place = Pins::new();
    let settings = settings(&place);
    let mut first = Datapath::open(&settings).unwrap();
    assert!(!first.adopted());
    assert_eq!(attached_to_connect4(&place), 1);
    assert!(first.maps().write(MapName::Frontends, &frontend_keys(3), &[1u8; 3 * 36], 3).is_empty());

    let refused = Datapath::open(&settings).err().expect("the directory is held").to_string();
    assert!(refused.contains("a running kubelane holds"), "{refused}");
    drop(first);
    assert_eq!(attached_to_connect4(&place), 1, "stays attached without the daemon");

    let mut second = Datapath::open(&settings).unwrap();
    assert!(second.adopted());
    assert_eq!(attached_to_connect4(&place), 1, "replaced in place, not added");
    assert_eq!(rows(second.maps(), MapName::Frontends), 3);
}

/// Names and identities of what is pinned in a directory.
fn pins(directory: &Path) -> BTreeMap<String, u32> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let id = |path: &PathBuf| match MapHandle::from_pinned_path(path) {
        Ok(map) => map.info().unwrap().info.id,
        Err(_) => Link::open(path).unwrap().info().unwrap().id,
    };
    entries.map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), id(&path))).collect()
}

#[test]
fn a_map_that_fills_up_grows_and_nothing_else_changes() {
    let place = Pins::new();
    let mut settings = settings(&place);
    (settings.max_services, settings.max_endpoints) = (50_000, 50_000);
    let mut datapath = Datapath::open(&settings).unwrap();
    let state = settings.pin_path.join(format!("v{}", abi_version::ABI_VERSION));
    let (maps_before, links_before) = (pins(&state.join("maps")), pins(&state.join("links")));
    let hooks = datapath.socket_hooks();
    let maps = datapath.maps();
    let sizes = |maps: &Maps| MapName::ALL.map(|map| maps.size(map));
    assert_eq!(sizes(maps), [4096, 4096, 16_384, 4096, 4096, 64]);
    assert_eq!(maps.capacity(MapName::Frontends), 200_000);

    // Not yet; then: what is half full, too, but not the others.
    let keys = frontend_keys(3073);
    maps.reserve(&[(MapName::Frontends, 3072), (MapName::Services, 1000)]);
    assert!(maps.write(MapName::Frontends, &keys[..3072 * 20], &[1u8; 3072 * 36], 3072).is_empty());
    let ids: Vec<u32> = (1..=3000).collect();
    let backend = vec![7u8; 3000 * size_of::<Backend>()];
    assert!(maps.write(MapName::Backends, bytemuck::cast_slice(&ids), &backend, 3000).is_empty());
    assert_eq!(pins(&state.join("maps")), maps_before);
    maps.reserve(&[(MapName::Frontends, 3073), (MapName::Backends, 3001), (MapName::Services, 1000)]);
    assert_eq!(sizes(maps), [4096, 8192, 16_384, 8192, 4096, 64]);
    assert!(maps.write(MapName::Frontends, &keys[3072 * 20..], &[1u8; 36], 1).is_empty());
    assert_eq!((rows(maps, MapName::Frontends), rows(maps, MapName::Backends)), (3073, 3000));

    let is_other = |(name, id): (&String, &u32)| (maps_before[name] != *id).then(|| name.clone());
    let grown: Vec<String> = pins(&state.join("maps")).iter().filter_map(is_other).collect();
    assert_eq!(grown, ["backends", "frontends"]);
    assert_eq!(pins(&state.join("links")), links_before, "each link got another program, and stayed");
    assert!(hooks.missing().unwrap().is_empty(), "who looks at the attachments knows the new programs");
    assert_eq!(attached_to_connect4(&place), 1);

    // Nobody holds the smaller ones any more. The kernel frees them a moment later.
    for name in ["backends", "frontends"] {
        let since = Instant::now();
        while MapHandle::from_map_id(maps_before[name]).is_ok() {
            assert!(since.elapsed() < Duration::from_secs(10), "the former map {name} is still there");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    // As if it had been killed while they grew once more.
    MapHandle::from_pinned_path(state.join("maps/slots")).unwrap().pin(state.join("maps/slots_new")).unwrap();
    drop(datapath);
    let mut next = Datapath::open(&settings).unwrap();
    assert!(!state.join("maps/slots_new").exists());
    assert_eq!(sizes(next.maps()), [4096, 8192, 16_384, 8192, 4096, 64]);
    assert_eq!((rows(next.maps(), MapName::Frontends), rows(next.maps(), MapName::Backends)), (3073, 3000));
}

#[test]
fn a_map_that_cannot_grow_stays_and_so_do_the_programs() {
    let place = Pins::new();
    let mut settings = settings(&place);
    settings.max_services = 50_000;
    let mut datapath = Datapath::open(&settings).unwrap();
    let hooks = datapath.socket_hooks();
    let maps = datapath.maps();
    let remount = |flags| mount(None::<&str>, &place.bpffs, None::<&str>, MsFlags::MS_REMOUNT | flags, None::<&str>);
    remount(MsFlags::MS_RDONLY).unwrap();
    maps.reserve(&[(MapName::Frontends, 5000), (MapName::Addresses, 3500)]);
    remount(MsFlags::empty()).unwrap();
    assert_eq!((maps.size(MapName::Frontends), maps.capacity(MapName::Frontends)), (4096, 200_000));
    let failures = maps.write(MapName::Frontends, &frontend_keys(5000), &[1u8; 5000 * 36], 5000);
    assert_eq!(failures.len(), 5000 - 4096, "what has room is written");
    assert!(hooks.missing().unwrap().is_empty(), "the programs are those of before");
    let pinned =
        MapHandle::from_pinned_path(settings.pin_path.join(format!("v{}/maps/frontends", abi_version::ABI_VERSION)))
            .unwrap();
    assert_eq!(pinned.max_entries(), 4096);
}

#[test]
fn a_daemon_that_is_told_of_another_limit_needs_no_cleanup() {
    let place = Pins::new();
    let mut settings = settings(&place);
    let ranges: Vec<SourceRangeKey> = (0..60).map(|n| SourceRangeKey::new(n, ip_range("10.0.0.0", 8))).collect();
    let mut datapath = Datapath::open(&settings).unwrap();
    let ones = vec![1u32; ranges.len()];
    let keys: &[u8] = bytemuck::cast_slice(&ranges);
    let failures = datapath.maps().write(MapName::SourceRanges, keys, bytemuck::cast_slice(&ones), ranges.len());
    assert!(failures.is_empty(), "{failures:?}");
    drop(datapath);
    (settings.max_endpoints, settings.max_source_ranges) = (100_000, 1000);
    let mut datapath = Datapath::open(&settings).unwrap();
    let maps = datapath.maps();
    maps.reserve(&[(MapName::SourceRanges, 60)]);
    assert_eq!((maps.size(MapName::SourceRanges), rows(maps, MapName::SourceRanges)), (128, 60), "a trie, too");
    assert_eq!((maps.size(MapName::Backends), maps.capacity(MapName::Backends)), (1024, 100_000));
    maps.reserve(&[(MapName::Backends, 90_000)]);
    assert_eq!(maps.size(MapName::Backends), 100_000);
    drop(datapath);
    // What is there is never taken away.
    settings.max_endpoints = 1024;
    assert_eq!(Datapath::open(&settings).unwrap().maps().capacity(MapName::Backends), 100_000);
}

#[test]
fn what_a_newer_version_has_left_is_refused_unless_it_is_to_be_discarded() {
    let place = Pins::new();
    let mut settings = settings(&place);
    let newer = settings.pin_path.join(format!("v{}", abi_version::ABI_VERSION + 1));
    fs::create_dir_all(newer.join("maps")).unwrap();
    let refused = Datapath::open(&settings).err().expect("refused").to_string();
    assert!(refused.contains("a newer kubelane has run here"), "{refused}");
    assert!(newer.exists() && !settings.pin_path.join(format!("v{}", abi_version::ABI_VERSION)).exists());
    settings.discard_newer = true;
    Datapath::open(&settings).unwrap();
    assert!(!newer.exists());
}

#[test]
fn another_cgroup_gets_the_programs_and_the_former_one_loses_them() {
    let (place, other) = (Pins::new(), Pins::new());
    let mut settings = settings(&place);
    drop(Datapath::open(&settings).unwrap());
    settings.cgroup = other.cgroup.clone();
    let datapath = Datapath::open(&settings).unwrap();
    assert!(!datapath.adopted());
    assert_eq!((attached_to_connect4(&place), attached_to_connect4(&other)), (0, 1));
}

#[test]
fn cleanup_leaves_nothing_attached_and_nothing_pinned_and_is_refused_while_a_daemon_runs() {
    let place = Pins::new();
    let settings = settings(&place);
    let datapath = Datapath::open(&settings).unwrap();
    let refused = bpf::cleanup(&settings.pin_path).unwrap_err().to_string();
    assert!(refused.contains("stop it first"), "{refused}");
    drop(datapath);
    let removed = bpf::cleanup(&settings.pin_path).unwrap().removed;
    assert!(removed.iter().any(|r| r.ends_with("links/connect4")), "{removed:?}");
    assert_eq!(attached_to_connect4(&place), 0);
    assert!(!settings.pin_path.exists());
    assert!(bpf::cleanup(&settings.pin_path).unwrap().removed.is_empty());
}

#[test]
fn a_pin_path_that_is_not_on_a_bpf_file_system_is_refused_with_the_command_that_mounts_one() {
    let place = Pins::new();
    let mut settings = settings(&place);
    settings.pin_path = std::env::temp_dir().join("kubelane-not-bpffs");
    let refused = Datapath::open(&settings).err().expect("refused").to_string();
    assert!(refused.contains("mount -t bpf bpf"), "{refused}");
    assert!(!settings.pin_path.exists());
}

#[test]
fn this_kernel_has_every_required_feature() {
    for feature in bpf::probe::features() {
        assert!(feature.found || !feature.required, "{}: {}", feature.name, feature.without);
    }
}

#[test]
fn an_audit_finds_the_rows_that_somebody_else_changed_and_the_next_sync_repairs_them() {
    type Rows = BTreeMap<Vec<u8>, Vec<u8>>;
    let place = Pins::new();
    let mut datapath = Datapath::open(&settings(&place)).unwrap();
    let mut others = Maps::open(&settings(&place).pin_path).unwrap();
    let mut dump = |map: MapName| {
        let mut rows = Rows::new();
        others.dump(map, &mut |key, value| drop(rows.insert(key.to_vec(), value.to_vec()))).unwrap();
        rows
    };
    let range = ip_range;
    let mut service = records::service("web", "10.96.0.1");
    service.load_balancer_ips = vec![records::ip("192.0.2.1")];
    service.source_ranges = vec![range("10.1.0.0", 16), range("10.2.0.0", 16)];
    let endpoints = ["10.244.0.1", "10.244.0.2"].map(records::ready).into();
    let mut core = records::new_core();
    records::list(&mut core, [service], [records::slice("web-1", "web", endpoints)]);
    assert_eq!(core.sync(datapath.maps(), Instant::now()).failures, []);
    let mut reader = Maps::open(&settings(&place).pin_path).unwrap();
    let mut audit = |core: &kubelane::sync::Core, map| core.snapshot(map).unwrap().compare(&mut reader).unwrap();
    let before = MapName::ALL.map(&mut dump);
    assert!(before.iter().all(|rows| !rows.is_empty()), "{before:?}");
    assert!(MapName::ALL.iter().all(|map| audit(&core, *map).is_empty()));

    let mut foreign = Maps::open(&settings(&place).pin_path).unwrap();
    let first = |map: MapName| before[map as usize].first_key_value().unwrap();
    let value = |map: MapName| vec![0xee; first(map).1.len()];
    assert!(foreign.delete(MapName::Frontends, first(MapName::Frontends).0, 1).is_empty());
    assert!(foreign.delete(MapName::SourceRanges, first(MapName::SourceRanges).0, 1).is_empty());
    // It covers the one that is gone: a look-up of that finds this.
    let wide = SourceRangeKey::new(1, range("10.0.0.0", 8));
    assert!(foreign.write(MapName::SourceRanges, bytemuck::bytes_of(&wide), &1u32.to_ne_bytes(), 1).is_empty());
    for map in [MapName::Services, MapName::Slots, MapName::Addresses] {
        assert!(foreign.write(map, first(map).0, &value(map), 1).is_empty());
    }
    let expected = [1, 0, 1, 1, 1, 2];
    let different = MapName::ALL.map(|map| audit(&core, map));
    let corrected = MapName::ALL.map(|map| core.correct(map, &different[map as usize], datapath.maps()).unwrap());
    assert_eq!((different.map(|keys| keys.len()), corrected), (expected, expected));
    assert_eq!(core.sync(datapath.maps(), Instant::now()).failures, []);
    assert_eq!(MapName::ALL.map(dump), before);
    assert!(MapName::ALL.iter().all(|map| audit(&core, *map).is_empty()));
}

/// Runs it while signals come to its thread, with this pause between them: the verifier gives up when one waits, and libbpf
/// tries five times only.
fn among_signals<T>(pause: Duration, run: impl FnOnce() -> T) -> T {
    extern "C" fn ignore(_: libc::c_int) {}
    let action = SigAction::new(SigHandler::Handler(ignore), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler does nothing.
    unsafe { sigaction(Signal::SIGUSR1, &action) }.unwrap();
    // SAFETY: it takes no arguments.
    let (runner, is_over) = (unsafe { libc::pthread_self() }, AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                // SAFETY: the thread outlives this one, which is joined below.
                assert_eq!(unsafe { libc::pthread_kill(runner, libc::SIGUSR1) }, 0);
                std::thread::sleep(pause);
            }
        });
        let result = std::panic::catch_unwind(AssertUnwindSafe(run));
        is_over.store(true, Ordering::Relaxed);
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[test]
fn signals_do_not_keep_the_object_from_being_loaded() {
    let place = Pins::new();
    among_signals(Duration::from_micros(200), || Datapath::open(&settings(&place))).unwrap();
}

/// A question that a signal interrupts has no answer: taken for one, 5.10 seemed to have bpf_set_retval now and then, and
/// refused the programs that called it.
#[test]
fn signals_do_not_change_what_the_kernel_is_found_to_do() {
    let found = || bpf::probe::features().into_iter().map(|feature| (feature.name, feature.found)).collect::<Vec<_>>();
    let quiet = found();
    among_signals(Duration::ZERO, || {
        for _ in 0..3 {
            assert_eq!(found(), quiet);
        }
    });
}
