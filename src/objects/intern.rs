//! One copy of each name. A cluster of 100,000 endpoints has a few hundred node names, zones and port names: records
//! share them, so that an endpoint costs tens of bytes.

use std::collections::HashSet;
use std::sync::Arc;

use crate::model::Hints;

/// Shares equal strings and equal hints. Names that nothing uses any more are dropped when the set has doubled.
#[derive(Debug, Default)]
pub struct Interner {
    names: HashSet<Arc<str>, foldhash::fast::RandomState>,
    hints: HashSet<Arc<Hints>, foldhash::fast::RandomState>,
    prune_at: usize,
}

/// Below this many names nothing is pruned.
const PRUNE_FLOOR: usize = 4096;

impl Interner {
    /// The shared copy of `text`.
    pub fn name(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.names.get(text) {
            return known.clone();
        }
        self.prune();
        let name: Arc<str> = text.into();
        self.names.insert(name.clone());
        name
    }

    /// The shared copy of `hints`.
    pub fn hints(&mut self, hints: Hints) -> Arc<Hints> {
        if let Some(known) = self.hints.get(&hints) {
            return known.clone();
        }
        self.prune();
        let hints = Arc::new(hints);
        self.hints.insert(hints.clone());
        hints
    }

    fn prune(&mut self) {
        if self.names.len() + self.hints.len() < self.prune_at.max(PRUNE_FLOOR) {
            return;
        }
        self.hints.retain(|h| Arc::strong_count(h) > 1);
        self.names.retain(|n| Arc::strong_count(n) > 1);
        self.prune_at = 2 * (self.names.len() + self.hints.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_names_share_one_allocation() {
        let mut interner = Interner::default();
        let (a, b) = (interner.name("node-1"), interner.name("node-1"));
        assert!(Arc::ptr_eq(&a, &b));
        let hints = |zone: &mut Interner| Hints { zones: [zone.name("a")].into(), nodes: Box::default() };
        let (first, second) = (hints(&mut interner), hints(&mut interner));
        assert!(Arc::ptr_eq(&interner.hints(first), &interner.hints(second)));
    }

    #[test]
    fn names_that_nothing_uses_do_not_pile_up() {
        let mut interner = Interner::default();
        let kept = interner.name("kept");
        for i in 0..10 * PRUNE_FLOOR {
            interner.name(&format!("passing-{i}"));
        }
        assert!(interner.names.len() <= PRUNE_FLOOR, "{} names", interner.names.len());
        assert!(Arc::ptr_eq(&kept, &interner.name("kept")));
    }
}
