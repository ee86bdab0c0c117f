//! Answers to load balancers' health probes, which the packet programs give in the daemon's place.

use super::Ipx;

/// What is answered at an address (a family's wildcard: at all of the node's) and port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeAnswer {
    pub address: Ipx,
    pub port: u16,
    /// One of [`probe_path`](crate::abi::probe_path).
    pub path: u32,
    /// Other paths of this port have answers of their own.
    pub has_paths: bool,
    /// An HTTP response: status line, headers and the empty line; and what follows.
    pub head: String,
    pub body: String,
}
