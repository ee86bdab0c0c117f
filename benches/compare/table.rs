//! The figures as tables to read, and as CSV to reckon with.

use std::fmt::Write as _;

use crate::common::{Sample, table};
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
pub fn targets(cells: &[Cell]) -> String {
    let mut rows = Vec::new();
    for cell in cells {
        for (peer, least) in wanted(cell) {
            let ratio = cell.ratio(Mode::Kubelane, peer);
            if ratio.len() == 0 {
                continue;
            }
            let verdict = if ratio.median() >= least { "met" } else { "MISSED" };
            rows.push(vec![
                cell.others.to_string(),
                cell.path.to_string(),
                cell.test.name.to_owned(),
                format!("kubelane / {peer}"),
                format!(">= {least}"),
                spread(&ratio),
                verdict.to_owned(),
            ]);
        }
    }
    table(&["other Services", "path", "test", "ratio", "target", "measured", ""], &rows)
}

/// Whom kubelane is to be compared with in this cell, and the least ratio of rates.
fn wanted(cell: &Cell) -> Vec<(Mode, f64)> {
    let is_crr = cell.test.name == "TCP_CRR";
    match cell.path {
        Path::NodePortRemote if is_crr => {
            let iptables = if cell.others >= 9_999 { 4.0 } else { 1.2 };
            vec![(Mode::Direct, 0.9), (Mode::Iptables, iptables), (Mode::Nftables, 1.2)]
        }
        Path::NodePortRemote => vec![(Mode::Iptables, 1.0), (Mode::Nftables, 1.0)],
        Path::ClusterIpRemote | Path::ClusterIpLocal => vec![(Mode::Direct, if is_crr { 0.97 } else { 0.99 })],
        _ => Vec::new(),
    }
}

/// One line for each run that counts.
pub fn csv(cells: &[Cell]) -> String {
    let mut text = String::from("other_services,path,test,round,mode,rate,unit,processor_microseconds_per_unit\n");
    for cell in cells {
        for (round, figures) in cell.rounds.iter().enumerate() {
            for (mode, figure) in figures {
                // Writing to a String does not fail. No path has a quotation mark in its name.
                let _ = writeln!(
                    text,
                    "{},\"{}\",{},{},{mode},{},{},{:.3}",
                    cell.others,
                    cell.path,
                    cell.test.name,
                    round + 1,
                    figure.rate,
                    cell.test.unit,
                    figure.processor
                );
            }
        }
    }
    text
}
