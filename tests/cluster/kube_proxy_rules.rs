//! The generator of kube-proxy's rules: exact text for a small world, names as kube-proxy gives them, and rule sets
//! that the kernel takes.

use std::collections::BTreeSet;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};

use crate::laboratory::rulesets::load::{self, Loader};
use crate::laboratory::rulesets::{
    Endpoint, FAMILIES, Family, Protocol, ServicePort, State, World, iptables, nftables,
};
use crate::laboratory::{netns, process, skip};

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
    assert_eq!(iptables::render(&world(), Family::V4), include_str!("../laboratory/rulesets/small.iptables"));
}

#[test]
fn the_nftables_rules_of_a_small_world_are_those_of_kube_proxy() {
    assert_eq!(nftables::render(&world(), Family::V4), include_str!("../laboratory/rulesets/small.nft"));
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
        return skip("needs root: it makes a network namespace");
    }
    if !process::in_path(command) {
        return skip(&format!("needs {command} (`make setup` installs it)"));
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

/// The world after the second Service's remote pod got another address, and that address.
fn changed_world() -> (World, &'static str) {
    let (mut world, address) = (world(), "10.244.2.99");
    world.services[1].endpoints[1] = endpoint("10.244.2.99:53", false, State::Ready);
    (world, address)
}

#[test]
fn a_change_of_iptables_rules_has_one_services_chains_and_everybodys_rules_in_shared_chains() {
    let (world, address) = changed_world();
    let whole = iptables::render(&world, Family::V4);
    let change = iptables::render_changes(&world, Family::V4, &[1].into());
    assert!(change.contains(address) && change.contains(":KUBE-SVC-3DJUKJGPBQVDKUF4 - [0:0]"), "{change}");
    assert!(!change.contains("PREROUTING") && !change.contains(":KUBE-SVC-M6LKEOKFSA6F6FH5 "), "{change}");
    let shared = |text: &str| -> Vec<String> {
        let is_shared = |line: &&str| line.starts_with("-A KUBE-SERVICES ") || line.starts_with("-A KUBE-NODEPORTS ");
        text.lines().filter(is_shared).map(str::to_owned).collect()
    };
    assert_eq!(shared(&change), shared(&whole));
}

#[test]
fn the_kernel_takes_a_change_of_iptables_rules_and_keeps_everything_else() {
    in_a_namespace(load::iptables_command(Family::V4), || {
        let (changed, _) = changed_world();
        let saved = || netns::run("iptables-legacy-save", &["-t", "nat"], "").unwrap();
        // Chains of endpoints that are gone stay: only rules are compared, in no order.
        let rules = |text: &str| -> BTreeSet<String> {
            let gone = chain_that_is_left(text);
            let is_rule = |line: &&str| line.starts_with("-A ") && !line.starts_with(&format!("-A {gone} "));
            text.lines().filter(is_rule).map(str::to_owned).collect()
        };
        load::iptables(Family::V4, &iptables::render(&changed, Family::V4), load::NO_HURRY).unwrap();
        let wanted = rules(&saved());
        load::iptables(Family::V4, &iptables::render(&world(), Family::V4), load::NO_HURRY).unwrap();
        assert_ne!(rules(&saved()), wanted);
        let change = iptables::render_changes(&changed, Family::V4, &[1].into());
        let spent = load::within(Duration::from_secs(60), Loader::IptablesChange(Family::V4), &change).unwrap();
        assert!(spent.expect("it takes no minute").cpu > Duration::ZERO);
        assert_eq!(rules(&saved()), wanted);
    });
}

/// The chain of the endpoint that has another address in [`changed_world`].
fn chain_that_is_left(saved: &str) -> String {
    let rule = saved.lines().find(|line| line.contains("--to-destination 10.244.2.11:53"));
    rule.and_then(|rule| rule.split(' ').nth(1)).unwrap_or("none").to_owned()
}

#[test]
fn the_kernel_takes_a_change_of_nftables_rules_and_keeps_everything_else() {
    in_a_namespace("nft", || {
        let (changed, address) = changed_world();
        let listed = || netns::run("nft", &["list", "ruleset"], "").unwrap();
        load::nftables(&nftables::render(&world(), Family::V4), load::NO_HURRY).unwrap();
        let before = listed();
        load::nftables(&nftables::render_changes(&changed, Family::V4, &[1].into()), load::NO_HURRY).unwrap();
        assert_eq!(listed(), before.replace("10.244.2.11", address));
    });
}

#[test]
fn changes_of_several_services_have_all_their_chains_and_no_others() {
    let world = world();
    let all = ["ns/all/tcp/p80", "ns/plain/udp/p80", "ns/none/tcp/p80"];
    // Of a Service without endpoints kube-proxy makes no chain.
    for (changed, wanted) in [(vec![0, 1], &all[..2]), (vec![1, 2], &all[1..2]), (vec![], &all[..0])] {
        let text = nftables::render_changes(&world, Family::V4, &changed.iter().copied().collect());
        let chains: Vec<&str> = all.into_iter().filter(|name| text.contains(name)).collect();
        assert_eq!(chains, wanted, "{changed:?}: {text}");
        let text = iptables::render_changes(&world, Family::V4, &changed.iter().copied().collect());
        let own: BTreeSet<&str> = text.lines().filter(|line| line.starts_with(":KUBE-SVC-")).collect();
        assert_eq!(own.len(), wanted.len(), "{changed:?}: {text}");
    }
}

#[test]
fn a_restarted_kube_proxys_iptables_rules_are_taken_and_change_nothing() {
    in_a_namespace(load::iptables_command(Family::V4), || {
        let saved = |table: &str| -> Vec<String> {
            let text = netns::run("iptables-legacy-save", &["-t", table], "").unwrap();
            // Comments say when, and chains how many packets there were.
            text.lines().filter(|line| line.starts_with("-A ")).map(str::to_owned).collect()
        };
        load::iptables(Family::V4, &iptables::render(&world(), Family::V4), load::NO_HURRY).unwrap();
        let before = ["nat", "filter"].map(saved);
        let again = iptables::render_again(&world(), Family::V4);
        load::within(load::NO_HURRY, Loader::IptablesChange(Family::V4), &again).unwrap();
        assert_eq!(["nat", "filter"].map(saved), before);
    });
}

#[test]
fn a_restarted_kube_proxys_nftables_rules_are_taken_and_change_nothing() {
    in_a_namespace("nft", || {
        for (family, table) in FAMILIES.into_iter().zip(["ip", "ip6"]) {
            // Chains that are made again come last: what is in each of them is compared.
            let listed = || -> BTreeSet<String> {
                let text = netns::run("nft", &["list", "table", table, "kube-proxy"], "").unwrap();
                text.split("\n\n").map(|part| part.trim_matches(['\n', '\t', '}']).to_owned()).collect()
            };
            load::nftables(&nftables::render(&world(), family), load::NO_HURRY).unwrap();
            let before = listed();
            load::nftables(&nftables::render_again(&world(), family), load::NO_HURRY).unwrap();
            assert_eq!(listed(), before);
        }
    });
}

#[test]
fn a_loader_that_takes_too_long_is_ended() {
    in_a_namespace("nft", || {
        let rules = nftables::render(&world(), Family::V4);
        assert_eq!(load::within(Duration::ZERO, Loader::Nftables, &rules).unwrap(), None);
    });
}

#[test]
fn the_machines_own_rules_are_not_touched() {
    let refused = load::nftables("", load::NO_HURRY).unwrap_err().to_string();
    assert!(refused.contains("enter another network namespace"), "{refused}");
}
