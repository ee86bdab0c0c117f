//! Rates from counters that are looked at now and then.

use std::time::{Duration, Instant};

use crate::table::HashMap;

/// Between two looks at the counts of Services (`agent/service_counts.rs`), which is how often these counters move.
pub const COUNTED_EVERY: Duration = Duration::from_secs(5);

/// Of counters that always are what they say.
#[derive(Debug, Default)]
pub struct Rates(Option<(Instant, Vec<u64>)>);

impl Rates {
    /// How much each grew in a second since the last look. `None`: there was none, or it was of other counters.
    pub fn note(&mut self, totals: &[u64], now: Instant) -> Vec<Option<f64>> {
        let before = self.0.replace((now, totals.to_vec()));
        let rate = |(index, total): (usize, &u64)| {
            let (at, totals) = before.as_ref()?;
            let seconds = now.saturating_duration_since(*at).as_secs_f64();
            let grown = total.checked_sub(*totals.get(index)?)?;
            (seconds > 0.0).then(|| grown as f64 / seconds)
        };
        totals.iter().enumerate().map(rate).collect()
    }
}

/// Of what is counted of Services, by "namespace/name:port".
#[derive(Debug, Default)]
pub struct ServiceRates {
    counts: HashMap<String, f64>,
    /// When these were first seen.
    since: Option<Instant>,
    rates: HashMap<String, f64>,
}

impl ServiceRates {
    /// How much came in a second. Of those that had no count before, nothing is known.
    pub fn note(&mut self, counts: HashMap<String, f64>, now: Instant) -> &HashMap<String, f64> {
        let Some(since) = self.since else {
            (self.counts, self.since) = (counts, Some(now));
            return &self.rates;
        };
        let seen = now.saturating_duration_since(since);
        if counts != self.counts {
            // They were counted that many times meanwhile, however late it was seen.
            let times = (seen.as_secs_f64() / COUNTED_EVERY.as_secs_f64()).round().max(1.0);
            let seconds = times * COUNTED_EVERY.as_secs_f64();
            let rate = |(name, count): (&String, &f64)| {
                let grown = count - self.counts.get(name)?;
                (grown >= 0.0).then(|| (name.clone(), grown / seconds))
            };
            self.rates = counts.iter().filter_map(rate).collect();
            (self.counts, self.since) = (counts, Some(now));
        } else if seen >= COUNTED_EVERY * 2 {
            self.rates = counts.into_keys().map(|name| (name, 0.0)).collect();
        }
        &self.rates
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_that_began_anew_has_no_rate() {
        let mut rates = Rates::default();
        let start = Instant::now();
        assert_eq!(rates.note(&[100, 5], start), [None, None]);
        assert_eq!(rates.note(&[300, 5], start + Duration::from_secs(2)), [Some(100.0), Some(0.0)]);
        assert_eq!(rates.note(&[0, 6, 1], start + Duration::from_secs(4)), [None, Some(0.5), None]);
    }

    #[test]
    fn connections_that_are_counted_every_five_seconds_have_an_even_rate() {
        let mut rates = ServiceRates::default();
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let counts = |web: f64, dns: f64| -> HashMap<String, f64> {
            [("shop/web:http".to_owned(), web), ("kube-system/dns".to_owned(), dns)].into_iter().collect()
        };
        assert!(rates.note(counts(1000.0, 7.0), at(0.0)).is_empty());
        assert!(rates.note(counts(1000.0, 7.0), at(2.0)).is_empty());
        // Counted at 3.1, 8.1 and 13.1 s; looked at every 2 s, and once late.
        for (look, web) in [(4.0, 1500.0), (6.0, 1500.0), (8.0, 1500.0), (10.0, 2000.0), (14.4, 2500.0)] {
            let now = rates.note(counts(web, 7.0), at(look));
            assert_eq!((now["shop/web:http"], now["kube-system/dns"]), (100.0, 0.0), "at {look}");
        }
        let now = rates.note(counts(2500.0, 7.0), at(25.0));
        assert_eq!(now["shop/web:http"], 0.0, "nothing came any more");
        let mut more = counts(2600.0, 3.0);
        more.insert("new/one".to_owned(), 50.0);
        let now = rates.note(more, at(30.0));
        assert_eq!(now.get("new/one"), None, "it was not counted before");
        assert_eq!(now.get("kube-system/dns"), None, "its count began anew");
    }
}
