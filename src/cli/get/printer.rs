//! Writes rows as they come, in any format, and holds no more than the first of them: their cells say how wide the
//! columns of a table are.

use std::io::Write;

use anyhow::Result;
use serde_json::Value;

use super::format::Output;
use super::record::Record;
use crate::cli::escape;
use crate::cli::pipe::Pipe;

/// Rows that a table waits for before it begins.
const MEASURED: usize = 2000;
const GAP: usize = 3;

/// What a kind of rows is headed by.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub all: &'static [&'static str],
    /// As many of them are in the narrow table.
    pub narrow: usize,
}

/// Writes an answer.
pub struct Printer<W: Write> {
    out: Pipe<W>,
    output: Option<Output>,
    heads: Option<Vec<String>>,
    columns: usize,
    /// Rows of a table that has not begun.
    waiting: Vec<Vec<String>>,
    widths: Vec<usize>,
    rows: usize,
    /// Of a template, which is about all of them.
    values: Vec<Value>,
    last_name: String,
}

impl<W: Write> Printer<W> {
    /// `more`: columns before those of the records.
    pub fn new(out: W, output: Option<Output>, heads: Heads, more: &[&str], no_headers: bool) -> Self {
        let columns = if output == Some(Output::Wide) { heads.all.len() } else { heads.narrow };
        let shown = more.iter().chain(&heads.all[..columns]).map(|head| (*head).to_owned()).collect();
        Printer {
            out: Pipe::new(out),
            output,
            heads: Some(shown).filter(|_| !no_headers),
            columns,
            waiting: Vec::new(),
            widths: Vec::new(),
            rows: 0,
            values: Vec::new(),
            last_name: String::new(),
        }
    }

    /// True while somebody reads. `more`: cells before those of the record.
    pub fn row(&mut self, record: &dyn Record, more: &[&str]) -> Result<bool> {
        let is_first = self.rows == 0;
        self.rows += 1;
        match &self.output {
            Some(Output::Json) => {
                let item = record.pretty_json()?.replace('\n', "\n    ");
                let before = if is_first { "{\n  \"items\": [\n    " } else { ",\n    " };
                self.put(&format!("{before}{}", escape::lines(&item)))?;
            }
            Some(Output::Yaml) => {
                let item = record.yaml()?;
                let before = if is_first { "items:\n" } else { "" };
                self.put(&format!("{before}{}", escape::lines(&item)))?;
            }
            Some(Output::Name) => {
                let name = escape::line(&record.name());
                if name != self.last_name {
                    self.put(&format!("{name}\n"))?;
                    self.last_name = name;
                }
            }
            Some(Output::JsonPath(_)) => self.values.push(serde_json::from_str(&record.json()?)?),
            Some(Output::Wide | Output::Ipvsadm) | None => {
                let mut cells: Vec<String> = more.iter().map(|cell| (*cell).to_owned()).collect();
                cells.extend(record.cells().into_iter().take(self.columns).map(|cell| escape::line(&cell)));
                self.cells(cells)?;
            }
        }
        Ok(!self.out.is_closed())
    }

    fn cells(&mut self, cells: Vec<String>) -> Result<()> {
        if self.widths.is_empty() {
            self.waiting.push(cells);
            return if self.waiting.len() < MEASURED { Ok(()) } else { self.begin() };
        }
        self.line(&cells)
    }

    /// Writes what has waited, once it is known how wide the columns are.
    pub fn begin(&mut self) -> Result<()> {
        let waiting = std::mem::take(&mut self.waiting);
        let rows = self.heads.iter().chain(&waiting);
        for row in rows {
            self.widths.resize(row.len().max(self.widths.len()), 0);
            self.widths.iter_mut().zip(row).for_each(|(width, cell)| *width = (*width).max(cell.chars().count()));
        }
        if let Some(heads) = self.heads.take() {
            self.line(&heads)?;
        }
        waiting.iter().try_for_each(|row| self.line(row))?;
        self.flush()
    }

    fn line(&mut self, cells: &[String]) -> Result<()> {
        let mut line = String::new();
        for (cell, width) in cells.iter().zip(&self.widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width.saturating_sub(cell.chars().count()) + GAP));
        }
        self.put(&format!("{}\n", line.trim_end()))
    }

    /// Ends the answer.
    pub fn finish(mut self) -> Result<()> {
        match self.output.clone() {
            Some(Output::Json) if self.rows == 0 => self.put("{\n  \"items\": []\n}\n")?,
            Some(Output::Json) => self.put("\n  ]\n}\n")?,
            Some(Output::Yaml) if self.rows == 0 => self.put("items: []\n")?,
            Some(Output::JsonPath(template)) => {
                let all = serde_json::json!({"items": std::mem::take(&mut self.values)});
                self.put(&escape::lines(&template.render(&all)))?;
            }
            Some(Output::Wide | Output::Ipvsadm) | None if self.widths.is_empty() => self.begin()?,
            _ => {}
        }
        self.flush()
    }

    /// Writes a text that is safe.
    pub fn put(&mut self, text: &str) -> Result<()> {
        self.out.put(text)
    }

    pub fn flush(&mut self) -> Result<()> {
        self.out.flush()
    }

    pub fn is_closed(&self) -> bool {
        self.out.is_closed()
    }
}
