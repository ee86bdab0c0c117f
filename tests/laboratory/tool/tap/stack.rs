//! The pod's TCP/IP stack: an interface, its sockets and its servers, all moved on by one thread.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use ipnet::IpNet;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::{Duration as StackDuration, Instant as StackInstant};
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Cidr, Ipv6Cidr};

use super::Options;
use super::device::{Stranger, Tap};
use super::serve::Server;
use crate::laboratory::messages::{IcmpError, IcmpKind};

/// The ports of clients: those that IANA leaves to them.
const CLIENT_PORTS: std::ops::RangeInclusive<u16> = 49_152..=65_535;
/// How long a connection may take to end.
const ENDING: StackDuration = StackDuration::from_secs(10);

pub struct Stack {
    tap: Tap,
    interface: Interface,
    pub sockets: SocketSet<'static>,
    servers: Vec<Server>,
    /// Connections that their client has closed.
    ending: Vec<SocketHandle>,
    addresses: Vec<IpCidr>,
    gateways: Vec<IpAddr>,
    began: Instant,
    port: u16,
    errors: Vec<IcmpError>,
    /// Of those the ones that say that a port is unreachable, until the socket has heard of it.
    refusals: Vec<IcmpError>,
}

impl Stack {
    pub fn new(mut tap: Tap, options: &Options) -> anyhow::Result<Stack> {
        let cidr = |net: &IpNet| IpCidr::new(net.addr().into(), net.prefix_len());
        let mut addresses: Vec<IpCidr> = options.address.iter().map(cidr).collect();
        let pod = addresses.iter().find_map(|cidr| if let IpCidr::Ipv4(cidr) = cidr { Some(*cidr) } else { None });
        let pod = pod.context("the pod has no IPv4 address")?;
        for gateway in &options.gateway {
            if let IpAddr::V4(gateway) = gateway
                && !pod.contains_addr(gateway)
            {
                tap.stranger = Some(Stranger { gateway: *gateway, pod: pod.address() });
                // The other address of a network of two.
                let beside = Ipv4Addr::from_bits(gateway.to_bits() ^ 3);
                addresses.push(Ipv4Cidr::new(beside, 30).into());
            }
        }
        let mac = link_address(pod.address());
        addresses.push(Ipv6Cidr::new(link_local(mac), 64).into());
        let began = Instant::now();
        let gateways = options.gateway.clone();
        let interface = interface(&mut tap, &addresses, &gateways, StackInstant::ZERO);
        let mut sockets = SocketSet::new(Vec::new());
        let servers = Server::all(options, &mut sockets)?;
        let port = fastrand::u16(CLIENT_PORTS);
        let (ending, errors, refusals) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Stack { tap, interface, sockets, servers, ending, addresses, gateways, began, port, errors, refusals })
    }

    fn now(&self) -> StackInstant {
        StackInstant::from_micros(i64::try_from(self.began.elapsed().as_micros()).unwrap_or(i64::MAX))
    }

    /// Does everything that can be done now.
    pub fn turn(&mut self) -> io::Result<()> {
        self.interface.poll(self.now(), &mut self.tap, &mut self.sockets);
        self.tap.check()?;
        for error in self.tap.take_errors() {
            self.heed(error);
        }
        for server in &mut self.servers {
            server.turn(&mut self.sockets);
        }
        let sockets = &mut self.sockets;
        self.ending.retain(|handle| {
            let is_over =
                matches!(sockets.get::<tcp::Socket>(*handle).state(), tcp::State::TimeWait | tcp::State::Closed);
            if is_over {
                sockets.remove(*handle);
            }
            !is_over
        });
        Ok(())
    }

    /// Does what an ICMP error asks for, as the kernel's own stack does and smoltcp does not.
    fn heed(&mut self, error: IcmpError) {
        match error.kind {
            IcmpKind::TooBig { mtu } if error.is_intact && (mtu as usize) < self.tap.mtu => {
                self.tap.mtu = mtu as usize;
                let now = self.now();
                self.interface = interface(&mut self.tap, &self.addresses, &self.gateways, now);
            }
            IcmpKind::PortUnreachable if error.is_intact => self.refusals.push(error.clone()),
            _ => {}
        }
        self.errors.push(error);
    }

    /// The ICMP errors that came since this was last called.
    pub fn take_errors(&mut self) -> Vec<IcmpError> {
        self.refusals.clear();
        std::mem::take(&mut self.errors)
    }

    /// Whether what went from this port to `to` was refused; said once.
    pub fn take_refusal(&mut self, from: u16, to: SocketAddr) -> bool {
        let own = |error: &IcmpError| error.from.port() == from && error.to == to;
        let place = self.refusals.iter().position(own);
        place.map(|place| self.refusals.swap_remove(place)).is_some()
    }

    /// Sleeps until there is something to do, `until` has come, or `other` can be read: whether it can.
    pub fn wait(&mut self, until: Option<Instant>, other: Option<BorrowedFd>) -> anyhow::Result<bool> {
        let next = self.interface.poll_delay(self.now(), &self.sockets).map(Duration::from);
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let timeout = match [next, left].into_iter().flatten().min() {
            // Rounded up: a sleep that ends early is followed by one of nothing.
            Some(time) => PollTimeout::try_from(time.as_micros().div_ceil(1000))?,
            None => PollTimeout::NONE,
        };
        let mut ready = vec![PollFd::new(self.tap.as_fd(), PollFlags::POLLIN)];
        ready.extend(other.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        poll(&mut ready, timeout).context("waiting for frames")?;
        Ok(ready.get(1).is_some_and(|fd| fd.any().unwrap_or(false)))
    }

    /// Goes on until `done` says something; `TimedOut` when it did not within `patience`.
    pub fn until<T>(
        &mut self,
        patience: Duration,
        mut done: impl FnMut(&mut Stack) -> Option<io::Result<T>>,
    ) -> io::Result<T> {
        let deadline = Instant::now() + patience;
        loop {
            self.turn()?;
            if let Some(result) = done(self) {
                return result;
            }
            if Instant::now() >= deadline {
                return Err(ErrorKind::TimedOut.into());
            }
            self.wait(Some(deadline), None).map_err(io::Error::other)?;
        }
    }

    /// A port that no client has had for a long time.
    pub fn next_port(&mut self) -> u16 {
        self.port = if self.port == *CLIENT_PORTS.end() { *CLIENT_PORTS.start() } else { self.port + 1 };
        self.port
    }

    pub fn new_stream(&mut self, capacity: usize) -> SocketHandle {
        self.sockets.add(stream(capacity))
    }

    pub fn stream(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub fn datagrams(&mut self, handle: SocketHandle) -> &mut udp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub fn connect(&mut self, handle: SocketHandle, from: u16, to: SocketAddr) -> io::Result<()> {
        let socket = self.sockets.get_mut::<tcp::Socket>(handle);
        socket.connect(self.interface.context(), to, from).map_err(io::Error::other)
    }

    /// Ends a connection in good order, after this call.
    pub fn end(&mut self, handle: SocketHandle) {
        let socket = self.stream(handle);
        socket.close();
        socket.set_timeout(Some(ENDING));
        self.ending.push(handle);
    }
}

/// A stream with room for so many bytes each way.
pub fn stream(capacity: usize) -> tcp::Socket<'static> {
    let buffer = || tcp::SocketBuffer::new(vec![0; capacity]);
    let mut socket = tcp::Socket::new(buffer(), buffer());
    socket.set_nagle_enabled(false);
    socket
}

/// A socket for a few datagrams, of any length.
pub fn datagrams() -> udp::Socket<'static> {
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 1 << 17]);
    udp::Socket::new(buffer(), buffer())
}

/// smoltcp reads the device's MTU when an interface is made: a smaller one takes a new interface. Sockets stay.
fn interface(tap: &mut Tap, addresses: &[IpCidr], gateways: &[IpAddr], now: StackInstant) -> Interface {
    let v4 = addresses.iter().find_map(|cidr| if let IpCidr::Ipv4(cidr) = cidr { Some(cidr.address()) } else { None });
    let mut config = Config::new(link_address(v4.unwrap_or(Ipv4Addr::UNSPECIFIED)).into());
    config.random_seed = fastrand::u64(..);
    let mut interface = Interface::new(config, tap, now);
    interface.update_ip_addrs(|own| own.extend(addresses.iter().copied()));
    for gateway in gateways {
        let routes = interface.routes_mut();
        match gateway {
            IpAddr::V4(gateway) => routes.add_default_ipv4_route(*gateway).map(drop),
            IpAddr::V6(gateway) => routes.add_default_ipv6_route(*gateway).map(drop),
        }
        .expect("smoltcp has room for two routes");
    }
    interface
}

/// One of its own for each pod.
fn link_address(pod: Ipv4Addr) -> EthernetAddress {
    let [a, b, c, d] = pod.octets();
    EthernetAddress([2, 0x42, a, b, c, d])
}

/// RFC 4291, appendix A.
fn link_local(EthernetAddress([a, b, c, d, e, f]): EthernetAddress) -> Ipv6Addr {
    let id = [a ^ 2, b, c, 0xff, 0xfe, d, e, f];
    Ipv6Addr::from_bits(0xfe80 << 112 | u128::from(u64::from_be_bytes(id)))
}
