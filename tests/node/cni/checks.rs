//! What has to hold in every shape: who answers, whom the pod sees, who is turned away, and that much data passes.

use std::net::SocketAddr;

use super::outside::{self, BARRED, CLIENT};
use super::shaped_cluster::{self, BALANCED_HERE, BALANCED_THERE, HERE, LOCAL, ShapedCluster, THERE};
use crate::laboratory::client::Client;
use crate::laboratory::cluster::{names, vip};
use crate::laboratory::messages::Kind::{Tcp4, Tcp6, Udp4, Udp6};
use crate::laboratory::skip;

const FAMILIES: [usize; 2] = [0, 1];

/// All of them.
pub fn all(world: &ShapedCluster) {
    outside_reaches_services_by_every_node(world);
    outside_reaches_load_balancer_ips(world);
    pods_and_nodes_reach_cluster_ips(world);
    packets_of_pods_reach_services(world);
    policy_turns_away_who_is_barred(world);
    segmented_datagrams_pass(world);
    large_transfers_pass(world);
}

/// NodePorts on both nodes, each with a backend on either; policy Local keeps the client on both.
fn outside_reaches_services_by_every_node(world: &ShapedCluster) {
    for (at, name) in ["node1", "node2"].into_iter().enumerate() {
        for family in FAMILIES {
            let seen = |number| shaped_cluster::node_port(world.lab().node(name), number)[family];
            let (here, there, local) = (seen(HERE), seen(THERE), seen(LOCAL));
            let elsewhere = world.sources.outside_elsewhere[at][family].clone();
            let client = CLIENT[family];
            let (to_a, to_b) = if at == 0 { (client, elsewhere.as_str()) } else { (elsewhere.as_str(), client) };
            world.expect_outside("NodePort", CLIENT, here, &format!("a {to_a}"));
            world.expect_outside("NodePort", CLIENT, there, &format!("b {to_b}"));
            let own = ["a", "b"][at];
            world.expect_outside("NodePort, policy Local", CLIENT, local, &format!("{own} {client}"));
        }
    }
}

fn outside_reaches_load_balancer_ips(world: &ShapedCluster) {
    for family in FAMILIES {
        let elsewhere = world.sources.outside_elsewhere[0][family].clone();
        for (number, expected) in
            [(BALANCED_HERE, format!("a {}", CLIENT[family])), (BALANCED_THERE, format!("b {elsewhere}"))]
        {
            world.expect_outside("load balancer IP", CLIENT, shaped_cluster::balanced(number, 80)[family], &expected);
        }
    }
}

/// From a pod of node1, from a backend to itself, and from node1's own processes; TCP and UDP, connected and not.
fn pods_and_nodes_reach_cluster_ips(world: &ShapedCluster) {
    let pod = |name: &str| world.lab().pod(name).addresses().map(|ip| ip.to_string());
    let (client, a) = (pod("client"), pod("a"));
    let (elsewhere, host_here, host_elsewhere) =
        (world.sources.pod_elsewhere.clone(), world.sources.host_here.clone(), world.sources.host_elsewhere.clone());
    let mut clients = [("client", world.cluster.client("client")), ("a", world.cluster.client("a"))];
    for (name, asking) in &mut clients {
        let own = if *name == "a" { &a } else { &client };
        ask_inside(world, &format!("pod {name}"), asking, HERE, own.each_ref().map(|ip| format!("a {ip}")));
    }
    let asking = &mut clients[0].1;
    ask_inside(world, "pod client", asking, THERE, elsewhere.map(|ip| format!("b {ip}")));
    let mut host = world.cluster.host_client();
    ask_inside(world, "node1", &mut host, HERE, host_here.map(|ip| format!("a {ip}")));
    ask_inside(world, "node1", &mut host, THERE, host_elsewhere.map(|ip| format!("b {ip}")));
}

/// The same where no socket program sees the pod: its packets are served. A pod that asks for itself sees the node.
fn packets_of_pods_reach_services(world: &ShapedCluster) {
    let client_of =
        |pod: &str| world.lab().pod_of_packets(pod).and_then(|place| place.client()).expect("a client starts");
    let own = world.lab().pod("client").addresses();
    let (mut client, mut a) = (client_of("client"), client_of("a"));
    ask_inside(world, "packets of pod client", &mut client, HERE, own.map(|ip| format!("a {ip}")));
    let elsewhere = world.sources.pod_elsewhere.clone();
    ask_inside(world, "packets of pod client", &mut client, THERE, elsewhere.clone().map(|ip| format!("b {ip}")));
    let node = world.sources.host_here.clone();
    ask_inside(world, "packets of pod a", &mut a, HERE, node.map(|ip| format!("a {ip}")));
    for (number, expected) in [(HERE, own.map(|ip| format!("a {ip}"))), (THERE, elsewhere.map(|ip| format!("b {ip}")))]
    {
        let node_port = shaped_cluster::node_port(world.lab().node("node1"), number);
        for ((family, kind), expected) in [Tcp4, Tcp6].into_iter().enumerate().zip(expected) {
            let answers = client.ask(kind, node_port[family], 2);
            world.expect(
                &format!("packets of a pod to {}", node_port[family]),
                &names(&answers).join(" and "),
                &expected,
            );
        }
    }
    for to in vip(HERE, 4444) {
        let answers = client.ask(if to.is_ipv4() { Tcp4 } else { Tcp6 }, to, 1);
        world.expect(&format!("packets of a pod to {to}"), &names(&answers).join(" and "), "ECONNREFUSED");
    }
    if world.bridges_are_filtered {
        // What comes in and leaves by one bridge is also answered by a redirect, from whose time on the kernel counts the
        // seconds until the next ICMP error to that pod (ip_rt_send_redirect and icmpv4_xrlim_allow share rate_last).
        let off = "for one in /proc/sys/net/ipv4/conf/*/send_redirects; do echo 0 > $one; done";
        world.lab().node("node1").host.run("sh", &["-c", off], "").expect("sysctls can be set");
        let mut stranger = client_of("stranger");
        for (kind, to) in [Tcp4, Tcp6].into_iter().zip(vip(HERE, 80)) {
            let answers = stranger.ask(kind, to, 1);
            world.expect(&format!("packets of a barred pod to {to}"), &names(&answers).join(" and "), "ECONNREFUSED");
        }
    }
}

fn ask_inside(world: &ShapedCluster, who: &str, client: &mut Client, number: u8, expected: [String; 2]) {
    for (family, expected) in expected.iter().enumerate() {
        let to = vip(number, 80)[family];
        let [tcp, udp] = [[Tcp4, Udp4], [Tcp6, Udp6]][family];
        let asked = [client.ask(tcp, to, 2), client.ask(udp, to, 2), client.ask_unconnected(udp, to, 2)];
        for (how, answers) in ["TCP", "UDP", "UDP, not connected"].into_iter().zip(asked) {
            world.expect(&format!("{who}, {how} to {to}"), &names(&answers).join(" and "), expected);
        }
    }
}

/// A barred client outside, under both traffic policies, and a barred pod. The others are served, as shown above.
fn policy_turns_away_who_is_barred(world: &ShapedCluster) {
    for family in FAMILIES {
        for number in [HERE, LOCAL] {
            let to = shaped_cluster::node_port(world.lab().node("node1"), number)[family];
            world.expect_outside("barred by policy", BARRED, to, "refused");
        }
        let to = shaped_cluster::node_port(world.lab().node("node2"), LOCAL)[family];
        world.expect_outside("barred from another pod only", BARRED, to, &format!("b {}", BARRED[family]));
    }
    if !world.bridges_are_filtered {
        skip("this kernel does not show bridged packets to iptables (CONFIG_BRIDGE_NETFILTER)");
        return;
    }
    let mut stranger = world.cluster.client("stranger");
    for (kind, to) in [Tcp4, Tcp6, Udp4, Udp6].into_iter().zip(vip(HERE, 80).into_iter().cycle()) {
        let answers = stranger.ask(kind, to, 1);
        world.expect(&format!("a barred pod, {kind:?} to {to}"), &names(&answers).join(" and "), "ECONNREFUSED");
    }
}

/// Twenty datagrams that are one packet until a device takes it apart.
fn segmented_datagrams_pass(world: &ShapedCluster) {
    for (number, to) in [HERE, THERE]
        .into_iter()
        .flat_map(|number| shaped_cluster::node_port(world.lab().node("node1"), number).map(|to| (number, to)))
    {
        let got = outside::ask_in_segments(world.lab(), CLIENT, to).unwrap_or_else(|error| format!("{error:#}"));
        world.expect(&format!("segments to {to}"), &got, &world.seen_by_node1(number, to));
    }
}

/// 20 MiB each way on one connection, to a backend on this node and on the other, by both families.
fn large_transfers_pass(world: &ShapedCluster) {
    for number in [HERE, THERE] {
        for to in shaped_cluster::bulk_port(world.lab().node("node1"), number) {
            transfer(world, to, number, 20 << 20);
        }
    }
}

/// A transfer to node1's NodePort of this Service.
pub fn transfer(world: &ShapedCluster, to: SocketAddr, number: u8, bytes: u64) {
    let got = outside::transfer(world.lab(), CLIENT, to, bytes).unwrap_or_else(|error| format!("{error:#}"));
    world.expect(&format!("{bytes} bytes to and from {to}"), &got, &world.seen_by_node1(number, to));
}
