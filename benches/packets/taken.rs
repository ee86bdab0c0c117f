//! All that is measured of this machine: the programs as its verifier sees them, and the ways.

use std::collections::BTreeMap;

use anyhow::Result;
use kubelane::bpf::reference::Reference;
use kubelane::bpf::verifier;

use crate::laboratory::figures::{self, Found};
use crate::laboratory::packets::Node;
use crate::measure::{Lowest, Packets, measure};
use crate::ways;

/// Instructions that the verifier walks through, for each program.
pub fn programs() -> Result<Vec<Found>> {
    let programs = verifier::verify_all()?;
    let found = |p: verifier::VerifiedProgram| Found { name: p.name, value: f64::from(p.instructions), ns: None };
    Ok(programs.into_iter().map(found).collect())
}

/// The ways, in the order of [`ways::all`].
pub struct Taken(Vec<(String, Lowest)>);

impl Taken {
    /// Measures the chosen ways on a fresh node.
    pub fn new(is_chosen: impl Fn(&str) -> bool) -> Result<Taken> {
        take(is_chosen, 1).map(Taken)
    }

    /// The same once more, `rounds` times as long; what counts is the lowest of all.
    pub fn again(&mut self, is_chosen: impl Fn(&str) -> bool, rounds: usize) -> Result<()> {
        let mut more: BTreeMap<_, _> = take(is_chosen, rounds)?.into_iter().collect();
        for (name, lowest) in &mut self.0 {
            if let Some(other) = more.remove(name) {
                *lowest = lowest.and(other);
            }
        }
        Ok(())
    }

    pub fn found(&self) -> Vec<Found> {
        self.0.iter().map(|(name, lowest)| lowest.found(name)).collect()
    }

    /// References that the clock's grain may make of nothing; see [`Lowest::grain`].
    pub fn grain(&self) -> f64 {
        self.0.iter().map(|(_, lowest)| lowest.grain()).fold(0.0, f64::max)
    }

    pub fn reference_ns(&self) -> f64 {
        self.0.iter().map(|(_, lowest)| lowest.reference_ns()).fold(f64::INFINITY, f64::min)
    }
}

fn take(is_chosen: impl Fn(&str) -> bool, rounds: usize) -> Result<Vec<(String, Lowest)>> {
    let reference = Reference::load()?;
    let mut node = Node::new();
    let mut ways = ways::all(&mut node);
    ways.retain(|way| is_chosen(&way.name));
    for way in &ways {
        let is_single = matches!(way.packets, Packets::Fresh(_));
        anyhow::ensure!(
            figures::is_single(&way.name) == is_single,
            "{}: figures.rs takes it for another kind",
            way.name
        );
    }
    Ok(ways.iter_mut().map(|way| (way.name.clone(), measure(&mut node, &reference, way, rounds))).collect())
}
