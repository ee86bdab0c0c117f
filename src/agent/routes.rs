//! Tells the packet programs when routes change, so that what they remember of them is never older than a notice.

use crate::bpf::RouteEpoch;
use crate::netdev;

/// Runs for ever. A notice that cannot be passed on is told of once; what is remembered ends after a second anyway.
pub async fn follow(epoch: RouteEpoch) -> anyhow::Result<()> {
    let mut told = false;
    netdev::follow_routes(move || match epoch.advance() {
        Ok(()) => told = false,
        Err(error) if !told => {
            tracing::warn!("packets may follow a changed route up to a second late: {error:#}");
            told = true;
        }
        Err(_) => {}
    })
    .await;
    Ok(())
}
