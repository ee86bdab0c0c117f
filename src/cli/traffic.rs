//! Flags for traffic from outside and for the host's connection tracking. They have kube-proxy's own names where it has
//! them.

use std::time::Duration;

use clap::Args;

use super::config_file::ConfigFile;
use super::value::{boolean, timeout};
use crate::model::{ClientSource, FlowTimeouts, ForwardThrough, HostConntrack, Masquerade};

#[derive(Args, Clone, Copy, Debug, Default)]
#[command(next_help_heading = "Traffic from outside")]
pub struct TrafficFlags {
    /// How packets to backends on other nodes leave: by `redirect`, straight through the route's device, or through the
    /// host's `stack`, where its firewall sees them
    ///
    /// [default: redirect]
    #[arg(long, value_name = "HOW")]
    pub forward_through: Option<ForwardThrough>,

    /// Source address that a backend on the node sees under externalTrafficPolicy Cluster: the `client`'s, or the
    /// `node`'s, as with kube-proxy (for pods whose default route leads elsewhere, or network policies that admit node
    /// addresses only). The annotation kubelane.io/cluster-policy-source sets it for one Service
    ///
    /// [default: client]
    #[arg(long, value_name = "WHO")]
    pub cluster_policy_source: Option<ClientSource>,

    /// Also masquerade packets to cluster IPs. (Sockets that are translated when they connect are not masqueraded; see
    /// --socket-lb)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(value_parser = boolean)]
    pub masquerade_all: Option<bool>,

    /// Also serve cluster IPs to clients outside, whose routers route the Service network to nodes
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(value_parser = boolean)]
    pub external_cluster_ip: Option<bool>,

    /// Let a FIN outside the window change a TCP flow's state (a reset outside never does), and set the sysctl
    /// net.netfilter.nf_conntrack_tcp_be_liberal
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(value_parser = boolean)]
    pub conntrack_tcp_be_liberal: Option<bool>,

    #[command(flatten)]
    pub timeouts: TimeoutFlags,

    #[command(flatten)]
    pub table: TableFlags,
}

/// The size of the host's connection tracking table (net.netfilter.nf_conntrack_max), which is raised if it is smaller.
#[derive(Args, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableFlags {
    /// Size of the host's connection tracking table, per processor; 0 leaves the table as it is
    ///
    /// [default: 32768]
    #[arg(long = "conntrack-max-per-core", value_name = "N", value_parser = clap::value_parser!(u32).range(0..=i32::MAX as i64))]
    pub max_per_core: Option<u32>,

    /// Minimum size of that table
    ///
    /// [default: 131072]
    #[arg(long = "conntrack-min", value_name = "N", value_parser = clap::value_parser!(u32).range(0..=i32::MAX as i64))]
    pub min: Option<u32>,
}

impl TableFlags {
    /// What the table is to hold on a node with so many processors; `None`: what it holds.
    fn max(self, processors: u32) -> Option<u32> {
        let per_core = self.max_per_core.unwrap_or(32_768);
        (per_core > 0).then(|| per_core.saturating_mul(processors).max(self.min.unwrap_or(131_072)))
    }
}

/// What was said of [`FlowTimeouts`], in flags or in the configuration file, and of the node's sysctls of the same
/// names: zero is the default for flows, and leaves the sysctl as it is.
#[derive(Args, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimeoutFlags {
    /// Idle timeout of an established TCP flow, 1s to 720h; 0 means the default. The sysctls of this flag and the next
    /// (net.netfilter.nf_conntrack_tcp_timeout_established, _close_wait) are raised to it, unless it is 0
    ///
    /// [default: 24h]
    #[arg(long = "conntrack-tcp-timeout-established", value_name = "DURATION", value_parser = timeout)]
    pub tcp_established: Option<Duration>,

    /// Idle timeout of a TCP flow that one end has closed
    ///
    /// [default: 1h]
    #[arg(long = "conntrack-tcp-timeout-close-wait", value_name = "DURATION", value_parser = timeout)]
    pub tcp_close_wait: Option<Duration>,

    /// Idle timeout of a UDP flow without a reply. The sysctls of this flag and the next are raised only if they are
    /// given
    ///
    /// [default: 30s]
    #[arg(long = "conntrack-udp-timeout", value_name = "DURATION", value_parser = timeout)]
    pub udp: Option<Duration>,

    /// Idle timeout of a UDP flow with replies
    ///
    /// [default: 120s]
    #[arg(long = "conntrack-udp-timeout-stream", value_name = "DURATION", value_parser = timeout)]
    pub udp_stream: Option<Duration>,
}

impl TrafficFlags {
    /// Fills in from the file what was not given.
    pub fn complete(&mut self, file: &ConfigFile) {
        self.conntrack_tcp_be_liberal = self.conntrack_tcp_be_liberal.or(file.tcp_be_liberal);
        self.masquerade_all = self.masquerade_all.or(file.masquerade_all);
        self.timeouts = TimeoutFlags {
            tcp_established: self.timeouts.tcp_established.or(file.timeouts.tcp_established),
            tcp_close_wait: self.timeouts.tcp_close_wait.or(file.timeouts.tcp_close_wait),
            udp: self.timeouts.udp.or(file.timeouts.udp),
            udp_stream: self.timeouts.udp_stream.or(file.timeouts.udp_stream),
        };
        self.table = TableFlags {
            max_per_core: self.table.max_per_core.or(file.table.max_per_core),
            min: self.table.min.or(file.table.min),
        };
    }

    /// When clients are hidden behind the node.
    pub fn masquerade(&self) -> Masquerade {
        Masquerade {
            external: self.cluster_policy_source.unwrap_or_default(),
            all: self.masquerade_all.unwrap_or_default(),
        }
    }

    /// What the host's connection tracking is to be set to on a node with so many processors.
    pub fn host_conntrack(&self, processors: u32) -> HostConntrack {
        let (given, defaults) = (self.timeouts, FlowTimeouts::default());
        let unless_zero = |timeout: Duration| Some(timeout).filter(|timeout| !timeout.is_zero());
        HostConntrack {
            max: self.table.max(processors),
            tcp_established: unless_zero(given.tcp_established.unwrap_or(defaults.tcp_established)),
            tcp_close_wait: unless_zero(given.tcp_close_wait.unwrap_or(defaults.tcp_close_wait)),
            udp: given.udp.and_then(unless_zero),
            udp_stream: given.udp_stream.and_then(unless_zero),
            tcp_be_liberal: self.conntrack_tcp_be_liberal.unwrap_or_default(),
        }
    }
}

impl From<TimeoutFlags> for FlowTimeouts {
    fn from(given: TimeoutFlags) -> Self {
        let or = |given: Option<Duration>, default| given.filter(|timeout| !timeout.is_zero()).unwrap_or(default);
        let defaults = FlowTimeouts::default();
        FlowTimeouts {
            tcp_established: or(given.tcp_established, defaults.tcp_established),
            tcp_close_wait: or(given.tcp_close_wait, defaults.tcp_close_wait),
            udp: or(given.udp, defaults.udp),
            udp_stream: or(given.udp_stream, defaults.udp_stream),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, FromArgMatches as _, Parser};

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        traffic: TrafficFlags,
    }

    fn traffic(line: &str, file: &ConfigFile) -> TrafficFlags {
        let matches = Line::command().get_matches_from(format!("x {line}").split_whitespace());
        let mut flags = Line::from_arg_matches(&matches).unwrap().traffic;
        flags.complete(file);
        flags
    }

    #[test]
    fn timeouts_are_the_flags_then_the_files_and_zero_is_the_default() {
        let seconds = Duration::from_secs;
        let file = ConfigFile {
            timeouts: TimeoutFlags {
                tcp_established: Some(seconds(7200)),
                udp: Some(seconds(5)),
                ..TimeoutFlags::default()
            },
            ..ConfigFile::default()
        };
        let line = "--conntrack-tcp-timeout-established=0 --conntrack-udp-timeout-stream 3m";
        let found = FlowTimeouts::from(traffic(line, &file).timeouts);
        let expected = FlowTimeouts { udp: seconds(5), udp_stream: seconds(180), ..FlowTimeouts::default() };
        assert_eq!(found, expected);
        let defaults = FlowTimeouts::from(traffic("", &ConfigFile::default()).timeouts);
        let all = [defaults.tcp_established, defaults.tcp_close_wait, defaults.udp, defaults.udp_stream];
        assert_eq!(all, [86_400, 3600, 30, 120].map(seconds));
    }

    #[test]
    fn kube_proxys_switch_for_segments_outside_the_window_is_used() {
        let file = ConfigFile { tcp_be_liberal: Some(true), ..ConfigFile::default() };
        for (line, file, expected) in [
            ("", &ConfigFile::default(), None),
            ("", &file, Some(true)),
            ("--conntrack-tcp-be-liberal", &ConfigFile::default(), Some(true)),
            ("--conntrack-tcp-be-liberal=F", &file, Some(false)),
        ] {
            assert_eq!(traffic(line, file).conntrack_tcp_be_liberal, expected, "{line}");
        }
    }

    #[test]
    fn the_hosts_connection_tracking_is_set_as_kube_proxy_sets_it() {
        let seconds = |n| Some(Duration::from_secs(n));
        let usual = HostConntrack {
            max: Some(131_072),
            tcp_established: seconds(86_400),
            tcp_close_wait: seconds(3600),
            udp: None,
            udp_stream: None,
            tcp_be_liberal: false,
        };
        let left = TimeoutFlags { tcp_established: seconds(0), tcp_close_wait: seconds(0), ..TimeoutFlags::default() };
        let zeros = ConfigFile {
            timeouts: left,
            table: TableFlags { max_per_core: Some(0), min: None },
            ..ConfigFile::default()
        };
        let none = HostConntrack { max: None, tcp_established: None, tcp_close_wait: None, ..usual };
        let asked = "--conntrack-udp-timeout=20s --conntrack-udp-timeout-stream 1m --conntrack-tcp-be-liberal";
        let udp = HostConntrack { udp: seconds(20), udp_stream: seconds(60), tcp_be_liberal: true, ..usual };
        let table = [
            ("", ConfigFile::default(), 2, usual),
            ("", ConfigFile::default(), 8, HostConntrack { max: Some(262_144), ..usual }),
            ("--conntrack-min=1", ConfigFile::default(), 2, HostConntrack { max: Some(65_536), ..usual }),
            (
                "--conntrack-max-per-core=0 --conntrack-min=9",
                ConfigFile::default(),
                2,
                HostConntrack { max: None, ..usual },
            ),
            (asked, ConfigFile::default(), 2, udp),
            ("--conntrack-udp-timeout=0", ConfigFile::default(), 2, usual),
            ("", zeros.clone(), 2, none),
            ("--conntrack-max-per-core=1 --conntrack-min=7", zeros, 8, HostConntrack { max: Some(8), ..none }),
        ];
        for (line, file, processors, expected) in table {
            assert_eq!(traffic(line, &file).host_conntrack(processors), expected, "{line}");
        }
    }
}
