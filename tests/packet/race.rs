//! Two processors at once on the same flows, with real sockets: threads on a processor each share a UDP socket whose flow
//! does not exist yet, or open connections from ports that others have just closed, while backends come and go and ended
//! flows are collected. No flow may move, no datagram be lost, no connection fail, and no row be left at the end.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::laboratory::packets::Node;
use crate::laboratory::packets::network::{CLIENT, NODE, Network, POD_HERE, POD_PORT, POD_THERE, WILDCARD};
use kubelane::model::Protocol;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use socket2::{Domain, Socket, Type};

/// Of each of the two parts. `KUBELANE_SECONDS` says otherwise.
const SECONDS: u64 = 45;
const PORT: u16 = 30081;
/// Datagrams that each thread sends at once to a flow that is not there yet.
const AT_ONCE: usize = 3;

fn seconds() -> Duration {
    let seconds = std::env::var("KUBELANE_SECONDS").map_or(SECONDS, |text| text.parse().expect("a number"));
    Duration::from_secs(seconds)
}

fn stay_on(processor: usize) {
    let mut set = CpuSet::new();
    set.set(processor).unwrap();
    sched_setaffinity(Pid::from_raw(0), &set).unwrap();
}

/// A pod here and one elsewhere are behind one port of the near node, in both families.
fn near_node(cluster: &Network, protocol: Protocol) -> Node {
    let mut node = cluster.open_near(false);
    for family in 0..2 {
        let ids = [(POD_HERE[family], true), (POD_THERE[family], false)].map(|(pod, local)| {
            let id = node.next_backend();
            node.backend(id, pod, POD_PORT, protocol, local);
            id
        });
        node.frontend(WILDCARD[family], PORT, protocol, &ids);
    }
    node
}

fn service(family: usize) -> SocketAddr {
    SocketAddr::new(NODE[family].parse().unwrap(), PORT)
}

/// Everything that flows have is gone once they are over.
fn assert_nothing_is_left(node: &Node) {
    node.age_flows(2 * 86_400);
    let mut collector = node.datapath.flow_collector().unwrap();
    for _ in 0..3 {
        collector.collect(usize::MAX / 4).unwrap();
    }
    assert_eq!(node.flows(), []);
    for class in [0u32, 1] {
        use libbpf_rs::{MapCore, MapFlags};
        let count = node.pinned("flow_counts").lookup(&class.to_ne_bytes(), MapFlags::ANY).unwrap().unwrap();
        assert_eq!(count, [0; 8], "proved flows of class {class}");
    }
}

/// Sends from two threads at once over one socket; which backends answered, and how many answers came.
fn ask_at_once(socket: &UdpSocket, start: &Barrier, tag: u8) -> (BTreeMap<IpAddr, usize>, usize) {
    start.wait();
    for n in 0..AT_ONCE {
        socket.send(&[tag, n as u8]).unwrap();
    }
    let mut seen = BTreeMap::new();
    let mut answers = 0;
    let mut buffer = [0u8; 256];
    while answers < AT_ONCE {
        match socket.recv(&mut buffer) {
            Ok(_) => {
                let text = String::from_utf8_lossy(&buffer[..64]);
                let client: SocketAddr = text.trim().parse().unwrap();
                *seen.entry(client.ip()).or_default() += 1;
                answers += 1;
            }
            Err(error) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()) => break,
            Err(error) => panic!("{error}"),
        }
    }
    (seen, answers)
}

/// A new socket asks from both processors at once, from `port` (0: any): how many backends answered, and how many answers
/// never came.
fn ask_on_both(family: usize, port: u16) -> (usize, usize) {
    let socket = UdpSocket::bind(SocketAddr::new(CLIENT[family].parse().unwrap(), port)).unwrap();
    socket.connect(service(family)).unwrap();
    // A guest may stand still for a second: late is not lost.
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let start = Barrier::new(2);
    let (socket, start) = (&socket, &start);
    // Both threads read what comes: together they must have all.
    let found = thread::scope(|scope| {
        let threads = [0usize, 1].map(|n| {
            scope.spawn(move || {
                stay_on(n);
                ask_at_once(socket, start, n as u8)
            })
        });
        threads.map(|thread| thread.join().unwrap())
    });
    let answers: usize = found.iter().map(|(_, answers)| answers).sum();
    let backends: BTreeSet<IpAddr> = found.iter().flat_map(|(seen, _)| seen.keys().copied()).collect();
    (backends.len(), 2 * AT_ONCE - answers)
}

#[test]
fn datagrams_of_one_socket_on_two_processors_go_one_way_and_all_are_answered() {
    let cluster = Network::new();
    cluster.serve();
    let mut node = near_node(&cluster, Protocol::Udp);
    let mut collector = node.datapath.flow_collector().unwrap();
    let (end, stop) = (Instant::now() + seconds(), AtomicBool::new(false));
    let (flows, moved, lost) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                collector.collect(usize::MAX / 4).unwrap();
            }
        });
        cluster.inside("client", || {
            let mut family = 0;
            while Instant::now() < end {
                family = 1 - family;
                let (backends, missing) = ask_on_both(family, 0);
                flows.fetch_add(1, Ordering::Relaxed);
                moved.fetch_add(u64::from(backends > 1), Ordering::Relaxed);
                lost.fetch_add(missing as u64, Ordering::Relaxed);
            }
        });
        stop.store(true, Ordering::Relaxed);
    });
    let [flows, moved, lost] = [flows, moved, lost].map(AtomicU64::into_inner);
    let found = format!("{flows} flows, {moved} moved, {lost} datagrams lost");
    println!("{found}");
    assert!(flows > 50 && (moved, lost) == (0, 0), "{found}; counted {:?}", node.counters());
    assert_nothing_is_left(&node);
}

/// The flows of these ports have ended by silence, and nobody has collected them: both threads find the same row, and of two
/// that put a flow in its place the second must see that the first was faster, also when the new flow looks like the old.
#[test]
fn a_port_whose_flow_has_ended_is_used_again_on_two_processors_and_all_are_answered() {
    const PORTS: std::ops::Range<u16> = 21_000..21_200;
    let cluster = Network::new();
    cluster.serve();
    let mut node = near_node(&cluster, Protocol::Udp);
    let end = Instant::now() + seconds() / 3;
    let (mut asked, mut moved, mut lost) = (0, 0, 0);
    while Instant::now() < end {
        cluster.inside("client", || {
            for (port, family) in PORTS.zip([0, 1].into_iter().cycle()) {
                let (backends, missing) = ask_on_both(family, port);
                asked += 1;
                moved += usize::from(backends > 1);
                lost += missing;
            }
        });
        // Longer than flows of UDP that are not proved may be silent, and those that are.
        node.let_flows_rest(200);
    }
    let found = format!("{asked} times, {moved} moved, {lost} datagrams lost");
    println!("{found}");
    assert!(asked > 300 && (moved, lost) == (0, 0), "{found}; counted {:?}", node.counters());
    assert_nothing_is_left(&node);
}

/// Opens a connection from this port, says something, is answered, and closes first or last; what went wrong.
fn connect_from(from: SocketAddr, to: SocketAddr, closes_first: bool) -> std::io::Result<()> {
    let socket = Socket::new(Domain::for_address(from), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&from.into())?;
    socket.connect_timeout(&to.into(), Duration::from_secs(5))?;
    let mut stream: TcpStream = socket.into();
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let download = 500u64;
    stream.write_all(&[7u64.to_be_bytes(), download.to_be_bytes()].concat())?;
    stream.write_all(&[3; 7])?;
    let mut answer = vec![0u8; 64 + download as usize];
    stream.read_exact(&mut answer)?;
    if closes_first {
        // At once, and so that the port is free again.
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    } else if stream.read(&mut answer)? != 0 {
        return Err(std::io::Error::other("more than was asked for"));
    }
    Ok(())
}

#[test]
fn connections_from_ports_that_are_used_again_on_two_processors_all_succeed() {
    let cluster = Network::new();
    cluster.serve();
    let node = near_node(&cluster, Protocol::Tcp);
    let mut collector = node.datapath.flow_collector().unwrap();
    let (end, stop) = (Instant::now() + seconds(), AtomicBool::new(false));
    let failures = std::sync::Mutex::new(Vec::new());
    let connections = AtomicU64::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                collector.collect(usize::MAX / 4).unwrap();
            }
        });
        cluster.inside("client", || {
            thread::scope(|scope| {
                for worker in 0..4u16 {
                    let (connections, failures) = (&connections, &failures);
                    scope.spawn(move || {
                        stay_on(usize::from(worker % 2));
                        // Few ports, each of one worker's: resets free them at once. Families take turns.
                        for n in 0u16.. {
                            if Instant::now() >= end {
                                break;
                            }
                            let family = usize::from(n % 2);
                            // Below those that the kernel gives to sockets which ask for none.
                            let port = 20_000 + worker * 100 + n % 20;
                            let from = SocketAddr::new(CLIENT[family].parse().unwrap(), port);
                            if let Err(error) = connect_from(from, service(family), true) {
                                failures.lock().unwrap().push(format!("{from}: {error}"));
                            }
                            connections.fetch_add(1, Ordering::Relaxed);
                            // The backend closes first: then the client's port is new, the one towards it perhaps not.
                            let from = SocketAddr::new(from.ip(), 0);
                            if let Err(error) = connect_from(from, service(family), false) {
                                failures.lock().unwrap().push(format!("{from}: {error}"));
                            }
                            connections.fetch_add(1, Ordering::Relaxed);
                        }
                    });
                }
            });
        });
        stop.store(true, Ordering::Relaxed);
    });
    let (connections, failures) = (connections.into_inner(), failures.into_inner().unwrap());
    println!("{connections} connections, {} failed", failures.len());
    assert!(
        failures.is_empty(),
        "of {connections} connections {} failed: {:?}",
        failures.len(),
        &failures[..failures.len().min(5)]
    );
    assert!(connections > 500, "{connections}");
    assert_nothing_is_left(&node);
}
