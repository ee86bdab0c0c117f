//! The addresses and devices of the daemon's own network namespace, live, over rtnetlink.
//!
//! There is hardly any incremental state to get wrong: a notice of any kind, a lost one (ENOBUFS) included, leads to a new
//! dump; only default routes are remembered while none of them changes.
//! Notices come on a socket of their own, subscribed before the first dump, so that no change falls between the two.

mod dump;
mod globs;
mod notices;
mod outward;
mod pods;
mod policies;
mod routes;
mod selection;
#[cfg(test)]
mod tests;
mod way;

use std::time::{Duration, Instant};

use anyhow::Context as _;
use rtnetlink::Handle;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tracing::{debug, warn};

pub use outward::{DeviceSelection, Layer, NetDevice, Unserved};
pub use pods::{PodDevices, PodEnd};
pub use policies::follow_policies;
pub use routes::{RouteChange, follow_routes};
pub use selection::NodePortAddresses;
pub use way::{Way, way};

use crate::model::Ipx;
use notices::{Changes, Notices};

/// What kube-proxy's IPVS mode leaves behind: a device that holds every cluster IP. Those are not the node's.
pub const IPVS_DEVICE: &str = "kube-ipvs0";

/// After a dump the next one waits for this many times as long as it took: a pod's start makes a burst of notices, and
/// dumps are to use a fifth of a processor at most. So a new pod's device is known after some milliseconds.
const DUMP_REST: u32 = 4;
const DUMP_REST_MOST: Duration = Duration::from_millis(500);
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

impl Network {
    fn device(&self, index: u32) -> Option<&NetDevice> {
        let at = self.devices.binary_search_by_key(&index, |device| device.index).ok()?;
        self.devices.get(at)
    }
}

/// Reads all once and follows it from then on, in a task that ends with the last receiver. A value is sent only when it
/// differs.
///
/// # Errors
/// When the kernel refuses the first subscription or dump.
pub async fn watch() -> anyhow::Result<watch::Receiver<Network>> {
    let mut session = Session::open()?;
    let (sender, receiver) = watch::channel(session.read(Changes::ALL).await?);
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

/// Two netlink sockets: one that only listens, one that only asks.
struct Session {
    notices: Notices,
    handle: Handle,
    /// Devices that a default route leads to.
    defaults: Vec<u32>,
    /// Drives the socket that asks; dropping it closes it.
    _connection: JoinSet<()>,
}

impl Session {
    fn open() -> anyhow::Result<Self> {
        let notices = Notices::open().context("subscribing to changes of addresses, devices and routes (netlink)")?;
        let (asker, handle, _) = rtnetlink::new_connection().context("opening a netlink socket")?;
        let mut connection = JoinSet::new();
        connection.spawn(asker);
        Ok(Session { notices, handle, defaults: Vec::new(), _connection: connection })
    }

    /// Reads what may have changed. A node may have tens of thousands of routes, and a pod that starts changes none of
    /// the default ones: they are read again only when one of them has changed, or has gone with its device, of which
    /// there is no notice.
    async fn read(&mut self, changes: Changes) -> anyhow::Result<Network> {
        let mut network = dump::network(&self.handle).await?;
        let is_up = |index: &u32| network.device(*index).is_some_and(|device| device.is_up);
        if changes.default_routes || !self.defaults.iter().all(is_up) {
            self.defaults = dump::default_routes(&self.handle).await?;
        }
        for device in &mut network.devices {
            device.has_default_route = self.defaults.contains(&device.index);
        }
        Ok(network)
    }

    /// Sends each change; returns only when a socket broke.
    async fn follow(&mut self, sender: &watch::Sender<Network>) -> anyhow::Result<std::convert::Infallible> {
        let mut changes = Changes::ALL;
        loop {
            let began = Instant::now();
            let network = self.read(changes).await?;
            let rest = began.elapsed() * DUMP_REST;
            sender.send_if_modified(|known| {
                let changed = *known != network;
                if changed {
                    debug!(?network, "the node's addresses or devices changed");
                    *known = network;
                }
                changed
            });
            sleep(rest.min(DUMP_REST_MOST)).await;
            // Of routes only default ones matter; a router may change thousands of others in a second.
            changes = loop {
                let changes = self.notices.next().await.context("the netlink socket for changes broke")?;
                if changes.devices || changes.default_routes {
                    break changes;
                }
            };
        }
    }
}
