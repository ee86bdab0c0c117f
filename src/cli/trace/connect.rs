//! One connect(), as a pod's process: in a control group and a network namespace that are thrown away, through the programs
//! that are attached. The namespace has no route, so that nothing is sent wherever it would go.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, SigmaskHow};
use serde::Serialize;
use socket2::{Domain, Socket, Type};

use crate::bpf::{Listening, Wanted};
use crate::cli::explain::Destination;
use crate::cli::host::find_cgroup;
use crate::cli::monitor::{Names, Record, monotonic_zero};
use crate::model::Protocol;

/// A socket that no processor tells of within this time is not told of.
const PATIENCE: Duration = Duration::from_millis(200);
/// Of a group's name, before the process id.
const GROUP: &str = "kubelane-trace-";

/// What became of it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Connected {
    /// "TCP 10.96.0.80:80"
    pub to: String,
    pub cgroup: PathBuf,
    /// As `kubelane monitor` tells them; none: no program took it for a Service's.
    pub events: Vec<Record>,
    /// What connect() answered; `None`: it succeeded. Without a route this is "Network is unreachable", unless a program
    /// answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Of the whole system call.
    pub nanoseconds: u64,
    #[serde(skip)]
    pub is_unreachable: bool,
}

/// A control group of this process's own, until dropped.
struct Cgroup {
    path: PathBuf,
    /// Where the process was before.
    before: PathBuf,
    /// What was held back before.
    signals: SigSet,
}

impl Cgroup {
    fn enter(below: &Path) -> Result<Cgroup> {
        let membership = fs::read_to_string("/proc/self/cgroup").context("cannot read /proc/self/cgroup")?;
        let own = membership.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
        let before = find_cgroup(None)?.path.join(own.trim_start_matches('/'));
        let path = below.join(format!("{GROUP}{}", std::process::id()));
        sweep(below);
        let signals = hold_signals()?;
        if let Err(error) = fs::create_dir(&path) {
            let _ = signals.thread_set_mask();
            return Err(error).with_context(|| {
                format!(
                    "cannot make the control group {} (in the daemon's pod the hierarchy is read-only: run this on the node)",
                    path.display()
                )
            });
        }
        let cgroup = Cgroup { path, before, signals };
        join(&cgroup.path)?;
        Ok(cgroup)
    }
}

/// Takes away what killed processes have left; one that runs may not have joined its group yet.
fn sweep(below: &Path) {
    for entry in fs::read_dir(below).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(GROUP)?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// Whoever ends this process has to wait until its group is gone.
fn hold_signals() -> Result<SigSet> {
    SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK).context("cannot hold back signals")
}

fn join(cgroup: &Path) -> Result<()> {
    let procs = cgroup.join("cgroup.procs");
    fs::write(&procs, "0").with_context(|| format!("cannot write {}", procs.display()))
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Where it was may be out of sight of this namespace: then the group above will do.
        let above = self.path.parent().map(Path::to_owned);
        let _ = join(&self.before).or_else(|error| above.map_or(Err(error), |above| join(&above)));
        if let Err(error) = fs::remove_dir(&self.path) {
            eprintln!("cannot remove the control group {}: {error}; it is empty once this ends", self.path.display());
        }
        let _ = self.signals.thread_set_mask();
    }
}

/// Calls connect() to `to`.
///
/// # Errors
/// When no daemon's state is pinned there, or the control group or the namespace cannot be made.
pub fn connect(pin_path: &Path, below: Option<&Path>, to: &Destination) -> Result<Connected> {
    let below = find_cgroup(below)?.path;
    let mut names = Names::open(pin_path)?;
    let wanted = Wanted { numbers: u64::MAX, protocol: 0, from: None, to: None, port: 0, one_in: 1, rate: 0 };
    let mut listening = Listening::open(pin_path, wanted)?;
    let zero = monotonic_zero()?;
    let cgroup = Cgroup::enter(&below)?;
    unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
    let at = SocketAddr::new(to.at.ip.to_ip(), to.at.port);
    let kind = if to.protocol == Protocol::Udp { Type::DGRAM } else { Type::STREAM };
    let number = socket2::Protocol::from(i32::from(to.protocol as u8));
    let socket = Socket::new(Domain::for_address(at), kind, Some(number)).context("cannot make a socket")?;
    socket.set_nonblocking(true).context("cannot make a socket")?;
    let began = Instant::now();
    let result = socket.connect(&at.into());
    let nanoseconds = began.elapsed().as_nanos() as u64;
    let own = std::process::id();
    let mut events = Vec::new();
    while events.is_empty() && began.elapsed() < PATIENCE {
        let told = listening.read(4096)?;
        let own = told.iter().filter(|event| event.process == own);
        events.extend(own.filter_map(|event| Record::new(event, &mut names, zero, None)));
        std::thread::sleep(Duration::from_millis(5));
    }
    let path = cgroup.path.clone();
    drop(cgroup);
    let error = result.err();
    Ok(Connected {
        to: to.to_string(),
        cgroup: path,
        events,
        is_unreachable: error.as_ref().is_some_and(|error| error.kind() == io::ErrorKind::NetworkUnreachable),
        error: error.map(|error| error.to_string()),
        nanoseconds,
    })
}
