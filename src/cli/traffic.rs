//! Flags that say how traffic from the wire is treated: kube-proxy's own names where it has them.

use std::time::Duration;

use clap::Args;

use super::config_file::ConfigFile;
use super::value::{boolean, timeout};
use crate::model::{FlowTimeouts, ForwardThrough};

#[derive(Args, Clone, Copy, Debug, Default)]
#[command(next_help_heading = "Traffic from outside")]
pub struct TrafficFlags {
    /// How packets to backends on other nodes leave: by `redirect`, straight out of the route's device, or through the
    /// host's `stack`, where its firewall sees them
    ///
    /// [default: redirect]
    #[arg(long, value_name = "HOW")]
    pub forward_through: Option<ForwardThrough>,

    /// Let a FIN outside the window change a TCP flow's state (a reset outside never does)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(value_parser = boolean)]
    pub conntrack_tcp_be_liberal: Option<bool>,

    #[command(flatten)]
    pub timeouts: TimeoutFlags,
}

/// What was said of [`FlowTimeouts`], in flags or in the configuration file. Zero means the default.
#[derive(Args, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimeoutFlags {
    /// How long an established TCP flow is kept in silence, 1s to 720h; 0: the default
    ///
    /// [default: 24h]
    #[arg(long = "conntrack-tcp-timeout-established", value_name = "DURATION", value_parser = timeout)]
    pub tcp_established: Option<Duration>,

    /// The same for a TCP flow that one end has closed
    ///
    /// [default: 1h]
    #[arg(long = "conntrack-tcp-timeout-close-wait", value_name = "DURATION", value_parser = timeout)]
    pub tcp_close_wait: Option<Duration>,

    /// The same for a UDP flow without a reply
    ///
    /// [default: 30s]
    #[arg(long = "conntrack-udp-timeout", value_name = "DURATION", value_parser = timeout)]
    pub udp: Option<Duration>,

    /// The same for a UDP flow with replies
    ///
    /// [default: 120s]
    #[arg(long = "conntrack-udp-timeout-stream", value_name = "DURATION", value_parser = timeout)]
    pub udp_stream: Option<Duration>,
}

impl TrafficFlags {
    /// Fills in from the file what was not given.
    pub fn complete(&mut self, file: &ConfigFile) {
        self.conntrack_tcp_be_liberal = self.conntrack_tcp_be_liberal.or(file.tcp_be_liberal);
        self.timeouts = TimeoutFlags {
            tcp_established: self.timeouts.tcp_established.or(file.timeouts.tcp_established),
            tcp_close_wait: self.timeouts.tcp_close_wait.or(file.timeouts.tcp_close_wait),
            udp: self.timeouts.udp.or(file.timeouts.udp),
            udp_stream: self.timeouts.udp_stream.or(file.timeouts.udp_stream),
        };
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
}
