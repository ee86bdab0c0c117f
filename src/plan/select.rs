//! Which endpoints get new connections: the rules of kube-proxy's topology.go (1.36) as one pure function.

use crate::abi::pool_member::{POOL_CLUSTER, POOL_LOCAL};
use crate::model::{Hints, SocketAddrx};

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

impl Candidate<'_> {
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

/// The sets that each candidate belongs to, as bits of `abi::pool_member`, in the candidates' order. Only the sets in
/// `needed` are decided. Each set falls back to terminating endpoints by itself; hints narrow the Cluster set only.
pub fn select(candidates: &[Candidate], place: Place, needed: u32) -> Vec<u8> {
    let mut sets = vec![0u8; candidates.len()];
    if needed & POOL_CLUSTER != 0 {
        let hinted = hint_filter(candidates, place);
        let any_ready = candidates.iter().any(|c| c.ready);
        for (set, candidate) in sets.iter_mut().zip(candidates) {
            let chosen = if any_ready { candidate.ready && hinted(candidate) } else { candidate.is_fallback() };
            if chosen {
                *set |= POOL_CLUSTER as u8;
            }
        }
    }
    if needed & POOL_LOCAL != 0 {
        let any_ready = candidates.iter().any(|c| c.node_local && c.ready);
        for (set, candidate) in sets.iter_mut().zip(candidates) {
            let chosen = if any_ready { candidate.ready } else { candidate.is_fallback() };
            if chosen && candidate.node_local {
                *set |= POOL_LOCAL as u8;
            }
        }
    }
    sets
}

/// Which ready endpoints their hints allow for this node. Hints count only when every ready endpoint has them and one
/// at least names this place; node hints go before zone hints (KEP-4444, KEP-2433).
fn hint_filter<'a>(candidates: &[Candidate], place: Place<'a>) -> impl Fn(&Candidate) -> bool + use<'a> {
    #[derive(Clone, Copy)]
    enum Rule<'a> {
        Node(&'a str),
        Zone(&'a str),
        Ignore,
    }
    let allows = |rule: Rule, candidate: &Candidate| match (rule, candidate.hints) {
        (Rule::Ignore, _) => true,
        (_, None) => false,
        (Rule::Node(node), Some(hints)) => hints.nodes.iter().any(|n| **n == *node),
        (Rule::Zone(zone), Some(hints)) => hints.zones.iter().any(|z| **z == *zone),
    };
    let all_have = |nonempty: fn(&Hints) -> bool| candidates.iter().all(|c| !c.ready || c.hints.is_some_and(nonempty));
    let any_matches = |rule| candidates.iter().any(|c| c.ready && allows(rule, c));

    let node = Rule::Node(place.node);
    let zone = place.zone.map_or(Rule::Ignore, Rule::Zone);
    let rule = if all_have(|h| !h.nodes.is_empty()) && any_matches(node) {
        node
    } else if all_have(|h| !h.zones.is_empty()) && any_matches(zone) {
        zone
    } else {
        Rule::Ignore
    };
    move |candidate| allows(rule, candidate)
}

#[cfg(test)]
#[path = "select_tests.rs"]
mod tests;
