//! Space in `slots`: aligned regions whose sizes are powers of two, from a buddy allocator. A pool grows by moving to a
//! bigger region; the old one rests before it is used again (see `ids`).

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::time::Instant;

use super::ids::REST;

const ORDERS: usize = 32;

/// The free space, by size class.
#[derive(Debug)]
pub struct Regions {
    size: u32,
    free: [BTreeSet<u32>; ORDERS],
    resting: VecDeque<(Instant, Range<u32>)>,
    /// Found unused at adoption, but perhaps still in a running program's hands.
    quarantine: Vec<Range<u32>>,
}

impl Default for Regions {
    fn default() -> Self {
        Regions {
            size: 0,
            free: std::array::from_fn(|_| BTreeSet::new()),
            resting: VecDeque::new(),
            quarantine: Vec::new(),
        }
    }
}

impl Regions {
    /// The space is `0..size`; it never shrinks.
    pub fn set_size(&mut self, size: u32) {
        if size > self.size {
            let old = std::mem::replace(&mut self.size, size);
            self.give_back(old..size);
        }
    }

    pub fn size(&self) -> u32 {
        self.size
    }

    /// The base of a free region of `capacity` slots, a power of two, aligned to it.
    pub fn allocate(&mut self, capacity: u32) -> Option<u32> {
        let order = capacity.trailing_zeros() as usize;
        let mut from = (order..ORDERS).find(|o| !self.free[*o].is_empty())?;
        let base = self.free[from].pop_first()?;
        while from > order {
            from -= 1;
            self.free[from].insert(base + (1 << from));
        }
        Some(base)
    }

    /// Gives a range up; it can be had again after [`REST`]. `now` never goes back.
    pub fn rest(&mut self, range: Range<u32>, now: Instant) {
        self.resting.push_back((now, range));
    }

    /// Takes rested ranges back. True when there were any.
    pub fn release(&mut self, now: Instant) -> bool {
        let mut any = false;
        while self.resting.front().is_some_and(|(since, _)| now.duration_since(*since) >= REST) {
            let Some((_, range)) = self.resting.pop_front() else { break };
            self.give_back(range);
            any = true;
        }
        any
    }

    /// When the next range will have rested.
    pub fn next_due(&self) -> Option<Instant> {
        self.resting.front().map(|(since, _)| *since + REST)
    }

    /// Starts from what is found in the kernel: `used` regions, sorted and without overlap. Whatever else lies below
    /// `highest` waits for [`Self::end_quarantine`].
    pub fn adopt(&mut self, used: &[Range<u32>], highest: u32) {
        let size = self.size;
        *self = Regions { size, ..Regions::default() };
        let mut at = 0;
        for range in used {
            self.quarantine.push(at..range.start);
            at = range.end;
        }
        self.quarantine.push(at..highest.clamp(at, size.max(at)));
        self.quarantine.retain(|range| !range.is_empty());
        self.give_back(highest.max(at)..size);
    }

    /// Nothing in the kernel leads to unused slots any more: they start their rest.
    pub fn end_quarantine(&mut self, now: Instant) {
        for range in std::mem::take(&mut self.quarantine) {
            self.rest(range, now);
        }
    }

    /// Cuts a range into aligned blocks and joins each with its free neighbours.
    fn give_back(&mut self, range: Range<u32>) {
        let mut at = range.start;
        while at < range.end {
            let aligned = at.trailing_zeros().min(31);
            let fitting = (range.end - at).ilog2();
            let order = aligned.min(fitting);
            self.join(at, order as usize);
            at += 1 << order;
        }
    }

    fn join(&mut self, mut base: u32, mut order: usize) {
        while order + 1 < ORDERS && self.free[order].remove(&(base ^ (1 << order))) {
            base &= !(1 << order);
            order += 1;
        }
        self.free[order].insert(base);
    }

    #[cfg(test)]
    fn free_slots(&self) -> u64 {
        self.free.iter().enumerate().map(|(order, set)| (set.len() as u64) << order).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_size_that_is_no_power_of_two_is_used_to_the_last_slot() {
        let mut regions = Regions::default();
        regions.set_size(13);
        let bases: Vec<_> = std::iter::from_fn(|| regions.allocate(1)).collect();
        assert_eq!(bases.len(), 13);
    }

    #[test]
    fn a_region_given_up_rests_before_it_is_given_out_again() {
        let start = Instant::now();
        let mut regions = Regions::default();
        regions.set_size(4);
        let base = regions.allocate(4).unwrap();
        regions.rest(base..base + 4, start);
        assert!(!regions.release(start + REST / 2));
        assert_eq!((regions.allocate(1), regions.next_due()), (None, Some(start + REST)));
        assert!(regions.release(start + REST));
        assert_eq!(regions.allocate(4), Some(0));
    }

    #[test]
    fn adopted_regions_are_in_use_and_what_lies_between_them_is_quarantined() {
        let start = Instant::now();
        let mut regions = Regions::default();
        regions.set_size(32);
        regions.adopt(&[4..8, 16..18], 20);
        assert_eq!(regions.free_slots(), 12);
        regions.end_quarantine(start);
        regions.release(start + REST);
        assert_eq!(regions.free_slots(), 26);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn regions_are_aligned_never_overlap_and_all_come_back(
            size in 1u32..200,
            steps in prop::collection::vec((any::<bool>(), 0u32..6), 1..80),
        ) {
            let mut now = Instant::now();
            let mut regions = Regions::default();
            regions.set_size(size);
            let mut held: Vec<Range<u32>> = Vec::new();
            for (take, order) in steps {
                if take {
                    if let Some(base) = regions.allocate(1 << order) {
                        let new = base..base + (1 << order);
                        prop_assert!(base % (1 << order) == 0 && new.end <= size);
                        prop_assert!(held.iter().all(|r| r.end <= new.start || new.end <= r.start));
                        held.push(new);
                    }
                } else if !held.is_empty() {
                    regions.rest(held.swap_remove(order as usize % held.len()), now);
                    now += REST;
                    regions.release(now);
                }
            }
            for range in held.drain(..) {
                regions.rest(range, now);
            }
            regions.release(now + REST);
            prop_assert_eq!(regions.free_slots(), u64::from(size));
            prop_assert_eq!(regions.free.iter().map(BTreeSet::len).sum::<usize>() as u32, size.count_ones());
        }
    }
}
