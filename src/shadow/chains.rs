//! What rules do with the first packet of a connection, whoever wrote them down: chains, conditions and targets, and a walk
//! through them that finds all endpoints that a client may get.

use std::collections::BTreeSet;

use super::{Answer, Client};
use crate::model::SocketAddrx;
use crate::table::HashMap;

/// kube-proxy's chains are four deep; the kernel itself refuses loops.
const DEPTH_MAX: u32 = 12;
/// Rules that are looked at for one client: those of a hundred thousand endpoints.
const RULES_MAX: u32 = 2_000_000;

/// When a rule applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    Always,
    /// The client has an address of this node.
    Local,
    /// The client's address is in a range: of pods, or of those that are admitted.
    Source,
    /// It is not.
    OtherSource,
    Sometimes,
    /// The client came here in the last so many seconds.
    Recent(u32),
    Unknown,
}

/// What it does then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Then {
    /// Nothing that decides where a packet goes: marks, masquerading, notes.
    Nothing,
    Jump(u32),
    Goto(u32),
    /// As `Goto`, to one of them at random.
    GotoOneOf(Box<[u32]>),
    Translate(Box<[SocketAddrx]>),
    Refuse,
    Drop,
    Return,
    Unknown,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub when: When,
    pub then: Then,
}

/// Chains by number, and their numbers by name.
#[derive(Debug, Default)]
pub struct Chains {
    ids: HashMap<Box<str>, u32>,
    rules: Vec<Vec<Rule>>,
}

impl Chains {
    /// The number of a chain, which need not have rules yet.
    pub fn id(&mut self, name: &str) -> u32 {
        if let Some(id) = self.ids.get(name) {
            return *id;
        }
        let id = self.rules.len() as u32;
        self.ids.insert(name.into(), id);
        self.rules.push(Vec::new());
        id
    }

    pub fn append(&mut self, chain: u32, rule: Rule) {
        if let Some(rules) = self.rules.get_mut(chain as usize) {
            rules.push(rule);
        }
    }

    pub fn rules(&self, chain: u32) -> &[Rule] {
        self.rules.get(chain as usize).map_or(&[], Vec::as_slice)
    }

    /// What these rules, and the chains that they lead to, have for a client.
    pub fn walk(&self, rules: &[Rule], client: Client) -> Found {
        self.walk_from(rules, client, 0, &mut 0)
    }

    fn walk_from(&self, rules: &[Rule], client: Client, depth: u32, seen: &mut u32) -> Found {
        let mut found = Found::default();
        *seen = seen.saturating_add(rules.len() as u32);
        if depth > DEPTH_MAX || *seen > RULES_MAX {
            found.is_unknown = true;
            return found;
        }
        // Ranges alone admit clients; beside other conditions they say who is a pod.
        let admits = rules.iter().all(|rule| rule.when == When::Source || self.only_marks(&rule.then));
        for rule in rules {
            let (next, is_goto) = self.then(&rule.then, client, depth, seen);
            let is_return = rule.then == Then::Return;
            if next == Found::default() && !is_return {
                continue;
            }
            let is_sure = match rule.when {
                When::Always => true,
                When::Local if client == Client::Inside => true,
                When::Source if admits => true,
                When::Local | When::Source | When::OtherSource => continue,
                When::Sometimes => false,
                When::Recent(seconds) => {
                    found.affinity = found.affinity.max(seconds);
                    false
                }
                When::Unknown => {
                    found.is_unknown = true;
                    continue;
                }
            };
            let ends = next.ends;
            found.merge(next);
            if is_sure && (ends || is_goto || is_return) {
                found.ends = ends;
                break;
            }
        }
        found
    }

    /// Whether a target decides nothing by itself.
    fn only_marks(&self, then: &Then) -> bool {
        match then {
            Then::Nothing => true,
            Then::Jump(id) => self.rules(*id).iter().all(|rule| rule.then == Then::Nothing),
            _ => false,
        }
    }

    /// What a target leads to, and whether nothing comes back from there.
    fn then(&self, then: &Then, client: Client, depth: u32, seen: &mut u32) -> (Found, bool) {
        let mut chain = |id: &u32| self.walk_from(self.rules(*id), client, depth + 1, seen);
        match then {
            Then::Nothing | Then::Return => (Found::default(), false),
            Then::Jump(id) => (chain(id), false),
            Then::Goto(id) => (chain(id), true),
            Then::GotoOneOf(ids) => {
                let mut all = Found { ends: true, ..Found::default() };
                for next in ids.iter().map(chain) {
                    all.ends &= next.ends;
                    all.merge(next);
                }
                (all, true)
            }
            Then::Translate(to) => {
                (Found { endpoints: to.iter().copied().collect(), ends: true, ..Found::default() }, true)
            }
            Then::Refuse => (Found { verdict: Some(Answer::Refused), ends: true, ..Found::default() }, true),
            Then::Drop => (Found { verdict: Some(Answer::Dropped), ends: true, ..Found::default() }, true),
            Then::Unknown => (Found { is_unknown: true, ..Found::default() }, false),
        }
    }
}

/// What a client finds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    pub endpoints: BTreeSet<SocketAddrx>,
    pub verdict: Option<Answer>,
    /// Seconds; 0: none.
    pub affinity: u32,
    /// No packet gets through undecided.
    pub ends: bool,
    pub is_unknown: bool,
}

impl Found {
    fn merge(&mut self, other: Found) {
        if self.endpoints.is_empty() {
            self.endpoints = other.endpoints;
        } else {
            self.endpoints.extend(other.endpoints);
        }
        self.verdict = self.verdict.take().or(other.verdict);
        self.affinity = self.affinity.max(other.affinity);
        self.is_unknown |= other.is_unknown;
    }

    /// `None`: it is left as it is.
    pub fn answer(&self) -> Option<Answer> {
        if self.is_unknown || (!self.endpoints.is_empty() && (!self.ends || self.verdict.is_some())) {
            return Some(Answer::Unknown);
        }
        match self.endpoints.is_empty() {
            true => self.verdict.clone(),
            false => Some(Answer::Endpoints(self.endpoints.iter().copied().collect())),
        }
    }
}
