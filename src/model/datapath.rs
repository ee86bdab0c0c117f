//! How the datapath treats flows of packets from the wire, as the operator of the node set it.

use std::str::FromStr;
use std::time::Duration;

/// How long a flow is kept after its last packet in either direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowTimeouts {
    /// Both ends have sent, and neither has ended it.
    pub tcp_established: Duration,
    /// One end has sent its FIN, the other has not.
    pub tcp_close_wait: Duration,
    /// Only the client has sent so far.
    pub udp: Duration,
    /// Both ends have sent.
    pub udp_stream: Duration,
}

impl FlowTimeouts {
    /// Bounds of each.
    pub const LEAST: Duration = Duration::from_secs(1);
    pub const MOST: Duration = Duration::from_secs(30 * 24 * 3600);
}

impl Default for FlowTimeouts {
    /// TCP: kube-proxy's defaults. UDP: the kernel's (net.netfilter.nf_conntrack_udp_timeout and _stream), which
    /// kube-proxy leaves alone.
    fn default() -> Self {
        FlowTimeouts {
            tcp_established: Duration::from_secs(24 * 3600),
            tcp_close_wait: Duration::from_secs(3600),
            udp: Duration::from_secs(30),
            udp_stream: Duration::from_secs(120),
        }
    }
}

/// What the host's connection tracking is to be set to, as kube-proxy does for the connections that it and the CNI
/// translate. `None`: left as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostConntrack {
    /// Connections that its table holds.
    pub max: Option<u32>,
    pub tcp_established: Option<Duration>,
    pub tcp_close_wait: Option<Duration>,
    pub udp: Option<Duration>,
    pub udp_stream: Option<Duration>,
    /// Segments outside the window are no reason to take a packet for none of its connection.
    pub tcp_be_liberal: bool,
}

/// How packets to backends on other nodes leave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ForwardThrough {
    /// Straight out of the device of the route.
    #[default]
    Redirect,
    /// Through the host's stack: its firewall and its routing see them.
    Stack,
}

/// Whose sockets are translated when they connect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SocketLb {
    /// The node's own and those of pods.
    #[default]
    All,
    /// The node's own: pods' packets go to the Service's address, where sidecars and service meshes see it.
    Host,
}

impl FromStr for SocketLb {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "all" => Ok(SocketLb::All),
            "host" => Ok(SocketLb::Host),
            _ => Err("expected all or host"),
        }
    }
}

/// Whom backends see as the client of external traffic under traffic policy Cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClientSource {
    /// Who asks, where the backend is on the node that is asked.
    #[default]
    Client,
    /// The node that is asked, as with kube-proxy.
    Node,
}

impl FromStr for ClientSource {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "client" => Ok(ClientSource::Client),
            "node" => Ok(ClientSource::Node),
            _ => Err("expected client or node"),
        }
    }
}

/// When clients are hidden behind the node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Masquerade {
    /// External traffic under policy Cluster, of Services that say nothing else.
    pub external: ClientSource,
    /// Packets to cluster IPs as well (kube-proxy's masqueradeAll).
    pub all: bool,
}

impl FromStr for ForwardThrough {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "redirect" => Ok(ForwardThrough::Redirect),
            "stack" => Ok(ForwardThrough::Stack),
            _ => Err("expected redirect or stack"),
        }
    }
}
