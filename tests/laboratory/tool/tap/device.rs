//! The tap device as the stack's network card: one frame for each read and write, with a header where the card's
//! offloads are used.

use std::fs::File;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::ensure;
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, PacketMeta, RxToken, TxToken};
use smoltcp::time::Instant;
use smoltcp::wire::Ipv4Address;

use super::{errors, offload};
use crate::laboratory::messages::IcmpError;
use crate::laboratory::tun;

const ETHERNET_HEADER: usize = 14;
/// A header of the card, and the longest packet that there is.
const LONGEST_READ: usize = offload::HEADER + ETHERNET_HEADER + 40 + offload::LONGEST;
/// Where ARP for IPv4 over Ethernet has the address of its sender (RFC 826).
const ARP_SENDER: std::ops::Range<usize> = ETHERNET_HEADER + 14..ETHERNET_HEADER + 18;

/// Who speaks ARP on a link where the gateway shares no network with the pod, as Calico has it. The stack answers ARP
/// of its own networks alone: so it has an address beside the gateway's, which no frame on the link shows.
#[derive(Clone, Copy, Debug)]
pub struct Stranger {
    pub gateway: Ipv4Address,
    pub pod: Ipv4Address,
}

pub struct Tap {
    file: File,
    offloads: bool,
    /// The longest packet that may leave: the device's, or less as soon as the path is known to take less.
    pub mtu: usize,
    pub stranger: Option<Stranger>,
    /// ICMP errors that came and that nobody has taken.
    errors: Vec<IcmpError>,
    broken: Option<io::Error>,
}

impl Tap {
    /// Makes the device, in the namespace that the calling thread is in.
    pub fn open(device: &str, mtu: usize, offloads: bool) -> anyhow::Result<Tap> {
        // The least that IPv6 works with.
        ensure!(mtu >= 1280, "an MTU of {mtu} is too small");
        let file = if offloads {
            let file = tun::open(device, libc::IFF_TAP | libc::IFF_VNET_HDR)?;
            offload::welcome(&file)?;
            file
        } else {
            tun::open(device, libc::IFF_TAP)?
        };
        Ok(Tap { file, offloads, mtu, stranger: None, errors: Vec::new(), broken: None })
    }

    pub fn take_errors(&mut self) -> Vec<IcmpError> {
        std::mem::take(&mut self.errors)
    }

    /// Why the device cannot be used any more.
    pub fn check(&mut self) -> io::Result<()> {
        self.broken.take().map_or(Ok(()), Err)
    }

    fn read(&mut self) -> Option<Vec<u8>> {
        let mut frame = vec![0; LONGEST_READ];
        match self.file.read(&mut frame) {
            Ok(length) => frame.truncate(length),
            Err(error) => {
                if error.kind() != ErrorKind::WouldBlock {
                    self.broken = Some(error);
                }
                return None;
            }
        }
        if self.offloads {
            let header = *frame.first_chunk()?;
            frame.drain(..offload::HEADER);
            offload::finish(header, &mut frame);
        }
        if let Some(stranger) = &self.stranger {
            speak_as(&mut frame, stranger.gateway);
        }
        self.errors.extend(errors::parse(&frame));
        Some(frame)
    }

    fn write(&mut self, mut frame: Vec<u8>, segment: Option<u16>) {
        if let Some(stranger) = &self.stranger {
            speak_as(&mut frame, stranger.pod);
        }
        if self.offloads {
            let header = offload::leave(&mut frame, segment);
            frame.splice(..0, header);
        }
        // A device that is not up yet takes nothing: a lost frame.
        let _ = self.file.write(&frame);
    }
}

/// Gives an ARP frame another sender.
fn speak_as(frame: &mut [u8], sender: Ipv4Address) {
    if frame.get(12..14) == Some(&[0x08, 0x06])
        && let Some(place) = frame.get_mut(ARP_SENDER)
    {
        place.copy_from_slice(&sender.octets());
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Device for Tap {
    type RxToken<'a> = Frame;
    type TxToken<'a> = Sender<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Frame, Sender<'_>)> {
        Some((Frame(self.read()?), Sender { tap: self, segment: None }))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sender<'_>> {
        Some(Sender { tap: self, segment: None })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = ETHERNET_HEADER + self.mtu;
        if self.offloads {
            capabilities.checksum.tcp = Checksum::Rx;
            // Of IPv4 only: smoltcp 0.14 drops a longer packet of IPv6 than the MTU, whoever is to cut it.
            capabilities.segmentation.tcpv4 = NonZeroUsize::new(offload::LONGEST);
        }
        capabilities
    }
}

pub struct Frame(Vec<u8>);

impl RxToken for Frame {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0)
    }
}

pub struct Sender<'a> {
    tap: &'a mut Tap,
    /// The length of the segments that the frame is to be cut into.
    segment: Option<u16>,
}

impl TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, fill: F) -> R {
        let mut frame = vec![0; length];
        let result = fill(&mut frame);
        self.tap.write(frame, self.segment);
        result
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment = meta.segmentation_offload_size.map(Into::into);
    }
}
