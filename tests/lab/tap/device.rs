//! The tap device as the stack's network card: one frame for each read and write.

use std::fs::File;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};

use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use smoltcp::wire::Ipv4Address;

use super::errors;
use crate::support::wire::IcmpError;

const ETHERNET_HEADER: usize = 14;
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
    /// The longest packet that may leave: the device's, or less as soon as the path is known to take less.
    pub mtu: usize,
    pub stranger: Option<Stranger>,
    /// ICMP errors that came and that nobody has taken.
    errors: Vec<IcmpError>,
    broken: Option<io::Error>,
}

impl Tap {
    pub fn new(file: File, mtu: usize) -> Tap {
        Tap { file, mtu, stranger: None, errors: Vec::new(), broken: None }
    }

    pub fn take_errors(&mut self) -> Vec<IcmpError> {
        std::mem::take(&mut self.errors)
    }

    /// Why the device cannot be used any more.
    pub fn check(&mut self) -> io::Result<()> {
        self.broken.take().map_or(Ok(()), Err)
    }

    fn read(&mut self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 1 << 16];
        match self.file.read(&mut frame) {
            Ok(length) => frame.truncate(length),
            Err(error) => {
                if error.kind() != ErrorKind::WouldBlock {
                    self.broken = Some(error);
                }
                return None;
            }
        }
        if let Some(stranger) = &self.stranger {
            speak_as(&mut frame, stranger.gateway);
        }
        self.errors.extend(errors::parse(&frame));
        Some(frame)
    }

    fn write(&mut self, mut frame: Vec<u8>) {
        if let Some(stranger) = &self.stranger {
            speak_as(&mut frame, stranger.pod);
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
        Some((Frame(self.read()?), Sender(self)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sender<'_>> {
        Some(Sender(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = ETHERNET_HEADER + self.mtu;
        capabilities
    }
}

pub struct Frame(Vec<u8>);

impl RxToken for Frame {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0)
    }
}

pub struct Sender<'a>(&'a mut Tap);

impl TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, fill: F) -> R {
        let mut frame = vec![0; length];
        let result = fill(&mut frame);
        self.0.write(frame);
        result
    }
}
