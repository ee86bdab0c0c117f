//! Lines: one for each event, and one for events that are not there.

use std::io::Write;

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::record::{Record, shown};
use crate::cli::escape;
use crate::cli::pipe::Pipe;
use crate::cli::snapshot::PortName;

/// What a line looks like.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// As few words as say it
    Compact,
    /// Columns
    Table,
    /// An object, which --input reads
    Json,
}

/// Events that are missing between two lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// The ring was full.
    pub lost: u64,
    /// Beyond --rate.
    pub limited: u64,
}

impl Gap {
    pub fn is_empty(self) -> bool {
        self == Gap::default()
    }
}

/// As JSON has it.
#[derive(Serialize)]
struct GapLine {
    event: &'static str,
    #[serde(flatten)]
    gap: Gap,
}

const HEADS: [&str; 10] =
    ["TIME", "EVENT", "VERDICT", "REASON", "PROTOCOL", "FROM", "TO", "SERVICE", "BACKEND", "PROCESS"];
/// Of the columns, and what is longer pushes the others aside: a stream does not know what is to come.
const WIDTHS: [usize; 10] = [15, 11, 10, 26, 8, 21, 21, 28, 21, 0];

/// Writes events.
pub struct Printer<W: Write> {
    out: Pipe<W>,
    output: Output,
    has_heads: bool,
}

impl<W: Write> Printer<W> {
    pub fn new(out: W, output: Output) -> Self {
        let has_heads = output == Output::Table;
        Printer { out: Pipe::new(out), output, has_heads }
    }

    pub fn event(&mut self, record: &Record) -> Result<()> {
        let line = match self.output {
            Output::Compact => compact(record),
            Output::Table => row(&cells(record)),
            Output::Json => serde_json::to_string(record).context("writing JSON")?,
        };
        self.line(&line)
    }

    pub fn gap(&mut self, gap: Gap) -> Result<()> {
        let line = match self.output {
            Output::Json => serde_json::to_string(&GapLine { event: "gap", gap }).context("writing JSON")?,
            Output::Compact | Output::Table => format!("-- {}", words(gap)),
        };
        self.line(&line)
    }

    /// Names are whatever somebody wrote, and so are processes'.
    fn line(&mut self, line: &str) -> Result<()> {
        if std::mem::take(&mut self.has_heads) {
            let heads = row(&HEADS.map(str::to_owned));
            self.put(&heads)?;
        }
        self.put(&escape::line(line))
    }

    fn put(&mut self, line: &str) -> Result<()> {
        self.out.put(&format!("{line}\n"))
    }

    pub fn flush(&mut self) -> Result<()> {
        self.out.flush()
    }

    /// Nobody reads any more, which is no failure.
    pub fn is_closed(&self) -> bool {
        self.out.is_closed()
    }
}

/// What is missing, in words.
pub fn words(gap: Gap) -> String {
    let mut parts = Vec::new();
    if gap.lost > 0 {
        parts.push(format!("{} events lost: they came faster than they were read", gap.lost));
    }
    if gap.limited > 0 {
        parts.push(format!("{} events not shown: beyond --rate", gap.limited));
    }
    parts.join("; ")
}

/// "12:34:56.123456" of an RFC 3339 time.
fn clock(time: &str) -> &str {
    time.split_once('T').map_or(time, |(_, clock)| clock.trim_end_matches('Z'))
}

/// "shop/web:http"
pub fn name(service: &PortName) -> String {
    let port = if service.port_name.is_empty() { String::new() } else { format!(":{}", service.port_name) };
    format!("{}/{}{port}", service.namespace, service.name)
}

/// "curl[4711]", "curl[4711]@web-0".
fn process(record: &Record) -> Option<String> {
    let process = record.process.as_ref()?;
    let pod = process.pod.as_ref().map(|pod| format!("@{pod}")).unwrap_or_default();
    Some(format!("{}[{}]{pod}", process.name, process.pid))
}

/// One line.
///
/// ```text
/// 12:34:56.123456 connect TCP curl[4711]@web-0 10.244.1.11 -> 10.96.0.80:80 (shop/web:http) => 10.244.2.5:8080, by chance
/// ```
pub fn compact(record: &Record) -> String {
    let mut line = format!("{} {} {}", clock(&record.time), record.event.as_str(), record.protocol);
    let mut add = |word: &str| {
        line.push(' ');
        line.push_str(word);
    };
    process(record).iter().for_each(|process| add(process));
    record.from.iter().for_each(|from| add(&shown(*from)));
    record.to.iter().for_each(|to| add(&format!("-> {}", shown(*to))));
    record.service.iter().for_each(|service| add(&format!("({})", name(service))));
    match (record.source, record.backend) {
        (Some(source), Some(backend)) => add(&format!("=> {} -> {}", shown(source), shown(backend))),
        (None, Some(backend)) => add(&format!("=> {}", shown(backend))),
        _ => {}
    }
    if let Some((from, to)) = record.about {
        add(&format!("about {} -> {}", shown(from), shown(to)));
    }
    record.passed_to.iter().for_each(|to| add(&format!("passed on to {}", shown(*to))));
    let lasted = record.seconds.map(|seconds| format!(" after {seconds} s")).unwrap_or_default();
    match record.why.as_str() {
        "" => line,
        why => format!("{line}: {why}{lasted} ({})", record.reason),
    }
}

fn cells(record: &Record) -> [String; 10] {
    let dash = || "-".to_owned();
    [
        clock(&record.time).to_owned(),
        record.event.as_str().to_owned(),
        record.verdict.as_str().to_owned(),
        record.reason.clone(),
        record.protocol.clone(),
        record.from.map_or_else(dash, shown),
        record.to.map_or_else(dash, shown),
        record.service.as_ref().map_or_else(dash, name),
        record.backend.or(record.passed_to).map_or_else(dash, shown),
        process(record).unwrap_or_else(dash),
    ]
}

fn row(cells: &[String; 10]) -> String {
    let mut line = String::new();
    for (cell, width) in cells.iter().zip(WIDTHS) {
        line.push_str(cell);
        let shown = escape::line(cell).chars().count();
        line.extend(std::iter::repeat_n(' ', width.saturating_sub(shown) + 1));
    }
    line.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::super::record::Process;
    use super::super::record::tests::record;
    use super::*;

    fn printed(output: Output, records: &[Record]) -> String {
        let mut text = Vec::new();
        let mut printer = Printer::new(&mut text, output);
        records.iter().for_each(|record| printer.event(record).unwrap());
        printer.gap(Gap { lost: 3, limited: 0 }).unwrap();
        printer.flush().unwrap();
        drop(printer);
        String::from_utf8(text).unwrap()
    }

    fn event() -> Record {
        record("172.31.0.1:40000", "172.31.0.11:30080", "172.31.0.11:61000", "10.244.2.5:8080")
    }

    #[test]
    fn each_output_has_one_line_an_event_and_says_what_is_lost() {
        let compact = printed(Output::Compact, &[event()]);
        assert_eq!(
            compact,
            "08:00:00.000001 flow-begun TCP 172.31.0.1:40000 -> 172.31.0.11:30080 (shop/web:http) => 172.31.0.11:61000 -> \
             10.244.2.5:8080: by chance (flow_remote)\n-- 3 events lost: they came faster than they were read\n"
        );
        let table = printed(Output::Table, &[event(), event()]);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 4, "{table}");
        assert!(lines[0].starts_with("TIME            EVENT       VERDICT"), "{table}");
        assert_eq!(lines[0].find("SERVICE"), lines[1].find("shop/web:http"), "{table}");
        let json = printed(Output::Json, &[event()]);
        let lines: Vec<serde_json::Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(
            (&lines[0]["backend"], &lines[1]["event"], &lines[1]["lost"]),
            (&serde_json::json!("10.244.2.5:8080"), &serde_json::json!("gap"), &serde_json::json!(3))
        );
    }

    #[test]
    fn names_that_a_terminal_would_act_upon_are_escaped_in_every_output() {
        let mut hostile = event();
        let name = "ev\x1b[2Jil\u{202e}\nx";
        hostile.process = Some(Process { name: name.into(), pid: 1, pod: Some(name.into()) });
        hostile.device = Some(name.into());
        hostile.service = Some(PortName { namespace: name.into(), name: name.into(), port_name: name.into() });
        for output in [Output::Compact, Output::Table, Output::Json] {
            let text = printed(output, &[hostile.clone()]);
            assert!(!text.contains(|c: char| (c.is_control() && c != '\n') || c == '\u{202e}'), "{text:?}");
            let lines = if output == Output::Table { 3 } else { 2 };
            assert_eq!(text.lines().count(), lines, "{text:?}");
            assert!(text.contains("\\u001b[2J") && text.contains("\\u202e"), "{text:?}");
        }
        let json = printed(Output::Json, &[hostile.clone()]);
        assert_eq!(serde_json::from_str::<Record>(json.lines().next().unwrap()).unwrap(), hostile);
    }

    #[test]
    fn that_nobody_reads_on_is_no_failure() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut printer = Printer::new(Closed, Output::Compact);
        printer.event(&event()).unwrap();
        printer.flush().unwrap();
        assert!(printer.is_closed());
    }
}
