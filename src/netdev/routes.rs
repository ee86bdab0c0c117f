//! Notice of anything that may change where packets go: routes, rules, devices, addresses, forwarding.

use std::time::Duration;

use anyhow::Context as _;
use futures::StreamExt as _;
use rtnetlink::MulticastGroup::{
    Ipv4Ifaddr, Ipv4Netconf, Ipv4Route, Ipv4Rule, Ipv6Ifaddr, Ipv6Netconf, Ipv6Route, Ipv6Rule, Link,
};
use tokio::time::sleep;
use tracing::warn;

use super::REOPEN_PAUSE;

/// Two calls are at least this far apart: a router may change thousands of routes in a second.
const GAP: Duration = Duration::from_millis(5);

/// Calls `changed` after every change, one call for what comes at once; a lost notice (ENOBUFS) is one as well. Runs
/// for ever: a broken socket is opened again.
pub async fn follow_routes(mut changed: impl FnMut()) {
    loop {
        if let Err(error) = follow(&mut changed).await {
            warn!("changes of routes: {error:#}; opening netlink again (remembered routes end after a second)");
        }
        sleep(REOPEN_PAUSE).await;
    }
}

/// Returns when the socket broke.
async fn follow(changed: &mut impl FnMut()) -> anyhow::Result<()> {
    // Netconf: the sysctl `forwarding`.
    let groups = [Link, Ipv4Ifaddr, Ipv6Ifaddr, Ipv4Route, Ipv6Route, Ipv4Rule, Ipv6Rule, Ipv4Netconf, Ipv6Netconf];
    let (listener, _, mut notices) =
        rtnetlink::new_multicast_connection(&groups).context("subscribing to changes of routes (netlink)")?;
    let listener = tokio::spawn(listener);
    // What changed before the subscription.
    changed();
    while notices.next().await.is_some() {
        while notices.try_recv().is_ok() {}
        changed();
        sleep(GAP).await;
    }
    listener.abort();
    anyhow::bail!("the netlink socket broke")
}
