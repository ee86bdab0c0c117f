//! The generator of kube-proxy's rules: exact text for a small world, names as kube-proxy gives them, and rule sets
//! that the kernel takes.

mod rulesets;
mod support;

use nix::sched::{CloneFlags, unshare};

use rulesets::{Endpoint, FAMILIES, Family, Protocol, ServicePort, State, World, iptables, load, nftables};

fn endpoint(at: &str, is_local: bool, state: State) -> Endpoint {
    Endpoint { at: at.parse().unwrap(), is_local, state }
}

fn service(name: &str, number: u8) -> ServicePort {
    ServicePort {
        namespace: "ns".to_owned(),
        name: name.to_owned(),
        port_name: "p80".to_owned(),
        cluster_ips: [format!("10.96.0.{number}"), format!("fd96::{number}")].map(|ip| ip.parse().unwrap()).into(),
        port: 80,
        ..ServicePort::default()
    }
}

/// A Service with everything, a plain one, and one without endpoints.
fn world() -> World {
    let all = ServicePort {
        node_port: 30_001,
        external_ips: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
        load_balancer_ips: vec!["192.0.2.2".parse().unwrap(), "2001:db8::2".parse().unwrap()],
        source_ranges: vec!["172.31.0.0/24".parse().unwrap()],
        affinity: Some(60),
        external_local: true,
        health_check_node_port: 30_002,
        endpoints: vec![
            endpoint("10.244.1.10:8080", true, State::Leaving),
            endpoint("10.244.2.10:8080", false, State::Ready),
            endpoint("[fd44::2:10]:8080", false, State::Ready),
        ],
        ..service("all", 1)
    };
    let plain = ServicePort {
        protocol: Protocol::Udp,
        endpoints: vec![
            endpoint("10.244.1.11:53", true, State::Ready),
            endpoint("10.244.2.11:53", false, State::Ready),
            endpoint("10.244.2.12:53", false, State::Useless),
            endpoint("[fd44::1:11]:53", true, State::Ready),
            endpoint("[fd44::2:11]:53", false, State::Ready),
        ],
        ..service("plain", 2)
    };
    World {
        pods: vec!["10.244.0.0/16".parse().unwrap(), "fd44::/48".parse().unwrap()],
        node: vec!["172.31.0.11".parse().unwrap(), "fd31::11".parse().unwrap()],
        services: vec![all, plain, ServicePort { node_port: 30_003, ..service("none", 3) }],
    }
}

#[test]
fn the_iptables_rules_of_a_small_world_are_those_of_kube_proxy() {
    assert_eq!(iptables::render(&world(), Family::V4), include_str!("rulesets/small.iptables"));
}

#[test]
fn the_nftables_rules_of_a_small_world_are_those_of_kube_proxy() {
    assert_eq!(nftables::render(&world(), Family::V4), include_str!("rulesets/small.nft"));
}

#[test]
fn chains_are_named_as_kube_proxy_names_them() {
    let mut service = service("svc1", 1);
    service.namespace = "ns1".to_owned();
    service.endpoints = vec![endpoint("10.180.0.1:80", false, State::Ready)];
    let world = World { services: vec![service], ..World::default() };
    // From kube-proxy's own tests: pkg/proxy/iptables/proxier_test.go, pkg/proxy/nftables/proxier_test.go.
    let text = iptables::render(&world, Family::V4);
    assert!(text.contains(":KUBE-SVC-XPGD46QRK7WJZT7O - [0:0]\n:KUBE-SEP-SXIVWICOYRO3J4NJ - [0:0]\n"), "{text}");
    let text = nftables::render(&world, Family::V4);
    assert!(text.contains("add chain ip kube-proxy service-ULMVA6XW-ns1/svc1/tcp/p80\n"), "{text}");
}

#[test]
fn rules_without_a_service_of_the_family_have_no_chain_of_a_service() {
    let mut world = world();
    for service in &mut world.services {
        service.cluster_ips.truncate(1);
    }
    let text = iptables::render(&world, Family::V6);
    assert!(!text.contains("KUBE-SVC-") && !text.contains("ns/"), "{text}");
}

/// Runs `work`, which needs `command`, in a network namespace that goes away with it. Says so where it cannot.
fn in_a_namespace(command: &str, work: impl FnOnce() + Send) {
    if !nix::unistd::geteuid().is_root() {
        return support::skip("needs root: it makes a network namespace");
    }
    if !support::process::in_path(command) {
        return support::skip(&format!("needs {command} (`make setup` installs it)"));
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            work();
        });
        thread.join().unwrap();
    });
}

#[test]
fn the_kernel_takes_the_iptables_rules_of_both_families() {
    in_a_namespace(load::iptables_command(Family::V4), || {
        for family in FAMILIES {
            load::iptables(family, &iptables::render(&world(), family), load::NO_HURRY).unwrap();
        }
    });
}

#[test]
fn the_kernel_takes_the_nftables_rules_of_both_families() {
    in_a_namespace("nft", || {
        for family in FAMILIES {
            load::nftables(&nftables::render(&world(), family), load::NO_HURRY).unwrap();
        }
    });
}

#[test]
fn the_machines_own_rules_are_not_touched() {
    let refused = load::nftables("", load::NO_HURRY).unwrap_err().to_string();
    assert!(refused.contains("enter another network namespace"), "{refused}");
}
