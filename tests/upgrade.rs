//! An upgrade from the former map ABI, under traffic: `data/v2` holds that version's BPF object, and a stand-in for its daemon
//! loads, fills and attaches it here. `KUBELANE_FORMER=FILE` takes that version's real daemon in its place.
#![cfg(feature = "lab")]

mod support;

use std::ffi::CString;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use kubelane::abi::abi_version;
use kubelane::bpf;
use libbpf_rs::{MapCore as _, MapFlags, MapHandle, MapType, Object, ObjectBuilder};
use serde_json::json;
use support::cluster::{Cluster, all, names, vip};
use support::daemon::{Daemon, arguments};
use support::lab_or_skip;
use support::manifests::port;
use support::wire::Kind::{self, Tcp4, Tcp6, Udp4, Udp6};

const OBJECT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/v2/kubelane.bpf.o");
const FORMER: &str = "v2";
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
fn run_former(cluster: &Cluster) {
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

/// A Service with a NodePort for each of its ports, 90 (tcp), 53 (udp) and 91 (echo) above `node_port`.
fn put(cluster: &Cluster, name: &str, number: u8, node_port: u16, pod: &str) {
    let ports = [("tcp", "TCP", 90), ("udp", "UDP", 53), ("echo", "TCP", 91)].map(|(name, protocol, at)| {
        let mut object = port(name, protocol, at);
        object["nodePort"] = json!(node_port + at);
        object
    });
    let targets = [("tcp", "TCP", 9000), ("udp", "UDP", 9000), ("echo", "TCP", 9100)];
    let changes = json!({"spec": {"type": "NodePort"}});
    cluster.put_with(name, number, json!(ports), changes, &targets, &cluster.ready(&[pod]));
}

const LOCAL: u16 = 30_000;
const REMOTE: u16 = 30_200;

#[derive(Default)]
struct Traffic {
    ready: AtomicU64,
    stop: AtomicBool,
    exchanges: AtomicU64,
    failures: Mutex<Vec<String>>,
}

impl Traffic {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed) && self.failures.lock().unwrap().is_empty()
    }

    fn note(&self, what: &str, outcome: Result<(), String>) {
        self.exchanges.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = outcome {
            self.failures.lock().unwrap().push(format!("{what}: {error}"));
        }
    }

    /// One socket that stays open and asks again and again.
    fn keep(&self, mut client: support::client::Client, kind: Kind, to: SocketAddr, is_connected: bool) {
        let what = format!("{kind:?} to {to}, connected: {is_connected}");
        let mut socket = client.open(kind).unwrap();
        if is_connected {
            socket.connect(to).unwrap();
        }
        let mut is_first = true;
        while self.goes_on() {
            let outcome = match is_connected {
                true => socket.send().and_then(|()| socket.receive()).map(|_| to),
                false => socket.ask_at(to).map(|(_, from)| from),
            };
            self.note(
                &what,
                match outcome {
                    Ok(from) if from == to => Ok(()),
                    other => Err(format!("{other:?}")),
                },
            );
            if std::mem::take(&mut is_first) {
                self.ready.fetch_add(1, Ordering::Relaxed);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn ask_anew(&self, cluster: &Cluster) {
        let mut pod = cluster.client("other");
        self.ready.fetch_add(1, Ordering::Relaxed);
        while self.goes_on() {
            for (kind, to) in [(Tcp4, vip(10, 90)[0]), (Tcp6, vip(10, 90)[1]), (Udp4, vip(10, 53)[0])] {
                let answers = pod.ask(kind, to, 2);
                self.note("a pod", (answers == all("a", 2)).then_some(()).ok_or(format!("{kind:?} {answers:?}")));
            }
        }
    }
}

/// Sockets of all sorts: from outside by NodePorts to both backends, of both families, and of a pod.
fn all_sorts(cluster: &Cluster) -> Vec<(bool, Kind, SocketAddr, bool)> {
    let node = &cluster.lab.node("node1").host;
    let [v4, v6]: [IpAddr; 2] = [node.v4.into(), node.v6.into()];
    let mut sorts = Vec::new();
    for base in [LOCAL, REMOTE] {
        for (address, kinds) in [(v4, [Tcp4, Udp4]), (v6, [Tcp6, Udp6])] {
            sorts.push((true, kinds[0], SocketAddr::new(address, base + 91), true));
            sorts.push((true, kinds[1], SocketAddr::new(address, base + 53), true));
        }
    }
    sorts.push((false, Tcp4, vip(10, 91)[0], true));
    sorts.push((false, Udp4, vip(10, 53)[0], true));
    sorts.push((false, Udp6, vip(10, 53)[1], false));
    sorts
}

#[test]
fn what_the_former_version_has_begun_goes_on_while_the_present_one_takes_over() {
    let Some(lab) = lab_or_skip(&[("node1", &["client", "other", "a"]), ("node2", &["b"])]) else { return };
    let cluster = Cluster::on(lab, &["a", "b"], "--tcp 9000 --udp 9000 --echo 9100");
    put(&cluster, "local", 10, LOCAL, "a");
    put(&cluster, "remote", 11, REMOTE, "b");
    let node = cluster.lab.node("node1");
    run_former(&cluster);
    assert!(node.pin_path.join(FORMER).exists() && !node.pin_path.join("v3").exists());

    let (traffic, sorts) = (Traffic::default(), all_sorts(&cluster));
    let count = sorts.len() as u64 + 1;
    let ended = std::thread::scope(|scope| {
        let (traffic, cluster) = (&traffic, &cluster);
        for (is_outside, kind, to, is_connected) in sorts {
            let client = if is_outside { cluster.lab.client_outside().unwrap() } else { cluster.client("client") };
            scope.spawn(move || traffic.keep(client, kind, to, is_connected));
        }
        scope.spawn(|| traffic.ask_anew(cluster));
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let begun = || traffic.ready.load(Ordering::Relaxed) == count || !traffic.goes_on();
            assert!(support::eventually(support::daemon::PATIENCE, begun));
            let failures = traffic.failures.lock().unwrap().clone();
            assert!(failures.is_empty(), "before the upgrade: {failures:?}; {}", node.host.log_tail());
            // UDP flows count as assured after two seconds of both ways.
            std::thread::sleep(Duration::from_secs(3));
            let daemon = Daemon::start(&cluster.lab, "node1", &cluster.manifests.dir).expect("the upgrade");
            std::thread::sleep(Duration::from_secs(2));
            daemon
        }));
        traffic.stop.store(true, Ordering::Relaxed);
        ended
    });
    let (failures, exchanges) = (traffic.failures.into_inner().unwrap(), traffic.exchanges.into_inner());
    println!("{exchanges} exchanges, {} failed", failures.len());
    let daemon = ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    assert!(failures.is_empty(), "{failures:?}; {}", daemon.log());
    assert!(daemon.log().contains("took over the state of map ABI v2"), "{}", daemon.log());
    assert!(!node.pin_path.join(FORMER).exists(), "what was taken over is gone");

    // The sockets above have closed: their flows know it.
    let mut outside = cluster.lab.client_outside().unwrap();
    let echo = SocketAddr::new(node.host.v4.into(), REMOTE + 90);
    assert_eq!(outside.ask(Tcp4, echo, 3), all("b", 3));
    let flows = node.get("flows", &["-o", "wide"]).unwrap();
    println!("{flows}");
    assert_eq!(names(&cluster.client("client").ask(Tcp4, vip(11, 90)[0], 3)), ["b"]);
}
