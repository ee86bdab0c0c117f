//! One packet of a capture file: pcap and pcapng, of Ethernet, of IP alone, and of `tcpdump -i any`.

use std::fs::File;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use pcap_parser::{Block, Linktype, PcapBlockOwned, PcapError, create_reader};

/// The largest block that is read.
const BLOCK: usize = 1 << 20;

/// The packet of this number, from 1 on, as an Ethernet frame.
///
/// # Errors
/// When the file cannot be read, is no capture, has fewer packets, or the packet is cut or of another link layer.
pub fn packet(path: &Path, number: usize) -> Result<Vec<u8>> {
    let shown = path.display();
    let file = File::open(path).with_context(|| format!("cannot open {shown}"))?;
    let reader = create_reader(BLOCK, file).map_err(|error| anyhow::anyhow!("{}", what(&error)));
    let mut reader = reader.with_context(|| format!("{shown} is no pcap or pcapng file"))?;
    let (mut links, mut seen) = (Vec::new(), 0);
    loop {
        let (length, block) = match reader.next() {
            Ok(found) => found,
            Err(PcapError::Eof) => bail!("{shown} has {seen} packets, and no packet {number}"),
            Err(PcapError::Incomplete(_)) => {
                let refilled = reader.refill().map_err(|error| anyhow::anyhow!("{}", what(&error)));
                refilled.with_context(|| format!("reading {shown}"))?;
                continue;
            }
            Err(error) => bail!("reading {shown}, after packet {seen}: {}", what(&error)),
        };
        let found = match &block {
            PcapBlockOwned::LegacyHeader(header) => {
                links.push(header.network);
                None
            }
            PcapBlockOwned::NG(Block::SectionHeader(_)) => {
                links.clear();
                None
            }
            PcapBlockOwned::NG(Block::InterfaceDescription(interface)) => {
                links.push(interface.linktype);
                None
            }
            PcapBlockOwned::Legacy(packet) => Some((0, packet.data, packet.caplen, packet.origlen)),
            PcapBlockOwned::NG(Block::EnhancedPacket(packet)) => {
                Some((packet.if_id as usize, packet.data, packet.caplen, packet.origlen))
            }
            PcapBlockOwned::NG(Block::SimplePacket(packet)) => {
                Some((0, packet.data, packet.data.len() as u32, packet.origlen))
            }
            PcapBlockOwned::NG(_) => None,
        };
        if let Some((interface, data, captured, length)) = found {
            seen += 1;
            if seen == number {
                if captured < length {
                    bail!("packet {number} of {shown} is cut after {captured} of {length} bytes: capture with -s 0");
                }
                let data = data.get(..captured as usize).context("the capture's lengths are wrong")?;
                let link = links.get(interface).copied().context("the capture does not say what it is of")?;
                return frame(link, data).with_context(|| format!("packet {number} of {shown}"));
            }
        }
        reader.consume(length);
    }
}

fn what<I: std::fmt::Debug>(error: &PcapError<I>) -> &'static str {
    match error {
        PcapError::Eof | PcapError::UnexpectedEof | PcapError::Incomplete(_) => "it ends too early",
        PcapError::BufferTooSmall => "a block is larger than 1 MiB",
        PcapError::ReadError => "it cannot be read",
        _ => "it is damaged, or something else",
    }
}

fn frame(link: Linktype, data: &[u8]) -> Result<Vec<u8>> {
    let (header, ip) = match link {
        Linktype::ETHERNET => return Ok(data.to_vec()),
        Linktype::LINUX_SLL => (16, data.get(16..)),
        Linktype::LINUX_SLL2 => (20, data.get(20..)),
        Linktype::RAW | Linktype::IPV4 | Linktype::IPV6 => (0, Some(data)),
        other => bail!("captured of a link layer that is not read here ({other})"),
    };
    let ip = ip.filter(|ip| !ip.is_empty()).with_context(|| format!("fewer than {header} bytes and an IP header"))?;
    let kind: [u8; 2] = if ip[0] >> 4 == 6 { [0x86, 0xdd] } else { [0x08, 0x00] };
    Ok([&[0; 6], &[2, 0, 0, 0, 0, 1], &kind[..], ip].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    /// A pcap file (https://www.ietf.org/archive/id/draft-ietf-opsawg-pcap) of these packets.
    fn pcap(link: u32, packets: &[(&[u8], u32)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [0xa1b2_c3d4, 0x0004_0002, 0, 0, 262_144, link] {
            bytes.extend(u32::to_le_bytes(word));
        }
        for (data, length) in packets {
            for word in [0, 0, data.len() as u32, *length] {
                bytes.extend(u32::to_le_bytes(word));
            }
            bytes.extend(*data);
        }
        bytes
    }

    /// A pcapng file of one interface and one packet.
    fn pcapng(link: u16, data: &[u8]) -> Vec<u8> {
        let block = |kind: u32, body: &[u8]| {
            let length = (body.len() as u32 + 12).to_le_bytes();
            [&kind.to_le_bytes(), &length[..], body, &length[..]].concat()
        };
        let section: Vec<u8> = [&0x1a2b_3c4d_u32.to_le_bytes()[..], &[1, 0, 0, 0], &[0xff; 8]].concat();
        let interface = [&link.to_le_bytes()[..], &[0, 0], &[0, 0, 4, 0]].concat();
        let mut packet = [0u32, 0, 0, data.len() as u32, data.len() as u32].map(u32::to_le_bytes).concat();
        packet.extend(data);
        packet.resize(packet.len().next_multiple_of(4), 0);
        [block(0x0a0d_0d0a, &section), block(1, &interface), block(6, &packet)].concat()
    }

    #[test]
    fn a_packet_is_found_in_either_format_whatever_it_was_captured_of() {
        let ip = [&[0x45u8][..], &[7; 40]].concat();
        let ethernet = [&[0u8; 12][..], &[8, 0], &ip].concat();
        let with_link = [&[0; 6][..], &[2, 0, 0, 0, 0, 1], &[8, 0], &ip].concat();
        let whole = |data: &[u8]| data.len() as u32;
        let two = pcap(1, &[(&[1; 20], 20), (&ethernet, whole(&ethernet))]);
        assert_eq!(packet(file(&two).path(), 2).unwrap(), ethernet);
        assert_eq!(packet(file(&pcap(101, &[(&ip, whole(&ip))])).path(), 1).unwrap(), with_link);
        let cooked = [&[9u8; 20][..], &ip].concat();
        assert_eq!(packet(file(&pcapng(276, &cooked)).path(), 1).unwrap(), with_link);
        assert_eq!(packet(file(&pcapng(1, &ethernet)).path(), 1).unwrap(), ethernet);
        let six = [&[0x60u8][..], &[7; 40]].concat();
        assert_eq!(packet(file(&pcap(229, &[(&six, whole(&six))])).path(), 1).unwrap()[12..14], [0x86, 0xdd]);
    }

    #[test]
    fn what_cannot_be_used_says_why() {
        let error = |bytes: &[u8], number| format!("{:#}", packet(file(bytes).path(), number).unwrap_err());
        let one = pcap(1, &[(&[1; 20], 20)]);
        assert!(error(&one, 2).ends_with("has 1 packets, and no packet 2"), "{}", error(&one, 2));
        assert!(error(&pcap(1, &[(&[1; 20], 1500)]), 1).contains("cut after 20 of 1500 bytes"));
        assert!(error(&pcap(105, &[(&[1; 20], 20)]), 1).contains("link layer that is not read"));
        assert!(error(&pcap(113, &[(&[1; 10], 10)]), 1).contains("fewer than 16 bytes"));
        assert!(
            error(b"something else, and longer than the header of a capture", 1).contains("no pcap or pcapng file")
        );
        assert!(error(b"", 1).contains("no pcap or pcapng file"));
        assert!(error(&one[..one.len() - 3], 1).contains("too early"), "{}", error(&one[..one.len() - 3], 1));
        assert!(format!("{:#}", packet(Path::new("/none"), 1).unwrap_err()).contains("cannot open /none"));
    }
}
