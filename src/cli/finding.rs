//! What `kubelane check` prints, line by line.

use std::fmt;

/// How a condition stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    Ok,
    /// Something is missing or in the way; the daemon runs nevertheless.
    Warn,
    /// The daemon would not run, or had nothing to serve.
    Fail,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Finding {
    pub level: Level,
    what: &'static str,
    pub detail: String,
    pub remedy: String,
}

impl Finding {
    pub(super) fn ok(what: &'static str, detail: impl Into<String>) -> Self {
        Finding { level: Level::Ok, what, detail: detail.into(), remedy: String::new() }
    }

    pub(super) fn warn(what: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Finding { level: Level::Warn, what, detail: detail.into(), remedy: remedy.into() }
    }

    pub(super) fn fail(what: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Finding { level: Level::Fail, what, detail: detail.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = match self.level {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        write!(f, "{level:<5} {:<36} {}", self.what, self.detail)?;
        if !self.remedy.is_empty() {
            write!(f, " -> {}", self.remedy)?;
        }
        Ok(())
    }
}
