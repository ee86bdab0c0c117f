//! The rows of the kernel's maps, as `bpf/abi.h` declares them. Plain bytes: no pointers, no padding.
//!
//! The enums' numbers are read from `bpf/abi.h` by build.rs (modules `frontend_flag`, `pool_member`, ...); struct sizes
//! are asserted here and there, and a test compares every offset with the object's BTF.

use std::time::Duration;

use bytemuck::{Pod, Zeroable};

use crate::model::{Family, FlowTimeouts, IpRange, Ipx, ProbeAnswer, Protocol};

include!(concat!(env!("OUT_DIR"), "/abi_enums.rs"));

/// Key of `frontends`. A NodePort has the wildcard address of its family.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct FrontendKey {
    /// Network order, IPv4 as v4-mapped.
    pub address: [u8; 16],
    /// Network order.
    pub port_be: [u8; 2],
    /// IP protocol number.
    pub protocol: u8,
    pub zero: u8,
}

impl FrontendKey {
    /// `port` in host order.
    pub fn new(ip: Ipx, port: u16, protocol: Protocol) -> Self {
        FrontendKey { address: ip.0, port_be: port.to_be_bytes(), protocol: protocol as u8, zero: 0 }
    }

    pub fn ip(&self) -> Ipx {
        Ipx(self.address)
    }

    /// Host order.
    pub fn port(&self) -> u16 {
        u16::from_be_bytes(self.port_be)
    }
}

/// A dense region of `slots`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Pool {
    pub base: u32,
    pub count: u32,
    /// One of [`pool_member`].
    pub member: u8,
    /// One of [`pool_empty`].
    pub on_empty: u8,
    pub zero: u16,
}

/// Value of `frontends`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Frontend {
    pub service_id: u32,
    /// Bits of [`frontend_flag`].
    pub flags: u32,
    /// 0: no session affinity.
    pub affinity_seconds: u32,
    /// For clients on this node.
    pub inside: Pool,
    /// For packets from the wire.
    pub outside: Pool,
}

/// Value of `backends`, whose index is the backend id.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Backend {
    pub address: [u8; 16],
    /// Network order.
    pub port_be: [u8; 2],
    /// One of [`backend_state`].
    pub state: u8,
    /// Bits of [`pool_member`].
    pub pools: u8,
    pub generation: u32,
    pub service_id: u32,
    /// IP protocol number.
    pub protocol: u8,
    /// Bits of [`backend_flag`].
    pub flags: u8,
    pub zero: u16,
}

/// Value of `services`, keyed by service id: the service port's name, NUL padded.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct ServiceName {
    pub text: [u8; 192],
}

impl ServiceName {
    /// Kubernetes limits each of the three names to 63 bytes, so that every real name fits; longer text is cut.
    pub fn new(text: &str) -> Self {
        let mut name = ServiceName { text: [0; 192] };
        let n = text.len().min(name.text.len());
        name.text[..n].copy_from_slice(&text.as_bytes()[..n]);
        name
    }

    pub fn as_str(&self) -> &str {
        let end = self.text.iter().position(|b| *b == 0).unwrap_or(self.text.len());
        std::str::from_utf8(&self.text[..end]).unwrap_or("(not UTF-8)")
    }
}

impl std::fmt::Debug for ServiceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.as_str().fmt(f)
    }
}

/// Key of `source_ranges`, a trie: the value is a u32, 1.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct SourceRangeKey {
    /// 32 plus the range's length in bits, plus 96 for IPv4.
    pub prefix_length: u32,
    pub service_id: u32,
    /// Host bits cleared; IPv4 as v4-mapped.
    pub address: [u8; 16],
}

impl SourceRangeKey {
    pub fn new(service_id: u32, range: IpRange) -> Self {
        let family_bits = if range.ip.family() == Family::Ipv4 { 96 } else { 0 };
        SourceRangeKey { prefix_length: 32 + family_bits + u32::from(range.prefix), service_id, address: range.ip.0 }
    }
}

/// Key of `affinities` and `new_affinities`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct AffinityKey {
    /// As `kind` says: an address, or the cookie of a network namespace in 8 bytes of host order.
    pub client: [u8; 16],
    pub service_id: u32,
    /// One of [`client_kind`].
    pub kind: u32,
}

impl AffinityKey {
    /// A client outside, by its address.
    pub fn of_address(client: Ipx, service_id: u32) -> Self {
        AffinityKey { client: client.0, service_id, kind: client_kind::CLIENT_ADDRESS }
    }

    /// A network namespace of this node that asks for an address of `family`.
    pub fn of_namespace(cookie: u64, family: Family, service_id: u32) -> Self {
        let mut client = [0; 16];
        client[..8].copy_from_slice(&cookie.to_ne_bytes());
        let kind = match family {
            Family::Ipv4 => client_kind::CLIENT_NETWORK_NAMESPACE,
            Family::Ipv6 => client_kind::CLIENT_NETWORK_NAMESPACE_IP6,
        };
        AffinityKey { client, service_id, kind }
    }
}

/// Value of `affinities` and `new_affinities`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Affinity {
    pub backend_id: u32,
    pub generation: u32,
    /// Nanoseconds of CLOCK_MONOTONIC: the last connection.
    pub used_ns: u64,
}

/// Value of `devices`, keyed by interface index (u32): the device's first address of each family, zeros for none, whether
/// its packets begin with the IP header, and how their sources are looked at.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct DeviceAddresses {
    pub ip4: [u8; 16],
    pub ip6: [u8; 16],
    /// 0 or 1.
    pub is_bare: u32,
    /// One of [`rp_filter`].
    pub rp_filter: u32,
}

/// What the packet programs know of the node's end of a pod's device.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct PodDevice {
    /// An address of the node by which it hides clients; all zeros: none.
    pub ip4: [u8; 16],
    pub ip6: [u8; 16],
    /// The link address at which pods reach the node.
    pub gateway: [u8; 6],
    pub zero: u16,
    /// Of the programs: the second of `openings`.
    pub second: u32,
    /// Of the programs: flows that began in that second, less those that were answered in it.
    pub openings: i32,
}

/// The ends of a packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct Ends {
    pub source: [u8; 16],
    pub destination: [u8; 16],
    /// Network order.
    pub source_port_be: [u8; 2],
    /// Network order.
    pub destination_port_be: [u8; 2],
}

impl Ends {
    /// Those of an answer.
    pub fn reversed(&self) -> Ends {
        Ends {
            source: self.destination,
            destination: self.source,
            source_port_be: self.destination_port_be,
            destination_port_be: self.source_port_be,
        }
    }
}

/// A packet's ends and protocol; the key of `flows6`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct FlowKey {
    pub ends: Ends,
    /// IP protocol number.
    pub protocol: u8,
    pub zero: [u8; 3],
}

impl FlowKey {
    /// That of the other direction, if packets of this one become `ends`.
    pub fn partner(&self, ends: &Ends) -> FlowKey {
        FlowKey { ends: ends.reversed(), ..*self }
    }
}

/// Key of `flows4`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct FlowKey4 {
    /// Network order.
    pub source: [u8; 4],
    /// Network order.
    pub destination: [u8; 4],
    /// Network order.
    pub source_port_be: [u8; 2],
    /// Network order.
    pub destination_port_be: [u8; 2],
    /// IP protocol number.
    pub protocol: u8,
    pub zero: [u8; 3],
}

/// Of IPv4 ends.
impl From<FlowKey> for FlowKey4 {
    fn from(key: FlowKey) -> FlowKey4 {
        let ip = |[.., a, b, c, d]: [u8; 16]| [a, b, c, d];
        FlowKey4 {
            source: ip(key.ends.source),
            destination: ip(key.ends.destination),
            source_port_be: key.ends.source_port_be,
            destination_port_be: key.ends.destination_port_be,
            protocol: key.protocol,
            zero: [0; 3],
        }
    }
}

impl From<FlowKey4> for FlowKey {
    fn from(key: FlowKey4) -> FlowKey {
        let mapped = |ip: [u8; 4]| Ipx::from(std::net::Ipv4Addr::from(ip)).0;
        let ends = Ends {
            source: mapped(key.source),
            destination: mapped(key.destination),
            source_port_be: key.source_port_be,
            destination_port_be: key.destination_port_be,
        };
        FlowKey { ends, protocol: key.protocol, zero: [0; 3] }
    }
}

/// Value of `flows4` and `flows6`: one direction of a flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Flow {
    /// What the packet becomes.
    pub ends: Ends,
    /// The checksum's change from the key's ends to these.
    pub change: u32,
    /// Bits of [`flow_flag`], and above them the second of CLOCK_MONOTONIC in which the last packet passed.
    pub state: u32,
    /// TCP: this side's highest sequence number. Else, of requests: the epoch of [`epoch::EPOCH_OWNERS`].
    pub sequence: u32,
    /// Of requests the backend's id, of replies the backend's first sequence number (TCP) or the flow's first second.
    pub backend_or_first: u32,
    /// Of requests the backend's generation, of replies the interface index where the client's packets come in.
    pub generation_or_interface: u32,
}

impl Flow {
    /// [`Flow::change`] of a row with a key of the ends `old`, and the ends `new`: what `ends_change()` of
    /// bpf/checksum.h computes.
    pub fn change_of(old: &Ends, new: &Ends) -> u32 {
        let sum = |bytes: &[u8]| -> u64 {
            bytes.as_chunks::<4>().0.iter().map(|word| u64::from(u32::from_ne_bytes(*word))).sum()
        };
        let without = |bytes: &[u8]| -> u64 {
            bytes.as_chunks::<4>().0.iter().map(|word| u64::from(!u32::from_ne_bytes(*word))).sum()
        };
        let fold = |sum: u64| -> u64 {
            let sum = (sum & 0xffff_ffff) + (sum >> 32);
            ((sum & 0xffff_ffff) + (sum >> 32)) & 0xffff_ffff
        };
        let ports = |ends: &Ends| [ends.source_port_be, ends.destination_port_be].concat();
        let addresses =
            fold(without(&old.source) + without(&old.destination) + sum(&new.source) + sum(&new.destination));
        fold(addresses + without(&ports(old)) + sum(&ports(new))) as u32
    }

    /// Whether one of these flags is set.
    pub fn has(&self, flags: u32) -> bool {
        self.state & flags != 0
    }

    /// Whether its packets are met when they leave.
    pub fn is_at_egress(&self) -> bool {
        self.state & (flow_flag::FLOW_REPLY | flow_flag::FLOW_PATH) == flow_flag::FLOW_REPLY | flow_path::PATH_STACK
    }

    /// Its backend sees this node as its client, wherever it is.
    pub fn is_routed(&self) -> bool {
        self.has(flow_path::PATH_ROUTED)
    }

    /// The second in which the last packet passed, of CLOCK_MONOTONIC, modulo 2^22.
    pub fn second(&self) -> u32 {
        self.state >> flow_state::FLOW_SECOND_SHIFT
    }

    /// Seconds of silence before `second`; 0 if the last packet was later (clocks of processors differ).
    pub fn idle(&self, second: u32) -> u32 {
        const SKEW: u32 = 60;
        let idle = second.wrapping_sub(self.second()) & flow_state::FLOW_SECOND_MASK;
        if idle > flow_state::FLOW_SECOND_MASK - SKEW { 0 } else { idle }
    }
}

/// Row of `flow_limits`: seconds of silence in both directions after which a flow is over.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct FlowLimits {
    pub tcp_opening: u32,
    pub tcp_established: u32,
    /// One FIN.
    pub tcp_half_closed: u32,
    /// Both FINs, the client's first.
    pub tcp_closed: u32,
    /// Both FINs, the backend's first.
    pub tcp_time_wait: u32,
    pub tcp_reset: u32,
    /// UDP and SCTP, not proved.
    pub udp: u32,
    pub udp_stream: u32,
}

impl Default for FlowLimits {
    fn default() -> Self {
        FlowLimits {
            tcp_opening: 60,
            tcp_established: 86_400,
            tcp_half_closed: 3_600,
            tcp_closed: 10,
            tcp_time_wait: 60,
            tcp_reset: 10,
            udp: 30,
            udp_stream: 120,
        }
    }
}

impl From<FlowTimeouts> for FlowLimits {
    fn from(timeouts: FlowTimeouts) -> Self {
        let seconds = |timeout: Duration| u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX).max(1);
        FlowLimits {
            tcp_established: seconds(timeouts.tcp_established),
            tcp_half_closed: seconds(timeouts.tcp_close_wait),
            udp: seconds(timeouts.udp),
            udp_stream: seconds(timeouts.udp_stream),
            ..FlowLimits::default()
        }
    }
}

/// Index into the addresses of the map `wire_filter`, as `address_index()` of bpf/address.h computes it.
pub fn address_index(address: &[u8; 16]) -> usize {
    const FACTORS: [u32; 4] = [0x85eb_ca6b, 0xc2b2_ae35, 0x27d4_eb2f, 0x9e37_79b1];
    let words = address.as_chunks::<4>().0.iter().map(|word| u32::from_ne_bytes(*word));
    let sum = words.zip(FACTORS).fold(0u32, |sum, (word, factor)| sum.wrapping_add(word.wrapping_mul(factor)));
    (sum >> 16) as usize
}

/// Index into the replies of the map `ports`, as `reply_index()` of bpf/address.h computes it; `port` in network order.
pub fn reply_index(backend: &[u8; 16], client: &[u8; 16], port_be: [u8; 2]) -> usize {
    let last = |address: &[u8; 16]| u32::from_ne_bytes([address[12], address[13], address[14], address[15]]);
    let sum = last(backend).wrapping_mul(0x85eb_ca6b).wrapping_add(last(client).wrapping_mul(0x9e37_79b1));
    (sum.wrapping_add(u32::from(u16::from_ne_bytes(port_be)).wrapping_mul(0xc2b2_ae35)) >> 14) as usize
}

/// Key of `probes`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct ProbeKey {
    pub address: [u8; 16],
    /// Network order.
    pub port_be: [u8; 2],
    /// One of [`probe_path`].
    pub path: u16,
}

impl ProbeKey {
    pub fn of(answer: &ProbeAnswer) -> Self {
        ProbeKey { address: answer.address.0, port_be: answer.port.to_be_bytes(), path: answer.path as u16 }
    }

    /// Host order.
    pub fn port(&self) -> u16 {
        u16::from_be_bytes(self.port_be)
    }
}

/// Value of `probes`: an HTTP response.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Probe {
    /// As in the key.
    pub port_be: [u8; 2],
    pub path: u16,
    /// Sums of the packet's checksum (RFC 1071), of the whole response and of its head.
    pub sum: u32,
    pub head_sum: u32,
    pub length: u16,
    pub head_length: u16,
    /// 0 or 1.
    pub has_paths: u32,
    pub bytes: [u8; probe_limit::PROBE_BYTES as usize],
}

impl Probe {
    /// What is longer than [`probe_limit::PROBE_LONGEST`] is cut.
    pub fn of(answer: &ProbeAnswer) -> Self {
        let text = [answer.head.as_bytes(), answer.body.as_bytes()].concat();
        let length = text.len().min(probe_limit::PROBE_LONGEST as usize);
        let head_length = answer.head.len().min(length);
        let mut bytes = [0; probe_limit::PROBE_BYTES as usize];
        bytes[..length].copy_from_slice(&text[..length]);
        let word = |pair: &[u8]| u32::from(u16::from_ne_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        let sum = |bytes: &[u8]| bytes.chunks(2).map(word).sum();
        Probe {
            port_be: answer.port.to_be_bytes(),
            path: answer.path as u16,
            sum: sum(&bytes[..length]),
            head_sum: sum(&bytes[..head_length]),
            length: length as u16,
            head_length: head_length as u16,
            has_paths: answer.has_paths.into(),
            bytes,
        }
    }
}

/// The row of `probe_state`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct ProbeState {
    /// Nanoseconds of CLOCK_MONOTONIC.
    pub alive_ns: u64,
    pub secret: [u64; 2],
}

/// A connected socket whose backend is gone, as the socket iterator prints it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct StaleSocket {
    pub source_address: [u8; 16],
    pub backend_address: [u8; 16],
    /// Network order.
    pub source_port_be: [u8; 2],
    /// Network order.
    pub backend_port_be: [u8; 2],
    /// AF_INET or AF_INET6: of the socket, not of the address.
    pub family: u16,
    /// IP protocol number.
    pub protocol: u16,
    /// Inode of the socket's network namespace.
    pub netns_inum: u32,
    /// Bound interface, 0 for none.
    pub interface: u32,
    /// What was asked for. The same as the backend's: the socket was never translated.
    pub service_address: [u8; 16],
    /// Network order.
    pub service_port_be: [u8; 2],
    pub unused: [u8; 2],
}

const _: () = {
    assert!(size_of::<FrontendKey>() == 20);
    assert!(size_of::<Pool>() == 12);
    assert!(size_of::<Frontend>() == 36);
    assert!(size_of::<Backend>() == 32);
    assert!(size_of::<ServiceName>() == 192);
    assert!(size_of::<StaleSocket>() == 68);
    assert!(size_of::<SourceRangeKey>() == 24);
    assert!(size_of::<AffinityKey>() == 24);
    assert!(size_of::<Affinity>() == 16);
    assert!(size_of::<DeviceAddresses>() == 40);
    assert!(size_of::<PodDevice>() == 48);
    assert!(size_of::<FlowKey>() == 40);
    assert!(size_of::<FlowKey4>() == 16);
    assert!(size_of::<Flow>() == 56);
    assert!(size_of::<FlowLimits>() == 32);
    assert!(size_of::<ProbeKey>() == 20);
    assert!(size_of::<Probe>() == 532);
    assert!(size_of::<ProbeState>() == 24);
};
