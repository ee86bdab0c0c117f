//! A virtual machine as a pod (Kata, KubeVirt): Debian's kernel, emulated behind a tap in the node's bridge, with sockets of
//! its own that no program of the node's kernel sees, and a network card that it leaves checksums and segments to.
//! `make test-vm` fetches the kernel and runs this.

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::laboratory::cluster::{Cluster, all, names, vip};
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::manifests::{Endpoint, port};
use crate::laboratory::messages::Kind::{self, Tcp4, Tcp6, Udp4, Udp6};
use crate::laboratory::tap::TapPod;
use crate::laboratory::{eventually, lab_or_skip, skip};
use serde_json::{Value, json};

const LISTEN: &str = "--seen 9000 --echo 9100";
const NODE_PORT: u16 = 30_080;
const KINDS: [[Kind; 2]; 2] = [[Tcp4, Udp4], [Tcp6, Udp6]];
const MIB: u64 = 1 << 20;

/// A Service with the cluster IPs of `number`: port 80 of TCP and UDP, and 81, which returns what it gets.
fn put(cluster: &Cluster, number: u8, changes: Value, endpoints: &[Endpoint]) {
    let ports = [("tcp", "TCP", 80, 0), ("udp", "UDP", 80, 0), ("echo", "TCP", 81, 10)];
    let ports = ports.map(|(name, protocol, at, more)| {
        let mut object = port(name, protocol, at);
        object["nodePort"] = json!(NODE_PORT + more + u16::from(number));
        object
    });
    let targets = [("tcp", "TCP", 9000), ("udp", "UDP", 9000), ("echo", "TCP", 9100)];
    cluster.put_with(&format!("service-{number}"), number, json!(ports), changes, &targets, endpoints);
}

#[test]
fn a_virtual_machine_is_served_as_every_other_pod() {
    let Some(kernel) = std::env::var_os("KUBELANE_VM_KERNEL").map(PathBuf::from) else {
        return skip("needs a kernel to boot (`make test-vm` fetches one)");
    };
    let Some(lab) = lab_or_skip(&[("node1", &["client", "a"]), ("node2", &["b"])]) else { return };
    let cluster = Cluster::on(lab, &["a", "b"], LISTEN);
    let node_port = json!({"spec": {"type": "NodePort"}});
    put(&cluster, 1, node_port.clone(), &cluster.ready(&["a"]));
    put(&cluster, 2, node_port.clone(), &cluster.ready(&["b"]));
    put(&cluster, 3, node_port.clone(), &[]);
    put(&cluster, 4, json!({"spec": {"type": "NodePort", "sessionAffinity": "ClientIP"}}), &cluster.ready(&["a", "b"]));
    let start = |node| Daemon::start(&cluster.lab, node, &cluster.manifests.dir).expect("the daemon starts");
    let [daemon, _other] = ["node1", "node2"].map(start);
    let mut machine = TapPod::boot(&cluster.lab, "node1", "machine", 60, &kernel, LISTEN).expect("the machine boots");
    assert!(eventually(PATIENCE, || machine.is_served(&cluster.lab, "node1").unwrap()), "{}", daemon.log());
    let own_endpoints = machine.addresses().map(|address| Endpoint::ready(address, "node1"));
    put(&cluster, 5, node_port, &own_endpoints);
    cluster.wait_for_backend(machine.v6.into(), true);

    for (family, kinds) in KINDS.into_iter().enumerate() {
        let own = machine.addresses()[family];
        let node = |name: &str, number: u16| {
            SocketAddr::new(cluster.lab.node(name).host.addresses()[family], NODE_PORT + number)
        };
        for kind in kinds {
            for (number, backend) in [(1, "a"), (2, "b")] {
                for to in [vip(number, 80)[family], node("node1", number.into())] {
                    let seen = all(&format!("{backend} {own}"), 20);
                    assert_eq!(machine.client.ask(kind, to, 20), seen, "{kind:?} {to}: {}", daemon.log());
                }
            }
            assert_eq!(machine.client.ask(kind, vip(3, 80)[family], 2), all("ECONNREFUSED", 2), "{kind:?}");
            assert_eq!(machine.client.ask(kind, vip(1, 99)[family], 2), all("ECONNREFUSED", 2), "{kind:?}, no port");
            assert_eq!(machine.client.ask(kind, vip(4, 80)[family], 20).len(), 1, "{kind:?}, affinity");
            let itself = machine.client.ask(kind, vip(5, 80)[family], 3);
            let is_right = itself.len() == 1 && names(&itself)[0].starts_with("machine");
            assert!(is_right, "{kind:?}, by its own Service: {itself:?}");
            let answers = cluster.client("client").ask(kind, vip(5, 80)[family], 20);
            let is_right = answers.len() == 1 && names(&answers)[0].starts_with("machine");
            assert!(is_right, "{kind:?}, asked by a pod: {answers:?}");
        }
        // Aggregates whose checksums the card would have finished.
        for to in [vip(1, 81)[family], vip(2, 81)[family], node("node2", 12)] {
            assert_eq!(machine.client.transfer(to, 2 * MIB), Ok(()), "{to}");
        }
        let mut outside = cluster.lab.client_outside().unwrap();
        let answers = outside.ask(kinds[0], node("node1", 5), 5);
        assert!(names(&answers).iter().all(|name| name.starts_with("machine")), "{answers:?}");
        assert_eq!(outside.transfer(node("node1", 15), 2 * MIB), Ok(()));
    }
}
