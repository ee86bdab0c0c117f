//! Clients outside all nodes, behind the underlay's router: who is asked, and as whom the pod sees them.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::UdpGsoSegment;
use socket2::{Domain, Socket, Type};

use crate::laboratory::{Lab, netns};

/// The client that may reach every pod.
pub const CLIENT: [&str; 2] = ["203.0.113.9", "2001:db8:9::9"];
/// The client that each node's policy bars from pod `a`.
pub const BARRED: [&str; 2] = ["203.0.113.66", "2001:db8:9::66"];

/// A refused connect() may have to wait for its second SYN.
const PATIENCE: Duration = Duration::from_secs(5);
const STALL: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    Tcp,
    Udp,
}

/// Gives the clients their addresses.
pub fn settle(lab: &Lab) -> anyhow::Result<()> {
    let of = |ip: &str| format!("address add {ip}/{} dev br0 nodad", if ip.contains(':') { 128 } else { 32 });
    lab.ip_outside(&CLIENT.iter().chain(&BARRED).map(|ip| of(ip)).collect::<Vec<_>>())
}

/// Lets the clients forget which MTUs the paths to the nodes were found to have.
pub fn forget_mtus(lab: &Lab) -> anyhow::Result<()> {
    lab.outside(|| {
        netns::run("ip", &["-4", "route", "flush", "cache"], "")?;
        netns::run("ip", &["-6", "route", "flush", "cache"], "").map(drop)
    })
}

/// What a pod answers to one request: its name and the client's address, or how the kernel refused it.
pub fn ask(lab: &Lab, from: [&str; 2], by: By, to: SocketAddr) -> String {
    let answer = lab.outside(|| {
        Ok(match by {
            By::Tcp => ask_by_tcp(from, to),
            By::Udp => ask_by_udp(from, to),
        })
    });
    answer.expect("a client outside can be run").unwrap_or_else(|error| match error.kind() {
        ErrorKind::ConnectionRefused => "refused".to_owned(),
        ErrorKind::TimedOut | ErrorKind::WouldBlock => "nothing".to_owned(),
        _ => error.to_string(),
    })
}

fn ask_by_tcp(from: [&str; 2], to: SocketAddr) -> io::Result<String> {
    let mut stream = connect(from, to)?;
    stream.write_all(b"?")?;
    let mut text = [0; 100];
    let length = stream.read(&mut text)?;
    Ok(String::from_utf8_lossy(&text[..length]).into_owned())
}

fn ask_by_udp(from: [&str; 2], to: SocketAddr) -> io::Result<String> {
    let socket = datagram_socket(from, to)?;
    socket.send(b"?")?;
    let mut text = [0; 100];
    let length = socket.recv(&mut text)?;
    Ok(String::from_utf8_lossy(&text[..length]).into_owned())
}

fn source(from: [&str; 2], to: SocketAddr) -> SocketAddr {
    let ip: IpAddr = from[usize::from(to.is_ipv6())].parse().expect("a client's address");
    (ip, 0).into()
}

fn connect(from: [&str; 2], to: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.bind(&source(from, to).into())?;
    socket.connect_timeout(&to.into(), PATIENCE)?;
    socket.set_read_timeout(Some(STALL))?;
    socket.set_write_timeout(Some(STALL))?;
    Ok(socket.into())
}

fn datagram_socket(from: [&str; 2], to: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(source(from, to))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// Sends and receives `bytes` on one connection to a pod's bulk port; what the pod says of itself and of the client.
pub fn transfer(lab: &Lab, from: [&str; 2], to: SocketAddr, bytes: u64) -> anyhow::Result<String> {
    lab.outside(|| {
        let mut stream = connect(from, to).with_context(|| format!("connecting to {to}"))?;
        stream.write_all(&[bytes.to_be_bytes(), bytes.to_be_bytes()].concat())?;
        io::copy(&mut io::repeat(3).take(bytes), &mut stream).with_context(|| format!("sending to {to}"))?;
        let mut text = [0; 64];
        stream.read_exact(&mut text).with_context(|| format!("hearing from {to}"))?;
        let received = io::copy(&mut (&stream).take(bytes), &mut io::sink())?;
        anyhow::ensure!(received == bytes, "{received} of {bytes} bytes came from {to}");
        Ok(String::from_utf8_lossy(&text).trim().to_owned())
    })
}

/// Sends several datagrams in one piece, which the network's devices take apart (UDP_SEGMENT, as QUIC does): what was
/// answered to all of them.
pub fn ask_in_segments(lab: &Lab, from: [&str; 2], to: SocketAddr) -> anyhow::Result<String> {
    const LENGTH: usize = 1200;
    const NUMBER: usize = 20;
    lab.outside(|| {
        let socket = datagram_socket(from, to)?;
        setsockopt(&socket, UdpGsoSegment, &i32::try_from(LENGTH)?).context("asking for segments")?;
        socket.send(&[b'?'; LENGTH * NUMBER])?;
        let (mut buffer, mut answers) = (vec![0; LENGTH + 1], BTreeSet::new());
        for number in 0..NUMBER {
            let length = socket.recv(&mut buffer).with_context(|| format!("{number} of {NUMBER} answers from {to}"))?;
            anyhow::ensure!(length == LENGTH, "{length} bytes came back of {LENGTH}");
            answers.insert(String::from_utf8_lossy(&buffer[..length]).trim().to_owned());
        }
        Ok(answers.into_iter().collect::<Vec<_>>().join(" and "))
    })
}

/// Sends datagrams of `length` bytes until one is answered whole, as often as path-MTU discovery needs: the answer, and
/// how many were sent.
pub fn ask_large(lab: &Lab, from: [&str; 2], to: SocketAddr, length: usize) -> anyhow::Result<(String, usize)> {
    lab.outside(|| {
        let socket = datagram_socket(from, to)?;
        socket.set_read_timeout(Some(Duration::from_millis(300)))?;
        let mut buffer = vec![0; 1 << 16];
        for sent in 1..=8 {
            // Too big for the path, as the last answer told: the kernel says so once.
            if socket.send(&vec![b'?'; length]).is_err() {
                continue;
            }
            if let Ok(n) = socket.recv(&mut buffer) {
                anyhow::ensure!(n == length, "{n} bytes came back of {length}");
                return Ok((String::from_utf8_lossy(&buffer[..n]).trim().to_owned(), sent));
            }
        }
        anyhow::bail!("no answer from {to} to {length} bytes")
    })
}
