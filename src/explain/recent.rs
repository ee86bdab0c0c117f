//! The latest lines of this process's log, for whoever asks: no more than [`LINES`], and of each no more than [`LENGTH`].

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

const LINES: usize = 500;
/// Bytes.
const LENGTH: usize = 2000;

static LATEST: Mutex<VecDeque<String>> = Mutex::new(VecDeque::new());

/// The oldest first.
pub fn lines() -> Vec<String> {
    LATEST.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
}

/// Keeps a line, or its beginning.
pub fn note(line: &str) {
    let line = &line.as_bytes()[..line.len().min(LENGTH)];
    let line = String::from_utf8_lossy(line).trim_end().to_owned();
    let mut latest = LATEST.lock().unwrap_or_else(PoisonError::into_inner);
    if latest.len() == LINES {
        latest.pop_front();
    }
    latest.push_back(line);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_lines_are_kept_and_no_more() {
        (0..LINES + 3).for_each(|n| note(&format!("line {n}\n")));
        note(&"ß".repeat(LENGTH));
        let lines = lines();
        assert_eq!((lines.len(), lines[0].as_str()), (LINES, "line 4"));
        assert_eq!(lines[LINES - 1].len(), LENGTH);
    }
}
