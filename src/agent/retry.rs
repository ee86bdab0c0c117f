//! When the worker tries again: a pure state machine that is told the time.

use std::time::Instant;

use crate::backoff::Backoff;

/// One daemon writes to one kernel, so that jitter has no use.
#[derive(Debug)]
pub struct Retry {
    backoff: Backoff,
    due: Option<Instant>,
}

impl Default for Retry {
    fn default() -> Self {
        Retry { backoff: Backoff::of_kernel(), due: None }
    }
}

impl Retry {
    /// An attempt failed. One made before its time (an event came) changes nothing: a flood of events must not put the
    /// next attempt off further and further.
    pub fn failed(&mut self, now: Instant) {
        if self.due.is_none_or(|due| now >= due) {
            self.due = Some(now + self.backoff.next());
        }
    }

    /// An attempt succeeded.
    pub fn succeeded(&mut self) {
        *self = Retry::default();
    }

    /// When to try again; `None` when nothing failed.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_are_further_and_further_apart_until_one_succeeds() {
        let mut now = Instant::now();
        let mut retry = Retry::default();
        assert_eq!(retry.due(), None);
        let mut delays = Vec::new();
        for _ in 0..11 {
            retry.failed(now);
            let due = retry.due().unwrap();
            retry.failed(now + (due - now) / 2);
            assert_eq!(retry.due(), Some(due), "an early attempt counted");
            delays.push((due - now).as_millis());
            now = due;
        }
        assert_eq!(delays, [100, 200, 400, 800, 1600, 3200, 6400, 12_800, 25_600, 30_000, 30_000]);
        retry.succeeded();
        assert_eq!(retry.due(), None);
        retry.failed(now);
        assert_eq!((retry.due().unwrap() - now).as_millis(), 100);
    }
}
