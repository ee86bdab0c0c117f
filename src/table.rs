//! A map's rows as they are wanted and as the kernel has them. Only what differs is kept twice: `pending` holds the
//! rows still to be written, so that a change costs what changed and an idle table costs one copy.

use std::hash::Hash;
use std::ops::Range;

use bytemuck::Pod;

/// A hash map with a fast hash; keys come from the API server, so the seed is random per process.
pub type HashMap<K, V> = foldhash::HashMap<K, V>;
/// The set that belongs to [`HashMap`].
pub type HashSet<K> = foldhash::HashSet<K>;

/// Where a table keeps the rows that the kernel has.
pub trait Rows: Default {
    type Key: Copy + Ord + Hash + Pod;
    type Value: Copy + PartialEq + Pod;

    fn get(&self, key: Self::Key) -> Option<Self::Value>;
    fn put(&mut self, key: Self::Key, value: Option<Self::Value>);
    /// In no order.
    fn for_each(&self, each: &mut dyn FnMut(Self::Key, Self::Value));
    /// Number of rows.
    fn len(&self) -> usize;
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Rows of a kernel hash map.
#[derive(Debug)]
pub struct Hashed<K, V>(HashMap<K, V>);

impl<K, V> Default for Hashed<K, V> {
    fn default() -> Self {
        Hashed(HashMap::default())
    }
}

impl<K: Copy + Ord + Hash + Pod, V: Copy + PartialEq + Pod> Rows for Hashed<K, V> {
    type Key = K;
    type Value = V;

    fn get(&self, key: K) -> Option<V> {
        self.0.get(&key).copied()
    }

    fn put(&mut self, key: K, value: Option<V>) {
        match value {
            Some(value) => self.0.insert(key, value),
            None => self.0.remove(&key),
        };
    }

    fn for_each(&self, each: &mut dyn FnMut(K, V)) {
        self.0.iter().for_each(|(key, value)| each(*key, *value));
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

/// Rows with small numbers as keys. As in the kernel's arrays, a row of zeros is no row.
#[derive(Debug)]
pub struct Indexed<V> {
    rows: Vec<V>,
    used: usize,
}

impl<V> Default for Indexed<V> {
    fn default() -> Self {
        Indexed { rows: Vec::new(), used: 0 }
    }
}

impl<V: Copy + PartialEq + Pod> Rows for Indexed<V> {
    type Key = u32;
    type Value = V;

    fn get(&self, key: u32) -> Option<V> {
        self.rows.get(key as usize).copied().filter(|row| *row != V::zeroed())
    }

    fn put(&mut self, key: u32, value: Option<V>) {
        let index = key as usize;
        let value = value.unwrap_or(V::zeroed());
        let had = self.get(key).is_some();
        if index >= self.rows.len() {
            if value == V::zeroed() {
                return;
            }
            self.rows.resize(index + 1, V::zeroed());
        }
        self.rows[index] = value;
        self.used = self.used + usize::from(value != V::zeroed()) - usize::from(had);
    }

    fn for_each(&self, each: &mut dyn FnMut(u32, V)) {
        let rows = (0u32..).zip(&self.rows).filter(|(_, row)| **row != V::zeroed());
        rows.for_each(|(key, row)| each(key, *row));
    }

    fn len(&self) -> usize {
        self.used
    }
}

/// One kernel map: `applied` is what the kernel is known to have, `pending` what is wanted instead.
/// Invariant: no pending entry equals the applied row.
#[derive(Debug)]
pub struct Table<R: Rows> {
    applied: R,
    pending: HashMap<R::Key, Option<R::Value>>,
}

impl<R: Rows> Default for Table<R> {
    fn default() -> Self {
        Table { applied: R::default(), pending: HashMap::default() }
    }
}

impl<R: Rows> Table<R> {
    /// Wants `value` at `key`.
    pub fn set(&mut self, key: R::Key, value: R::Value) {
        self.want(key, Some(value));
    }

    /// Wants no row at `key`.
    pub fn unset(&mut self, key: R::Key) {
        self.want(key, None);
    }

    /// Is content with what the kernel has at `key`.
    pub fn forget(&mut self, key: R::Key) {
        if !self.pending.is_empty() {
            self.pending.remove(&key);
        }
    }

    fn want(&mut self, key: R::Key, value: Option<R::Value>) {
        if self.applied.get(key) == value {
            self.forget(key);
        } else {
            self.pending.insert(key, value);
        }
    }

    /// The row as wanted.
    pub fn desired(&self, key: R::Key) -> Option<R::Value> {
        match self.pending.get(&key) {
            Some(value) => *value,
            None => self.applied.get(key),
        }
    }

    /// The row as the kernel has it.
    pub fn applied(&self, key: R::Key) -> Option<R::Value> {
        self.applied.get(key)
    }

    /// Notes that the kernel now has `value` at `key`. Called only after the write succeeded, or on what was read back.
    pub fn confirm(&mut self, key: R::Key, value: Option<R::Value>) {
        self.applied.put(key, value);
        if let Some(wanted) = self.pending.remove(&key) {
            if wanted != value {
                self.pending.insert(key, wanted);
            }
            // The first sync fills `pending` with every row there is; that memory is not kept.
            if self.pending.is_empty() && self.pending.capacity() > 1024 {
                self.pending.shrink_to_fit();
            }
        }
    }

    /// Notes that the kernel has `value` at `key` although something else was written; what is wanted stays wanted.
    pub fn found(&mut self, key: R::Key, value: Option<R::Value>) {
        let wanted = self.desired(key);
        self.applied.put(key, value);
        self.want(key, wanted);
    }

    /// The rows still to be written (`Some`) or deleted (`None`), in no order.
    pub fn pending(&self) -> impl Iterator<Item = (R::Key, Option<R::Value>)> + '_ {
        self.pending.iter().map(|(key, value)| (*key, *value))
    }

    pub fn is_clean(&self) -> bool {
        self.pending.is_empty()
    }

    /// The rows the kernel has.
    pub fn rows(&self) -> &R {
        &self.applied
    }
}

impl<V: Copy + PartialEq + Eq + Hash + Pod> Table<Indexed<V>> {
    /// Where in `range` the rows are that are wanted to be one of `values`; sorted.
    pub fn find(&self, range: Range<u32>, values: &[V]) -> Vec<u32> {
        const FEW: usize = 4;
        const BLOCK: usize = 64;
        let is_few = values.len() <= FEW;
        let set: HashSet<V> = if is_few { HashSet::default() } else { values.iter().copied().collect() };
        let is_wanted = |row: &V| if is_few { values.contains(row) } else { set.contains(row) };
        // Without a branch for each row, which processors do for many rows at once: most blocks have none.
        let may_have = |block: &[V]| {
            let has = |value: &V| block.iter().fold(false, |found, row| found | (row == value));
            !is_few || values.iter().any(has)
        };
        let end = self.applied.rows.len().min(range.end as usize);
        let applied = self.applied.rows.get(range.start as usize..end).unwrap_or_default();
        let blocks = (range.start..).step_by(BLOCK).zip(applied.chunks(BLOCK)).filter(|(_, block)| may_have(block));
        let rows = blocks.flat_map(|(first, block)| (first..).zip(block));
        let found = rows.filter(|(_, row)| is_wanted(row)).map(|(key, _)| key);
        let mut keys: Vec<u32> = found.filter(|key| !self.pending.contains_key(key)).collect();
        let waiting =
            self.pending.iter().filter(|(key, row)| range.contains(key) && row.is_some_and(|r| is_wanted(&r)));
        keys.extend(waiting.map(|(key, _)| *key));
        keys.sort_unstable();
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Small = Table<Indexed<u32>>;

    #[test]
    fn a_row_counts_as_applied_only_after_it_was_confirmed() {
        let mut table = Small::default();
        table.set(3, 7);
        assert_eq!((table.applied(3), table.desired(3)), (None, Some(7)));
        table.confirm(3, Some(7));
        assert_eq!((table.applied(3), table.desired(3), table.is_clean()), (Some(7), Some(7), true));
    }

    #[test]
    fn wanting_what_the_kernel_has_leaves_nothing_to_write() {
        let mut table = Small::default();
        table.confirm(3, Some(7));
        table.set(3, 8);
        table.set(3, 7);
        assert!(table.is_clean());
        table.unset(3);
        table.forget(3);
        assert!(table.is_clean());
    }

    #[test]
    fn rows_are_found_by_what_they_are_wanted_to_be() {
        let mut table = Small::default();
        (0..9).for_each(|key| table.confirm(key, Some(10 + key)));
        table.set(2, 99);
        table.set(7, 13);
        table.set(12, 14);
        for values in [&[12, 13, 99, 14, 18][..], &[12, 13, 99, 14, 18, 77]] {
            assert_eq!(table.find(1..8, values), [2, 3, 4, 7]);
            assert_eq!(table.find(3..20, values), [3, 4, 7, 8, 12]);
        }
        assert!(table.find(30..40, &[1]).is_empty());
        // Rows are looked at in blocks: at the ends of them, and before and behind the range.
        let mut long = Small::default();
        for key in 0..300 {
            long.set(key, 5);
            long.confirm(key, Some(5));
        }
        for key in [9, 10, 73, 74, 137, 138, 201, 209, 210] {
            long.set(key, 7);
            long.confirm(key, Some(7));
        }
        for values in [&[7][..], &[7, 8, 9, 11, 12]] {
            assert_eq!(long.find(10..210, values), [10, 73, 74, 137, 138, 201, 209]);
        }
    }

    #[test]
    fn a_value_between_leaves_the_wanted_one_pending() {
        let mut table = Table::<Hashed<u32, u32>>::default();
        table.confirm(1, Some(3));
        table.set(1, 6);
        table.confirm(1, Some(2));
        assert_eq!(table.pending().collect::<Vec<_>>(), [(1, Some(6))]);
    }

    #[test]
    fn a_row_of_zeros_in_an_array_is_no_row() {
        let mut rows = Indexed::<u32>::default();
        rows.put(9, None);
        rows.put(2, Some(5));
        assert_eq!((rows.len(), rows.get(9), rows.get(2)), (1, None, Some(5)));
        rows.put(2, None);
        assert!(rows.is_empty());
    }
}
