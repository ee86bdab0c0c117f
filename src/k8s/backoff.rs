//! Exponential backoff with jitter, so that the nodes of a cluster do not return to a recovering API server in step.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

const FIRST: Duration = Duration::from_millis(800);
const LONGEST: Duration = Duration::from_secs(30);

/// Delays of 0.8 s doubling to 30 s, each of them by up to a half shorter.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The next delay.
    pub fn next(&mut self) -> Duration {
        let full = FIRST.saturating_mul(1 << self.failures.min(16)).min(LONGEST);
        self.failures += 1;
        full - full.mul_f64(fraction() / 2.0)
    }

    /// The next delay is a short one again.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

/// A random number in 0..1: `RandomState` is seeded by the operating system and differs from call to call.
pub(super) fn fraction() -> f64 {
    (RandomState::new().build_hasher().finish() >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_from_under_a_second_to_half_a_minute_and_start_again_after_a_success() {
        let mut backoff = Backoff::default();
        let delays: Vec<Duration> = (0..50).map(|_| backoff.next()).collect();
        assert!(delays[0] >= FIRST / 2 && delays[0] <= FIRST, "{:?}", delays[0]);
        assert!(delays[10..].iter().all(|d| *d <= LONGEST && *d >= LONGEST / 2));
        assert!(delays[10..].windows(2).any(|w| w[0] != w[1]), "no jitter");
        backoff.reset();
        assert!(backoff.next() <= FIRST);
    }
}
