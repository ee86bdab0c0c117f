//! HTTP servers that strangers may talk to: health ports stand open on every address of the node. Nobody may keep a
//! connection for nothing, and no single client may take all of them.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, SockaddrIn6, bind, listen as start_listening, setsockopt,
    socket, sockopt,
};
use tokio::net::{TcpListener, TcpStream};
use tower::ServiceExt as _;

/// A request's head has to be complete this long after its connection began, or after the answer before it.
const HEAD: Duration = Duration::from_secs(10);
/// A connection ends after this long: it may answer the request at hand, and then it is closed.
const LIFE: Duration = Duration::from_secs(120);
/// How long that last answer may take to be read.
const FAREWELL: Duration = Duration::from_secs(10);
/// After an error of accept() that is not about one connection (no file descriptors are left).
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
const BACKLOG: i32 = 1024;

/// Connections of all servers together, and of one client; more are closed at once.
const CONNECTIONS: u32 = 384;
const CONNECTIONS_PER_CLIENT: u32 = 64;

/// Counts connections. Shared by all servers of the daemon.
#[derive(Debug, Default)]
pub struct Limits {
    open: Mutex<HashMap<IpAddr, u32>>,
}

/// One connection's place. Dropping it frees the place.
#[derive(Debug)]
struct Place {
    limits: Arc<Limits>,
    client: IpAddr,
}

impl Limits {
    /// A place for a connection from `peer`; `None` when there is none.
    fn admit(self: &Arc<Self>, peer: IpAddr) -> Option<Place> {
        let client = client_of(peer);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.values().sum::<u32>() >= CONNECTIONS || open.get(&client).is_some_and(|n| *n >= CONNECTIONS_PER_CLIENT)
        {
            return None;
        }
        *open.entry(client).or_default() += 1;
        Some(Place { limits: Arc::clone(self), client })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.limits.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.client);
            }
        }
    }
}

/// Who counts as one client: an IPv4 address, or the /64 that an IPv6 host chooses its addresses from.
fn client_of(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
        v4 => v4,
    }
}

/// Listens on `address`. The wildcard of either family means both, as in Go; where IPv6 is off, IPv4 alone.
///
/// # Errors
/// Those of bind(2) and listen(2).
pub fn listen(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    if !address.ip().is_unspecified() {
        return open(address, false);
    }
    match open((Ipv6Addr::UNSPECIFIED, address.port()).into(), true) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => {
            open((Ipv4Addr::UNSPECIFIED, address.port()).into(), false)
        }
        result => result,
    }
}

fn open(address: SocketAddr, both_families: bool) -> io::Result<std::net::TcpListener> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    match address {
        SocketAddr::V4(v4) => bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &SockaddrIn::from(v4))?,
        SocketAddr::V6(v6) => {
            setsockopt(&fd, sockopt::Ipv6V6Only, &!both_families)?;
            bind(std::os::fd::AsRawFd::as_raw_fd(&fd), &SockaddrIn6::from(v6))?;
        }
    }
    start_listening(&fd, Backlog::new(BACKLOG)?)?;
    Ok(fd.into())
}

/// Serves until it is dropped; its connections go with it.
pub async fn serve(listener: TcpListener, router: Router, limits: Arc<Limits>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    if let Some(place) = limits.admit(peer.ip()) {
                        connections.spawn(connection(stream, router.clone(), place));
                    }
                }
                Err(error) => failed_to_accept(&error).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// A client that went away before it was greeted concerns nobody else.
async fn failed_to_accept(error: &io::Error) {
    let about_one =
        [io::ErrorKind::ConnectionRefused, io::ErrorKind::ConnectionAborted, io::ErrorKind::ConnectionReset];
    if !about_one.contains(&error.kind()) {
        tracing::warn!("an HTTP server cannot accept connections: {error}; trying again");
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }
}

async fn connection(stream: TcpStream, router: Router, _place: Place) {
    let service = service_fn(move |request: hyper::Request<Incoming>| router.clone().oneshot(request));
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD)
            .serve_connection(TokioIo::new(stream), service)
    );
    // Errors are the client's: it broke off, or did not speak HTTP.
    if tokio::time::timeout(LIFE, connection.as_mut()).await.is_err() {
        connection.as_mut().graceful_shutdown();
        let _ = tokio::time::timeout(FAREWELL, connection).await;
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream as StdStream;

    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn server() -> (SocketAddr, Arc<Limits>, tokio::task::JoinHandle<()>) {
        let listener = listen(([127, 0, 0, 1], 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        let limits = Arc::new(Limits::default());
        let router = Router::new().route("/", get(async || "hello"));
        let listener = TcpListener::from_std(listener).unwrap();
        (address, limits.clone(), tokio::spawn(serve(listener, router, limits)))
    }

    #[tokio::test]
    async fn one_client_cannot_take_all_connections() {
        let (address, limits, task) = server().await;
        let mut held = Vec::new();
        for _ in 0..CONNECTIONS_PER_CLIENT {
            held.push(TcpStream::connect(address).await.unwrap());
        }
        let mut one_more = TcpStream::connect(address).await.unwrap();
        assert_eq!(one_more.read(&mut [0; 1]).await.unwrap_or(0), 0, "it is closed at once");
        let other = limits.admit("192.0.2.7".parse().unwrap());
        assert!(other.is_some(), "another client finds a place");
        drop(held);
        drop(other);
        let mut answer = String::new();
        // The places are free when the server has seen that the others went.
        while !answer.contains("hello") {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
            let _ = stream.read_to_string(&mut answer).await;
        }
        task.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_sends_its_request_drop_by_drop_is_turned_away() {
        let (address, limits, task) = server().await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nX: ").await.unwrap();
        let began = tokio::time::Instant::now();
        let drops = async {
            while stream.write_all(b"y").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(900)).await;
            }
        };
        tokio::time::timeout(HEAD * 2, drops).await.expect("the connection is ended");
        assert!(began.elapsed() >= HEAD);
        assert!(limits.open.lock().unwrap().is_empty());
        task.abort();
    }

    #[test]
    fn limits_count_clients_and_all_connections() {
        let limits = Arc::new(Limits::default());
        let of = |n: u32| IpAddr::from(Ipv4Addr::from(0x0a00_0000 + n));
        let places: Vec<Place> =
            (0..CONNECTIONS).map(|n| limits.admit(of(n % 10)).expect("ten clients share them")).collect();
        assert!(limits.admit(of(11)).is_none(), "no place is left for anybody");
        drop(places);
        assert!(limits.open.lock().unwrap().is_empty());
        let client = |text: &str| client_of(text.parse().unwrap()).to_string();
        assert_eq!(client("::ffff:10.0.0.1"), "10.0.0.1");
        assert_eq!(client("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
    }

    #[test]
    fn the_wildcard_is_both_families_and_an_address_is_one() {
        for wildcard in ["0.0.0.0:0", "[::]:0"] {
            let listener = listen(wildcard.parse().unwrap()).unwrap();
            let port = listener.local_addr().unwrap().port();
            assert!(StdStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok(), "{wildcard}");
            assert!(StdStream::connect((Ipv6Addr::LOCALHOST, port)).is_ok(), "{wildcard}");
        }
        let one = listen("[::1]:0".parse().unwrap()).unwrap();
        assert!(StdStream::connect((Ipv4Addr::LOCALHOST, one.local_addr().unwrap().port())).is_err());
    }
}
