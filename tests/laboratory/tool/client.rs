//! `kubelane-lab client`: real sockets, moved step by step by the requests on stdin.

use std::collections::BTreeMap;
use std::io::{self, BufRead as _, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::http;
use crate::laboratory::messages::{Answer, Kind, Reply, Request, pattern};

/// How long connect() of a stream may take.
pub const CONNECT: Duration = Duration::from_secs(3);
/// How long an answer may take.
pub const RECEIVE: Duration = Duration::from_secs(2);
/// How long a large transfer may stand still.
pub const TRANSFER: Duration = Duration::from_secs(20);

/// Serves requests until stdin closes.
pub fn run() -> anyhow::Result<()> {
    let mut sockets = Sockets::default();
    let mut out = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let line = line.context("reading stdin")?;
        let request: Request = serde_json::from_str(&line).with_context(|| format!("understanding {line}"))?;
        let began = Instant::now();
        let reply = sockets.perform(&request);
        let micros = began.elapsed().as_micros().try_into()?;
        let reply = reply.unwrap_or_else(|error| Reply::Failed { errno: http::error_name(&error) });
        serde_json::to_writer(&mut out, &Answer { micros, reply })?;
        out.write_all(b"\n")?;
        out.flush()?;
    }
    Ok(())
}

/// The open sockets, by number.
#[derive(Default)]
struct Sockets {
    open: BTreeMap<u32, (Kind, Socket)>,
    next: u32,
}

impl Sockets {
    fn perform(&mut self, request: &Request) -> io::Result<Reply> {
        match request {
            Request::Open { kind } => {
                self.next += 1;
                self.open.insert(self.next, (*kind, open(*kind)?));
                return Ok(Reply::Socket { socket: self.next });
            }
            Request::Bind { socket, to } => {
                let (_, socket) = self.get(*socket)?;
                // As clients do that come from one port to several servers.
                socket.set_reuse_address(true)?;
                socket.bind(&(*to).into())?;
            }
            Request::BindAddress { socket, to } => {
                let (_, socket) = self.get(*socket)?;
                setsockopt(socket, sockopt::IpBindAddressNoPort, &true)?;
                socket.bind(&(*to).into())?;
            }
            Request::Disconnect { socket } => disconnect(&self.get(*socket)?.1)?,
            Request::Connect { socket, to } => {
                let (kind, socket) = self.get(*socket)?;
                connect(*kind, socket, *to)?;
            }
            Request::Send { socket } => drop(self.get(*socket)?.1.send(b"?")?),
            Request::SendTo { socket, to } => drop(self.get(*socket)?.1.send_to(b"?", &(*to).into())?),
            Request::Receive { socket } => {
                let (kind, socket) = self.get(*socket)?;
                let (text, from) = receive(*kind, socket)?;
                return Ok(Reply::Text { text, from });
            }
            Request::Peer { socket } => return address(self.get(*socket)?.1.peer_addr()?),
            Request::Local { socket } => return address(self.get(*socket)?.1.local_addr()?),
            Request::Close { socket } => drop(self.open.remove(socket)),
            Request::Abort { socket } => {
                self.get(*socket)?.1.set_linger(Some(Duration::ZERO))?;
                self.open.remove(socket);
            }
            Request::Ask { kind, to, times, unconnected } => {
                return Ok(counts(*times, || if *unconnected { ask_at(*kind, *to) } else { ask(*kind, *to) }));
            }
            Request::ConnectAll { to, times } => {
                let socket = open(if to.iter().all(SocketAddr::is_ipv4) { Kind::Udp4 } else { Kind::Udp6 })?;
                let mut next = to.iter().cycle();
                let mut connect = || socket.connect(&(*next.next().expect("it goes round")).into());
                return Ok(counts(*times * to.len() as u32, || connect().map(|()| "connected".to_owned())));
            }
            Request::AskLong { to, length } => {
                return Ok(Reply::Text { text: ask_long(*to, *length)?, from: Some(*to) });
            }
            Request::Transfer { to, bytes } => transfer(*to, *bytes)?,
            // The kernel keeps them to itself.
            Request::Errors => return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
            Request::Http { to, times } => return Ok(counts(*times, || http::get(*to))),
        }
        Ok(Reply::Done)
    }

    fn get(&self, socket: u32) -> io::Result<&(Kind, Socket)> {
        self.open.get(&socket).ok_or_else(|| io::Error::other(format!("no socket {socket}")))
    }
}

fn open(kind: Kind) -> io::Result<Socket> {
    let domain = if kind.is_ipv6() { Domain::IPV6 } else { Domain::IPV4 };
    let socket_type = if kind.is_stream() { Type::STREAM } else { Type::DGRAM };
    let protocol = match kind {
        Kind::Tcp4 | Kind::Tcp6 => Protocol::TCP,
        Kind::Udp4 | Kind::Udp6 => Protocol::UDP,
        Kind::UdpLite4 | Kind::UdpLite6 => Protocol::from(libc::IPPROTO_UDPLITE),
        Kind::Mptcp4 | Kind::Mptcp6 => Protocol::from(libc::IPPROTO_MPTCP),
    };
    let socket = Socket::new(domain, socket_type, Some(protocol))?;
    if kind.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_read_timeout(Some(RECEIVE))?;
    Ok(socket)
}

/// A stream's connect() is bounded; when the bound is reached the error has no errno and reads "connection timed out",
/// which tells it from the kernel's ETIMEDOUT.
fn connect(kind: Kind, socket: &Socket, to: SocketAddr) -> io::Result<()> {
    if kind.is_stream() { socket.connect_timeout(&to.into(), CONNECT) } else { socket.connect(&to.into()) }
}

fn disconnect(socket: &Socket) -> io::Result<()> {
    let none = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    // SAFETY: `none` is a whole socket address that outlives the call.
    let result = unsafe { libc::connect(socket.as_raw_fd(), &none, size_of_val(&none) as libc::socklen_t) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn receive(kind: Kind, socket: &Socket) -> io::Result<(String, Option<SocketAddr>)> {
    let mut buffer = vec![0; 1 << 16];
    let (length, from) = if kind.is_stream() {
        let mut stream = socket;
        (stream.read(&mut buffer)?, None)
    } else {
        // A second descriptor of the same socket: the standard library's type for it reads source addresses.
        let (length, from) = UdpSocket::from(socket.try_clone()?).recv_from(&mut buffer)?;
        (length, Some(from))
    };
    if length == 0 {
        return Err(io::Error::other("connection closed"));
    }
    Ok((String::from_utf8_lossy(&buffer[..length]).into_owned(), from))
}

fn address(address: SockAddr) -> io::Result<Reply> {
    let address = address.as_socket().ok_or_else(|| io::Error::other("not an IP address"))?;
    Ok(Reply::Address { address })
}

/// Repeats an exchange and counts who answered.
pub fn counts(times: u32, mut exchange: impl FnMut() -> io::Result<String>) -> Reply {
    let mut counts = BTreeMap::new();
    let mut slowest = Duration::ZERO;
    for _ in 0..times {
        let began = Instant::now();
        let name = exchange().unwrap_or_else(|error| http::error_name(&error));
        *counts.entry(name).or_insert(0) += 1;
        slowest = slowest.max(began.elapsed());
    }
    Reply::Counts { counts, slowest: slowest.as_micros().try_into().unwrap_or(u64::MAX) }
}

/// One exchange on a new connected socket, whose peer has to be what was asked for.
fn ask(kind: Kind, to: SocketAddr) -> io::Result<String> {
    let socket = open(kind)?;
    connect(kind, &socket, to)?;
    socket.send(b"?")?;
    let (name, _) = receive(kind, &socket)?;
    let peer = socket.peer_addr()?.as_socket();
    // The name of an MPTCP socket's peer is its first subflow's, and that one's record is not the socket's.
    if peer != Some(to) && !matches!(kind, Kind::Mptcp4 | Kind::Mptcp6) {
        return Err(io::Error::other(format!("getpeername says {peer:?}")));
    }
    Ok(name)
}

/// One exchange on a new unconnected socket, whose answer has to come from where the question went.
fn ask_at(kind: Kind, to: SocketAddr) -> io::Result<String> {
    let socket = open(kind)?;
    socket.send_to(b"?", &to.into())?;
    let (name, from) = receive(kind, &socket)?;
    if from != Some(to) {
        return Err(io::Error::other(format!("the answer came from {from:?}")));
    }
    Ok(name)
}

/// One exchange of long datagrams; a server that fills its answers up pads them with spaces.
fn ask_long(to: SocketAddr, length: usize) -> io::Result<String> {
    let kind = if to.is_ipv6() { Kind::Udp6 } else { Kind::Udp4 };
    let socket = open(kind)?;
    socket.send_to(&vec![b'?'; length], &to.into())?;
    let (text, from) = receive(kind, &socket)?;
    checked(text, length, from == Some(to))
}

/// The name in an answer of this length.
pub fn checked(text: String, length: usize, is_from_there: bool) -> io::Result<String> {
    if text.len() != length || !is_from_there {
        return Err(io::Error::other(format!("{} bytes, from there: {is_from_there}", text.len())));
    }
    Ok(text.trim_end().to_owned())
}

/// Sends and receives at the same time: the server holds no more than the buffers on the way do.
fn transfer(to: SocketAddr, bytes: u64) -> io::Result<()> {
    let stream = TcpStream::connect_timeout(&to, CONNECT)?;
    stream.set_read_timeout(Some(TRANSFER))?;
    stream.set_write_timeout(Some(TRANSFER))?;
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let data: Vec<u8> = (0..bytes).map(pattern).collect();
            (&stream).write_all(&data)
        });
        let mut reader = io::BufReader::new(&stream).bytes();
        for offset in 0..bytes {
            let byte = reader.next().ok_or_else(|| io::Error::other("connection closed"))??;
            if byte != pattern(offset) {
                return Err(io::Error::other(format!("byte {offset} is not what was sent")));
            }
        }
        sender.join().map_err(|_| io::Error::other("the sender panicked"))?
    })
}
