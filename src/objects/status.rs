//! How a source is doing, for metrics and health: plain numbers that any task may read at any time.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// One state per watched kind. The directory source keeps all three alike.
#[derive(Debug, Default)]
pub struct SourceStatus {
    pub services: Arc<WatchState>,
    pub slices: Arc<WatchState>,
    pub node: Arc<WatchState>,
}

impl SourceStatus {
    /// The three states with their label in metrics.
    pub fn all(&self) -> [(&'static str, &WatchState); 3] {
        [("services", &self.services), ("endpointslices", &self.slices), ("nodes", &self.node)]
    }
}

/// The state of one watch.
#[derive(Debug, Default)]
pub struct WatchState {
    connected: AtomicBool,
    listed: AtomicBool,
    last_event: AtomicI64,
    events: AtomicU64,
    errors: AtomicU64,
    lists: AtomicU64,
    last_error: Mutex<Option<String>>,
}

impl WatchState {
    /// The source is in reach: the last thing heard of it was not an error.
    pub fn connected(&self) -> bool {
        self.connected.load(Relaxed)
    }

    /// A list has been completed at least once.
    pub fn listed(&self) -> bool {
        self.listed.load(Relaxed)
    }

    /// Unix time of the last event or list, in seconds; 0 before the first.
    pub fn last_event(&self) -> i64 {
        self.last_event.load(Relaxed)
    }

    /// Objects received since the start.
    pub fn events(&self) -> u64 {
        self.events.load(Relaxed)
    }

    /// Failures since the start.
    pub fn errors(&self) -> u64 {
        self.errors.load(Relaxed)
    }

    /// Lists completed since the start; all but the first are relists.
    pub fn lists(&self) -> u64 {
        self.lists.load(Relaxed)
    }

    /// The error that holds now; `None` when connected.
    pub fn last_error(&self) -> Option<String> {
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Something was heard. Returns the error that this ends.
    pub(crate) fn heard(&self) -> Option<String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        self.last_event.store(i64::try_from(now).unwrap_or(i64::MAX), Relaxed);
        if self.connected.swap(true, Relaxed) {
            return None;
        }
        self.last_error.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(crate) fn object(&self) {
        self.events.fetch_add(1, Relaxed);
    }

    pub(crate) fn list_done(&self) {
        self.lists.fetch_add(1, Relaxed);
        self.listed.store(true, Relaxed);
    }

    /// Something failed. True when this is another error than the one that held before: the time to log it.
    pub(crate) fn failed(&self, error: &str) -> bool {
        self.errors.fetch_add(1, Relaxed);
        self.connected.store(false, Relaxed);
        let mut last = self.last_error.lock().unwrap_or_else(PoisonError::into_inner);
        let new = last.as_deref() != Some(error);
        if new {
            *last = Some(error.to_owned());
        }
        new
    }
}
