//! Writes the answers to health probes into the kernel, and vouches for them as long as the worker does.
//!
//! The worker says twice a second, and after each sync, that all is known which came (`Worker::run`). That word goes with the
//! health checks that it sends to the servers, from there with what they listen at to here, and into the kernel behind the
//! rows. Who does not get on keeps it back, and the programs leave the probes to the servers.

use std::time::{Duration, Instant};

use tracing::warn;

use crate::bpf::ProbeRows;
use crate::serve::App;

/// The port of `/healthz` may be known later than what the worker knows. Until then, and no longer, a former daemon's answers
/// are left as they are.
const BINDING: Duration = Duration::from_secs(1);

/// Runs for ever; that the kernel does not take the answers is told of when the reason is new.
/// `has_healthz`: `/healthz` is to be served.
pub async fn run(mut rows: ProbeRows, app: App, has_healthz: bool) {
    let began = Instant::now();
    let mut probed = app.health.probed_ports();
    let (mut said, mut told) = (None, None);
    loop {
        let now = probed.borrow_and_update().clone();
        let is_bound = now.healthz.is_some() || !has_healthz || began.elapsed() > BINDING;
        // Until then a former daemon's answers count, for as long as they do.
        if now.vouched_ns > 0 && is_bound {
            let answers = now.answers(&app.health, &mut said);
            let written = answers.map_or(Ok(()), |answers| rows.write(&answers));
            let error = written.and_then(|()| rows.vouch(now.vouched_ns)).err().map(|error| format!("{error:#}"));
            if let Some(error) = &error {
                said = None;
                if told.as_ref() != Some(error) {
                    warn!(
                        "health probes from outside will not be answered while the daemon is away: {error}; trying again"
                    );
                }
            }
            told = error;
        }
        // Its sender lives as long as the health.
        if probed.changed().await.is_err() {
            return;
        }
    }
}
