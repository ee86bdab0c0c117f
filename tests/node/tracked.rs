//! Connections that netfilter tracks, and that are older than the Service which their packets seem to ask for.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use crate::laboratory::cluster::{Cluster, all, vip};
use crate::laboratory::daemon::Daemon;
use crate::laboratory::eventually;
use crate::laboratory::lab::Node;
use crate::laboratory::lab_or_skip;
use crate::laboratory::manifests::port;
use crate::laboratory::messages::Kind::{Tcp4, Tcp6};
use serde_json::json;

const POD_PORT: u16 = 9000;
const NODE_PORT: u16 = 30_081;
const PATIENCE: Duration = Duration::from_secs(5);

fn cluster_or_skip() -> Option<Cluster> {
    let lab = lab_or_skip(&[("node1", &["client", "a"]), ("node2", &["b"])])?;
    Some(Cluster::on(lab, &["a", "b"], &format!("--tcp {POD_PORT}")))
}

/// Cluster IPs and a NodePort that lead to pod `b`.
fn put(cluster: &Cluster) {
    let mut object = port("tcp", "TCP", 80);
    object["nodePort"] = json!(NODE_PORT);
    let changes = json!({"spec": {"type": "NodePort"}});
    cluster.put_with("one", 1, json!([object]), changes, &[("tcp", "TCP", POD_PORT)], &cluster.ready(&["b"]));
}

fn start(cluster: &Cluster) -> Daemon<'_> {
    Daemon::start_with(&cluster.lab, "node1", &cluster.manifests.dir, &[]).expect("the daemon starts")
}

/// One rule of the table `nat`, of the family that its addresses have.
fn nat(node: &Node, ip: IpAddr, rule: &str) {
    let program = if ip.is_ipv4() { "iptables" } else { "ip6tables" };
    let arguments: Vec<&str> = ["-t", "nat"].into_iter().chain(rule.split(' ')).collect();
    node.host.run(program, &arguments, "").unwrap_or_else(|error| panic!("{rule}: {error:#}"));
}

#[test]
fn connections_that_kube_proxy_has_translated_go_on_when_the_daemon_starts() {
    let Some(cluster) = cluster_or_skip() else { return };
    put(&cluster);
    let (node, pod) = (cluster.lab.node("node1"), cluster.lab.pod("a").addresses());
    let host = node.host.addresses();
    let mut inside = cluster.lab.pod_of_packets("client").and_then(|place| place.client()).unwrap();
    let mut outside = cluster.lab.client_outside().unwrap();
    let mut open = Vec::new();
    for (family, kind) in [Tcp4, Tcp6].into_iter().enumerate() {
        let (cluster_ip, node_port) = (vip(1, 80)[family], SocketAddr::new(host[family], NODE_PORT));
        for to in [cluster_ip, node_port] {
            let (ip, port, pod) = (to.ip(), to.port(), SocketAddr::new(pod[family], POD_PORT));
            nat(node, ip, &format!("-A PREROUTING -d {ip} -p tcp --dport {port} -j DNAT --to-destination {pod}"));
        }
        for (name, client, to) in [("inside", &mut inside, cluster_ip), ("outside", &mut outside, node_port)] {
            let mut socket = client.open(kind).unwrap();
            socket.connect(to).unwrap();
            assert_eq!(socket.ask().as_deref(), Ok("a"), "{to}");
            open.push((name, socket.number(), kind, to));
        }
    }
    let daemon = start(&cluster);
    for (name, socket, kind, to) in open {
        let client = if name == "inside" { &mut inside } else { &mut outside };
        assert_eq!(client.socket(socket).ask().as_deref(), Ok("a"), "{name} {to}: {}", daemon.log());
        assert_eq!(client.ask(kind, to, 3), all("b", 3), "{name}: a new connection is the daemon's");
    }
}

#[test]
fn a_masqueraded_connection_from_a_port_that_a_service_gets_later_goes_on() {
    let Some(cluster) = cluster_or_skip() else { return };
    goes_on(&cluster);
}

/// What the filters remember of a port says nothing of what has left since: a daemon may have ended before it had looked.
#[test]
fn it_goes_on_too_when_the_port_was_served_before_and_no_program_saw_the_connection_leave() {
    let Some(cluster) = cluster_or_skip() else { return };
    put(&cluster);
    drop(start(&cluster));
    cluster.manifests.save("one", &[]);
    drop(start(&cluster));
    for pin in std::fs::read_dir(cluster.lab.node("node1").pin_path.join("v3/links")).unwrap() {
        let pin = pin.unwrap().path();
        if pin.file_name().unwrap().to_str().unwrap().starts_with("tcx_") {
            std::fs::remove_file(pin).unwrap();
        }
    }
    for device in ["client", "eth0"] {
        // Without tcx both have one.
        let _ = cluster.lab.node("node1").host.run("tc", &["qdisc", "del", "dev", device, "clsact"], "");
    }
    goes_on(&cluster);
}

fn goes_on(cluster: &Cluster) {
    let node = cluster.lab.node("node1");
    let (far, pod) = (&cluster.lab.node("node2").host, cluster.lab.pod("client"));
    let mut open = Vec::new();
    for (family, own) in pod.addresses().into_iter().enumerate() {
        let to = SocketAddr::new(far.addresses()[family], 9100);
        nat(node, own, &format!("-I POSTROUTING -s {own} -p tcp --dport 9100 -j MASQUERADE --to-ports {NODE_PORT}"));
        let listener = far.inside(|| Ok(TcpListener::bind(to)?)).unwrap();
        let client = pod.inside(|| Ok(TcpStream::connect_timeout(&to, PATIENCE)?)).unwrap();
        let (server, seen) = listener.accept().unwrap();
        assert_eq!(seen, SocketAddr::new(node.host.addresses()[family], NODE_PORT));
        open.push((client, server));
    }
    let daemon = start(cluster);
    put(cluster);
    let frontends = || daemon.metric("kubelane_map_entries{map=\"frontends\"}").unwrap_or_default();
    assert!(eventually(PATIENCE, || frontends() >= 4.0), "{}", daemon.log());
    // The far end speaks first: no packet of the connection has left since the port is served.
    for (mut client, mut server) in open {
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        server.write_all(b"still there?").unwrap();
        let mut buffer = [0; 12];
        client.read_exact(&mut buffer).unwrap_or_else(|error| panic!("{error}: {}", daemon.log()));
        client.write_all(b"yes").unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        server.read_exact(&mut buffer[..3]).unwrap();
        assert_eq!(&buffer[..3], b"yes");
    }
}
