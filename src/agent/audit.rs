//! Now and then, whether the maps are still what the daemon wrote. Reading and comparing goes on beside the worker, map
//! after map; the worker is asked for a copy of what it wrote, and to look again at what differs.

use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use tokio::sync::{mpsc, oneshot};

use super::request::Request;
use crate::bpf;
use crate::serve::{App, Stage};
use crate::sync::{MapIo, MapName};

/// Between two audits. Each reads every row of every map.
const EVERY: Duration = Duration::from_secs(600);

/// Runs for ever; an audit that fails is told of when its reason is new. `open`: handles of its own, on the maps that are
/// in use today.
///
/// # Errors
/// When the worker or an audit breaks off.
pub async fn run<M: MapIo + Send + 'static>(
    open: impl Fn() -> anyhow::Result<M>,
    worker: mpsc::Sender<Request>,
    app: App,
) -> anyhow::Result<()> {
    MapName::ALL.iter().for_each(|map| app.metrics.drifted(map.as_str(), 0));
    let mut stage = app.health.stage();
    stage.wait_for(|stage| *stage == Stage::Ready).await.context("the daemon's health is no longer watched")?;
    let mut told = None;
    loop {
        tokio::time::sleep(EVERY).await;
        let (mut complete, mut error) = (true, None);
        let mut maps = open()?;
        for map in MapName::ALL {
            let (reply, snapshot) = oneshot::channel();
            worker.send(Request::Snapshot(map, reply)).await.context("the worker ended")?;
            let Some(snapshot) = snapshot.await.context("the worker ended")? else {
                complete = false;
                continue;
            };
            let compared = tokio::task::spawn_blocking(move || {
                let different = snapshot.compare(&mut maps);
                bpf::memory::release();
                (maps, different)
            });
            let different;
            (maps, different) = compared.await.context("an audit failed")?;
            match different {
                Ok(keys) if keys.is_empty() => {}
                Ok(keys) => worker.send(Request::Correct(map, keys)).await.context("the worker ended")?,
                Err(reason) => error = Some(format!("cannot audit the map {}: {reason}", map.as_str())),
            }
        }
        if let Some(error) = error.as_ref().filter(|error| told.as_ref() != Some(*error)) {
            tracing::warn!("{error}; trying again");
        }
        if complete && error.is_none() {
            app.metrics.audited(SystemTime::now());
        }
        told = error;
    }
}
