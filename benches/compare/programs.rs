//! The kernel's run statistics of kubelane's programs under netperf's load, beside their targets.

use std::fmt::Write as _;

use crate::common::programs::{self, Mean, Watched};
use crate::common::table;
use crate::mode::{Mode, Served};
use crate::path::Path;
use crate::run::{Netperf, Run, Test};

/// What a program took while one test went along one path.
pub struct Ran {
    /// Services beside those that are measured.
    pub others: usize,
    pub path: Path,
    pub test: Test,
    pub mean: Mean,
}

/// Tests that are run once more on each path: each packet that makes a connection, each of those that follow, and
/// datagrams, each of which a program of the socket meets.
const TESTS: [&str; 3] = ["TCP_CRR", "TCP_RR", "UDP_RR"];

/// Runs of a program that are too few to have a mean: connections of netperf's own.
const FEW: u64 = 1000;

/// How many times as long as others these runs are.
const LONGER: u32 = 5;

/// One more run of the tests on each path, in kubelane's mode: what its programs take. Without that mode, nothing.
pub fn measure(netperf: &Netperf, served: &[Served], others: usize, paths: &[Path]) -> anyhow::Result<Vec<Ran>> {
    let Some(kubelane) = served.iter().find(|served| served.mode == Mode::Kubelane) else { return Ok(Vec::new()) };
    let nodes: Vec<Watched> = kubelane.lab.nodes.iter().map(|node| (&*node.name, &*node.pin_path)).collect();
    let mut all = Vec::new();
    for path in paths {
        for test in Test::ALL.into_iter().filter(|test| TESTS.contains(&test.name)) {
            let means = programs::watch(&nodes, || {
                // A packet that is sent again costs what the first one did: a spoiled run will do.
                if let Run::Spoiled(why) = netperf.run_longer(kubelane, *path, test, LONGER)? {
                    println!("{path} {} for the run statistics: {why}", test.name);
                }
                Ok(())
            })?;
            let means = means.into_iter().filter(|mean| mean.runs >= FEW);
            all.extend(means.map(|mean| Ran { others, path: *path, test, mean }));
        }
    }
    Ok(all)
}

impl Ran {
    /// The most nanoseconds that it should take, and why.
    fn target(&self) -> Option<f64> {
        let is_near = self.mean.node == "node1";
        match self.path {
            Path::ClusterIpRemote | Path::ClusterIpLocal if self.mean.program.starts_with("connect4") => Some(500.0),
            // Packets of the client and the pod's replies both come in by the first node's device, and are one mean.
            Path::NodePortRemote if is_near && self.mean.program.starts_with("wire_in") => Some(400.0),
            // A pod there replies by the device that the client's packets come in by.
            Path::NodePortLocal | Path::LoadBalancerIp if self.mean.program.starts_with("wire_") => Some(400.0),
            // Packets to a pod's own address are no business of the programs on the wire.
            Path::Pod | Path::ClusterIpRemote if self.mean.program.starts_with("wire_") => Some(60.0),
            _ => None,
        }
    }
}

/// A row for each program, path and test. Figures are as the kernel has them, the cost of its `clock` included; what they
/// come to without it stands beside.
pub fn text(all: &[Ran], clock: f64) -> String {
    let row = |ran: &Ran| {
        let target = ran.target();
        vec![
            ran.others.to_string(),
            ran.path.to_string(),
            ran.test.name.to_owned(),
            ran.mean.node.clone(),
            ran.mean.program.clone(),
            ran.mean.runs.to_string(),
            format!("{:.0} ns", ran.mean.nanoseconds),
            format!("{:.0} ns", (ran.mean.nanoseconds - clock).max(0.0)),
            target.map_or(String::new(), |most| format!("< {most} ns")),
            target.map_or("", |most| verdict(ran.mean.nanoseconds, clock, most)).to_owned(),
        ]
    };
    let rows: Vec<Vec<String>> = all.iter().map(row).collect();
    let heading = ["other Services", "path", "test", "node", "program", "runs", "mean", "less the clock", "target", ""];
    table(&heading, &rows)
}

/// The target is for the kernel's figures as they are; where it is the clock that misses it, that is said.
fn verdict(nanoseconds: f64, clock: f64, most: f64) -> &'static str {
    if nanoseconds < most {
        "met"
    } else if nanoseconds - clock < most {
        "MISSED by the clock"
    } else {
        "MISSED"
    }
}

/// One line for each row of the table.
pub fn csv(all: &[Ran]) -> String {
    let mut text = String::from("other_services,path,test,node,program,runs,mean_nanoseconds\n");
    for Ran { others, path, test, mean: Mean { node, program, runs, nanoseconds } } in all {
        // Writing to a String does not fail. No path has a quotation mark in its name.
        let _ = writeln!(text, "{others},\"{path}\",{},{node},{program},{runs},{nanoseconds:.1}", test.name);
    }
    text
}
