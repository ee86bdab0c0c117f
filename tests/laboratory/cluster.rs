//! The cluster that socket tests start from: two nodes, three serving pods, and Services put together from few words.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use serde_json::{Value, json};

use super::client::{Client, Counts};
use super::daemon::{Daemon, PATIENCE};
use super::manifests::{Endpoint, Manifests, port, service, slice};
use super::process::Process;
use super::{Lab, eventually, lab_or_skip};

/// The serving pods: `a` on node1, where the clients and the daemon of most tests are, `b` and `c` on node2.
pub const PODS: [&str; 3] = ["a", "b", "c"];

/// The ports of every Service that [`Cluster::put`] makes: name, protocol, Service port, and where the pods listen.
pub const PORTS: [(&str, &str, u16, u16); 4] =
    [("http", "TCP", 80, 8080), ("tcp", "TCP", 90, 9000), ("mptcp", "TCP", 91, 9001), ("udp", "UDP", 53, 9000)];

/// Two nodes with serving pods, and a directory of manifests. Processes go before the laboratory.
pub struct Cluster {
    servers: Vec<Process>,
    pub manifests: Manifests,
    pub lab: Lab,
}

impl Cluster {
    /// `None`, said aloud, on a machine that cannot have a laboratory.
    pub fn or_skip() -> Option<Cluster> {
        let lab = lab_or_skip(&[("node1", &["client", "other", "a"]), ("node2", &["stranger", "b", "c"])])?;
        Some(Cluster::on(lab, &PODS, "--http 8080 --tcp 9000 --mptcp 9001 --udp 9000 --udplite 9000"))
    }

    /// The same with a UDP Service at this NodePort, whose only endpoint is pod `a` on node1.
    pub fn with_node_port_or_skip(node_port: u16) -> Option<Cluster> {
        let cluster = Cluster::or_skip()?;
        let mut udp = port("udp", "UDP", 53);
        udp["nodePort"] = json!(node_port);
        let changes = json!({"spec": {"type": "NodePort"}});
        cluster.put_with("echo", 10, json!([udp]), changes, &[("udp", "UDP", 9000)], &cluster.ready(&["a"]));
        Some(cluster)
    }

    /// Whether pod `a` answers a datagram of a client outside within 300 ms.
    pub fn answers_outside(&self, to: SocketAddr) -> bool {
        let ask = || -> anyhow::Result<bool> {
            let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
            socket.connect(to)?;
            socket.set_read_timeout(Some(Duration::from_millis(300)))?;
            socket.send(b"?")?;
            let mut answer = [0; 16];
            let length = socket.recv(&mut answer)?;
            Ok(answer[..length].starts_with(b"a"))
        };
        self.lab.outside(ask).unwrap_or(false)
    }

    /// A cluster on any laboratory, in which these pods serve `listen` ([`Place::serve`](super::lab::Place::serve)).
    pub fn on(lab: Lab, pods: &[&str], listen: &str) -> Cluster {
        let servers = pods.iter().map(|pod| lab.pod(pod).serve(listen).expect("a pod serves")).collect();
        let manifests = Manifests::new(lab.dir.join("manifests"));
        Cluster { servers, manifests, lab }
    }

    /// Starts the daemon of node1 on the manifests and waits until they are in the kernel.
    pub fn start(&self) -> Daemon<'_> {
        Daemon::start(&self.lab, "node1", &self.manifests.dir).expect("the daemon starts")
    }

    /// A client in a pod.
    pub fn client(&self, pod: &str) -> Client {
        self.lab.pod(pod).client().expect("a client starts")
    }

    /// A client among node1's own processes.
    pub fn host_client(&self) -> Client {
        self.lab.node("node1").host.client().expect("a client starts")
    }

    /// Endpoints of both families for pods, all made the same way: `Endpoint::ready`, `Endpoint::terminating`.
    pub fn endpoints(&self, make: impl Fn(IpAddr, &str) -> Endpoint, pods: &[&str]) -> Vec<Endpoint> {
        let of = |pod: &&str| self.lab.pod(pod).addresses().map(|address| make(address, self.lab.node_of(pod)));
        pods.iter().flat_map(of).collect()
    }

    /// Ready endpoints of both families.
    pub fn ready(&self, pods: &[&str]) -> Vec<Endpoint> {
        self.endpoints(Endpoint::ready, pods)
    }

    /// Saves a dual-stack Service with [`PORTS`] and the cluster IPs of `number` ([`vip`]), and its slices.
    /// `spec` and `status` of `changes` are laid over it.
    pub fn put(&self, name: &str, number: u8, changes: Value, endpoints: &[Endpoint]) {
        let ports: Vec<Value> = PORTS.iter().map(|(name, protocol, number, _)| port(name, protocol, *number)).collect();
        let targets: Vec<_> = PORTS.iter().map(|(name, protocol, _, target)| (*name, *protocol, *target)).collect();
        self.put_with(name, number, json!(ports), changes, &targets, endpoints);
    }

    /// As [`Cluster::put`], with other ports.
    pub fn put_with(
        &self,
        name: &str,
        number: u8,
        ports: Value,
        changes: Value,
        targets: &[(&str, &str, u16)],
        endpoints: &[Endpoint],
    ) {
        let [v4, v6] = vip(number, 0).map(|address| address.ip());
        let mut object = service(
            name,
            json!({
                "clusterIP": v4,
                "clusterIPs": [v4, v6],
                "ipFamilies": ["IPv4", "IPv6"],
                "ipFamilyPolicy": "RequireDualStack",
                "ports": ports,
            }),
        );
        for part in ["spec", "status"] {
            for (field, value) in changes[part].as_object().into_iter().flatten() {
                object[part][field] = value.clone();
            }
        }
        let mut objects = vec![object];
        for is_ipv6 in [false, true] {
            let family: Vec<Endpoint> =
                endpoints.iter().filter(|e| e.address().is_ipv6() == is_ipv6).cloned().collect();
            if !family.is_empty() {
                let suffix = if is_ipv6 { "v6" } else { "v4" };
                objects.push(slice(&format!("{name}-{suffix}"), name, targets, &family));
            }
        }
        self.manifests.save(name, &objects);
    }

    /// Waits until new connections on node1 may reach a backend at `address`, or may not: by the live maps.
    pub fn wait_for_backend(&self, address: IpAddr, present: bool) {
        let followed = eventually(PATIENCE, || self.backends().contains(&address) == present);
        let log = self.lab.node("node1").host.log_tail();
        assert!(followed, "{address} present={present} did not come true: {:?}; {log}", self.backends());
    }

    /// Addresses of the backends that node1's live maps let new connections reach.
    fn backends(&self) -> Vec<IpAddr> {
        let text = self.lab.node("node1").get("backends", &["-o", "json"]).expect("kubelane get works");
        let list: Value = serde_json::from_str(&text).expect("kubelane get prints JSON");
        let items = list["items"].as_array().expect("a list has items");
        let in_use = items.iter().filter(|item| item["sets"].as_array().is_some_and(|sets| !sets.is_empty()));
        let address = |item: &Value| item["address"].as_str()?.parse::<SocketAddr>().ok();
        in_use.map(|item| address(item).expect("a backend has an address and a port").ip()).collect()
    }
}

/// A Service's cluster IPs of both families, with a port.
pub fn vip(number: u8, port: u16) -> [SocketAddr; 2] {
    let v6 = Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, number.into());
    [(Ipv4Addr::new(10, 96, 0, number), port).into(), (v6, port).into()]
}

/// An IPv4 destination as a dual-stack socket writes it: ::ffff:a.b.c.d.
pub fn mapped(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) => (v4.ip().to_ipv6_mapped(), v4.port()).into(),
        v6 => v6,
    }
}

/// `times` answers, all from one name (of a server or an errno).
pub fn all(name: &str, times: u32) -> Counts {
    [(name.to_owned(), times)].into()
}

/// The names in `counts`, sorted.
pub fn names(counts: &Counts) -> Vec<&str> {
    counts.keys().map(String::as_str).collect()
}
