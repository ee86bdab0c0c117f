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
    /// How many these are.
    kept: usize,
}

/// Triggers that are kept while a sync fails; later ones are not measured.
const MOST: usize = 16_384;

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
        if let Some(endpoint) = endpoints.next().filter(|_| self.kept < MOST) {
            self.kept += 1;
            self.triggers.entry(owner.clone()).or_default().push((endpoint.ip.family(), triggered));
        }
    }

    /// A slice went. Its annotation tells of an earlier change, not of this one (kube-proxy).
    pub fn slice_gone(&mut self, owner: &ObjectName) {
        self.slices.pending += 1;
        self.kept -= self.triggers.remove(owner).map_or(0, |triggers| triggers.len());
    }

    /// Everything is in the kernel. Returns the triggers that led to it.
    pub fn settle(&mut self) -> Vec<(Family, i64)> {
        self.services.pending = 0;
        self.slices.pending = 0;
        self.kept = 0;
        std::mem::take(&mut self.triggers).into_values().flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Endpoint;

    #[test]
    fn what_waits_while_a_sync_fails_has_a_bound_and_is_measured_anew_afterwards() {
        let (ip, ready, serving, terminating) = ("10.1.0.1".parse().unwrap(), true, true, false);
        let endpoints = vec![Endpoint { ip, ready, serving, terminating, node: None, hints: None }];
        let name = ObjectName::new("shop", "web-1");
        let slice =
            Slice { name, service: "web".into(), is_controlled: false, ports: vec![], endpoints, triggered: Some(7) };
        let owners = ["web", "api"].map(|name| ObjectName::new("shop", name));
        let mut arrivals = Arrivals::default();
        let flood = |arrivals: &mut Arrivals| {
            (0..2 * MOST).for_each(|n| arrivals.slice_changed(&owners[n % 2], &slice, None));
        };
        flood(&mut arrivals);
        arrivals.slice_gone(&owners[0]);
        assert_eq!(arrivals.triggers.values().map(Vec::len).sum::<usize>(), MOST / 2);
        flood(&mut arrivals);
        assert_eq!(arrivals.settle().len(), MOST);
        arrivals.slice_changed(&owners[0], &slice, None);
        assert_eq!(arrivals.settle(), [(Family::Ipv4, 7)]);
    }
}
