//! Events of before: the lines that `-o json` wrote to a file.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use super::print::Gap;
use super::record::Record;

/// Bytes of a line; one that an event has is shorter by far.
const LONGEST: u64 = 64 << 10;

/// The earliest time that is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Since(Timestamp);

impl FromStr for Since {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(time) = text.parse::<Timestamp>() {
            return Ok(Since(time));
        }
        let ago = text.parse::<SignedDuration>().ok().filter(|ago| !ago.is_negative());
        let time = ago.and_then(|ago| Timestamp::now().checked_sub(ago).ok());
        time.map(Since).ok_or_else(|| {
            "a time such as 2026-11-29T08:00:00Z is expected, or how long ago: 30s, 5m, 2h30m".to_owned()
        })
    }
}

impl Since {
    pub fn takes(self, record: &Record) -> bool {
        record.time.parse::<Timestamp>().is_ok_and(|time| time >= self.0)
    }
}

/// What a line of a file is.
#[derive(Debug, PartialEq)]
pub enum Line {
    Event(Box<Record>),
    Gap(Gap),
}

/// A file that is read to its end, and on from there when it has grown.
pub struct History {
    name: String,
    file: BufReader<File>,
    number: usize,
    /// The beginning of a line that is still being written.
    begun: Vec<u8>,
}

impl History {
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(path: &Path) -> Result<History> {
        let name = path.display().to_string();
        let file = File::open(path).with_context(|| format!("cannot open {name}"))?;
        Ok(History { name, file: BufReader::new(file), number: 0, begun: Vec::new() })
    }

    /// The next line; `None` at the end, for now.
    ///
    /// # Errors
    /// When the file cannot be read, or a line is none that `-o json` writes.
    pub fn next(&mut self) -> Result<Option<Line>> {
        let left = LONGEST.saturating_sub(self.begun.len() as u64);
        let read = (&mut self.file).take(left).read_until(b'\n', &mut self.begun);
        read.with_context(|| format!("cannot read {}", self.name))?;
        if self.begun.last() != Some(&b'\n') {
            if self.begun.len() as u64 >= LONGEST {
                bail!("{}, line {}: it is longer than any event", self.name, self.number + 1);
            }
            return Ok(None);
        }
        self.number += 1;
        let line = parse(&self.begun);
        self.begun.clear();
        line.map(Some).with_context(|| format!("{}, line {}: no event of `monitor -o json`", self.name, self.number))
    }
}

fn parse(line: &[u8]) -> Result<Line> {
    let value: Value = serde_json::from_slice(line)?;
    Ok(match value["event"] == "gap" {
        true => Line::Gap(serde_json::from_value(value)?),
        false => Line::Event(serde_json::from_value(value)?),
    })
}

/// The last `most` events that are put into it, with the gaps between them; `None`: all of them, at once.
pub struct Last {
    most: Option<usize>,
    kept: VecDeque<Line>,
    events: usize,
}

impl Last {
    pub fn new(most: Option<usize>) -> Last {
        Last { most, kept: VecDeque::new(), events: 0 }
    }

    /// What is shown now.
    pub fn put(&mut self, line: Line) -> Option<Line> {
        let Some(most) = self.most else { return Some(line) };
        self.events += usize::from(matches!(line, Line::Event(_)));
        self.kept.push_back(line);
        while self.events > most || matches!(self.kept.front(), Some(Line::Gap(_))) {
            let Some(gone) = self.kept.pop_front() else { break };
            self.events -= usize::from(matches!(gone, Line::Event(_)));
        }
        None
    }

    /// The last ones; from now on everything is shown at once.
    pub fn finish(&mut self) -> impl Iterator<Item = Line> + use<> {
        self.most = None;
        std::mem::take(&mut self.kept).into_iter()
    }
}

/// Between two looks at a file that may have grown.
pub const LOOK_EVERY: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::super::record::tests::record;
    use super::*;

    fn event(time: &str) -> Record {
        let mut event = record("172.31.0.1:1", "172.31.0.11:2", "172.31.0.11:3", "10.244.2.5:4");
        event.time = time.to_owned();
        event
    }

    #[test]
    fn a_file_is_read_line_by_line_and_on_from_its_end() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let mut history = History::open(file.path()).unwrap();
        assert_eq!(history.next().unwrap(), None);
        let text = serde_json::to_string(&event("2026-11-29T08:00:00Z")).unwrap();
        file.write_all(&text.as_bytes()[..40]).unwrap();
        assert_eq!(history.next().unwrap(), None, "the line is not whole yet");
        file.write_all(&text.as_bytes()[40..]).unwrap();
        file.write_all(b"\n{\"event\":\"gap\",\"lost\":7,\"limited\":0}\n").unwrap();
        assert_eq!(history.next().unwrap(), Some(Line::Event(Box::new(event("2026-11-29T08:00:00Z")))));
        assert_eq!(history.next().unwrap(), Some(Line::Gap(Gap { lost: 7, limited: 0 })));
        assert_eq!(history.next().unwrap(), None);
        file.write_all(b"{\"event\":\"party\"}\n").unwrap();
        let error = format!("{:#}", history.next().unwrap_err());
        assert!(error.contains("line 3: no event"), "{error}");
        file.write_all(&[b'x'; 70_000]).unwrap();
        assert!(format!("{:#}", history.next().unwrap_err()).contains("longer than any event"));
    }

    #[test]
    fn the_last_events_are_kept_with_what_is_missing_between_them() {
        let gap = || Line::Gap(Gap { lost: 1, limited: 0 });
        let of = |n: u32| Line::Event(Box::new(event(&format!("2026-11-29T08:00:0{n}Z"))));
        let mut last = Last::new(Some(2));
        for line in [gap(), of(1), gap(), of(2), gap(), of(3)] {
            assert_eq!(last.put(line), None);
        }
        assert_eq!(last.finish().collect::<Vec<_>>(), [of(2), gap(), of(3)]);
        assert_eq!(last.put(of(4)), Some(of(4)));
        assert_eq!(Last::new(None).put(of(1)), Some(of(1)));
    }

    #[test]
    fn since_is_a_time_or_how_long_ago() {
        let since: Since = "2026-11-29T08:00:01Z".parse().unwrap();
        assert!(!since.takes(&event("2026-11-29T08:00:00.999999Z")) && since.takes(&event("2026-11-29T08:00:01Z")));
        let recent: Since = "5m".parse().unwrap();
        let ago = |seconds| Timestamp::now().checked_sub(SignedDuration::from_secs(seconds)).unwrap().to_string();
        assert!(recent.takes(&event(&ago(299))) && !recent.takes(&event(&ago(301))));
        for bad in ["", "soon", "-5m", "5", "yesterday"] {
            assert!(bad.parse::<Since>().is_err(), "{bad}");
        }
    }
}
