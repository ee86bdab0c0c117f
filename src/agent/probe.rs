//! The datapath's trial before `/readyz` says yes: a real connection of this process to a frontend that exists for these
//! milliseconds only, and that has to end at a socket of this process.
//!
//! The frontend's addresses are reserved and routed nowhere: 192.0.0.8 (RFC 7600, the IPv4 dummy address) and
//! 100::c000:8 (RFC 6666, discard-only). They have no row in `addresses`, so that packets from the wire never ask for
//! them, and the probing socket is bound to the loopback device, so that nothing leaves the node if no program translates
//! it. The worker writes the rows (`trial.rs`).

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use super::request::Request;
use super::trial::Trial;
use crate::backoff::Backoff;
use crate::serve::{Health, Stage};

const FRONTENDS: [(SocketAddr, IpAddr); 2] = [
    (SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 0, 8)), 10256), IpAddr::V4(Ipv4Addr::LOCALHOST)),
    (
        SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0xc000, 8)), 10256),
        IpAddr::V6(Ipv6Addr::LOCALHOST),
    ),
];
/// Over the loopback device it takes well under a millisecond.
const PATIENCE: Duration = Duration::from_secs(2);

/// Waits for the first sync, and tries until a connection goes through; tells `health`. `worker`: who writes the rows.
/// `cgroup`: whose processes the programs see. Ends when the trial is over.
pub async fn run(worker: mpsc::Sender<Request>, cgroup: PathBuf, health: Arc<Health>) {
    let mut stage = health.stage();
    if stage.wait_for(|stage| *stage >= Stage::Synced).await.is_err() {
        return;
    }
    let place = cgroup.clone();
    let is_served = tokio::task::spawn_blocking(move || is_below(&place)).await.unwrap_or(false);
    if !is_served {
        let remark = format!(
            "the datapath was not probed: this process is not in the cgroup that is served, {}",
            cgroup.display()
        );
        info!("{remark}");
        return health.probed(Some(&remark));
    }
    let (mut backoff, mut told) = (Backoff::of_kernel(), None);
    loop {
        match probe(&worker).await {
            Ok(families) => {
                info!("a connection went through the datapath: {families}");
                return health.probed(None);
            }
            Err(error) => {
                let reason = format!("a connection through the datapath failed: {error:#}");
                health.probe_failed(&reason);
                if told.as_ref() != Some(&reason) {
                    warn!("{reason}; trying again");
                    told = Some(reason);
                }
                tokio::time::sleep(backoff.next()).await;
            }
        }
    }
}

/// Whether this process is in `cgroup` or below it. Of the root of the hierarchy (which alone has no cgroup.events) that
/// is known; elsewhere it is looked for, because paths in /proc/self/cgroup depend on the namespace.
fn is_below(cgroup: &Path) -> bool {
    if !cgroup.join("cgroup.events").exists() {
        return true;
    }
    let own = std::process::id().to_string();
    let mut queue = VecDeque::from([cgroup.to_owned()]);
    while let Some(directory) = queue.pop_front() {
        let processes = std::fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
        if processes.lines().any(|pid| pid == own) {
            return true;
        }
        let below = std::fs::read_dir(&directory).into_iter().flatten().flatten();
        queue.extend(below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()));
    }
    false
}

/// Returns the families that passed. A family without a loopback address is off on this node.
async fn probe(worker: &mpsc::Sender<Request>) -> anyhow::Result<String> {
    let mut passed = Vec::new();
    for (frontend, loopback) in FRONTENDS {
        let listener = match TcpListener::bind((loopback, 0)).await {
            Ok(listener) => listener,
            Err(error) if is_off(&error) => continue,
            Err(error) => return Err(error).with_context(|| format!("listening on {loopback}")),
        };
        ask(worker, Some(Trial { frontend, listener: listener.local_addr()? })).await?;
        let result = tokio::time::timeout(PATIENCE, exchange(&listener, frontend)).await;
        ask(worker, None).await?;
        let within = || format!("to {frontend}: nothing arrived within {} s", PATIENCE.as_secs());
        result.with_context(within)?.with_context(|| format!("to {frontend}"))?;
        passed.push(if frontend.is_ipv4() { "IPv4" } else { "IPv6" });
    }
    ensure!(!passed.is_empty(), "the loopback device is down");
    Ok(passed.join(", "))
}

async fn ask(worker: &mpsc::Sender<Request>, trial: Option<Trial>) -> anyhow::Result<()> {
    let (reply, answer) = oneshot::channel();
    worker.send(Request::Trial(trial, reply)).await.context("the worker ended")?;
    answer.await.context("the worker ended")?
}

fn is_off(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT))
}

/// A client's socket, and its other end at the listener.
async fn exchange(listener: &TcpListener, frontend: SocketAddr) -> anyhow::Result<()> {
    let socket = if frontend.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.context("a socket")?;
    socket.bind_device(Some(b"lo")).context("binding to the loopback device")?;
    let stream = socket.connect(frontend).await.context("connect()")?;
    let shown = stream.peer_addr()?;
    ensure!(shown == frontend, "getpeername() shows {shown}");
    let own = stream.local_addr()?;
    // Whoever else happens to find the listener is not listened to.
    while listener.accept().await?.1 != own {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_below_its_own_cgroup_and_not_in_an_empty_directory() {
        let directory = tempfile::tempdir().unwrap();
        assert!(is_below(directory.path()), "what has no cgroup.events is the root");
        std::fs::write(directory.path().join("cgroup.events"), "").unwrap();
        std::fs::write(directory.path().join("cgroup.procs"), "1\n").unwrap();
        assert!(!is_below(directory.path()));
        let deep = directory.path().join("a/b");
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::write(deep.join("cgroup.procs"), format!("1\n{}\n", std::process::id())).unwrap();
        assert!(is_below(directory.path()));
    }
}
