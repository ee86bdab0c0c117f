//! Connections to a NodePort, while somebody listens and while nobody does.

use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use crate::common::{Sample, netperf, print_table};
use crate::laboratory::daemon::Daemon;
use crate::laboratory::lab::{Lab, Place};
use crate::laboratory::manifests::{Endpoint, Manifests, port, service, slice};
use crate::laboratory::process::Process;
use crate::laboratory::{eventually, kubelane_binary, netns};

const NODE: &str = "172.31.0.11";
/// Control and data port, of the pod and of the NodePort.
const PORTS: (u16, u16) = (30_210, 31_210);

/// How somebody listens.
const LISTENERS: [(&str, Option<&[&str]>); 4] = [
    ("nobody", None),
    ("no flags", Some(&[])),
    ("--rate 0", Some(&["--rate", "0"])),
    ("--verdict dropped", Some(&["--verdict", "dropped"])),
];

pub fn measure(rounds: usize, transactions: u32, processors: &[u32]) -> Result<()> {
    let &[client, server] = processors else { bail!("--processors takes two numbers: 0,1") };
    let programs = netperf()?;
    let lab = Lab::new(&[("node1", &["server"])])?;
    let manifests = lay_service(&lab);
    let _daemon = Daemon::start(&lab, "node1", &manifests.dir)?;
    let outside = lab.outside_place()?;
    for place in [lab.pod("server"), &outside] {
        netns::sysctl(place.netns(), &[("ipv4/tcp_max_tw_buckets", "0")])?;
    }
    let control = PORTS.0.to_string();
    let netserver = programs.join("netserver").display().to_string();
    let arguments = ["-c", &server.to_string(), &netserver, "-D", "-4", "-p", &control];
    let _server = spawn(lab.pod("server"), "taskset", &arguments)?;
    let to = (NODE.parse::<std::net::Ipv4Addr>()?, PORTS.0);
    let listens = || outside.inside(|| Ok(std::net::TcpStream::connect(to)?)).is_ok();
    if !eventually(Duration::from_secs(10), listens) {
        bail!("netserver does not answer at the NodePort");
    }
    let options = format!(
        "-4 -H {NODE} -p {control} -t TCP_CRR -l -{transactions} -T {client},{server} -P 0 -v 0 -- -P ,{} -r 1,1",
        PORTS.1
    );
    let netperf = programs.join("netperf").display().to_string();
    let options: Vec<&str> = options.split(' ').collect();
    let rate = || run(&outside, &netperf, &options);
    rate()?;
    let mut all: Vec<[f64; LISTENERS.len()]> = Vec::new();
    for number in 0..rounds {
        let mut round = [f64::NAN; LISTENERS.len()];
        for turn in 0..LISTENERS.len() {
            // Each is first, in the middle and last in turn.
            let at = (turn + number) % LISTENERS.len();
            let monitor = LISTENERS[at].1.map(|flags| listen(&lab, flags)).transpose()?;
            round[at] = rate()?;
            // It gives its place back, which a process that is killed does not.
            monitor.map(|mut monitor| monitor.terminate(Duration::from_secs(5))).transpose()?;
        }
        all.push(round);
    }
    let row = |at: usize| {
        let ratio = Sample::new(all.iter().map(|round| round[at] / round[0]));
        let rate = Sample::new(all.iter().map(|round| round[at])).median();
        let (median, low, high) = (ratio.median(), ratio.percentile(25.0), ratio.percentile(75.0));
        vec![LISTENERS[at].0.to_owned(), format!("{rate:.0}/s"), format!("{median:.4} [{low:.4}, {high:.4}]")]
    };
    println!(
        "TCP_CRR from outside to a NodePort, a pod of this node; {rounds} rounds of {transactions} transactions:\n"
    );
    let rows: Vec<Vec<String>> = (0..LISTENERS.len()).map(row).collect();
    print_table(&["who listens", "transactions (median)", "of those without [quartiles]"], &rows);
    Ok(())
}

fn lay_service(lab: &Lab) -> Manifests {
    let manifests = Manifests::new(lab.dir.join("manifests"));
    let ports = [("control", "TCP", PORTS.0), ("data", "TCP", PORTS.1)];
    let service_port = |(name, protocol, number): &(&str, &str, u16)| {
        let mut port = port(name, protocol, *number);
        port["nodePort"] = json!(number);
        port
    };
    let service_ports: Vec<_> = ports.iter().map(service_port).collect();
    let spec = json!({"clusterIP": "10.96.0.77", "type": "NodePort", "ports": service_ports});
    let endpoint = Endpoint::ready(lab.pod("server").v4.into(), "node1");
    manifests.save("netperf", &[service("netperf", spec), slice("netperf-1", "netperf", &ports, &[endpoint])]);
    manifests
}

/// Transactions a second.
fn run(place: &Place, netperf: &str, options: &[&str]) -> Result<f64> {
    let mut process = spawn(place, netperf, options)?;
    let mut said = String::new();
    process.stdout()?.read_to_string(&mut said).context("reading what netperf says")?;
    said.trim().parse().with_context(|| format!("netperf said {said:?}"))
}

/// With the processor whenever it wants it, so that what else runs on the machine disturbs less.
fn spawn(place: &Place, program: &str, arguments: &[&str]) -> Result<Process> {
    place.spawn(Path::new("chrt"), &[&["--fifo", "10", program], arguments].concat())
}

/// A monitor that listens, and whose lines are read.
fn listen(lab: &Lab, flags: &[&str]) -> Result<Process> {
    let node = lab.node("node1");
    let pins = node.pin_path.display().to_string();
    let log = lab.dir.join("node1.log");
    let count = || std::fs::read_to_string(&log).unwrap_or_default().matches("listening to ").count();
    let before = count();
    let arguments = [&["monitor", "--pin-path", &pins], flags].concat();
    let mut monitor = node.host.spawn(&kubelane_binary()?, &arguments)?;
    if !eventually(Duration::from_secs(20), || count() > before) {
        bail!("the monitor does not listen; {}", node.host.log_tail());
    }
    let mut stdout = monitor.stdout()?;
    std::thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
    Ok(monitor)
}
