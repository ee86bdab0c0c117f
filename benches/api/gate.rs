//! The way to the server: carries connections on, counts them and their bytes, and can be shut as if nobody were there.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use anyhow::Context as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::runtime::Handle;
use tokio::task::{JoinHandle, JoinSet};

/// Bytes of one read: a record of TLS has 16 KiB at most.
const PIECE: usize = 64 << 10;

/// What went through so far, TLS and all.
#[derive(Debug, Default)]
pub struct Counts {
    pub to_server: AtomicU64,
    pub from_server: AtomicU64,
    /// When each connection was accepted.
    pub connections: Mutex<Vec<Instant>>,
    /// Of these, closed by whichever side.
    pub closed: AtomicU64,
}

/// Where it listens is up to who made it: a socket belongs to the namespace in which it was bound.
pub struct Gate<'a> {
    pub at: SocketAddr,
    pub counts: Arc<Counts>,
    bind: Box<dyn Fn(SocketAddr) -> anyhow::Result<TcpListener> + 'a>,
    server: SocketAddr,
    runtime: Handle,
    serving: Option<JoinHandle<()>>,
}

impl<'a> Gate<'a> {
    /// An open one. `bind` listens at an address, with port 0 at first.
    pub fn new(
        runtime: &Handle,
        server: SocketAddr,
        bind: impl Fn(SocketAddr) -> anyhow::Result<TcpListener> + 'a,
    ) -> anyhow::Result<Gate<'a>> {
        let (at, counts) = (([127, 0, 0, 1], 0).into(), Arc::default());
        let mut gate = Gate { at, counts, bind: Box::new(bind), server, runtime: runtime.clone(), serving: None };
        gate.open()?;
        Ok(gate)
    }

    pub fn open(&mut self) -> anyhow::Result<()> {
        let listener = (self.bind)(self.at).with_context(|| format!("listening at {}", self.at))?;
        self.at = listener.local_addr()?;
        listener.set_nonblocking(true)?;
        let _guard = self.runtime.enter();
        let listener = tokio::net::TcpListener::from_std(listener)?;
        self.serving = Some(self.runtime.spawn(serve(listener, self.server, Arc::clone(&self.counts))));
        Ok(())
    }

    /// Connections break, and new ones are refused.
    pub fn shut(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.abort();
            // Until then the port is open. A task that was aborted ends with an error.
            let _ = self.runtime.block_on(serving);
        }
    }
}

async fn serve(listener: tokio::net::TcpListener, server: SocketAddr, counts: Arc<Counts>) {
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        counts.connections.lock().expect("nobody panics with it").push(Instant::now());
        let counts = Arc::clone(&counts);
        connections.spawn(async move {
            let Ok(server) = TcpStream::connect(server).await else { return };
            let _ = (client.set_nodelay(true), server.set_nodelay(true));
            let ((asked, answering), (answer, asking)) = (client.into_split(), server.into_split());
            tokio::join!(carry(asked, asking, &counts.to_server), carry(answer, answering, &counts.from_server));
            counts.closed.fetch_add(1, Relaxed);
        });
    }
}

async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, count: &AtomicU64) {
    let mut piece = vec![0; PIECE];
    while let Ok(read @ 1..) = from.read(&mut piece).await {
        if to.write_all(&piece[..read]).await.is_err() {
            break;
        }
        count.fetch_add(read as u64, Relaxed);
    }
    let _ = to.shutdown().await;
}
