//! Frames as a reader of the RFCs would write and read them: a builder and a strict parser that share no code with the
//! datapath. The parser recomputes every checksum over the bytes that it covers.

use std::net::IpAddr;

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

/// What is inside the IP header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Inside {
    Tcp {
        ports: (u16, u16),
        flags: u8,
        sequence: u32,
        acknowledgement: u32,
        data: Vec<u8>,
    },
    /// `checked`: false for the checksum 0, "none".
    Udp {
        ports: (u16, u16),
        checked: bool,
        data: Vec<u8>,
    },
    /// The common header, and chunks as they are.
    Sctp {
        ports: (u16, u16),
        tag: u32,
        data: Vec<u8>,
    },
    /// ICMP or ICMPv6, by the family.
    Icmp {
        kind: u8,
        code: u8,
        rest: u32,
        data: Vec<u8>,
    },
    /// A piece of a fragmented datagram: as it is, with its offset in bytes.
    Piece {
        protocol: u8,
        offset: u16,
        more: bool,
        id: u32,
        data: Vec<u8>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub ttl: u8,
    pub inside: Inside,
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub fn tcp(from: (&str, u16), to: (&str, u16), flags: u8) -> Frame {
    let inside = Inside::Tcp { ports: (from.1, to.1), flags, sequence: 1000, acknowledgement: 0, data: vec![] };
    Frame { source: ip(from.0), destination: ip(to.0), ttl: 61, inside }
}

pub fn udp(from: (&str, u16), to: (&str, u16), data: &[u8]) -> Frame {
    let inside = Inside::Udp { ports: (from.1, to.1), checked: true, data: data.to_vec() };
    Frame { source: ip(from.0), destination: ip(to.0), ttl: 61, inside }
}

pub fn sctp(from: (&str, u16), to: (&str, u16), data: &[u8]) -> Frame {
    let inside = Inside::Sctp { ports: (from.1, to.1), tag: 0x7461_6721, data: data.to_vec() };
    Frame { source: ip(from.0), destination: ip(to.0), ttl: 61, inside }
}

impl Frame {
    pub fn numbered(mut self, new_sequence: u32, new_acknowledgement: u32) -> Frame {
        if let Inside::Tcp { sequence, acknowledgement, .. } = &mut self.inside {
            (*sequence, *acknowledgement) = (new_sequence, new_acknowledgement);
        }
        self
    }

    pub fn carrying(self, bytes: usize) -> Frame {
        let fresh: Vec<u8> = (0..bytes).map(|i| (i * 7 + 3) as u8).collect();
        self.with_data(&fresh)
    }

    pub fn with_data(mut self, bytes: &[u8]) -> Frame {
        match &mut self.inside {
            Inside::Tcp { data, .. } | Inside::Udp { data, .. } | Inside::Icmp { data, .. } => *data = bytes.to_vec(),
            Inside::Sctp { data, .. } | Inside::Piece { data, .. } => *data = bytes.to_vec(),
        }
        self
    }

    pub fn unchecked(mut self) -> Frame {
        if let Inside::Udp { checked, .. } = &mut self.inside {
            *checked = false;
        }
        self
    }

    pub fn living(mut self, ttl: u8) -> Frame {
        self.ttl = ttl;
        self
    }

    /// Source and destination port.
    pub fn ports(&self) -> (u16, u16) {
        match &self.inside {
            Inside::Tcp { ports, .. } | Inside::Udp { ports, .. } | Inside::Sctp { ports, .. } => *ports,
            other => panic!("no ports in {other:?}"),
        }
    }

    /// The same with other ends; what the datapath is expected to make of a frame.
    pub fn with_ends(&self, from: (&str, u16), to: (&str, u16)) -> Frame {
        let mut frame = self.clone();
        (frame.source, frame.destination) = (ip(from.0), ip(to.0));
        match &mut frame.inside {
            Inside::Tcp { ports, .. } | Inside::Udp { ports, .. } | Inside::Sctp { ports, .. } => {
                *ports = (from.1, to.1);
            }
            Inside::Icmp { .. } | Inside::Piece { .. } => {}
        }
        frame
    }

    /// An Ethernet frame.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        bytes.extend_from_slice(if self.source.is_ipv4() { &[0x08, 0x00] } else { &[0x86, 0xdd] });
        bytes.extend(self.packet());
        bytes
    }

    /// Without the Ethernet header.
    pub fn packet(&self) -> Vec<u8> {
        let (protocol, body, fragment) = self.body();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let mut header = vec![0x45, 0];
                header.extend(((20 + body.len()) as u16).to_be_bytes());
                // A whole packet must not be fragmented, as TCP's never may.
                let (id, field) = fragment.map_or((0x1234, 0x4000), |(offset, more, id)| {
                    (id as u16, (offset / 8) | if more { 0x2000 } else { 0 })
                });
                header.extend(id.to_be_bytes());
                header.extend(field.to_be_bytes());
                header.extend([self.ttl, protocol, 0, 0]);
                header.extend(source.octets());
                header.extend(destination.octets());
                let sum = checksum(&[&header]);
                header[10..12].copy_from_slice(&sum.to_be_bytes());
                header.extend(body);
                header
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let extension = fragment.map(|(offset, more, id)| {
                    let mut bytes = vec![protocol, 0];
                    bytes.extend((offset | u16::from(more)).to_be_bytes());
                    bytes.extend(id.to_be_bytes());
                    bytes
                });
                let extension = extension.unwrap_or_default();
                let mut header = vec![0x60, 0, 0, 0];
                header.extend(((extension.len() + body.len()) as u16).to_be_bytes());
                header.extend([if extension.is_empty() { protocol } else { 44 }, self.ttl]);
                header.extend(source.octets());
                header.extend(destination.octets());
                header.extend(extension);
                header.extend(body);
                header
            }
            _ => panic!("two families in one packet"),
        }
    }

    /// Protocol number, the bytes behind the IP header, and offset, "more" and id of a fragment.
    fn body(&self) -> (u8, Vec<u8>, Option<(u16, bool, u32)>) {
        let (protocol, mut body, at) = match &self.inside {
            Inside::Tcp { ports, flags, sequence, acknowledgement, data } => {
                let mut body = Vec::new();
                body.extend(ports.0.to_be_bytes());
                body.extend(ports.1.to_be_bytes());
                body.extend(sequence.to_be_bytes());
                body.extend(acknowledgement.to_be_bytes());
                body.extend([0x50, *flags, 0xff, 0xff, 0, 0, 0, 0]);
                body.extend(data);
                (6, body, Some(16))
            }
            Inside::Udp { ports, checked, data } => {
                let mut body = Vec::new();
                body.extend(ports.0.to_be_bytes());
                body.extend(ports.1.to_be_bytes());
                body.extend(((8 + data.len()) as u16).to_be_bytes());
                body.extend([0, 0]);
                body.extend(data);
                (17, body, checked.then_some(6))
            }
            Inside::Sctp { ports, tag, data } => {
                let mut body = Vec::new();
                body.extend(ports.0.to_be_bytes());
                body.extend(ports.1.to_be_bytes());
                body.extend(tag.to_be_bytes());
                body.extend([0; 4]);
                body.extend(data);
                let sum = crc32c(&body);
                body[8..12].copy_from_slice(&sum.to_le_bytes());
                (132, body, None)
            }
            Inside::Icmp { kind, code, rest, data } => {
                let mut body = vec![*kind, *code, 0, 0];
                body.extend(rest.to_be_bytes());
                body.extend(data);
                (if self.source.is_ipv4() { 1 } else { 58 }, body, Some(2))
            }
            Inside::Piece { protocol, offset, more, id, data } => {
                return (*protocol, data.clone(), Some((*offset, *more, *id)));
            }
        };
        if let Some(at) = at {
            let sum = match self.transport_checksum(protocol, &body) {
                0 if protocol == 17 => 0xffff,
                sum => sum,
            };
            body[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        (protocol, body, None)
    }

    fn transport_checksum(&self, protocol: u8, body: &[u8]) -> u16 {
        if protocol == 1 {
            return checksum(&[body]);
        }
        checksum(&[&self.pseudo_header(protocol, body.len()), body])
    }

    fn pseudo_header(&self, protocol: u8, length: usize) -> Vec<u8> {
        let mut pseudo = octets(self.source);
        pseudo.extend(octets(self.destination));
        pseudo.extend((length as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, protocol]);
        pseudo
    }

    /// The same with two bytes of data that make its checksum the sum of the pseudo header, which is what a sender writes
    /// that leaves the checksum to the device.
    pub fn looking_partial(&self) -> Frame {
        (0..=u16::MAX)
            .map(|word| self.clone().with_data(&word.to_be_bytes()))
            .find(|frame| {
                let (protocol, body, _) = frame.body();
                let at = if protocol == 17 { 6 } else { 16 };
                let pseudo = !checksum(&[&frame.pseudo_header(protocol, body.len())]);
                body[at..at + 2] == pseudo.to_be_bytes()
            })
            .expect("every sum has its complement")
    }

    /// Cuts a UDP datagram into fragments with `first` bytes of it in the first one.
    pub fn fragments(&self, first: usize, id: u32) -> Vec<Frame> {
        let (protocol, body, _) = self.body();
        let piece = |range: std::ops::Range<usize>| Frame {
            inside: Inside::Piece {
                protocol,
                offset: range.start as u16,
                more: range.end < body.len(),
                id,
                data: body[range].to_vec(),
            },
            ..self.clone()
        };
        vec![piece(0..first), piece(first..body.len())]
    }
}

/// The IPv4 packet of a frame may be fragmented after all.
pub fn may_fragment(mut frame: Vec<u8>) -> Vec<u8> {
    frame[20] &= !0x40;
    frame[24..26].fill(0);
    let sum = checksum(&[&frame[14..34]]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// RFC 1071, word by word. Parts but the last are of even length.
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u32;
    for pair in parts.iter().flat_map(|part| part.chunks(2)) {
        sum += (u32::from(pair[0]) << 8) | u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// A frame of IPv4 with these options (RFC 791) behind its header.
pub fn with_options(frame: &[u8], options: &[u8]) -> Vec<u8> {
    let (header, rest) = frame[14..].split_at(20);
    let mut header = [header, options].concat();
    header[0] = 0x40 | (header.len() / 4) as u8;
    let total = (header.len() + rest.len()) as u16;
    header[2..4].copy_from_slice(&total.to_be_bytes());
    header[10..12].fill(0);
    let sum = checksum(&[&header]);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    [&frame[..14], &header, rest].concat()
}

/// RFC 9260, appendix A, bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

/// Reads an Ethernet frame; panics at anything that is not as the RFCs say.
pub fn parse(bytes: &[u8]) -> Frame {
    match &bytes[12..14] {
        [0x08, 0x00] | [0x86, 0xdd] => parse_packet(&bytes[14..], true),
        other => panic!("frame of type {other:x?}"),
    }
}

/// Reads an IP packet. `whole`: not quoted, so that lengths and checksums must be right.
pub fn parse_packet(packet: &[u8], whole: bool) -> Frame {
    let u16_at = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
    if packet[0] >> 4 == 4 {
        assert_eq!(packet[0], 0x45);
        assert_eq!(checksum(&[&packet[..20]]), 0, "IPv4 header checksum");
        assert!(!whole || usize::from(u16_at(2)) == packet.len(), "IPv4 length {} of {}", u16_at(2), packet.len());
        let address = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&packet[at..at + 4]).unwrap());
        let field = u16_at(6) & 0x3fff;
        let fragment = (field != 0).then(|| ((field & 0x1fff) * 8, field & 0x2000 != 0, u32::from(u16_at(4))));
        inside((address(12), address(16)), packet[8], packet[9], &packet[20..], fragment, whole)
    } else {
        assert_eq!(packet[0] >> 4, 6);
        assert!(!whole || usize::from(u16_at(4)) == packet.len() - 40, "IPv6 length");
        let address = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&packet[at..at + 16]).unwrap());
        let ends = (address(8), address(24));
        if packet[6] == 44 {
            let id = u32::from_be_bytes(packet[44..48].try_into().unwrap());
            let fragment = Some((u16_at(42) & 0xfff8, u16_at(42) & 1 != 0, id));
            return inside(ends, packet[7], packet[40], &packet[48..], fragment, whole);
        }
        inside(ends, packet[7], packet[6], &packet[40..], None, whole)
    }
}

fn inside(
    ends: (IpAddr, IpAddr),
    ttl: u8,
    protocol: u8,
    body: &[u8],
    fragment: Option<(u16, bool, u32)>,
    whole: bool,
) -> Frame {
    let u16_at = |at: usize| u16::from_be_bytes([body[at], body[at + 1]]);
    let u32_at = |at: usize| u32::from_be_bytes(body[at..at + 4].try_into().unwrap());
    let ports = (u16_at(0), u16_at(2));
    let mut frame = Frame {
        source: ends.0,
        destination: ends.1,
        ttl,
        inside: Inside::Udp {
            ports,
            checked: !whole || u16_at(6) != 0,
            data: body.get(8..).unwrap_or_default().to_vec(),
        },
    };
    if let Some((offset, more, id)) = fragment {
        frame.inside = Inside::Piece { protocol, offset, more, id, data: body.to_vec() };
        return frame;
    }
    match protocol {
        6 if body.len() >= 20 => {
            let data = body[20..].to_vec();
            let (flags, sequence, acknowledgement) = (body[13], u32_at(4), u32_at(8));
            frame.inside = Inside::Tcp { ports, flags, sequence, acknowledgement, data };
        }
        // Quoted: only the ports are sure to be there.
        6 => frame.inside = Inside::Tcp { ports, flags: 0, sequence: u32_at(4), acknowledgement: 0, data: vec![] },
        17 => {}
        132 => {
            let data = body.get(12..).unwrap_or_default().to_vec();
            frame.inside = Inside::Sctp { ports, tag: u32_at(4), data };
            if whole {
                let cleared = [&body[..8], &[0; 4], &body[12..]].concat();
                assert_eq!(body[8..12], crc32c(&cleared).to_le_bytes(), "SCTP checksum of {frame:?}");
            }
            return frame;
        }
        1 | 58 => {
            frame.inside = Inside::Icmp { kind: body[0], code: body[1], rest: u32_at(4), data: body[8..].to_vec() };
        }
        other => panic!("protocol {other}"),
    }
    let checked = !matches!(frame.inside, Inside::Udp { checked: false, .. });
    if whole && checked {
        assert_eq!(frame.transport_checksum(protocol, body), 0, "transport checksum of {frame:?}");
    }
    frame
}
