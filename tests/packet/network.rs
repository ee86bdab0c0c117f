//! Real clients outside, real servers in pods, real kernels between them (see tests/laboratory/packets/network.rs).

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use crate::laboratory::packets::Node;
use crate::laboratory::packets::frame::udp;
use crate::laboratory::packets::network::{
    BARRED, CLIENT, NODE, Network, OVERLAY, POD_HERE, POD_PORT, POD_THERE, VIP, WILDCARD, ask, publish, transfer,
};
use kubelane::bpf::ThroughStack;
use kubelane::model::Protocol;

const HERE: u16 = 30081;
const THERE: u16 = 30082;
const NOWHERE: u16 = 30083;

/// The near node's datapath, and each port on each kind of address.
fn near_node(cluster: &Network, clsact: bool) -> Node {
    let mut node = cluster.open_near(clsact);
    for family in 0..2 {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            publish(&mut node, HERE, protocol, POD_HERE[family], POD_PORT);
            publish(&mut node, THERE, protocol, POD_THERE[family], POD_PORT);
            node.frontend(WILDCARD[family], NOWHERE, protocol, &[]);
        }
    }
    node
}

fn services(port: u16) -> impl Iterator<Item = (usize, SocketAddr)> {
    [NODE, VIP].into_iter().flat_map(move |addresses| {
        addresses.into_iter().enumerate().map(move |(family, a)| (family, SocketAddr::new(a.parse().unwrap(), port)))
    })
}

#[test]
fn large_transfers_pass_both_ways_to_local_and_remote_pods_and_local_ones_see_the_client() {
    for clsact in [false, true] {
        let cluster = Network::new();
        cluster.serve();
        let mut node = near_node(&cluster, clsact);
        cluster.inside("client", || {
            for (port, seen) in [(HERE, CLIENT), (THERE, OVERLAY)] {
                for (family, to) in services(port) {
                    let started = Instant::now();
                    let peer = transfer(to, 20 << 20, 20 << 20).unwrap_or_else(|e| panic!("{to}: {e}"));
                    assert_eq!(peer.to_string(), seen[family], "{to}");
                    assert!(started.elapsed() < Duration::from_secs(30), "{to}: {:?}", started.elapsed());
                }
            }
        });
        let counters = node.counters();
        assert!(counters["icmp_too_big"] >= 1, "path-MTU discovery was needed: {counters:?}");
        assert_eq!(counters["flow_established"], 8, "{counters:?}");
    }
}

#[test]
fn transfers_and_datagrams_pass_through_the_hosts_stack_where_that_is_asked_for() {
    let cluster = Network::new();
    cluster.serve();
    let mut node = near_node(&cluster, false);
    node.datapath.route_epoch().unwrap().set_through_stack(ThroughStack::All).unwrap();
    cluster.inside("client", || {
        for (family, to) in services(THERE) {
            let peer = transfer(to, 5 << 20, 5 << 20).unwrap_or_else(|e| panic!("{to}: {e}"));
            assert_eq!(peer.to_string(), OVERLAY[family], "{to}");
            for length in [1, 1400, 3000, 20_000] {
                let (peer, sent) = ask(to, length);
                assert_eq!(peer.to_string(), OVERLAY[family], "{to}");
                assert!(sent <= 4, "{to}: {length} bytes took {sent} datagrams");
            }
        }
    });
    let counters = node.counters();
    assert!(counters["handed_to_stack"] > 1000, "{counters:?}");
    // What the host's policy forbids does not pass: it sees the client's address.
    let forbidden = |to: SocketAddr| {
        cluster.inside("client", || {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            socket.bind(&SocketAddr::new(BARRED.parse().unwrap(), 0).into()).unwrap();
            socket.connect_timeout(&to.into(), Duration::from_millis(700)).is_err()
        })
    };
    let to = SocketAddr::new(NODE[0].parse().unwrap(), THERE);
    assert!(forbidden(to), "through the stack");
    node.datapath.route_epoch().unwrap().set_through_stack(ThroughStack::None).unwrap();
    assert!(!forbidden(to), "sent on from here");
}

#[test]
fn datagrams_larger_than_any_mtu_arrive_whole_both_ways() {
    let cluster = Network::new();
    cluster.serve();
    let _node = near_node(&cluster, false);
    cluster.inside("client", || {
        for (port, seen) in [(HERE, CLIENT), (THERE, OVERLAY)] {
            for (family, to) in services(port) {
                for length in [1, 1400, 1472, 3000, 20_000] {
                    let (peer, sent) = ask(to, length);
                    assert_eq!(peer.to_string(), seen[family], "{to}");
                    assert!(sent <= 4, "{to}: {length} bytes took {sent} datagrams");
                }
            }
        }
    });
}

#[test]
fn refused_is_at_once_and_a_policy_on_the_node_still_knows_the_client() {
    let cluster = Network::new();
    cluster.serve();
    let _node = near_node(&cluster, false);
    cluster.inside("client", || {
        for node in NODE {
            let to = SocketAddr::new(node.parse().unwrap(), NOWHERE);
            let started = Instant::now();
            let socket = std::net::UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
            socket.connect(to).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            socket.send(b"anybody?").unwrap();
            assert_eq!(socket.recv(&mut [0; 10]).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{node}");
            assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
            // On one machine the answer comes while connect() still holds the socket, and counts for the second SYN.
            let error = transfer(to, 0, 0).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{node}: {error}");
            assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
        }
        let to = SocketAddr::new(NODE[0].parse().unwrap(), HERE);
        let socket = std::net::UdpSocket::bind((BARRED, 0)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        socket.send_to(b"let me in", to).unwrap();
        assert!(socket.recv(&mut [0; 100]).is_err(), "the node's rule bars this client's address");
        assert_eq!(ask(to, 9).0.to_string(), CLIENT[0]);
    });
}

#[test]
fn thousands_of_short_connections_from_one_client_never_stall() {
    let cluster = Network::new();
    cluster.serve();
    let mut node = near_node(&cluster, false);
    cluster.inside("client", || {
        for (_, to) in services(THERE).take(2) {
            for n in 0..2500 {
                let started = Instant::now();
                transfer(to, 1, 1).unwrap_or_else(|e| panic!("{to}, connection {n}: {e}"));
                assert!(
                    started.elapsed() < Duration::from_millis(900),
                    "{to}, connection {n}: {:?}",
                    started.elapsed()
                );
            }
        }
    });
    let counters = node.counters();
    assert_eq!(counters["flow_remote"], 5000, "{counters:?}");
    assert_eq!(counters["dropped_snat_exhausted"], 0);
}

/// A packet socket in the namespace of the calling thread, which is told of tags that the kernel keeps beside frames.
fn packet_socket() -> socket2::Socket {
    let all = socket2::Protocol::from(i32::from((libc::ETH_P_ALL as u16).to_be()));
    let socket = socket2::Socket::new(socket2::Domain::PACKET, socket2::Type::RAW, Some(all)).unwrap();
    let one = 1i32;
    let (value, length) = ((&raw const one).cast(), size_of::<i32>() as libc::socklen_t);
    // SAFETY: `value` is an i32 that outlives the call.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, libc::PACKET_AUXDATA, value, length) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket
}

/// The next frame, and whether it has a VLAN tag beside it.
fn next_frame(socket: &socket2::Socket) -> (Vec<u8>, bool) {
    let mut bytes = vec![0u8; 2048];
    let mut control = [0u64; 16];
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: all zero is an empty msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
    (message.msg_control, message.msg_controllen) = (control.as_mut_ptr().cast(), size_of_val(&control) as _);
    // SAFETY: `message` names buffers that outlive the call, and their lengths.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) };
    assert!(length > 0, "{}", std::io::Error::last_os_error());
    bytes.truncate(length as usize);
    // SAFETY: the kernel has filled the control buffer; PACKET_AUXDATA's value is a tpacket_auxdata.
    let status = unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        assert!(!header.is_null() && (*header).cmsg_type == libc::PACKET_AUXDATA);
        std::ptr::read_unaligned(libc::CMSG_DATA(header).cast::<libc::tpacket_auxdata>()).tp_status
    };
    (bytes, status & libc::TP_STATUS_VLAN_VALID != 0)
}

#[test]
fn a_priority_tag_ends_at_the_node() {
    let cluster = Network::new();
    cluster.serve();
    let mut node = near_node(&cluster, false);
    let mac = |space: &str| -> [u8; 6] {
        let addresses = cluster.inside(space, || nix::ifaddrs::getifaddrs().unwrap().collect::<Vec<_>>());
        let mut of_eth0 = addresses.iter().filter(|address| address.interface_name == "eth0");
        of_eth0.find_map(|address| address.address.as_ref()?.as_link_addr()?.addr()).unwrap()
    };
    let plain = udp((CLIENT[0], 5000), (NODE[0], THERE), b"which tag?").bytes();
    // Priority 5 of VLAN 0 (IEEE 802.1Q).
    let tagged = [&mac("near")[..], &mac("client"), &[0x81, 0x00, 0xa0, 0x00], &plain[12..]].concat();
    let arrives = cluster.inside("far", packet_socket);
    let sends = cluster.inside("client", packet_socket);
    let index = cluster.inside("client", || nix::net::if_::if_nametoindex("eth0").unwrap());
    // SAFETY: all zero is a sockaddr_ll.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    (to.sll_family, to.sll_ifindex, to.sll_halen) = (libc::AF_PACKET as u16, index as i32, 6);
    let (bytes, address, length) = (tagged.as_ptr().cast(), (&raw const to).cast(), size_of_val(&to) as u32);
    // SAFETY: `tagged` and `to` outlive the call.
    let sent = unsafe { libc::sendto(sends.as_raw_fd(), bytes, tagged.len(), 0, address, length) };
    assert_eq!(sent, tagged.len() as isize, "{}", std::io::Error::last_os_error());
    let pod: std::net::Ipv4Addr = POD_THERE[0].parse().unwrap();
    let (frame, has_tag) = loop {
        let (frame, has_tag) = next_frame(&arrives);
        // In the overlay; around it is a packet to the far node. A tag would stand before the type.
        if frame.ends_with(b"which tag?") && frame.windows(4).any(|ip| ip == pod.octets()) && frame.len() < 80 {
            break (frame, has_tag);
        }
    };
    assert_eq!((&frame[12..14], has_tag), (&[0x08, 0x00][..], false), "{frame:02x?}");
    assert_eq!(node.counters()["flow_remote"], 1);
}
