//! How many events a second one monitor shows.

use std::io::Read as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use kubelane::bpf::run::run;
use kubelane::bpf::{Direction, Listening, Wanted};
use kubelane::model::Protocol;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::print_table;
use crate::laboratory::packets::frame::{Frame, RST, tcp};
use crate::laboratory::packets::{CLIENT4, LOCAL4, NODE4, Node};
use crate::laboratory::{eventually, kubelane_binary};

const RATES: [u32; 4] = [50_000, 100_000, 200_000, 400_000];
const FOR: Duration = Duration::from_secs(2);
const STEP: Duration = Duration::from_millis(2);

/// A packet that is dropped: a reset of no flow.
fn packet() -> Frame {
    tcp((CLIENT4, 5000), (NODE4, 30080), RST)
}

pub fn measure() -> Result<()> {
    std::thread::scope(|scope| scope.spawn(measure_on_a_node).join().expect("it does not panic"))
}

/// The calling thread moves into the node's namespace for good.
fn measure_on_a_node() -> Result<()> {
    let mut node = Node::new();
    node.backend(1, LOCAL4, 80, Protocol::Tcp, true);
    node.frontend("0.0.0.0", 30080, Protocol::Tcp, &[1]);
    println!("Events of one kind, shown by one `kubelane monitor --rate 0` on a processor of its own:\n");
    let mut rows = Vec::new();
    for output in ["compact", "json"] {
        for rate in RATES {
            rows.push(one(&mut node, output, rate)?);
        }
    }
    print_table(&["output", "events a second", "shown", "lost", "monitor's processor time"], &rows);
    cost(&mut node)
}

fn one(node: &mut Node, output: &str, rate: u32) -> Result<Vec<String>> {
    let pins = node.pin_path.display().to_string();
    let mut monitor = Command::new("taskset")
        .args(["-c", "0"])
        .arg(kubelane_binary()?)
        .args(["monitor", "--rate", "0", "-o", output, "--pin-path", &pins])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let used = || used(monitor.id());
    std::thread::sleep(Duration::from_secs(3));
    let (before, began) = (used()?, Instant::now());
    let mut sent = 0u64;
    while began.elapsed() < FOR {
        // As many as are due: whoever was held up makes up for it.
        let due = (began.elapsed().as_secs_f64() * f64::from(rate)) as u64 - sent;
        if due > 0 {
            run(node.datapath.devices(), Direction::In, &packet().bytes(), node.uplink, due as u32)?;
        }
        sent += due;
        std::thread::sleep(STEP);
    }
    let took = began.elapsed();
    let busy = used()?.saturating_sub(before);
    kill(Pid::from_raw(monitor.id() as i32), Signal::SIGTERM)?;
    let mut said = String::new();
    monitor.stderr.take().context("its standard error")?.read_to_string(&mut said)?;
    eventually(Duration::from_secs(5), || matches!(monitor.try_wait(), Ok(Some(_))));
    let summary = said.lines().last().unwrap_or_default().to_owned();
    let shown: u64 = summary.split(' ').next().and_then(|n| n.parse().ok()).with_context(|| said.clone())?;
    Ok(vec![
        output.to_owned(),
        format!("{:.0}", sent as f64 / took.as_secs_f64()),
        shown.to_string(),
        (sent - shown).to_string(),
        format!("{:.0} %", 100.0 * busy.as_secs_f64() / took.as_secs_f64()),
    ])
}

/// Processor time of a process so far.
fn used(process: u32) -> Result<Duration> {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).context("reading the monitor's stat")?;
    let fields: Vec<&str> = text.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    // utime and stime: fields 14 and 15 of all, in hundredths of a second.
    let ticks: u64 = fields.iter().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    Ok(Duration::from_millis(10 * ticks))
}

/// Nanoseconds of a packet that is one event.
fn cost(node: &mut Node) -> Result<()> {
    let everything = Wanted { numbers: u64::MAX, protocol: 0, from: None, to: None, port: 0, one_in: 1, rate: 0 };
    let ways: [(&str, Option<Wanted>); 4] = [
        ("nobody listens", None),
        ("somebody listens to something else", Some(Wanted { numbers: 1, ..everything })),
        ("beyond the rate", Some(Wanted { rate: 1, ..everything })),
        ("told", Some(everything)),
    ];
    let mut best = [f64::INFINITY; 4];
    for _ in 0..15 {
        for ((_, wanted), best) in ways.iter().zip(&mut best) {
            let mut listening = wanted.map(|wanted| Listening::open(&node.pin_path, wanted)).transpose()?;
            for _ in 0..20 {
                let (devices, uplink) = (node.datapath.devices(), node.uplink);
                let outcome = run(devices, Direction::In, &packet().bytes(), uplink, 1000)?;
                *best = best.min(outcome.duration.as_nanos() as f64);
                if let Some(listening) = &mut listening {
                    listening.read(100_000)?;
                }
            }
        }
    }
    println!("Nanoseconds of a packet that is dropped, which is one event (the lowest of 300 times 1000):\n");
    let row = |((name, _), best): (&(&str, Option<Wanted>), &f64)| vec![(*name).to_owned(), format!("{best:.0} ns")];
    print_table(&["", "packet"], &ways.iter().zip(&best).map(row).collect::<Vec<_>>());
    Ok(())
}
