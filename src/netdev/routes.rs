//! Notice of anything that may change where packets go: routes, rules, devices, addresses, forwarding.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::Context as _;
use futures::TryStreamExt as _;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteMetric};
use rtnetlink::packet_route::rule::RuleAttribute;
use rtnetlink::{Handle, IpVersion, RouteMessageBuilder};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};
use tracing::warn;

use super::REOPEN_PAUSE;
use super::notices::Notices;

/// Two calls are at least this far apart: a router may change thousands of routes in a second.
const GAP: Duration = Duration::from_millis(5);

/// Routes are listed for their MTUs as often as this at most.
const LIST_GAP: Duration = Duration::from_secs(1);

/// How often it is looked whether ports choose routes, besides after changes of rules: sysctls give no notice.
const LOOK: Duration = Duration::from_secs(30);

/// What has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteChange {
    /// Routes, rules, devices, addresses or forwarding.
    Routes,
    /// Whether routes are chosen by addresses alone: no rule names ports, protocols or a type of service, and no path is
    /// chosen by ports (the sysctls `fib_multipath_hash_policy`).
    ByAddress(bool),
    /// The smallest MTU that an IPv4 route has without a lock; `None`: none has one. `bpf_fib_lookup` tells programs of
    /// locked ones only, while the host's stack keeps to all when it forwards (ip_dst_mtu_maybe_forward).
    LeastMtu(Option<u32>),
}

/// Calls `changed` after every change, one call for what comes at once; a lost notice (ENOBUFS) is one as well. Runs
/// for ever: a broken socket is opened again.
pub async fn follow_routes(mut changed: impl FnMut(RouteChange)) {
    loop {
        if let Err(error) = follow(&mut changed).await {
            warn!("changes of routes: {error:#}; opening netlink again (remembered routes end after a second)");
        }
        sleep(REOPEN_PAUSE).await;
    }
}

/// Returns when the socket broke.
async fn follow(changed: &mut impl FnMut(RouteChange)) -> anyhow::Result<()> {
    let mut notices = Notices::open().context("subscribing to changes of routes (netlink)")?;
    let (asker, handle, _) = rtnetlink::new_connection().context("opening a netlink socket")?;
    let mut connection = JoinSet::new();
    connection.spawn(asker);
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut lists = interval(LIST_GAP);
    lists.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut least, mut is_listed) = (None, false);
    // What changed before the subscription.
    changed(RouteChange::Routes);
    loop {
        tokio::select! {
            changes = notices.next() => {
                // A new rule may name ports: until that is known, they count.
                let changes = changes.context("the netlink socket broke")?;
                is_listed &= !changes.metrics;
                if changes.rules {
                    changed(RouteChange::ByAddress(false));
                    looks.reset_immediately();
                }
                changed(RouteChange::Routes);
                sleep(GAP).await;
            }
            _ = lists.tick(), if !is_listed => {
                is_listed = true;
                least = least_mtu(&handle).await?;
                changed(RouteChange::LeastMtu(least));
            }
            _ = looks.tick() => {
                // Routes that go with their device are not told of.
                is_listed &= least.is_none();
                changed(RouteChange::ByAddress(routes_are_chosen_by_address(&handle).await?));
            }
        }
    }
}

async fn least_mtu(handle: &Handle) -> anyhow::Result<Option<u32>> {
    let mut routes = handle.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build()).execute();
    let mut least: Option<u32> = None;
    while let Some(route) = routes.try_next().await.context("listing routes (netlink)")? {
        if let Some(mtu) = plain_mtu(&route) {
            least = Some(least.map_or(mtu, |known| known.min(mtu)));
        }
    }
    Ok(least)
}

/// The MTU of a route, if it has one that path MTU discovery may change.
fn plain_mtu(route: &RouteMessage) -> Option<u32> {
    /// linux/rtnetlink.h: RTAX_MTU, of whose number RTAX_LOCK has a bit.
    const MTU: u32 = 2;
    let metrics = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Metrics(metrics) => Some(metrics),
        _ => None,
    })?;
    let is_locked = metrics.iter().any(|metric| matches!(metric, RouteMetric::Lock(locks) if locks & (1 << MTU) != 0));
    let mtu = metrics.iter().find_map(|metric| if let RouteMetric::Mtu(mtu) = metric { Some(*mtu) } else { None });
    mtu.filter(|mtu| !is_locked && *mtu > 0)
}

async fn routes_are_chosen_by_address(handle: &Handle) -> anyhow::Result<bool> {
    for family in ["ipv4", "ipv6"] {
        // Absent before 4.12 and 4.17, where layer 4 is never asked, and without the family.
        let policy = std::fs::read_to_string(format!("/proc/sys/net/{family}/fib_multipath_hash_policy"));
        if policy.is_ok_and(|policy| policy.trim() != "0") {
            return Ok(false);
        }
    }
    for version in [IpVersion::V4, IpVersion::V6] {
        let mut rules = handle.rule().get(version).execute();
        while let Some(rule) = rules.try_next().await.context("listing rules (netlink)")? {
            let names_ports = rule.attributes.iter().any(|attribute| {
                use RuleAttribute::{DestinationPortRange, IpProtocol, SourcePortRange};
                matches!(attribute, SourcePortRange(_) | DestinationPortRange(_) | IpProtocol(_))
            });
            if names_ports || rule.header.tos != 0 {
                return Ok(false);
            }
        }
    }
    Ok(true)
}
