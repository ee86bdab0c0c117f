//! The former version's daemon, for tests of upgrades: its BPF object is in `data/v2` (compiled from the last sources with
//! ABI_VERSION 2, without debug information), and a stand-in loads, fills and attaches it. `KUBELANE_FORMER=FILE` takes that version's real daemon in its place.

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use kubelane::abi::abi_version;
use kubelane::bpf;
use libbpf_rs::{MapCore as _, MapFlags, MapHandle, MapType, Object, ObjectBuilder};

use crate::laboratory::cluster::Cluster;
use crate::laboratory::daemon::{Daemon, arguments};

const OBJECT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/v2/kubelane.bpf.o");
/// Its directory below the pin path.
pub const FORMER: &str = "v2";
/// Of `struct config`: host_netns_cookie, has_set_retval, snat_first, snat_ports.
const SNAT: (u16, u16) = (10_000, 20_000);
/// With the same rows in both versions.
const ROWS: [&str; 6] = ["services", "backends", "slots", "frontends", "addresses", "source_ranges"];
/// Hash maps whose size that version's daemon chose.
const SIZED: [(&str, u32); 3] = [("affinities", 65_536), ("flows", 131_072), ("new_flows", 65_536)];

type Rows = Vec<(Vec<u8>, Vec<u8>)>;

/// A map as the present daemon has left it.
struct Left {
    size: u32,
    rows: Rows,
}

fn read(pins: &Path, name: &str) -> Left {
    let map = MapHandle::from_pinned_path(pins.join(format!("v{}/maps", abi_version::ABI_VERSION)).join(name)).unwrap();
    let is_array = map.map_type() == MapType::Array;
    let rows = map.keys().filter_map(|key| Some((key.clone(), map.lookup(&key, MapFlags::ANY).unwrap()?)));
    let rows = rows.filter(|(_, value)| !is_array || value.iter().any(|byte| *byte != 0)).collect();
    Left { size: map.max_entries(), rows }
}

/// What the former version's daemon leaves behind when it ends, in the world that the present one has just left.
fn leave_former_state(cluster: &Cluster) {
    let node = cluster.lab.node("node1");
    let pins = &node.pin_path;
    let rows = ROWS.map(|name| (name, read(pins, name)));
    let (filter, devices) = (read(pins, "wire_filter"), read(pins, "devices"));
    node.cleanup().unwrap();
    let maps = pins.join(FORMER).join("maps");
    fs::create_dir_all(&maps).unwrap();
    fs::create_dir_all(pins.join(FORMER).join("links")).unwrap();

    let cookie = node.host.inside(|| Ok(bpf::own_cookie().unwrap())).unwrap();
    let mut open = ObjectBuilder::default().open_file(OBJECT).unwrap();
    for mut map in open.maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        if name.ends_with(".rodata") {
            let config = map.initial_value_mut().unwrap();
            config[..8].copy_from_slice(&cookie.to_ne_bytes());
            config[8..12].copy_from_slice(&1u32.to_ne_bytes());
            config[12..14].copy_from_slice(&SNAT.0.to_ne_bytes());
            config[14..16].copy_from_slice(&SNAT.1.to_ne_bytes());
            continue;
        }
        let left = rows.iter().find(|(other, _)| *other == name).map(|(_, left)| left.size);
        let sized = SIZED.iter().find(|(other, _)| *other == name).map(|(_, size)| *size);
        if let Some(size) = left.or(sized) {
            map.set_max_entries(size).unwrap();
        }
        if name != "service_connections" {
            map.set_pin_path(maps.join(&name)).unwrap();
        }
    }
    for mut program in open.progs_mut() {
        if program.name().to_string_lossy().starts_with("find_stale") {
            program.set_autoload(false);
        }
    }
    let object = open.load().unwrap();
    for (name, left) in &rows {
        fill(&object, name, &left.rows);
    }
    // That version's rows are shorter.
    fill(&object, "wire_filter", &filter.rows);
    fill(&object, "devices", &devices.rows);
    attach(cluster, &object, &devices.rows);
}

fn fill(object: &Object, name: &str, rows: &Rows) {
    let map = object.maps().find(|map| map.name() == name).unwrap();
    for (key, value) in rows {
        map.update(key, &value[..map.value_size() as usize], MapFlags::ANY).unwrap();
    }
}

fn attach(cluster: &Cluster, object: &Object, devices: &Rows) {
    let node = cluster.lab.node("node1");
    let links = node.pin_path.join(FORMER).join("links");
    let cgroup = fs::File::open(&node.cgroup).unwrap();
    let program = |name: &str| object.progs().find(|other| other.name() == name).unwrap().as_fd().as_raw_fd();
    let mut wanted = Vec::new();
    for (name, hook) in [
        ("recvmsg4", libbpf_sys::BPF_CGROUP_UDP4_RECVMSG),
        ("recvmsg6", libbpf_sys::BPF_CGROUP_UDP6_RECVMSG),
        ("getpeername4", libbpf_sys::BPF_CGROUP_INET4_GETPEERNAME),
        ("getpeername6", libbpf_sys::BPF_CGROUP_INET6_GETPEERNAME),
        ("sendmsg4", libbpf_sys::BPF_CGROUP_UDP4_SENDMSG),
        ("sendmsg6", libbpf_sys::BPF_CGROUP_UDP6_SENDMSG),
        ("connect4", libbpf_sys::BPF_CGROUP_INET4_CONNECT),
        ("connect6", libbpf_sys::BPF_CGROUP_INET6_CONNECT),
    ] {
        wanted.push((program(name), cgroup.as_raw_fd(), hook, links.join(name)));
    }
    for (index, _) in devices {
        let index = u32::from_ne_bytes(index[..].try_into().unwrap());
        for (name, hook, word) in [
            ("wire_out_ethernet", libbpf_sys::BPF_TCX_EGRESS, "out"),
            ("wire_in_ethernet", libbpf_sys::BPF_TCX_INGRESS, "in"),
        ] {
            wanted.push((program(name), index as i32, hook, links.join(format!("tcx_{index}_{word}"))));
        }
    }
    let attach_all = || {
        for (program, target, hook, pin) in wanted {
            // SAFETY: no pointers but the options, which may be null, and a string that outlives the call.
            unsafe {
                let link = libbpf_sys::bpf_link_create(program, target, hook, std::ptr::null());
                assert!(link > 0, "{}: {}", pin.display(), std::io::Error::from_raw_os_error(-link));
                let path = CString::new(pin.as_os_str().as_bytes()).unwrap();
                assert_eq!(libbpf_sys::bpf_obj_pin(link, path.as_ptr()), 0);
                libc::close(link);
            }
        }
        Ok(())
    };
    node.host.inside(attach_all).unwrap();
}

/// Starts that version's own daemon, if there is one, and has it end; else leaves what it would.
pub fn run_former(cluster: &Cluster) {
    match std::env::var("KUBELANE_FORMER") {
        Err(_) => {
            Daemon::start(&cluster.lab, "node1", &cluster.manifests.dir).expect("the daemon starts").kill();
            leave_former_state(cluster);
        }
        Ok(program) => {
            let source = format!("dir:{}", cluster.manifests.dir.display());
            let arguments = arguments(cluster.lab.node("node1"), &["--source", &source], &[]);
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let daemon = Daemon::start_program(&cluster.lab, "node1", Path::new(&program), &arguments);
            daemon.expect("the former daemon starts").kill();
        }
    }
}
