//! Both ends of the first-connection figures, as processes of their own: this program again, in a client's and in a
//! pod's place, with the options that the bench gives it.

use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Socket, Type};

/// The part that a process has.
#[derive(Args)]
pub struct Part {
    /// Accept connections on this port, and close each at once.
    #[arg(long, hide = true)]
    accept: Option<u16>,
    /// Make connections, one after the other, and print the nanoseconds that each took.
    #[arg(long, hide = true)]
    connect: Option<SocketAddrV4>,
    #[arg(long, hide = true, default_value_t = 0)]
    connections: u16,
    /// The source port of the first one; each has a port of its own.
    #[arg(long, hide = true, default_value_t = 0)]
    first_port: u16,
}

/// Connections that come first and are not told of: the process itself is cold.
pub const WARM_UP: u16 = 20;

/// How long a connection may take to come about, and the server to close it.
const PATIENCE: Duration = Duration::from_secs(5);

/// How the line begins in which a client says why it failed.
const FAILED: &str = "failed: ";

impl Part {
    /// Plays the part; `false` when there is none.
    pub fn play(&self) -> anyhow::Result<bool> {
        match (self.accept, self.connect) {
            (Some(port), _) => accept(port)?,
            (None, Some(to)) => connect(to, self.first_port, self.connections)?,
            (None, None) => return Ok(false),
        }
        Ok(true)
    }
}

/// Options with which this program is the server.
pub fn server(port: u16) -> Vec<String> {
    vec!["--accept".to_owned(), port.to_string()]
}

/// Options with which this program is the client: it uses [`WARM_UP`] ports more than it tells of.
pub fn client(to: SocketAddrV4, connections: u16, first_port: u16) -> Vec<String> {
    let options = format!("--connect {to} --connections {connections} --first-port {first_port}");
    options.split(' ').map(str::to_owned).collect()
}

fn accept(port: u16) -> anyhow::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).context("listening")?;
    println!("ready");
    for stream in listener.incoming() {
        drop(stream.context("accepting")?);
    }
    Ok(())
}

fn connect(to: SocketAddrV4, first_port: u16, connections: u16) -> anyhow::Result<()> {
    let mut times = Vec::new();
    for number in 0..WARM_UP + connections {
        let port = first_port + number;
        match one(to, port) {
            Ok(time) => times.push(time),
            Err(error) => {
                // The bench reads this: the log has what all processes of the place say.
                println!("{FAILED}connection {} to {to}, from port {port}: {error:#}", number + 1);
                bail!("a connection to {to} failed");
            }
        }
    }
    for time in &times[usize::from(WARM_UP)..] {
        println!("{}", time.as_nanos());
    }
    Ok(())
}

/// What a client that did not fail printed: microseconds of each connection. Otherwise why it failed.
pub fn times(said: &str, has_succeeded: bool) -> Result<Vec<f64>, String> {
    if let Some(why) = said.lines().find_map(|line| line.strip_prefix(FAILED)) {
        return Err(why.to_owned());
    }
    let times: Result<Vec<f64>, _> = said.lines().map(|line| line.parse::<f64>().map(|time| time / 1e3)).collect();
    match times {
        Ok(times) if has_succeeded => Ok(times),
        _ => Err(format!("the client said {said:?}")),
    }
}

/// How long connect(2) takes. The source port is chosen before: none is used twice, so that neither the client nor a
/// connection table on the way meets what is left of an earlier connection.
fn one(to: SocketAddrV4, port: u16) -> anyhow::Result<Duration> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)).into())?;
    socket.set_read_timeout(Some(PATIENCE))?;
    // Else the kernel repeats a lost SYN for two minutes. This counts nothing before the first repetition.
    setsockopt(&socket, sockopt::TcpUserTimeout, &(PATIENCE.as_millis() as u32))?;
    // The server closes first; what the client closes with then is a reset, after which no end remembers anything.
    socket.set_linger(Some(Duration::ZERO))?;
    let to = SocketAddr::V4(to).into();
    let began = Instant::now();
    socket.connect(&to)?;
    let took = began.elapsed();
    if (&socket).read(&mut [0])? != 0 {
        bail!("the server says something");
    }
    Ok(took)
}
