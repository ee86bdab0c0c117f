//! SIGINT and SIGTERM end the bench, but not before its traces are removed: objects on an API server, and laboratories.

use anyhow::Context as _;
use nix::sys::signal::{SigSet, Signal};

use crate::api_client::connection;
use crate::support::lab;

/// Called before there is a second thread.
pub fn clean_up() -> anyhow::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block().context("blocking signals")?;
    std::thread::spawn(move || {
        if let Ok(signal) = signals.wait() {
            eprintln!("{signal}: cleaning up; another one ends this at once");
            let _ = signals.thread_unblock();
            // Objects first: the bench itself ends when its laboratories go.
            connection::remove_own();
            lab::remove_own();
            std::process::exit(128 + signal as i32);
        }
    });
    Ok(())
}
