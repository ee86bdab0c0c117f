//! Pools: the order of backends in a region of `slots`, and the least number of writes from one order to the next.

use std::ops::Range;

use super::tables::Space;
use crate::table::HashSet;

/// A region of `slots` and how much of it is in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pool {
    pub base: u32,
    /// A power of two; 0: no region.
    pub capacity: u32,
    pub count: u32,
}

impl Pool {
    fn region(&self) -> Range<u32> {
        self.base..self.base + self.capacity
    }

    /// The backend ids as wanted.
    pub fn ids(&self, space: &Space) -> Vec<u32> {
        let slots = self.base..self.base + self.count;
        slots.map(|slot| space.tables.slots.desired(slot).unwrap_or(0)).collect()
    }

    /// Makes the pool hold `wanted`, moving as few backends as can be. The region that it leaves, if it does, goes to
    /// `retired`. Returns how many backends found no room.
    ///
    /// Only positions below a count that a frontend has are visible, and whatever is written to these is a backend of
    /// this pool, so that each single write is safe; `sync::apply` keeps slots before counts.
    pub fn hold(&mut self, wanted: &[u32], space: &mut Space, retired: &mut Vec<Range<u32>>) -> usize {
        let mut ids = arrange(self.ids(space), wanted);
        let needed = ids.len() as u32;
        // A pool that has shrunk to a quarter gives its region up; between that and full it stays where it is.
        let roomy = self.capacity >= 8 && needed <= self.capacity / 4;
        if needed == 0 {
            self.retire(space, retired);
        } else if (needed > self.capacity || roomy)
            && let Some((base, capacity)) = allocate(needed, self.capacity, space)
        {
            self.retire(space, retired);
            *self = Pool { base, capacity, count: 0 };
        }
        let missing = needed.saturating_sub(self.capacity);
        ids.truncate(self.capacity as usize);
        for (slot, id) in (self.base..).zip(&ids) {
            space.tables.slots.set(slot, *id);
        }
        for slot in self.base + ids.len() as u32..self.base + self.count {
            space.tables.slots.forget(slot);
        }
        space.filled_slots = space.filled_slots - self.count as usize + ids.len();
        self.count = ids.len() as u32;
        missing as usize
    }

    /// Takes `out` from the pool and `into` in, as [`Pool::hold`] would, without a look at what else is there but for where
    /// `out` is. False: the pool is to be held as a whole, because it needs another region or does not have `out`.
    pub fn exchange(&mut self, out: &[u32], into: &[u32], space: &mut Space) -> bool {
        // No frontend uses it.
        if self.capacity == 0 || out.is_empty() && into.is_empty() {
            return true;
        }
        let Some(needed) = (self.count as usize + into.len()).checked_sub(out.len()).map(|n| n as u32) else {
            return false;
        };
        let holes = space.tables.slots.find(self.base..self.base + self.count, out);
        let is_roomy = self.capacity >= 8 && needed <= self.capacity / 4;
        if needed == 0 || needed > self.capacity || is_roomy || holes.len() != out.len() {
            return false;
        }
        let filled = holes.len().min(into.len());
        for (slot, id) in holes.iter().zip(into) {
            space.tables.slots.set(*slot, *id);
        }
        let mut end = self.base + self.count;
        for id in &into[filled..] {
            space.tables.slots.set(end, *id);
            end += 1;
        }
        // From the last hole back, so that what is moved in is never a hole itself.
        for hole in holes[filled..].iter().rev() {
            end -= 1;
            if let Some(last) = space.tables.slots.desired(end).filter(|_| *hole != end) {
                space.tables.slots.set(*hole, last);
            }
            space.tables.slots.forget(end);
        }
        space.filled_slots = space.filled_slots - self.count as usize + needed as usize;
        self.count = needed;
        true
    }

    /// Leaves the region; its slots are of no more interest.
    pub fn retire(&mut self, space: &mut Space, retired: &mut Vec<Range<u32>>) {
        for slot in self.base..self.base + self.count {
            space.tables.slots.forget(slot);
        }
        if self.capacity > 0 {
            retired.push(self.region());
        }
        space.filled_slots -= self.count as usize;
        *self = Pool::default();
    }
}

/// A region for `needed` backends: of the next power of two, or of the biggest that is to be had and is bigger than
/// what the pool has.
fn allocate(needed: u32, current: u32, space: &mut Space) -> Option<(u32, u32)> {
    let mut capacity = needed.next_power_of_two();
    loop {
        if let Some(base) = space.regions.allocate(capacity) {
            return Some((base, capacity));
        }
        capacity /= 2;
        if capacity <= current || capacity == 0 {
            return None;
        }
    }
}

/// The new order: holes are filled with what came, then from the end; what is left over is appended.
/// Ids of `current` that are not wanted, or there twice, are holes.
fn arrange(current: Vec<u32>, wanted: &[u32]) -> Vec<u32> {
    if current.is_empty() || current == wanted {
        return wanted.to_vec();
    }
    let mut open: HashSet<u32> = wanted.iter().copied().collect();
    let keep: Vec<bool> = current.iter().map(|id| open.remove(id)).collect();
    let mut coming = wanted.iter().copied().filter(|id| open.contains(id));
    let mut ids = current;
    let mut holes = Vec::new();
    for (at, kept) in keep.iter().enumerate() {
        if !kept {
            match coming.next() {
                Some(id) => ids[at] = id,
                None => holes.push(at),
            }
        }
    }
    ids.extend(coming);
    // From the last hole back, so that what is moved in is never a hole itself.
    for hole in holes.into_iter().rev() {
        ids.swap_remove(hole);
    }
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backends_move_as_little_as_can_be() {
        type Row = (&'static str, &'static [u32], &'static [u32], &'static [u32]);
        #[rustfmt::skip]
        let table: &[Row] = &[
            ("a new one is appended", &[1, 2], &[1, 2, 3], &[1, 2, 3]),
            ("the last one moves into the hole", &[1, 2, 3], &[2, 3], &[3, 2]),
            ("the last one just goes", &[1, 2, 3], &[1, 2], &[1, 2]),
            ("a replacement takes the hole", &[1, 2, 3], &[1, 3, 9], &[1, 9, 3]),
            ("the order wanted does not matter", &[3, 1, 2], &[1, 2, 3], &[3, 1, 2]),
            ("two holes at the end and before", &[1, 2, 3, 4], &[2, 3], &[3, 2]),
            ("a duplicate is a hole", &[1, 1, 2], &[1, 2], &[1, 2]),
            ("rubbish is replaced", &[0, 77], &[1, 2], &[1, 2]),
            ("all go", &[1, 2], &[], &[]),
        ];
        for (sentence, current, wanted, result) in table {
            assert_eq!(arrange(current.to_vec(), wanted), *result, "{sentence}");
        }
    }

    #[test]
    fn a_pool_moves_when_it_outgrows_its_region_or_shrinks_to_a_quarter_of_it() {
        let mut space = Space::default();
        space.regions.set_size(64);
        let (mut pool, mut retired) = (Pool::default(), Vec::new());
        let mut capacities = Vec::new();
        for n in [1, 2, 3, 5, 8, 5, 3, 2, 1, 0] {
            let wanted: Vec<u32> = (1..=n).collect();
            assert_eq!(pool.hold(&wanted, &mut space, &mut retired), 0);
            assert_eq!(pool.ids(&space), wanted);
            capacities.push(pool.capacity);
        }
        assert_eq!(capacities, [1, 2, 4, 8, 8, 8, 8, 2, 2, 0]);
        assert_eq!(retired.len(), 5);
    }

    #[test]
    fn a_pool_without_room_takes_what_fits_and_keeps_what_it_has() {
        let mut space = Space::default();
        space.regions.set_size(6);
        let (mut pool, mut retired) = (Pool::default(), Vec::new());
        assert_eq!(pool.hold(&[1, 2], &mut space, &mut retired), 0);
        assert_eq!(pool.hold(&[1, 2, 3, 4, 5], &mut space, &mut retired), 1);
        assert_eq!(pool.ids(&space), [1, 2, 3, 4]);
        assert_eq!(pool.hold(&[1, 2, 3, 4, 5], &mut space, &mut retired), 1);
        assert_eq!(pool.hold(&[2, 3, 4, 5], &mut space, &mut retired), 0);
        assert_eq!(pool.ids(&space), [5, 2, 3, 4]);
    }
}
