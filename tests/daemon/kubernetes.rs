//! The real daemon on a Kubernetes API server: a kubeconfig, TCP, watch streams, and connections that follow them. The
//! server is the tests' double, on the loopback device of a node of the laboratory.

use std::fs;

use serde_json::json;

use crate::laboratory::api_cluster::ApiCluster;
use crate::laboratory::apiserver::{self, Answer, Resource, Verb};
use crate::laboratory::cluster::{all, names};
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::manifests::{Endpoint, port, service, slice};
use crate::laboratory::{eventually, kubelane_binary};

#[test]
fn connections_follow_what_the_api_server_says() {
    let Some(cluster) = ApiCluster::or_skip() else { return };
    let daemon = cluster.start();
    assert_eq!(daemon.metric("kubelane_services").unwrap(), 17.0, "the recorded Services and echo");
    assert_eq!(names(&cluster.ask(10)), ["a", "b"]);
    cluster.put_slice("echo", &["b", "c"]);
    assert!(eventually(PATIENCE, || names(&cluster.ask(10)) == ["b", "c"]));

    // The slice is another Service's from now on: its label decides.
    cluster.put_service("other", 11);
    let endpoints = [Endpoint::ready(cluster.address("c"), "node2")];
    let mut moved = slice("echo-1", "other", &[("tcp", "TCP", 9000)], &endpoints);
    cluster.server.upsert(moved.clone());
    assert!(eventually(PATIENCE, || cluster.ask(11) == all("c", 40)));
    assert_eq!(cluster.ask(10), all("ECONNREFUSED", 40));
    moved["metadata"]["labels"]["service.kubernetes.io/headless"] = json!("");
    cluster.server.upsert(moved);
    assert!(eventually(PATIENCE, || cluster.ask(11) == all("ECONNREFUSED", 40)));
    cluster.server.delete(Resource::Services, "default", "other");
    cluster.put_slice("echo", &["a"]);
    assert!(eventually(PATIENCE, || cluster.ask(10) == all("a", 40)));
    assert!(cluster.server.requests().iter().all(|request| request.user_agent.starts_with("kubelane/")));
}

/// The arguments and files of kubeadm's DaemonSet, with nothing changed but where the server is and what keeps a
/// laboratory's daemon apart from the machine's.
#[test]
fn the_arguments_and_files_that_kubeadm_made_for_kube_proxy_are_enough() {
    let Some(cluster) = ApiCluster::or_skip() else { return };
    let directory = &cluster.lab.dir;
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/kubeadm/kube-proxy-configmap.yaml");
    let map: serde_json::Value = serde_norway::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let file = |key: &str| map["data"][key].as_str().unwrap().to_owned();
    let at = |name: &str| directory.join(name).display().to_string();
    fs::write(at("token"), "a-token").unwrap();
    let server = fs::read_to_string(&cluster.kubeconfig).unwrap();
    let server = server.split('"').find(|part| part.starts_with("http://")).unwrap();
    let kubeconfig = file("kubeconfig.conf")
        .replace("https://controlplane:6443", server)
        .replace("/var/run/secrets/kubernetes.io/serviceaccount/token", &at("token"))
        .replace("    certificate-authority: /var/run/secrets/kubernetes.io/serviceaccount/ca.crt\n", "");
    fs::write(at("kubeconfig.conf"), kubeconfig).unwrap();
    let config = file("config.conf").replace("/var/lib/kube-proxy/kubeconfig.conf", &at("kubeconfig.conf"));
    fs::write(at("config.conf"), config.replace("mode: \"\"", "mode: ipvs")).unwrap();

    let node = cluster.lab.node("node1");
    let config = format!("--config={}", at("config.conf"));
    let (cgroup, pins) = (node.cgroup.display().to_string(), node.pin_path.display().to_string());
    let arguments =
        [&config, "--hostname-override=node1", "--ipvs-scheduler=rr", "--cgroup", &cgroup, "--pin-path", &pins];
    let daemon = Daemon::start_as(&cluster.lab, "node1", &arguments).expect("the daemon starts");
    assert_eq!(daemon.metric("kubelane_services").unwrap(), 17.0, "the recorded Services and echo");
    assert_eq!(names(&cluster.ask(10)), ["a", "b"]);
    let log = cluster.log();
    let told: Vec<&str> = log.lines().filter(|line| line.contains("have no effect here")).collect();
    assert!(told.len() == 1 && told[0].ends_with("ignored: --ipvs-scheduler, clusterCIDR, mode"), "{told:?}");
}

#[test]
fn bad_objects_are_warned_of_once_and_everything_else_goes_on() {
    let Some(cluster) = ApiCluster::or_skip() else { return };
    let _daemon = cluster.start();
    let bad_ports = json!([port("tcp", "TCP", 90), {"name": "bad", "port": 70_000}, {"name": "worse", "port": "http"}]);
    let put_bad = |ip: &str, padding: u32| {
        let spec = json!({"clusterIP": ip, "clusterIPs": [ip], "externalIPs": ["2001:db8::1"], "ports": bad_ports});
        let mut object = service("bad", spec);
        object["metadata"]["annotations"] = json!({"padding": padding.to_string()});
        cluster.server.upsert(object);
        let mut unreadable = service("unreadable", json!("no spec at all"));
        unreadable["metadata"]["annotations"] = json!({"padding": padding.to_string()});
        cluster.server.upsert(unreadable);
    };
    (0..3).for_each(|n| put_bad("10.96.0.12", 10u32.pow(n)));
    // Bad again after the relist that follows a 410.
    cluster.server.compact();
    cluster.server.break_watches();
    put_bad("10.96.0.12", 7);
    cluster.put_slice("bad", &["b"]);
    cluster.put_slice("echo", &["a"]);
    assert!(eventually(PATIENCE, || cluster.ask(10) == all("a", 40)));
    assert!(eventually(PATIENCE, || cluster.ask(12) == all("b", 40)));
    for told in ["70000 is not a port", "\"http\" is not a port", "2001:db8::1", "Service default/unreadable"] {
        let lines = || {
            let log = cluster.log();
            let of = |line: &&str| line.contains("WARN") && line.contains(told);
            log.lines().filter(of).map(str::to_owned).collect::<Vec<_>>()
        };
        // Services and slices come by watches of their own: what is served may be ahead of what is said.
        assert!(eventually(PATIENCE, || !lines().is_empty()), "{told}: {}", cluster.log());
        assert_eq!(lines().len(), 1, "{told}: {:#?}", lines());
    }
}

#[test]
fn an_outage_changes_nothing_and_what_happened_meanwhile_is_caught_up_with() {
    let Some(cluster) = ApiCluster::or_skip() else { return };
    let daemon = cluster.start();
    cluster.server.set_down(true);
    assert!(eventually(PATIENCE, || daemon.metric("kubelane_source_connected").unwrap() == 0.0), "{}", daemon.log());
    assert_eq!(names(&cluster.ask(10)), ["a", "b"]);
    // A daemon that starts now serves what it finds, and removes nothing.
    drop(daemon);
    cluster.put_slice("echo", &["c"]);
    cluster.server.delete(Resource::Services, "shop", "cart");
    cluster.server.compact();
    let forbidden = apiserver::recorded("error-403-forbidden.json");
    cluster.server.script(Resource::Services, Verb::StreamingList, [Answer::Body(403, forbidden.clone())]);
    cluster.server.script(Resource::EndpointSlices, Verb::StreamingList, [Answer::Body(500, "{}".into())]);
    let (kubeconfig, server) = (cluster.kubeconfig.to_str().unwrap().to_owned(), cluster.server.clone());
    let back = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(1500));
        server.set_down(false);
    });
    let before = cluster.lab.node("node1").get("services", &[]).unwrap();
    assert!(before.contains("cart"), "{before}");
    let daemon = Daemon::start_on(&cluster.lab, "node1", &["--kubeconfig", &kubeconfig], &[]).unwrap();
    back.join().unwrap();
    assert!(eventually(PATIENCE, || cluster.ask(10) == all("c", 40)), "{}", daemon.log());
    let after = || cluster.lab.node("node1").get("services", &[]).unwrap();
    assert!(eventually(PATIENCE, || !after().contains("cart")), "{}", after());
    assert_eq!(names(&cluster.ask(10)), ["c"]);
}

#[test]
fn a_restart_with_an_unchanged_world_writes_nothing() {
    let Some(cluster) = ApiCluster::or_skip() else { return };
    let rows = |daemon: &Daemon| daemon.metric("kubelane_sync_rows_total").unwrap();
    let first = cluster.start();
    assert!(rows(&first) > 40.0);
    let node = cluster.lab.node("node1");
    let maps = || ["services", "backends"].map(|what| node.get(what, &["-o", "json"]).unwrap());
    let before = maps();
    first.terminate().unwrap();
    let again = cluster.start();
    assert_eq!(again.metric("kubelane_services").unwrap(), 17.0, "it has synced");
    assert_eq!((rows(&again), again.metric("kubelane_sync_calls_total").unwrap()), (0.0, 0.0));
    assert_eq!(maps(), before);
    assert_eq!(names(&cluster.ask(10)), ["a", "b"]);
}

/// The lines of `kubelane check` on node1 about the API server, and whether all is well.
fn checked(cluster: &ApiCluster, options: &[&str]) -> (Vec<String>, bool) {
    let node = cluster.lab.node("node1");
    let pins = node.pin_path.display().to_string();
    let run = || {
        let check = ["check", "--pin-path", &pins, "--healthz-bind-address", "", "--metrics-bind-address", ""];
        Ok(std::process::Command::new(kubelane_binary()?).args(check).args(options).output()?)
    };
    let output = node.host.inside(run).unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.is_empty(), "{error}");
    let of_server = |line: &&str| ["API server", "rights on", "clock "].iter().any(|what| line[6..].starts_with(what));
    let lines = said.lines().filter(|line| line.len() > 6).filter(of_server).map(str::to_owned).collect();
    (lines, output.status.success())
}

#[test]
fn check_asks_the_api_server_for_an_answer_rights_and_the_time() {
    let Some(cluster) = ApiCluster::or_skip() else { return };
    let kubeconfig = ["--kubeconfig", cluster.kubeconfig.to_str().unwrap()];
    let (lines, well) = checked(&cluster, &kubeconfig);
    assert!(well && lines.len() == 3 && lines.iter().all(|line| line.starts_with("ok")), "{lines:#?}");
    assert!(lines[0].contains("(v1.36.2)"), "{lines:#?}");

    cluster.server.deny(&["watch endpointslices", "create events"]);
    cluster.server.set_clock(-600);
    let (lines, well) = checked(&cluster, &kubeconfig);
    assert!(
        !well && lines[1].starts_with("FAIL") && lines[1].contains("may not watch endpointslices ->"),
        "{lines:#?}"
    );
    assert!(lines[2].starts_with("warn") && lines[2].contains(" s ahead of the API server's"), "{lines:#?}");
    cluster.server.deny(&["create events"]);
    let (lines, well) = checked(&cluster, &kubeconfig);
    assert!(well && lines[1].starts_with("warn") && lines[1].contains("may not create events"), "{lines:#?}");

    cluster.server.set_token("another");
    let (lines, well) = checked(&cluster, &kubeconfig);
    assert!(!well && lines.len() == 1 && lines[0].contains("rejects the credentials (401 Unauthorized)"), "{lines:#?}");
    let (lines, well) = checked(&cluster, &["--kubeconfig", "/nowhere/kubeconfig"]);
    assert!(!well && lines[0].starts_with("FAIL") && lines[0].contains("/nowhere/kubeconfig"), "{lines:#?}");
    let (lines, well) = checked(&cluster, &["--master", "http://127.0.0.1:9"]);
    assert!(!well && lines[0].contains("cannot be reached"), "{lines:#?}");
    let (lines, _) = checked(&cluster, &[]);
    assert!(lines[0].starts_with("warn") && lines[0].contains("its address is not given"), "{lines:#?}");
}

/// The plugin is asked for credentials with the first request, and has not answered when the signal comes.
#[test]
fn a_plugin_that_hangs_does_not_keep_the_daemon_from_ending() {
    let Some(cluster) = ApiCluster::or_skip() else { return };
    let text = fs::read_to_string(&cluster.kubeconfig).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    let api = "client.authentication.k8s.io/v1";
    config["users"][0]["user"] = json!({"exec": {"apiVersion": api, "command": "sleep", "args": ["1000"]}});
    fs::write(&cluster.kubeconfig, config.to_string()).unwrap();
    let kubeconfig = cluster.kubeconfig.to_str().unwrap();
    let daemon = Daemon::spawn_on(&cluster.lab, "node1", &["--kubeconfig", kubeconfig], &[]).unwrap();
    assert!(eventually(PATIENCE, || daemon.health("/livez").is_ok()), "{}", daemon.log());
    let began = std::time::Instant::now();
    assert!(daemon.terminate().unwrap().success());
    assert!(began.elapsed() < std::time::Duration::from_secs(3), "{:?}", began.elapsed());
}
