//! A packet through the real programs: whether what comes in by a device reaches the program there, or something before it
//! (an XDP program, another's tcx program or filter) keeps it away.
//!
//! A trial program puts the packet on the device's way in (bpf_clone_redirect), as if it had just been received. It is the
//! first piece of a datagram to the device's own address, at a port that is or was served and with a protocol that is not:
//! of such a piece the programs leave a row in the map `fragments`, and nothing else, and pass it on. Its source is a
//! multicast address, and in IPv4 its checksum is wrong, so that the host's stack drops it wherever it comes from.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use libbpf_rs::{MapCore as _, MapFlags, MapHandle};
use nix::ifaddrs::getifaddrs;

use super::devices::{Device, LinkLayer};
use super::filter::is_port_marked;
use super::pinned;
use super::test_run::test_run;
use super::trial::{CALL, EXIT, MOVE_CONSTANT, instruction, load};
use crate::abi::FrontendKey;
use crate::model::{Family, Ipx, Protocol};

const SOURCE4: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 8);
const SOURCE6: Ipv6Addr = Ipv6Addr::new(0xff0e, 0, 0, 0, 0, 0, 0xc000, 8);
/// Ports that are looked at for one at which a protocol is not served.
const CANDIDATES: usize = 64;
/// A packet that was put on its way in is met when the processor's soft interrupts run.
const LOOKS: u32 = 100;
const PAUSE: Duration = Duration::from_millis(2);

/// The maps that a trial looks at.
pub struct PacketTrial {
    filter: MapHandle,
    frontends: MapHandle,
    fragments: MapHandle,
}

impl PacketTrial {
    pub fn open(pin_path: &Path) -> Result<PacketTrial> {
        let open = |name: &str| pinned::open_map(pin_path, name);
        Ok(PacketTrial { filter: open("wire_filter")?, frontends: open("frontends")?, fragments: open("fragments")? })
    }

    /// Whether a packet that comes in by this device reaches the program there, for each family of which the device has
    /// an address. A family of which nothing is served to the wire is left out: there is nothing to try it with.
    pub fn run(&self, device: &Device) -> Result<Vec<(Family, bool)>> {
        let addresses = [(Family::Ipv4, device.ip4.map(IpAddr::V4)), (Family::Ipv6, device.ip6.map(IpAddr::V6))];
        let mut outcomes = Vec::new();
        for (family, address) in addresses {
            let Some(address) = address else { continue };
            if let Some((port, protocol)) = self.unserved(address)? {
                outcomes.push((family, self.try_one(device, address, port, protocol)?));
            }
        }
        Ok(outcomes)
    }

    /// A port that the programs look at and a protocol that nobody is served by at it.
    fn unserved(&self, address: IpAddr) -> Result<Option<(u16, Protocol)>> {
        let filter = self.filter.lookup(&[0; 4], MapFlags::ANY).context("reading wire_filter")?.unwrap_or_default();
        let wildcard: IpAddr = match address {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        for port in (1..=u16::MAX).filter(|port| is_port_marked(&filter, *port)).take(CANDIDATES) {
            for protocol in [Protocol::Udp, Protocol::Tcp, Protocol::Sctp] {
                let is_served = |ip: IpAddr| {
                    let key = FrontendKey::new(Ipx::from(ip), port, protocol);
                    let row = self.frontends.lookup(bytemuck::bytes_of(&key), MapFlags::ANY);
                    row.map(|row| row.is_some()).context("reading frontends")
                };
                if !is_served(address)? && !is_served(wildcard)? {
                    return Ok(Some((port, protocol)));
                }
            }
        }
        Ok(None)
    }

    fn try_one(&self, device: &Device, address: IpAddr, port: u16, protocol: Protocol) -> Result<bool> {
        // Any number that no other trial of this moment has.
        let id = std::process::id().wrapping_mul(31).wrapping_add(device.index) as u16;
        let to = match device.link_layer {
            LinkLayer::Ethernet => hardware_address(device.index)?,
            LinkLayer::None => [0; 6],
        };
        let (frame, key) = match address {
            IpAddr::V4(ip) => piece4(to, ip, port, protocol, id),
            IpAddr::V6(ip) => piece6(to, ip, port, protocol, id),
        };
        let program = receiver(device.index).context("loading the program that receives a packet")?;
        let (result, ..) = test_run(program.as_fd(), &frame, &[], &mut [], 1)?;
        // 1: it was not received (NET_RX_DROP), which is what the trial is about.
        let error = result as i32;
        ensure!(error >= 0, "injecting a packet on device {}: {}", device.index, io::Error::from_raw_os_error(-error));
        for _ in 0..LOOKS {
            if self.fragments.lookup(&key, MapFlags::ANY).context("reading fragments")?.is_some() {
                let _ = self.fragments.delete(&key);
                return Ok(true);
            }
            sleep(PAUSE);
        }
        Ok(false)
    }
}

/// `return bpf_clone_redirect(skb, index, BPF_F_INGRESS);`
fn receiver(index: u32) -> io::Result<OwnedFd> {
    load(&[
        instruction(MOVE_CONSTANT, 2, 0, 0, index as i32),
        instruction(MOVE_CONSTANT, 3, 0, 0, libbpf_sys::BPF_F_INGRESS as i32),
        instruction(CALL, 0, 0, 0, libbpf_sys::BPF_FUNC_clone_redirect as i32),
        instruction(EXIT, 0, 0, 0, 0),
    ])
}

/// Of a device of this network namespace, by its interface index.
///
/// # Errors
/// When it has none, or devices cannot be listed.
pub fn hardware_address(index: u32) -> Result<[u8; 6]> {
    let all = getifaddrs().context("listing devices")?;
    let mut links = all.filter_map(|interface| interface.address?.as_link_addr().copied());
    let own = links.find(|link| link.ifindex() == index as usize);
    own.and_then(|link| link.addr()).with_context(|| format!("device {index} has no hardware address"))
}

/// Behind the IP header: ports, and zeros where headers have more.
fn transport(port: u16) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[..2].copy_from_slice(&port.to_be_bytes());
    bytes[2..4].copy_from_slice(&port.to_be_bytes());
    // TCP: a header of five words, and SYN.
    bytes[12..14].copy_from_slice(&[0x50, 0x02]);
    bytes
}

/// A frame, and the key of its row in `fragments`.
fn piece4(to: [u8; 6], address: Ipv4Addr, port: u16, protocol: Protocol, id: u16) -> (Vec<u8>, Vec<u8>) {
    const MORE_FRAGMENTS: u16 = 0x2000;
    let body = transport(port);
    let mut frame = [&to[..], &[2, 0, 0, 0, 0, 1], &[0x08, 0x00]].concat();
    frame.extend([0x45, 0]);
    frame.extend((20 + body.len() as u16).to_be_bytes());
    frame.extend(id.to_be_bytes());
    frame.extend(MORE_FRAGMENTS.to_be_bytes());
    // Hop limit, and no checksum.
    frame.extend([1, protocol as u8, 0, 0]);
    frame.extend(SOURCE4.octets());
    frame.extend(address.octets());
    frame.extend(body);
    let id = u32::from(u16::from_ne_bytes(id.to_be_bytes()));
    (frame, fragment_key(SOURCE4.into(), address.into(), id, protocol))
}

fn piece6(to: [u8; 6], address: Ipv6Addr, port: u16, protocol: Protocol, id: u16) -> (Vec<u8>, Vec<u8>) {
    const FRAGMENT: u8 = 44;
    let body = transport(port);
    let mut frame = [&to[..], &[2, 0, 0, 0, 0, 1], &[0x86, 0xdd]].concat();
    frame.extend([0x60, 0, 0, 0]);
    frame.extend((8 + body.len() as u16).to_be_bytes());
    frame.extend([FRAGMENT, 1]);
    frame.extend(SOURCE6.octets());
    frame.extend(address.octets());
    // The first piece, and more to come.
    frame.extend([protocol as u8, 0, 0, 1]);
    let id = u32::from(id).to_be_bytes();
    frame.extend(id);
    frame.extend(body);
    (frame, fragment_key(SOURCE6.into(), address.into(), u32::from_ne_bytes(id), protocol))
}

/// struct fragment_key of bpf/maps.h.
fn fragment_key(source: IpAddr, destination: IpAddr, id: u32, protocol: Protocol) -> Vec<u8> {
    let mut key = [Ipx::from(source).0, Ipx::from(destination).0].concat();
    key.extend(id.to_ne_bytes());
    key.extend(u32::from(protocol as u8).to_ne_bytes());
    key
}
