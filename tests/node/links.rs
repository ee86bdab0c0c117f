//! Programs that somebody else detaches, or puts his own before: noticed, told, put back, and not fought over for ever.

use std::fs;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use libbpf_rs::Link;
use serde_json::json;

use crate::laboratory::cluster::{Cluster, all, vip};
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::lab::Node;
use crate::laboratory::messages::Kind::Udp4;
use crate::laboratory::{eventually, skip};

const NODE_PORT: u16 = 30_001;
/// What a TC program answers to end a hook's chain; what follows it sees nothing (linux/pkt_cls.h).
const TC_ACT_OK: i32 = 0;

/// Whether pod `a` answers a client outside at node1's NodePort, over each family.
fn answers(cluster: &Cluster) -> [bool; 2] {
    let addresses = cluster.lab.node("node1").host.addresses();
    addresses.map(|node| cluster.answers_outside(SocketAddr::new(node, NODE_PORT)))
}

fn is_asked_by_pods(cluster: &Cluster) -> bool {
    cluster.client("client").ask_unconnected(Udp4, vip(10, 53)[0], 1) == all("a", 1)
}

fn links(node: &Node) -> PathBuf {
    let versions = fs::read_dir(&node.pin_path).expect("a daemon ran").flatten();
    let version = versions.map(|entry| entry.path()).max().expect("one version");
    version.join("links")
}

/// The pin of the program on a direction of eth0.
fn device_pin(node: &Node, direction: &str) -> PathBuf {
    let name = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
    let mut pins = fs::read_dir(links(node)).unwrap().flatten();
    let pin = pins.find(|entry| name(entry).starts_with("tcx_") && name(entry).ends_with(direction));
    pin.expect("eth0 has programs").path()
}

/// What `bpftool link detach pinned PATH` does.
fn detach(pin: &Path) -> libbpf_rs::Result<()> {
    Link::open(pin)?.detach()
}

fn restored(daemon: &Daemon<'_>) -> f64 {
    daemon.metric("kubelane_attachments_restored_total").unwrap()
}

fn has_tcx(node: &Node) -> bool {
    let found = fs::read_dir(links(node))
        .unwrap()
        .flatten()
        .any(|entry| entry.file_name().to_string_lossy().starts_with("tcx_"));
    if !found {
        skip("this kernel has no tcx links (6.6)");
    }
    found
}

#[test]
fn links_that_somebody_detaches_or_unpins_are_put_back_and_told() {
    let Some(cluster) = Cluster::with_node_port_or_skip(NODE_PORT) else { return };
    // Else a pod whose socket program is gone is served by its packets.
    let options = ["--pod-devices", "none"];
    let daemon = Daemon::start_with(&cluster.lab, "node1", &cluster.manifests.dir, &options).unwrap();
    let node = cluster.lab.node("node1");
    assert!(eventually(PATIENCE, || answers(&cluster) == [true; 2]) && is_asked_by_pods(&cluster), "{}", daemon.log());
    let mut repairs = 0.0;
    // A link is at work a moment before it is pinned: a pin taken away in between would be the former one's.
    let mut is_repaired = || {
        repairs += 1.0;
        eventually(PATIENCE, || restored(&daemon) == repairs)
    };
    for name in ["sendmsg4", "recvmsg4"] {
        detach(&links(node).join(name)).unwrap();
        assert!(is_repaired() && is_asked_by_pods(&cluster), "{name}: {}", daemon.log());
        fs::remove_file(links(node).join(name)).unwrap();
        assert!(is_repaired() && links(node).join(name).exists(), "{name}: {}", daemon.log());
        assert!(is_asked_by_pods(&cluster), "{name}: {}", daemon.log());
    }
    assert!(daemon.log().contains("from the cgroup, or removed its pin: attached again"), "{}", daemon.log());
    if !has_tcx(node) {
        return;
    }
    for direction in ["_in", "_out"] {
        let pin = device_pin(node, direction);
        detach(&pin).unwrap();
        assert!(is_repaired() && answers(&cluster) == [true; 2], "{direction}: {}", daemon.log());
        fs::remove_file(&pin).unwrap();
        assert!(is_repaired() && pin.exists(), "{direction}: {}", daemon.log());
        assert!(eventually(PATIENCE, || answers(&cluster) == [true; 2]), "{direction}: {}", daemon.log());
    }
    assert_eq!(restored(&daemon), 8.0, "{}", daemon.log());
    assert!(daemon.log().contains("program from device eth0"), "{}", daemon.log());
    assert!(eventually(PATIENCE, || daemon.health("/readyz").unwrap().ends_with("\r\n\r\nok\n")), "{}", daemon.log());
}

#[test]
fn a_tool_that_detaches_again_and_again_is_told_of_once_and_left_its_way() {
    let Some(cluster) = Cluster::with_node_port_or_skip(NODE_PORT) else { return };
    let daemon = cluster.start();
    let node = cluster.lab.node("node1");
    let pin = links(node).join("connect4");
    let gives_up = || daemon.log().contains("again and again");
    let detached = std::cell::Cell::new(0);
    let fought = eventually(Duration::from_secs(60), || {
        let id = Link::open(&pin).and_then(|link| Ok(link.info()?.info));
        if let Ok(libbpf_rs::query::LinkTypeInfo::Cgroup(info)) = id
            && info.cgroup_id != 0
        {
            detach(&pin).unwrap();
            detached.set(detached.get() + 1);
        }
        gives_up()
    });
    assert!(fought, "detached {} times; {}", detached.get(), daemon.log());
    assert_eq!(detached.get(), 6, "{}", daemon.log());
    let quiet = Instant::now() + Duration::from_secs(6);
    assert!(eventually(PATIENCE, || Instant::now() > quiet));
    assert_eq!(daemon.log().matches("again and again").count(), 1, "{}", daemon.log());
    assert_eq!(restored(&daemon), 5.0, "{}", daemon.log());
    let ready = daemon.health("/readyz").unwrap();
    assert!(ready.starts_with("HTTP/1.1 200") && ready.contains("connect4"), "{ready}");
    let unserved = daemon.metric("kubelane_unserved{reason=\"contested\"").unwrap();
    assert_eq!(unserved, 1.0, "{}", daemon.metrics().unwrap());
}

/// A program that answers [`TC_ACT_OK`] to everything, before all others of a direction of a node's device, as agents that
/// only watch attach. Gone when dropped.
fn agent(node: &Node, device: &str, hook: u32) -> OwnedFd {
    let instructions = [
        libbpf_sys::bpf_insn { code: 0xb7, imm: TC_ACT_OK, ..Default::default() },
        libbpf_sys::bpf_insn { code: 0x95, ..Default::default() },
    ];
    let attach = || {
        let device = nix::net::if_::if_nametoindex(device)?;
        // SAFETY: the strings end with NULs, the instructions are as many as is said, and options may be null.
        let program = unsafe {
            libbpf_sys::bpf_prog_load(
                libbpf_sys::BPF_PROG_TYPE_SCHED_CLS,
                c"watcher".as_ptr(),
                c"GPL".as_ptr(),
                instructions.as_ptr(),
                2,
                std::ptr::null_mut(),
            )
        };
        anyhow::ensure!(program >= 0, "loading: {program}");
        // SAFETY: the kernel has just given this descriptor.
        let program = unsafe { OwnedFd::from_raw_fd(program) };
        let options = libbpf_sys::bpf_link_create_opts {
            sz: size_of::<libbpf_sys::bpf_link_create_opts>() as _,
            flags: libbpf_sys::BPF_F_BEFORE,
            ..Default::default()
        };
        // SAFETY: the options are as large as they say.
        let link = unsafe { libbpf_sys::bpf_link_create(program.as_raw_fd(), device as i32, hook, &options) };
        anyhow::ensure!(link >= 0, "attaching: {link}");
        // SAFETY: the kernel has just given this descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(link) })
    };
    node.host.inside(attach).expect("a program can be attached before others")
}

#[test]
fn an_agent_whose_program_came_first_does_not_hide_packets() {
    let Some(cluster) = Cluster::with_node_port_or_skip(NODE_PORT) else { return };
    let node = cluster.lab.node("node1");
    drop(cluster.start());
    if !has_tcx(node) {
        return;
    }
    node.cleanup().unwrap();
    let hooks = [libbpf_sys::BPF_TCX_INGRESS, libbpf_sys::BPF_TCX_EGRESS];
    let agents = hooks.map(|hook| agent(node, "eth0", hook));
    let daemon = cluster.start();
    assert!(eventually(PATIENCE, || answers(&cluster) == [true; 2]), "{}", daemon.log());
    drop(agents);
    // One that puts itself before kubelane's while the daemon runs.
    let agents = hooks.map(|hook| agent(node, "eth0", hook));
    assert!(eventually(PATIENCE, || answers(&cluster) == [true; 2]), "{}", daemon.log());
    let is_told = || daemon.log().contains("watcher");
    assert!(eventually(PATIENCE, is_told), "{}", daemon.log());
    drop(daemon);
    // One that did so while no daemon ran.
    drop(agents);
    let _agents = hooks.map(|hook| agent(node, "eth0", hook));
    assert_eq!(answers(&cluster), [false; 2]);
    let daemon = cluster.start();
    assert!(eventually(PATIENCE, || answers(&cluster) == [true; 2]), "{}", daemon.log());
}

/// Pods' devices have filters, which come after all tcx programs.
#[test]
fn an_agent_on_a_pods_device_does_not_hide_its_packets() {
    let Some(cluster) = Cluster::or_skip() else { return };
    cluster.put("one", 1, json!({}), &cluster.ready(&["b"]));
    let node = cluster.lab.node("node1");
    let daemon = cluster.start();
    if !has_tcx(node) {
        return;
    }
    let mut client = cluster.lab.pod_of_packets("client").and_then(|place| place.client()).unwrap();
    let to = vip(1, 53)[0];
    assert_eq!(client.ask(Udp4, to, 1), all("b", 1), "{}", daemon.log());
    let agents = [libbpf_sys::BPF_TCX_INGRESS, libbpf_sys::BPF_TCX_EGRESS].map(|hook| agent(node, "client", hook));
    assert!(eventually(PATIENCE, || client.ask(Udp4, to, 1) == all("b", 1)), "{}", daemon.log());
    let is_told = || daemon.log().contains("watcher");
    assert!(eventually(PATIENCE, is_told), "{}", daemon.log());
    drop(agents);
    assert_eq!(client.ask(Udp4, to, 3), all("b", 3), "{}", daemon.log());
}
