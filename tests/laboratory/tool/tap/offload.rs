//! What a virtual machine leaves to its network card (virtio, "Network device" of the specification): checksums to be
//! finished and TCP to be cut into segments. A header ahead of each frame says so, in both directions.
//!
//! The stack gets whole checksums: what is unfinished is finished here, over whatever the pseudo-header's part of it
//! says. So the stack finds out if somebody who changed the addresses has left that part as it was.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd as _;

use anyhow::Context as _;

/// Length of `struct virtio_net_hdr`: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset.
pub const HEADER: usize = 10;
/// The longest packet of IPv4, and what may follow a header of IPv6.
pub const LONGEST: usize = 0xffff;

/// linux/virtio_net.h.
const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
/// linux/if_tun.h: checksums, and TCP of both families.
const OFFLOADS: libc::c_ulong =
    libc::TUN_F_CSUM as libc::c_ulong | libc::TUN_F_TSO4 as libc::c_ulong | libc::TUN_F_TSO6 as libc::c_ulong;

const ETHERNET_HEADER: usize = 14;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Tells the kernel that unfinished checksums and uncut segments are welcome.
pub fn welcome(tap: &File) -> anyhow::Result<()> {
    // SAFETY: the file is open, and TUNSETOFFLOAD takes a number and touches no memory.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD as _, OFFLOADS) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()).context("switching the tap's offloads on") }
}

/// Finishes the checksum of a frame that came, if its header asks for that.
pub fn finish(header: [u8; HEADER], frame: &mut [u8]) {
    let number = |at: usize| usize::from(u16::from_ne_bytes([header[at], header[at + 1]]));
    let (start, at) = (number(6), number(6) + number(8));
    if header[0] & NEEDS_CSUM != 0 && at + 2 <= frame.len() {
        let checksum = !sum(&frame[start..], 0);
        // UDP has no zero: that means none.
        frame[at..at + 2].copy_from_slice(&if checksum == 0 { 0xffff_u16 } else { checksum }.to_be_bytes());
    }
}

/// Leaves a frame's checksum to the device, and the segments of TCP over IPv4, if they are to be of this length: the
/// header.
pub fn leave(frame: &mut [u8], segment: Option<u16>) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    let Some(transport) = Transport::of(frame) else { return header };
    let offset = if transport.protocol == TCP { 16 } else { 6 };
    let length = (frame.len() - transport.start) as u32;
    let pseudo = sum(&frame[transport.addresses], length + u32::from(transport.protocol));
    let at = transport.start + offset;
    frame[at..at + 2].copy_from_slice(&pseudo.to_be_bytes());
    header[0] = NEEDS_CSUM;
    header[6..8].copy_from_slice(&(transport.start as u16).to_ne_bytes());
    header[8..10].copy_from_slice(&(offset as u16).to_ne_bytes());
    if let Some(segment) = segment {
        let headers = transport.start + usize::from(frame[transport.start + 12] >> 4) * 4;
        header[1] = GSO_TCPV4;
        header[2..4].copy_from_slice(&(headers as u16).to_ne_bytes());
        header[4..6].copy_from_slice(&segment.to_ne_bytes());
    }
    header
}

/// TCP or UDP in a frame that is no fragment, and has no extension headers: smoltcp sends none.
struct Transport {
    protocol: u8,
    addresses: Range<usize>,
    start: usize,
}

impl Transport {
    fn of(frame: &[u8]) -> Option<Transport> {
        let packet = frame.get(ETHERNET_HEADER..)?;
        let at = |range: Range<usize>| range.start + ETHERNET_HEADER..range.end + ETHERNET_HEADER;
        let found = match frame[12..14] {
            [0x08, 0x00] if packet[6] & 0x3f == 0 && packet[7] == 0 => Transport {
                protocol: packet[9],
                addresses: at(12..20),
                start: ETHERNET_HEADER + usize::from(packet[0] & 15) * 4,
            },
            [0x86, 0xdd] => Transport { protocol: packet[6], addresses: at(8..40), start: ETHERNET_HEADER + 40 },
            _ => return None,
        };
        [TCP, UDP].contains(&found.protocol).then_some(found)
    }
}

/// The Internet checksum's sum (RFC 1071), not complemented.
fn sum(bytes: &[u8], begin: u32) -> u16 {
    let (pairs, rest) = bytes.as_chunks::<2>();
    let last = rest.first().map_or(0, |byte| u64::from(*byte) << 8);
    let total = pairs.iter().map(|pair| u64::from(u16::from_be_bytes(*pair))).sum::<u64>() + last + u64::from(begin);
    let once = (total & 0xffff) + (total >> 16 & 0xffff) + (total >> 32);
    let twice = (once & 0xffff) + (once >> 16);
    ((twice & 0xffff) + (twice >> 16)) as u16
}
