//! A laboratory: nodes with pods on an underlay, all in namespaces and cgroups of their own.
//!
//! ```text
//!  underlay   br0 172.31.0.1, fd31::1  (answers nothing, forwards nothing)
//!              |                  |
//!  node N     eth0 172.31.0.1N, fd31::1N
//!             cbr0 10.244.N.1, fd44:0:0:N::1
//!              |        |
//!  pod K      eth0 10.244.N.1K, fd44:0:0:N::1K   (K counts the node's pods from 0)
//! ```

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, bail};
use nix::mount::{MsFlags, mount};

use super::client::Client;
use super::process::Process;
use super::sweep::{global_lock, remove_and_tell, sweep};
use super::{cgroup, kubelane_binary, lab_binary, netns};

/// Directory of all laboratories: one directory each, and `ID.lock`, locked while the owner lives.
pub(super) const RUN: &str = "/run/kubelane-lab";
/// Names of namespaces begin with this and the id.
pub(super) const NETNS_PREFIX: &str = "kllab-";
/// Names of cgroups begin with this and the id.
pub(super) const CGROUP_PREFIX: &str = "kubelane-lab-";

/// Ids of this process's laboratories, for [`super::sweep::remove_own`].
pub(super) static OWN: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Where processes run: a namespace, and a cgroup in the node's. A pod, or a node's host side.
#[derive(Clone, Debug)]
pub struct Place {
    pub name: String,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    pub(super) netns: PathBuf,
    pub(super) cgroup: PathBuf,
    pub(super) log: PathBuf,
}

impl Place {
    /// Starts a program here.
    pub fn spawn(&self, program: &Path, arguments: &[&str]) -> anyhow::Result<Process> {
        Process::spawn(&self.netns, &self.cgroup, &self.log, program, arguments)
    }

    /// Starts a server that answers everything with the place's name, and waits until it listens. `listen` are options
    /// of `kubelane-lab serve`: `--http 8080 --udp 5353`.
    pub fn serve(&self, listen: &str) -> anyhow::Result<Process> {
        self.serve_as(&self.name, listen)
    }

    /// As [`Place::serve`], answering with another name.
    pub fn serve_as(&self, name: &str, listen: &str) -> anyhow::Result<Process> {
        let mut arguments = vec!["serve", "--name", name];
        arguments.extend(listen.split_whitespace());
        let mut server = self.spawn(&lab_binary()?, &arguments)?;
        server.wait_ready(name).with_context(|| self.log_tail())?;
        Ok(server)
    }

    /// A client whose sockets belong to this place.
    pub fn client(&self) -> anyhow::Result<Client> {
        Client::new(self.spawn(&lab_binary()?, &["client"])?)
    }

    /// Both addresses, IPv4 first.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// Runs `work` on a thread in this namespace. Its sockets do NOT belong to the place's cgroup.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        netns::inside(&self.netns, work)
    }

    /// The name of this namespace in the file system.
    pub fn netns(&self) -> &Path {
        &self.netns
    }

    /// Runs a program in this namespace to its end, with `input` on its stdin; its stdout. It is NOT in the place's
    /// cgroup.
    pub fn run(&self, program: &str, arguments: &[&str], input: &str) -> anyhow::Result<String> {
        self.inside(|| netns::run(program, arguments, input))
    }

    /// Sets sysctls below /proc/sys/net in this namespace.
    pub fn sysctl(&self, settings: &[(&str, &str)]) -> anyhow::Result<()> {
        netns::sysctl(&self.netns, settings)
    }

    /// Runs `ip` commands in this namespace.
    pub fn ip(&self, commands: &[&str]) -> anyhow::Result<()> {
        let name = self.netns.file_name().and_then(|name| name.to_str());
        netns::ip(name, &commands.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>())
    }

    /// The end of what this place's processes logged.
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        format!("log of {}:\n{}", self.name, lines[lines.len().saturating_sub(40)..].join("\n"))
    }
}

/// A node: its host side, its pods, and what its daemon is given.
#[derive(Debug)]
pub struct Node {
    pub name: String,
    /// From 1 on.
    pub number: u8,
    /// The node's own namespace. Processes here are in the node's cgroup, beside the pods.
    pub host: Place,
    pub pods: Vec<Place>,
    /// For `kubelane run --cgroup`: everything of this node is below.
    pub cgroup: PathBuf,
    /// For `--pin-path`: a directory on the laboratory's own bpffs.
    pub pin_path: PathBuf,
}

/// A running laboratory. Dropping it removes every trace.
#[derive(Debug)]
pub struct Lab {
    id: String,
    pub dir: PathBuf,
    pub nodes: Vec<Node>,
    _lock: File,
}

impl Lab {
    /// Lays out one node per `(name, pods)`; names are unique in the laboratory. Removes what dead owners left first.
    pub fn new(nodes: &[(&str, &[&str])]) -> anyhow::Result<Lab> {
        let lab = Lab::without_cni(nodes)?;
        lab.wire_pods()?;
        Ok(lab)
    }

    /// As [`Lab::new`], but a pod is an empty namespace, and its address no more than a plan: a CNI is to bring both.
    /// Nodes have their uplink, forwarding, and the underlay as their default route; nothing leads to pods elsewhere.
    pub fn without_cni(nodes: &[(&str, &[&str])]) -> anyhow::Result<Lab> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        sweep()?;
        let id = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = Path::new(RUN).join(&id);
        let guard = global_lock()?;
        let lock = File::create(dir.with_extension("lock")).context("creating the laboratory's lock")?;
        lock.lock().context("locking the laboratory")?;
        drop(guard);
        OWN.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(id.clone());

        let mut lab = Lab { id, dir, nodes: Vec::new(), _lock: lock };
        let mount_point = cgroup::mount_point()?;
        for (index, (name, pods)) in nodes.iter().enumerate() {
            let node = lab.plan(&mount_point, index + 1, name, pods)?;
            lab.nodes.push(node);
        }
        lab.build()?;
        Ok(lab)
    }

    pub fn node(&self, name: &str) -> &Node {
        self.nodes.iter().find(|node| node.name == name).unwrap_or_else(|| panic!("no node {name}"))
    }

    /// The pod of that name, on whichever node it is.
    pub fn pod(&self, name: &str) -> &Place {
        let mut pods = self.nodes.iter().flat_map(|node| &node.pods);
        pods.find(|pod| pod.name == name).unwrap_or_else(|| panic!("no pod {name}"))
    }

    /// Name of the node that the pod is on.
    pub fn node_of(&self, pod: &str) -> &str {
        let mut nodes = self.nodes.iter();
        let node = nodes.find(|node| node.pods.iter().any(|place| place.name == pod));
        &node.unwrap_or_else(|| panic!("no pod {pod}")).name
    }

    /// Runs `work` on a thread in the underlay's namespace, on whose bridge the nodes are: a client outside all of
    /// them, at 172.31.0.1 and fd31::1.
    pub fn outside<T: Send>(&self, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        netns::inside(&self.underlay(), work)
    }

    /// A cgroup of no node.
    fn cgroup_outside(&self) -> anyhow::Result<PathBuf> {
        let cgroup = cgroup::mount_point()?.join(format!("{CGROUP_PREFIX}{}", self.id)).join("outside");
        fs::create_dir_all(&cgroup).with_context(|| format!("creating {}", cgroup.display()))?;
        Ok(cgroup)
    }

    /// A group with a limit of memory, for processes of this node. `None`: the machine has no such groups.
    pub fn memory_group(&self, node: &str) -> Option<cgroup::MemoryGroup> {
        cgroup::MemoryGroup::new(&format!("{CGROUP_PREFIX}{}", self.id), &self.node(node).cgroup)
    }

    /// A pod whose processes no program sees connect, as if they ran on another kernel: only its packets are served.
    pub fn pod_of_packets(&self, pod: &str) -> anyhow::Result<Place> {
        Ok(Place { cgroup: self.cgroup_outside()?, ..self.pod(pod).clone() })
    }

    /// Where [`Lab::outside`] is, as a place: its processes are in no node's cgroup.
    pub fn outside_place(&self) -> anyhow::Result<Place> {
        let cgroup = self.cgroup_outside()?;
        Ok(Place {
            name: "outside".to_owned(),
            v4: Ipv4Addr::new(172, 31, 0, 1),
            v6: Ipv6Addr::new(0xfd31, 0, 0, 0, 0, 0, 0, 1),
            netns: self.underlay(),
            cgroup,
            log: self.dir.join("outside.log"),
        })
    }

    /// A client process where [`Lab::outside`] is.
    pub fn client_outside(&self) -> anyhow::Result<Client> {
        self.outside_place()?.client()
    }

    /// Lets the client outside reach `network` by `node`, as a load balancer's announcement would.
    pub fn route_outside(&self, network: &str, node: &str) -> anyhow::Result<()> {
        let by = &self.node(node).host;
        let gateway: IpAddr = if network.contains(':') { by.v6.into() } else { by.v4.into() };
        self.ip_outside(&[format!("route add {network} via {gateway}")])
    }

    /// Runs `ip` commands in the underlay's namespace.
    pub fn ip_outside(&self, commands: &[String]) -> anyhow::Result<()> {
        netns::ip(Some(&self.netns_name("underlay")), commands)
    }

    /// The name of the underlay's namespace in the file system.
    pub fn underlay(&self) -> PathBuf {
        netns::path(&self.netns_name("underlay"))
    }

    /// Sets sysctls below /proc/sys/net in the underlay's namespace.
    pub fn sysctl_outside(&self, settings: &[(&str, &str)]) -> anyhow::Result<()> {
        netns::sysctl(&self.underlay(), settings)
    }

    /// Cables another device of a node to the underlay's bridge. `number` is this uplink's: 1 is the first after eth0.
    pub fn add_uplink(&self, node: &Node, device: &str, number: usize) -> anyhow::Result<()> {
        let (underlay, host) = (self.netns_name("underlay"), self.netns_name(&node.name));
        let (outer, index) = (format!("{}-{device}", node.name), 100 * (number + 1) + usize::from(node.number));
        netns::ip(
            None,
            &[format!(
                "link add name {outer} index {index} netns {underlay} type veth peer name {device} netns {host}"
            )],
        )?;
        self.ip_outside(&[format!("link set dev {outer} master br0 up")])
    }

    /// Cables a pod to its node: `device` on the node, eth0 in the pod. For a CNI that routes.
    pub fn cable_pod(&self, node: &Node, pod: &str, device: &str) -> anyhow::Result<()> {
        let index = node.pods.iter().position(|place| place.name == pod).context("the pod is on this node")?;
        netns::ip(None, &[cable(device, index, &self.netns_name(&node.name), &self.netns_name(pod))])
    }

    fn netns_name(&self, place: &str) -> String {
        format!("{NETNS_PREFIX}{}-{place}", self.id)
    }

    /// Decides names and addresses.
    fn plan(&self, mount_point: &Path, number: usize, name: &str, pods: &[&str]) -> anyhow::Result<Node> {
        let number = u8::try_from(number).context("too many nodes")?;
        let cgroup = mount_point.join(format!("{CGROUP_PREFIX}{}", self.id)).join(name);
        let place = |place: &str, group: PathBuf, v4: Ipv4Addr, v6: Ipv6Addr| Place {
            name: place.to_owned(),
            v4,
            v6,
            netns: netns::path(&self.netns_name(place)),
            cgroup: group,
            log: self.dir.join(format!("{place}.log")),
        };
        let on_underlay = 10 + number;
        let host = place(
            name,
            cgroup.join("host"),
            Ipv4Addr::new(172, 31, 0, on_underlay),
            // Written as in decimal, so that .11 and ::11 are the same node.
            format!("fd31::{on_underlay}").parse()?,
        );
        let pin_path = self.dir.join("bpf");
        let mut node = Node { name: name.to_owned(), number, host, pods: Vec::new(), pin_path, cgroup };
        node.pin_path.push(name);
        for (index, pod) in pods.iter().enumerate() {
            if pod.len() > 13 {
                bail!("pod name {pod} is too long for a device name");
            }
            let last = 10 + u8::try_from(index).context("too many pods")?;
            let v6 = format!("fd44:0:0:{number}::{last}").parse()?;
            let group = node.cgroup.join("pods").join(pod);
            node.pods.push(place(pod, group, Ipv4Addr::new(10, 244, number, last), v6));
        }
        Ok(node)
    }

    fn build(&self) -> anyhow::Result<()> {
        let bpffs = self.dir.join("bpf");
        fs::create_dir_all(&bpffs).with_context(|| format!("creating {}", bpffs.display()))?;
        mount(Some("bpffs"), &bpffs, Some("bpf"), MsFlags::empty(), None::<&str>).context("mounting a bpffs")?;
        let underlay = self.netns_name("underlay");
        let mut names = vec![underlay.clone()];
        for place in self.places() {
            names.push(self.netns_name(&place.name));
            fs::create_dir_all(&place.cgroup).with_context(|| format!("creating {}", place.cgroup.display()))?;
        }
        netns::ip(None, &names.iter().map(|name| format!("netns add {name}")).collect::<Vec<_>>())?;
        for name in &names {
            let forward = if *name == underlay { "0" } else { "1" };
            netns::sysctl(
                &netns::path(name),
                &[
                    ("ipv6/conf/all/accept_dad", "0"),
                    ("ipv6/conf/default/accept_dad", "0"),
                    ("ipv4/ip_forward", forward),
                    ("ipv6/conf/all/forwarding", forward),
                ],
            )?;
        }
        netns::ip(None, &self.links(&underlay))?;
        let mut lines = vec!["link set lo up".to_owned(), "link set br0 up".to_owned()];
        lines.push("address add 172.31.0.1/24 dev br0".to_owned());
        lines.push("address add fd31::1/64 dev br0 nodad".to_owned());
        lines.extend(self.nodes.iter().map(|node| format!("link set dev {} master br0 up", node.name)));
        netns::ip(Some(&underlay), &lines)?;
        for node in &self.nodes {
            netns::ip(Some(&self.netns_name(&node.name)), &node_addresses(node))?;
        }
        Ok(())
    }

    /// The laboratory's own CNI: a bridge on each node, and routes between the nodes.
    fn wire_pods(&self) -> anyhow::Result<()> {
        for node in &self.nodes {
            let host = self.netns_name(&node.name);
            let address = link_text(bridge_address(node.number));
            let mut lines =
                vec![format!("link add name cbr0 address {address} netns {host} type bridge mcast_snooping 0")];
            for (index, pod) in node.pods.iter().enumerate() {
                lines.push(cable(&pod.name, index, &host, &self.netns_name(&pod.name)));
            }
            netns::ip(None, &lines)?;
            netns::ip(Some(&host), &self.pod_routes(node))?;
            for pod in &node.pods {
                netns::ip(Some(&self.netns_name(&pod.name)), &pod_addresses(pod))?;
            }
        }
        Ok(())
    }

    fn places(&self) -> impl Iterator<Item = &Place> {
        self.nodes.iter().flat_map(|node| std::iter::once(&node.host).chain(&node.pods))
    }

    /// The underlay's bridge and the nodes' cables to it; each device is born in its namespace, none ever in the
    /// machine's. (A bridge that snoops multicast loses the first neighbour solicitations.)
    fn links(&self, underlay: &str) -> Vec<String> {
        let mut lines = vec![format!("link add name br0 netns {underlay} type bridge mcast_snooping 0")];
        let nodes = self.nodes.iter().enumerate();
        lines.extend(nodes.map(|(index, node)| cable(&node.name, index, underlay, &self.netns_name(&node.name))));
        lines
    }

    /// The node's side of the pods' bridge, and the way to the other nodes' pods.
    fn pod_routes(&self, node: &Node) -> Vec<String> {
        let mut lines = vec!["link set cbr0 up".to_owned()];
        for Node { number, host, .. } in &self.nodes {
            if *number == node.number {
                lines.push(format!("address add 10.244.{number}.1/24 dev cbr0"));
                lines.push(format!("address add fd44:0:0:{number}::1/64 dev cbr0 nodad"));
            } else {
                lines.push(format!("route add 10.244.{number}.0/24 via {}", host.v4));
                lines.push(format!("route add fd44:0:0:{number}::/64 via {}", host.v6));
            }
        }
        lines.extend(node.pods.iter().map(|pod| format!("link set dev {} master cbr0 up", pod.name)));
        lines
    }
}

/// A cable: `outer`, in the namespace `outside`, and eth0, in `inside`.
///
/// The kernel takes a veth whose number equals its peer's for a plain device and lets its carrier wait
/// (linkwatch_urgent_event), which costs IPv6 its first second: so the outer ends are numbered from 100.
fn cable(outer: &str, number: usize, outside: &str, inside: &str) -> String {
    let number = 100 + number;
    format!("link add name {outer} index {number} netns {outside} type veth peer name eth0 netns {inside}")
}

/// That of the pods' bridge on a node: one that stays, as CNIs give. By itself a bridge has its lowest port's.
pub fn bridge_address(node: u8) -> [u8; 6] {
    [0x0a, 0x58, 10, 244, node, 1]
}

/// A link address as `ip` takes it.
pub fn link_text(address: [u8; 6]) -> String {
    address.map(|byte| format!("{byte:02x}")).join(":")
}

fn node_addresses(node: &Node) -> Vec<String> {
    vec![
        "link set lo up".to_owned(),
        format!("address add {}/24 dev eth0", node.host.v4),
        format!("address add {}/64 dev eth0 nodad", node.host.v6),
        "link set eth0 up".to_owned(),
        "route add default via 172.31.0.1".to_owned(),
        "route add default via fd31::1".to_owned(),
    ]
}

impl Drop for Lab {
    fn drop(&mut self) {
        remove_and_tell(&self.id);
    }
}

fn pod_addresses(pod: &Place) -> Vec<String> {
    let number = pod.v4.octets()[2];
    vec![
        "link set lo up".to_owned(),
        "link set eth0 up".to_owned(),
        format!("address add {}/24 dev eth0", pod.v4),
        format!("address add {}/64 dev eth0 nodad", pod.v6),
        format!("route add default via 10.244.{number}.1"),
        format!("route add default via fd44:0:0:{number}::1"),
    ]
}

impl Node {
    /// Runs the `kubelane` binary in the node's namespace to its end: its stdout, or an error with all it said.
    pub fn kubelane(&self, arguments: &[&str]) -> anyhow::Result<String> {
        use std::io::Read as _;
        let mut process = self.host.spawn(&kubelane_binary()?, arguments)?;
        let mut said = String::new();
        process.stdout()?.read_to_string(&mut said).context("reading what kubelane says")?;
        let status = process.wait()?;
        if !status.success() {
            bail!("kubelane {} ended with {status}: {said}\n{}", arguments.join(" "), self.host.log_tail());
        }
        Ok(said)
    }
}
