//! A Service: for each of its destinations the backends with their share and open connections, those that get nothing and
//! why, and what the next connection gets.

use std::net::SocketAddr;

use ratatui::text::Line;

use super::theme::Theme;
use crate::cli::explain::{Explanation, Group, View, groups};
use crate::escape;
use crate::model::Protocol;
use crate::overview::Open;

/// Backends of one destination that are shown, and as many of those that are left out.
const LISTED: usize = 200;

/// All lines. `open`: of the latest look.
pub fn lines(explanation: &Explanation, open: &Open, theme: &Theme) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    match &explanation.daemon {
        None => lines.push(text("The daemon does not answer: this is from the maps alone, which lack some reasons.")),
        Some(daemon) if daemon.waits => lines.push(text("The daemon has changes that the kernel has not taken yet.")),
        Some(_) => {}
    }
    let said = explanation.warnings.iter().chain(&explanation.disagreements);
    lines.extend(said.map(|words| text(words).style(theme.bad())));
    lines.extend(explanation.notes.iter().map(|note| text(note)));
    for Group { headings, view, .. } in groups(explanation) {
        lines.extend(headings.iter().map(|heading| text(heading).style(theme.head())));
        lines.extend(view.pool.iter().flat_map(|pool| &pool.why).map(|why| text(&format!("  {why}"))));
        lines.extend(table(view, open));
        let next = text(&format!("  next: {}", view.next));
        lines.push(if view.verdict == "backend" { next } else { next.style(theme.bad()) });
        lines.extend(view.remedy.iter().map(|remedy| text(&format!("  {remedy}"))));
        lines.push(Line::default());
    }
    lines
}

/// Names are whatever somebody wrote.
fn text(words: &str) -> Line<'static> {
    Line::raw(escape::line(words))
}

fn table(view: &View, open: &Open) -> Vec<Line<'static>> {
    let connections = |address: &str| -> String {
        let count = address
            .parse()
            .ok()
            .zip(protocol(view))
            .and_then(|(at, protocol): (SocketAddr, u8)| open.of_backend(at.ip(), at.port(), protocol));
        count.map_or_else(|| "-".to_owned(), |count| count.to_string())
    };
    let node = |node: &Option<String>| node.clone().unwrap_or_else(|| "-".to_owned());
    let mut rows: Vec<[String; 5]> = Vec::new();
    for backend in view.endpoints.iter().take(LISTED) {
        let share = format!("{:.1}%", backend.share * 100.0);
        let state = backend.state.to_owned();
        rows.push([backend.address.clone(), share, connections(&backend.address), node(&backend.node), state]);
    }
    for backend in view.left_out.iter().take(LISTED) {
        let why = format!("out: {}", backend.why);
        rows.push([backend.address.clone(), "-".into(), connections(&backend.address), node(&backend.node), why]);
    }
    if rows.is_empty() {
        return Vec::new();
    }
    let mut rows: Vec<[String; 5]> = rows.iter().map(|row| row.clone().map(|cell| escape::line(&cell))).collect();
    rows.insert(0, ["BACKEND", "SHARE", "OPEN", "NODE", "STATE"].map(str::to_owned));
    // What no backend has is no column.
    let shown: Vec<usize> = (0..5).filter(|column| rows[1..].iter().any(|row| row[*column] != "-")).collect();
    let width = |column: usize| rows.iter().map(|row| Line::raw(row[column].as_str()).width()).max().unwrap_or(0);
    let widths: Vec<usize> = shown.iter().map(|column| width(*column)).collect();
    let mut lines: Vec<Line> = rows.iter().map(|row| aligned(row, &shown, &widths)).collect();
    let more = view.endpoints.len().saturating_sub(LISTED) + view.left_out.len().saturating_sub(LISTED);
    if more > 0 {
        lines.push(text(&format!("  and {more} more")));
    }
    lines
}

fn aligned(row: &[String; 5], shown: &[usize], widths: &[usize]) -> Line<'static> {
    let mut line = String::from(" ");
    for (column, width) in shown.iter().zip(widths) {
        let cell = &row[*column];
        line.push(' ');
        line.push_str(cell);
        line.extend(std::iter::repeat_n(' ', (width + 1).saturating_sub(Line::raw(cell.as_str()).width())));
    }
    Line::raw(line.trim_end().to_owned())
}

/// Of "IP:port/PROTOCOL".
fn protocol(view: &View) -> Option<u8> {
    let name = view.to.rsplit_once('/')?.1;
    let all = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    all.into_iter().find(|protocol| protocol.as_str() == name).map(|protocol| protocol as u8)
}
