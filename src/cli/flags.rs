//! The command line's shape: subcommands, flags, their values, defaults and help.
//!
//! Flags have kube-proxy's own names where the meaning is the same. An invalid value is rejected here, with the flag
//! and the allowed values in the message, before anything is attached.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::builder::{BoolishValueParser, NonEmptyStringValueParser, RangedU64ValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};

use super::address::{BindAddress, HEALTHZ_PORT, METRICS_PORT, bind_address};
use super::explain::{Asker, Target};
use super::get::{JsonPath, Output, ServiceFilter, sort_key};
use super::kube_proxy::KubeProxyFlags;
use super::monitor::MonitorFlags;
use super::trace::TraceFlags;
use super::traffic::TrafficFlags;
use super::value::boolean;
use crate::model::SocketLb;
use crate::netdev::{DeviceSelection, NodePortAddresses, PodDevices};
use crate::serve::MetricsPage;

pub const DEFAULT_PIN_PATH: &str = "/sys/fs/bpf/kubelane";

const EXAMPLES: &str = "\
Examples:
  On a cluster (in a DaemonSet, or with a kubeconfig):
      kubelane run --kubeconfig /etc/kubelane/kubeconfig
  With the configuration that kubeadm wrote for kube-proxy:
      kubelane --config=/var/lib/kube-proxy/config.conf --hostname-override=node-a
  Without a cluster, from a directory of Service, EndpointSlice and Node YAML:
      kubelane run --source dir:/etc/kubelane --hostname-override node-a
  Would it run here? What is programmed now?
      kubelane check
      kubelane get services -o wide
  Which backend does a pod get from a Service, and why?
      kubelane explain --from 10.244.1.11 10.96.0.80:80
  Who is busy, and what is refused or dropped?
      kubelane top
  Remove every trace, after stopping the daemon:
      kubelane cleanup";

/// A kube-proxy replacement in eBPF that runs beside any CNI.
///
/// One daemon per node watches Services and EndpointSlices and serves their cluster IPs, NodePorts and other addresses.
/// Its state is in the kernel: the daemon can stop, crash or be upgraded without interrupting traffic.
#[derive(Parser, Debug)]
#[command(name = "kubelane", version, max_term_width = 100, after_help = EXAMPLES, arg_required_else_help = true)]
#[command(args_override_self = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run the daemon in the foreground. SIGTERM ends it and leaves the datapath serving. Flags without a subcommand
    /// mean `run`, as with kube-proxy
    Run(Box<RunFlags>),
    /// Report whether the daemon would run on this node: one line per condition, with a remedy
    ///
    /// Exit code 0: it would run. Exit code 1: it would not; lines that begin with FAIL say why.
    Check(Box<CheckFlags>),
    /// Show what is programmed in the kernel (works without a running daemon)
    Get(GetFlags),
    /// Show what the next connection to a destination gets, and why
    ///
    /// DEST is IP:PORT or [IPv6]:PORT, with /tcp (the default), /udp or /sctp, or svc/NAMESPACE/NAME[:PORT]. The answer
    /// comes from the live maps; the daemon adds the reasons that are in no map. Disagreements between the two are
    /// reported.
    Explain(ExplainFlags),
    /// Send one packet, or call connect() once, through the programs, and show each step
    ///
    /// The packet is given by addresses or by a capture, and comes in by the device that leads to its source. Shown are, for
    /// each program that it meets on this node, the rows that decide, the events, the verdict, the rows that are left, what
    /// the packet becomes, and the time; then the same for an answer. It is tried on copies of the tables that packets
    /// write: the programs that are attached never see it.
    Trace(Box<TraceFlags>),
    /// Watch Services, refusals, drops, maps and watches in a terminal
    ///
    /// Keys: arrows or j and k move, Enter opens a Service, Esc goes back, / filters, s sorts, p pauses, q quits.
    Top(TopFlags),
    /// Show what happens in the datapath, as it happens: connections, flows, refusals and drops with their reasons
    ///
    /// One line an event, until Ctrl-C. It reads, and changes nothing; while nobody listens nothing is told.
    Monitor(Box<MonitorFlags>),
    /// Remove every trace of kubelane from the kernel: links, programs, maps, pins
    ///
    /// Refused while a daemon uses the same pin path. Service addresses stop working on this node at once, unless kube-proxy
    /// runs again: then established connections from outside continue, too, as they are handed over to netfilter.
    Cleanup(CleanupFlags),
    /// Write one archive for a bug report: check, status, tables, warnings, log, counters, metrics
    ///
    /// It contains no credentials: of a kubeconfig only its path. --redact replaces addresses and names, consistently
    /// across all files.
    Report(Box<ReportFlags>),
    /// Print completions for a shell: `source <(kubelane completion bash)`
    Completion(CompletionFlags),
    /// Print a manual page: `kubelane man explain | man -l -`
    Man(ManFlags),
    /// Print the version
    Version,
}

/// Where the daemon's state is pinned.
#[derive(Args, Clone, Debug)]
pub struct PinFlags {
    /// Directory for pinned maps and links, on a BPF filesystem. Each daemon on a machine needs its own
    #[arg(long, value_name = "DIR", default_value = DEFAULT_PIN_PATH)]
    pub pin_path: PathBuf,
}

/// What `run` and `check` share.
#[derive(Args, Clone, Debug)]
pub struct NodeFlags {
    #[command(flatten)]
    pub pins: PinFlags,

    /// Cgroup2 directory: sockets of processes in it and below are served [default: the root of the cgroup2 mount, that
    /// is, every process of the node]
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<PathBuf>,

    /// File with a KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1), as kubeadm writes it. Flags and
    /// environment override it; one warning lists the fields that have no effect here
    #[arg(long, value_name = "FILE", value_parser = NonEmptyStringValueParser::new())]
    pub config: Option<String>,

    /// The node's primary address (for `--nodeport-addresses primary`). An IPv6 address, including `::`, changes the
    /// defaults of the next two flags to [::]:10256 and [::1]:10249
    #[arg(long, value_name = "IP")]
    pub bind_address: Option<IpAddr>,

    /// IP:PORT of /healthz, /livez and /readyz; "" or port 0 turns them off. 0.0.0.0 and [::] mean both families
    ///
    /// [default: 0.0.0.0:10256]
    #[arg(long, value_name = "IP:PORT", value_parser = |text: &str| bind_address(text, HEALTHZ_PORT))]
    pub healthz_bind_address: Option<BindAddress>,

    /// IP:PORT of /metrics, /healthz and /proxyMode; "" or port 0 turns them off
    ///
    /// [default: 127.0.0.1:10249]
    #[arg(long, value_name = "IP:PORT", value_parser = |text: &str| bind_address(text, METRICS_PORT))]
    pub metrics_bind_address: Option<BindAddress>,

    /// Exit if one of these addresses cannot be bound at startup. Without this flag, Services are served and kubelane
    /// retries
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(value_parser = boolean)]
    pub bind_address_hard_fail: Option<bool>,

    /// Port in the default of --healthz-bind-address (deprecated by kube-proxy)
    #[arg(long, value_name = "PORT", hide_short_help = true)]
    pub healthz_port: Option<u16>,

    /// Port in the default of --metrics-bind-address (deprecated by kube-proxy)
    #[arg(long, value_name = "PORT", hide_short_help = true)]
    pub metrics_port: Option<u16>,
}

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Source")]
pub struct SourceFlags {
    /// Source of Services and EndpointSlices: `kubernetes`, or `dir:PATH` for a directory of YAML or JSON files, which
    /// is watched [default: kubernetes, in a cluster or with --kubeconfig or --master]
    #[arg(long, value_name = "SOURCE", value_parser = source)]
    pub source: Option<Source>,

    /// Kubeconfig file for the API server [default: the pod's service account]
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,

    /// URL of the API server; overrides the kubeconfig's
    #[arg(long, value_name = "URL", value_parser = NonEmptyStringValueParser::new())]
    pub master: Option<String>,

    /// Name of this node's Node object [default: the host name in lower case]
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    pub hostname_override: Option<String>,

    /// Serve the Services whose label service.kubernetes.io/service-proxy-name has this value [default: those without
    /// the label]
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub service_proxy_name: Option<String>,
}

#[derive(Args, Clone, Debug)]
pub struct RunFlags {
    #[command(flatten)]
    pub source: SourceFlags,

    #[command(flatten, next_help_heading = "Node")]
    pub node: NodeFlags,

    /// Addresses of this node that serve NodePorts: CIDRs separated by commas, or `primary` for the Node object's first
    /// InternalIP of each family. A family without a CIDR is not restricted. May be repeated [default: all addresses]
    #[arg(long, value_name = "CIDRS", help_heading = "Node")]
    pub nodeport_addresses: Vec<NodePortAddresses>,

    /// External devices, on which NodePorts, load balancer and external IPs are served: names separated by commas, with
    /// the wildcards * and ? [default: devices with an address of the node or a default route, and tunnels; not the
    /// devices and bridges of pods and virtual machines]
    #[arg(long, value_name = "GLOBS", default_value = "", hide_default_value = true, help_heading = "Node")]
    pub devices: DeviceSelection,

    /// The node's ends of pods' devices, where packets to Services are translated that did not come from a socket of
    /// this kernel (virtual machines, gVisor, SCTP): `auto` (veths whose peer is in another network namespace, taps),
    /// `none`, or names as above
    #[arg(long, value_name = "auto|none|GLOBS", default_value = "auto", help_heading = "Node")]
    pub pod_devices: PodDevices,

    /// Whose sockets are translated when they connect: `all`, or the `host`'s own. With `host`, pods' packets keep the
    /// Service's address, so that sidecars and service meshes see it, and are translated on --pod-devices
    #[arg(long, value_name = "WHOSE", default_value = "all", help_heading = "Node")]
    pub socket_lb: SocketLb,

    #[command(flatten)]
    pub traffic: TrafficFlags,

    /// Also destroy TCP sockets when their backend is removed, so that clients reconnect at once (UDP sockets are
    /// reconnected by the daemon)
    #[arg(long, help_heading = "Node")]
    pub destroy_tcp_sockets: bool,

    /// Count connections, refusals and drops per Service, and export those of this many of the busiest as
    /// kubelane_service_connections_total and kubelane_service_verdicts_total. 0 counts nothing
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=1000))]
    #[arg(help_heading = "Node")]
    pub service_metrics: u16,

    /// With --service-metrics, also measure what clients and backends send each other: packets and bytes per Service,
    /// bytes of translated TCP sockets once they are closed, how long these took to connect, and how many never did. Costs
    /// translated packets a map lookup or two, and TCP sockets a few calls of one more program
    #[arg(long, help_heading = "Node")]
    pub service_traffic: bool,

    /// Serve a page for browsers at / of --metrics-bind-address. It shows names and addresses of Services to everyone who
    /// can connect: `auto` (only if that address is a loopback address), `always` or `never`
    #[arg(long, value_name = "WHEN", default_value = "auto", help_heading = "Node")]
    pub metrics_page: MetricsPage,

    /// Key of a taint that is removed from this node's Node object when the daemon is ready, and not before (needs the
    /// rights to get and patch nodes)
    #[arg(long, value_name = "KEY", value_parser = NonEmptyStringValueParser::new(), help_heading = "Node")]
    pub startup_taint: Option<String>,

    /// Maximum number of Service ports. The maps grow with the number that there are
    #[arg(long, value_name = "N", default_value_t = 65_536, value_parser = capacity(1 << 20), help_heading = "Capacity")]
    pub max_services: u32,

    /// Maximum number of endpoints, summed over all Service ports. The maps grow with the number that there are
    #[arg(long, value_name = "N", default_value_t = 262_144, value_parser = capacity(1 << 24), help_heading = "Capacity")]
    pub max_endpoints: u32,

    /// Maximum number of loadBalancerSourceRanges, counted once per port of their Service
    #[arg(long, value_name = "N", default_value_t = 262_144, value_parser = capacity(1 << 24), help_heading = "Capacity")]
    pub max_source_ranges: u32,

    /// Score for the kernel's out-of-memory killer, -1000 (never kill) to 1000 [default: unchanged]
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = "Node")]
    #[arg(value_parser = clap::value_parser!(i16).range(-1000..=1000))]
    pub oom_score_adj: Option<i16>,

    /// Once the daemon is ready and kube-proxy has ended, remove kube-proxy's rules from this node, as `kube-proxy --cleanup`
    /// does, by the node's own iptables, nft, ipvsadm and ipset
    #[arg(long, help_heading = "Node")]
    pub takeover: bool,

    /// Start although a newer version has left maps that this one cannot read, and remove them: flows from outside and
    /// clients' affinity begin anew
    #[arg(long, help_heading = "Node")]
    pub discard_newer_state: bool,

    /// Attach and change nothing: compare what would be answered with the rules that kube-proxy has written on this node,
    /// once a minute, and log the differences. `once`: print them, and exit with code 1 if there are any
    #[arg(long, value_enum, value_name = "WHEN", num_args = 0..=1, require_equals = true, help_heading = "Node")]
    #[arg(default_missing_value = "watch", conflicts_with = "cleanup")]
    pub shadow: Option<Shadow>,

    /// Do what `kubelane cleanup` does, and exit
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = false)]
    #[arg(default_missing_value = "true", hide_default_value = true, value_parser = BoolishValueParser::new())]
    pub cleanup: bool,

    #[command(flatten, next_help_heading = "Logging")]
    pub log: LogFlags,

    #[command(flatten)]
    pub kube_proxy: KubeProxyFlags,

    /// Flags that were given more than once, of which only the last one counts.
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

    /// Verbosity: 0 warnings, 1-3 events, 4-5 every sync, 6 and more everything. RUST_LOG overrides it
    ///
    /// [default: 2]
    #[arg(short = 'v', long = "v", value_name = "N")]
    pub verbosity: Option<u8>,
}

#[derive(Args, Clone, Debug)]
pub struct CheckFlags {
    #[command(flatten)]
    pub node: NodeFlags,

    /// External devices, as with `kubelane run`
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

    /// Only Services of this name
    #[arg(value_name = "NAME")]
    pub name: Option<String>,

    /// Only Services of this namespace [default: all]
    #[arg(short, long, value_name = "NAMESPACE")]
    pub namespace: Option<String>,

    /// All namespaces, which is also the default
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    pub all_namespaces: bool,

    /// Only this Service: NAMESPACE/NAME, with or without :PORT
    #[arg(long, value_name = "SERVICE")]
    pub service: Option<ServiceFilter>,

    /// Only rows with this address, as the client's, the Service's, a backend's or the node's
    #[arg(long, value_name = "IP")]
    pub address: Option<IpAddr>,

    /// Only rows in this state: flows `opening`, `established` or `closing`; backends `active` or `terminating`;
    /// services and nodeports `serving`, `refused` or `dropped`; affinities `holds`, `expired` or `gone`
    #[arg(long, value_name = "STATE")]
    pub state: Option<String>,

    /// Output format: json, yaml, wide, name, jsonpath=TEMPLATE, and for services ipvsadm [default: a table]
    #[arg(short, long, value_name = "FORMAT")]
    pub output: Option<Output>,

    /// Omit the table's header
    #[arg(long)]
    pub no_headers: bool,

    /// Keep running, and show each row that is added, changed or deleted (polled once a second)
    #[arg(short, long)]
    pub watch: bool,

    /// Sort by this JSONPath in each item of -o json: .address
    #[arg(long, value_name = "JSONPATH", value_parser = sort_key)]
    pub sort_by: Option<JsonPath>,

    #[command(flatten)]
    pub pins: PinFlags,
}

#[derive(Args, Clone, Debug)]
pub struct ExplainFlags {
    /// Destination: IP:PORT[/PROTOCOL], or svc/NAMESPACE/NAME[:PORT] for every address of a Service
    #[arg(value_name = "DEST")]
    pub target: Target,

    /// Client: a pod's IP address, `node` for the node's own processes, `outside` or outside:IP [default: all clients,
    /// without session affinity]
    #[arg(long, value_name = "CLIENT")]
    pub from: Option<Asker>,

    /// Output format [default: text]
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub output: Option<Format>,

    #[command(flatten)]
    pub pins: PinFlags,
}

#[derive(Args, Clone, Debug)]
pub struct TopFlags {
    /// Seconds from one look to the next
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=60))]
    pub interval: u16,

    /// Colours: `auto` (unless NO_COLOR is set), `always` or `never`
    #[arg(long, value_enum, value_name = "WHEN", default_value = "auto")]
    pub color: Color,

    #[command(flatten)]
    pub pins: PinFlags,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Color {
    Auto,
    Always,
    Never,
}

#[derive(Args, Clone, Debug)]
pub struct CleanupFlags {
    #[command(flatten)]
    pub pins: PinFlags,
}

#[derive(Args, Clone, Debug)]
pub struct ReportFlags {
    /// Output file; - is standard output [default: kubelane-report-NODE-TIME.tar.gz in this directory]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,

    /// Replace IP addresses and the names of namespaces, Services, ports, nodes and hosts, consistently across all
    /// files
    #[arg(long)]
    pub redact: bool,

    /// Number of seconds over which the counters are compared
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=600))]
    pub seconds: u16,

    #[command(flatten)]
    pub check: CheckFlags,
}

#[derive(Args, Clone, Debug)]
pub struct CompletionFlags {
    /// Shell
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
    /// Subcommand [default: kubelane itself]
    #[arg(value_name = "COMMAND")]
    pub command: Option<String>,

    /// Write the pages of all subcommands to this directory, and print nothing
    #[arg(long, value_name = "DIR", conflicts_with = "command")]
    pub directory: Option<PathBuf>,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shadow {
    /// Until it is ended
    Watch,
    Once,
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
    /// Flows: connections whose packets are translated
    #[value(alias = "flow")]
    Flows,
    /// Which backend each client of a Service with session affinity had
    #[value(aliases = ["affinity", "aff"])]
    Affinities,
    /// Devices with programs for packets
    #[value(aliases = ["device", "dev"])]
    Devices,
    /// Source ports in use towards backends on other nodes
    Snat,
    /// State of kubelane on this node, in one row: version, last sync, refusals and drops
    Node,
    /// Memory use of the maps, and the number of Services
    Status,
}

/// Formats of commands whose output is not a list.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    Yaml,
}

fn source(text: &str) -> Result<Source, String> {
    match text.split_once(':') {
        None if text == "kubernetes" => Ok(Source::Kubernetes),
        Some(("dir", path)) if !path.is_empty() => Ok(Source::Directory(path.into())),
        _ => Err("expected `kubernetes` or `dir:PATH`".to_owned()),
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
