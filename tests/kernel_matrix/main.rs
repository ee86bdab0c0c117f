//! What must hold on every kernel from 5.10 on: the programs load, and real sockets get what ARCHITECTURE.md says.
//! `make test` runs this on the machine's own kernel, `make test-vm` on Debian's.

#[path = "../laboratory/mod.rs"]
mod laboratory;

mod lifecycle;
mod node;
mod node_port;
mod pods;

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use kubelane::abi::pool_empty;
use kubelane::bpf::verifier::VerifiedProgram;
use kubelane::bpf::{Listening, Search, Wanted, probe, verifier};
use kubelane::model::{Family, Ipx, Protocol};
use laboratory::figures::{Figures, Found, Table, release_line};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use node::{NODE_ADDRESSES, Node, Options, PODS, can_run, in_new_namespace, on_a_node, on_a_thread};
use pods::{ask_tcp, ask_udp, ask_udp_at, connect_tcp, udp_socket};

/// How an application may write a service's address, and the family of the pods behind it.
const SERVICES: [(&str, usize); 3] = [("10.96.0.1", 0), ("fd00:96::1", 1), ("::ffff:10.96.0.2", 0)];

/// What every kernel has to take.
const PROGRAMS: [&str; 12] = [
    "connect4",
    "connect6",
    "sendmsg4",
    "sendmsg6",
    "recvmsg4",
    "recvmsg6",
    "getpeername4",
    "getpeername6",
    "wire_in_ethernet",
    "wire_in_bare",
    "wire_out_ethernet",
    "wire_out_bare",
];

fn pods(family: usize, port: u16) -> Vec<SocketAddr> {
    PODS[family].iter().map(|ip| pods::start(SocketAddr::new(ip.parse().unwrap(), port))).collect()
}

/// Starts two pods for each row of [`SERVICES`], and a TCP and a UDP service before them.
fn serve_all(node: &mut Node, options: Options) -> Vec<(SocketAddr, Vec<SocketAddr>, [node::Service; 2])> {
    let mut all = Vec::new();
    for (row, (service, family)) in SERVICES.iter().enumerate() {
        let pods = pods(*family, 8080 + row as u16);
        let to = SocketAddr::new(service.parse().unwrap(), 80);
        let services =
            [Protocol::Tcp, Protocol::Udp].map(|protocol| node.serve(to.ip(), to.port(), protocol, &pods, options));
        all.push((to, pods, services));
    }
    all
}

fn feature(name: &str) -> bool {
    probe::features().iter().find(|f| f.name == name).unwrap_or_else(|| panic!("no feature {name}")).found
}

/// What a refused system call fails with.
fn refused() -> i32 {
    if probe::has_set_retval() { libc::ECONNREFUSED } else { libc::EPERM }
}

#[test]
fn every_program_passes_this_kernels_verifier() {
    if !can_run() {
        return;
    }
    let programs = verifier::verify_all().unwrap();
    let names: HashSet<&str> = programs.iter().map(|p| p.name.as_str()).collect();
    for expected in PROGRAMS {
        assert!(names.contains(expected), "{expected} is missing: {names:?}");
    }
    for program in &programs {
        println!("matrix: program {} {} {}", program.name, program.instructions, program.stack());
    }
    for program in &programs {
        // The limit is a million; a program that comes near it will be refused by some kernel.
        assert!((1..100_000).contains(&program.instructions), "{program:?}");
    }
    assert_no_growth(&programs);
}

/// No program asks a tenth more of the verifier than benches/FIGURES.md says of this kernel.
fn assert_no_growth(programs: &[VerifiedProgram]) {
    let kernel = release_line(&release());
    let figures = Figures::read().unwrap();
    if !figures.knows(Table::Instructions, &kernel) {
        laboratory::skip(&format!("benches/FIGURES.md says nothing of Linux {kernel}, so that nothing is compared"));
        return;
    }
    let found = |p: &VerifiedProgram| Found { name: p.name.clone(), value: f64::from(p.instructions), ns: None };
    let found: Vec<Found> = programs.iter().map(found).collect();
    let mut differences = figures.compare(Table::Instructions, &kernel, &found, 0.0);
    differences.retain(|difference| difference.fails());
    let text: Vec<String> = differences.iter().map(ToString::to_string).collect();
    assert!(
        text.is_empty(),
        "more than a tenth more instructions to verify on Linux {kernel}, or not on file:\n{}\n\
         record it with a reason: make bench-packets ARGS=\"--record --why '...'\" (after make test-vm: --guests, too)",
        text.join("\n")
    );
}

fn release() -> String {
    nix::sys::utsname::uname().unwrap().release().to_string_lossy().into_owned()
}

#[test]
fn the_probes_find_what_kernels_of_this_version_have() {
    if !can_run() {
        return;
    }
    let release = release();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    for feature in probe::features() {
        println!("matrix: feature {} {}", if feature.found { "yes" } else { "no" }, feature.name);
        assert!(feature.found || !feature.required, "{}: {}", feature.name, feature.without);
    }
    for (name, since) in [
        ("MTUs of routes in bpf_fib_lookup", (5, 12)),
        ("SO_NETNS_COOKIE", (5, 14)),
        ("bpf_set_retval", (5, 18)),
        ("tcx links", (6, 6)),
    ] {
        assert_eq!(feature(name), version >= since, "{name} on {release}");
    }
    // These also come to older kernels with their distributors' updates.
    for (name, since) in [("sources of routes in bpf_fib_lookup", (6, 7)), ("marks in bpf_fib_lookup", (6, 10))] {
        assert!(feature(name) || version < since, "{name} on {release}");
    }
}

#[test]
fn who_listens_is_told_of_each_connection_with_its_destination_backend_and_process() {
    on_a_node(|node| {
        let all = serve_all(node, Options::default());
        let wanted = Wanted { numbers: u64::MAX, protocol: 0, from: None, to: None, port: 0, one_in: 1, rate: 0 };
        let mut listening = Listening::open(node.pin_path(), wanted).unwrap();
        for (to, pods, _) in &all {
            drop(connect_tcp(*to).unwrap());
            let events = listening.read(1000).unwrap();
            let [event] = events[..] else { panic!("{to}: {events:#?}") };
            let end = |ip: [u8; 16], port: [u8; 2]| SocketAddr::new(Ipx(ip).to_ip(), u16::from_be_bytes(port));
            let asked = end(event.asked.destination, event.asked.destination_port_be);
            assert_eq!(asked, SocketAddr::new(to.ip().to_canonical(), to.port()), "{event:#?}");
            let backend = end(event.becomes.destination, event.becomes.destination_port_be);
            assert!(pods.contains(&backend) && event.has_backend == 1, "{to}: {event:#?}");
            assert_eq!((event.process, event.protocol), (std::process::id(), Protocol::Tcp as u8), "{event:#?}");
        }
    });
}

#[test]
fn a_tcp_connection_to_a_service_reaches_every_backend_and_its_peer_is_the_service() {
    on_a_node(|node| {
        for (to, pods, _) in serve_all(node, Options::default()) {
            let mut seen = HashSet::new();
            // The chance to miss one of two is 2^-39.
            for _ in 0..40 {
                let mut stream = connect_tcp(to).unwrap_or_else(|e| panic!("connect to {to}: {e}"));
                assert_eq!(stream.peer_addr().unwrap(), to);
                seen.insert(ask_tcp(&mut stream).unwrap());
            }
            assert_eq!(seen, HashSet::from_iter(pods), "{to}");
        }
    });
}

#[test]
fn a_connected_udp_socket_talks_to_one_backend_and_its_peer_and_the_replies_are_the_services() {
    on_a_node(|node| {
        for (to, pods, _) in serve_all(node, Options::default()) {
            let mut seen = HashSet::new();
            for _ in 0..40 {
                let socket = udp_socket(to.ip());
                socket.connect(to).unwrap_or_else(|e| panic!("connect to {to}: {e}"));
                assert_eq!(socket.peer_addr().unwrap(), to);
                let pod = ask_udp(&socket).unwrap();
                socket.send(b"?").unwrap();
                let mut answer = [0; 64];
                let (length, from) = socket.recv_from(&mut answer).unwrap();
                assert_eq!((from, &answer[..length]), (to, pod.to_string().as_bytes()));
                seen.insert(pod);
            }
            assert_eq!(seen, HashSet::from_iter(pods), "{to}");
        }
    });
}

#[test]
fn an_unconnected_udp_socket_keeps_its_backend_and_sees_replies_from_the_service() {
    on_a_node(|node| {
        for (to, pods, _) in serve_all(node, Options::default()) {
            let mut seen = HashSet::new();
            for _ in 0..40 {
                let socket = udp_socket(to.ip());
                let first = ask_udp_at(&socket, to).unwrap_or_else(|e| panic!("{to}: {e}"));
                assert_eq!(first.1, to, "where the reply comes from");
                for _ in 0..5 {
                    assert_eq!(ask_udp_at(&socket, to).unwrap(), first);
                }
                seen.insert(first.0);
            }
            assert_eq!(seen, HashSet::from_iter(pods), "{to}");
        }
    });
}

#[test]
fn an_unconnected_udp_socket_may_talk_to_more_services_than_its_storage_holds() {
    on_a_node(|node| {
        for (service, family) in SERVICES {
            let ip: IpAddr = service.parse().unwrap();
            for port in 1..=12 {
                let pods = pods(family, port + if ip.is_ipv4() { 9000 } else { 9100 });
                node.serve(ip, port, Protocol::Udp, &pods, Options::default());
            }
            let socket = udp_socket(ip);
            let ask = |port| ask_udp_at(&socket, SocketAddr::new(ip, port)).unwrap();
            let first: Vec<_> = (1..=12).map(ask).collect();
            assert!((1..=12).zip(&first).all(|(port, (_, from))| *from == SocketAddr::new(ip, port)), "{first:?}");
            assert_eq!((1..=12).map(ask).collect::<Vec<_>>(), first);
        }
    });
}

#[test]
fn services_that_share_a_backend_are_told_apart_by_the_one_sent_to_last() {
    on_a_node(|node| {
        for (service, family) in SERVICES {
            let ip: IpAddr = service.parse().unwrap();
            let pods = pods(family, if ip.is_ipv4() { 9000 } else { 9100 });
            for port in 1..=12 {
                node.serve(ip, port, Protocol::Udp, &pods[..1], Options::default());
            }
            let socket = udp_socket(ip);
            for port in (1..=12).chain([12, 3, 9, 3, 11, 8, 10]) {
                let to = SocketAddr::new(ip, port);
                assert_eq!(ask_udp_at(&socket, to).unwrap(), (pods[0], to));
            }
        }
    });
}

#[test]
fn a_service_without_endpoints_and_an_unknown_port_are_refused_at_once() {
    on_a_node(|node| {
        for (service, _) in SERVICES {
            let ip: IpAddr = service.parse().unwrap();
            node.serve(ip, 80, Protocol::Tcp, &[], Options::default());
            node.serve(ip, 80, Protocol::Udp, &[], Options::default());
            for port in [80, 81] {
                assert_fails(SocketAddr::new(ip, port), refused(), refused());
            }
        }
    });
}

#[test]
fn a_service_with_policy_local_and_no_local_endpoint_is_dropped_and_not_refused() {
    on_a_node(|node| {
        for (service, _) in SERVICES {
            let to = SocketAddr::new(service.parse().unwrap(), 80);
            let options = Options { on_empty: pool_empty::EMPTY_DROP, ..Options::default() };
            node.serve(to.ip(), 80, Protocol::Tcp, &[], options);
            node.serve(to.ip(), 80, Protocol::Udp, &[], options);
            let dropped = if probe::has_set_retval() { libc::ETIMEDOUT } else { libc::EPERM };
            assert_fails(to, dropped, libc::EPERM);
        }
    });
}

/// TCP connect, UDP connect and UDP send all fail, with these errors.
fn assert_fails(to: SocketAddr, tcp: i32, udp: i32) {
    assert_eq!(connect_tcp(to).unwrap_err().raw_os_error(), Some(tcp), "TCP connect to {to}");
    let socket = udp_socket(to.ip());
    assert_eq!(socket.send_to(b"?", to).unwrap_err().raw_os_error(), Some(udp), "UDP send to {to}");
    // Before 5.14 the node is told by being the machine's first namespace, which this is not: a pod's socket that finds no
    // endpoint is left to its packets, and there is no route here for these.
    let connect = socket.connect(to).unwrap_err().raw_os_error();
    let is_left_to_packets = !feature("SO_NETNS_COOKIE") && connect == Some(libc::ENETUNREACH);
    assert!(is_left_to_packets || connect == Some(udp), "UDP connect to {to}: {connect:?}");
}

#[test]
fn a_node_port_is_served_on_the_nodes_addresses_to_every_namespace() {
    on_a_node(|node| {
        for (family, address) in NODE_ADDRESSES.iter().enumerate() {
            let to = SocketAddr::new(address.parse().unwrap(), 30080);
            let pods = pods(family, 8080);
            serve_node_port(node, to.port(), &pods);
            node.add_node_address(to.ip());
            assert!(pods.contains(&ask_tcp(&mut connect_tcp(to).unwrap()).unwrap()), "{to}");
            in_new_namespace(|| {
                let here = self::pods(family, 8080);
                assert!(here.contains(&ask_tcp(&mut connect_tcp(to).unwrap()).unwrap()), "{to}");
            });
        }
    });
}

fn serve_node_port(node: &mut Node, port: u16, pods: &[SocketAddr]) {
    let any = if pods[0].is_ipv4() { Family::Ipv4 } else { Family::Ipv6 };
    let options = Options { node_port: true, ..Options::default() };
    node.serve(Ipx::any(any).to_ip(), port, Protocol::Tcp, pods, options);
    node.serve(Ipx::any(any).to_ip(), port, Protocol::Udp, pods, options);
}

/// The daemon's own namespace where it can ask for its cookie (5.14), else the machine's first.
#[test]
fn a_node_port_on_loopback_is_served_in_the_nodes_own_namespace_only() {
    on_a_node(|node| {
        let loopback: [IpAddr; 3] =
            [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into(), Ipv4Addr::LOCALHOST.to_ipv6_mapped().into()];
        for family in [loopback[0], loopback[1]] {
            serve_node_port(node, 30080, &[SocketAddr::new(family, 18080)]);
        }
        let asks_cookie = feature("SO_NETNS_COOKIE");
        let is_served = |served: bool| {
            let pods = [loopback[0], loopback[1]].map(|ip| pods::start(SocketAddr::new(ip, 18080)));
            let others = [loopback[0], loopback[1]].map(|ip| pods::start(SocketAddr::new(ip, 30080)));
            let expected = if served { pods } else { others };
            for (i, ip) in loopback.iter().enumerate() {
                let to = SocketAddr::new(*ip, 30080);
                let mut stream = connect_tcp(to).unwrap();
                assert_eq!(stream.peer_addr().unwrap(), to);
                assert_eq!(ask_tcp(&mut stream).unwrap(), expected[i % 2], "{to}");
                assert_eq!(ask_udp_at(&udp_socket(*ip), to).unwrap(), (expected[i % 2], to));
            }
        };
        is_served(asks_cookie);
        in_new_namespace(|| is_served(false));
        if !asks_cookie {
            on_a_thread(|| {
                let first = std::fs::File::open("/proc/1/ns/net").unwrap();
                setns(first, CloneFlags::CLONE_NEWNET).unwrap();
                is_served(true);
            });
        }
    });
}

#[test]
fn session_affinity_keeps_a_namespaces_backend_until_it_is_gone() {
    on_a_node(|node| {
        let options = Options { affinity_seconds: 600, ..Options::default() };
        for (to, pods, [mut tcp, udp]) in serve_all(node, options) {
            let ask = || ask_tcp(&mut connect_tcp(to).unwrap()).unwrap();
            let first = ask();
            assert!((0..20).all(|_| ask() == first), "{to}");
            let by_udp = ask_udp_at(&udp_socket(to.ip()), to).unwrap().0;
            assert!((0..20).all(|_| ask_udp_at(&udp_socket(to.ip()), to).unwrap().0 == by_udp), "{to}");
            drop(udp);

            let other = *pods.iter().find(|p| **p != first).unwrap();
            node.set_pods(&mut tcp, &[other]);
            assert!((0..5).all(|_| ask() == other), "{to}");
        }
    });
}

#[test]
fn an_unconnected_udp_socket_whose_backend_is_gone_goes_to_a_living_one() {
    on_a_node(|node| {
        for (to, pods, [_, mut udp]) in serve_all(node, Options::default()) {
            let socket = udp_socket(to.ip());
            let (first, _) = ask_udp_at(&socket, to).unwrap();
            let other = *pods.iter().find(|p| **p != first).unwrap();
            node.set_pods(&mut udp, &[other]);
            assert_eq!(ask_udp_at(&socket, to).unwrap(), (other, to));
            node.set_pods(&mut udp, &[]);
            assert_eq!(socket.send_to(b"?", to).unwrap_err().raw_os_error(), Some(refused()), "{to}");
        }
    });
}

const BOTH: Search = Search { with_tcp: true, unserved: false };

#[test]
fn a_connected_socket_whose_backend_is_gone_is_connected_anew_and_a_stream_ended_where_the_kernel_can() {
    on_a_node(|node| {
        let Some(search) = node.datapath().stale_sockets() else {
            assert_eq!(probe::socket_search(), probe::SocketSearch::None);
            return;
        };
        let can_destroy = feature("destroying sockets through sock_diag");
        for (to, pods, [mut tcp, mut udp]) in serve_all(node, Options::default()) {
            let socket = udp_socket(to.ip());
            socket.connect(to).unwrap();
            let first = ask_udp(&socket).unwrap();
            let mut stream = connect_tcp(to).unwrap();
            ask_tcp(&mut stream).unwrap();
            assert_eq!(search.settle(BOTH).unwrap().found, 0, "{to}: every backend lives");

            let other = *pods.iter().find(|p| **p != first).unwrap();
            node.set_pods(&mut udp, &[other]);
            node.set_pods(&mut tcp, &[]);
            let pass = search.settle(Search::default()).unwrap();
            assert_eq!((pass.found, pass.unreachable), (1, 0), "{to}: UDP only: {pass:?}");
            ask_tcp(&mut stream).unwrap();
            assert_eq!((pass.reconnected, pass.destroyed), (1, 0), "{to}: {pass:?}");
            assert_eq!(ask_udp(&socket).unwrap(), other, "{to}");
            assert_eq!(socket.peer_addr().unwrap(), to);
            if !can_destroy {
                continue;
            }
            assert_eq!(search.settle(BOTH).unwrap().destroyed, 1, "{to}: TCP as well");
            assert_eq!(ask_tcp(&mut stream).unwrap_err().raw_os_error(), Some(libc::ECONNABORTED), "{to}");
        }
    });
}

#[test]
fn a_stopped_daemon_is_not_missed_and_a_new_one_takes_over_without_a_gap() {
    on_a_node(|node| {
        let all = serve_all(node, Options::default());
        let mut kept = Vec::new();
        for (to, _, _) in &all {
            let (connected, unconnected) = (udp_socket(to.ip()), udp_socket(to.ip()));
            connected.connect(to).unwrap();
            let pods = (ask_udp(&connected).unwrap(), ask_udp_at(&unconnected, *to).unwrap());
            kept.push((*to, connect_tcp(*to).unwrap(), connected, unconnected, pods));
        }
        node.stop();
        for (to, pods, _) in &all {
            assert!(pods.contains(&ask_tcp(&mut connect_tcp(*to).unwrap()).unwrap()), "{to}");
        }
        node.start();
        assert!(node.datapath().adopted());
        for (to, mut stream, connected, unconnected, pods) in kept {
            assert_eq!(stream.peer_addr().unwrap(), to);
            ask_tcp(&mut stream).unwrap();
            assert_eq!(connected.peer_addr().unwrap(), to);
            assert_eq!((ask_udp(&connected).unwrap(), ask_udp_at(&unconnected, to).unwrap()), pods);
            connect_tcp(to).unwrap();
        }
    });
}

/// A kernel built without CONFIG_DEBUG_INFO_BTF, as far as this process can see.
#[test]
fn a_kernel_without_btf_is_served_all_the_same() {
    on_a_node(|node| {
        node.stop();
        on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
            if Path::new("/sys/kernel/btf").exists() {
                mount(Some("none"), "/sys/kernel/btf", Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
            }
            assert!(!probe::has_kernel_btf());
            node.start();
            let programs = verifier::verify_all().unwrap();
            assert!(programs.iter().all(|p| !p.name.starts_with("find_stale")), "{programs:?}");
        });
        assert!(node.datapath().stale_sockets().is_none());
        for (to, pods, _) in serve_all(node, Options::default()) {
            assert!(pods.contains(&ask_tcp(&mut connect_tcp(to).unwrap()).unwrap()), "{to}");
        }
    });
}

#[test]
fn a_socket_outside_the_cgroup_is_left_alone() {
    on_a_node(|node| {
        let (to, _, _) = serve_all(node, Options::default()).remove(0);
        connect_tcp(to).unwrap();
        let error = node.outside_the_cgroup(|| connect_tcp(to).unwrap_err());
        assert_eq!(error.raw_os_error(), Some(libc::ENETUNREACH), "no route leads to a service");
        connect_tcp(to).unwrap();
    });
}
