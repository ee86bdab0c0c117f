//! The figures as tables to read, and as CSV to reckon with.

use std::fmt::Write as _;

use crate::common::{Sample, table};
use crate::latency::Latency;
use crate::measure::Cell;
use crate::mode::Mode;
use crate::path::Path;

/// Rates and their ratios, a row for each cell.
pub fn rates(cells: &[Cell], modes: &[Mode]) -> String {
    compare(cells, modes, |cell, mode| rate(cell, &cell.rates(mode)), Cell::ratio)
}

/// Processor time and its ratios, a row for each cell.
pub fn processor(cells: &[Cell], modes: &[Mode]) -> String {
    let text = |cell: &Cell, mode| {
        let sample = cell.processor(mode);
        if sample.len() == 0 {
            return String::new();
        }
        format!("{:.2} µs{}", sample.median(), if cell.test.unit == "/s" { "" } else { "/Mbit" })
    };
    compare(cells, modes, text, Cell::processor_ratio)
}

/// Instructions and their ratios, a row for each cell.
pub fn instructions(cells: &[Cell], modes: &[Mode]) -> String {
    let text = |cell: &Cell, mode| cell.instructions.get(&mode).map(|count| format!("{count:.0}")).unwrap_or_default();
    compare(cells, modes, text, Cell::instructions_ratio)
}

fn compare(
    cells: &[Cell],
    modes: &[Mode],
    text: impl Fn(&Cell, Mode) -> String,
    ratio: impl Fn(&Cell, Mode, Mode) -> Sample,
) -> String {
    let mut heading: Vec<String> = ["other Services", "path", "test"].map(str::to_owned).into();
    heading.extend(modes.iter().map(ToString::to_string));
    let peers: Vec<Mode> = modes.iter().copied().filter(|mode| *mode != Mode::Kubelane).collect();
    let has_kubelane = modes.contains(&Mode::Kubelane);
    if has_kubelane {
        heading.extend(peers.iter().map(|peer| format!("kubelane / {peer}")));
    }
    heading.push("rounds".to_owned());
    let row = |cell: &Cell| {
        let mut row = vec![cell.others.to_string(), cell.path.to_string(), cell.test.name.to_owned()];
        row.extend(modes.iter().map(|mode| text(cell, *mode)));
        if has_kubelane {
            row.extend(peers.iter().map(|peer| spread(&ratio(cell, Mode::Kubelane, *peer))));
        }
        row.push(match cell.spoiled.len() {
            0 => cell.rounds.len().to_string(),
            spoiled => format!("{} ({spoiled} thrown away)", cell.rounds.len()),
        });
        row
    };
    let rows: Vec<Vec<String>> = cells.iter().map(row).collect();
    table(&heading.iter().map(String::as_str).collect::<Vec<_>>(), &rows)
}

fn rate(cell: &Cell, sample: &Sample) -> String {
    if sample.len() == 0 {
        return String::new();
    }
    format!("{:.0}{}", sample.median(), if cell.test.unit == "/s" { "/s" } else { " Mbit/s" })
}

fn spread(sample: &Sample) -> String {
    if sample.len() == 0 {
        return String::new();
    }
    format!("{:.3} [{:.3}, {:.3}]", sample.median(), sample.percentile(25.0), sample.percentile(75.0))
}

/// The ratios that the project is after, and what they came to. Other paths and tests have none.
pub fn targets(cells: &[Cell], latencies: &[Latency]) -> String {
    let mut rows = Vec::new();
    for cell in cells {
        for (what, peer, target) in wanted(cell) {
            let ratio = match what {
                Rate => cell.ratio(Mode::Kubelane, peer),
                ProcessorTime => cell.processor_ratio(Mode::Kubelane, peer),
            };
            let what = match what {
                Rate => format!("kubelane / {peer}"),
                ProcessorTime => format!("processor time, kubelane / {peer}"),
            };
            rows.extend(row(cell.others, &cell.path, cell.test.name, what, target, &ratio));
        }
        // As many hops as through a node, while straight to the pod it is one less.
        if let Some(limit) = same_as(cells, cell, Path::Pod).filter(|_| is_new_connection_forwarded(cell)) {
            let ratio = cell.ratio_across(Mode::Kubelane, limit, Mode::Direct);
            let what = "kubelane / direct, pod to pod".to_owned();
            rows.extend(row(cell.others, &cell.path, cell.test.name, what, AtLeast(0.9), &ratio));
        }
    }
    for (latency, few) in growths(latencies) {
        if latency.mode == Mode::Kubelane && latency.others >= MANY {
            let what = format!("p99 / p99 beside {} others", few.others);
            let ratio = latency.ratio(few, 99.0);
            rows.extend(row(latency.others, &latency.path, "first connection", what, AtMost(1.1), &ratio));
        }
    }
    table(&["other Services", "path", "test", "ratio", "target", "measured", ""], &rows)
}

/// The same test beside as many others, on another path.
fn same_as<'c>(cells: &'c [Cell], cell: &Cell, path: Path) -> Option<&'c Cell> {
    cells.iter().find(|other| other.path == path && other.test == cell.test && other.others == cell.others)
}

fn is_new_connection_forwarded(cell: &Cell) -> bool {
    cell.path == Path::NodePortRemote && cell.test.name == "TCP_CRR"
}

/// The ratios of two paths that differ in nothing, a row for each test and number of others.
pub fn noise(cells: &[Cell]) -> String {
    let pairs = cells.iter().filter(|cell| cell.path == Path::ClusterIpRemote);
    let rows = pairs.filter_map(|cell| {
        let ratio = cell.ratio_across(Mode::Direct, same_as(cells, cell, Path::Pod)?, Mode::Direct);
        (ratio.len() > 0).then(|| {
            let extremes = format!("{:.3} to {:.3}", ratio.percentile(0.0), ratio.percentile(100.0));
            vec![cell.others.to_string(), cell.test.name.to_owned(), spread(&ratio), extremes]
        })
    });
    table(&["other Services", "test", "ratio of the same", "lowest to highest"], &rows.collect::<Vec<_>>())
}

/// A row of the targets, if anything was measured.
fn row(others: usize, path: &Path, test: &str, what: String, target: Target, ratio: &Sample) -> Option<Vec<String>> {
    if ratio.len() == 0 {
        return None;
    }
    let (target, is_met) = match target {
        AtLeast(least) => (format!(">= {least}"), ratio.median() >= least),
        AtMost(most) => (format!("<= {most}"), ratio.median() <= most),
        Below(limit) => (format!("< {limit}"), ratio.median() < limit),
    };
    let verdict = if is_met { "met" } else { "MISSED" };
    let row = [others.to_string(), path.to_string(), test.to_owned(), what, target, spread(ratio), verdict.to_owned()];
    Some(row.into())
}

/// So many others that a target for 30,000 Services applies.
const MANY: usize = 29_999;

use Target::{AtLeast, AtMost, Below};
use What::{ProcessorTime, Rate};

/// What is compared.
#[derive(Clone, Copy)]
enum What {
    Rate,
    ProcessorTime,
}

/// Where the median of the rounds' ratios should be.
#[derive(Clone, Copy)]
enum Target {
    AtLeast(f64),
    AtMost(f64),
    Below(f64),
}

/// What kubelane is to be compared in with whom in this cell.
fn wanted(cell: &Cell) -> Vec<(What, Mode, Target)> {
    let is_crr = cell.test.name == "TCP_CRR";
    let rule_modes = [Mode::Iptables, Mode::Nftables];
    match cell.path {
        Path::NodePortRemote => {
            let mut wanted = if is_crr {
                let iptables = if cell.others >= 9_999 { 4.0 } else { 1.2 };
                let (direct, iptables) = (AtLeast(0.9), AtLeast(iptables));
                vec![
                    (Rate, Mode::Direct, direct),
                    (Rate, Mode::Iptables, iptables),
                    (Rate, Mode::Nftables, AtLeast(1.2)),
                ]
            } else {
                rule_modes.map(|mode| (Rate, mode, AtLeast(1.0))).into()
            };
            if !cell.test.is_stream() {
                wanted.extend(rule_modes.map(|mode| (ProcessorTime, mode, Below(1.0))));
            }
            wanted
        }
        Path::ClusterIpRemote | Path::ClusterIpLocal => {
            vec![(Rate, Mode::Direct, AtLeast(if is_crr { 0.97 } else { 0.99 }))]
        }
        Path::PacketPod if is_crr => vec![(Rate, Mode::Iptables, AtLeast(1.15))],
        _ => Vec::new(),
    }
}

/// Each mode's first connections with more than its fewest others, beside those with the fewest.
fn growths(latencies: &[Latency]) -> impl Iterator<Item = (&Latency, &Latency)> {
    latencies.iter().filter_map(|latency| {
        let same = latencies.iter().filter(|other| other.mode == latency.mode && other.path == latency.path);
        let few = same.min_by_key(|other| other.others)?;
        (latency.others > few.others).then_some((latency, few))
    })
}

/// Percentiles of first connections, a row for each mode, path and number of Services.
pub fn latencies(latencies: &[Latency]) -> String {
    let row = |latency: &Latency| {
        let all = latency.all();
        let spoiled = latency.spoiled();
        let mut row = vec![latency.path.to_string(), latency.others.to_string(), latency.mode.to_string()];
        row.extend(PERCENTILES.map(|percent| match all.len() {
            0 => "-".to_owned(),
            _ => format!("{:.1} µs", all.percentile(percent)),
        }));
        let growth = growths(latencies).find(|(of, _)| std::ptr::eq(*of, latency));
        let pooled = |few: &Latency| all.percentile(99.0) / few.all().percentile(99.0);
        row.push(growth.map_or(String::new(), |(_, few)| spread(&latency.ratio(few, 99.0))));
        row.push(growth.map_or(String::new(), |(_, few)| format!("{:.3}", pooled(few))));
        row.push(match spoiled {
            0 => all.len().to_string(),
            _ => format!("{} ({spoiled} chunks thrown away)", all.len()),
        });
        row
    };
    let heading = [
        "path",
        "other Services",
        "mode",
        "p50",
        "p90",
        "p99",
        "p99.9",
        "p99 / fewest, by rounds",
        "p99 / fewest, all",
        "connections",
    ];
    table(&heading, &latencies.iter().map(row).collect::<Vec<_>>())
}

const PERCENTILES: [f64; 4] = [50.0, 90.0, 99.0, 99.9];

/// One line for each chunk of first connections that counts.
pub fn latencies_csv(latencies: &[Latency]) -> String {
    let mut text = String::from("other_services,path,mode,round,connections,p50_us,p90_us,p99_us,p99.9_us\n");
    for Latency { mode, others, path, rounds } in latencies {
        for (number, round) in rounds.iter().enumerate().filter(|(_, round)| round.len() > 0) {
            let percentiles = PERCENTILES.map(|percent| format!("{:.2}", round.percentile(percent)));
            // Writing to a String does not fail.
            let _ =
                writeln!(text, "{others},\"{path}\",{mode},{},{},{}", number + 1, round.len(), percentiles.join(","));
        }
    }
    text
}

/// One line for each run that counts.
pub fn csv(cells: &[Cell]) -> String {
    let mut text = String::from(
        "other_services,path,test,round,mode,rate,unit,processor_microseconds_per_unit,instructions_per_unit\n",
    );
    for cell in cells {
        for round in &cell.rounds {
            for (mode, figure) in &round.figures {
                // Writing to a String does not fail. No path has a quotation mark in its name.
                let instructions = cell.instructions.get(mode).map(|count| format!("{count:.0}")).unwrap_or_default();
                let _ = writeln!(
                    text,
                    "{},\"{}\",{},{},{mode},{},{},{:.3},{instructions}",
                    cell.others,
                    cell.path,
                    cell.test.name,
                    round.number + 1,
                    figure.rate,
                    cell.test.unit,
                    figure.processor
                );
            }
        }
    }
    text
}
