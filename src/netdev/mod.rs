//! The addresses of the daemon's own network namespace, live, over rtnetlink.
//!
//! There is no incremental state to get wrong: a notice of any kind, a lost one (ENOBUFS) included, leads to a new dump.
//! Notices come on a socket of their own, subscribed before the first dump, so that no change falls between the two.

mod selection;
#[cfg(test)]
mod tests;

use std::time::Duration;

use anyhow::Context as _;
use futures::channel::mpsc::UnboundedReceiver;
use futures::{StreamExt as _, TryStreamExt as _};
use rtnetlink::packet_core::NetlinkMessage;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::sys::SocketAddr;
use rtnetlink::{Handle, MulticastGroup};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tracing::{debug, warn};

pub use selection::NodePortAddresses;

use crate::model::Ipx;

/// What kube-proxy's IPVS mode leaves behind: a device that holds every cluster IP. Those are not the node's.
pub const IPVS_DEVICE: &str = "kube-ipvs0";

/// Two dumps are at least this far apart; a pod's start makes a burst of notices.
const DUMP_GAP: Duration = Duration::from_millis(100);
/// Pause before a broken netlink socket is opened again.
const REOPEN_PAUSE: Duration = Duration::from_secs(1);

/// Reads the addresses once and follows them from then on, in a task that ends with the last receiver.
///
/// The channel holds every address on any device, sorted and without duplicates, except loopback addresses (loopback
/// NodePorts are the datapath's own rule) and those of [`IPVS_DEVICE`]. Tentative IPv6 addresses count: they are about
/// to be the node's, and a datagram to them is answered as soon as they are. A value is sent only when it differs.
///
/// # Errors
/// When the kernel refuses the first subscription or dump.
pub async fn watch() -> anyhow::Result<watch::Receiver<Vec<Ipx>>> {
    let session = Session::open()?;
    let (sender, receiver) = watch::channel(session.dump().await?);
    tokio::spawn(async move {
        tokio::select! {
            () = follow(session, &sender) => {}
            () = sender.closed() => {}
        }
    });
    Ok(receiver)
}

async fn follow(mut session: Session, sender: &watch::Sender<Vec<Ipx>>) {
    loop {
        let Err(error) = session.follow(sender).await;
        warn!("node addresses: {error:#}; opening netlink again (the last known addresses stay in force)");
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
        // Device changes need no group of their own: the kernel announces each address that a vanishing device loses.
        let groups = [MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
        let (listener, _, notices) =
            rtnetlink::new_multicast_connection(&groups).context("subscribing to address changes (netlink)")?;
        let (asker, handle, _) = rtnetlink::new_connection().context("opening a netlink socket")?;
        let mut connections = JoinSet::new();
        connections.spawn(listener);
        connections.spawn(asker);
        Ok(Session { notices, handle, _connections: connections })
    }

    /// Sends each change; returns only when a socket broke.
    async fn follow(&mut self, sender: &watch::Sender<Vec<Ipx>>) -> anyhow::Result<std::convert::Infallible> {
        loop {
            let addresses = self.dump().await?;
            sender.send_if_modified(|known| {
                let changed = *known != addresses;
                if changed {
                    debug!(?addresses, "the node's addresses changed");
                    *known = addresses;
                }
                changed
            });
            sleep(DUMP_GAP).await;
            self.notices.next().await.context("the netlink socket for address changes broke")?;
            while self.notices.try_recv().is_ok() {}
        }
    }

    async fn dump(&self) -> anyhow::Result<Vec<Ipx>> {
        let ipvs = self.index_of(IPVS_DEVICE).await?;
        let messages: Vec<AddressMessage> =
            self.handle.address().get().execute().try_collect().await.context("listing addresses (netlink)")?;
        let own = messages.iter().filter(|m| Some(m.header.index) != ipvs).filter_map(own_address);
        let mut addresses: Vec<Ipx> = own.filter(|ip| !ip.to_ip().is_loopback()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        Ok(addresses)
    }

    async fn index_of(&self, device: &str) -> anyhow::Result<Option<u32>> {
        let mut links = self.handle.link().get().match_name(device).execute();
        match links.try_next().await {
            Ok(link) => Ok(link.map(|l| l.header.index)),
            Err(rtnetlink::Error::NetlinkError(e)) if e.raw_code() == -nix::libc::ENODEV => Ok(None),
            Err(error) => Err(error).with_context(|| format!("looking up device {device} (netlink)")),
        }
    }
}

/// IFA_LOCAL where there is one: on point-to-point devices IFA_ADDRESS is the peer's (rtnetlink(7)).
fn own_address(message: &AddressMessage) -> Option<Ipx> {
    let local = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    let address = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Address(ip) => Some(*ip),
        _ => None,
    });
    local.or(address).map(Ipx::from)
}
