//! Where clients outside reach NodePorts: every device with an address of the node, and what is told of those where they
//! are not served.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use crate::laboratory::cluster::Cluster;
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::eventually;

const NODE_PORT: u16 = 30_001;

/// Whether pod `a` answers a client outside at this address of node1.
fn answers_at(cluster: &Cluster, address: &str) -> bool {
    cluster.answers_outside(SocketAddr::new(address.parse().unwrap(), NODE_PORT))
}

#[test]
fn node_ports_answer_on_a_second_card_without_a_default_route_and_on_a_bridge_that_holds_a_card() {
    let Some(cluster) = Cluster::with_node_port_or_skip(NODE_PORT) else { return };
    let lab = &cluster.lab;
    let node = lab.node("node1");
    lab.add_uplink(node, "eth1", 1).unwrap();
    lab.ip_outside(&[
        "address add 172.31.5.1/24 dev br0".to_owned(),
        "address add fd35::1/64 dev br0 nodad".to_owned(),
        "address add 172.31.7.1/24 dev br0".to_owned(),
        "address add fd37::1/64 dev br0 nodad".to_owned(),
    ])
    .unwrap();
    node.host
        .ip(&[
            "address add 172.31.5.11/24 dev eth1",
            "address add fd35::11/64 dev eth1 nodad",
            "link set eth1 up",
            "link add name host0 type bridge mcast_snooping 0",
            "link add link eth1 name card0 type macvlan mode bridge",
            "link set card0 master host0 up",
            "address add 172.31.7.11/24 dev host0",
            "address add fd37::11/64 dev host0 nodad",
            "link set host0 up",
        ])
        .unwrap();
    let daemon = cluster.start();
    for address in ["172.31.0.11", "fd31::11", "172.31.5.11", "fd35::11", "172.31.7.11", "fd37::11"] {
        assert!(eventually(PATIENCE, || answers_at(&cluster, address)), "{address}: {}", daemon.log());
    }
    let log = daemon.log();
    assert!(
        log.contains("device=\"host0\"") && !log.contains("device=\"cbr0\""),
        "pods' bridges are left alone: {log}"
    );
    assert!(!log.contains("device=\"card0\""), "a bridge's member is met on the bridge: {log}");
}

/// A program of two instructions that drops everything a device receives (linux/bpf.h: XDP_DROP).
fn dropper() -> OwnedFd {
    const XDP_DROP: i32 = 1;
    let instructions = [
        libbpf_sys::bpf_insn { code: 0xb7, imm: XDP_DROP, ..Default::default() },
        libbpf_sys::bpf_insn { code: 0x95, ..Default::default() },
    ];
    // SAFETY: the strings end with NULs, the instructions are as many as is said, and options may be null.
    let program = unsafe {
        libbpf_sys::bpf_prog_load(
            libbpf_sys::BPF_PROG_TYPE_XDP,
            c"dropper".as_ptr(),
            c"GPL".as_ptr(),
            instructions.as_ptr(),
            2,
            std::ptr::null_mut(),
        )
    };
    assert!(program >= 0, "loading: {program}");
    // SAFETY: the kernel has just given this descriptor.
    unsafe { OwnedFd::from_raw_fd(program) }
}

#[test]
fn packets_that_something_keeps_from_the_programs_are_told_of_once_with_a_remedy() {
    let Some(cluster) = Cluster::with_node_port_or_skip(NODE_PORT) else { return };
    let node = cluster.lab.node("node1");
    /// XDP_FLAGS_SKB_MODE (linux/if_link.h).
    const GENERIC: u32 = 1 << 1;
    let attach = || {
        let device = nix::net::if_::if_nametoindex("eth0")?;
        // SAFETY: the call takes numbers, and options that may be null.
        let result =
            unsafe { libbpf_sys::bpf_xdp_attach(device as i32, dropper().as_raw_fd(), GENERIC, std::ptr::null()) };
        anyhow::ensure!(result == 0, "attaching: {result}");
        Ok(())
    };
    node.host.inside(attach).unwrap();
    let daemon = cluster.start();
    let told = "device eth0: ingress IPv4 and IPv6 packets do not reach kubelane's program";
    assert!(eventually(PATIENCE, || daemon.log().contains(told)), "{}", daemon.log());
    let ready = daemon.health("/readyz").unwrap();
    assert!(ready.starts_with("HTTP/1.1 200") && ready.contains(told), "{ready}");
    let unserved = r#"kubelane_unserved{reason="packets_kept_away"}"#;
    assert_eq!(daemon.metric(unserved).unwrap(), 1.0);
    assert_eq!(daemon.log().matches(told).count(), 1, "{}", daemon.log());
    let cut_off = "eth0: ingress packets do not reach kubelane's program -> look at";
    assert!(check(&cluster, &[]).contains(cut_off), "{}", check(&cluster, &[]));

    node.host.ip(&["link set dev eth0 xdpgeneric off"]).unwrap();
    // The daemon tries again when its devices change, too.
    node.host.ip(&["address add 172.31.0.111/24 dev eth0", "address del 172.31.0.11/24 dev eth0"]).unwrap();
    assert!(
        eventually(PATIENCE, || daemon.log().contains("resolved: ingress IPv4 and IPv6 packets")),
        "{}",
        daemon.log()
    );
    assert!(daemon.health("/readyz").unwrap().ends_with("ok\n"), "{}", daemon.health("/readyz").unwrap());
    let fine = check(&cluster, &[]);
    assert!(fine.contains("outside     eth0; not cbr0, though it has addresses\n"), "{fine}");
}

/// What `kubelane check` says on node1.
fn check(cluster: &Cluster, options: &[&str]) -> String {
    let node = cluster.lab.node("node1");
    let (cgroup, pins) = (node.cgroup.display().to_string(), node.pin_path.display().to_string());
    let ports = ["--healthz-bind-address=", "--metrics-bind-address="];
    node.kubelane(&[&["check", "--cgroup", &cgroup, "--pin-path", &pins], &ports[..], options].concat()).unwrap()
}

#[test]
fn a_node_without_a_device_that_faces_outwards_says_so() {
    let Some(cluster) = Cluster::with_node_port_or_skip(NODE_PORT) else { return };
    let manifests = &cluster.manifests.dir;
    let daemon = Daemon::start_with(&cluster.lab, "node1", manifests, &["--devices", "enp*"]).unwrap();
    let told = "there is no external device, or none matches --devices";
    assert!(
        eventually(PATIENCE, || daemon.health("/readyz").is_ok_and(|said| said.contains(told))),
        "{}",
        daemon.log()
    );
    assert_eq!(daemon.metric("kubelane_unserved{reason=\"no_device\"").unwrap(), 1.0);
    let said = check(&cluster, &["--devices", "enp*"]);
    assert!(said.contains("none: clients outside are not served -> name devices with --devices"), "{said}");
}
