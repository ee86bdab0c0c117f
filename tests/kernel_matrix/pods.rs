//! Servers that say who they are, and clients that ask them.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

/// No answer for so long is none; a guest in software emulation may be slow.
const PATIENCE: Duration = Duration::from_secs(20);

/// Serves TCP and UDP at `address` until the process ends, and answers everything with `address` itself.
pub fn start(address: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind(address).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            std::thread::spawn(move || answer_stream(stream, address));
        }
    });
    let socket = UdpSocket::bind(address).unwrap();
    std::thread::spawn(move || {
        let mut question = [0; 16];
        while let Ok((_, client)) = socket.recv_from(&mut question) {
            let _ = socket.send_to(address.to_string().as_bytes(), client);
        }
    });
    address
}

fn answer_stream(mut stream: TcpStream, address: SocketAddr) {
    let mut question = [0; 16];
    while matches!(stream.read(&mut question), Ok(1..)) {
        if stream.write_all(address.to_string().as_bytes()).is_err() {
            break;
        }
    }
}

/// Connects and gives the socket a time limit.
pub fn connect_tcp(to: SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Which pod is at the other end.
pub fn ask_tcp(stream: &mut TcpStream) -> std::io::Result<SocketAddr> {
    stream.write_all(b"?")?;
    let mut answer = [0; 64];
    let length = stream.read(&mut answer)?;
    Ok(parse(&answer[..length]))
}

/// A socket of `to`'s family, not connected.
pub fn udp_socket(to: IpAddr) -> UdpSocket {
    let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Which pod answers a connected socket.
pub fn ask_udp(socket: &UdpSocket) -> std::io::Result<SocketAddr> {
    socket.send(b"?")?;
    let mut answer = [0; 64];
    let length = socket.recv(&mut answer)?;
    Ok(parse(&answer[..length]))
}

/// Which pod answers, and the address that its datagram comes from, as the application sees it.
pub fn ask_udp_at(socket: &UdpSocket, to: SocketAddr) -> std::io::Result<(SocketAddr, SocketAddr)> {
    socket.send_to(b"?", to)?;
    let mut answer = [0; 64];
    let (length, from) = socket.recv_from(&mut answer)?;
    Ok((parse(&answer[..length]), from))
}

fn parse(answer: &[u8]) -> SocketAddr {
    std::str::from_utf8(answer).unwrap().parse().unwrap()
}
