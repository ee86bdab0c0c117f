//! What lasts: a difference counts when two comparisons find it, because kube-proxy and kubelane do not learn of a change
//! at the same moment.

use std::collections::{BTreeMap, BTreeSet};

use super::{Comparison, Difference, KINDS, Key, Kind, What};
use crate::model::SocketAddrx;

/// Differences that have been told, and those that may still go away.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Of the comparison before.
    last: BTreeMap<Key, Difference>,
    told: BTreeMap<Key, Difference>,
}

/// What is new after a comparison.
#[derive(Debug, Default)]
pub struct News {
    pub begun: Vec<(Key, Difference)>,
    pub over: Vec<(Key, Difference)>,
    /// Something was found that the next comparison has to confirm.
    pub is_open: bool,
}

impl Ledger {
    pub fn take(&mut self, now: Comparison) -> News {
        let mut news = News::default();
        let lasting: BTreeMap<Key, Difference> = now
            .differences
            .iter()
            .filter_map(|(key, difference)| Some((*key, both(self.last.get(key)?, difference)?)))
            .collect();
        for (key, difference) in &lasting {
            if !self.told.contains_key(key) {
                news.begun.push((*key, difference.clone()));
            }
        }
        news.over = std::mem::take(&mut self.told).into_iter().filter(|(key, _)| !lasting.contains_key(key)).collect();
        news.is_open = now.differences.keys().any(|key| !lasting.contains_key(key));
        self.told = lasting;
        self.last = now.differences;
        news
    }

    /// The differences that count.
    pub fn differences(&self) -> &BTreeMap<Key, Difference> {
        &self.told
    }

    /// How many Service ports differ in what is not known and meant.
    pub fn service_ports(&self) -> usize {
        let unknown = self.told.iter().filter(|(key, _)| key.kind != Kind::Known);
        unknown.map(|(key, difference)| (&difference.name, key.at.protocol)).collect::<BTreeSet<_>>().len()
    }

    /// Differences by kind.
    pub fn counts(&self) -> [(&'static str, usize); KINDS.len()] {
        KINDS.map(|(kind, name)| (name, self.told.keys().filter(|key| key.kind == kind).count()))
    }
}

/// What both have; sorted.
fn common(a: &[SocketAddrx], b: &[SocketAddrx]) -> Vec<SocketAddrx> {
    a.iter().filter(|at| b.binary_search(at).is_ok()).copied().collect()
}

/// What both say.
fn both(before: &Difference, now: &Difference) -> Option<Difference> {
    let what = match (&before.what, &now.what) {
        (What::Endpoints { rules, kubelane }, What::Endpoints { rules: rules_now, kubelane: kubelane_now }) => {
            let (rules, kubelane) = (common(rules, rules_now), common(kubelane, kubelane_now));
            (!rules.is_empty() || !kubelane.is_empty()).then_some(What::Endpoints { rules, kubelane })?
        }
        (before, now) if before == now => now.clone(),
        _ => return None,
    };
    Some(Difference { name: now.name.clone(), what })
}
