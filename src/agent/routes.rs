//! Tells the packet programs of the node's routing: when routes change, so that what they remember of them is never older
//! than a notice; whether ports choose routes; and which packets the host's stack must see that they would send on
//! themselves: all while there are IPsec policies, or where the operator wants that, and those that are larger than some
//! IPv4 route allows.

use std::sync::{Arc, Mutex, PoisonError};

use crate::bpf::{RouteEpoch, ThroughStack};
use crate::model::ForwardThrough;
use crate::netdev::{self, RouteChange};

/// Why packets go through the stack.
pub struct Reasons {
    epoch: RouteEpoch,
    known: Mutex<Known>,
}

struct Known {
    wanted: bool,
    has_policies: bool,
    least_mtu: Option<u32>,
}

impl Reasons {
    /// What the operator wants is in force before there are programs on a device.
    ///
    /// # Errors
    /// When the kernel does not take it.
    pub fn new(epoch: RouteEpoch, forward_through: ForwardThrough) -> anyhow::Result<Arc<Self>> {
        let wanted = forward_through == ForwardThrough::Stack;
        if wanted {
            epoch.set_through_stack(ThroughStack::All)?;
        }
        Ok(Arc::new(Reasons { epoch, known: Mutex::new(Known { wanted, has_policies: false, least_mtu: None }) }))
    }

    fn change(&self, change: impl FnOnce(&mut Known)) -> anyhow::Result<()> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut known);
        let which = match (known.wanted || known.has_policies, known.least_mtu) {
            (true, _) => ThroughStack::All,
            (false, Some(mtu)) => ThroughStack::Above(mtu),
            (false, None) => ThroughStack::None,
        };
        self.epoch.set_through_stack(which)
    }
}

/// Runs for ever. A notice that cannot be passed on is told of once; what is remembered ends after a second anyway.
pub async fn follow(epoch: RouteEpoch, reasons: Arc<Reasons>) -> anyhow::Result<()> {
    let mut told = false;
    netdev::follow_routes(move |change| {
        let passed_on = match change {
            RouteChange::Routes => epoch.advance(),
            RouteChange::ByAddress(by_address) => epoch.set_by_address(by_address),
            RouteChange::LeastMtu(mtu) => reasons.change(|known| known.least_mtu = mtu),
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

/// Runs for ever: packets go through the host's stack while there are IPsec policies.
pub async fn follow_policies(reasons: Arc<Reasons>) -> anyhow::Result<()> {
    let mut known = None;
    netdev::follow_policies(move |has_policies| {
        let mut wanted = false;
        let changed = reasons.change(|all| {
            all.has_policies = has_policies;
            wanted = all.wanted;
        });
        match changed {
            Ok(()) if known.replace(has_policies) == Some(has_policies) => {}
            Ok(()) if has_policies && !wanted => tracing::info!(
                "there are IPsec policies: packets to and from backends on other nodes go through the host's stack"
            ),
            Ok(()) => {}
            Err(error) => tracing::warn!("IPsec policies may not be followed: {error:#}"),
        }
    })
    .await;
    Ok(())
}
