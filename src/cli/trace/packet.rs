//! Packets that are tried: built from addresses, and read as people read them.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, bail, ensure};
use etherparse::err::ValueTooBigError;
use etherparse::{IpNumber, NetSlice, PacketBuilder, SlicedPacket, TcpSlice, TransportSlice, UdpSlice};
use serde::Serialize;

use crate::cli::monitor::shown;
use crate::cli::snapshot::protocol_name;
use crate::model::Protocol;

/// Bytes of an Ethernet header.
pub const LINK_HEADER: usize = 14;
const HOP_LIMIT: u8 = 64;
const SEQUENCE: u32 = 1_000_000;
const WINDOW: u16 = 64_240;
const PAYLOAD: &[u8] = b"kubelane trace";
/// Of no device: locally administered.
const SENDER: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// Flags of a TCP header, as tcpdump writes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpFlags {
    pub syn: bool,
    pub ack: bool,
    pub fin: bool,
    pub rst: bool,
    pub psh: bool,
}

impl std::str::FromStr for TcpFlags {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut flags = TcpFlags::default();
        for letter in text.chars() {
            match letter {
                'S' => flags.syn = true,
                '.' | 'A' => flags.ack = true,
                'F' => flags.fin = true,
                'R' => flags.rst = true,
                'P' => flags.psh = true,
                _ => return Err("expected letters of SFRP and . for an acknowledgement, as tcpdump writes them"),
            }
        }
        if text.is_empty() { Err("expected at least one flag, such as S") } else { Ok(flags) }
    }
}

impl std::fmt::Display for TcpFlags {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let letters = [(self.syn, 'S'), (self.fin, 'F'), (self.rst, 'R'), (self.psh, 'P'), (self.ack, '.')];
        letters.into_iter().filter(|(is_set, _)| *is_set).try_for_each(|(_, letter)| write!(f, "{letter}"))
    }
}

/// What a packet is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    pub protocol: Protocol,
    pub from: SocketAddr,
    pub to: SocketAddr,
    /// Of TCP.
    pub flags: TcpFlags,
}

/// An Ethernet frame to the device with the link address `device`.
///
/// # Errors
/// When the families of the two addresses differ.
pub fn build(ask: &Ask, device: [u8; 6]) -> Result<Vec<u8>> {
    write(ask, device, SEQUENCE, 0)
}

fn write(ask: &Ask, device: [u8; 6], sequence: u32, acknowledged: u32) -> Result<Vec<u8>> {
    let link = PacketBuilder::ethernet2(SENDER, device);
    let net = match (ask.from.ip(), ask.to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => link.ipv4(from.octets(), to.octets(), HOP_LIMIT),
        (IpAddr::V6(from), IpAddr::V6(to)) => link.ipv6(from.octets(), to.octets(), HOP_LIMIT),
        (from, to) => bail!("{from} and {to} are of different families"),
    };
    let (from, to) = (ask.from.port(), ask.to.port());
    let mut frame = Vec::new();
    let written = match ask.protocol {
        Protocol::Tcp => {
            let mut tcp = net.tcp(from, to, sequence, WINDOW);
            let flags = ask.flags;
            tcp = if flags.syn { tcp.syn() } else { tcp };
            tcp = if flags.ack { tcp.ack(acknowledged) } else { tcp };
            tcp = if flags.fin { tcp.fin() } else { tcp };
            tcp = if flags.rst { tcp.rst() } else { tcp };
            tcp = if flags.psh { tcp.psh() } else { tcp };
            tcp.write(&mut frame, if flags.psh { PAYLOAD } else { &[] })
        }
        Protocol::Udp => net.udp(from, to).write(&mut frame, PAYLOAD),
        Protocol::Sctp => net.write(&mut frame, IpNumber::SCTP, &init(from, to)),
    };
    written.context("building a packet")?;
    Ok(frame)
}

/// An SCTP packet with an INIT chunk (RFC 9260, 3.3.2). Its checksum is left out: no program reads or changes it.
fn init(from: u16, to: u16) -> Vec<u8> {
    let mut bytes = [from.to_be_bytes(), to.to_be_bytes()].concat();
    bytes.extend([0; 8]);
    bytes.extend([1, 0, 0, 20]);
    bytes.extend(SEQUENCE.to_be_bytes());
    bytes.extend(65_536_u32.to_be_bytes());
    bytes.extend([0, 1, 0, 1]);
    bytes.extend(SEQUENCE.to_be_bytes());
    bytes
}

/// What whoever got `packet` answers first, to the device with the link address `device`; `None`: nothing.
///
/// # Errors
/// As [`build`].
pub fn answer(packet: &Packet, device: [u8; 6]) -> Result<Option<Vec<u8>>> {
    let Some(protocol) = packet.known_protocol() else { return Ok(None) };
    let (Some(from), Some(to)) = (packet.to, packet.from) else { return Ok(None) };
    if packet.is_piece || packet.flags.is_some_and(|flags| flags.rst) {
        return Ok(None);
    }
    let is_syn = packet.flags.is_some_and(|flags| flags.syn);
    let flags = TcpFlags { syn: is_syn, ack: true, ..TcpFlags::default() };
    let acknowledged = packet.sequence.unwrap_or_default().wrapping_add(is_syn.into());
    write(&Ask { protocol, from, to, flags }, device, 2 * SEQUENCE, acknowledged).map(Some)
}

/// A packet as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Packet {
    /// "TCP"
    pub protocol: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "as_text")]
    pub flags: Option<TcpFlags>,
    #[serde(skip)]
    sequence: Option<u32>,
    /// Of ICMP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    pub hop_limit: u8,
    /// With the link header.
    pub bytes: usize,
    /// One of several of a datagram.
    pub is_piece: bool,
    /// Checksums that are not right: "IPv4", "TCP", "UDP".
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub wrong_checksums: Vec<&'static str>,
}

fn as_text<S: serde::Serializer>(flags: &Option<TcpFlags>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&flags.unwrap_or_default())
}

impl Packet {
    /// Of an Ethernet frame.
    ///
    /// # Errors
    /// When it is no IP packet, or cut.
    pub fn read(frame: &[u8]) -> Result<Packet> {
        let sliced = SlicedPacket::from_ethernet(frame).context("this is no whole packet")?;
        let net = sliced.net.as_ref().context("this is no IP packet")?;
        let (from, to, hop_limit, number) = match net {
            NetSlice::Ipv4(ip) => {
                let header = ip.header();
                let (from, to) = (header.source_addr().into(), header.destination_addr().into());
                (from, to, header.ttl(), ip.payload_ip_number())
            }
            NetSlice::Ipv6(ip) => {
                let header = ip.header();
                let (from, to) = (header.source_addr().into(), header.destination_addr().into());
                (from, to, header.hop_limit(), ip.payload().ip_number)
            }
            NetSlice::Arp(_) => bail!("this is no IP packet"),
        };
        let mut wrong = Vec::new();
        if let NetSlice::Ipv4(ip) = net
            && ip.header().to_header().calc_header_checksum() != ip.header().header_checksum()
        {
            wrong.push("IPv4");
        }
        let mut packet = Packet {
            protocol: protocol_name(number.0),
            from: Some(SocketAddr::new(from, 0)),
            to: Some(SocketAddr::new(to, 0)),
            flags: None,
            sequence: None,
            message: None,
            hop_limit,
            bytes: frame.len(),
            is_piece: net.ip_payload_ref().is_some_and(|payload| payload.fragmented),
            wrong_checksums: Vec::new(),
        };
        let mut ports = None;
        match &sliced.transport {
            Some(TransportSlice::Tcp(tcp)) => {
                ports = Some((tcp.source_port(), tcp.destination_port()));
                packet.flags =
                    Some(TcpFlags { syn: tcp.syn(), ack: tcp.ack(), fin: tcp.fin(), rst: tcp.rst(), psh: tcp.psh() });
                packet.sequence = Some(tcp.sequence_number());
                wrong.extend((tcp_checksum(tcp, from, to) != Ok(tcp.checksum())).then_some("TCP"));
            }
            Some(TransportSlice::Udp(udp)) => {
                ports = Some((udp.source_port(), udp.destination_port()));
                let is_left_out = udp.checksum() == 0 && from.is_ipv4();
                let is_right = is_left_out || udp_checksum(udp, from, to) == Ok(udp.checksum());
                wrong.extend((!is_right).then_some("UDP"));
            }
            Some(TransportSlice::Icmpv4(icmp)) => packet.message = Some(message(&icmp.icmp_type())),
            Some(TransportSlice::Icmpv6(icmp)) => packet.message = Some(message(&icmp.icmp_type())),
            _ if number == IpNumber::SCTP && !packet.is_piece => {
                let payload = net.ip_payload_ref().map(|payload| payload.payload).unwrap_or_default();
                let word = |at: usize| Some(u16::from_be_bytes(payload.get(at..at + 2)?.try_into().ok()?));
                ports = word(0).zip(word(2));
            }
            _ => {}
        }
        if let Some((source, destination)) = ports {
            packet.from = Some(SocketAddr::new(from, source));
            packet.to = Some(SocketAddr::new(to, destination));
        }
        packet.wrong_checksums = wrong;
        Ok(packet)
    }

    pub fn known_protocol(&self) -> Option<Protocol> {
        let all = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
        all.into_iter().find(|protocol| protocol.as_str() == self.protocol)
    }

    /// Whether a program has answered `other` with it: by an ICMP error.
    pub fn answers(&self, other: &Packet) -> bool {
        self.message.is_some() && other.message.is_none()
    }

    /// "TCP 172.31.0.1:40000 -> 172.31.0.11:30080 [S], 54 bytes, hop limit 64"
    pub fn words(&self) -> String {
        let end = |end: Option<SocketAddr>| end.map_or_else(|| "?".to_owned(), shown);
        let mut words = format!("{} {} -> {}", self.protocol, end(self.from), end(self.to));
        words.extend(self.flags.map(|flags| format!(" [{flags}]")));
        words.extend(self.message.as_ref().map(|message| format!(" {message}")));
        words += &format!(", {} bytes, hop limit {}", self.bytes, self.hop_limit);
        words += if self.is_piece { ", a piece of a datagram" } else { "" };
        if !self.wrong_checksums.is_empty() {
            words += &format!(", wrong checksum ({})", self.wrong_checksums.join(", "));
        }
        words
    }
}

fn message(icmp: &impl std::fmt::Debug) -> String {
    format!("{icmp:?}")
}

fn tcp_checksum(tcp: &TcpSlice<'_>, from: IpAddr, to: IpAddr) -> Result<u16, ValueTooBigError<usize>> {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => tcp.calc_checksum_ipv4(from.octets(), to.octets()),
        (IpAddr::V6(from), IpAddr::V6(to)) => tcp.calc_checksum_ipv6(from.octets(), to.octets()),
        _ => Ok(0),
    }
}

fn udp_checksum(udp: &UdpSlice<'_>, from: IpAddr, to: IpAddr) -> Result<u16, ValueTooBigError<usize>> {
    let (header, payload) = (udp.to_header(), udp.payload());
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => header.calc_checksum_ipv4_raw(from.octets(), to.octets(), payload),
        (IpAddr::V6(from), IpAddr::V6(to)) => header.calc_checksum_ipv6_raw(from.octets(), to.octets(), payload),
        _ => Ok(0),
    }
}

/// Without a priority tag (VLAN 0), as programs get it.
///
/// # Errors
/// When it has another tag.
pub fn untagged(mut frame: Vec<u8>) -> Result<Vec<u8>> {
    const AT: usize = 12;
    let word = |at: usize| Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?));
    match (word(AT), word(AT + 2)) {
        (Some(0x8100 | 0x88a8), Some(tag)) if tag & 0xfff == 0 => drop(frame.drain(AT..AT + 4)),
        (Some(0x8100 | 0x88a8), Some(tag)) => bail!(
            "it is tagged for VLAN {}: programs meet it without the tag, on the VLAN's device; capture there",
            tag & 0xfff
        ),
        _ => {}
    }
    Ok(frame)
}

/// As a router does: one hop less. `false`: it has none left.
///
/// # Errors
/// When it is no IP packet.
pub fn route(frame: &mut [u8]) -> Result<bool> {
    ensure!(frame.len() >= LINK_HEADER + 20, "this is no IP packet");
    let ip = &mut frame[LINK_HEADER..];
    let at = if ip[0] >> 4 == 4 { 8 } else { 7 };
    if ip[at] <= 1 {
        return Ok(false);
    }
    ip[at] -= 1;
    if at == 8 {
        // RFC 1624: the word with the hop limit is less by 0x100.
        let sum = u32::from(u16::from_be_bytes([ip[10], ip[11]])) + 0x100;
        let sum = (sum & 0xffff) + (sum >> 16);
        ip[10..12].copy_from_slice(&(sum as u16).to_be_bytes());
    }
    Ok(true)
}

/// Puts the frame's link addresses right for the device that it comes in by.
pub fn address_to(frame: &mut [u8], device: [u8; 6]) {
    frame[..6].copy_from_slice(&device);
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: [u8; 6] = [2, 0, 0, 0, 0, 9];

    fn ask(protocol: Protocol, from: &str, to: &str, flags: &str) -> Ask {
        let flags = if flags.is_empty() { TcpFlags::default() } else { flags.parse().unwrap() };
        Ask { protocol, from: from.parse().unwrap(), to: to.parse().unwrap(), flags }
    }

    #[test]
    fn what_is_built_is_read_back() {
        for (protocol, from, to, flags, words) in [
            (
                Protocol::Tcp,
                "172.31.0.1:40000",
                "172.31.0.11:30080",
                "S",
                "TCP 172.31.0.1:40000 -> 172.31.0.11:30080 [S], 54 bytes, hop limit 64",
            ),
            (
                Protocol::Tcp,
                "[fd31::1]:40000",
                "[fd31::11]:30080",
                "P.",
                "TCP [fd31::1]:40000 -> [fd31::11]:30080 [P.], 88 bytes, hop limit 64",
            ),
            (Protocol::Udp, "10.0.0.1:1", "10.0.0.2:2", "", "UDP 10.0.0.1:1 -> 10.0.0.2:2, 56 bytes, hop limit 64"),
            (Protocol::Sctp, "10.0.0.1:1", "10.0.0.2:2", "", "SCTP 10.0.0.1:1 -> 10.0.0.2:2, 66 bytes, hop limit 64"),
        ] {
            let frame = build(&ask(protocol, from, to, flags), DEVICE).unwrap();
            assert_eq!(Packet::read(&frame).unwrap().words(), words);
            assert_eq!(frame[..6], DEVICE);
        }
        assert!(build(&ask(Protocol::Tcp, "10.0.0.1:1", "[::1]:2", "S"), DEVICE).is_err());
    }

    #[test]
    fn a_hop_less_leaves_checksums_right_and_a_changed_byte_does_not() {
        let mut frame = build(&ask(Protocol::Tcp, "10.0.0.1:1", "10.0.0.2:2", "S"), DEVICE).unwrap();
        for hops in (1..64).rev() {
            assert!(route(&mut frame).unwrap());
            let packet = Packet::read(&frame).unwrap();
            assert_eq!((packet.hop_limit, packet.wrong_checksums), (hops, vec![]));
        }
        assert!(!route(&mut frame).unwrap());
        let last = frame.len() - 1;
        frame[last] ^= 1;
        frame[LINK_HEADER + 1] ^= 4;
        assert_eq!(Packet::read(&frame).unwrap().wrong_checksums, ["IPv4", "TCP"]);
    }

    #[test]
    fn the_answer_to_a_request_acknowledges_it() {
        let frame = build(&ask(Protocol::Tcp, "10.0.0.1:1", "10.0.0.2:2", "S"), DEVICE).unwrap();
        let request = Packet::read(&frame).unwrap();
        let frame = answer(&request, DEVICE).unwrap().unwrap();
        let answer_words = Packet::read(&frame).unwrap().words();
        assert_eq!(answer_words, "TCP 10.0.0.2:2 -> 10.0.0.1:1 [S.], 54 bytes, hop limit 64");
        assert_eq!(frame[LINK_HEADER + 20 + 8..][..4], (SEQUENCE + 1).to_be_bytes());
        let reset = build(&ask(Protocol::Tcp, "10.0.0.1:1", "10.0.0.2:2", "R"), DEVICE).unwrap();
        assert_eq!(answer(&Packet::read(&reset).unwrap(), DEVICE).unwrap(), None);
    }

    #[test]
    fn a_priority_tag_goes_and_another_is_refused() {
        let frame = build(&ask(Protocol::Udp, "10.0.0.1:1", "10.0.0.2:2", ""), DEVICE).unwrap();
        let tagged = |tag: u16| [&frame[..12], &[0x81, 0], &tag.to_be_bytes(), &frame[12..]].concat();
        assert_eq!(untagged(tagged(0xe000)).unwrap(), frame);
        assert_eq!(untagged(frame.clone()).unwrap(), frame);
        assert!(untagged(tagged(100)).unwrap_err().to_string().contains("VLAN 100"));
        assert!(untagged(vec![0; 13]).is_ok());
    }

    #[test]
    fn flags_are_written_as_tcpdump_does() {
        for text in ["S", "S.", "F.", "R", "P.", "."] {
            assert_eq!(text.parse::<TcpFlags>().unwrap().to_string(), text);
        }
        assert!("X".parse::<TcpFlags>().is_err() && "".parse::<TcpFlags>().is_err());
    }
}
