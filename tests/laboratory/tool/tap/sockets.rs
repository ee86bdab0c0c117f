//! What a test asks of the pod, as of any client: the same requests, by sockets of smoltcp's.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::State;

use super::stack::{Stack, datagrams};
use crate::client::{CONNECT, RECEIVE, TRANSFER, checked, counts};
use crate::http;
use crate::laboratory::messages::{Kind, Reply, Request, pattern};

/// Room for a few words each way.
const SMALL: usize = 1 << 12;
/// Room for a window of a large transfer.
const LARGE: usize = 1 << 18;

/// The open sockets, by number.
#[derive(Default)]
pub struct Sockets {
    open: BTreeMap<u32, Socket>,
    next: u32,
}

#[derive(Clone, Copy)]
struct Socket {
    kind: Kind,
    handle: SocketHandle,
    port: u16,
    to: Option<SocketAddr>,
}

impl Sockets {
    pub fn perform(&mut self, stack: &mut Stack, request: &Request) -> io::Result<Reply> {
        match request {
            Request::Open { kind } => {
                self.next += 1;
                self.open.insert(self.next, Socket::open(stack, *kind, SMALL)?);
                return Ok(Reply::Socket { socket: self.next });
            }
            Request::Bind { socket, to } => self.get(*socket)?.bind(stack, to.port())?,
            Request::Connect { socket, to } => self.get(*socket)?.connect(stack, *to)?,
            Request::Send { socket } => self.get(*socket)?.send(stack, b"?")?,
            Request::SendTo { socket, to } => self.get(*socket)?.send_to(stack, b"?", *to)?,
            Request::Receive { socket } => {
                let (text, from) = self.get(*socket)?.receive(stack)?;
                return Ok(Reply::Text { text, from });
            }
            Request::Peer { socket } => {
                let address = self.get(*socket)?.to.ok_or(ErrorKind::NotConnected)?;
                return Ok(Reply::Address { address });
            }
            Request::Local { socket } => {
                let Socket { kind, port, .. } = *self.get(*socket)?;
                let any: IpAddr =
                    if kind.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
                return Ok(Reply::Address { address: (any, port).into() });
            }
            Request::Close { socket } => self.take(*socket)?.close(stack),
            Request::Abort { socket } => {
                let socket = self.take(*socket)?;
                if socket.kind.is_stream() {
                    stack.stream(socket.handle).abort();
                }
                socket.close(stack);
            }
            Request::Ask { kind, to, times, .. } => return Ok(counts(*times, || ask(stack, *kind, *to))),
            Request::AskLong { to, length } => {
                return Ok(Reply::Text { text: ask_long(stack, *to, *length)?, from: Some(*to) });
            }
            Request::Http { to, times } => return Ok(counts(*times, || get(stack, *to))),
            Request::Transfer { to, bytes } => transfer(stack, *to, *bytes)?,
            Request::Errors => return Ok(Reply::Errors { errors: stack.take_errors() }),
            // smoltcp has no such thing.
            Request::BindAddress { .. } | Request::Disconnect { .. } | Request::ConnectAll { .. } => {
                return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
            }
        }
        Ok(Reply::Done)
    }

    fn get(&mut self, socket: u32) -> io::Result<&mut Socket> {
        self.open.get_mut(&socket).ok_or_else(|| io::Error::other(format!("no socket {socket}")))
    }

    fn take(&mut self, socket: u32) -> io::Result<Socket> {
        self.open.remove(&socket).ok_or_else(|| io::Error::other(format!("no socket {socket}")))
    }
}

impl Socket {
    fn open(stack: &mut Stack, kind: Kind, capacity: usize) -> io::Result<Socket> {
        let handle = match kind {
            Kind::Tcp4 | Kind::Tcp6 => stack.new_stream(capacity),
            Kind::Udp4 | Kind::Udp6 => stack.sockets.add(datagrams()),
            _ => return Err(io::Error::from_raw_os_error(libc::EPROTONOSUPPORT)),
        };
        let mut socket = Socket { kind, handle, port: 0, to: None };
        let port = stack.next_port();
        socket.bind(stack, port)?;
        Ok(socket)
    }

    fn bind(&mut self, stack: &mut Stack, port: u16) -> io::Result<()> {
        self.port = port;
        if !self.kind.is_stream() {
            let socket = stack.datagrams(self.handle);
            socket.close();
            socket.bind(port).map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Refused by a reset, or by ICMP about this very connection.
    fn connect(&mut self, stack: &mut Stack, to: SocketAddr) -> io::Result<()> {
        let Socket { handle, port, .. } = *self;
        self.to = Some(to);
        if !self.kind.is_stream() {
            return Ok(());
        }
        stack.connect(handle, port, to)?;
        let result = stack.until(CONNECT, |stack| {
            let refused = || Some(Err(ErrorKind::ConnectionRefused));
            match stack.stream(handle).state() {
                State::Closed => refused(),
                State::SynSent if stack.take_refusal(port, to) => refused(),
                State::SynSent => None,
                _ => Some(Ok(())),
            }
            .map(|result| result.map_err(|_| io::Error::from_raw_os_error(libc::ECONNREFUSED)))
        });
        if result.is_err() {
            stack.stream(handle).abort();
        }
        result
    }

    fn send(&self, stack: &mut Stack, bytes: &[u8]) -> io::Result<()> {
        if !self.kind.is_stream() {
            return self.send_to(stack, bytes, self.to.ok_or(ErrorKind::NotConnected)?);
        }
        let sent = stack.stream(self.handle).send_slice(bytes).map_err(|_| ErrorKind::BrokenPipe)?;
        if sent == bytes.len() { Ok(()) } else { Err(ErrorKind::WouldBlock.into()) }
    }

    fn send_to(&self, stack: &mut Stack, bytes: &[u8], to: SocketAddr) -> io::Result<()> {
        stack.datagrams(self.handle).send_slice(bytes, to).map_err(io::Error::other)
    }

    fn receive(&self, stack: &mut Stack) -> io::Result<(String, Option<SocketAddr>)> {
        let (bytes, from) = if self.kind.is_stream() {
            (self.receive_bytes(stack)?, None)
        } else {
            self.receive_datagram(stack).map(|(bytes, from)| (bytes, Some(from)))?
        };
        Ok((String::from_utf8_lossy(&bytes).into_owned(), from))
    }

    /// What has come on a stream; an error at its end.
    fn receive_bytes(&self, stack: &mut Stack) -> io::Result<Vec<u8>> {
        let result = stack.until(RECEIVE, |stack| {
            let socket = stack.stream(self.handle);
            if socket.can_recv() {
                let all = |bytes: &mut [u8]| (bytes.len(), bytes.to_vec());
                return Some(socket.recv(all).map_err(io::Error::other));
            }
            match socket.state() {
                State::Closed => Some(Err(io::Error::from_raw_os_error(libc::ECONNRESET))),
                _ if !socket.may_recv() => Some(Err(io::Error::other("connection closed"))),
                _ => None,
            }
        });
        result.map_err(without_answer)
    }

    fn receive_datagram(&self, stack: &mut Stack) -> io::Result<(Vec<u8>, SocketAddr)> {
        let Socket { handle, port, to, .. } = *self;
        let result = stack.until(RECEIVE, |stack| {
            if let Ok((bytes, meta)) = stack.datagrams(handle).recv() {
                return Some(Ok((bytes.to_vec(), meta.endpoint.into())));
            }
            let is_refused = to.is_some_and(|to| stack.take_refusal(port, to));
            is_refused.then(|| Err(io::Error::from_raw_os_error(libc::ECONNREFUSED)))
        });
        result.map_err(without_answer)
    }

    fn close(self, stack: &mut Stack) {
        if self.kind.is_stream() {
            stack.end(self.handle);
        } else {
            stack.sockets.remove(self.handle);
        }
    }
}

/// As the kernel's sockets say it.
fn without_answer(error: io::Error) -> io::Error {
    if error.kind() == ErrorKind::TimedOut { io::Error::from_raw_os_error(libc::EAGAIN) } else { error }
}

/// Uses a new connected socket, and closes it whatever came of that.
fn with_socket<T>(
    stack: &mut Stack,
    kind: Kind,
    capacity: usize,
    to: SocketAddr,
    work: impl FnOnce(&mut Stack, &Socket) -> io::Result<T>,
) -> io::Result<T> {
    let mut socket = Socket::open(stack, kind, capacity)?;
    let result = socket.connect(stack, to).and_then(|()| work(stack, &socket));
    socket.close(stack);
    result
}

fn stream_kind(to: SocketAddr) -> Kind {
    if to.is_ipv6() { Kind::Tcp6 } else { Kind::Tcp4 }
}

/// One exchange on a new socket; a datagram's answer has to come from where the question went.
fn ask(stack: &mut Stack, kind: Kind, to: SocketAddr) -> io::Result<String> {
    with_socket(stack, kind, SMALL, to, |stack, socket| {
        socket.send(stack, b"?")?;
        let (name, from) = socket.receive(stack)?;
        if from.is_some_and(|from| from != to) {
            return Err(io::Error::other(format!("the answer came from {from:?}")));
        }
        Ok(name)
    })
}

fn ask_long(stack: &mut Stack, to: SocketAddr, length: usize) -> io::Result<String> {
    let kind = if to.is_ipv6() { Kind::Udp6 } else { Kind::Udp4 };
    with_socket(stack, kind, SMALL, to, |stack, socket| {
        socket.send(stack, &vec![b'?'; length])?;
        let (text, from) = socket.receive(stack)?;
        checked(text, length, from == Some(to))
    })
}

fn get(stack: &mut Stack, to: SocketAddr) -> io::Result<String> {
    with_socket(stack, stream_kind(to), SMALL, to, |stack, socket| {
        socket.send(stack, http::request(to).as_bytes())?;
        let mut answer = Vec::new();
        loop {
            match socket.receive_bytes(stack) {
                Ok(bytes) => answer.extend(bytes),
                Err(error) if error.raw_os_error().is_none() => break,
                Err(error) => return Err(error),
            }
        }
        http::body(&String::from_utf8_lossy(&answer))
    })
}

/// Sends and receives at the same time, and compares every byte.
fn transfer(stack: &mut Stack, to: SocketAddr, bytes: u64) -> io::Result<()> {
    with_socket(stack, stream_kind(to), LARGE, to, |stack, socket| {
        let (mut sent, mut received) = (0, 0);
        while received < bytes {
            let before = received;
            stack.until(TRANSFER, |stack| {
                let stream = stack.stream(socket.handle);
                let _ = stream.send(|room| {
                    let length = room.len().min(usize::try_from(bytes - sent).unwrap_or(usize::MAX));
                    room[..length].iter_mut().zip(sent..).for_each(|(byte, offset)| *byte = pattern(offset));
                    sent += length as u64;
                    (length, ())
                });
                let compared = stream.recv(|came| {
                    let wrong = came.iter().zip(received..).find(|(byte, offset)| **byte != pattern(*offset));
                    received += came.len() as u64;
                    (came.len(), wrong.map_or(Ok(()), |(_, offset)| Err(format!("byte {offset} is not what was sent"))))
                });
                match compared {
                    Ok(Err(wrong)) => Some(Err(io::Error::other(wrong))),
                    Err(_) => Some(Err(io::Error::other(format!("closed after {received} bytes")))),
                    Ok(Ok(())) => (received > before).then_some(Ok(())),
                }
            })?;
        }
        Ok(())
    })
}
