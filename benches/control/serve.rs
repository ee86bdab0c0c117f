//! The API server's process: the tests' double with the whole world. It makes changes when it is told to and looks into
//! the pinned maps for each, so that one clock times both ends.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::Arguments;
use crate::common::observe::Eyes;
use crate::common::world::{BenchService, BenchWorld, ENDPOINTS_OF_A_SLICE};
use crate::laboratory::apiserver::ApiServer;
use crate::laboratory::lab::Lab;
use crate::laboratory::process::Process;

/// What the server's process is told to do: one line of JSON on its stdin, answered by a [`Report`] on its stdout.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum Order {
    /// One endpoint after the other gets another address, so many a second.
    Change { changes: usize, rate: u32, of: Target },
    /// The same as fast as the server can send it.
    Burst { changes: usize },
    /// A new Service, which gets so many endpoints at once.
    Grow { endpoints: usize },
    /// So many Services more, as large as the first ones.
    More { services: usize, endpoints: usize },
}

/// Whose endpoints change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    /// Another Service with each change.
    Every,
    /// The Service that [`Order::Grow`] made.
    Grown,
}

/// How long it took.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// From the event to the row that ends it in the map, in milliseconds: of each change, or of all together.
    pub milliseconds: Vec<f64>,
    /// Until the server had sent everything.
    pub sent: f64,
}

/// The owner's end of a running server. Ends with its owner.
pub struct Server {
    orders: ChildStdin,
    reports: BufReader<ChildStdout>,
    /// Path of the file that leads a daemon to the server.
    pub kubeconfig: PathBuf,
    _process: Process,
}

impl Server {
    /// Starts a server with a whole world on the laboratory's only node.
    pub fn start(lab: &Lab, services: usize, endpoints: usize) -> anyhow::Result<Server> {
        let node = &lab.nodes[0];
        let (services, endpoints) = (services.to_string(), endpoints.to_string());
        let pins = node.pin_path.display().to_string();
        let options = ["--serve", &pins, "--services", &services, "--endpoints", &endpoints];
        let mut process = node.host.spawn(&std::env::current_exe()?, &options)?;
        let (orders, mut reports) = (process.stdin()?, process.stdout()?);
        let mut line = String::new();
        reports.read_line(&mut line).context("the server's address")?;
        let kubeconfig = lab.dir.join("kubeconfig");
        std::fs::write(&kubeconfig, leading_to(line.trim()))?;
        Ok(Server { orders, reports, kubeconfig, _process: process })
    }

    /// Has an order carried out.
    pub fn order(&mut self, order: Order) -> anyhow::Result<Report> {
        writeln!(self.orders, "{}", serde_json::to_string(&order)?).context("giving the server an order")?;
        let mut line = String::new();
        self.reports.read_line(&mut line).context("the server's report")?;
        serde_json::from_str(&line).with_context(|| format!("the server did not carry out {order:?}"))
    }
}

/// A kubeconfig.
fn leading_to(address: &str) -> String {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "lab",
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "node"}}],
        "clusters": [{"name": "lab", "cluster": {"server": format!("http://{address}")}}],
        "users": [{"name": "node", "user": {"token": "a-token"}}],
    })
    .to_string()
}

/// The process itself. Prints its address, and then a report for each order.
pub fn run(pins: &Path, arguments: &Arguments) -> anyhow::Result<()> {
    let services = *arguments.services.first().context("a server without --services")?;
    let world = BenchWorld::new(services, arguments.endpoints);
    let server = ApiServer::new();
    for service in &world.services {
        server.upsert(service.service());
        for index in 0..service.slices() {
            server.upsert(service.slice(index));
        }
    }
    server.upsert(json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": "node1"}}));
    // Nobody has watched yet: what came before is nobody's to resume from, and a second copy of the world.
    server.compact();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let listener = runtime.block_on(tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
    println!("{}", listener.local_addr()?);
    runtime.spawn(server.serve(listener));

    let mut eyes = None;
    let mut cluster = Cluster { server, world, services, made: 0 };
    for order in std::io::stdin().lock().lines() {
        let order = serde_json::from_str(&order.context("reading an order")?)?;
        let eyes = match &eyes {
            Some(eyes) => eyes,
            None => eyes.insert(Eyes::open(pins)?),
        };
        println!("{}", serde_json::to_string(&cluster.carry_out(order, eyes)?)?);
    }
    Ok(())
}

struct Cluster {
    server: ApiServer,
    world: BenchWorld,
    /// Without the grown one, which is the last.
    services: usize,
    /// Changes so far.
    made: usize,
}

/// What one change of an endpoint is.
struct Change {
    service: usize,
    before: Ipv4Addr,
    after: Ipv4Addr,
    slice: serde_json::Value,
}

impl Cluster {
    fn carry_out(&mut self, order: Order, eyes: &Eyes) -> anyhow::Result<Report> {
        match order {
            Order::Change { changes, rate, of } => self.change(changes, rate, of, eyes),
            Order::Burst { changes } => self.burst(changes, eyes),
            Order::Grow { endpoints } => self.grow(endpoints, eyes),
            Order::More { services, endpoints } => self.more(services, endpoints, eyes),
        }
    }

    /// Gives an endpoint another address, in this world only.
    fn next_change(&mut self, of: Target) -> Change {
        // 7,919 is prime: every Service comes before one comes again, and then another of its endpoints changes.
        let (service, at) = match of {
            Target::Every => (self.made * 7919 % self.services, self.made / self.services),
            Target::Grown => (self.services, self.made * 7919),
        };
        self.made += 1;
        let after = self.world.fresh_ip();
        let changed = &mut self.world.services[service];
        let at = at % changed.endpoints.len();
        let before = std::mem::replace(&mut changed.endpoints[at], after);
        Change { service, before, after, slice: changed.slice(at / ENDPOINTS_OF_A_SLICE) }
    }

    fn change(&mut self, changes: usize, rate: u32, of: Target, eyes: &Eyes) -> anyhow::Result<Report> {
        let mut report = Report::default();
        let pause = Duration::from_secs(1) / rate.max(1);
        let mut next = Instant::now();
        for _ in 0..changes {
            let Change { service, before, after, slice } = self.next_change(of);
            let service = &self.world.services[service];
            let slot = eyes.slot_of(service.cluster_ip(), before)?;
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
            let began = Instant::now();
            self.server.upsert(slice);
            eyes.watch_until_slot(service.cluster_ip(), slot, after)?;
            report.milliseconds.push(milliseconds(began.elapsed()));
            eyes.watch_until(service.cluster_ip(), &wanted(service))?;
            next = began + pause;
        }
        Ok(report)
    }

    fn send(&self, slices: Vec<serde_json::Value>) {
        for slice in slices {
            self.server.upsert(slice);
        }
    }

    /// Looks at the last change first: when it is in the maps all others mostly are, so that looking at them does not
    /// count. What counts is when one was last waited for.
    fn burst(&mut self, changes: usize, eyes: &Eyes) -> anyhow::Result<Report> {
        let changes: Vec<Change> = (0..changes).map(|_| self.next_change(Target::Every)).collect();
        let (order, slices): (Vec<usize>, Vec<_>) = changes.into_iter().map(|c| (c.service, c.slice)).unzip();
        let began = Instant::now();
        self.send(slices);
        let sent = began.elapsed();
        let mut last = sent;
        let mut seen = BTreeSet::new();
        for service in order.into_iter().rev().filter(|service| seen.insert(*service)) {
            let service = &self.world.services[service];
            let wanted = wanted(service);
            if !eyes.leads_to(service.cluster_ip(), &wanted)? {
                eyes.watch_until(service.cluster_ip(), &wanted)?;
                last = began.elapsed();
            }
        }
        Ok(Report { milliseconds: vec![milliseconds(last)], sent: milliseconds(sent) })
    }

    fn more(&mut self, services: usize, endpoints: usize, eyes: &Eyes) -> anyhow::Result<Report> {
        let first = self.world.services.len();
        for number in first..first + services {
            let endpoints = (0..endpoints).map(|_| self.world.fresh_ip()).collect();
            self.world.services.push(BenchService { number, endpoints });
        }
        let began = Instant::now();
        for service in &self.world.services[first..] {
            self.server.upsert(service.service());
            self.send((0..service.slices()).map(|index| service.slice(index)).collect());
        }
        let sent = began.elapsed();
        for service in self.world.services[first..].iter().rev() {
            eyes.watch_until(service.cluster_ip(), &wanted(service))?;
        }
        Ok(Report { milliseconds: vec![milliseconds(began.elapsed())], sent: milliseconds(sent) })
    }

    /// The Service is there before its endpoints are, which come in slices as the controller makes them.
    fn grow(&mut self, endpoints: usize, eyes: &Eyes) -> anyhow::Result<Report> {
        let endpoints = (0..endpoints).map(|_| self.world.fresh_ip()).collect();
        let service = BenchService { number: self.services, endpoints };
        self.server.upsert(service.service());
        eyes.wait_for_frontend(service.cluster_ip())?;
        let slices: Vec<_> = (0..service.slices()).map(|index| service.slice(index)).collect();
        let wanted = wanted(&service);
        let began = Instant::now();
        self.send(slices);
        let sent = began.elapsed();
        eyes.watch_until(service.cluster_ip(), &wanted)?;
        let took = began.elapsed();
        self.world.services.push(service);
        Ok(Report { milliseconds: vec![milliseconds(took)], sent: milliseconds(sent) })
    }
}

fn wanted(service: &BenchService) -> BTreeSet<Ipv4Addr> {
    service.endpoints.iter().copied().collect()
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
