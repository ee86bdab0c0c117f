//! Numbers with a rest: an id that was given up is not given out again before every BPF program that may have read it
//! has long ended.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

/// How long an id or a region rests. A BPF program runs for microseconds; a second leaves room for a stalled vCPU.
pub const REST: Duration = Duration::from_secs(1);

/// Ids from 1 up. 0 is never given out: in an array map it could not be told from an empty row.
#[derive(Debug, Default)]
pub struct IdPool {
    /// The largest id.
    last: u32,
    /// Every id above it was never used.
    highest_used: u32,
    free: BinaryHeap<Reverse<u32>>,
    resting: VecDeque<(Instant, u32)>,
    /// Found unused at adoption, but perhaps still in a running program's hands.
    quarantine: Vec<u32>,
}

impl IdPool {
    /// Ids run from 1 to `last`; it never shrinks.
    pub fn set_last(&mut self, last: u32) {
        self.last = self.last.max(last);
    }

    /// Could be one of this pool's ids.
    pub fn contains(&self, id: u32) -> bool {
        (1..=self.last).contains(&id)
    }

    /// The lowest id that is free, `None` when all are in use or resting.
    pub fn allocate(&mut self) -> Option<u32> {
        if let Some(Reverse(id)) = self.free.pop() {
            return Some(id);
        }
        (self.highest_used < self.last).then(|| {
            self.highest_used += 1;
            self.highest_used
        })
    }

    /// Gives an id up; it can be had again after [`REST`]. `now` never goes back.
    pub fn rest(&mut self, id: u32, now: Instant) {
        self.resting.push_back((now, id));
    }

    /// Takes rested ids back. True when there were any.
    pub fn release(&mut self, now: Instant) -> bool {
        let mut any = false;
        while self.resting.front().is_some_and(|(since, _)| now.duration_since(*since) >= REST) {
            let Some((_, id)) = self.resting.pop_front() else { break };
            self.free.push(Reverse(id));
            any = true;
        }
        any
    }

    /// When the next id will have rested.
    pub fn next_due(&self) -> Option<Instant> {
        self.resting.front().map(|(since, _)| *since + REST)
    }

    /// Starts from what is found in the kernel: `used` is asked for every id up to `highest`; the others wait for
    /// [`Self::end_quarantine`].
    pub fn adopt(&mut self, highest: u32, used: impl Fn(u32) -> bool) {
        self.highest_used = highest.min(self.last);
        self.quarantine = (1..=self.highest_used).filter(|id| !used(*id)).collect();
    }

    /// Nothing in the kernel leads to unused ids any more: they start their rest.
    pub fn end_quarantine(&mut self, now: Instant) {
        for id in std::mem::take(&mut self.quarantine) {
            self.rest(id, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_given_up_is_not_given_out_before_it_has_rested() {
        let start = Instant::now();
        let mut ids = IdPool::default();
        ids.set_last(2);
        assert_eq!((ids.allocate(), ids.allocate(), ids.allocate()), (Some(1), Some(2), None));
        ids.rest(1, start);
        assert!(!ids.release(start + REST / 2));
        assert_eq!((ids.allocate(), ids.next_due()), (None, Some(start + REST)));
        assert!(ids.release(start + REST));
        assert_eq!(ids.allocate(), Some(1));
    }

    #[test]
    fn adopted_gaps_stay_out_of_use_until_the_quarantine_has_ended_and_they_have_rested() {
        let start = Instant::now();
        let mut ids = IdPool::default();
        ids.set_last(9);
        ids.adopt(3, |id| id != 2);
        assert_eq!(ids.allocate(), Some(4));
        assert!(!ids.release(start + REST * 9));
        ids.end_quarantine(start);
        assert!(ids.release(start + REST));
        assert_eq!(ids.allocate(), Some(2));
    }
}
