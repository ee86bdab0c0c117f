//! HTTP servers that strangers may talk to: health ports stand open on every address of the node. Nobody may keep a
//! connection for nothing, and nobody may take all of them (`places.rs`).

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tower::ServiceExt as _;

use super::places::{Limits, Place, Server};

/// A request's head has to be complete this long after its connection began, or after the answer before it: load balancers
/// keep a connection between two checks.
const HEAD: Duration = Duration::from_secs(60);
/// The longest head of a request, which is what a connection may cost in memory (the least that hyper allows).
const HEAD_BYTES: usize = 8 << 10;
const HEADERS: usize = 64;
/// A connection ends after this long: it may answer the request at hand, and then it is closed.
const LIFE: Duration = Duration::from_secs(600);
/// How long that last answer may take to be read.
const FAREWELL: Duration = Duration::from_secs(10);
/// After an error of accept() that is not about one connection (no file descriptors are left).
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
const BACKLOG: i32 = 1024;
/// What the kernel holds for a client that does not read, which would otherwise be megabytes. It doubles it.
const SEND_BUFFER: usize = 64 << 10;

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
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(!both_families)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Serves until it is dropped; its connections go with it.
pub async fn serve(listener: TcpListener, router: Router, limits: Arc<Limits>) {
    let server = Server::default();
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    let is_own = stream.local_addr().is_ok_and(|local| local.ip() == peer.ip());
                    let place = limits.admit(&server, peer.ip(), is_own);
                    connections.spawn(connection(stream, router.clone(), place));
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

async fn connection(stream: TcpStream, router: Router, place: Place) {
    // Without it, there is only more memory in use.
    let _ = SockRef::from(&stream).set_send_buffer_size(SEND_BUFFER);
    let place = Arc::new(place);
    let asked = Arc::clone(&place);
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        asked.is_used();
        router.clone().oneshot(request)
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD)
            .max_buf_size(HEAD_BYTES)
            .max_headers(HEADERS)
            .serve_connection(TokioIo::new(stream), service)
    );
    // Errors are the client's: it broke off, or did not speak HTTP.
    tokio::select! {
        _ = connection.as_mut() => {}
        () = place.taken() => {}
        () = tokio::time::sleep(LIFE) => {
            connection.as_mut().graceful_shutdown();
            let _ = tokio::time::timeout(FAREWELL, connection).await;
        }
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

    /// A connection from this address of the loopback device: a stranger's, unless it is the server's own.
    async fn connect(from: [u8; 4], to: SocketAddr) -> TcpStream {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind((from, 0).into()).unwrap();
        socket.connect(to).await.unwrap()
    }

    /// Whether a request on this connection is answered.
    async fn is_answered(stream: &mut TcpStream) -> bool {
        let mut answer = [0; 512];
        let asked = stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
        let read = stream.read(&mut answer).await.unwrap_or(0);
        asked.is_ok() && String::from_utf8_lossy(&answer[..read]).contains("hello")
    }

    #[tokio::test]
    async fn clients_that_take_all_connections_keep_nobody_from_an_answer() {
        let (address, _, task) = server().await;
        let mut held = Vec::new();
        for n in 0..600u16 {
            let mut stream = connect([127, 0, 0, 2 + (n % 6) as u8], address).await;
            let _ = stream.write_all(b"GET / HTTP/1.1\r\nX-").await;
            held.push(stream);
        }
        for stranger in 20..40 {
            assert!(is_answered(&mut connect([127, 0, 0, stranger], address).await).await, "127.0.0.{stranger}");
        }
        assert!(is_answered(&mut connect([127, 0, 0, 1], address).await).await, "the node itself");
        task.abort();
    }

    #[tokio::test]
    async fn a_load_balancer_keeps_more_than_a_hundred_connections() {
        let (address, _, task) = server().await;
        let mut kept = Vec::new();
        for _ in 0..150 {
            kept.push(connect([127, 0, 0, 9], address).await);
        }
        for _ in 0..3 {
            for stream in &mut kept {
                assert!(is_answered(stream).await);
            }
        }
        task.abort();
    }

    #[tokio::test]
    async fn a_head_of_more_than_eight_kilobytes_is_refused() {
        let (address, _, task) = server().await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!("GET / HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "y".repeat(9000));
        let _ = stream.write_all(head.as_bytes()).await;
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
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
        assert_eq!(limits.count(), 0);
        task.abort();
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
