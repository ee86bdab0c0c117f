//! What one daemon asks of an API server, in requests, connections and bytes: at its start, while endpoints change, idle,
//! when its connection breaks and when the server restarts; and how the sources of many nodes come back to a server that
//! does. The server is the tests' double, over TLS; bytes are those of TCP's payload. No times are measured.

#[path = "../common/mod.rs"]
mod common;
#[path = "../../tests/laboratory/mod.rs"]
mod laboratory;

mod gate;
mod many;
mod tally;

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::ensure;
use clap::Parser;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use common::refs;
use common::world::{BenchWorld, ENDPOINTS_OF_A_SLICE};
use gate::Gate;
use laboratory::apiserver::{ApiServer, Resource};
use laboratory::daemon::Daemon;
use laboratory::eventually;
use laboratory::lab::Lab;
use tally::Tally;

const NODE: &str = "node1";
/// How long a start, or a return after the server's, may take.
const PATIENCE: Duration = Duration::from_secs(300);
/// When nothing has come from the server for so long, all has (a bookmark may come once a minute).
const QUIET: Duration = Duration::from_secs(3);

#[derive(Parser)]
struct Arguments {
    /// Services of the cluster.
    #[arg(long, default_value_t = 10_000)]
    services: usize,
    /// Endpoints of each Service.
    #[arg(long, default_value_t = 10)]
    endpoints: usize,
    /// Changes of one endpoint in a second, and for how many seconds.
    #[arg(long, default_value_t = 100)]
    rate: usize,
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// For how long nothing happens.
    #[arg(long, default_value_t = 120)]
    idle: u64,
    /// How long the server is away.
    #[arg(long, default_value_t = 10)]
    away: u64,
    /// Nodes of the cluster, for which the figures of one daemon are multiplied.
    #[arg(long, default_value_t = 5000)]
    nodes: u64,
    /// Sources of one node each that come back to a server that restarts, in a cluster of ten Services.
    #[arg(long, default_value_t = 200)]
    sources: usize,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    laboratory::preflight()?;
    ensure!(laboratory::process::in_path("openssl"), "openssl is missing (`make setup` installs it)");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    println!("{} Services with {} endpoints each:\n", arguments.services, arguments.endpoints);
    let mut rows = Vec::new();
    // What was measured before something failed is told, too.
    let outcome = one_daemon(&runtime, &arguments, &mut rows);
    tally::print(&rows, arguments.nodes);
    outcome?;
    many::come_back(&runtime, &arguments)
}

/// A cluster's objects, as a server holds them.
fn server(world: &BenchWorld) -> ApiServer {
    let server = ApiServer::new();
    for service in &world.services {
        server.upsert(stored(service.service(), "kubectl-client-side-apply"));
        for index in 0..service.slices() {
            server.upsert(stored(service.slice(index), "kube-controller-manager"));
        }
    }
    server.upsert(json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": NODE}}));
    server.compact();
    server
}

/// With what a server keeps of who wrote what, as in tests/data/cluster: it is a good part of an object.
fn stored(mut object: Value, manager: &str) -> Value {
    let paths = |value: &Value| -> Value {
        let keys = value.as_object().into_iter().flatten().map(|(key, _)| (format!("f:{key}"), json!({})));
        keys.collect::<serde_json::Map<_, _>>().into()
    };
    let mut fields = json!({"f:metadata": paths(&object["metadata"])});
    for part in ["spec", "endpoints", "ports", "addressType"] {
        if !object[part].is_null() {
            fields[format!("f:{part}")] = paths(&object[part]);
        }
    }
    let version = object["apiVersion"].clone();
    object["metadata"]["managedFields"] = json!([{
        "manager": manager, "operation": "Update", "apiVersion": version, "time": "2026-01-01T00:00:00Z",
        "fieldsType": "FieldsV1", "fieldsV1": fields,
    }]);
    object
}

/// Serves over TLS on the loopback device of this process's own namespace.
fn serve(runtime: &Runtime, server: &ApiServer, certificates: &Path) -> anyhow::Result<SocketAddr> {
    let listener = runtime.block_on(tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
    let at = listener.local_addr()?;
    runtime.spawn(server.serve_tls(listener, laboratory::pki::open_acceptor(certificates)));
    Ok(at)
}

fn write_kubeconfig(directory: &Path, at: SocketAddr) -> anyhow::Result<PathBuf> {
    let path = directory.join("kubeconfig");
    let cluster = json!({"server": format!("https://{at}"), "certificate-authority": directory.join("ca.crt")});
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": cluster}], "users": [{"name": "u", "user": {"token": "a-token"}}],
    });
    std::fs::write(&path, config.to_string())?;
    Ok(path)
}

/// The server is away for a while. Objects of each kind change, and what happened before is forgotten: a server that starts
/// knows what there is, and no history.
fn restart(server: &ApiServer, gate: &mut Gate, arguments: &Arguments) -> anyhow::Result<()> {
    gate.shut();
    sleep(Duration::from_secs(arguments.away));
    let first = |resource, namespace: &str, name: &str| server.get(resource, namespace, name).expect("it is there");
    server.upsert(first(Resource::Services, "bench", "service-0"));
    server.upsert(first(Resource::EndpointSlices, "bench", "service-0-x7k00"));
    server.upsert(first(Resource::Nodes, "", NODE));
    server.compact();
    gate.open()
}

/// Waits until as many watches of each kind are open.
fn watched(server: &ApiServer, by: usize) -> anyhow::Result<()> {
    let kinds = [Resource::Services, Resource::EndpointSlices, Resource::Nodes];
    let all = || kinds.iter().all(|kind| server.open_watches(*kind) >= by);
    ensure!(eventually(PATIENCE, all), "not all watches are open after {PATIENCE:?}");
    Ok(())
}

fn one_daemon(runtime: &Runtime, arguments: &Arguments, rows: &mut Vec<(&'static str, Tally)>) -> anyhow::Result<()> {
    let mut world = BenchWorld::new(arguments.services, arguments.endpoints);
    let server = server(&world);
    let lab = Lab::new(&[(NODE, &[])])?;
    laboratory::pki::make_certificates(&lab.dir);
    let at = serve(runtime, &server, &lab.dir)?;
    let host = &lab.node(NODE).host;
    let mut gate = Gate::new(runtime.handle(), at, |at| host.inside(|| Ok(TcpListener::bind(at)?)))?;
    let kubeconfig = write_kubeconfig(&lab.dir, gate.at)?.display().to_string();
    let limits = world.limits();
    let start = || -> anyhow::Result<Daemon> {
        let began = Instant::now();
        let mut daemon = Daemon::spawn_on(&lab, NODE, &["--kubeconfig", &kubeconfig], &refs(&limits))?;
        daemon.wait_ready(began, PATIENCE, Duration::from_millis(100))?;
        Ok(daemon)
    };
    let mut before = Tally::now(&server, &gate);
    let mut note = |what, gate: &Gate| {
        quiet(gate);
        let now = Tally::now(&server, gate);
        rows.push((what, now.since(std::mem::replace(&mut before, now))));
    };

    let daemon = start()?;
    note("start, with streaming lists", &gate);
    change(&server, &mut world, arguments);
    note("endpoints change", &gate);
    sleep(Duration::from_secs(arguments.idle));
    note("idle", &gate);
    gate.shut();
    sleep(Duration::from_secs(arguments.away));
    gate.open()?;
    watched(&server, 1)?;
    note("the connection is broken, and there again", &gate);
    restart(&server, &mut gate, arguments)?;
    listed(&daemon, 6.0)?;
    note("the server restarts", &gate);
    daemon.kill();
    server.refuse_streaming();
    let daemon = start()?;
    note("start, with ordinary lists (compressed)", &gate);
    restart(&server, &mut gate, arguments)?;
    listed(&daemon, 6.0)?;
    note("the server restarts, ordinary lists", &gate);
    daemon.kill();
    Ok(())
}

/// Waits until the daemon has made as many lists, of all kinds.
fn listed(daemon: &Daemon, lists: f64) -> anyhow::Result<()> {
    let all = || daemon.metric("kubelane_source_lists_total").is_ok_and(|made| made >= lists);
    ensure!(eventually(PATIENCE, all), "not all lists are made after {PATIENCE:?}; {}", daemon.log());
    Ok(())
}

/// Waits until nothing comes from the server any more.
fn quiet(gate: &Gate) {
    let come = || gate.counts.from_server.load(Ordering::Relaxed);
    let (mut last, mut since) = (come(), Instant::now());
    while since.elapsed() < QUIET {
        sleep(Duration::from_millis(100));
        let now = come();
        if std::mem::replace(&mut last, now) != now {
            since = Instant::now();
        }
    }
}

/// One endpoint after the other gets another address, of another Service each time.
fn change(server: &ApiServer, world: &mut BenchWorld, arguments: &Arguments) {
    let pause = Duration::from_secs(1) / arguments.rate.max(1) as u32;
    let (began, services) = (Instant::now(), world.services.len());
    for number in 0..arguments.rate * arguments.seconds as usize {
        let (after, changed) = (world.fresh_ip(), number * 7919 % services);
        let service = &mut world.services[changed];
        let at = number / services % service.endpoints.len();
        service.endpoints[at] = after;
        let slice = stored(service.slice(at / ENDPOINTS_OF_A_SLICE), "kube-controller-manager");
        sleep((began + pause * number as u32).saturating_duration_since(Instant::now()));
        server.upsert(slice);
    }
}
