//! What Prometheus gets from the daemon: readable to its own parser, as docs/REFERENCE.md says, and true.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;

use crate::laboratory::api_cluster::ApiCluster;
use crate::laboratory::apiserver::Resource;
use crate::laboratory::cluster::{names, vip};
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::manifests::{Endpoint, slice};
use crate::laboratory::messages::Kind::Tcp4;
use crate::laboratory::{eventually, process, skip};

/// The body of /metrics.
fn exposition(daemon: &Daemon) -> String {
    let answer = daemon.metrics().unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    body.to_owned()
}

/// A type and the names of its labels, by metric.
type Families = BTreeMap<String, (String, BTreeSet<String>)>;

fn exposed(text: &str) -> Families {
    let mut families = Families::new();
    let mut current = String::new();
    for line in text.lines() {
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            current = name.to_owned();
            families.insert(current.clone(), (kind.to_owned(), BTreeSet::new()));
        } else if let Some((_, labels)) = line.split_once('{').filter(|_| !line.starts_with('#')) {
            // No value of ours has a comma, a brace or an equals sign.
            let labels = labels.split('}').next().unwrap().split(',').map(|label| label.split('=').next().unwrap());
            let of = families.get_mut(&current).unwrap();
            of.1.extend(labels.filter(|label| *label != "le").map(str::to_owned));
        }
    }
    families
}

/// The table of docs/REFERENCE.md: `name` | type | `label`, `label` | meaning.
fn documented() -> Families {
    let reference = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/REFERENCE.md")).unwrap();
    let rows = reference
        .lines()
        .filter(|line| ["| `kubeproxy_", "| `kubelane_", "| `process_"].iter().any(|start| line.starts_with(start)));
    let row = |line: &str| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let bare = |text: &str| text.trim().trim_matches('`').to_owned();
        assert!(cells.len() == 6 && cells[4].len() > 10, "{line}");
        let labels = cells[3].split(',').map(bare).filter(|label| !label.is_empty()).collect();
        (bare(cells[1]), (cells[2].to_owned(), labels))
    };
    rows.map(row).collect()
}

fn promtool() -> Option<PathBuf> {
    let unpacked = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/target/promtool"));
    if process::in_path("promtool") {
        return Some("promtool".into());
    }
    unpacked.exists().then_some(unpacked)
}

/// What promtool has to say about it, line by line.
fn complaints(promtool: &PathBuf, text: &str) -> Vec<String> {
    let piped = || Stdio::piped();
    let mut command = Command::new(promtool);
    let mut child = command.args(["check", "metrics"]).stdin(piped()).stdout(piped()).stderr(piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    String::from_utf8(said).unwrap().lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

/// Every family has a sample.
fn busy(cluster: &ApiCluster) -> Daemon<'_> {
    let daemon = cluster.start_with(&["--service-metrics", "2", "--service-traffic"]);
    for path in ["/healthz", "/livez"] {
        assert!(daemon.health(path).unwrap().contains("200 OK"));
    }
    // Nobody serves it.
    cluster.put_service("empty", 12);
    assert!(eventually(PATIENCE, || {
        cluster.ask(10);
        cluster.ask(12);
        let text = exposition(&daemon);
        let families = ["connections_total{", "verdicts_total{", "connect_duration_seconds_count{"];
        text.contains("map=\"affinities\"")
            && families.iter().all(|family| text.contains(&format!("kubelane_service_{family}")))
    }));
    daemon
}

#[test]
fn prometheus_reads_all_of_it_and_minds_nothing_but_a_name_of_kube_proxys() {
    let Some(promtool) = promtool() else { return skip("needs promtool (`make promtool` fetches it)") };
    let Some(cluster) = ApiCluster::or_skip() else { return };
    let text = exposition(&busy(&cluster));
    let told = complaints(&promtool, &text);
    let name = "kubeproxy_sync_proxy_rules_no_local_endpoints_total";
    assert_eq!(told, [format!("{name} non-counter metrics should not have \"_total\" suffix")]);
    let broken = text.replacen("# TYPE kubelane_services gauge", "# TYPE kubelane_services nonsense", 1);
    assert_ne!(complaints(&promtool, &broken), told, "it does read");
}

#[test]
fn the_reference_lists_every_metric_with_its_type_and_labels() {
    let Some(cluster) = ApiCluster::or_skip() else { return };
    let mut all = exposed(&exposition(&busy(&cluster)));
    // These only a daemon has that serves nothing.
    let manifests = format!("dir:{}", cluster.manifests.dir.display());
    let shadow = Daemon::spawn_on(&cluster.lab, "node2", &["--source", &manifests], &["--shadow"]).unwrap();
    assert!(eventually(PATIENCE, || shadow.metrics().is_ok()));
    let of_shadow = exposed(&exposition(&shadow));
    all.extend(of_shadow.into_iter().filter(|(name, _)| name.starts_with("kubelane_shadow_")));
    assert_eq!(all, documented());
}

#[test]
fn a_change_of_endpoints_is_measured_from_its_annotation() {
    let Some(cluster) = ApiCluster::or_skip() else { return };
    let daemon = cluster.start();
    let count = || daemon.metric("kubeproxy_network_programming_duration_seconds_count").unwrap();
    let pending = || daemon.metric("kubeproxy_sync_proxy_rules_endpoint_changes_pending").unwrap();
    let total = || daemon.metric("kubeproxy_sync_proxy_rules_endpoint_changes_total").unwrap();
    let annotate = |seconds: i64, pods: &[&str]| {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64 + seconds;
        let time = jiff::Timestamp::from_second(at).unwrap().to_string();
        let ends: Vec<Endpoint> = pods.iter().map(|pod| Endpoint::ready(cluster.address(pod), "node2")).collect();
        let mut object = slice("echo-1", "echo", &[("tcp", "TCP", 9000)], &ends);
        object["metadata"]["annotations"] = json!({"endpoints.kubernetes.io/last-change-trigger-time": time});
        cluster.server.upsert(object);
    };
    assert_eq!((count(), pending()), (0.0, 0.0), "the first list is none of it");
    let before = total();
    annotate(-3600, &["a"]);
    assert!(eventually(PATIENCE, || total() > before));
    annotate(1, &["a", "b"]);
    assert!(eventually(PATIENCE, || count() == 1.0), "{}", daemon.log());
    assert_eq!((pending(), total()), (0.0, before + 2.0));
    assert_eq!(daemon.metric("kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv6\"}").unwrap(), 0.0);
    assert!(daemon.metric("kubeproxy_network_programming_duration_seconds_sum").unwrap() < 5.0);
}

#[test]
fn connections_of_the_busiest_services_are_shown_and_no_others() {
    let Some(cluster) = ApiCluster::or_skip() else { return };
    let plain = cluster.start();
    assert!(!exposition(&plain).contains("kubelane_service_connections_total"));
    plain.kill();
    let daemon = cluster.start_with(&["--service-metrics", "1"]);
    cluster.put_service("other", 11);
    cluster.put_slice("other", &["c"]);
    assert!(eventually(PATIENCE, || names(&cluster.ask(11)) == ["c"]));
    cluster.ask(10);
    let shown = || -> Vec<String> {
        let text = exposition(&daemon);
        let of_services = text.lines().filter(|line| line.starts_with("kubelane_service_connections_total"));
        of_services.map(str::to_owned).collect()
    };
    let asked = |service: &str, times: u32| {
        let labels = format!("namespace=\"default\",port=\"tcp\",service=\"{service}\"");
        vec![format!("kubelane_service_connections_total{{{labels}}} {times}")]
    };
    (0..20).for_each(|_| drop(cluster.ask(10)));
    assert!(eventually(PATIENCE, || shown() == asked("echo", 21 * 40)), "{:?}", shown());
    // What is refused counts as well, with its reason.
    cluster.put_slice("echo", &[]);
    assert!(eventually(PATIENCE, || names(&cluster.ask(10)) != ["a"]));
    let refused = || -> Option<f64> {
        let text = exposition(&daemon);
        let line = text.lines().find(|line| line.starts_with("kubelane_service_verdicts_total{"))?;
        let is_it = line.contains("service=\"echo\"") && line.contains("verdict=\"refused_no_endpoint\"");
        is_it.then(|| line.rsplit(' ').next()?.parse().ok()).flatten()
    };
    assert!(eventually(PATIENCE, || refused().is_some_and(|times| times >= 1.0)), "{}", exposition(&daemon));
    // The counts go with the Service, and its id's next owner has none of them.
    cluster.server.delete(Resource::Services, "default", "echo");
    assert!(eventually(PATIENCE, || shown().len() == 1 && shown()[0].contains("\"other\"")), "{:?}", shown());
}

/// The value of the series of this name that has all these labels; 0 while there is none.
fn value(text: &str, name: &str, labels: &[&str]) -> f64 {
    let is_it = |line: &&str| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{'))
            && labels.iter().all(|label| line.contains(label))
    };
    let mut found = text.lines().filter(is_it);
    let line = found.next();
    assert_eq!(found.next(), None, "{name} {labels:?}");
    line.map_or(0.0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

#[test]
fn traffic_of_services_is_measured_while_somebody_wants_to_know() {
    let Some(cluster) = ApiCluster::or_skip() else { return };
    let is_observed = || {
        let attachments = kubelane::bpf::attachments(&cluster.lab.node("node1").pin_path).unwrap();
        attachments.iter().any(|attachment| attachment.name == "tcp_states")
    };
    let plain = cluster.start_with(&["--service-metrics", "5"]);
    assert!(eventually(PATIENCE, || exposition(&plain).contains("kubelane_service_connections_total") || {
        cluster.ask(10);
        false
    }));
    assert!(!exposition(&plain).contains("kubelane_service_connect_") && !is_observed());
    plain.kill();

    let daemon = cluster.start_with(&["--service-metrics", "5", "--service-traffic"]);
    assert!(is_observed());
    // What somebody takes off is put back.
    let pin = cluster.lab.node("node1").pin_path.join("v3/links/tcp_states");
    std::fs::remove_file(&pin).unwrap();
    assert!(!is_observed());
    assert!(eventually(PATIENCE, is_observed), "{}", daemon.log());
    // Nobody listens there.
    cluster.put_service("closed", 11);
    let endpoints = [Endpoint::ready(cluster.address("b"), "node2")];
    cluster.server.upsert(slice("closed-1", "closed", &[("tcp", "TCP", 9)], &endpoints));
    assert!(eventually(PATIENCE, || daemon.metric("kubelane_endpoints").unwrap() >= 3.0));
    let read = |name: &str, labels: &[&str]| value(&exposition(&daemon), &format!("kubelane_service_{name}"), labels);
    let (asked, refused) = ("service=\"echo\"", "service=\"closed\"");
    // Each of 40 connections says a byte and is told one.
    cluster.ask(10);
    assert_eq!(names(&cluster.ask(11)), ["ECONNREFUSED"]);
    let times = |limit: &str| read("connect_duration_seconds_bucket", &[asked, &format!("le=\"{limit}\"")]);
    assert!(eventually(PATIENCE, || times("+Inf") == 40.0), "{}", exposition(&daemon));
    assert!(eventually(PATIENCE, || read("connect_failures_total", &[refused]) == 40.0), "{}", exposition(&daemon));
    assert_eq!(read("connect_failures_total", &[asked]), 0.0);
    assert_eq!(read("connect_duration_seconds_count", &[refused]), 0.0);
    let limits = ["0.0001", "0.0005", "0.001", "0.005", "0.01", "0.05", "0.1", "0.5", "1", "5", "+Inf"];
    let all = limits.map(times);
    assert!(all.is_sorted() && all[9] == 40.0, "{all:?}");
    let seconds = read("connect_duration_seconds_sum", &[asked]);
    assert!(seconds > 0.0 && seconds < 40.0, "{seconds}");
    // SYN and FIN count as a byte each; the backend's SYN does not.
    let bytes =
        |direction: &str| read("bytes_total", &[asked, "path=\"sockets\"", &format!("direction=\"{direction}\"")]);
    assert!(eventually(PATIENCE, || (80.0..=120.0).contains(&bytes("request"))), "{}", bytes("request"));
    assert!((40.0..=80.0).contains(&bytes("reply")), "{}", bytes("reply"));
    assert_eq!(read("packets_total", &[asked, "direction=\"request\""]), 0.0, "these were no packets of ours");
    cluster.server.delete(Resource::Services, "default", "closed");
    assert!(eventually(PATIENCE, || !exposition(&daemon).contains(refused)));
    // A socket outlives its Service, and another Service gets the id: it gets nothing else.
    let mut client = cluster.client("client");
    let mut socket = client.open(Tcp4).unwrap();
    socket.connect(vip(10, 90)[0]).unwrap();
    (0..100).for_each(|_| socket.send().and_then(|()| socket.receive().map(drop)).unwrap());
    cluster.server.delete(Resource::Services, "default", "echo");
    assert!(eventually(PATIENCE, || !exposition(&daemon).contains(asked)));
    cluster.put_service("heir", 12);
    cluster.put_slice("heir", &["c"]);
    assert!(eventually(PATIENCE, || names(&cluster.ask(12)) == ["c"]));
    drop(client);
    let heirs = |name: &str, labels: &[&str]| read(name, &[&["service=\"heir\""], labels].concat());
    let (connected, sent) = ("connect_duration_seconds_count", &["path=\"sockets\"", "direction=\"request\""]);
    let is_even = || heirs(connected, &[]) >= 40.0 && heirs("bytes_total", sent) >= heirs(connected, &[]) * 2.0;
    assert!(eventually(PATIENCE, is_even), "{}", exposition(&daemon));
    let (connects, bytes) = (heirs(connected, &[]), heirs("bytes_total", sent));
    assert!(bytes <= connects * 3.0, "{connects} connects said {bytes} bytes");
    daemon.kill();

    drop(cluster.start());
    assert!(!is_observed());
}

#[test]
fn get_status_says_what_bpftool_does_of_the_maps_and_counts_services() {
    let Some(cluster) = ApiCluster::or_skip() else { return };
    let daemon = cluster.start();
    let node = cluster.lab.node("node1");
    let services = daemon.metric("kubelane_services ").unwrap();
    let pins = kubelane::bpf::pinned::maps_directory(&node.pin_path);
    let memlock = |pin: PathBuf| -> u64 {
        let output = Command::new("bpftool").args(["-j", "map", "show", "pinned"]).arg(pin).output().unwrap();
        let shown: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        shown["bytes_memlock"].as_u64().unwrap()
    };
    let bytes: u64 = std::fs::read_dir(pins).unwrap().map(|entry| memlock(entry.unwrap().path())).sum();
    let line = format!("maps: {:.1} MiB for {services} services\n", bytes as f64 / f64::from(1 << 20));
    assert!(services > 1.0);
    assert_eq!(node.get("status", &[]).unwrap(), line);
    let told: serde_json::Value = serde_json::from_str(&node.get("status", &["-o", "json"]).unwrap()).unwrap();
    assert_eq!(told["mapBytes"], bytes, "{told}");
}
