//! Tells the packet programs of the node's routing: when routes change, so that what they remember of them is never older
//! than a notice; whether ports choose routes; and whether the host's stack must see what they would send on themselves.

use crate::bpf::RouteEpoch;
use crate::model::ForwardThrough;
use crate::netdev::{self, RouteChange};

/// Runs for ever. A notice that cannot be passed on is told of once; what is remembered ends after a second anyway.
pub async fn follow(epoch: RouteEpoch) -> anyhow::Result<()> {
    let mut told = false;
    netdev::follow_routes(move |change| {
        let passed_on = match change {
            RouteChange::Routes => epoch.advance(),
            RouteChange::ByAddress(by_address) => epoch.set_by_address(by_address),
        };
        match passed_on {
            Ok(()) => told = false,
            Err(error) if !told => {
                tracing::warn!("packets may follow a changed route up to a second late: {error:#}");
                told = true;
            }
            Err(_) => {}
        }
    })
    .await;
    Ok(())
}

/// Runs for ever: packets go through the host's stack where the operator wants that, and while there are IPsec policies.
pub async fn follow_policies(epoch: RouteEpoch, forward_through: ForwardThrough) -> anyhow::Result<()> {
    let mut known = None;
    netdev::follow_policies(move |has_policies| {
        let through_stack = has_policies || forward_through == ForwardThrough::Stack;
        match epoch.set_through_stack(through_stack) {
            Ok(()) if known.replace(has_policies) == Some(has_policies) => {}
            Ok(()) if has_policies && forward_through == ForwardThrough::Redirect => tracing::info!(
                "there are IPsec policies: packets to and from backends on other nodes go through the host's stack"
            ),
            Ok(()) => {}
            Err(error) => tracing::warn!("IPsec policies may not be followed: {error:#}"),
        }
    })
    .await;
    Ok(())
}
