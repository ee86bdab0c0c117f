//! An explanation as text. Views that say the same are told once, with all their destinations above.

use std::fmt::Write as _;

use super::Explanation;
use super::view::{Affinity, SourceRanges, View};
use crate::cli::escape;

/// Endpoints that are listed; with more, the rest is a number.
const LISTED: usize = 20;

/// Views that say the same.
pub struct Group<'a> {
    /// Of whom it is said: "TO (KINDS) from FROM".
    pub headings: Vec<String>,
    /// Any of them.
    pub view: &'a View,
    body: String,
}

/// In the order of the views.
pub fn groups(explanation: &Explanation) -> Vec<Group<'_>> {
    let mut groups: Vec<Group> = Vec::new();
    for view in &explanation.views {
        let kinds = if view.kinds.is_empty() { String::new() } else { format!(" ({})", view.kinds.join(", ")) };
        let (heading, body) = (format!("{}{kinds} from {}", view.to, view.from), body(view));
        match groups.iter_mut().find(|group| group.body == body) {
            Some(group) => group.headings.push(heading),
            None => groups.push(Group { headings: vec![heading], view, body }),
        }
    }
    groups
}

pub fn text(explanation: &Explanation) -> String {
    let mut text = String::new();
    for group in groups(explanation) {
        group.headings.iter().for_each(|heading| put(&mut text, heading));
        text += &group.body;
        text.push('\n');
    }
    match &explanation.daemon {
        None => put(&mut text, "The daemon does not answer: this comes from the maps alone, which lack some reasons."),
        Some(daemon) if !daemon.is_ready => put(&mut text, "The daemon has not listed all Services yet."),
        Some(daemon) if daemon.waits => put(&mut text, "The daemon has changes that are not in the kernel yet."),
        Some(_) => {}
    }
    let unserved = explanation.daemon.iter().filter_map(|daemon| daemon.unserved.as_ref());
    unserved.for_each(|what| put(&mut text, &format!("Not served on this node: {what}")));
    explanation.warnings.iter().for_each(|line| put(&mut text, &format!("Warning: {line}")));
    explanation.notes.iter().for_each(|line| put(&mut text, &format!("Note: {line}")));
    match explanation.disagreements.len() {
        0 if explanation.daemon.is_some() => put(&mut text, "The kernel and the daemon agree."),
        0 => {}
        _ => put(&mut text, "The kernel and the daemon DISAGREE:"),
    }
    explanation.disagreements.iter().for_each(|line| put(&mut text, &format!("  {line}")));
    text
}

/// One line, whatever the names in it are.
fn put(text: &mut String, line: &str) {
    text.push_str(escape::line(line).trim_end());
    text.push('\n');
}

fn row(text: &mut String, head: &str, words: &str) {
    put(text, &format!("  {head:<12}{words}"));
}

fn body(view: &View) -> String {
    let mut text = String::new();
    if let Some(service) = &view.service {
        let port = if service.port_name.is_empty() { String::new() } else { format!(", port {}", service.port_name) };
        row(&mut text, "Service", &format!("{}/{}{port}", service.namespace, service.name));
    }
    for (line, why) in view.pool.iter().flat_map(|pool| &pool.why).enumerate() {
        row(&mut text, if line == 0 { "Pool" } else { "" }, why);
    }
    view.affinity.iter().for_each(|known| row(&mut text, "Affinity", &affinity(known)));
    view.source_ranges.iter().for_each(|ranges| row(&mut text, "Ranges", &source_ranges(ranges)));
    if view.pool.is_some() {
        endpoints(&mut text, view);
    }
    row(&mut text, "Next", &view.next);
    view.remedy.iter().for_each(|remedy| row(&mut text, "", remedy));
    text
}

fn affinity(known: &Affinity) -> String {
    let seconds = known.seconds;
    match (&known.backend, known.left_seconds) {
        (Some(backend), Some(left)) => format!("by client, {seconds} s; this client has {backend} for {left} s more"),
        _ if known.is_known_client => format!("by client, {seconds} s; this client has no entry"),
        _ => format!("by client, {seconds} s; --from looks up a client"),
    }
}

fn source_ranges(ranges: &SourceRanges) -> String {
    let list = match ranges.ranges.len() {
        0 => "loadBalancerSourceRanges".to_owned(),
        n if n > LISTED => format!("{} and {} more", ranges.ranges[..LISTED].join(", "), n - LISTED),
        _ => ranges.ranges.join(", "),
    };
    match ranges.has_client {
        Some(true) => format!("{list}; the client is in them"),
        Some(false) => format!("{list}; the client is in none of them"),
        None => format!("{list}; other clients are dropped"),
    }
}

fn endpoints(text: &mut String, view: &View) {
    let mut lines = Vec::new();
    let percent = |share: f64| format!("{:.1}%", share * 100.0);
    for endpoint in view.endpoints.iter().take(LISTED) {
        let node = endpoint.node.clone().unwrap_or_default();
        lines.push([endpoint.address.clone(), percent(endpoint.share), endpoint.state.to_owned(), node]);
    }
    columns(text, "Endpoints", view.endpoints.len(), &lines);
    let mut lines = Vec::new();
    for endpoint in view.left_out.iter().take(LISTED) {
        let node = endpoint.node.clone().unwrap_or_default();
        lines.push([endpoint.address.clone(), node, endpoint.why.clone(), String::new()]);
    }
    if !lines.is_empty() {
        columns(text, "Left out", view.left_out.len(), &lines);
    }
}

/// How many there are, and a line for each of the first.
fn columns(text: &mut String, head: &str, count: usize, lines: &[[String; 4]]) {
    row(text, head, &count.to_string());
    let lines: Vec<[String; 4]> = lines.iter().map(|line| line.clone().map(|cell| escape::line(&cell))).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 4] = std::array::from_fn(width);
    for line in &lines {
        let mut words = String::new();
        for (cell, width) in line.iter().zip(widths) {
            let _ = write!(words, "{cell:<width$}  ");
        }
        row(text, "", &words);
    }
    if count > lines.len() {
        row(text, "", &format!("and {} more", count - lines.len()));
    }
}
