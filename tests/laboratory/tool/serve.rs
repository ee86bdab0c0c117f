//! A pod's servers: a real HTTP/1.1 server, and TCP, MPTCP, UDP and UDP-Lite servers that answer with the pod's name.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::thread;

use anyhow::Context as _;
use axum::Router;
use axum::routing::get;
use clap::Args;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::signal::unix::{SignalKind, signal};

use crate::witness;

#[derive(Args)]
pub struct Options {
    /// What every answer says.
    #[arg(long)]
    name: String,
    /// Address to listen on; the default takes both families.
    #[arg(long, default_value_t = IpAddr::V6(Ipv6Addr::UNSPECIFIED))]
    address: IpAddr,
    #[arg(long)]
    http: Vec<u16>,
    #[arg(long)]
    tcp: Vec<u16>,
    /// Takes plain TCP clients too. Left out, with a line on stderr, where the kernel has no MPTCP.
    #[arg(long)]
    mptcp: Vec<u16>,
    #[arg(long)]
    udp: Vec<u16>,
    /// Left out, with a line on stderr, where the kernel has no UDP-Lite.
    #[arg(long)]
    udplite: Vec<u16>,
    /// TCP and UDP: answers also say who the client is.
    #[arg(long)]
    seen: Vec<u16>,
    /// TCP: large transfers.
    #[arg(long)]
    bulk: Vec<u16>,
    /// TCP: what comes in goes back.
    #[arg(long)]
    echo: Vec<u16>,
}

/// Serves until SIGTERM, then finishes the HTTP requests under way.
pub fn run(options: &Options) -> anyhow::Result<()> {
    for port in &options.tcp {
        serve_stream(listen(options, *port, Type::STREAM, Protocol::TCP)?, &options.name);
    }
    for port in &options.mptcp {
        match listen(options, *port, Type::STREAM, Protocol::from(libc::IPPROTO_MPTCP)) {
            Ok(socket) => serve_stream(socket, &options.name),
            Err(error) => eprintln!("no MPTCP: {error:#}"),
        }
    }
    for port in &options.udp {
        serve_datagrams(listen(options, *port, Type::DGRAM, Protocol::UDP)?, &options.name);
    }
    for port in &options.udplite {
        match listen(options, *port, Type::DGRAM, Protocol::from(libc::IPPROTO_UDPLITE)) {
            Ok(socket) => serve_datagrams(socket, &options.name),
            Err(error) => eprintln!("no UDP-Lite: {error:#}"),
        }
    }
    for port in &options.seen {
        witness::serve_stream(listen(options, *port, Type::STREAM, Protocol::TCP)?.into(), &options.name);
        witness::serve_datagrams(listen(options, *port, Type::DGRAM, Protocol::UDP)?.into(), &options.name);
    }
    for port in &options.bulk {
        witness::serve_bulk(listen(options, *port, Type::STREAM, Protocol::TCP)?.into(), &options.name);
    }
    for port in &options.echo {
        witness::serve_echo(listen(options, *port, Type::STREAM, Protocol::TCP)?.into(), &options.name);
    }
    let listeners = options.http.iter().map(|port| listen(options, *port, Type::STREAM, Protocol::TCP));
    let listeners: Vec<Socket> = listeners.collect::<Result<_, _>>()?;
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(serve_http(listeners, &options.name))
}

fn listen(options: &Options, port: u16, kind: Type, protocol: Protocol) -> anyhow::Result<Socket> {
    let address = SocketAddr::new(options.address, port);
    let open = || -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
        if kind == Type::STREAM {
            socket.set_reuse_address(true)?;
        }
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        socket.bind(&address.into())?;
        if kind == Type::STREAM {
            socket.listen(1024)?;
        }
        Ok(socket)
    };
    open().with_context(|| format!("listening on {address}"))
}

/// Answers every chunk that a connection brings.
fn serve_stream(socket: Socket, name: &str) {
    let (listener, name) = (TcpListener::from(socket), name.to_owned());
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let name = name.clone();
            thread::spawn(move || {
                let mut chunk = [0; 1024];
                while let Ok(1..) = stream.read(&mut chunk) {
                    if stream.write_all(name.as_bytes()).is_err() {
                        break;
                    }
                }
            });
        }
    });
}

fn serve_datagrams(socket: Socket, name: &str) {
    let (socket, name) = (UdpSocket::from(socket), name.to_owned());
    thread::spawn(move || {
        let mut datagram = [0; 2048];
        loop {
            // An error here is that of an earlier answer (ICMP), not the end of the socket.
            if let Ok((_, from)) = socket.recv_from(&mut datagram) {
                let _ = socket.send_to(name.as_bytes(), from);
            }
        }
    });
}

async fn serve_http(listeners: Vec<Socket>, name: &str) -> anyhow::Result<()> {
    let mut servers = Vec::new();
    for socket in listeners {
        let listener = TcpListener::from(socket);
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let name = name.to_owned();
        let router = Router::new().route("/", get(async move || name));
        let mut end = signal(SignalKind::terminate())?;
        let server = axum::serve(listener, router).with_graceful_shutdown(async move {
            end.recv().await;
        });
        servers.push(tokio::spawn(server.into_future()));
    }
    let mut end = signal(SignalKind::terminate())?;
    println!("ready");
    end.recv().await;
    for server in servers {
        server.await??;
    }
    Ok(())
}
