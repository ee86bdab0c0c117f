//! The command line's shape: subcommands, flags, their values, defaults and help.
//!
//! Flags have kube-proxy's own names where the meaning is the same. A value that is not known is refused here, with the
//! flag and the allowed values in the message, before anything is attached.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::builder::{BoolishValueParser, NonEmptyStringValueParser, RangedU64ValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};

use super::address::{BindAddress, HEALTHZ_PORT, METRICS_PORT, bind_address};
use super::explain::{Asker, Target};
use super::get::{JsonPath, Output, ServiceFilter, sort_key};
use super::kube_proxy::KubeProxyFlags;
use super::monitor::MonitorFlags;
use super::traffic::TrafficFlags;
use super::value::boolean;
use crate::model::SocketLb;
use crate::netdev::{DeviceSelection, NodePortAddresses, PodDevices};

pub const DEFAULT_PIN_PATH: &str = "/sys/fs/bpf/kubelane";

const EXAMPLES: &str = "\
Examples:
  On a cluster (in a DaemonSet, or with a kubeconfig):
      kubelane run --kubeconfig /etc/kubelane/kubeconfig
  With what kubeadm made for kube-proxy:
      kubelane --config=/var/lib/kube-proxy/config.conf --hostname-override=node-a
  Without a cluster, from a directory of Service, EndpointSlice and Node YAML:
      kubelane run --source dir:/etc/kubelane --hostname-override node-a
  Would it run here? What does it do right now?
      kubelane check
      kubelane get services -o wide
  Which backend does a pod get at a Service, and why?
      kubelane explain --from 10.244.1.11 10.96.0.80:80
  Remove every trace, after the daemon was stopped:
      kubelane cleanup";

/// A kube-proxy replacement in eBPF that runs beside any CNI.
///
/// One daemon per node watches Services and EndpointSlices and makes their cluster IPs, NodePorts and other addresses
/// work. Its state lives in the kernel: the daemon can stop, crash or be upgraded, and traffic never notices.
#[derive(Parser, Debug)]
#[command(name = "kubelane", version, max_term_width = 100, after_help = EXAMPLES, arg_required_else_help = true)]
#[command(args_override_self = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run the daemon (in the foreground; SIGTERM ends it and leaves the datapath serving). This is also what flags
    /// without a subcommand mean, as with kube-proxy
    Run(Box<RunFlags>),
    /// Say whether the daemon would run on this node, one line per condition, with a remedy
    ///
    /// Exit code 0: it would run. Exit code 1: it would not; the lines that begin with FAIL say why.
    Check(Box<CheckFlags>),
    /// Show what is programmed in the kernel (works while the daemon is down)
    Get(GetFlags),
    /// Say what the next connection to a destination gets, and why
    ///
    /// DEST is IP:PORT or [IPv6]:PORT, with /tcp (the default), /udp or /sctp, or svc/NAMESPACE/NAME[:PORT]. It is answered
    /// from the live maps; the daemon adds the reasons that are in no map, and where both disagree, that is said.
    Explain(ExplainFlags),
    /// Show what happens in the datapath, as it happens: connections, flows, refusals and drops with their reasons
    ///
    /// One line an event, until Ctrl-C. It reads, and changes nothing; while nobody listens nothing is told.
    Monitor(Box<MonitorFlags>),
    /// Remove every trace of kubelane from the kernel: links, programs, maps, pins
    ///
    /// Refused while a daemon runs on that pin path. Service addresses stop working on this node at once.
    Cleanup(CleanupFlags),
    /// Write one archive for a bug report: check, status, tables, warnings, log, counters, metrics
    ///
    /// There are no credentials in it: of a kubeconfig only its path. --redact replaces addresses and names, each by the same
    /// word everywhere.
    Report(Box<ReportFlags>),
    /// Print completions for a shell: `source <(kubelane completion bash)`
    Completion(CompletionFlags),
    /// Print a manual page: `kubelane man explain | man -l -`
    Man(ManFlags),
    /// Print the version
    Version,
}

/// Where the daemon lives in the kernel.
#[derive(Args, Clone, Debug)]
pub struct PinFlags {
    /// Directory for pinned maps and links, on a BPF filesystem. Daemons of one machine need one each
    #[arg(long, value_name = "DIR", default_value = DEFAULT_PIN_PATH)]
    pub pin_path: PathBuf,
}

/// What `run` and `check` share.
#[derive(Args, Clone, Debug)]
pub struct NodeFlags {
    #[command(flatten)]
    pub pins: PinFlags,

    /// Directory in a cgroup2 hierarchy: sockets of processes in it and below are served [default: the root of the
    /// cgroup2 mount, which is every process of the node]
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<PathBuf>,

    /// File with a KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1), as kubeadm writes it. Flags and
    /// environment win over it; what has no meaning here is named in one warning
    #[arg(long, value_name = "FILE", value_parser = NonEmptyStringValueParser::new())]
    pub config: Option<String>,

    /// Address to be taken for the node's first one (for `--nodeport-addresses primary`). An IPv6 address, `::`
    /// included, makes the defaults of the two flags below [::]:10256 and [::1]:10249
    #[arg(long, value_name = "IP")]
    pub bind_address: Option<IpAddr>,

    /// IP:PORT of /healthz, /livez and /readyz; "" or port 0 turns them off. 0.0.0.0 and [::] are both families
    ///
    /// [default: 0.0.0.0:10256]
    #[arg(long, value_name = "IP:PORT", value_parser = |text: &str| bind_address(text, HEALTHZ_PORT))]
    pub healthz_bind_address: Option<BindAddress>,

    /// IP:PORT of /metrics, /healthz and /proxyMode; "" or port 0 turns them off
    ///
    /// [default: 127.0.0.1:10249]
    #[arg(long, value_name = "IP:PORT", value_parser = |text: &str| bind_address(text, METRICS_PORT))]
    pub metrics_bind_address: Option<BindAddress>,

    /// End when one of these addresses cannot be had at the start. Without it Services are served, and it is tried again
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(value_parser = boolean)]
    pub bind_address_hard_fail: Option<bool>,

    /// Port of the default of --healthz-bind-address (deprecated by kube-proxy)
    #[arg(long, value_name = "PORT", hide_short_help = true)]
    pub healthz_port: Option<u16>,

    /// Port of the default of --metrics-bind-address (deprecated by kube-proxy)
    #[arg(long, value_name = "PORT", hide_short_help = true)]
    pub metrics_port: Option<u16>,
}

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Source")]
pub struct SourceFlags {
    /// Where Services and EndpointSlices come from: `kubernetes`, or `dir:PATH` for a directory of YAML or JSON files
    /// that is followed live [default: kubernetes, when in a cluster or when --kubeconfig or --master is given]
    #[arg(long, value_name = "SOURCE", value_parser = source)]
    pub source: Option<Source>,

    /// Kubeconfig file that says how to reach the API server [default: the pod's service account]
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,

    /// URL of the API server; overrides the kubeconfig's
    #[arg(long, value_name = "URL", value_parser = NonEmptyStringValueParser::new())]
    pub master: Option<String>,

    /// Name of this node, as its Node object has it [default: the host name in lower case]
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    pub hostname_override: Option<String>,

    /// Serve the Services whose label service.kubernetes.io/service-proxy-name has this value [default: those without]
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub service_proxy_name: Option<String>,
}

#[derive(Args, Clone, Debug)]
pub struct RunFlags {
    #[command(flatten)]
    pub source: SourceFlags,

    #[command(flatten, next_help_heading = "Node")]
    pub node: NodeFlags,

    /// Addresses of this node that serve NodePorts: CIDRs separated by commas, or `primary` for the Node object's
    /// first InternalIP of each family. A family without a CIDR is not restricted. Given twice, both count [default: all
    /// addresses]
    #[arg(long, value_name = "CIDRS", help_heading = "Node")]
    pub nodeport_addresses: Vec<NodePortAddresses>,

    /// Devices whose packets are looked at for NodePorts, load balancer and external IPs: names separated by commas, *
    /// and ? as in file names [default: those with an address of the node or a default route, and tunnels; not the ends and
    /// bridges of pods and virtual machines]
    #[arg(long, value_name = "GLOBS", default_value = "", hide_default_value = true, help_heading = "Node")]
    pub devices: DeviceSelection,

    /// The node's ends of pods' devices, where packets to Services are looked at that no socket of this kernel has sent
    /// (virtual machines, gVisor, SCTP): `auto` (veths whose peer is in another network namespace, taps), `none`, or names
    /// as above
    #[arg(long, value_name = "auto|none|GLOBS", default_value = "auto", help_heading = "Node")]
    pub pod_devices: PodDevices,

    /// Whose sockets are translated when they connect: `all`, or the `host`'s own. With `host` pods' packets go to the
    /// Service's address, so that sidecars and service meshes see it, and --pod-devices serves them
    #[arg(long, value_name = "WHOSE", default_value = "all", help_heading = "Node")]
    pub socket_lb: SocketLb,

    #[command(flatten)]
    pub traffic: TrafficFlags,

    /// Destroy TCP sockets, too, when their backend is removed, so that clients reconnect at once (UDP always is)
    #[arg(long, help_heading = "Node")]
    pub destroy_tcp_sockets: bool,

    /// Count connections by Service, and show this many of the busiest as kubelane_service_connections_total. 0: none,
    /// and nothing is counted
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=1000))]
    #[arg(help_heading = "Node")]
    pub service_metrics: u16,

    /// Key of a taint of this node's Node object that is taken away when the daemon is ready, and not before (needs the
    /// rights to get and patch nodes)
    #[arg(long, value_name = "KEY", value_parser = NonEmptyStringValueParser::new(), help_heading = "Node")]
    pub startup_taint: Option<String>,

    /// Service ports that the maps can hold. Counts when the maps are first made
    #[arg(long, value_name = "N", default_value_t = 65_536, value_parser = capacity(1 << 20), help_heading = "Capacity")]
    pub max_services: u32,

    /// Endpoints, summed over all Service ports, that the maps can hold. Counts when the maps are first made
    #[arg(long, value_name = "N", default_value_t = 262_144, value_parser = capacity(1 << 24), help_heading = "Capacity")]
    pub max_endpoints: u32,

    /// Ranges of loadBalancerSourceRanges, once for each port of their Service, that the maps can hold. Counts when the
    /// maps are first made
    #[arg(long, value_name = "N", default_value_t = 262_144, value_parser = capacity(1 << 24), help_heading = "Capacity")]
    pub max_source_ranges: u32,

    /// Score by which the kernel's out-of-memory killer chooses, -1000 (never) to 1000 [default: as it was started
    /// with]
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = "Node")]
    #[arg(value_parser = clap::value_parser!(i16).range(-1000..=1000))]
    pub oom_score_adj: Option<i16>,

    /// Do what `kubelane cleanup` does, and end
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = false)]
    #[arg(default_missing_value = "true", hide_default_value = true, value_parser = BoolishValueParser::new())]
    pub cleanup: bool,

    #[command(flatten, next_help_heading = "Logging")]
    pub log: LogFlags,

    #[command(flatten)]
    pub kube_proxy: KubeProxyFlags,

    /// Flags that were given more than once, where only the last one counts.
    #[arg(skip)]
    pub repeated: Vec<String>,
}

#[derive(Args, Clone, Copy, Debug)]
pub struct LogFlags {
    /// Format of the log on standard error
    ///
    /// [default: human]
    #[arg(long, visible_alias = "logging-format", value_enum, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,

    /// Verbosity: 0 warnings, 1-3 what happens, 4-5 every sync, 6 and more everything. RUST_LOG overrides it
    ///
    /// [default: 2]
    #[arg(short = 'v', long = "v", value_name = "N")]
    pub verbosity: Option<u8>,
}

#[derive(Args, Clone, Debug)]
pub struct CheckFlags {
    #[command(flatten)]
    pub node: NodeFlags,

    /// As with `kubelane run`: devices whose packets are looked at
    #[arg(long, value_name = "GLOBS", default_value = "", hide_default_value = true)]
    pub devices: DeviceSelection,
    #[command(flatten)]
    pub source: SourceFlags,
}

#[derive(Args, Clone, Debug)]
pub struct GetFlags {
    /// What to show
    #[arg(value_enum, value_name = "WHAT")]
    pub what: What,

    /// Only of Services of this name
    #[arg(value_name = "NAME")]
    pub name: Option<String>,

    /// Only of Services of this namespace [default: of all]
    #[arg(short, long, value_name = "NAMESPACE")]
    pub namespace: Option<String>,

    /// Of all namespaces: what is shown without -n, too
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    pub all_namespaces: bool,

    /// Only of this Service: NAMESPACE/NAME, with or without :PORT
    #[arg(long, value_name = "SERVICE")]
    pub service: Option<ServiceFilter>,

    /// Only what has this address, as the client's, the Service's, a backend's or the node's
    #[arg(long, value_name = "IP")]
    pub address: Option<IpAddr>,

    /// Only what is in this state: flows `opening`, `established` or `closing`; backends `active` or `terminating`; services and
    /// nodeports `serving`, `refused` or `dropped`; affinities `holds`, `expired` or `gone`
    #[arg(long, value_name = "STATE")]
    pub state: Option<String>,

    /// Output format: json, yaml, wide, name, jsonpath=TEMPLATE, and of services ipvsadm [default: a table]
    #[arg(short, long, value_name = "FORMAT")]
    pub output: Option<Output>,

    /// A table without its heads
    #[arg(long)]
    pub no_headers: bool,

    /// Go on, and show each row that comes, changes or goes (looked at once a second)
    #[arg(short, long)]
    pub watch: bool,

    /// Order by what this JSONPath leads to in each item, as -o json has them: .address
    #[arg(long, value_name = "JSONPATH", value_parser = sort_key)]
    pub sort_by: Option<JsonPath>,

    #[command(flatten)]
    pub pins: PinFlags,
}

#[derive(Args, Clone, Debug)]
pub struct ExplainFlags {
    /// What is asked for: IP:PORT[/PROTOCOL], or svc/NAMESPACE/NAME[:PORT] for every address of a Service
    #[arg(value_name = "DEST")]
    pub target: Target,

    /// Who asks: a pod's IP address, `node` for the node's own processes, `outside` or outside:IP [default: everyone,
    /// without a look at session affinity]
    #[arg(long, value_name = "CLIENT")]
    pub from: Option<Asker>,

    /// Output format [default: text]
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub output: Option<Format>,

    #[command(flatten)]
    pub pins: PinFlags,
}

#[derive(Args, Clone, Debug)]
pub struct CleanupFlags {
    #[command(flatten)]
    pub pins: PinFlags,
}

#[derive(Args, Clone, Debug)]
pub struct ReportFlags {
    /// Where to [default: kubelane-report-NODE-TIME.tar.gz in this directory]; - is standard output
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,

    /// Replace IP addresses and the names of namespaces, Services, ports, nodes and hosts, each by the same word everywhere
    #[arg(long)]
    pub redact: bool,

    /// Over how many seconds the counters are watched
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=600))]
    pub seconds: u16,

    #[command(flatten)]
    pub check: CheckFlags,
}

#[derive(Args, Clone, Debug)]
pub struct CompletionFlags {
    /// Whose
    #[arg(value_enum, value_name = "SHELL")]
    pub shell: Shell,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shell {
    Bash,
    Zsh,
    Fish,
}

#[derive(Args, Clone, Debug)]
pub struct ManFlags {
    /// Of which subcommand [default: kubelane itself]
    #[arg(value_name = "COMMAND")]
    pub command: Option<String>,

    /// Write the pages of all subcommands into this directory, and print nothing
    #[arg(long, value_name = "DIR", conflicts_with = "command")]
    pub directory: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Kubernetes,
    Directory(PathBuf),
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One line of text per event
    #[value(alias = "text")]
    Human,
    /// One JSON object per event
    Json,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Frontends: what clients can connect to
    #[value(aliases = ["service", "svc"])]
    Services,
    /// Backends: where connections go
    #[value(aliases = ["backend", "be"])]
    Backends,
    /// NodePorts, and the addresses that serve them
    #[value(aliases = ["nodeport", "np"])]
    Nodeports,
    /// Connections of packets from outside
    #[value(alias = "flow")]
    Flows,
    /// Which backend each client of a Service with session affinity had
    #[value(aliases = ["affinity", "aff"])]
    Affinities,
    /// Where packets from outside are met
    #[value(aliases = ["device", "dev"])]
    Devices,
    /// Source ports in use towards backends on other nodes
    Snat,
    /// How kubelane is on this node, in one row: version, last sync, refusals and drops
    Node,
    /// What the maps take up, and for how many Services
    Status,
}

/// Of what is no list.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    Yaml,
}

fn source(text: &str) -> Result<Source, String> {
    match text.split_once(':') {
        None if text == "kubernetes" => Ok(Source::Kubernetes),
        Some(("dir", path)) if !path.is_empty() => Ok(Source::Directory(path.into())),
        _ => Err("allowed are `kubernetes` and `dir:PATH`".to_owned()),
    }
}

fn capacity(most: u64) -> RangedU64ValueParser<u32> {
    RangedU64ValueParser::new().range(1..=most)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn clap_finds_no_mistake_in_the_definitions() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_source_is_kubernetes_or_a_directory() {
        assert_eq!(source("kubernetes"), Ok(Source::Kubernetes));
        assert_eq!(source("dir:/etc/a:b"), Ok(Source::Directory("/etc/a:b".into())));
        for bad in ["", "dir", "dir:", "Kubernetes", "kubernetes:", "file:/x"] {
            assert!(source(bad).is_err(), "{bad}");
        }
    }
}
