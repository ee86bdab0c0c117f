//! What has come from the source, counted for the metrics: how much, how much of it waits for a sync, and when the
//! endpoints that changed had been triggered.

use crate::model::{Family, ObjectName, Slice};
use crate::table::HashMap;

/// Changes of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Objects that came or went, whether that changed anything or not.
    pub total: u64,
    /// Of these, the ones that did and are not in the kernel yet.
    pub pending: u64,
}

/// What came since the start, and since the last complete sync.
#[derive(Debug, Default)]
pub struct Arrivals {
    pub services: Tally,
    pub slices: Tally,
    /// Triggers up to this Unix time (nanoseconds) are not measured: what happened before the daemon began to listen
    /// says nothing about it.
    measured_after: i64,
    /// By Service (of the slice's namespace): when its slices that wait had been triggered.
    triggers: HashMap<ObjectName, Vec<(Family, i64)>>,
}

impl Arrivals {
    pub fn measure_after(&mut self, unix_ns: i64) {
        self.measured_after = unix_ns;
    }

    /// A slice changed to `slice`; `before` is what it was.
    pub fn slice_changed(&mut self, owner: &ObjectName, slice: &Slice, before: Option<&Slice>) {
        self.slices.pending += 1;
        let Some(triggered) = slice.triggered.filter(|at| *at > self.measured_after) else { return };
        // A slice has addresses of one family; one without any, before and after, is of no consequence.
        let mut endpoints = slice.endpoints.iter().chain(before.into_iter().flat_map(|slice| &slice.endpoints));
        if let Some(endpoint) = endpoints.next() {
            self.triggers.entry(owner.clone()).or_default().push((endpoint.ip.family(), triggered));
        }
    }

    /// A slice went. Its annotation tells of an earlier change, not of this one (kube-proxy).
    pub fn slice_gone(&mut self, owner: &ObjectName) {
        self.slices.pending += 1;
        self.triggers.remove(owner);
    }

    /// Everything is in the kernel. Returns the triggers that led to it.
    pub fn settle(&mut self) -> Vec<(Family, i64)> {
        self.services.pending = 0;
        self.slices.pending = 0;
        std::mem::take(&mut self.triggers).into_values().flatten().collect()
    }
}
