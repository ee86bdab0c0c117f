//! What the operator decides of the datapath, and what follows from that for the size of its tables.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::abi::{FlowLimits, flow_openings};

/// As many flows as kube-proxy lets conntrack have: 32768 for each processor, 131072 at least.
const FLOWS_EACH: u32 = 32_768;
const FLOWS: u32 = 131_072;

/// Where the datapath lives and how much it can hold.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The pin directory, on a BPF file system.
    pub pin_path: PathBuf,
    /// The cgroup2 directory whose processes are served.
    pub cgroup: PathBuf,
    /// Backends that the maps may hold; like the others, they have room for as many as there are.
    pub max_endpoints: u32,
    /// Services that the maps may hold, with up to four frontends each.
    pub max_services: u32,
    /// Ranges of clients, of all Service ports together, that the maps may hold.
    pub max_source_ranges: u32,
    /// How long flows last.
    pub flow_limits: FlowLimits,
    /// A FIN counts whatever its sequence number is; a reset never does (nf_conntrack_tcp_be_liberal).
    pub tcp_be_liberal: bool,
    /// Sockets of pods are left alone.
    pub host_sockets_only: bool,
    /// Pods' packets are served: programs will be on their devices.
    pub has_pod_devices: bool,
    /// Cluster IPs serve the wire.
    pub external_cluster_ips: bool,
    /// What a newer version has left, which this one cannot read, is removed.
    pub discard_newer: bool,
}

/// What the programs count of each Service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Counting {
    #[default]
    Nothing,
    /// Connections, refusals and drops.
    Connections,
    /// And what its clients and backends send each other: packets of flows, and TCP sockets that are translated.
    Traffic,
}

/// How the table of flows is shared out.
pub(super) struct FlowQuotas {
    /// Not proved yet.
    pub opening: u32,
    pub tcp: u32,
    /// UDP and SCTP.
    pub other: u32,
}

impl FlowQuotas {
    pub fn new(processors: u32) -> FlowQuotas {
        let opening = processors * flow_openings::FLOW_OPENINGS;
        let proved = FLOWS.max(processors * FLOWS_EACH) - opening;
        FlowQuotas { opening, tcp: proved - proved / 4, other: proved / 4 }
    }

    /// Flows have two rows each.
    pub fn rows(&self) -> u32 {
        2 * (self.opening + self.tcp + self.other)
    }
}

/// Rows of an LRU map in which so many are of use: before 6.16 each processor keeps up to 128 free ones for itself.
pub(super) fn lru_rows(rows: u32, processors: u32) -> u32 {
    rows + 128 * processors
}

pub(super) fn processors() -> Result<u32> {
    Ok(libbpf_rs::num_possible_cpus().context("cannot count the processors")? as u32)
}
