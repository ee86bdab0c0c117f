//! Flags of `kubelane monitor`.

use std::path::PathBuf;

use clap::Args;

use super::filter::{Filter, Range, Transport, reason};
use super::history::Since;
use super::kind::Verdict;
use super::print::Output;
use crate::cli::UsageError;
use crate::cli::flags::PinFlags;
use crate::cli::get::ServiceFilter;

#[derive(Args, Clone, Debug)]
pub struct MonitorFlags {
    /// Only events whose ends are so, in the words of pcap-filter(7): host, net, port, portrange, with src and dst; tcp, udp,
    /// sctp, icmp, icmp6, ip, ip6; and, or, not, parentheses
    #[arg(value_name = "EXPRESSION")]
    pub expression: Vec<String>,

    /// Only of this Service: NAMESPACE/NAME, with or without :PORT
    #[arg(long, value_name = "SERVICE", value_delimiter = ',', help_heading = "Filters")]
    pub service: Vec<ServiceFilter>,

    /// Only of Services of this namespace
    #[arg(short, long, value_name = "NAMESPACE", value_delimiter = ',', help_heading = "Filters")]
    pub namespace: Vec<String>,

    /// Only from this address: the client's, or the one that the backend sees
    #[arg(long, value_name = "IP[/LENGTH]", value_delimiter = ',', help_heading = "Filters")]
    pub from_ip: Vec<Range>,

    /// Only to this address: the Service's, or the backend's
    #[arg(long, value_name = "IP[/LENGTH]", value_delimiter = ',', help_heading = "Filters")]
    pub to_ip: Vec<Range>,

    /// Only with this port, of any of these
    #[arg(long, value_name = "PORT", value_delimiter = ',', help_heading = "Filters")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Vec<u16>,

    /// Only of this protocol: tcp, udp, sctp, or icmp (errors)
    #[arg(long, value_name = "PROTOCOL", value_delimiter = ',', help_heading = "Filters")]
    pub protocol: Vec<Transport>,

    /// Only with this verdict
    #[arg(long, value_name = "VERDICT", value_enum, value_delimiter = ',', help_heading = "Filters")]
    pub verdict: Vec<Verdict>,

    /// Only for this reason: as kubelane_datapath_verdicts_total names them, or of flows that have ended closed, reset,
    /// timed_out, never_proved, pushed_out, port_needed, port_used_again
    #[arg(long, value_name = "REASON", value_delimiter = ',', value_parser = reason, help_heading = "Filters")]
    pub reason: Vec<String>,

    /// Only what the other filters, taken together, do not let through
    #[arg(long, help_heading = "Filters")]
    pub not: bool,

    /// End after so many events
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,

    /// Of N events show one
    #[arg(long, value_name = "N", default_value_t = 1, hide_default_value = true, conflicts_with = "input")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub sample: u32,

    /// Show at most N events a second from each processor, and say how many there were beside; 0: all
    #[arg(long, value_name = "N", default_value_t = 1000, conflicts_with = "input")]
    #[arg(value_parser = clap::value_parser!(u32).range(..=10_000_000))]
    pub rate: u32,

    /// Show the events of this file, which -o json has written, and not those of now
    #[arg(long, value_name = "FILE", help_heading = "History")]
    pub input: Option<PathBuf>,

    /// With --input: only the last N of those that the filters let through
    #[arg(long, value_name = "N", requires = "input", help_heading = "History")]
    pub last: Option<usize>,

    /// With --input: only from this time on: 2026-11-29T08:00:00Z, or how long ago: 30s, 5m
    #[arg(long, value_name = "TIME", requires = "input", help_heading = "History")]
    pub since: Option<Since>,

    /// With --input: go on with what is written to the file
    #[arg(short, long, requires = "input", help_heading = "History")]
    pub follow: bool,

    /// Output format
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value = "compact")]
    pub output: Output,

    #[command(flatten)]
    pub pins: PinFlags,
}

impl MonitorFlags {
    /// # Errors
    /// When the expression is none, or there is nothing that --not could be about.
    pub fn filter(&self) -> Result<Filter, UsageError> {
        let words = self.expression.join(" ");
        let expression = match words.trim() {
            "" => None,
            text => Some(text.parse().map_err(|error| UsageError(format!("the expression {text:?}: {error}")))?),
        };
        let filter = Filter {
            services: self.service.clone(),
            namespaces: self.namespace.clone(),
            from: self.from_ip.clone(),
            to: self.to_ip.clone(),
            ports: self.port.clone(),
            protocols: self.protocol.clone(),
            verdicts: self.verdict.clone(),
            reasons: self.reason.clone(),
            expression,
            is_inverted: self.not,
        };
        if filter.is_inverted && filter.is_empty() {
            return Err(UsageError("--not is about other filters, and there is none".to_owned()));
        }
        Ok(filter)
    }
}
