//! Rounds: every mode has a run on every path in each, and only what a round's runs say of each other counts.

use std::collections::BTreeMap;

use crate::common::Sample;
use crate::instructions::Instructions;
use crate::mode::{Mode, Served};
use crate::path::Path;
use crate::run::{Figure, Netperf, Run, Test};

/// The good rounds of one test on one path, all modes in each of them.
pub struct Cell {
    /// Services beside those that are measured.
    pub others: usize,
    pub path: Path,
    pub test: Test,
    pub rounds: Vec<Round>,
    /// Rounds that did not count, with the reasons.
    pub spoiled: Vec<String>,
    /// Instructions for one transaction or one Mbit, of one more run; empty where the machine does not count them.
    pub instructions: BTreeMap<Mode, f64>,
}

/// A good round: a run in each mode.
pub struct Round {
    /// Counted over good and spoiled ones: rounds of the same number on different paths came one after the other.
    pub number: usize,
    pub figures: BTreeMap<Mode, Figure>,
}

impl Cell {
    pub fn rates(&self, mode: Mode) -> Sample {
        self.each(|round| Some(round.get(&mode)?.rate))
    }

    pub fn processor(&self, mode: Mode) -> Sample {
        self.each(|round| Some(round.get(&mode)?.processor))
    }

    /// The rounds' ratios of rates.
    pub fn ratio(&self, of: Mode, to: Mode) -> Sample {
        self.each(|round| Some(round.get(&of)?.rate / round.get(&to)?.rate))
    }

    /// The ratio of instructions, if both were counted.
    pub fn instructions_ratio(&self, of: Mode, to: Mode) -> Sample {
        let count = |mode: &Mode| self.instructions.get(mode).copied();
        Sample::new(count(&of).zip(count(&to)).map(|(of, to)| of / to))
    }

    /// The rounds' ratios of processor time.
    pub fn processor_ratio(&self, of: Mode, to: Mode) -> Sample {
        self.each(|round| Some(round.get(&of)?.processor / round.get(&to)?.processor))
    }

    /// The rounds' ratios of rates to those of another path.
    pub fn ratio_across(&self, of: Mode, path: &Cell, to: Mode) -> Sample {
        let pairs = self.rounds.iter().filter_map(|round| {
            let other = path.rounds.iter().find(|other| other.number == round.number)?;
            Some(round.figures.get(&of)?.rate / other.figures.get(&to)?.rate)
        });
        Sample::new(pairs)
    }

    fn each(&self, value: impl Fn(&BTreeMap<Mode, Figure>) -> Option<f64>) -> Sample {
        Sample::new(self.rounds.iter().filter_map(|round| value(&round.figures)))
    }
}

/// One run in each mode, which meets the path's cold neighbour tables and caches, and does not count.
pub fn warm_up(netperf: &Netperf, served: &[Served], path: Path) -> anyhow::Result<()> {
    served.iter().filter(|served| served.mode.has(path)).try_for_each(|served| {
        netperf.run(served, path, Test::ALL[0])?;
        Ok(())
    })
}

/// Measures one test on all paths, until each has `rounds` good rounds or as many that were spoiled. Paths take turns as
/// modes do, so that what lasts for some seconds on the machine is not one path's alone, and that paths can be compared.
pub fn cells(
    netperf: &Netperf,
    served: &[Served],
    others: usize,
    paths: &[Path],
    test: Test,
    rounds: usize,
) -> anyhow::Result<Vec<Cell>> {
    let fresh = |path: &Path| Cell {
        others,
        path: *path,
        test,
        rounds: Vec::new(),
        spoiled: Vec::new(),
        instructions: BTreeMap::new(),
    };
    let mut cells: Vec<Cell> = paths.iter().map(fresh).collect();
    for number in 0.. {
        let lacking = cells.iter_mut().filter(|cell| cell.rounds.len() < rounds && cell.spoiled.len() < rounds);
        let lacking: Vec<&mut Cell> = lacking.collect();
        if lacking.is_empty() {
            break;
        }
        for cell in lacking {
            round(netperf, served, cell, number)?;
        }
    }
    Ok(cells)
}

/// A run in each mode.
fn round(netperf: &Netperf, served: &[Served], cell: &mut Cell, number: usize) -> anyhow::Result<()> {
    let modes: Vec<&Served> = served.iter().filter(|served| served.mode.has(cell.path)).collect();
    let mut round = Round { number, figures: BTreeMap::new() };
    let mut reasons = Vec::new();
    for turn in 0..modes.len() {
        // Each mode is first, in the middle and last in turn.
        let served = modes[(turn + number) % modes.len()];
        match netperf.run(served, cell.path, cell.test)? {
            Run::Good(figure) => drop(round.figures.insert(served.mode, figure)),
            Run::Spoiled(why) => reasons.push(format!("{}: {why}", served.mode)),
        }
    }
    let head = format!("{:6} others  {:24} {:10} round {:2}:", cell.others, cell.path, cell.test.name, number + 1);
    if reasons.is_empty() {
        let rates = round.figures.iter().map(|(mode, figure)| format!("{mode} {:.0}{}", figure.rate, cell.test.unit));
        println!("{head} {}", rates.collect::<Vec<_>>().join("  "));
        cell.rounds.push(round);
    } else {
        let reasons = reasons.join("; ");
        println!("{head} THROWN AWAY: {reasons}");
        cell.spoiled.push(reasons);
    }
    Ok(())
}

/// One more run in each mode, in which instructions are counted: counting costs time.
pub fn count_instructions(netperf: &Netperf, served: &[Served], cell: &mut Cell) -> anyhow::Result<()> {
    for served in served.iter().filter(|served| served.mode.has(cell.path)) {
        let instructions = Instructions::start(served.lab)?;
        let run = netperf.run(served, cell.path, cell.test)?;
        let count = instructions.stop()?;
        if let Run::Good(figure) = run {
            cell.instructions.insert(served.mode, count / figure.units);
        }
    }
    Ok(())
}
