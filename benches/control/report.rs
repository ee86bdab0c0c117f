//! Tables and CSV: what was measured, its targets, and how it grows from size to size.

use std::fmt::Write as _;

use crate::common::table;

/// What a figure may do when there are ten times as many Services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Growth {
    /// Grow with them, and no faster.
    Linear,
    /// Stay as it is.
    Flat,
    /// It is not judged.
    None,
}

/// One measured value.
#[derive(Clone, Debug)]
pub struct Figure {
    pub id: &'static str,
    pub name: String,
    pub unit: &'static str,
    pub growth: Growth,
    /// `None`: it took longer than it might.
    pub value: Option<f64>,
}

/// What was measured at one size of a cluster.
#[derive(Clone, Debug)]
pub struct Figures {
    /// "kubelane", or the rule set.
    pub of: &'static str,
    pub services: usize,
    pub endpoints: usize,
    pub all: Vec<Figure>,
}

/// Targets: Services, endpoints of each, figure, and what it is to stay below.
const TARGETS: [(usize, usize, &str, f64); 13] = [
    (1_000, 10, "resident", 30.0),
    (1_000, 10, "maps", 50.0),
    (10_000, 10, "first_sync", 5.0),
    (10_000, 10, "first_sync_cpu", 3.0),
    (10_000, 10, "first_sync_peak", 120.0),
    (10_000, 10, "resident", 80.0),
    (10_000, 10, "change_cpu", 1.0),
    (10_000, 10, "change_p99", 2.0),
    (10_000, 10, "grown_change_cpu", 1.0),
    (10_000, 10, "idle", 0.1),
    (100_000, 10, "first_sync", 30.0),
    (100_000, 10, "resident", 600.0),
    (100_000, 10, "first_sync_peak", 600.0),
];

impl Figures {
    pub fn new(of: &'static str, services: usize, endpoints: usize) -> Figures {
        Figures { of, services, endpoints, all: Vec::new() }
    }

    pub fn add(&mut self, id: &'static str, name: &str, unit: &'static str, growth: Growth, value: f64) {
        self.all.push(Figure { id, name: name.to_owned(), unit, growth, value: Some(value) });
    }

    /// Notes that there is no value, because it took longer than it might.
    pub fn add_missing(&mut self, id: &'static str, name: &str, unit: &'static str, growth: Growth) {
        self.all.push(Figure { id, name: name.to_owned(), unit, growth, value: None });
    }

    fn get(&self, id: &str) -> Option<&Figure> {
        self.all.iter().find(|figure| figure.id == id)
    }

    /// A table of this size alone.
    pub fn table(&self) -> String {
        let row = |figure: &Figure| vec![figure.name.clone(), show(figure), self.target(figure)];
        table(&["", "measured", "target"], &self.all.iter().map(row).collect::<Vec<_>>())
    }

    fn target(&self, figure: &Figure) -> String {
        if figure.id == "restart_rows" {
            return "0".to_owned();
        }
        let known = TARGETS.iter().find(|t| (t.0, t.1, t.2) == (self.services, self.endpoints, figure.id));
        let Some((.., limit)) = known else { return "-".to_owned() };
        let met = figure.value.is_some_and(|value| value < *limit);
        format!("< {limit} {}{}", figure.unit, if met { "" } else { ": MISSED" })
    }
}

fn show(figure: &Figure) -> String {
    let Some(value) = figure.value else { return "not within the limit".to_owned() };
    match figure.unit {
        "" => format!("{value}"),
        "ms" => format!("{value:.3} ms"),
        "%" => format!("{value:.3} %"),
        unit => format!("{value:.2} {unit}"),
    }
}

/// All sizes of one thing beside each other. A dash is a figure that a size does not have: something failed before it.
pub fn summary(sizes: &[Figures]) -> String {
    let heads: Vec<String> = sizes.iter().map(|size| thousands(size.services)).collect();
    let mut heading = vec!["Services"];
    heading.extend(heads.iter().map(String::as_str));
    let row = |figure: &Figure| {
        let cells = sizes.iter().map(|size| size.get(figure.id).map_or_else(|| "-".to_owned(), show));
        std::iter::once(figure.name.clone()).chain(cells).collect()
    };
    table(&heading, &every(sizes).into_iter().map(row).collect::<Vec<Vec<String>>>())
}

/// Each figure that any size has, once, in the order of the size that has most of them.
fn every(sizes: &[Figures]) -> Vec<&Figure> {
    let longest = sizes.iter().max_by_key(|size| size.all.len());
    let mut every: Vec<&Figure> = Vec::new();
    for figure in longest.into_iter().chain(sizes).flat_map(|size| &size.all) {
        if !every.iter().any(|known| known.id == figure.id) {
            every.push(figure);
        }
    }
    every
}

/// How much larger each figure is at each size than at the one before: for what may grow with the Services, divided by
/// how many times as many these are (1 is linear, less is better), else as it is (1 is flat).
pub fn growth(sizes: &[Figures]) -> Option<String> {
    let pairs: Vec<(&Figures, &Figures)> = sizes.iter().zip(sizes.iter().skip(1)).collect();
    pairs.first()?;
    let heads: Vec<String> =
        pairs.iter().map(|(a, b)| format!("{} to {}", thousands(a.services), thousands(b.services))).collect();
    let mut heading = vec!["growth"];
    heading.extend(heads.iter().map(String::as_str));
    heading.push("target");
    let judged = every(sizes).into_iter().filter(|figure| figure.growth != Growth::None);
    let row = |figure: &Figure| {
        let ratio = |(a, b): &(&Figures, &Figures)| {
            let value = |of: &Figures| of.get(figure.id)?.value;
            let Some((before, after)) = value(a).zip(value(b)).filter(|(before, _)| *before > 0.0) else {
                return "-".to_owned();
            };
            let times = after / before;
            let more = b.services as f64 / a.services as f64;
            format!("{:.2}", if figure.growth == Growth::Linear { times / more } else { times })
        };
        let target = match figure.growth {
            Growth::Linear => "at most 1, per Service (linear or better)",
            _ => "1 (flat)",
        };
        let mut row = vec![figure.name.clone()];
        row.extend(pairs.iter().map(ratio));
        row.push(target.to_owned());
        row
    };
    Some(table(&heading, &judged.map(row).collect::<Vec<_>>()))
}

/// Everything, one figure a line. An empty value is one that took longer than it might.
pub fn csv(sizes: &[Figures]) -> String {
    let mut text = String::from("of,services,endpoints,figure,unit,value\n");
    for size in sizes {
        for figure in &size.all {
            let value = figure.value.map_or_else(String::new, |value| value.to_string());
            // Writing to a String does not fail.
            let _ = writeln!(
                text,
                "{},{},{},{},{},{value}",
                size.of, size.services, size.endpoints, figure.id, figure.unit
            );
        }
    }
    text
}

/// 10,000 for 10000.
pub fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let parts: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|part| std::str::from_utf8(part).ok()).collect();
    parts.join(",")
}
