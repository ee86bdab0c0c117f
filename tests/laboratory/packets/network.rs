//! Two nodes, a pod on each, and a client outside, in network namespaces: a LAN of bridged veths, and a VXLAN between
//! the nodes whose MTU is 50 bytes smaller than anybody's device, so that nothing large passes without path-MTU
//! discovery. The first node runs the packet programs; it filters strictly and forwards only what a CNI would allow.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kubelane::abi::address_flag::{ADDRESS_LOCAL, ADDRESS_NODE, ADDRESS_SERVICE_VIP};
use kubelane::bpf::{Datapath, Device, LinkLayer, Role};
use kubelane::model::Protocol;
use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use nix::net::if_::InterfaceFlags;
use nix::sched::{CloneFlags, setns};

use super::super::pins::Pins;
use super::{Node, interface_index};

pub const CLIENT: [&str; 2] = ["192.168.7.9", "fd07::9"];
/// A second client, which the first node's policy bars from the pods.
pub const BARRED: &str = "192.168.7.66";
pub const NODE: [&str; 2] = ["192.168.7.1", "fd07::1"];
const FAR_NODE: [&str; 2] = ["192.168.7.2", "fd07::2"];
pub const OVERLAY: [&str; 2] = ["10.1.0.1", "fd10::1"];
const FAR_OVERLAY: [&str; 2] = ["10.1.0.2", "fd10::2"];
pub const POD_HERE: [&str; 2] = ["10.1.1.5", "fd11::5"];
pub const POD_THERE: [&str; 2] = ["10.1.2.5", "fd12::5"];
pub const VIP: [&str; 2] = ["192.0.2.80", "2001:db8:80::80"];
/// The address of a NodePort's frontend.
pub const WILDCARD: [&str; 2] = ["0.0.0.0", "::"];
pub const POD_PORT: u16 = 8080;

const SPACES: [&str; 6] = ["lan", "client", "near", "far", "podn", "podf"];

/// Namespaces, and their end.
pub struct Network {
    prefix: String,
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in SPACES {
            let _ = Command::new("ip").args(["netns", "del", &self.name(name)]).output();
        }
    }
}

/// Runs a command that reads lines from its standard input. Most of its cost is being started, above all in emulation.
fn run(program: &str, words: &str, lines: &str) {
    let mut command = Command::new(program);
    command.args(words.split_whitespace()).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success(), "{program} {words}: {}{lines}", String::from_utf8_lossy(&out.stderr));
}

impl Network {
    pub fn new() -> Network {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let prefix = format!("klw{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let cluster = Network { prefix };
        let spaces: Vec<String> = SPACES.iter().map(|name| format!("netns add {}", cluster.name(name))).collect();
        run("ip", "-batch -", &spaces.join("\n"));
        cluster.join_lan("client", CLIENT);
        cluster.join_lan("near", NODE);
        cluster.join_lan("far", FAR_NODE);
        cluster.ip(
            "lan",
            "link add br0 type bridge\nlink set br0 up\nlink set client master br0 up\nlink set near master br0 up
             link set far master br0 up",
        );
        cluster.join_overlay("near", OVERLAY, FAR_NODE[0]);
        cluster.join_overlay("far", FAR_OVERLAY, NODE[0]);
        cluster.add_pod("near", "podn", POD_HERE);
        cluster.add_pod("far", "podf", POD_THERE);
        cluster.ip(
            "near",
            &format!("route add 10.1.2.0/24 via {}\nroute add fd12::/64 via {}", FAR_OVERLAY[0], FAR_OVERLAY[1]),
        );
        cluster.ip("far", &format!("route add 10.1.1.0/24 via {}\nroute add fd11::/64 via {}", OVERLAY[0], OVERLAY[1]));
        let [(vip4, vip6), (via4, via6)] = [VIP, NODE].map(|[ip4, ip6]| (ip4, ip6));
        let routes = format!("addr add {BARRED}/24 dev eth0\nroute add {vip4} via {via4}\nroute add {vip6} via {via6}");
        cluster.ip("client", &routes);
        cluster.harden();
        cluster.wait_for_links();
        cluster
    }

    /// A link is up a second after both of its ends are (the kernel's link watch); what is sent before is lost.
    fn wait_for_links(&self) {
        let runs = || {
            let state = |i: InterfaceAddress| i.flags & (InterfaceFlags::IFF_UP | InterfaceFlags::IFF_RUNNING);
            getifaddrs().unwrap().all(|i| state(i) != InterfaceFlags::IFF_UP)
        };
        let deadline = Instant::now() + Duration::from_secs(30);
        while !SPACES.iter().all(|name| self.inside(name, runs)) {
            assert!(Instant::now() < deadline, "a link does not come up");
            thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Runs `ip` in a namespace, on each of these lines.
    pub fn ip(&self, name: &str, lines: &str) {
        run("ip", &format!("-n {} -batch -", self.name(name)), lines);
    }

    fn join_lan(&self, name: &str, [ip4, ip6]: [&str; 2]) {
        let lan = self.name("lan");
        self.ip(
            name,
            &format!(
                "link set lo up
                 link add eth0 type veth peer name {name} netns {lan}
                 addr add {ip4}/24 dev eth0
                 addr add {ip6}/64 dev eth0 nodad
                 link set eth0 up"
            ),
        );
    }

    fn join_overlay(&self, name: &str, [ip4, ip6]: [&str; 2], peer: &str) {
        self.ip(
            name,
            &format!(
                "link add vx0 mtu 1450 type vxlan id 7 remote {peer} dstport 8472 dev eth0
                 addr add {ip4}/24 dev vx0
                 addr add {ip6}/64 dev vx0 nodad
                 link set vx0 up"
            ),
        );
    }

    /// A pod whose device has a larger MTU than the overlay.
    fn add_pod(&self, node: &str, pod: &str, [ip4, ip6]: [&str; 2]) {
        let space = self.name(pod);
        self.ip(
            node,
            &format!(
                "link add {pod} type veth peer name eth0 netns {space}
                 addr add 169.254.1.1/32 dev lo
                 link set {pod} up
                 addr add fe80::1/64 dev {pod} nodad"
            ),
        );
        self.ip(
            pod,
            &format!(
                "link set lo up
                 addr add {ip4}/32 dev eth0
                 addr add {ip6}/128 dev eth0 nodad
                 link set eth0 up
                 route add 169.254.1.1 dev eth0
                 route add default via 169.254.1.1
                 route add default via fe80::1 dev eth0"
            ),
        );
        self.ip(node, &format!("route add {ip4}/32 dev {pod}\nroute add {ip6}/128 dev {pod}"));
    }

    /// Forwarding, strict reverse-path filtering, FORWARD policy DROP with a CNI's rules, and a network policy.
    fn harden(&self) {
        for node in ["near", "far"] {
            self.inside(node, || {
                for name in ["ipv4/conf/all/forwarding", "ipv6/conf/all/forwarding", "ipv4/conf/all/rp_filter"] {
                    std::fs::write(format!("/proc/sys/net/{name}"), "1").unwrap();
                }
                let barred = format!("-A FORWARD -s {BARRED} -j DROP\n");
                for (restore, pods, first) in
                    [("iptables-restore", "10.1.0.0/16", barred.as_str()), ("ip6tables-restore", "fd10::/14", "")]
                {
                    let accept = format!("-A FORWARD -s {pods} -j ACCEPT\n-A FORWARD -d {pods} -j ACCEPT\n");
                    run(restore, "", &format!("*filter\n:FORWARD DROP\n{first}{accept}COMMIT\n"));
                }
            });
        }
    }

    /// Runs `work` on a thread inside a namespace.
    pub fn inside<T: Send>(&self, name: &str, work: impl FnOnce() -> T + Send) -> T {
        let space = File::open(format!("/run/netns/{}", self.name(name))).unwrap();
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(space.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// The near node's datapath, on its uplink and its overlay. Opened on a thread inside it.
    pub fn open_near(&self, clsact: bool) -> Node {
        let mut node = self.inside("near", || {
            let place = Pins::new();
            let datapath = Datapath::open(&place.settings()).unwrap();
            let (uplink, tunnel) = (interface_index("eth0"), interface_index("vx0"));
            let mut node = Node::with(datapath, place, uplink, tunnel);
            if clsact {
                node.datapath.devices().use_clsact();
            }
            for (index, addresses) in [(uplink, NODE), (tunnel, OVERLAY)] {
                let (ip4, ip6) = (addresses[0].parse().ok(), addresses[1].parse().ok());
                node.datapath
                    .devices()
                    .attach(&Device {
                        index,
                        link_layer: LinkLayer::Ethernet,
                        role: Role::Outward,
                        ip4,
                        ip6,
                        rp_filter: 0,
                    })
                    .unwrap();
            }
            node
        });
        for family in 0..2 {
            node.address(NODE[family], ADDRESS_NODE | ADDRESS_LOCAL);
            node.address(OVERLAY[family], ADDRESS_LOCAL);
            node.address(VIP[family], ADDRESS_SERVICE_VIP);
        }
        node
    }

    /// TCP and UDP servers in both pods, both families. They end with the test's process.
    pub fn serve(&self) {
        for (pod, addresses) in [("podn", POD_HERE), ("podf", POD_THERE)] {
            for address in addresses {
                let at = SocketAddr::new(address.parse().unwrap(), POD_PORT);
                let (listener, socket) =
                    self.inside(pod, || (TcpListener::bind(at).unwrap(), UdpSocket::bind(at).unwrap()));
                thread::spawn(move || serve_tcp(&listener));
                thread::spawn(move || serve_udp(&socket));
            }
        }
    }
}

/// Makes `pod_port` of the pod at `pod` a service: at `port` of the near node's addresses, and of the VIP.
pub fn publish(node: &mut Node, port: u16, protocol: Protocol, pod: &str, pod_port: u16) {
    let id = node.next_backend();
    node.backend(id, pod, pod_port, protocol, POD_HERE.contains(&pod));
    for frontends in [WILDCARD, VIP] {
        node.frontend(frontends[usize::from(pod.contains(':'))], port, protocol, &[id]);
    }
}

/// Reads two lengths, reads as many bytes as the first says, answers with whom it saw and as many as the second says.
fn serve_tcp(listener: &TcpListener) {
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        thread::spawn(move || -> std::io::Result<()> {
            let mut lengths = [0u8; 16];
            stream.read_exact(&mut lengths)?;
            let upload = u64::from_be_bytes(lengths[..8].try_into().unwrap());
            let download = u64::from_be_bytes(lengths[8..].try_into().unwrap());
            std::io::copy(&mut (&stream).take(upload), &mut std::io::sink())?;
            let seen = format!("{:<64}", stream.peer_addr()?);
            stream.write_all(seen.as_bytes())?;
            std::io::copy(&mut std::io::repeat(7).take(download), &mut stream)?;
            Ok(())
        });
    }
}

/// Answers each datagram with whom it saw, made as long as the datagram.
fn serve_udp(socket: &UdpSocket) {
    let mut buffer = vec![0u8; 65_536];
    while let Ok((length, from)) = socket.recv_from(&mut buffer) {
        let mut answer = format!("{from:<64}").into_bytes();
        answer.resize(length.max(64), b'.');
        let _ = socket.send_to(&answer, from);
    }
}

fn address_in(answer: &[u8]) -> IpAddr {
    let text = String::from_utf8_lossy(&answer[..64]);
    text.trim().parse::<SocketAddr>().unwrap_or_else(|e| panic!("{text:?}: {e}")).ip()
}

/// Connects, sends and receives so many bytes; whom the server saw.
pub fn transfer(to: SocketAddr, upload: u64, download: u64) -> std::io::Result<IpAddr> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.set_write_timeout(Some(Duration::from_secs(20)))?;
    stream.write_all(&[upload.to_be_bytes(), download.to_be_bytes()].concat())?;
    std::io::copy(&mut std::io::repeat(3).take(upload), &mut stream)?;
    let mut seen = [0u8; 64];
    stream.read_exact(&mut seen)?;
    let received = std::io::copy(&mut (&stream).take(download), &mut std::io::sink())?;
    assert_eq!(received, download);
    Ok(address_in(&seen))
}

/// Sends a datagram of `length` bytes until one is answered whole; whom the server saw, and how many were sent.
pub fn ask(to: SocketAddr, length: usize) -> (IpAddr, usize) {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).unwrap();
    socket.connect(to).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut buffer = vec![0u8; 65_536];
    for sent in 1..=8 {
        // Too big for the path, as the last answer told: the kernel says so once.
        if socket.send(&vec![5; length]).is_err() {
            continue;
        }
        if let Ok(n) = socket.recv(&mut buffer) {
            assert_eq!(n, length.max(64));
            return (address_in(&buffer), sent);
        }
    }
    panic!("no answer from {to} to {length} bytes");
}
