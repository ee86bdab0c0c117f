//! SIGINT and SIGTERM end a program that makes laboratories, but not before its traces are removed.

use anyhow::Context as _;
use nix::sys::signal::{SigSet, Signal};

use super::sweep;

/// From now on a signal calls `first`, removes this process's laboratories and ends it; a second one ends it at once.
/// To be called before there is a second thread.
pub fn clean_up(first: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block().context("blocking signals")?;
    std::thread::spawn(move || {
        if let Ok(signal) = signals.wait() {
            eprintln!("{signal}: cleaning up; another one ends this at once");
            let _ = signals.thread_unblock();
            first();
            sweep::remove_own();
            std::process::exit(128 + signal as i32);
        }
    });
    Ok(())
}
