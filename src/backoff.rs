//! When to try again what failed: later each time, up to a limit.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};

/// Of what all nodes ask of the API server: each delay is up to twice as long, by chance, so that they do not return to a
/// recovering server in step.
const OF_SERVER: ExponentialBuilder = doubling(Duration::from_millis(400), Duration::from_secs(15)).with_jitter();
/// Of what one daemon asks of its kernel; the longest is half of what makes the daemon unhealthy.
const OF_KERNEL: ExponentialBuilder = doubling(Duration::from_millis(100), Duration::from_secs(30));

const fn doubling(first: Duration, longest: Duration) -> ExponentialBuilder {
    ExponentialBuilder::new().with_factor(2.0).with_min_delay(first).with_max_delay(longest).without_max_times()
}

/// Delays without an end.
#[derive(Debug)]
pub struct Backoff {
    builder: ExponentialBuilder,
    delays: ExponentialBackoff,
}

impl Backoff {
    /// Delays of 0.4 to 0.8 s, doubling to 15 to 30 s.
    pub fn of_server() -> Self {
        Backoff::new(OF_SERVER)
    }

    /// Delays of 0.1 s, doubling to 30 s.
    pub fn of_kernel() -> Self {
        Backoff::new(OF_KERNEL)
    }

    fn new(builder: ExponentialBuilder) -> Self {
        Backoff { builder, delays: builder.build() }
    }

    /// The next delay.
    pub fn next(&mut self) -> Duration {
        self.delays.next().unwrap_or_default()
    }

    /// The next delay is a short one again.
    pub fn reset(&mut self) {
        self.delays = self.builder.build();
    }
}

/// Where nothing else is said, it is the server that is asked.
impl Default for Backoff {
    fn default() -> Self {
        Backoff::of_server()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_from_under_a_second_to_half_a_minute_and_start_again_after_a_success() {
        let (first, longest) = (Duration::from_millis(400), Duration::from_secs(15));
        let mut backoff = Backoff::of_server();
        let delays: Vec<Duration> = (0..1000).map(|_| backoff.next()).collect();
        assert!(delays[0] >= first && delays[0] <= first * 2, "{:?}", delays[0]);
        assert!(delays[10..].iter().all(|delay| *delay >= longest && *delay <= longest * 2));
        assert!(delays[10..].windows(2).any(|pair| pair[0] != pair[1]), "no jitter");
        backoff.reset();
        assert!(backoff.next() <= first * 2);
        let firsts: Vec<Duration> = (0..20).map(|_| Backoff::of_server().next()).collect();
        assert!(firsts.windows(2).any(|pair| pair[0] != pair[1]), "nodes that start together go on in step");
    }
}
