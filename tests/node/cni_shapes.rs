//! Real daemons on nodes as other people's CNIs make them: the reference plugins, flannel, Calico, the AWS VPC CNI.

use std::net::{IpAddr, SocketAddr};

use crate::cni::outside::CLIENT;
use crate::cni::shaped_cluster::{self, HERE, ShapedCluster, THERE, WIDE};
use crate::cni::{aws, bridge, calico, checks, flannel, outside};
use crate::laboratory::cluster::names;
use crate::laboratory::messages::Kind::{Tcp4, Tcp6};

#[test]
fn services_work_beside_the_bridge_and_portmap_plugins_and_host_ports_are_left_alone() {
    let Some(world) = ShapedCluster::or_skip(&bridge::SHAPE) else { return };
    let daemons = world.start();
    checks::all(&world);
    host_ports_lead_to_their_pod(&world);
    world.assert_no_failures(&daemons);
}

/// Other people's DNAT: node1's host port is pod `a`'s, for clients outside and for pods.
fn host_ports_lead_to_their_pod(world: &ShapedCluster) {
    let mut client = world.cluster.client("client");
    for (family, ip) in world.lab().node("node1").host.addresses().into_iter().enumerate() {
        let to = SocketAddr::new(ip, bridge::HOST_PORT);
        world.expect_outside("host port", CLIENT, to, &format!("a {}", CLIENT[family]));
        let answers = client.ask([Tcp4, Tcp6][family], to, 2);
        // The plugin hides clients of the pods' own range, or the pod would answer them without the node.
        let expected = format!("a {}", world.sources.host_here[family]);
        world.expect("host port from a pod", &names(&answers).join(" and "), &expected);
    }
}

#[test]
fn services_work_beside_flannel_and_its_masquerading_and_its_smaller_mtu() {
    let Some(world) = ShapedCluster::or_skip(&flannel::SHAPE) else { return };
    let daemons = world.start();
    checks::all(&world);
    packets_find_the_overlays_mtu(&world);
    world.assert_no_failures(&daemons);
    let told = daemons[0].metric("kubelane_datapath_verdicts_total{verdict=\"icmp_too_big\"}").unwrap();
    assert!(told >= 4.0, "path-MTU discovery was needed: {told}");
}

/// Datagrams that fit the uplink but not the overlay, or neither; TCP to a pod that believes in 1500 bytes.
fn packets_find_the_overlays_mtu(world: &ShapedCluster) {
    let node1 = world.lab().node("node1");
    for (family, to) in shaped_cluster::node_port(node1, THERE).into_iter().enumerate() {
        for length in [1380, 1440, 1452, 3000, 20_000] {
            match outside::ask_large(world.lab(), CLIENT, to, length) {
                Ok((answer, sent)) => {
                    let expected = format!("b {}", world.sources.outside_elsewhere[0][family]);
                    world.expect(&format!("{length} bytes to {to}"), &answer, &expected);
                    if sent > 4 {
                        world.fail(format!("{length} bytes to {to} took {sent} datagrams"));
                    }
                }
                Err(error) => world.fail(format!("{error:#}")),
            }
        }
    }
    outside::forget_mtus(world.lab()).unwrap();
    for to in shaped_cluster::bulk_port(node1, WIDE) {
        checks::transfer(world, to, WIDE, 5 << 20);
    }
}

#[test]
fn services_work_beside_calicos_routes_to_pods_and_strict_reverse_path_filters() {
    let Some(world) = ShapedCluster::or_skip(&calico::SHAPE) else { return };
    let daemons = world.start();
    checks::all(&world);
    world.assert_no_failures(&daemons);
}

#[test]
fn services_work_beside_the_aws_cnis_second_uplink_and_its_policy_routing() {
    let Some(world) = ShapedCluster::or_skip(&aws::SHAPE) else { return };
    let daemons = world.start();
    checks::all(&world);
    the_second_uplinks_address_serves_too(&world);
    replies_leave_by_the_uplink_of_their_address(&world);
    world.assert_no_failures(&daemons);
}

/// NodePorts of an address that packets come to by eth1. Its reverse path filter is strict, and the client's route leads to
/// eth0: what would leave the node again is dropped, as the host's stack does. (IPv6 has no such filter.)
fn the_second_uplinks_address_serves_too(world: &ShapedCluster) {
    let node1 = world.lab().node("node1");
    for (family, ip) in aws::second_addresses(node1).iter().enumerate() {
        let ip: IpAddr = ip.parse().unwrap();
        let elsewhere = &world.sources.outside_elsewhere[0][family];
        let elsewhere = if ip.is_ipv4() { "nothing".to_owned() } else { format!("b {elsewhere}") };
        for (number, expected) in [(HERE, format!("a {}", CLIENT[family])), (THERE, elsewhere)] {
            let to = SocketAddr::new(ip, 30_000 + u16::from(number));
            world.expect_outside("NodePort by eth1", CLIENT, to, &expected);
        }
    }
}

/// Pod `a`'s table leads out by eth1, where the network would not have node1's address on eth0 as a source.
fn replies_leave_by_the_uplink_of_their_address(world: &ShapedCluster) {
    let node1 = world.lab().node("node1");
    let sent = || -> u64 {
        let said = node1.host.run("ip", &["-s", "-j", "link", "show", "eth0"], "").unwrap();
        let links: serde_json::Value = serde_json::from_str(&said).unwrap();
        links[0]["stats64"]["tx"]["bytes"].as_u64().expect("a device has counters")
    };
    for to in shaped_cluster::bulk_port(node1, HERE) {
        let before = sent();
        checks::transfer(world, to, HERE, 1 << 20);
        let by_eth0 = sent() - before;
        if by_eth0 < 1 << 20 {
            world.fail(format!("{by_eth0} bytes left by eth0 in answer to {to}"));
        }
    }
}
