//! What a test says to `kubelane-lab client`, one JSON object a line, and what the client answers.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// A socket's family, type and protocol. The v6 kinds are dual stack: they may speak to v4-mapped addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Tcp4,
    Tcp6,
    Udp4,
    Udp6,
    UdpLite4,
    UdpLite6,
    Mptcp4,
    Mptcp6,
}

impl Kind {
    pub fn is_stream(self) -> bool {
        matches!(self, Kind::Tcp4 | Kind::Tcp6 | Kind::Mptcp4 | Kind::Mptcp6)
    }

    pub fn is_ipv6(self) -> bool {
        matches!(self, Kind::Tcp6 | Kind::Udp6 | Kind::UdpLite6 | Kind::Mptcp6)
    }
}

/// One step of a client.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    /// Makes a socket; answered with its number.
    Open {
        kind: Kind,
    },
    Bind {
        socket: u32,
        to: SocketAddr,
    },
    /// As `Bind`, but the port is left to connect() (IP_BIND_ADDRESS_NO_PORT).
    BindAddress {
        socket: u32,
        to: SocketAddr,
    },
    /// Bounded to three seconds for streams.
    Connect {
        socket: u32,
        to: SocketAddr,
    },
    /// connect() to AF_UNSPEC: of a datagram socket, the end of its association.
    Disconnect {
        socket: u32,
    },
    Send {
        socket: u32,
    },
    SendTo {
        socket: u32,
        to: SocketAddr,
    },
    /// Waits up to two seconds, then EAGAIN.
    Receive {
        socket: u32,
    },
    Peer {
        socket: u32,
    },
    Local {
        socket: u32,
    },
    Close {
        socket: u32,
    },
    /// Closes a stream with a reset.
    Abort {
        socket: u32,
    },
    /// `times` new sockets, each connected (or not, for datagrams with `unconnected`), each asking once who answers.
    Ask {
        kind: Kind,
        to: SocketAddr,
        times: u32,
        unconnected: bool,
    },
    /// One UDP socket is connected to each of these in turn, `times` over. Sends nothing.
    ConnectAll {
        to: Vec<SocketAddr>,
        times: u32,
    },
    /// One datagram of `length` bytes from a new socket; an answer of the same length has to come from `to`.
    AskLong {
        to: SocketAddr,
        length: usize,
    },
    /// `times` HTTP/1.1 requests, each on a new connection.
    Http {
        to: SocketAddr,
        times: u32,
    },
    /// Sends so many bytes to a server that returns what it gets, and compares all that comes back ([`pattern`]).
    Transfer {
        to: SocketAddr,
        bytes: u64,
    },
    /// The ICMP errors that have come since this was last asked. Of a pod with a stack of its own.
    Errors,
}

/// The byte at this place of a transfer.
pub fn pattern(offset: u64) -> u8 {
    // Fibonacci hashing: neighbours differ, and so do any two segments.
    offset.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[0]
}

/// What an ICMP error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IcmpKind {
    PortUnreachable,
    TooBig { mtu: u32 },
    Other { kind: u8, code: u8 },
}

/// An ICMP error of either family, as its bytes arrived.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IcmpError {
    pub kind: IcmpKind,
    /// Who sent it.
    pub by: IpAddr,
    /// The packet inside.
    pub protocol: u8,
    pub from: SocketAddr,
    pub to: SocketAddr,
    /// Whether every checksum holds, of both headers and of the message.
    pub is_intact: bool,
}

/// What came of a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum Reply {
    Done,
    Socket {
        socket: u32,
    },
    Text {
        text: String,
        from: Option<SocketAddr>,
    },
    Address {
        address: SocketAddr,
    },
    /// Answers by who gave them: a server's name, or what went wrong instead ("ECONNREFUSED", "peer 10.0.0.1:80").
    Counts {
        counts: BTreeMap<String, u32>,
        /// How long the slowest took.
        slowest: u64,
    },
    Errors {
        errors: Vec<IcmpError>,
    },
    /// The errno's name, or a short description where there is none.
    Failed {
        errno: String,
    },
}

/// A reply, and how long the step took.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Answer {
    pub micros: u64,
    #[serde(flatten)]
    pub reply: Reply,
}

/// One request of `kubelane-lab load`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LoadRecord {
    /// When the request began: CLOCK_MONOTONIC, microseconds.
    pub began: u64,
    pub micros: u64,
    /// The server's name, or what went wrong.
    pub result: Result<String, String>,
}
