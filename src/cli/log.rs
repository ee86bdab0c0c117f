//! Logs: to standard error, for people or as JSON.

use std::io::{self, IsTerminal as _, Write};

use tracing_subscriber::EnvFilter;

use super::escape;
use super::flags::{LogFlags, LogFormat};
use crate::explain::recent;

/// What `-v` is when nobody says it.
const DEFAULT_VERBOSITY: u8 = 2;

/// Standard error. What stands there is kept for who asks, and without what a terminal would act upon: names of objects are
/// whatever somebody wrote. One write is one line, as tracing makes them.
struct Line {
    has_colours: bool,
}

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let safe = escape::log(&String::from_utf8_lossy(line), self.has_colours);
        recent::note(&safe);
        io::stderr().write_all(safe.as_bytes())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Sets the process' log up.
///
/// # Errors
/// When $RUST_LOG is not a filter.
pub fn start(flags: LogFlags) -> anyhow::Result<()> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(text) if !text.is_empty() => {
            EnvFilter::try_new(&text).map_err(|e| anyhow::anyhow!("$RUST_LOG is {text:?}: {e}"))?
        }
        _ => EnvFilter::new(filter(flags.verbosity.unwrap_or(DEFAULT_VERBOSITY))),
    };
    let format = flags.log_format.unwrap_or(LogFormat::Human);
    let has_colours = format == LogFormat::Human && io::stderr().is_terminal();
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(move || Line { has_colours }).with_target(false);
    let result = match format {
        LogFormat::Human => builder.with_ansi(has_colours).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_target(true).try_init(),
    };
    result.map_err(|error| anyhow::anyhow!("setting up the log: {error}"))
}

/// Libraries speak only when asked for everything: kube logs each request at debug, and repeats each failed one, which
/// the sources explain once, at error.
fn filter(verbosity: u8) -> &'static str {
    match verbosity {
        0 => "warn,kube_client=off,kube_runtime=off",
        1..=3 => "warn,kubelane=info,kube_client=off,kube_runtime=off",
        4..=5 => "warn,kubelane=debug,kube_client=off,kube_runtime=off",
        6..=9 => "info,kubelane=trace,kube_client=debug,kube_runtime=debug",
        _ => "trace",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verbosity_is_a_valid_filter() {
        for verbosity in 0..=20 {
            EnvFilter::try_new(filter(verbosity)).unwrap();
        }
    }
}
