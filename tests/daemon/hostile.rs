//! The real daemon on an API server that has gone bad: broken objects, answers that drip, lists of 100 MB, restarts in the
//! middle of a list. What it serves, it goes on serving.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;
use socket2::{Domain, Socket, Type};

use crate::laboratory::api_cluster::ApiCluster;
use crate::laboratory::apiserver::{Answer, Resource, Verb};
use crate::laboratory::cluster::{all, names};
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::manifests::{port, service, slice};
use crate::laboratory::{eventually, hostile_objects};

/// The most memory that the process has used, in MiB.
fn peak(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("a living process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") >> 10
}

fn is_well(daemon: &Daemon) {
    for path in ["/healthz", "/livez"] {
        let answer = daemon.health(path).expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
    }
}

#[test]
fn broken_objects_dripping_answers_and_lists_that_break_off_disturb_nobody() {
    let Some(cluster) = ApiCluster::or_skip() else { return };
    let daemon = cluster.start();
    assert_eq!(names(&cluster.ask(10)), ["a", "b"]);
    let [victim, slice, _] = hostile_objects::whole_objects();
    for (resource, object) in [(Resource::Services, victim), (Resource::EndpointSlices, slice)] {
        let sample: Vec<String> = hostile_objects::mutants(&object).into_iter().step_by(7).collect();
        for chunk in sample.chunks(50) {
            let line = |object: &String| format!("{{\"type\":\"MODIFIED\",\"object\":{object}}}\n");
            cluster.server.inject(resource, &chunk.iter().map(line).collect::<String>());
        }
    }
    cluster.put_slice("echo", &["c"]);
    assert!(eventually(PATIENCE, || cluster.ask(10) == all("c", 40)), "{}", daemon.log());
    is_well(&daemon);

    // A restart in the middle of a list, and then a server that sends a byte a second.
    let half = "{\"type\":\"ADDED\",\"object\":{\"kind\":\"Service\",\"metadata\":{\"name\":\"half".to_owned();
    for resource in [Resource::Services, Resource::EndpointSlices] {
        let drip = Answer::Drip(half.repeat(10));
        cluster.server.script(resource, Verb::StreamingList, [Answer::Broken(half.clone()), Answer::Refused, drip]);
    }
    cluster.server.break_watches();
    cluster.put_service("another", 11);
    cluster.server.compact();
    cluster.put_slice("another", &["b"]);
    assert!(eventually(PATIENCE, || daemon.metric("kubelane_source_connected").unwrap() < 3.0), "{}", daemon.log());
    assert_eq!(cluster.ask(10), all("c", 40), "what is known is served");
    is_well(&daemon);
    // A streaming list that says nothing for ten seconds is left for an ordinary one.
    assert!(eventually(PATIENCE * 2, || cluster.ask(11) == all("b", 40)), "{}", cluster.log());
    is_well(&daemon);
}

/// 2,000 Services of 50 kB each, by a streaming list and by one from the server's cache, which comes whole.
#[test]
fn a_list_of_a_hundred_megabytes_needs_little_memory() {
    let Some(cluster) = ApiCluster::or_skip() else { return };
    let padding = "x".repeat(50_000);
    for number in 0..2000 {
        let ip = format!("10.98.{}.{}", number / 200, 1 + number % 200);
        let spec = json!({"clusterIP": ip, "clusterIPs": [ip], "ports": [port("http", "TCP", 80)]});
        let mut object = service(&format!("big-{number}"), spec);
        object["metadata"]["annotations"] = json!({"padding": padding});
        cluster.server.upsert(object);
    }
    for streaming in [true, false] {
        if !streaming {
            cluster.server.refuse_streaming();
        }
        let began = Instant::now();
        let daemon = cluster.start();
        assert!(daemon.metric("kubelane_services").unwrap() >= 2000.0);
        let (peak, time) = (peak(&daemon), began.elapsed());
        println!("100 MB, streaming={streaming}: ready after {time:.1?}, peak {peak} MiB");
        // A machine too busy to begin to stream within ten seconds is asked for the whole list instead.
        let streamed = streaming && !daemon.log().contains("using list and watch");
        assert!(peak < if streamed { 100 } else { 220 }, "{peak} MiB");
        assert_eq!(names(&cluster.ask(10)), ["a", "b"]);
        daemon.terminate().unwrap();
        cluster.lab.node("node1").cleanup().unwrap();
    }
}

#[test]
fn services_that_ask_for_more_than_the_maps_hold_are_degraded_alone() {
    let Some(cluster) = ApiCluster::or_skip() else { return };
    let daemon = cluster.start();
    assert_eq!(names(&cluster.ask(10)), ["a", "b"]);
    let limited = |count: f64| daemon.metric("kubelane_degraded_services").is_ok_and(|services| services == count);
    cluster.server.upsert(hostile_objects::many_frontends());
    cluster.server.upsert(hostile_objects::many_source_ranges());
    assert!(eventually(PATIENCE, || limited(2.0)), "{}", daemon.log());

    // Beside them, what is new works within a second, whatever becomes of them meanwhile.
    let ready = cluster.ready(&["a"]);
    let endpoint = ready.into_iter().find(|endpoint| endpoint.address().is_ipv4()).expect("an IPv4 endpoint");
    cluster.server.upsert(slice("frontends-1", "frontends", &[("p1", "TCP", 9000)], &[endpoint]));
    let before = daemon.metric("kubelane_frontends").unwrap();
    let began = Instant::now();
    cluster.put_slice("another", &["c"]);
    cluster.put_service("another", 11);
    let is_there = || daemon.metric("kubelane_frontends").is_ok_and(|frontends| frontends == before + 1.0);
    // The Service and its slice come by two watches: without the slice it is refused.
    assert!(eventually(PATIENCE, || is_there() && cluster.ask(11) == all("c", 40)), "{}", cluster.log());
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}: {}", began.elapsed(), cluster.log());
    for name in ["kubelane_sync_failures_total", "kubeproxy_sync_proxy_rules_service_changes_pending"] {
        assert_eq!(daemon.metric(name).unwrap(), 0.0, "{name}");
    }
    is_well(&daemon);
    assert!(daemon.health("/readyz").unwrap().starts_with("HTTP/1.1 200"), "{}", daemon.log());
    let (log, peak) = (cluster.log(), peak(&daemon));
    for object in ["frontends: external IPs beyond the first ", "ranges: loadBalancerSourceRanges, so that "] {
        assert_eq!(log.matches(&format!("Service default/{object}")).count(), 1, "{log}");
    }
    println!("two hostile Services: peak {peak} MiB");
    assert!(peak < 150, "{peak} MiB");

    // The next daemon finds all of it, and is ready.
    daemon.terminate().unwrap();
    let daemon = cluster.start();
    assert_eq!(daemon.metric("kubelane_sync_rows_total").unwrap(), 0.0, "{}", daemon.log());
    assert_eq!(cluster.ask(11), all("c", 40));
    is_well(&daemon);
}

/// A connection from one of a pod's addresses to node1's health port. (Who is outside is answered by the packet programs, and
/// holds nothing of the daemon's.)
fn connect(from: Ipv4Addr) -> anyhow::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((from, 0)).into())?;
    socket.connect(&SocketAddr::from((Ipv4Addr::new(172, 31, 0, 11), 10256)).into())?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    socket.set_write_timeout(Some(Duration::from_millis(50)))?;
    Ok(socket.into())
}

fn is_alive(from: Ipv4Addr) -> anyhow::Result<bool> {
    let mut stream = connect(from)?;
    write!(stream, "GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    Ok(answer.starts_with("HTTP/1.1 200"))
}

#[test]
fn six_strangers_with_endless_requests_block_no_probe_and_cost_little_memory() {
    let Some(cluster) = ApiCluster::or_skip() else { return };
    let options = ["--healthz-bind-address", "0.0.0.0:10256"];
    let daemon = cluster.start_with(&options);
    let pod = cluster.lab.pod("client");
    let before = peak(&daemon);
    let strangers: Vec<Ipv4Addr> = (201..207).map(|last| Ipv4Addr::new(10, 244, 1, last)).collect();
    let add = || {
        let listed = Command::new("ip").args(["-o", "-4", "addr"]).output()?;
        let listed = String::from_utf8(listed.stdout)?;
        let line = listed.lines().find(|line| line.contains(&format!(" {}/", pod.v4))).expect("the pod's address");
        let device = line.split_whitespace().nth(1).expect("a device");
        for stranger in &strangers {
            let added = Command::new("ip").args(["addr", "add", &format!("{stranger}/32"), "dev", device]).status()?;
            assert!(added.success());
        }
        Ok(())
    };
    pod.inside(add).unwrap();
    let head = format!("GET /livez HTTP/1.1\r\nHost: x\r\nX: {}", "y".repeat(390 << 10));
    let hold = || -> anyhow::Result<Vec<TcpStream>> {
        let half = |n: usize| -> anyhow::Result<TcpStream> {
            let mut stream = connect(strangers[n % 6])?;
            // One half sends what is kept; the other what may not be.
            let text = if n.is_multiple_of(2) { &head[..4000] } else { &head };
            let _ = stream.write_all(text.as_bytes());
            Ok(stream)
        };
        (0..900).map(half).collect()
    };
    let held = pod.inside(hold).unwrap();
    for _ in 0..16 {
        assert!(pod.inside(|| is_alive(pod.v4)).unwrap(), "a seventh client");
        is_well(&daemon);
    }
    let grown = peak(&daemon) - before;
    println!("900 connections of six strangers: {grown} MiB more");
    assert!(grown < 24, "{grown} MiB");
    drop(held);
}
