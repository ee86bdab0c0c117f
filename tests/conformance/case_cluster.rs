//! What a case has: a laboratory, the real daemon of node1, an API server, and words to say who should answer whom.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use kubelane::abi::{Frontend, ServiceName};
use kubelane::bpf::Maps;
use kubelane::sync::{MapIo as _, MapName};
use serde_json::{Value, json};

use crate::api::Server;
use crate::laboratory::client::{Client, Counts};
use crate::laboratory::cluster::Cluster;
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::manifests::{Endpoint, slice};
use crate::laboratory::messages::Kind;
use crate::laboratory::process::Process;
use crate::laboratory::{eventually, lab_or_skip};

/// One case; it cleans up what it made through [`CaseCluster::gone`], or leaves it to the end.
pub type Case = fn(&CaseCluster);

/// What every pod listens on: 8080 and 9000 by TCP, 9000 and 9053 by UDP, and 7000, where answers say who asks.
const LISTEN: &str = "--tcp 8080 --tcp 9000 --udp 9000 --udp 9053 --seen 7000";
/// The same for pods in their node's own network.
const HOST_LISTEN: &str = "--tcp 9100 --udp 9100";
pub const NODE1: [&str; 2] = ["172.31.0.11", "fd31::11"];

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum From {
    /// A pod on node1.
    Pod(&'static str),
    /// A process of node1 itself.
    Host,
    /// A machine beside the nodes.
    Outside,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    Tcp,
    Udp,
}

impl By {
    pub fn kind(self, to: SocketAddr) -> Kind {
        match (self, to.is_ipv6()) {
            (By::Tcp, false) => Kind::Tcp4,
            (By::Tcp, true) => Kind::Tcp6,
            (By::Udp, false) => Kind::Udp4,
            (By::Udp, true) => Kind::Udp6,
        }
    }
}

pub struct CaseCluster<'a> {
    pub api: &'a Server,
    pub cluster: &'a Cluster,
    pub daemon: &'a Daemon<'a>,
    clients: RefCell<BTreeMap<From, Client>>,
    /// Services that the daemon serves.
    known: RefCell<BTreeSet<String>>,
    _hosts: Vec<Process>,
}

/// A Service as the API server has it.
pub struct Served {
    pub name: String,
    pub object: Value,
}

impl CaseCluster<'_> {
    /// Calls `work` with a world, unless this machine cannot have a laboratory.
    pub fn or_skip(work: impl FnOnce(&CaseCluster)) {
        let pods: [&[&str]; 2] = [&["client", "other", "a"], &["b", "c"]];
        let Some(lab) = lab_or_skip(&[("node1", pods[0]), ("node2", pods[1])]) else { return };
        let run = lab.dir.file_name().and_then(|name| name.to_str()).expect("a laboratory's name").to_owned();
        let cluster = Cluster::on(lab, &["a", "b", "c"], LISTEN);
        let hosts = ["node1", "node2"].map(|node| cluster.lab.node(node).host.serve(HOST_LISTEN).unwrap());
        let api = Server::open(&run).unwrap();
        let kubeconfig = cluster.lab.dir.join("kubeconfig");
        api.write_kubeconfig(&cluster.lab.node("node1").host, &kubeconfig);
        for number in 1..=2 {
            api.put(node(&api.run, number, "zone-1")).expect("a Node");
        }
        // The Node's name is not the host's.
        let options = ["--hostname-override", &node_name(&run, "node1")];
        let host = cluster.lab.node("node1");
        let (cgroup, pins) = (host.cgroup.display().to_string(), host.pin_path.display().to_string());
        let mut arguments = vec!["run", "--cgroup", &cgroup, "--pin-path", &pins];
        arguments.extend(["--kubeconfig", kubeconfig.to_str().unwrap()]);
        arguments.extend(options);
        let daemon = Daemon::start_as(&cluster.lab, "node1", &arguments).expect("the daemon starts");
        work(&CaseCluster {
            api: &api,
            cluster: &cluster,
            daemon: &daemon,
            clients: RefCell::default(),
            known: RefCell::default(),
            _hosts: hosts.into(),
        });
    }

    /// Creates or replaces a Service.
    pub fn service(&self, name: &str, spec: Value) -> Served {
        self.try_service(name, json!({}), spec).unwrap_or_else(|status| panic!("Service {name}: {status}"))
    }

    /// As [`CaseCluster::service`], with metadata; or the status with which the server refuses it.
    pub fn try_service(&self, name: &str, labels: Value, mut spec: Value) -> Result<Served, u16> {
        if spec["type"] != "ExternalName" && spec["clusterIP"] != "None" && spec["ipFamilyPolicy"].is_null() {
            spec["ipFamilyPolicy"] = json!("PreferDualStack");
        }
        if spec["type"] == "LoadBalancer" {
            // No cloud's controller feels responsible.
            spec["loadBalancerClass"] = json!("kubelane.test/by-hand");
        }
        let metadata = json!({"name": name, "labels": labels.clone()});
        let object = json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec.clone()});
        let is_ours = labels == json!({}) && spec["type"] != "ExternalName" && spec["clusterIP"] != "None";
        let served = Served { name: name.into(), object: self.api.put(object)? };
        // A client that is faster than the daemon would send its SYN to nowhere, and wait for seconds.
        if is_ours && self.known.borrow_mut().insert(name.to_owned()) {
            self.listed(name, true);
        } else if !is_ours {
            self.known.borrow_mut().remove(name);
        }
        Ok(served)
    }

    /// Creates or replaces the EndpointSlices of a Service, one for each family.
    pub fn slices(&self, service: &str, ports: &[(&str, &str, u16)], endpoints: &[Endpoint]) {
        self.slices_as(service, service, json!({}), ports, endpoints);
    }

    /// As [`CaseCluster::slices`], named after `name` and with more labels.
    pub fn slices_as(&self, name: &str, of: &str, labels: Value, ports: &[(&str, &str, u16)], endpoints: &[Endpoint]) {
        for (family, is_ipv6) in [("v4", false), ("v6", true)] {
            let own: Vec<Endpoint> = endpoints.iter().filter(|e| e.address().is_ipv6() == is_ipv6).cloned().collect();
            let mut object = slice(&format!("{name}-{family}"), of, ports, &own);
            object["addressType"] = json!(if is_ipv6 { "IPv6" } else { "IPv4" });
            object["metadata"]["labels"]["endpointslice.kubernetes.io/managed-by"] = json!("kubelane-test");
            for (label, value) in labels.as_object().into_iter().flatten() {
                object["metadata"]["labels"][label] = value.clone();
            }
            self.api.put(object).unwrap_or_else(|status| panic!("EndpointSlice {name}-{family}: {status}"));
        }
    }

    /// A Service with the TCP port 80 on ready pods' 9000.
    pub fn simple(&self, name: &str, spec: Value, pods: &[&str]) -> Served {
        let mut spec = spec;
        if spec["ports"].is_null() {
            spec["ports"] = json!([{"name": "http", "protocol": "TCP", "port": 80}]);
        }
        let served = self.service(name, spec);
        self.slices(name, &HTTP, &self.ready(pods));
        served
    }

    /// Endpoints of both families for pods, or for a node's own processes (`node1`), all made the same way.
    pub fn endpoints(&self, make: impl Fn(IpAddr, &str) -> Endpoint, places: &[&str]) -> Vec<Endpoint> {
        let lab = &self.cluster.lab;
        let of = |place: &str| match place.starts_with("node") {
            true => (lab.node(place).host.addresses(), place.to_owned()),
            false => (lab.pod(place).addresses(), lab.node_of(place).to_owned()),
        };
        let all = places.iter().map(|place| of(place));
        all.flat_map(|(ips, node)| ips.map(|ip| make(ip, &node_name(&self.api.run, &node)))).collect()
    }

    pub fn ready(&self, places: &[&str]) -> Vec<Endpoint> {
        self.endpoints(Endpoint::ready, places)
    }

    /// Deletes a Service and its slices.
    pub fn gone(&self, name: &str) {
        self.known.borrow_mut().remove(name);
        self.api.delete(&json!({"kind": "Service", "metadata": {"name": name}}));
        for family in ["v4", "v6"] {
            self.api.delete(&json!({"kind": "EndpointSlice", "metadata": {"name": format!("{name}-{family}")}}));
        }
    }

    /// Deletes a Service; its slices stay.
    pub fn gone_but_slices(&self, served: &Served) {
        self.known.borrow_mut().remove(&served.name);
        self.api.delete(&served.object);
    }

    /// `times` new sockets ask who answers.
    pub fn ask(&self, from: From, by: By, to: SocketAddr, times: u32) -> Counts {
        self.with_client(from, |client| client.ask(by.kind(to), to, times))
    }

    /// A client process of that place, the same one each time.
    pub fn with_client<T>(&self, from: From, work: impl FnOnce(&mut Client) -> T) -> T {
        let mut clients = self.clients.borrow_mut();
        let lab = &self.cluster.lab;
        let client = clients.entry(from).or_insert_with(|| {
            let client = match from {
                From::Pod(pod) => lab.pod(pod).client(),
                From::Host => lab.node("node1").host.client(),
                From::Outside => lab.client_outside(),
            };
            client.expect("a client starts")
        });
        work(client)
    }

    /// Waits until these, all of them and nobody else, answer at every address; the word for a refusal is `REFUSED`.
    pub fn reaches(&self, from: From, by: By, addresses: &[SocketAddr], who: &[&str]) {
        assert!(!addresses.is_empty(), "somewhere to go");
        let times = if who.len() > 1 { 40 } else { 5 };
        for to in addresses {
            let mut last = Counts::new();
            let is_so = eventually(PATIENCE, || {
                last = self.ask(from, by, *to, times);
                last.keys().map(String::as_str).eq(who.iter().copied())
            });
            assert!(is_so, "{from:?} by {by:?} to {to}: {last:?}, not {who:?}; {}", self.daemon.log());
        }
    }

    /// Waits until everybody on the node is refused at every address.
    pub fn refused(&self, from: From, by: By, addresses: &[SocketAddr]) {
        self.reaches(from, by, addresses, &[REFUSED]);
    }

    /// Waits until a datagram from outside gets no answer at all.
    pub fn dropped_outside(&self, addresses: &[SocketAddr]) {
        for to in addresses {
            let mut last = Counts::new();
            let is_so = eventually(PATIENCE, || {
                last = self.ask(From::Outside, By::Udp, *to, 1);
                last.keys().eq(["EAGAIN"])
            });
            assert!(is_so, "from outside to {to}: {last:?}; {}", self.daemon.log());
        }
    }

    /// Waits until the live maps have frontends of this Service, or nothing of it.
    pub fn listed(&self, name: &str, expected: bool) {
        let prefix = format!("{}/{name}:", self.api.namespace);
        let mut maps = Maps::open(&self.cluster.lab.node("node1").pin_path).expect("the pinned maps");
        let mut has = || {
            let (mut ids, mut frontends) = (Vec::new(), 0);
            let mut find = |id: &[u8], text: &[u8]| {
                if bytemuck::pod_read_unaligned::<ServiceName>(text).as_str().starts_with(&prefix) {
                    ids.push(bytemuck::pod_read_unaligned::<u32>(id));
                }
            };
            maps.dump(MapName::Services, &mut find).expect("the names can be read");
            let mut count = |_: &[u8], row: &[u8]| {
                frontends += usize::from(ids.contains(&bytemuck::pod_read_unaligned::<Frontend>(row).service_id));
            };
            maps.dump(MapName::Frontends, &mut count).expect("the frontends can be read");
            if expected { frontends > 0 } else { ids.is_empty() }
        };
        let is_so = eventually(PATIENCE, &mut has);
        assert!(is_so, "{name} listed={expected} did not come true; {}", self.daemon.log());
    }
}

/// What a refused client sees.
pub const REFUSED: &str = "ECONNREFUSED";

/// Of slices: the port `http` of [`CaseCluster::simple`].
pub const HTTP: [(&str, &str, u16); 1] = [("http", "TCP", 9000)];

impl Served {
    /// Its cluster IPs, with a port.
    pub fn at(&self, port: u16) -> Vec<SocketAddr> {
        let ips = self.object["spec"]["clusterIPs"].as_array().expect("cluster IPs");
        ips.iter().map(|ip| SocketAddr::new(ip.as_str().expect("text").parse().expect("an IP"), port)).collect()
    }

    /// The node port of its port of that name.
    pub fn node_port(&self, name: &str) -> u16 {
        let ports = self.object["spec"]["ports"].as_array().expect("ports");
        let port = ports.iter().find(|port| port["name"] == name).expect("a port of that name");
        port["nodePort"].as_u64().and_then(|port| port.try_into().ok()).expect("a node port")
    }

    /// That port at node1's addresses, of the families that the Service has.
    pub fn at_node(&self, name: &str) -> Vec<SocketAddr> {
        let port = self.node_port(name);
        let has = |v6: bool| self.at(0).iter().any(|at| at.is_ipv6() == v6);
        let all = NODE1.into_iter().map(|ip| SocketAddr::new(ip.parse().expect("an IP"), port));
        all.filter(|at| has(at.is_ipv6())).collect()
    }
}

/// The name of a Node object of this run.
pub fn node_name(run: &str, node: &str) -> String {
    format!("kubelane-{node}-{run}")
}

/// The Node object of node 1 or 2.
pub fn node(run: &str, number: u8, zone: &str) -> Value {
    let name = node_name(run, &format!("node{number}"));
    let addresses = json!([
        {"type": "InternalIP", "address": format!("172.31.0.1{number}")},
        {"type": "InternalIP", "address": format!("fd31::1{number}")},
    ]);
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}},
        "status": {"addresses": addresses},
    })
}
