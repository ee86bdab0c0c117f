//! Load balancers outside ask for a node's health, and for that of a Service with traffic policy Local, while the node's
//! daemon is killed, ended and started again: no probe fails, and none is told for longer than five seconds what is not true
//! any more. `KUBELANE_KILLS=N` says how often the daemon goes (20 times).

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::laboratory::cluster::Cluster;
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::eventually;
use crate::laboratory::manifests::{Endpoint, port, service, slice};

const KILLS: u64 = 20;
const HEALTHZ: u16 = 10256;
const CHECK: u16 = 32_100;
/// A probe that takes longer has failed. Of a connection's segments none may be lost: that costs a second or more.
const LATE: Duration = Duration::from_millis(900);
/// Of each prober, of which there are four.
const PAUSE: Duration = Duration::from_millis(100);
/// For how long the daemon may be away: what is said of [`PROBE_FRESH_MS`](kubelane::abi::probe_limit), less the time since
/// the daemon had last vouched for its answers. It takes a busy machine longer to start a daemon that is built for tests.
const ABSENCE: Duration = Duration::from_millis(4200);
/// How long an answer may be wrong.
const LIE: Duration = Duration::from_secs(5);

/// A Service that a load balancer asks about, and its endpoints.
fn put(cluster: &Cluster, endpoints: &[Endpoint]) {
    let spec = json!({
        "type": "LoadBalancer", "clusterIP": "10.96.0.20", "clusterIPs": ["10.96.0.20"],
        "externalTrafficPolicy": "Local", "healthCheckNodePort": CHECK, "ports": [port("tcp", "TCP", 90)],
    });
    let slice: Value = slice("asked-1", "asked", &[("tcp", "TCP", 9000)], endpoints);
    cluster.manifests.save("asked", &[service("asked", spec), slice]);
}

fn here(cluster: &Cluster) -> Vec<Endpoint> {
    let all = cluster.ready(&["a"]);
    all.into_iter().filter(|endpoint| endpoint.address().is_ipv4()).collect()
}

fn elsewhere(cluster: &Cluster) -> Vec<Endpoint> {
    let all = cluster.ready(&["b"]);
    all.into_iter().filter(|endpoint| endpoint.address().is_ipv4()).collect()
}

fn spawn(cluster: &Cluster) -> Daemon<'_> {
    let node = cluster.lab.node("node1");
    let (cgroup, pins) = (node.cgroup.display().to_string(), node.pin_path.display().to_string());
    let source = format!("dir:{}", cluster.manifests.dir.display());
    let health = format!("0.0.0.0:{HEALTHZ}");
    let words = ["run", "--hostname-override=node1", "--source", &source, "--cgroup", &cgroup, "--pin-path", &pins];
    let words =
        [&words[..], &["--healthz-bind-address", &health, "--metrics-bind-address", "127.0.0.1:10249"]].concat();
    Daemon::spawn_as(&cluster.lab, "node1", &words).unwrap()
}

fn start(cluster: &Cluster) -> Daemon<'_> {
    let began = Instant::now();
    let mut daemon = spawn(cluster);
    daemon.wait_ready(began, PATIENCE, Duration::from_millis(20)).unwrap();
    daemon
}

/// The node's addresses with both ports, as a load balancer asks there.
fn targets(cluster: &Cluster) -> Vec<SocketAddr> {
    let addresses: [IpAddr; 2] = cluster.lab.node("node1").host.addresses();
    addresses.iter().flat_map(|ip| [HEALTHZ, CHECK].map(|port| SocketAddr::new(*ip, port))).collect()
}

/// One probe on a new connection, of this thread's namespace: the status and the whole answer.
fn probe(to: SocketAddr) -> anyhow::Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    write!(stream, "GET /healthz HTTP/1.1\r\nHost: {to}\r\nUser-Agent: probe\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.ok_or_else(|| anyhow::anyhow!("no HTTP answer: {answer:?}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| anyhow::anyhow!("cut short: {answer:?}"))?;
    let length = head.to_lowercase().lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
    anyhow::ensure!(length == Some(body.len()), "body and content-length differ: {answer:?}");
    Ok((status, answer))
}

fn probe_from_outside(cluster: &Cluster, to: SocketAddr) -> anyhow::Result<(u16, String)> {
    cluster.lab.outside(|| probe(to))
}

fn status(cluster: &Cluster, to: SocketAddr) -> Option<u16> {
    probe_from_outside(cluster, to).ok().map(|(status, _)| status)
}

/// What a prober has seen.
#[derive(Debug, Default)]
struct Seen {
    asked: u64,
    slowest: Duration,
    /// When, and what was wrong.
    failures: Vec<(Instant, String)>,
}

/// Asks ten times a second until it is over.
fn ask(to: SocketAddr, is_over: &AtomicBool) -> Seen {
    let (began, mut seen) = (Instant::now(), Seen::default());
    while !is_over.load(Ordering::Relaxed) {
        let asked = Instant::now();
        let answer = probe(to);
        let took = asked.elapsed();
        seen.asked += 1;
        seen.slowest = seen.slowest.max(took);
        match answer {
            Ok((200, _)) if took < LATE => {}
            other => {
                let other = other.map_err(|error| format!("{error:#}"));
                let what = format!("{to} after {:?}, in {took:?}: {other:?}", began.elapsed());
                seen.failures.push((Instant::now(), what));
            }
        }
        thread::sleep(PAUSE.saturating_sub(took));
    }
    seen
}

/// How daemons went, and from when to when there was none that was ready.
#[derive(Debug, Default)]
struct Gone {
    killed: u64,
    terminated: u64,
    killed_at_start: u64,
    absences: Vec<(Instant, Instant)>,
}

/// Lets the daemon go in one way after the other.
fn come_and_go(cluster: &Cluster, times: u64) -> Gone {
    let mut gone = Gone::default();
    let mut daemon = start(cluster);
    for n in 0..times {
        thread::sleep(Duration::from_millis(n * 37 % 400));
        let from = Instant::now();
        match n % 5 {
            3 => {
                gone.terminated += 1;
                assert!(daemon.terminate().unwrap().success());
            }
            4 => {
                gone.killed += 1;
                daemon.kill();
                let next = spawn(cluster);
                thread::sleep(Duration::from_millis(n * 53 % 300));
                next.kill();
                gone.killed_at_start += 1;
            }
            _ => {
                gone.killed += 1;
                daemon.kill();
                thread::sleep(Duration::from_millis(n * 101 % 500));
            }
        }
        daemon = start(cluster);
        gone.absences.push((from, Instant::now()));
    }
    gone
}

#[test]
fn no_probe_fails_while_the_daemon_is_killed_ended_and_started_again() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let times = std::env::var("KUBELANE_KILLS").map_or(KILLS, |text| text.parse().expect("a number"));
    put(&cluster, &here(&cluster));
    let first = start(&cluster);
    let all = targets(&cluster);
    assert!(eventually(PATIENCE, || all.iter().all(|to| status(&cluster, *to) == Some(200))), "{}", first.log());
    drop(first);
    let is_over = AtomicBool::new(false);
    let (seen, gone) = thread::scope(|scope| {
        let probers: Vec<_> =
            all.iter().map(|to| scope.spawn(|| cluster.lab.outside(|| Ok(ask(*to, &is_over))).unwrap())).collect();
        let went = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| come_and_go(&cluster, times)));
        is_over.store(true, Ordering::Relaxed);
        let seen: Vec<Seen> = probers.into_iter().map(|prober| prober.join().unwrap()).collect();
        (seen, went.unwrap_or_else(|error| std::panic::resume_unwind(error)))
    });
    let asked: u64 = seen.iter().map(|seen| seen.asked).sum();
    let slowest = seen.iter().map(|seen| seen.slowest).max().unwrap_or_default();
    let failures: Vec<&(Instant, String)> = seen.iter().flat_map(|seen| &seen.failures).collect();
    let too_long: Vec<_> = gone.absences.iter().filter(|(from, to)| *to - *from > ABSENCE).collect();
    let longest = gone.absences.iter().map(|(from, to)| *to - *from).max().unwrap_or_default();
    println!(
        "{asked} probes, the slowest in {slowest:?}; {} daemons killed, {} ended by SIGTERM, {} killed while they started, \
         none ready for {longest:?} at most, {} times for more than {ABSENCE:?}: {} probes failed",
        gone.killed,
        gone.terminated,
        gone.killed_at_start,
        too_long.len(),
        failures.len()
    );
    let is_excused = |at: &Instant| too_long.iter().any(|(from, to)| (*from + ABSENCE..=*to).contains(at));
    let failures: Vec<&String> = failures.iter().filter(|(at, _)| !is_excused(at)).map(|(_, what)| what).collect();
    assert!(failures.is_empty(), "{failures:#?}");
    assert!(asked > 20 * times, "{asked}");
    assert!(too_long.len() as u64 * 2 < times, "this machine is too slow: {gone:?}");
}

/// Until when all answered as they did, and when none does any more.
fn time_out(cluster: &Cluster, to: SocketAddr, gone: Instant) -> Duration {
    let (mut last, mut refused) = (Duration::ZERO, 0);
    while refused < 20 && gone.elapsed() < 4 * LIE {
        match probe_from_outside(cluster, to) {
            Ok((200, _)) => (last, refused) = (gone.elapsed(), 0),
            _ => refused += 1,
        }
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(refused, 20, "{to} is answered for ever");
    last
}

#[test]
fn nobody_is_told_of_an_endpoint_for_long_that_went_while_the_daemon_was_away() {
    let Some(cluster) = Cluster::or_skip() else { return };
    put(&cluster, &here(&cluster));
    let daemon = start(&cluster);
    let all = targets(&cluster);
    assert!(eventually(PATIENCE, || all.iter().all(|to| status(&cluster, *to) == Some(200))), "{}", daemon.log());

    // A change that the daemon hears of is told within a second, and no later than by its own listener.
    let check = SocketAddr::new(all[0].ip(), CHECK);
    for (endpoints, expected) in [(elsewhere(&cluster), 503), (here(&cluster), 200)] {
        put(&cluster, &endpoints);
        let changed = Instant::now();
        assert!(eventually(Duration::from_secs(1), || status(&cluster, check) == Some(expected)), "{}", daemon.log());
        println!("{expected} after {:?}", changed.elapsed());
    }
    let (_, answer) = probe_from_outside(&cluster, check).unwrap();
    for line in
        ["content-type: application/json", "x-content-type-options: nosniff", "x-load-balancing-endpoint-weight: 1"]
    {
        assert!(answer.contains(line), "{answer}");
    }
    assert!(daemon.metric("kubelane_datapath_verdicts_total{verdict=\"probe_answered\"}").unwrap() > 0.0);

    daemon.kill();
    put(&cluster, &elsewhere(&cluster));
    let gone = Instant::now();
    let times: Vec<Duration> = thread::scope(|scope| {
        let each = all.iter().map(|to| scope.spawn(|| time_out(&cluster, *to, gone)));
        each.collect::<Vec<_>>().into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    println!("answered for {times:?} after the daemon had gone");
    assert!(times.iter().all(|time| *time < LIE), "{times:?}");
    assert!(times.iter().all(|time| *time > Duration::from_secs(3)), "{times:?}");
    for to in &all {
        assert!(probe_from_outside(&cluster, *to).is_err(), "{to}: nobody listens");
    }

    // The next one tells what is, and never what was.
    let next = spawn(&cluster);
    let mut told = Vec::new();
    let is_told = eventually(PATIENCE, || {
        told.extend(status(&cluster, check));
        told.last().is_some()
    });
    assert!(is_told && told == [503], "{told:?}; {}", next.log());
    let healthz = SocketAddr::new(all[0].ip(), HEALTHZ);
    assert!(eventually(PATIENCE, || status(&cluster, healthz) == Some(200)), "{}", next.log());
}

#[test]
fn a_port_that_somebody_else_has_is_answered_by_nobody_else() {
    let Some(cluster) = Cluster::or_skip() else { return };
    let host = &cluster.lab.node("node1").host;
    let taken = host.inside(|| Ok(std::net::TcpListener::bind(("0.0.0.0", CHECK))?)).unwrap();
    put(&cluster, &here(&cluster));
    let daemon = start(&cluster);
    let [healthz, check] = [HEALTHZ, CHECK].map(|port| SocketAddr::new(host.v4.into(), port));
    assert!(eventually(PATIENCE, || status(&cluster, healthz) == Some(200)), "{}", daemon.log());
    let connected = cluster.lab.outside(|| Ok(TcpStream::connect_timeout(&check, Duration::from_secs(1))?));
    assert_eq!(connected.unwrap().local_addr().unwrap(), taken.accept().unwrap().1, "it is the listener's own");
    drop(taken);
    assert!(eventually(PATIENCE, || status(&cluster, check) == Some(200)), "{}", daemon.log());
}
