//! The server's process: the double with the whole world, which then changes one endpoint after the other and looks into
//! the maps for each.

use std::collections::BTreeSet;
use std::io::BufRead as _;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::json;

use crate::Arguments;
use crate::apiserver::{ApiServer, Resource};
use crate::common::world::{BenchWorld, Layout, Style};
use crate::observe::Eyes;

/// What a daemon needs to reach the server at this address.
pub fn kubeconfig(at: &str) -> String {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "lab",
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "node"}}],
        "clusters": [{"name": "lab", "cluster": {"server": format!("http://{at}")}}],
        "users": [{"name": "node", "user": {"token": "a-token"}}],
    })
    .to_string()
}

/// Serves; prints its address, and after a line on stdin the times of the changes in milliseconds. Ends with its owner.
pub fn run(dir: &Path, pins: &Path, arguments: &Arguments) -> anyhow::Result<()> {
    let own = dir.with_file_name(format!("served-{}", std::process::id()));
    let mut world = BenchWorld::write(&own, arguments.services, arguments.endpoints, Layout::One, Style::Cluster)?;
    let server = ApiServer::new();
    for number in 0..arguments.services {
        server.apply_yaml(&world.text(number));
    }
    server.upsert(json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": "node1"}}));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let listener = runtime.block_on(tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
    println!("{}", listener.local_addr()?);
    runtime.spawn(server.serve(listener));

    let mut line = String::new();
    if std::io::stdin().lock().read_line(&mut line).context("waiting for the order to begin")? == 0 {
        return Ok(());
    }
    let eyes = Eyes::open(pins)?;
    let mut times = Vec::with_capacity(arguments.changes);
    let pause = Duration::from_secs(1) / arguments.rate;
    let mut next = Instant::now();
    for made in 0..arguments.changes {
        // 7,919 is prime: every Service comes before one comes again.
        let number = made * 7919 % arguments.services;
        let fresh = world.fresh_ip();
        let service = &mut world.services[number];
        service.endpoints[0] = fresh;
        let wanted: BTreeSet<_> = service.endpoints.iter().copied().collect();
        let name = format!("service-{number}-x7k2p");
        let mut slice = server.get(Resource::EndpointSlices, "bench", &name).context("the Service's slice")?;
        slice["endpoints"][0]["addresses"][0] = json!(fresh);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        let began = Instant::now();
        server.upsert(slice);
        eyes.spin_until(service.cluster_ip(), &wanted)?;
        times.push(format!("{:.4}", began.elapsed().as_secs_f64() * 1e3));
        next = began + pause;
    }
    println!("{}", times.join(" "));
    // Until the owner ends: the daemon is watched while it idles.
    while std::io::stdin().lock().read_line(&mut line).is_ok_and(|read| read > 0) {}
    Ok(())
}
