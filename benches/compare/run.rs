//! One run of netperf, and when its figure does not count.

use std::fs;
use std::io::Read as _;
use std::path::{Path as FilePath, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::common::health::Trouble;
use crate::laboratory::eventually;
use crate::laboratory::lab::{Lab, Place};
use crate::laboratory::process::Process;
use crate::mode::Served;
use crate::path::{Path, TARGETS};

/// How netperf is run.
pub struct Netperf {
    /// Directory of netperf and netserver.
    pub programs: PathBuf,
    /// Processors of client and server.
    pub processors: (u32, u32),
    /// Runs are this many times as long as a test's usual one.
    pub length: u32,
}

/// A test of netperf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Test {
    pub name: &'static str,
    /// Its rate is in this unit: transactions a second, or 10^6 bits a second.
    pub unit: &'static str,
    /// Transactions or bytes of a run, about an eighth of a second's: on a machine that others use, a processor may be half
    /// as fast half a second later, so that only what comes right after another can be compared with it. And runs of
    /// more than a second would be held up: of each one, the kernel keeps 50 ms from processes in real time
    /// (sched_rt_runtime_us). A run that ends by the clock instead has netserver wait for four seconds more (PAD_TIME). A
    /// stream of datagrams ends for netserver with an empty one.
    amount: u64,
}

impl Test {
    pub const ALL: [Test; 6] = [
        Test { name: "TCP_CRR", unit: "/s", amount: 600 },
        Test { name: "TCP_RR", unit: "/s", amount: 3_000 },
        Test { name: "UDP_RR", unit: "/s", amount: 3_000 },
        Test { name: "TCP_STREAM", unit: "Mbit/s", amount: 75_000_000 },
        Test { name: "TCP_MAERTS", unit: "Mbit/s", amount: 75_000_000 },
        UDP_STREAM,
    ];

    pub fn is_stream(self) -> bool {
        self.unit != "/s"
    }

    /// Transactions or bytes of a run.
    fn amount(self, length: u32) -> u64 {
        self.amount * u64::from(length)
    }

    /// netperf's options for the test itself: message sizes and what is to be printed.
    fn options(self) -> &'static str {
        match self {
            // What netperf prints unasked is what was sent. Datagrams that every path takes in one piece; without -R 1
            // netperf asks for no routing (SO_DONTROUTE).
            UDP_STREAM => " -R 1 -m 1400 -o REMOTE_RECV_THROUGHPUT,REMOTE_BYTES_RECVD",
            _ if self.is_stream() => "",
            // One byte each way.
            _ => " -r 1,1",
        }
    }

    /// The client's real-time priority. Nothing holds back a sender of datagrams: on a processor of its own it may
    /// overrun the receiver, and on the receiver's it would never let it run. It gives way to it, so that each datagram
    /// is received before the next one is sent.
    fn client_priority(self) -> u32 {
        if self == UDP_STREAM { PRIORITY - 1 } else { PRIORITY }
    }

    /// Of the signs of trouble, those that belong to the test.
    fn no_trouble(self) -> &'static [&'static str] {
        if self == UDP_STREAM {
            // The rate is that of the receiver, which need not keep up with the sender.
            &["Udp:RcvbufErrors"]
        } else if self.is_stream() {
            // One segment in a million that is sent again is the business of TCP; a timeout still spoils a run.
            &["Tcp:RetransSegs"]
        } else {
            &[]
        }
    }

    /// What netperf says: the rate, and transactions or Mbit of the run.
    fn figures(self, said: &str, length: u32) -> anyhow::Result<(f64, f64)> {
        let numbers: Result<Vec<f64>, _> = said.trim().split(',').map(str::parse).collect();
        let amount = self.amount(length) as f64;
        match numbers.with_context(|| format!("netperf said {said:?}"))?.as_slice() {
            [rate, received] if self == UDP_STREAM => Ok((*rate, received * 8e-6)),
            [rate] if self.is_stream() => Ok((*rate, amount * 8e-6)),
            [rate] => Ok((*rate, amount)),
            _ => bail!("netperf said {said:?}"),
        }
    }
}

/// What arrives counts, and what it takes to send and lose the rest.
const UDP_STREAM: Test = Test { name: "UDP_STREAM", unit: "Mbit/s", amount: 8_000_000 };

/// The real-time priority of all servers and most clients.
pub const PRIORITY: u32 = 10;

/// A run that takes longer has lost a datagram that nobody sends again, or meets a path that does not work.
const PATIENCE_SECONDS: &str = "30";

#[derive(Clone, Copy, Debug)]
pub struct Figure {
    /// In the test's unit.
    pub rate: f64,
    /// Microseconds of processor time, of all processes of the mode's laboratory, for one transaction or one Mbit.
    pub processor: f64,
    /// Transactions or Mbit of the run.
    pub units: f64,
}

/// What came of a run.
pub enum Run {
    Good(Figure),
    /// Why its figure says nothing about the path.
    Spoiled(String),
}

impl Netperf {
    /// Starts one netserver for each path, each in the pod that the path leads to.
    pub fn serve(&self, lab: &Lab) -> anyhow::Result<Vec<Process>> {
        let netserver = self.programs.join("netserver").display().to_string();
        let processor = self.processors.1.to_string();
        let mut servers = Vec::new();
        for path in Path::ALL {
            let (pod, control) = (lab.pod(path.target().pod), path.ports().0);
            let port = control.to_string();
            servers.push(spawn(pod, PRIORITY, "taskset", &["-c", &processor, &netserver, "-D", "-4", "-p", &port])?);
            let listens = || pod.inside(|| Ok(std::net::TcpStream::connect((pod.v4, control))?)).is_ok();
            if !eventually(Duration::from_secs(5), listens) {
                bail!("the netserver for {path} does not listen");
            }
        }
        Ok(servers)
    }

    /// One run; fails only when it cannot even be tried.
    pub fn run(&self, served: &Served, path: Path, test: Test) -> anyhow::Result<Run> {
        self.run_longer(served, path, test, 1)
    }

    /// A run that is so many times as long as others.
    pub fn run_longer(&self, served: &Served, path: Path, test: Test, times: u32) -> anyhow::Result<Run> {
        let length = self.length * times;
        let client = path.client(served.lab)?;
        let (control, data) = path.ports();
        // -P 0 -v 0: the figures alone.
        let options = format!(
            "-4 -H {} -p {control} -t {} -l -{} -T {},{} -P 0 -v 0 -- -P ,{data}{}",
            served.address(path),
            test.name,
            test.amount(length),
            self.processors.0,
            self.processors.1,
            test.options(),
        );
        let netperf = self.programs.join("netperf").display().to_string();
        let mut arguments = vec![PATIENCE_SECONDS, netperf.as_str()];
        arguments.extend(options.split(' '));
        let before = (trouble(served.lab)?, processor_time(served.lab)?);
        let mut process = spawn(&client, test.client_priority(), "timeout", &arguments)?;
        let mut said = String::new();
        process.stdout()?.read_to_string(&mut said).context("reading what netperf says")?;
        let status = process.wait()?;
        let processor = processor_time(served.lab)? - before.1;
        if !status.success() {
            return Ok(Run::Spoiled(format!("netperf ended with {status}: {}", said.trim())));
        }
        let (rate, units) = test.figures(&said, length)?;
        if let Some(why) = trouble(served.lab)?.since(&before.0, test.no_trouble()) {
            return Ok(Run::Spoiled(why));
        }
        if units == 0.0 {
            return Ok(Run::Spoiled("nothing arrived".to_owned()));
        }
        Ok(Run::Good(Figure { rate, processor: processor / units, units }))
    }
}

/// The counters of all ends: clients and servers.
pub fn trouble(lab: &Lab) -> anyhow::Result<Trouble> {
    let mut sum = lab.outside(Trouble::read)?.and(lab.pod("client").inside(Trouble::read)?);
    for target in TARGETS {
        sum = sum.and(lab.pod(target.pod).inside(Trouble::read)?);
    }
    Ok(sum)
}

/// Microseconds that the laboratory's processes have used, daemons and the work that packets make in them included.
fn processor_time(lab: &Lab) -> anyhow::Result<f64> {
    let path = lab.node("node1").cgroup.with_file_name("cpu.stat");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let used = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
    used.and_then(|used| used.parse().ok()).with_context(|| format!("no usage_usec in {}", path.display()))
}

/// Starts a program that gets the processor whenever it wants it, so that what else runs on the machine disturbs less.
pub fn spawn(place: &Place, priority: u32, program: &str, arguments: &[&str]) -> anyhow::Result<Process> {
    let priority = priority.to_string();
    place.spawn(FilePath::new("chrt"), &[&["--fifo", &priority, program], arguments].concat())
}
