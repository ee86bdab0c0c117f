//! Now and then, whether the programs are still where they were attached. They are desired state like rows of maps: what
//! somebody takes off is put back, unless he does so again and again.
//!
//! The programs on the cgroup are seen to here; of those on devices the worker is asked, which attaches them.

use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{info, warn};

use super::conditions::{Conditions, Place, Reason};
use super::contest::{Contests, Verdict};
use super::request::Request;
use crate::bpf::{Pins, SocketHooks};

/// Between two looks. One takes some system calls for each program.
const EVERY: Duration = Duration::from_secs(2);

/// What to do about somebody who undoes an attachment again and again.
pub const CONTEST_REMEDY: &str = "another process undoes this again and again, so kubelane leaves it alone for now: \
    find out which (`bpftool link`, `bpftool net`; agents for networking, observability and security) and stop it; \
    kubelane tries again every ten minutes";

/// Runs for ever.
///
/// # Errors
/// When the worker ended.
pub async fn watch(
    hooks: SocketHooks,
    pins: Pins,
    worker: mpsc::Sender<Request>,
    conditions: Conditions,
) -> anyhow::Result<()> {
    let (mut contests, mut told, mut trouble) = (Contests::default(), None, None);
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        // Without their pins programs look as if they were detached.
        if !look_after(&pins, &mut trouble) {
            continue;
        }
        let error = look(&hooks, &mut contests, &conditions, Instant::now().into_std()).err();
        let error = error.map(|error| format!("cannot inspect the programs on the cgroup: {error:#}"));
        if let Some(error) = error.as_ref().filter(|error| told.as_ref() != Some(*error)) {
            warn!("{error}; trying again");
        }
        told = error;
        worker.send(Request::Devices).await.context("the worker ended")?;
    }
}

/// Whether the pins are where they belong. `trouble`: why they were not the last time.
fn look_after(pins: &Pins, trouble: &mut Option<String>) -> bool {
    let error = match pins.look_after() {
        Ok(again) => {
            if again > 0 {
                warn!("another process removed pins, or unmounted their BPF file system: {again} are pinned again");
            }
            if let Some(error) = trouble.take() {
                info!("resolved: {error}");
            }
            return true;
        }
        Err(error) => format!("{error:#}"),
    };
    if trouble.as_ref() != Some(&error) {
        warn!("{error}");
        *trouble = Some(error);
    }
    false
}

fn look(
    hooks: &SocketHooks,
    contests: &mut Contests,
    conditions: &Conditions,
    now: std::time::Instant,
) -> anyhow::Result<()> {
    let missing = hooks.missing()?;
    for name in hooks.names() {
        let subject = format!("cgroup program {name}");
        if !missing.contains(&name) {
            if contests.there(name, now) {
                conditions.over(&subject, Reason::Contested);
            }
            conditions.over(&subject, Reason::NotAttached);
            continue;
        }
        if contests.rests(name, now) {
            continue;
        }
        match contests.gone(name, now) {
            Verdict::PutBack => match hooks.restore(name) {
                Ok(()) => {
                    contests.put_back(name, now);
                    warn!("another process detached {subject} from the cgroup, or removed its pin: attached again");
                    conditions.restored(Place::Cgroup);
                }
                Err(error) => conditions.holds(&subject, Reason::NotAttached, &format!("{error:#}")),
            },
            Verdict::LeaveAlone(_) => {
                let detail = format!("not attached; {CONTEST_REMEDY}");
                conditions.holds(&subject, Reason::Contested, &detail);
            }
        }
    }
    look_after_observer(hooks, contests, now)
}

/// The same for the program that only measures: without it all is served.
fn look_after_observer(hooks: &SocketHooks, contests: &mut Contests, now: std::time::Instant) -> anyhow::Result<()> {
    let Some((name, is_there)) = hooks.observer()? else { return Ok(()) };
    if is_there {
        contests.there(name, now);
    } else if !contests.rests(name, now) {
        match contests.gone(name, now) {
            Verdict::PutBack => {
                hooks.restore(name)?;
                contests.put_back(name, now);
                warn!("another process detached cgroup program {name}, which measures TCP sockets: attached again");
            }
            Verdict::LeaveAlone(true) => warn!("TCP sockets are not measured: cgroup program {name}: {CONTEST_REMEDY}"),
            Verdict::LeaveAlone(false) => {}
        }
    }
    Ok(())
}
