//! A client in a place: real sockets of a process in that place's cgroup and namespace, moved step by step by a test.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::process::{ChildStdin, ChildStdout};
use std::time::Duration;

use anyhow::{Context as _, bail};

use super::messages::{Answer, IcmpError, Kind, Reply, Request};
use super::process::Process;

/// How many answers each server gave; failures are counted under what they were.
pub type Counts = BTreeMap<String, u32>;

/// The name of an errno: "ECONNREFUSED".
pub type Errno = String;

/// A `kubelane-lab client`. Its methods panic when the client itself breaks; what the kernel says is returned.
pub struct Client {
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    process: Process,
}

impl Client {
    pub fn new(mut process: Process) -> anyhow::Result<Client> {
        let (stdin, stdout) = (process.stdin()?, process.stdout()?);
        Ok(Client { stdin, stdout, process })
    }

    /// A client that first has to say that it is ready.
    pub fn once_ready(process: Process) -> anyhow::Result<Client> {
        let mut client = Client::new(process)?;
        let mut line = String::new();
        client.stdout.read_line(&mut line).context("listening to a client")?;
        if line.trim() == "ready" { Ok(client) } else { bail!("a client did not come up: {line:?}") }
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Performs one step.
    pub fn call(&mut self, request: &Request) -> anyhow::Result<Answer> {
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        self.stdin.write_all(line.as_bytes()).context("talking to a client")?;
        line.clear();
        self.stdout.read_line(&mut line).context("listening to a client")?;
        serde_json::from_str(&line).with_context(|| format!("a client answered {line:?} to {request:?}"))
    }

    fn step(&mut self, request: &Request) -> Result<Reply, Errno> {
        match self.call(request).expect("the client process works").reply {
            Reply::Failed { errno } => Err(errno),
            reply => Ok(reply),
        }
    }

    /// A new socket.
    pub fn open(&mut self, kind: Kind) -> Result<Socket<'_>, Errno> {
        match self.step(&Request::Open { kind })? {
            Reply::Socket { socket } => Ok(Socket { client: self, socket }),
            other => panic!("open answered {other:?}"),
        }
    }

    /// A socket that was opened before, by its number.
    pub fn socket(&mut self, socket: u32) -> Socket<'_> {
        Socket { client: self, socket }
    }

    /// `times` new connected sockets ask who answers; each also has getpeername() show `to`.
    pub fn ask(&mut self, kind: Kind, to: SocketAddr, times: u32) -> Counts {
        self.counts(&Request::Ask { kind, to, times, unconnected: false })
    }

    /// `times` new unconnected datagram sockets ask who answers; each answer has to come from `to`.
    pub fn ask_unconnected(&mut self, kind: Kind, to: SocketAddr, times: u32) -> Counts {
        self.counts(&Request::Ask { kind, to, times, unconnected: true })
    }

    /// One UDP socket is connected to each of these in turn, `times` over: how often that went well ("connected"), or not.
    pub fn connect_all(&mut self, to: &[SocketAddr], times: u32) -> Counts {
        self.counts(&Request::ConnectAll { to: to.to_vec(), times })
    }

    /// `times` HTTP requests, each on a new connection.
    pub fn http(&mut self, to: SocketAddr, times: u32) -> Counts {
        self.counts(&Request::Http { to, times })
    }

    /// One datagram of `length` bytes from a new socket: who answers, with as many.
    pub fn ask_long(&mut self, to: SocketAddr, length: usize) -> Result<String, Errno> {
        match self.step(&Request::AskLong { to, length })? {
            Reply::Text { text, .. } => Ok(text),
            other => panic!("a long datagram was answered {other:?}"),
        }
    }

    /// Sends so many bytes to a server that returns them, and compares what comes back.
    pub fn transfer(&mut self, to: SocketAddr, bytes: u64) -> Result<(), Errno> {
        self.step(&Request::Transfer { to, bytes }).map(drop)
    }

    /// The ICMP errors that came since this was last asked, of a pod with a stack of its own.
    pub fn errors(&mut self) -> Vec<IcmpError> {
        match self.step(&Request::Errors) {
            Ok(Reply::Errors { errors }) => errors,
            other => panic!("the errors were answered {other:?}"),
        }
    }

    /// As [`Client::ask`], and how long the slowest took.
    pub fn ask_slowest(&mut self, kind: Kind, to: SocketAddr, times: u32) -> (Counts, Duration) {
        let request = Request::Ask { kind, to, times, unconnected: false };
        match self.step(&request) {
            Ok(Reply::Counts { counts, slowest }) => (counts, Duration::from_micros(slowest)),
            other => panic!("{request:?} answered {other:?}"),
        }
    }

    /// As [`Client::ask`], and how long it took.
    pub fn ask_timed(&mut self, kind: Kind, to: SocketAddr, times: u32) -> (Counts, Duration) {
        let request = Request::Ask { kind, to, times, unconnected: false };
        let answer = self.call(&request).expect("the client process works");
        match answer.reply {
            Reply::Counts { counts, .. } => (counts, Duration::from_micros(answer.micros)),
            other => panic!("{request:?} answered {other:?}"),
        }
    }

    fn counts(&mut self, request: &Request) -> Counts {
        match self.step(request) {
            Ok(Reply::Counts { counts, .. }) => counts,
            other => panic!("{request:?} answered {other:?}"),
        }
    }
}

/// One of a client's sockets.
pub struct Socket<'a> {
    client: &'a mut Client,
    socket: u32,
}

impl Socket<'_> {
    /// For [`Client::socket`].
    pub fn number(&self) -> u32 {
        self.socket
    }

    pub fn bind(&mut self, to: SocketAddr) -> Result<(), Errno> {
        self.client.step(&Request::Bind { socket: self.socket, to }).map(drop)
    }

    /// Binds to an address and leaves the port to connect().
    pub fn bind_address(&mut self, to: SocketAddr) -> Result<(), Errno> {
        self.client.step(&Request::BindAddress { socket: self.socket, to }).map(drop)
    }

    /// Ends a datagram socket's association, as connect() to AF_UNSPEC does.
    pub fn disconnect(&mut self) -> Result<(), Errno> {
        self.client.step(&Request::Disconnect { socket: self.socket }).map(drop)
    }

    pub fn connect(&mut self, to: SocketAddr) -> Result<(), Errno> {
        self.client.step(&Request::Connect { socket: self.socket, to }).map(drop)
    }

    pub fn send(&mut self) -> Result<(), Errno> {
        self.client.step(&Request::Send { socket: self.socket }).map(drop)
    }

    pub fn send_to(&mut self, to: SocketAddr) -> Result<(), Errno> {
        self.client.step(&Request::SendTo { socket: self.socket, to }).map(drop)
    }

    /// The name of the server that answered, and the source address of its datagram.
    pub fn receive(&mut self) -> Result<(String, Option<SocketAddr>), Errno> {
        match self.client.step(&Request::Receive { socket: self.socket })? {
            Reply::Text { text, from } => Ok((text, from)),
            other => panic!("receive answered {other:?}"),
        }
    }

    /// Sends on a connected socket and returns the name of the server that answers.
    pub fn ask(&mut self) -> Result<String, Errno> {
        self.send()?;
        Ok(self.receive()?.0)
    }

    /// Sends one datagram to `to`; the name of the server that answers and the source address of the answer.
    pub fn ask_at(&mut self, to: SocketAddr) -> Result<(String, SocketAddr), Errno> {
        self.send_to(to)?;
        let (name, from) = self.receive()?;
        Ok((name, from.expect("a datagram has a source")))
    }

    pub fn peer(&mut self) -> Result<SocketAddr, Errno> {
        self.address(&Request::Peer { socket: self.socket })
    }

    pub fn local(&mut self) -> Result<SocketAddr, Errno> {
        self.address(&Request::Local { socket: self.socket })
    }

    fn address(&mut self, request: &Request) -> Result<SocketAddr, Errno> {
        match self.client.step(request)? {
            Reply::Address { address } => Ok(address),
            other => panic!("{request:?} answered {other:?}"),
        }
    }

    pub fn close(self) -> Result<(), Errno> {
        self.client.step(&Request::Close { socket: self.socket }).map(drop)
    }

    /// Closes a stream with a reset: nothing is left of the connection at either end.
    pub fn abort(self) -> Result<(), Errno> {
        self.client.step(&Request::Abort { socket: self.socket }).map(drop)
    }
}
