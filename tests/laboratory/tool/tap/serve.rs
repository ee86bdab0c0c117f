//! The pod's servers: who is the client, as the pod sees it, and what comes in goes back.

use anyhow::Context as _;
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::{tcp, udp};

use super::Options;
use super::stack::{datagrams, stream};
use crate::witness::testimony;

/// How many SYNs may come at once: a listening socket of smoltcp's takes one.
const BACKLOG: usize = 64;
/// Of each connection, each way.
const CAPACITY: usize = 1 << 16;

#[derive(Clone, Debug)]
enum Says {
    /// Its own name and the client's address, to whatever comes.
    Seen(String),
    /// What came.
    Echo,
}

pub struct Server {
    port: u16,
    says: Says,
    listening: Vec<SocketHandle>,
    connected: Vec<SocketHandle>,
    datagrams: Option<SocketHandle>,
}

impl Server {
    pub fn all(options: &Options, sockets: &mut SocketSet<'static>) -> anyhow::Result<Vec<Server>> {
        let seen = options.seen.iter().map(|port| (*port, Says::Seen(options.name.clone())));
        let all = seen.chain(options.echo.iter().map(|port| (*port, Says::Echo)));
        all.map(|(port, says)| Server::new(port, says, sockets)).collect()
    }

    fn new(port: u16, says: Says, sockets: &mut SocketSet<'static>) -> anyhow::Result<Server> {
        let datagrams = match says {
            Says::Seen(_) => {
                let mut socket = datagrams();
                socket.bind(port).with_context(|| format!("binding to port {port}"))?;
                Some(sockets.add(socket))
            }
            Says::Echo => None,
        };
        let mut server = Server { port, says, listening: Vec::new(), connected: Vec::new(), datagrams };
        server.listen(sockets)?;
        Ok(server)
    }

    fn listen(&mut self, sockets: &mut SocketSet<'static>) -> anyhow::Result<()> {
        while self.listening.len() < BACKLOG {
            let mut socket = stream(CAPACITY);
            socket.listen(self.port).with_context(|| format!("listening on port {}", self.port))?;
            self.listening.push(sockets.add(socket));
        }
        Ok(())
    }

    /// Does everything that can be done now.
    pub fn turn(&mut self, sockets: &mut SocketSet<'static>) {
        let (listening, taken) =
            self.listening.iter().partition(|handle| sockets.get::<tcp::Socket>(**handle).is_listening());
        self.listening = listening;
        self.connected.extend::<Vec<SocketHandle>>(taken);
        self.listen(sockets).expect("the port was listened on before");
        let says = &self.says;
        self.connected.retain(|handle| {
            let is_over = answer(sockets.get_mut(*handle), says);
            if is_over {
                sockets.remove(*handle);
            }
            !is_over
        });
        if let (Some(handle), Says::Seen(name)) = (self.datagrams, &self.says) {
            answer_datagrams(sockets.get_mut(handle), name);
        }
    }
}

/// Answers what has come on a connection: whether it is over.
fn answer(socket: &mut tcp::Socket, says: &Says) -> bool {
    let Some(peer) = socket.remote_endpoint() else { return !socket.is_open() };
    while socket.can_recv() && socket.can_send() {
        let room = socket.send_capacity() - socket.send_queue();
        let take = |bytes: &mut [u8]| {
            let length = bytes.len().min(room);
            (length, bytes[..length].to_vec())
        };
        let came = socket.recv(take).unwrap_or_default();
        let text = match says {
            Says::Seen(name) => testimony(name, peer.into()).into_bytes(),
            Says::Echo => came,
        };
        if socket.send_slice(&text).is_err() {
            break;
        }
    }
    if !socket.may_recv() && socket.recv_queue() == 0 && socket.state() == tcp::State::CloseWait {
        socket.close();
    }
    matches!(socket.state(), tcp::State::TimeWait | tcp::State::Closed)
}

/// An answer is at least as long as its question, and comes from the address that was asked.
fn answer_datagrams(socket: &mut udp::Socket, name: &str) {
    while socket.can_recv() && socket.can_send() {
        let Ok((question, meta)) = socket.recv() else { break };
        let length = question.len();
        let text = format!("{:<length$}", testimony(name, meta.endpoint.into()));
        // One that does not fit is lost, as in any other socket.
        let _ = socket.send_slice(text.as_bytes(), meta);
    }
}
