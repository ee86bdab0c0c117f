//! Flags of `kubelane trace`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;

use super::packet::TcpFlags;
use crate::cli::explain::{Destination, Target};
use crate::cli::flags::{Format, PinFlags};

#[derive(Args, Clone, Debug)]
pub struct TraceFlags {
    /// Destination: IP:PORT or [IPv6]:PORT, with /tcp (the default), /udp or /sctp
    #[arg(value_name = "DEST", value_parser = destination, required_unless_present = "read")]
    pub to: Option<Destination>,

    /// Source of the packet: a client outside, or a pod of this node; IP or IP:PORT [default port: 40000]
    #[arg(long, value_name = "CLIENT", required_unless_present_any = ["read", "connect"])]
    pub from: Option<Source>,

    /// Device by which the packet comes in [default: the one that leads to its source]
    #[arg(long, value_name = "NAME")]
    pub device: Option<String>,

    /// Flags of a TCP packet, as tcpdump writes them: S, S., ., P., F., R
    #[arg(long, value_name = "FLAGS", default_value = "S")]
    pub tcp_flags: TcpFlags,

    /// Take the packet from a capture: pcap or pcapng, of Ethernet, of IP, or of `tcpdump -i any`
    #[arg(short, long, value_name = "FILE", conflicts_with_all = ["to", "from", "tcp_flags"])]
    pub read: Option<PathBuf>,

    /// Which packet of the capture
    #[arg(long, value_name = "N", default_value_t = 1, requires = "read", value_parser = clap::value_parser!(u32).range(1..))]
    pub packet: u32,

    /// End where the packet ends, without what would be answered
    #[arg(long)]
    pub no_answer: bool,

    /// Call connect() as a pod's process would, in a control group and a network namespace that are thrown away. It goes
    /// through the programs that are attached, and counts there; nothing is sent
    #[arg(long, conflicts_with_all = ["read", "from", "device", "tcp_flags", "no_answer"])]
    pub connect: bool,

    /// Cgroup2 directory that the daemon serves, below which --connect makes its own [default: the root of the cgroup2
    /// mount]
    #[arg(long, value_name = "PATH", requires = "connect")]
    pub cgroup: Option<PathBuf>,

    /// Output format [default: text]
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub output: Option<Format>,

    #[command(flatten)]
    pub pins: PinFlags,
}

fn destination(text: &str) -> Result<Destination, String> {
    match text.parse()? {
        Target::Destination(to) => Ok(to),
        Target::Service { .. } => Err("a packet has an address: see `kubelane get services`".to_owned()),
    }
}

/// Who sends a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    pub ip: IpAddr,
    pub port: Option<u16>,
}

impl FromStr for Source {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let whole = || text.parse().map(|at: SocketAddr| Source { ip: at.ip(), port: Some(at.port()) });
        let alone = text.parse().map(|ip| Source { ip, port: None });
        alone.or_else(|_| whole()).map_err(|_| "expected IP, IP:PORT or [IPv6]:PORT")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_an_address_with_or_without_a_port() {
        let source = |text: &str| text.parse::<Source>().map(|source| (source.ip.to_string(), source.port));
        assert_eq!(source("10.0.0.1"), Ok(("10.0.0.1".to_owned(), None)));
        assert_eq!(source("10.0.0.1:7"), Ok(("10.0.0.1".to_owned(), Some(7))));
        assert_eq!(source("fd00::1"), Ok(("fd00::1".to_owned(), None)));
        assert_eq!(source("[fd00::1]:7"), Ok(("fd00::1".to_owned(), Some(7))));
        assert!(source("web").is_err() && source("10.0.0.1:x").is_err());
        assert!(destination("svc/shop/web").is_err() && destination("10.0.0.1:80/udp").is_ok());
    }
}
