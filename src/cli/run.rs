//! `kubelane run`: from flags to settings, and a runtime for the agent.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tracing::{info, warn};

use super::UsageError;
use super::flags::{RunFlags, Source, SourceFlags};
use super::merge::Remarks;
use super::{host, log};
use crate::agent::{self, Settings, SourceSettings};
use crate::bpf::{self, Counting};
use crate::model::{FlowTimeouts, SocketLb};
use crate::netdev::PodDevices;

/// Health, metrics and watches; the agent itself has the main thread.
const WORKER_THREADS: usize = 2;
/// What still runs at the end (a pass over sockets) does not hold the process up for longer.
const LAST_WORK: Duration = Duration::from_secs(1);

/// Runs the daemon until a signal (Ok) or a failure. `started`: when the process did.
///
/// # Errors
/// A [`UsageError`] before anything is touched; anything that keeps the daemon from its work.
pub fn run(mut flags: RunFlags, started: Instant) -> anyhow::Result<()> {
    let Remarks { ignored, odd } = flags.complete()?;
    let source = choose_source(&flags.source, in_cluster())?;
    if flags.service_traffic && flags.service_metrics == 0 {
        let words = "--service-traffic measures the Services that --service-metrics N names: give it, with N above 0";
        return Err(UsageError(words.to_owned()).into());
    }
    log::start(flags.log).map_err(|error| UsageError(format!("{error:#}")))?;
    if !odd.is_empty() {
        warn!("these settings are malformed, and are read as kube-proxy reads them: {}", odd.join(", "));
    }
    if !ignored.is_empty() {
        warn!("these settings have no effect here and are ignored: {}", ignored.join(", "));
    }
    if let Some(score) = flags.oom_score_adj {
        adjust_oom_score(score);
    }
    allow_many_files();
    block_on(agent::run(settings(flags, source)?, started))
}

/// Runs to the end of `work`.
pub(super) fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKER_THREADS)
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let result = runtime.block_on(work);
    runtime.shutdown_timeout(LAST_WORK);
    result
}

fn settings(flags: RunFlags, source: SourceSettings) -> anyhow::Result<Settings> {
    let node_name = host::node_name(flags.source.hostname_override.as_deref())?;
    let cgroup = host::find_cgroup(flags.node.cgroup.as_deref())?;
    if !cgroup.is_root && flags.node.cgroup.is_none() {
        warn!(
            "{} is not the root of the cgroup2 hierarchy: processes outside it are not served; in a container, mount \
             the host's /sys/fs/cgroup and name it with --cgroup",
            cgroup.path.display()
        );
    }
    info!(
        version = env!("CARGO_PKG_VERSION"),
        node = node_name,
        cgroup = %cgroup.path.display(),
        pins = %flags.node.pins.pin_path.display(),
        "kubelane starts"
    );
    let (healthz, metrics) = (flags.node.healthz(), flags.node.metrics());
    let bind_hard_fail = flags.node.bind_address_hard_fail.unwrap_or_default();
    let nodeport_addresses = flags.nodeport_addresses();
    let traffic = flags.traffic;
    Ok(Settings {
        source,
        node_name,
        service_proxy_name: flags.source.service_proxy_name,
        datapath: bpf::Settings {
            pin_path: flags.node.pins.pin_path,
            cgroup: cgroup.path,
            max_endpoints: flags.max_endpoints,
            max_services: flags.max_services,
            max_source_ranges: flags.max_source_ranges,
            discard_newer: flags.discard_newer_state,
            flow_limits: FlowTimeouts::from(traffic.timeouts).into(),
            tcp_be_liberal: traffic.conntrack_tcp_be_liberal.unwrap_or_default(),
            host_sockets_only: flags.socket_lb == SocketLb::Host,
            has_pod_devices: flags.pod_devices != PodDevices::Off,
            external_cluster_ips: traffic.external_cluster_ip.unwrap_or_default(),
        },
        healthz,
        metrics,
        metrics_page: flags.metrics_page,
        bind_hard_fail,
        nodeport_addresses,
        devices: flags.devices,
        pod_devices: flags.pod_devices,
        masquerade: traffic.masquerade(),
        forward_through: traffic.forward_through.unwrap_or_default(),
        conntrack: traffic.host_conntrack(host::processors()),
        destroy_tcp_sockets: flags.destroy_tcp_sockets,
        counting: match (flags.service_metrics, flags.service_traffic) {
            (0, _) => Counting::Nothing,
            (_, false) => Counting::Connections,
            (_, true) => Counting::Traffic,
        },
        service_metrics: usize::from(flags.service_metrics),
        startup_taint: flags.startup_taint,
        takeover: flags.takeover,
    })
}

/// Not being able to is no reason not to serve; a lower score takes CAP_SYS_RESOURCE.
fn adjust_oom_score(score: i16) {
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", score.to_string()) {
        warn!("--oom-score-adj {score}: {error}; keeping the score that this process was started with");
    }
}

/// Each Service with a healthCheckNodePort is a listening socket, and the soft limit is 1024 nearly everywhere.
fn allow_many_files() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        warn!("cannot raise the limit of open files: {error}");
    }
}

/// Where Kubernetes mounts a pod's credentials.
pub(super) fn in_cluster() -> bool {
    std::env::var_os("KUBERNETES_SERVICE_HOST").is_some()
        && Path::new("/var/run/secrets/kubernetes.io/serviceaccount/token").exists()
}

pub(super) fn choose_source(flags: &SourceFlags, in_cluster: bool) -> Result<SourceSettings, UsageError> {
    let kubernetes =
        || SourceSettings::Kubernetes { kubeconfig: flags.kubeconfig.clone(), master: flags.master.clone() };
    let to_api_server = flags.kubeconfig.is_some() || flags.master.is_some();
    match &flags.source {
        Some(Source::Kubernetes) => Ok(kubernetes()),
        Some(Source::Directory(_)) if to_api_server => {
            Err(UsageError("--kubeconfig and --master cannot be used with --source dir:PATH".to_owned()))
        }
        Some(Source::Directory(path)) => Ok(SourceSettings::Directory(path.clone())),
        None if to_api_server || in_cluster => Ok(kubernetes()),
        None => Err(UsageError(
            "--source is required outside a cluster: `kubernetes` (with --kubeconfig FILE or --master URL) or \
             `dir:PATH`"
                .to_owned(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn the_source_follows_from_the_flags_and_the_place() {
        let none = SourceFlags {
            source: None,
            kubeconfig: None,
            master: None,
            hostname_override: None,
            service_proxy_name: None,
        };
        let config = SourceFlags { kubeconfig: Some("k".into()), ..none.clone() };
        let master = SourceFlags { master: Some("m".into()), ..none.clone() };
        let directory = SourceFlags { source: Some(Source::Directory("d".into())), ..none.clone() };
        let named = SourceFlags { source: Some(Source::Kubernetes), ..none.clone() };
        let both = SourceFlags { master: Some("m".into()), ..directory.clone() };
        let kubernetes = |kubeconfig: Option<&str>, master: Option<&str>| {
            let (kubeconfig, master) = (kubeconfig.map(PathBuf::from), master.map(str::to_owned));
            Some(SourceSettings::Kubernetes { kubeconfig, master })
        };
        let table = [
            ("nothing, outside a cluster", &none, false, None),
            ("nothing, in a cluster", &none, true, kubernetes(None, None)),
            ("a kubeconfig", &config, false, kubernetes(Some("k"), None)),
            ("a master", &master, true, kubernetes(None, Some("m"))),
            ("kubernetes by name", &named, false, kubernetes(None, None)),
            ("a directory in a cluster", &directory, true, Some(SourceSettings::Directory("d".into()))),
            ("a directory and a master", &both, false, None),
        ];
        for (name, flags, in_cluster, expected) in table {
            assert_eq!(choose_source(flags, in_cluster).ok(), expected, "{name}");
        }
    }
}
