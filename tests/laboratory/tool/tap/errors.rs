//! ICMP errors in frames. smoltcp gives those about its TCP connections to nobody; here they are read from the bytes.

use std::net::{IpAddr, SocketAddr};

use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, Icmpv4Message, Icmpv4Packet, Icmpv6Message, Icmpv6Packet, IpProtocol, Ipv4Packet,
    Ipv6Packet,
};

use crate::laboratory::messages::{IcmpError, IcmpKind};

/// Bytes of an ICMP error ahead of the packet inside.
const HEADER: usize = 8;

/// The error in this frame, if it is one.
pub fn parse(frame: &[u8]) -> Option<IcmpError> {
    let frame = EthernetFrame::new_checked(frame).ok()?;
    match frame.ethertype() {
        EthernetProtocol::Ipv4 => parse_v4(frame.payload()),
        EthernetProtocol::Ipv6 => parse_v6(frame.payload()),
        _ => None,
    }
}

fn parse_v4(packet: &[u8]) -> Option<IcmpError> {
    let outer = Ipv4Packet::new_checked(packet).ok().filter(|packet| packet.next_header() == IpProtocol::Icmp)?;
    let message = Icmpv4Packet::new_checked(outer.payload()).ok()?;
    let (kind, code) = (message.msg_type(), message.msg_code());
    let is_error = matches!(kind, Icmpv4Message::DstUnreachable | Icmpv4Message::TimeExceeded);
    let bytes = outer.payload().get(HEADER..).filter(|_| is_error)?;
    // What is inside may have been cut off, so that its length says too much.
    let inside = Ipv4Packet::new_unchecked(bytes);
    let ports = ports(bytes.get(usize::from(bytes.first()? & 15) * 4..)?)?;
    let mtu = u32::from(u16::from_be_bytes(outer.payload()[6..8].try_into().ok()?));
    Some(IcmpError {
        kind: match (u8::from(kind), code) {
            (3, 3) => IcmpKind::PortUnreachable,
            (3, 4) => IcmpKind::TooBig { mtu },
            (kind, code) => IcmpKind::Other { kind, code },
        },
        by: outer.src_addr().into(),
        protocol: inside.next_header().into(),
        from: SocketAddr::new(IpAddr::V4(inside.src_addr()), ports[0]),
        to: SocketAddr::new(IpAddr::V4(inside.dst_addr()), ports[1]),
        is_intact: outer.verify_checksum() && message.verify_checksum() && inside.verify_checksum(),
    })
}

fn parse_v6(packet: &[u8]) -> Option<IcmpError> {
    let outer = Ipv6Packet::new_checked(packet).ok().filter(|packet| packet.next_header() == IpProtocol::Icmpv6)?;
    let message = Icmpv6Packet::new_checked(outer.payload()).ok()?;
    let (kind, code) = (message.msg_type(), message.msg_code());
    let bytes = outer.payload().get(HEADER..).filter(|_| kind.is_error())?;
    let inside = Ipv6Packet::new_unchecked(bytes);
    let ports = ports(bytes.get(inside.header_len()..)?)?;
    Some(IcmpError {
        kind: match (kind, code) {
            (Icmpv6Message::DstUnreachable, 4) => IcmpKind::PortUnreachable,
            (Icmpv6Message::PktTooBig, _) => IcmpKind::TooBig { mtu: message.pkt_too_big_mtu() },
            (kind, code) => IcmpKind::Other { kind: kind.into(), code },
        },
        by: outer.src_addr().into(),
        protocol: inside.next_header().into(),
        from: SocketAddr::new(IpAddr::V6(inside.src_addr()), ports[0]),
        to: SocketAddr::new(IpAddr::V6(inside.dst_addr()), ports[1]),
        is_intact: message.verify_checksum(&outer.src_addr(), &outer.dst_addr()),
    })
}

fn ports(transport: &[u8]) -> Option<[u16; 2]> {
    let [a, b, c, d] = transport.first_chunk()?;
    Some([u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d])])
}
