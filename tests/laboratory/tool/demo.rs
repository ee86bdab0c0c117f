//! `make demo`: two nodes, pods of both kinds, a daemon on each node, and what an operator wants to see. Every figure that it
//! prints was measured in this run; it fails when something that it shows does not hold.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use crate::http;
use crate::laboratory::client::Counts;
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::lab::{Lab, Place};
use crate::laboratory::load::{Load, failures, now_micros};
use crate::laboratory::manifests::{save_by_rename, without_endpoint};
use crate::laboratory::messages::{Kind, LoadRecord};
use crate::laboratory::process::Process;
use crate::laboratory::signals;
use crate::laboratory::tap::{TapPod, Wiring};
use crate::laboratory::{eventually, preflight};

/// As in manifests/demo.
const WEB: [&str; 2] = ["10.96.0.80:80", "[fd96::80]:80"];
const NODE_PORT: u16 = 30080;
const BALANCED: [&str; 2] = ["192.0.2.80:80", "[2001:db8::80]:80"];
const ECHO: [&str; 2] = ["10.96.0.7:7", "[fd96::7]:7"];
const WEB_PODS: [&str; 3] = ["web-1", "web-2", "web-3"];
const ECHO_PODS: [&str; 3] = ["echo-1", "echo-2", "echo-3"];
/// The web pod that is taken away.
const REMOVED: &str = "web-2";
/// Requests of one row of the table.
const REQUESTS: u32 = 300;
/// From the save of a file to its effect; what it really took is printed.
const EFFECT: Duration = Duration::from_secs(1);

pub fn run(manifests: &Path) -> anyhow::Result<()> {
    preflight().context("the demo cannot run here")?;
    if !manifests.join("web.yaml").exists() {
        bail!("no web.yaml in {}: run the demo from the repository, or name the directory", manifests.display());
    }
    signals::clean_up(|| ())?;
    let began = Instant::now();
    let mut report = Report::default();
    let lab = Lab::new(&[
        ("node1", &["client-1", "web-1", "echo-1", "echo-2"]),
        ("node2", &["client-2", "web-2", "web-3", "echo-3"]),
    ])?;
    let servers = lay_out(&lab, began)?;
    let directory = copy_manifests(manifests, &lab.dir.join("manifests"))?;
    let daemons = start_daemons(&lab, &directory)?;
    spread(&lab, &mut report)?;
    machine(&lab, &mut report)?;
    outside(&lab, &mut report)?;
    datagrams(&lab, &mut report)?;
    removal(&lab, &directory, &mut report)?;
    crash(&lab, &directory, daemons, &mut report)?;
    show_services(&lab)?;
    cleanup(&lab, &mut report)?;
    drop(servers);
    drop(lab);
    println!("\n{} checks, {} failed, {:.1} s.", report.checks, report.failed, began.elapsed().as_secs_f64());
    if report.failed > 0 { bail!("{} of {} checks failed", report.failed, report.checks) } else { Ok(()) }
}

/// What held and what did not.
#[derive(Default)]
struct Report {
    checks: u32,
    failed: u32,
}

impl Report {
    fn check(&mut self, holds: bool, what: &str) {
        self.checks += 1;
        self.failed += u32::from(!holds);
        println!("   {} {what}", if holds { "ok    " } else { "FAILED" });
    }
}

fn step(title: &str) {
    println!("\n== {title}");
}

fn lay_out(lab: &Lab, began: Instant) -> anyhow::Result<Vec<Process>> {
    step("Two nodes, pods in network namespaces of their own");
    let mut servers = Vec::new();
    for node in &lab.nodes {
        println!("   {} {} {}", node.name, node.host.v4, node.host.v6);
        for pod in &node.pods {
            let role = match pod.name.split('-').next() {
                Some("web") => "HTTP server on port 8080",
                Some("echo") => "UDP server on port 9000",
                _ => "client",
            };
            println!("     {:9} {:12} {:16} {role}", pod.name, pod.v4, pod.v6);
            if role != "client" {
                servers.push(pod.serve("--http 8080 --udp 9000")?);
            }
        }
    }
    println!("   laid out in {} ms", began.elapsed().as_millis());
    Ok(servers)
}

fn copy_manifests(from: &Path, to: &Path) -> anyhow::Result<PathBuf> {
    fs::create_dir_all(to).with_context(|| format!("creating {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("reading {}", from.display()))? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name())).context("copying the manifests")?;
    }
    Ok(to.to_owned())
}

fn start_daemons<'a>(lab: &'a Lab, directory: &Path) -> anyhow::Result<Vec<Daemon<'a>>> {
    step("kubelane run --source dir:manifests/demo (a copy) on each node");
    let mut daemons = Vec::new();
    for node in &lab.nodes {
        let daemon = Daemon::start(lab, &node.name, directory)?;
        println!("   {} ready {} ms after its start", node.name, daemon.ready_after.as_millis());
        daemons.push(daemon);
    }
    Ok(daemons)
}

/// Requests to the cluster IP, from pods and from a node, by both families.
fn spread(lab: &Lab, report: &mut Report) -> anyhow::Result<()> {
    step("HTTP requests to the cluster IP, each on a new connection, by who answered");
    tell_head();
    let (mut even, mut failed) = (true, 0);
    for place in [lab.pod("client-1"), lab.pod("client-2"), &lab.node("node1").host] {
        let mut client = place.client()?;
        for to in WEB {
            let (is_even, lost) = tell_row(&place.name, to, &client.http(address(to)?, REQUESTS));
            (even, failed) = (even & is_even, failed + lost);
        }
    }
    report.check(failed == 0, &format!("{failed} requests failed"));
    report.check(even, "every row is spread over all three pods, on both nodes");
    Ok(())
}

fn tell_head() {
    println!("   {:10} {:16} {:>6} {:>6} {:>6} {:>7}", "from", "to", WEB_PODS[0], WEB_PODS[1], WEB_PODS[2], "failed");
}

/// Prints who answered: whether all did, and about as often, and how many requests failed.
fn tell_row(from: &str, to: &str, counts: &Counts) -> (bool, u32) {
    let row = WEB_PODS.map(|pod| counts.get(pod).copied().unwrap_or(0));
    let lost = REQUESTS - row.iter().sum::<u32>();
    println!("   {from:10} {to:16} {:6} {:6} {:6} {lost:7}", row[0], row[1], row[2]);
    tell_failures(counts, &WEB_PODS);
    // A fair choice gives each a third; one in six is beyond any chance at this number.
    (row.iter().all(|count| *count >= REQUESTS / 6), lost)
}

/// Requests of a pod whose sockets this kernel has never seen, as those of a virtual machine.
fn machine(lab: &Lab, report: &mut Report) -> anyhow::Result<()> {
    step("HTTP requests of a pod that is no process of this kernel: a TCP/IP stack in userspace on a tap");
    let mut pod = TapPod::start(lab, "node1", "machine", 20, Wiring::Bridged, "")?;
    let mut served = Ok(false);
    eventually(PATIENCE, || {
        served = pod.is_served(lab, "node1");
        !matches!(served, Ok(false))
    });
    report.check(served?, &format!("node1 serves the new device {}", pod.device));
    tell_head();
    let (mut even, mut failed) = (true, 0);
    for to in WEB {
        let (is_even, lost) = tell_row(&pod.name, to, &pod.client.http(address(to)?, REQUESTS));
        (even, failed) = (even & is_even, failed + lost);
    }
    report.check(failed == 0 && even, &format!("{failed} requests failed, and they are spread over all three pods"));
    for (kind, to) in [(Kind::Udp4, address(ECHO[0])?), (Kind::Udp6, address(ECHO[1])?)] {
        let many = pod.client.ask_unconnected(kind, to, 150);
        let all = many.len() == 3 && ECHO_PODS.iter().all(|pod| many.contains_key(*pod));
        report.check(all, &format!("{to}: one datagram each of 150 sockets: {}", sentence(&many)));
    }
    Ok(())
}

/// Requests from outside both nodes, as a load balancer or a user's browser makes them.
fn outside(lab: &Lab, report: &mut Report) -> anyhow::Result<()> {
    step("HTTP requests from outside both nodes, to NodePorts and the load balancer IPs, by who answered");
    let nodes: Vec<SocketAddr> =
        lab.nodes.iter().flat_map(|node| node.host.addresses()).map(|ip| SocketAddr::new(ip, NODE_PORT)).collect();
    for network in ["192.0.2.80/32", "2001:db8::80/128"] {
        lab.route_outside(network, "node1")?;
    }
    println!("   {:22} {:>6} {:>6} {:>6} {:>7}", "to", WEB_PODS[0], WEB_PODS[1], WEB_PODS[2], "failed");
    let (mut even, mut failed) = (true, 0);
    for to in nodes.into_iter().chain([address(BALANCED[0])?, address(BALANCED[1])?]) {
        let mut counts = Counts::new();
        lab.outside(|| {
            for _ in 0..REQUESTS {
                let name = http::get(to).unwrap_or_else(|error| http::error_name(&error));
                *counts.entry(name).or_insert(0) += 1;
            }
            Ok(())
        })?;
        let row = WEB_PODS.map(|pod| counts.get(pod).copied().unwrap_or(0));
        let lost = REQUESTS - row.iter().sum::<u32>();
        println!("   {:22} {:6} {:6} {:6} {lost:7}", to.to_string(), row[0], row[1], row[2]);
        tell_failures(&counts, &WEB_PODS);
        failed += lost;
        even &= row.iter().all(|count| *count >= REQUESTS / 6);
    }
    report.check(failed == 0, &format!("{failed} requests failed"));
    report.check(even, "every row is spread over all three pods, on both nodes");
    Ok(())
}

/// What failures were, for a reader who has to find out why.
fn tell_failures(counts: &Counts, pods: &[&str]) {
    for (name, count) in counts.iter().filter(|(name, _)| !pods.contains(&name.as_str())) {
        println!("      {count} times: {name}");
    }
}

fn datagrams(lab: &Lab, report: &mut Report) -> anyhow::Result<()> {
    step("UDP by unconnected sockets");
    let mut client = lab.pod("client-1").client()?;
    for (kind, to) in [(Kind::Udp4, address(ECHO[0])?), (Kind::Udp6, address(ECHO[1])?)] {
        let mut one = BTreeMap::new();
        let number = client.open(kind).map_err(anyhow::Error::msg)?.number();
        for _ in 0..50 {
            let answer = client.socket(number).ask_at(to);
            let label = match answer {
                Ok((name, from)) if from == to => name,
                Ok((name, from)) => format!("{name} from {from}"),
                Err(errno) => errno,
            };
            *one.entry(label).or_insert(0) += 1;
        }
        let sticky = one.len() == 1 && ECHO_PODS.contains(&one.keys().next().map_or("", |name| name.as_str()));
        report.check(sticky, &format!("{to}: 50 datagrams of one socket: {}", sentence(&one)));
        let many = client.ask_unconnected(kind, to, 150);
        let all = many.len() == 3 && ECHO_PODS.iter().all(|pod| many.contains_key(*pod));
        report.check(all, &format!("{to}: one datagram each of 150 sockets: {}", sentence(&many)));
    }
    println!("   (an answer counts only when it came from the service's address)");
    Ok(())
}

fn sentence(counts: &Counts) -> String {
    counts.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
}

/// A pod is taken out of the slices while requests flow.
fn removal(lab: &Lab, directory: &Path, report: &mut Report) -> anyhow::Result<()> {
    step(&format!("{REMOVED} is taken out of web.yaml (a new file renamed over it) while requests flow"));
    let mut loads = Vec::new();
    for (place, to) in [(lab.pod("client-1"), WEB[0]), (lab.pod("client-2"), WEB[1])] {
        loads.push((place, to, Load::start(place, address(to)?)?));
    }
    std::thread::sleep(Duration::from_millis(1500));
    let file = directory.join("web.yaml");
    let before = fs::read_to_string(&file).context("reading web.yaml")?;
    let pod = lab.pod(REMOVED);
    let after = pod.addresses().iter().fold(before, |text, address| without_endpoint(&text, &address.to_string()));
    save_by_rename(&file, &after);
    let saved = now_micros()?;
    std::thread::sleep(EFFECT + Duration::from_millis(1500));
    for (place, to, load) in loads {
        judge_removal(place, to, &load.finish()?, saved, report);
    }
    let listed = lab.node("node1").get("backends", &[])?;
    report.check(!listed.contains(&pod.v4.to_string()), "`kubelane get backends` no longer lists it");
    Ok(())
}

fn judge_removal(place: &Place, to: &str, records: &[LoadRecord], saved: u64, report: &mut Report) {
    let reached = |record: &&LoadRecord| record.result.as_deref() == Ok(REMOVED);
    let (old, new): (Vec<_>, Vec<_>) = records.iter().partition(|record| record.began < saved);
    let whence = format!("{} to {to}", place.name);
    report.check(all_served(records), &format!("{whence}: {}", outcome(records)));
    let share = old.iter().copied().filter(reached).count();
    report.check(share > 0, &format!("{whence}: before the save {share} of {} reached {REMOVED}", old.len()));
    let late: Vec<&LoadRecord> = new.iter().copied().filter(reached).collect();
    let last = late.last().map_or(String::new(), |record| {
        format!(", the last begun {:.1} ms after it", (record.began - saved) as f64 / 1000.0)
    });
    let in_time = late.last().is_none_or(|record| u128::from(record.began - saved) < EFFECT.as_micros());
    let (late, new) = (late.len(), new.len());
    report.check(in_time && new > 0, &format!("{whence}: after the save {late} of {new} reached it{last}"));
}

fn all_served(records: &[LoadRecord]) -> bool {
    !records.is_empty() && records.iter().all(|record| record.result.is_ok())
}

/// "300 requests, 2 failed: ECONNREFUSED"
fn outcome(records: &[LoadRecord]) -> String {
    let failed = records.iter().filter(|record| record.result.is_err()).count();
    let kinds: Vec<&str> = failures(records).into_iter().map(String::as_str).collect();
    let colon = if kinds.is_empty() { "" } else { ": " };
    format!("{} requests, {failed} failed{colon}{}", records.len(), kinds.join(", "))
}

/// A daemon that is killed is not missed, and finds its way back.
fn crash(lab: &Lab, directory: &Path, daemons: Vec<Daemon>, report: &mut Report) -> anyhow::Result<()> {
    step("kill -9 of both daemons while requests flow, then a new start");
    let load = Load::start(lab.pod("client-1"), address(WEB[0])?)?;
    std::thread::sleep(Duration::from_millis(300));
    daemons.into_iter().for_each(Daemon::kill);
    std::thread::sleep(Duration::from_millis(700));
    let daemons = start_daemons_again(lab, directory)?;
    std::thread::sleep(Duration::from_millis(300));
    let records = load.finish()?;
    report.check(all_served(&records), &outcome(&records));
    for daemon in daemons {
        let (name, ready) = (daemon.node.name.clone(), daemon.ready_after.as_millis());
        let status = daemon.terminate()?;
        report.check(status.success(), &format!("{name} was ready again after {ready} ms; told to stop: {status}"));
    }
    Ok(())
}

fn start_daemons_again<'a>(lab: &'a Lab, directory: &Path) -> anyhow::Result<Vec<Daemon<'a>>> {
    lab.nodes.iter().map(|node| Daemon::start(lab, &node.name, directory)).collect()
}

fn show_services(lab: &Lab) -> anyhow::Result<()> {
    step("kubelane get services (node1)");
    for line in lab.node("node1").get("services", &[])?.lines() {
        println!("   {line}");
    }
    Ok(())
}

fn cleanup(lab: &Lab, report: &mut Report) -> anyhow::Result<()> {
    step("kubelane cleanup");
    for node in &lab.nodes {
        node.cleanup()?;
        let left = fs::read_dir(&node.pin_path).map_or(0, Iterator::count);
        report.check(left == 0, &format!("{}: {left} pins left", node.name));
    }
    let mut client = lab.pod("client-1").client()?;
    // Nothing translates any more, and nothing routes a cluster IP: no pod may answer.
    let counts = client.ask(Kind::Udp4, SocketAddr::from(([10, 96, 0, 7], 7)), 1);
    let silent = !counts.keys().any(|name| ECHO_PODS.contains(&name.as_str()));
    let came = if silent { "no answer".to_owned() } else { sentence(&counts) };
    report.check(silent, &format!("the cluster IP is an address like any other again: a datagram gets {came}"));
    Ok(())
}

fn address(text: &str) -> anyhow::Result<SocketAddr> {
    text.parse().with_context(|| format!("{text} is not an address"))
}
