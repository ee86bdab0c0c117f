//! Which endpoints get new connections: the rules of kube-proxy's topology.go (1.36) as one pure function.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::abi::pool_member::{POOL_CLUSTER, POOL_LOCAL};
use crate::model::{Endpoint, Hints, SocketAddrx};

/// One endpoint of one Service port and family, as the choice sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate<'a> {
    pub at: SocketAddrx,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    /// Runs on this node.
    pub node_local: bool,
    pub hints: Option<&'a Hints>,
}

impl<'a> Candidate<'a> {
    /// `port`: the slice's.
    pub fn new(endpoint: &'a Endpoint, port: u16, place: Place) -> Self {
        Candidate {
            at: SocketAddrx { ip: endpoint.ip, port },
            ready: endpoint.ready,
            serving: endpoint.serving,
            terminating: endpoint.terminating,
            node_local: endpoint.node.as_deref() == Some(place.node),
            hints: endpoint.hints.as_deref(),
        }
    }

    /// Not ready, but still serving while it terminates: good enough when there is nothing better.
    fn is_fallback(&self) -> bool {
        !self.ready && self.serving && self.terminating
    }

    /// May get connections at all; others have no backend row.
    pub fn is_usable(&self) -> bool {
        self.ready || self.is_fallback()
    }
}

/// Where this node is.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    pub node: &'a str,
    pub zone: Option<&'a str>,
}

/// Sorts by address and port and collapses duplicates: the most usable of each wins. Among equals the choice does not
/// depend on the order they came in.
pub fn merge_duplicates(candidates: &mut Vec<Candidate>) {
    let hints = |c: &Candidate| c.hints.map(|h| (h.nodes.clone(), h.zones.clone()));
    candidates.sort_by(|a, b| {
        let rank = |c: &Candidate| (c.at, !c.ready, !c.is_fallback(), !c.node_local);
        rank(a).cmp(&rank(b)).then_with(|| hints(a).cmp(&hints(b)))
    });
    candidates.dedup_by_key(|c| c.at);
}

/// How many candidates there are of each kind that a choice looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    ready: usize,
    fallback: usize,
    /// Ready ones of this node, and fallbacks.
    local_ready: usize,
    local_fallback: usize,
    /// Ready ones with hints of nodes, and those that name this node.
    node_hinted: usize,
    node_matches: usize,
    /// The same of zones.
    zone_hinted: usize,
    zone_matches: usize,
}

impl Tally {
    pub fn add(&mut self, candidate: &Candidate, place: Place) {
        self.each(candidate, place, |count, is| *count += usize::from(is));
    }

    /// Takes away what was added before.
    pub fn remove(&mut self, candidate: &Candidate, place: Place) {
        self.each(candidate, place, |count, is| *count -= usize::from(is));
    }

    fn each(&mut self, candidate: &Candidate, place: Place, change: impl Fn(&mut usize, bool)) {
        let (ready, fallback) = (candidate.ready, candidate.is_fallback());
        change(&mut self.ready, ready);
        change(&mut self.fallback, fallback);
        change(&mut self.local_ready, ready && candidate.node_local);
        change(&mut self.local_fallback, fallback && candidate.node_local);
        if let Some(hints) = candidate.hints.filter(|_| ready) {
            change(&mut self.node_hinted, !hints.nodes.is_empty());
            change(&mut self.node_matches, names(&hints.nodes, place.node));
            change(&mut self.zone_hinted, !hints.zones.is_empty());
            change(&mut self.zone_matches, place.zone.is_some_and(|zone| names(&hints.zones, zone)));
        }
    }

    /// Why hints are not followed, where [`Tally::decide`] ignores them; `None`: nobody asks for them, no endpoint has any.
    pub fn hints_ignored(&self) -> Option<HintsIgnored> {
        match (self.node_hinted, self.zone_hinted) {
            (0, 0) => None,
            (nodes, zones) if nodes.max(zones) < self.ready => Some(HintsIgnored::SomeHaveNone),
            _ => Some(HintsIgnored::NoneIsForHere),
        }
    }

    /// Each set falls back to terminating endpoints by itself. Hints count only when every ready endpoint has them and
    /// one at least names this place; node hints go before zone hints (KEP-4444, KEP-2433).
    pub fn decide(&self) -> Choice {
        let hints = if self.node_hinted == self.ready && self.node_matches > 0 {
            HintRule::Node
        } else if self.zone_hinted == self.ready && self.zone_matches > 0 {
            HintRule::Zone
        } else {
            HintRule::Ignore
        };
        Choice {
            any_ready: self.ready > 0,
            hints,
            any_local_ready: self.local_ready > 0,
            is_empty: self.ready + self.fallback == 0,
            local_is_empty: self.local_ready + self.local_fallback == 0,
        }
    }
}

/// Which hints are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HintRule {
    Node,
    Zone,
    Ignore,
}

/// Why hints are ignored although there are some.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum HintsIgnored {
    /// A ready endpoint has none.
    SomeHaveNone,
    /// They name other nodes and zones only.
    NoneIsForHere,
}

/// Why an endpoint is not in a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum LeftOut {
    /// Neither ready, nor serving while it terminates.
    NotReady,
    /// It terminates, and others are ready.
    Terminating,
    /// Node hints are followed, and its own do not name this node.
    HintsOtherNodes,
    /// Zone hints are followed, and its own do not name this node's zone.
    HintsOtherZones,
    /// It runs on another node.
    OtherNode,
    /// Its slice has no port of the Service port's name and protocol.
    NoSuchPort,
    /// There are more endpoints than the Service's quota of the maps has room for.
    OverQuota,
}

/// What all candidates together decide. As long as it is the same, what becomes of one concerns no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Else terminating ones serve.
    pub any_ready: bool,
    pub hints: HintRule,
    /// The same of this node's.
    pub any_local_ready: bool,
    /// No candidate is usable.
    pub is_empty: bool,
    /// None of this node is.
    pub local_is_empty: bool,
}

impl Choice {
    /// The sets that a candidate belongs to, as bits of `abi::pool_member`; of those in `needed` only. Hints narrow the
    /// Cluster set only.
    pub fn sets(&self, candidate: &Candidate, place: Place, needed: u32) -> u8 {
        let cluster = if self.cluster(candidate, place).is_ok() { POOL_CLUSTER } else { 0 };
        let local = if self.local(candidate).is_ok() { POOL_LOCAL } else { 0 };
        ((cluster | local) & needed) as u8
    }

    /// Whether a candidate is in the Cluster set.
    ///
    /// # Errors
    /// Why it is not.
    pub fn cluster(&self, candidate: &Candidate, place: Place) -> Result<(), LeftOut> {
        takes(self.any_ready, candidate)?;
        let hints = |list: fn(&Hints) -> &[Arc<str>]| candidate.hints.map_or(&[][..], list);
        match self.hints {
            _ if !self.any_ready => Ok(()),
            HintRule::Ignore => Ok(()),
            HintRule::Node if names(hints(|h| &h.nodes), place.node) => Ok(()),
            HintRule::Node => Err(LeftOut::HintsOtherNodes),
            HintRule::Zone if place.zone.is_some_and(|zone| names(hints(|h| &h.zones), zone)) => Ok(()),
            HintRule::Zone => Err(LeftOut::HintsOtherZones),
        }
    }

    /// Whether a candidate is in the Local set.
    ///
    /// # Errors
    /// Why it is not.
    pub fn local(&self, candidate: &Candidate) -> Result<(), LeftOut> {
        if !candidate.node_local {
            return Err(LeftOut::OtherNode);
        }
        takes(self.any_local_ready, candidate)
    }
}

/// A set of ready endpoints, or where none is ready of terminating ones.
fn takes(any_ready: bool, candidate: &Candidate) -> Result<(), LeftOut> {
    match (any_ready, candidate.is_fallback()) {
        (true, _) if candidate.ready => Ok(()),
        (false, true) => Ok(()),
        (true, true) => Err(LeftOut::Terminating),
        _ => Err(LeftOut::NotReady),
    }
}

fn names(hints: &[Arc<str>], place: &str) -> bool {
    hints.iter().any(|hint| **hint == *place)
}

/// What these candidates decide.
pub fn choose(candidates: &[Candidate], place: Place) -> Choice {
    let mut tally = Tally::default();
    candidates.iter().for_each(|candidate| tally.add(candidate, place));
    tally.decide()
}

#[cfg(test)]
#[path = "select_tests.rs"]
mod tests;
