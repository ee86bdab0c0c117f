//! The rows of the kernel's maps, as `bpf/abi.h` declares them. Plain bytes: no pointers, no padding.
//!
//! The enums' numbers are read from `bpf/abi.h` by build.rs (modules `frontend_flag`, `pool_member`, ...); struct sizes
//! are asserted here and there, and a test compares every offset with the object's BTF.

use bytemuck::{Pod, Zeroable};

use crate::model::{Family, IpRange, Ipx, Protocol};

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

/// Value of `devices`, keyed by interface index (u32): the device's first address of each family, zeros for none, and
/// whether its packets begin with the IP header.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct DeviceAddresses {
    pub ip4: [u8; 16],
    pub ip6: [u8; 16],
    /// 0 or 1.
    pub is_bare: u32,
}

/// The ends of a packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
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

/// Key of `flows` and `new_flows`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct FlowKey {
    pub ends: Ends,
    /// IP protocol number.
    pub protocol: u8,
    pub zero: [u8; 3],
}

/// Value of `flows` and `new_flows`: one direction of a flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Flow {
    /// What the packet becomes.
    pub ends: Ends,
    /// Bits of [`flow_kind`].
    pub kind: u8,
    pub replied: u8,
    pub client_closed: u8,
    pub backend_closed: u8,
    pub backend_first: u8,
    pub reset: u8,
    pub zero: u16,
    pub backend_id: u32,
    pub generation: u32,
    pub service_id: u32,
    /// Interface index where the client's packets come in.
    pub interface: u32,
    /// Of TCP the backend's last sequence number, else the epoch of [`epoch::EPOCH_HANDS`].
    pub stamp: u32,
    /// CLOCK_MONOTONIC of the last packet, to within a second.
    pub used_ns: u64,
    pub hop: Hop,
}

/// Where the packets of a forwarded flow go, as the last route look-up answered.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct Hop {
    /// Interface index; 0: not known.
    pub interface: u32,
    /// Interface index that the packet came in by.
    pub from: u32,
    /// [`epoch::EPOCH_ROUTES`] at the time.
    pub epoch: u32,
    /// Packets up to this many bytes fit.
    pub mtu: u16,
    /// AF_INET or AF_INET6.
    pub family: u16,
    pub next: [u32; 4],
}

/// Index into the addresses of the map `wire_filter`, as `address_index()` of bpf/address.h computes it.
pub fn address_index(address: &[u8; 16]) -> usize {
    const FACTORS: [u32; 4] = [0x85eb_ca6b, 0xc2b2_ae35, 0x27d4_eb2f, 0x9e37_79b1];
    let words = address.as_chunks::<4>().0.iter().map(|word| u32::from_ne_bytes(*word));
    let sum = words.zip(FACTORS).fold(0u32, |sum, (word, factor)| sum.wrapping_add(word.wrapping_mul(factor)));
    (sum >> 16) as usize
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
}

const _: () = {
    assert!(size_of::<FrontendKey>() == 20);
    assert!(size_of::<Pool>() == 12);
    assert!(size_of::<Frontend>() == 36);
    assert!(size_of::<Backend>() == 32);
    assert!(size_of::<ServiceName>() == 192);
    assert!(size_of::<StaleSocket>() == 48);
    assert!(size_of::<SourceRangeKey>() == 24);
    assert!(size_of::<DeviceAddresses>() == 36);
    assert!(size_of::<FlowKey>() == 40);
    assert!(size_of::<Hop>() == 32);
    assert!(size_of::<Flow>() == 104);
};
