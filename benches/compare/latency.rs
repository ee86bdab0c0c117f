//! How long a first connection takes: percentiles of connect(2), at different numbers of Services.
//!
//! The laboratories of all modes and of all numbers of Services are there at the same time and take turns in short
//! chunks, so that the machine's mood is in all of them. Chunks are shorter than a second: of each one, the kernel keeps
//! 50 ms from processes in real time (sched_rt_runtime_us), which would be somebody's p99.9.

use std::io::Read as _;
use std::net::SocketAddrV4;

use anyhow::{Context as _, bail};

use crate::common::Sample;
use crate::connect::{self, WARM_UP};
use crate::laboratory::lab::Place;
use crate::laboratory::process::Process;
use crate::mode::{Mode, Served};
use crate::path::Path;
use crate::run::{PRIORITY, spawn, trouble};

/// Ways whose first packet goes through all that a mode has.
pub const PATHS: [Path; 3] = [Path::ClusterIpRemote, Path::NodePortRemote, Path::PacketPod];

/// The first source port: the machine chooses from here on.
const FIRST_PORT: u16 = 32_768;

/// How much is measured.
#[derive(Clone, Copy)]
pub struct Extent {
    /// Connections of a chunk.
    pub connections: u16,
    /// Rounds in which each laboratory has a chunk on each path.
    pub rounds: u16,
    /// Processors of client and server.
    pub processors: (u32, u32),
}

impl Extent {
    /// Each connection of a client has a source port of its own.
    fn check(self) -> anyhow::Result<()> {
        let ports = (u32::from(self.connections) + u32::from(WARM_UP)) * u32::from(self.rounds);
        let most = u32::from(u16::MAX - FIRST_PORT);
        if ports > most {
            bail!("{ports} first connections of one client are more than its {most} ports");
        }
        Ok(())
    }
}

/// The connections of one mode, at one number of Services, on one path.
pub struct Latency {
    pub mode: Mode,
    /// Services beside those that are measured.
    pub others: usize,
    pub path: Path,
    /// Microseconds of each connection, a list for each round; empty when the round's chunk was spoiled.
    pub rounds: Vec<Sample>,
}

impl Latency {
    /// All connections together.
    pub fn all(&self) -> Sample {
        Sample::new(self.rounds.iter().flat_map(Sample::values))
    }

    /// How many chunks were thrown away.
    pub fn spoiled(&self) -> usize {
        self.rounds.iter().filter(|round| round.len() == 0).count()
    }

    /// The rounds' ratios of a percentile.
    pub fn ratio(&self, to: &Latency, percent: f64) -> Sample {
        let rounds = self.rounds.iter().zip(&to.rounds).filter(|(of, to)| of.len() > 0 && to.len() > 0);
        Sample::new(rounds.map(|(of, to)| of.percentile(percent) / to.percentile(percent)))
    }
}

/// Measures all sides on all paths, and adds them to `all`: also those of a path on which something failed.
pub fn measure(served: &[Served], extent: Extent, all: &mut Vec<Latency>) -> anyhow::Result<()> {
    extent.check()?;
    for path in PATHS {
        let sides: Vec<&Served> = served.iter().filter(|served| served.mode.has(path)).collect();
        let _servers = sides.iter().map(|side| serve(side, path, extent)).collect::<anyhow::Result<Vec<_>>>()?;
        let fresh = |side: &&Served| Latency { mode: side.mode, others: side.others, path, rounds: Vec::new() };
        let mut latencies: Vec<Latency> = sides.iter().map(fresh).collect();
        let outcome = rounds(&sides, path, extent, &mut latencies);
        for latency in &latencies {
            println!("{:6} others  {path:24} {:8} first connections: {}", latency.others, latency.mode, line(latency));
        }
        all.extend(latencies);
        outcome?;
    }
    Ok(())
}

fn rounds(sides: &[&Served], path: Path, extent: Extent, latencies: &mut [Latency]) -> anyhow::Result<()> {
    for round in 0..extent.rounds {
        for turn in 0..sides.len() {
            // Each side is first, in the middle and last in turn.
            let at = (turn + usize::from(round)) % sides.len();
            let first_port = FIRST_PORT + round * (extent.connections + WARM_UP);
            latencies[at].rounds.push(chunk(sides[at], path, extent, first_port)?);
        }
    }
    Ok(())
}

/// An error when a side has lost more than half of its chunks: what is left of it may be the luckier half.
pub fn check(latencies: &[Latency]) -> anyhow::Result<()> {
    let too_few = |latency: &&Latency| 2 * latency.spoiled() > latency.rounds.len();
    let tell = |latency: &Latency| {
        let Latency { mode, others, path, rounds } = latency;
        format!("{mode} beside {others} others, {path}: {} of {}", latency.spoiled(), rounds.len())
    };
    let lines: Vec<String> = latencies.iter().filter(too_few).map(tell).collect();
    if lines.is_empty() {
        return Ok(());
    }
    bail!("more than half of the chunks of first connections were thrown away:\n  {}", lines.join("\n  "))
}

fn line(latency: &Latency) -> String {
    let all = latency.all();
    if all.len() == 0 {
        return "none".to_owned();
    }
    let percentiles = [50.0, 90.0, 99.0, 99.9].map(|percent| format!("p{percent} {:.0} µs", all.percentile(percent)));
    format!("{}  of {}", percentiles.join("  "), all.len())
}

/// The server of a path: each path has a port of its own.
fn serve(side: &Served, path: Path, extent: Extent) -> anyhow::Result<Process> {
    let options = connect::server(path.ports().1);
    let mut server = start(side.lab.pod(path.target().pod), extent.processors.1, &options)?;
    server.wait_ready("a server of first connections")?;
    Ok(server)
}

/// Microseconds of each connection of one chunk; none when something went wrong on the way.
fn chunk(side: &Served, path: Path, extent: Extent, first_port: u16) -> anyhow::Result<Sample> {
    let to = SocketAddrV4::new(side.address(path), path.ports().1);
    let options = connect::client(to, extent.connections, first_port);
    let before = trouble(side.lab)?;
    let client = path.client(side.lab)?;
    let mut process = start(&client, extent.processors.0, &options)?;
    let mut said = String::new();
    process.stdout()?.read_to_string(&mut said).context("reading what the client says")?;
    let status = process.wait()?;
    let moved = trouble(side.lab)?.since(&before, &[]);
    let why = match (connect::times(&said, status.success()), moved) {
        (Ok(times), None) => return Ok(Sample::new(times)),
        (Ok(_), Some(moved)) => moved,
        (Err(said), None) => format!("the client ended with {status}: {said}"),
        (Err(said), Some(moved)) => format!("the client ended with {status}: {said}; {moved}"),
    };
    println!("{:6} others  {path:24} {:8} a chunk THROWN AWAY: {why}", side.others, side.mode);
    Ok(Sample::default())
}

/// Starts this program with other options, pinned and in real time as netperf is.
fn start(place: &Place, processor: u32, options: &[String]) -> anyhow::Result<Process> {
    let (processor, program) = (processor.to_string(), std::env::current_exe()?.display().to_string());
    let mut arguments = vec!["-c", &processor, &program];
    arguments.extend(options.iter().map(String::as_str));
    spawn(place, PRIORITY, "taskset", &arguments)
}
