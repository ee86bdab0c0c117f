//! The host's connection tracking, set once as kube-proxy sets it: connections that the CNI masquerades, and those that
//! kube-proxy translated before, live as long as clients of Services are used to. The kernel forgets a half-closed
//! connection after a minute.
//!
//! Like kube-proxy the daemon only raises values and does not watch over them: whoever sets a larger one, or changes it
//! afterwards, has his reasons. What cannot be set is told of, and nothing else comes of it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use crate::bpf;
use crate::model::HostConntrack;
use crate::serve::Stage;

/// Where a container finds the host's sysctls in a mount that can be written to, and where they are otherwise.
const DIRECTORIES: [&str; 2] = ["/host/proc/sys/net", "/proc/sys/net"];
/// The module may be loaded later, with the first rule that asks for it.
const LOOK: Duration = Duration::from_secs(30);
/// Connections for each of the table's buckets, as kube-proxy has it.
const PER_BUCKET: u32 = 4;

/// Sets all as soon as there is a connection tracking. Never ends.
pub async fn set(wanted: HostConntrack) -> (&'static str, anyhow::Result<()>) {
    let exists = |directory: &&str| Path::new(directory).exists();
    let directory = PathBuf::from(DIRECTORIES.into_iter().find(exists).unwrap_or(DIRECTORIES[1])).join("netfilter");
    while !directory.join("nf_conntrack_max").exists() {
        debug!("the host's connection tracking is not loaded: nothing to configure");
        sleep(LOOK).await;
    }
    for (name, value) in sysctls(&wanted) {
        tell(name, value, raise(&directory.join(name), value));
    }
    std::future::pending().await
}

/// Takes back what an interrupted `cleanup` has handed over to netfilter, once all programs are attached again. Never ends.
pub async fn take_back(mut stage: watch::Receiver<Stage>, pin_path: PathBuf) -> (&'static str, anyhow::Result<()>) {
    let _ = stage.wait_for(|stage| *stage == Stage::Ready).await;
    match tokio::task::spawn_blocking(move || bpf::take_back(&pin_path)).await {
        Ok(Ok(0)) => {}
        Ok(Ok(taken)) => {
            info!("took {taken} connections back that an interrupted cleanup had handed over to netfilter")
        }
        Ok(Err(error)) => warn!("connections that an interrupted cleanup handed over to netfilter may end: {error:#}"),
        Err(error) => warn!("connections that an interrupted cleanup handed over to netfilter may end: {error}"),
    }
    std::future::pending().await
}

/// Names below net.netfilter, and the values that they have at least.
fn sysctls(wanted: &HostConntrack) -> Vec<(&'static str, u32)> {
    // Flags allow thirty days at most.
    let seconds = |timeout: Option<Duration>| timeout.map(|timeout| timeout.as_secs() as u32);
    let all = [
        ("nf_conntrack_max", wanted.max),
        ("nf_conntrack_buckets", wanted.max.map(|max| max / PER_BUCKET)),
        ("nf_conntrack_tcp_timeout_established", seconds(wanted.tcp_established)),
        ("nf_conntrack_tcp_timeout_close_wait", seconds(wanted.tcp_close_wait)),
        ("nf_conntrack_udp_timeout", seconds(wanted.udp)),
        ("nf_conntrack_udp_timeout_stream", seconds(wanted.udp_stream)),
        ("nf_conntrack_tcp_be_liberal", wanted.tcp_be_liberal.then_some(1)),
    ];
    all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
}

/// Why a sysctl is less than was wanted.
#[derive(Debug)]
struct Refusal {
    /// What it is; `None`: it cannot be read.
    is: Option<u32>,
    error: io::Error,
}

/// Writes `value` unless there is as much already. Returns what was there when it was less.
fn raise(file: &Path, value: u32) -> Result<Option<u32>, Refusal> {
    let text = fs::read_to_string(file).map_err(|error| Refusal { is: None, error })?;
    let unreadable = |error| Refusal { is: None, error: io::Error::new(io::ErrorKind::InvalidData, error) };
    let is = text.trim().parse::<u32>().map_err(unreadable)?;
    if is >= value {
        return Ok(None);
    }
    fs::write(file, value.to_string()).map_err(|error| Refusal { is: Some(is), error })?;
    Ok(Some(is))
}

fn tell(name: &str, value: u32, result: Result<Option<u32>, Refusal>) {
    match result {
        Ok(None) => debug!("net.netfilter.{name} is {value} or more"),
        Ok(Some(was)) => info!("net.netfilter.{name}: {value} ({was} before)"),
        Err(Refusal { is, error }) => {
            let is = is.map_or_else(|| "unknown".to_owned(), |is| is.to_string());
            warn!(
                "net.netfilter.{name} stays at {is}; kubelane could not set it to {value}, as kube-proxy does: \
                 {error}; set it on the node (/etc/sysctl.d), let the container write to the node's sysctls \
                 (manifests/base: the mount /host/proc/sys/net), or set the flag of this value (--conntrack-...) to \
                 0 to leave it alone"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted() -> HostConntrack {
        HostConntrack {
            max: Some(131_072),
            tcp_established: Some(Duration::from_secs(86_400)),
            tcp_close_wait: Some(Duration::from_secs(3600)),
            udp: None,
            udp_stream: None,
            tcp_be_liberal: false,
        }
    }

    #[test]
    fn what_is_not_asked_for_is_not_touched() {
        let names = |wanted: &HostConntrack| sysctls(wanted).into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        let usual = [
            "nf_conntrack_max",
            "nf_conntrack_buckets",
            "nf_conntrack_tcp_timeout_established",
            "nf_conntrack_tcp_timeout_close_wait",
        ];
        assert_eq!(names(&wanted()), usual);
        let none = HostConntrack { max: None, tcp_established: None, tcp_close_wait: None, ..wanted() };
        assert_eq!(names(&none), [""; 0]);
        let all = HostConntrack {
            udp: Some(Duration::from_secs(20)),
            udp_stream: Some(Duration::from_secs(60)),
            tcp_be_liberal: true,
            ..none
        };
        let expected = [
            ("nf_conntrack_udp_timeout", 20),
            ("nf_conntrack_udp_timeout_stream", 60),
            ("nf_conntrack_tcp_be_liberal", 1),
        ];
        assert_eq!(sysctls(&all), expected);
        assert_eq!(sysctls(&wanted())[1], ("nf_conntrack_buckets", 32_768));
    }

    #[test]
    fn values_are_raised_and_never_lowered_and_what_cannot_be_set_is_known() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("x");
        for (is, expected, then) in [("60\n", Some(60), "3600"), ("3600\n", None, "3600\n"), ("9999\n", None, "9999\n")]
        {
            fs::write(&file, is).unwrap();
            assert_eq!(raise(&file, 3600).unwrap(), expected, "{is}");
            assert_eq!(fs::read_to_string(&file).unwrap(), then, "{is}");
        }
        fs::write(&file, "a word").unwrap();
        assert!(raise(&file, 1).unwrap_err().is.is_none());
        let missing = raise(&directory.path().join("missing"), 1).unwrap_err();
        assert!(missing.is.is_none() && missing.error.kind() == io::ErrorKind::NotFound);
        // Read-only for whoever is root, too.
        let refused = raise(Path::new("/proc/sys/kernel/ostype"), 1).unwrap_err();
        assert!(refused.is.is_none(), "{refused:?}");
        let refused = raise(Path::new("/proc/sys/kernel/cap_last_cap"), 1_000_000).unwrap_err();
        assert!(refused.is.is_some(), "{refused:?}");
    }
}
