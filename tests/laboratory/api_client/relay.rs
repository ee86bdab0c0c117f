//! The way from a laboratory, which leads nowhere, to an API server that this machine can reach: connections to the
//! node's loopback device, carried on byte by byte from the machine's own namespace.

use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;

use crate::laboratory::lab::Place;

/// Listens on the place's loopback device and carries every connection on to `server` (`host:port`).
pub fn open(place: &Place, server: String) -> SocketAddr {
    let listener = place.inside(|| Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?)).expect("a place to listen");
    let at = listener.local_addr().expect("an address");
    // Ends with the process: nobody can connect once the laboratory is gone.
    thread::spawn(move || {
        for inside in listener.incoming().flatten() {
            let Ok(outside) = TcpStream::connect(&server) else { continue };
            let (Ok(back), Ok(forth)) = (inside.try_clone(), outside.try_clone()) else { continue };
            thread::spawn(move || carry(inside, outside));
            thread::spawn(move || carry(forth, back));
        }
    });
    at
}

fn carry(mut from: TcpStream, mut to: TcpStream) {
    let _ = std::io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}
