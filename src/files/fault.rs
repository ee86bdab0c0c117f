//! What is wrong with a file.

use std::fmt;

/// Why a file cannot be used, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// From 1; 0 when the fault is not in a line.
    pub line: usize,
    pub reason: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => f.write_str(&self.reason),
            line => write!(f, "line {line}: {}", self.reason),
        }
    }
}

impl Fault {
    /// `line` as the field.
    pub fn new(line: usize, reason: impl Into<String>) -> Self {
        Fault { line, reason: reason.into() }
    }

    /// `first` is the line of the file on which the parsed text begins.
    pub fn json(error: &serde_json::Error, first: usize) -> Self {
        let text = error.to_string();
        let reason = text.rsplit_once(" at line ").map_or(text.as_str(), |(reason, _)| reason);
        Fault::new(first + error.line().max(1) - 1, reason)
    }

    /// The same.
    pub fn yaml(error: &serde_norway::Error, first: usize) -> Self {
        let text = error.to_string();
        let reason = text.split(" at line ").next().unwrap_or_default();
        Fault::new(first + error.location().map_or(1, |l| l.line()) - 1, reason)
    }
}
