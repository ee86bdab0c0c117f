//! A pod's servers that bear witness: who is the client, as they see it, and large transfers both ways.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;

/// Answers every chunk that a connection brings with its own name and the client's address.
pub fn serve_stream(listener: TcpListener, name: &str) {
    for_each_client(listener, name, |mut stream, name| {
        let mut chunk = [0; 1024];
        while stream.read(&mut chunk)? > 0 {
            let peer = stream.peer_addr()?;
            stream.write_all(testimony(name, peer).as_bytes())?;
        }
        Ok(())
    });
}

/// The same for datagrams. An answer is at least as long as its question: filled up with spaces.
pub fn serve_datagrams(socket: UdpSocket, name: &str) {
    let name = name.to_owned();
    thread::spawn(move || {
        let mut datagram = vec![0; 1 << 16];
        loop {
            // An error here is that of an earlier answer (ICMP), not the end of the socket.
            if let Ok((length, from)) = socket.recv_from(&mut datagram) {
                let _ = socket.send_to(format!("{:<length$}", testimony(&name, from)).as_bytes(), from);
            }
        }
    });
}

/// Reads two lengths (64 bits, big endian), reads as many bytes as the first says, answers with name and client in 64
/// bytes, and sends as many bytes as the second says.
pub fn serve_bulk(listener: TcpListener, name: &str) {
    for_each_client(listener, name, |mut stream, name| {
        let mut lengths = [[0; 8]; 2];
        stream.read_exact(lengths.as_flattened_mut())?;
        let [upload, download] = lengths.map(u64::from_be_bytes);
        io::copy(&mut (&stream).take(upload), &mut io::sink())?;
        let peer = stream.peer_addr()?;
        stream.write_all(format!("{:<64}", testimony(name, peer)).as_bytes())?;
        io::copy(&mut io::repeat(7).take(download), &mut stream)?;
        Ok(())
    });
}

/// Returns every byte that a connection brings.
pub fn serve_echo(listener: TcpListener, name: &str) {
    for_each_client(listener, name, |mut stream, _| io::copy(&mut stream.try_clone()?, &mut stream).map(drop));
}

/// "web-1 10.244.1.10"; IPv4 never as v4-mapped.
pub fn testimony(name: &str, peer: SocketAddr) -> String {
    format!("{name} {}", peer.ip().to_canonical())
}

fn for_each_client(listener: TcpListener, name: &str, serve: fn(TcpStream, &str) -> io::Result<()>) {
    let name = name.to_owned();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let name = name.clone();
            // A client that goes early is its own affair.
            thread::spawn(move || serve(stream, &name));
        }
    });
}
