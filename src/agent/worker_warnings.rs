//! Warnings about objects as lines of the log: with fields for machines, and no more of them than a log can bear. Metrics
//! and events tell of all.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::model::Warning;

/// Lines that may come at once, and how long each takes to be allowed again.
const BURST: u32 = 100;
const PAUSE: Duration = Duration::from_secs(1);
/// How often it is said that lines are left out.
const REMINDER: Duration = Duration::from_secs(60);

/// What may be written.
#[derive(Debug, Default)]
pub struct WarningLog {
    /// Lines that have been written and are not allowed again yet.
    taken: u32,
    /// When the first of these will be.
    next: Option<Instant>,
    left_out: u64,
    reminded: Option<Instant>,
}

impl WarningLog {
    /// Writes what appeared and what holds no longer. `now` never goes back.
    pub fn tell(&mut self, appeared: &[Warning], resolved: &[Warning], now: Instant) {
        for warning in appeared.iter().filter(|_| self.may_write(now)) {
            let (kind, object) = parts(warning);
            warn!(kind, object, "{}: {}", warning.subject, warning.message);
        }
        for warning in resolved.iter().filter(|_| self.may_write(now)) {
            let (kind, object) = parts(warning);
            info!(kind, object, "{}: resolved: {}", warning.subject, warning.message);
        }
        let is_due = self.reminded.is_none_or(|at| now.duration_since(at) >= REMINDER);
        if self.left_out > 0 && is_due {
            self.reminded = Some(now);
            let lines = std::mem::take(&mut self.left_out);
            warn!(
                lines,
                "too many warnings about objects: some lines are left out; kubelane_warnings counts all active warnings"
            );
        }
    }

    fn may_write(&mut self, now: Instant) -> bool {
        while let Some(at) = self.next.filter(|at| *at <= now) {
            self.taken -= 1;
            self.next = (self.taken > 0).then_some(at + PAUSE);
        }
        if self.taken == BURST {
            self.left_out += 1;
            return false;
        }
        self.taken += 1;
        self.next.get_or_insert(now + PAUSE);
        true
    }
}

/// The kind of the object, and its name.
fn parts(warning: &Warning) -> (&str, &str) {
    warning.subject.split_once(' ').unwrap_or(("", &warning.subject))
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What `tell` writes as JSON, line by line.
    fn written(
        log: &mut WarningLog,
        appeared: &[Warning],
        resolved: &[Warning],
        now: Instant,
    ) -> Vec<serde_json::Value> {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber =
            tracing_subscriber::fmt().json().flatten_event(true).with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, || log.tell(appeared, resolved, now));
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn warnings(count: usize) -> Vec<Warning> {
        let warning = |n| Warning { subject: format!("Service shop/web-{n}"), message: "has no port".into() };
        (0..count).map(warning).collect()
    }

    #[test]
    fn a_line_names_the_object_in_fields() {
        let lines = written(&mut WarningLog::default(), &warnings(1), &warnings(1), Instant::now());
        let field = |line: usize, name: &str| lines[line][name].as_str().unwrap().to_owned();
        for (line, message) in ["has no port", "resolved: has no port"].into_iter().enumerate() {
            assert_eq!((field(line, "kind"), field(line, "object")), ("Service".into(), "shop/web-0".into()));
            assert_eq!(field(line, "message"), format!("Service shop/web-0: {message}"));
        }
    }

    #[test]
    fn a_flood_of_warnings_is_a_hundred_lines_and_one_each_second_after_that() {
        let (mut log, start) = (WarningLog::default(), Instant::now());
        let lines = written(&mut log, &warnings(1000), &warnings(1000), start);
        assert_eq!((lines.len(), lines[100]["lines"].as_u64()), (101, Some(1900)));
        assert_eq!(written(&mut log, &warnings(50), &[], start + PAUSE * 3).len(), 3);
        assert_eq!(written(&mut log, &warnings(50), &[], start + PAUSE * 60).len(), 51, "and the reminder");
        assert_eq!(written(&mut log, &warnings(200), &[], start + PAUSE * 999).len(), 101);
    }
}
