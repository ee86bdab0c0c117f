//! The addresses and devices of the daemon's own network namespace, live, over rtnetlink.
//!
//! There is no incremental state to get wrong: a notice of any kind, a lost one (ENOBUFS) included, leads to a new dump.
//! Notices come on a socket of their own, subscribed before the first dump, so that no change falls between the two.

mod dump;
mod outward;
mod policies;
mod routes;
mod selection;
#[cfg(test)]
mod tests;

use std::time::Duration;

use anyhow::Context as _;
use futures::StreamExt as _;
use futures::channel::mpsc::UnboundedReceiver;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::SocketAddr;
use rtnetlink::{Handle, MulticastGroup};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tracing::{debug, warn};

pub use outward::{DeviceSelection, Layer, NetDevice, Unserved};
pub use policies::follow_policies;
pub use routes::{RouteChange, follow_routes};
pub use selection::NodePortAddresses;

use crate::model::Ipx;

/// What kube-proxy's IPVS mode leaves behind: a device that holds every cluster IP. Those are not the node's.
pub const IPVS_DEVICE: &str = "kube-ipvs0";

/// Two dumps are at least this far apart; a pod's start makes a burst of notices.
const DUMP_GAP: Duration = Duration::from_millis(100);
/// Pause before a broken netlink socket is opened again.
const REOPEN_PAUSE: Duration = Duration::from_secs(1);

/// What the daemon knows of its network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// Every address on any device, sorted and without duplicates, except loopback addresses (loopback NodePorts are
    /// the datapath's own rule) and those of [`IPVS_DEVICE`]. Tentative IPv6 addresses count: they are about to be the
    /// node's, and a datagram to them is answered as soon as they are.
    pub addresses: Vec<Ipx>,
    /// Every device, sorted by index.
    pub devices: Vec<NetDevice>,
}

/// Reads all once and follows it from then on, in a task that ends with the last receiver. A value is sent only when it
/// differs.
///
/// # Errors
/// When the kernel refuses the first subscription or dump.
pub async fn watch() -> anyhow::Result<watch::Receiver<Network>> {
    let session = Session::open()?;
    let (sender, receiver) = watch::channel(dump::network(&session.handle).await?);
    tokio::spawn(async move {
        tokio::select! {
            () = follow(session, &sender) => {}
            () = sender.closed() => {}
        }
    });
    Ok(receiver)
}

async fn follow(mut session: Session, sender: &watch::Sender<Network>) {
    loop {
        let Err(error) = session.follow(sender).await;
        warn!("node addresses: {error:#}; opening netlink again (what was known last stays in force)");
        session = loop {
            sleep(REOPEN_PAUSE).await;
            match Session::open() {
                Ok(session) => break session,
                Err(error) => warn!("node addresses: {error:#}; trying again"),
            }
        };
    }
}

type Notices = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

/// Two netlink sockets: one that only listens, one that only asks.
struct Session {
    notices: Notices,
    handle: Handle,
    /// Drives both sockets; dropping it closes them.
    _connections: JoinSet<()>,
}

impl Session {
    fn open() -> anyhow::Result<Self> {
        use MulticastGroup::{Ipv4Ifaddr, Ipv4Route, Ipv6Ifaddr, Ipv6Route, Link};
        let groups = [Link, Ipv4Ifaddr, Ipv6Ifaddr, Ipv4Route, Ipv6Route];
        let (listener, _, notices) = rtnetlink::new_multicast_connection(&groups)
            .context("subscribing to changes of addresses, devices and routes (netlink)")?;
        let (asker, handle, _) = rtnetlink::new_connection().context("opening a netlink socket")?;
        let mut connections = JoinSet::new();
        connections.spawn(listener);
        connections.spawn(asker);
        Ok(Session { notices, handle, _connections: connections })
    }

    /// Sends each change; returns only when a socket broke.
    async fn follow(&mut self, sender: &watch::Sender<Network>) -> anyhow::Result<std::convert::Infallible> {
        loop {
            let network = dump::network(&self.handle).await?;
            sender.send_if_modified(|known| {
                let changed = *known != network;
                if changed {
                    debug!(?network, "the node's addresses or devices changed");
                    *known = network;
                }
                changed
            });
            sleep(DUMP_GAP).await;
            while !matters(&self.notices.next().await.context("the netlink socket for changes broke")?.0) {}
            while self.notices.try_recv().is_ok() {}
        }
    }
}

/// Of routes only default ones matter; a router may change thousands of others in a second.
fn matters(notice: &NetlinkMessage<RouteNetlinkMessage>) -> bool {
    match &notice.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route)) => {
            route.header.destination_prefix_length == 0
        }
        _ => true,
    }
}
