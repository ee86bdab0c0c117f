//! How often something may be read that costs more the more there is of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two looks at least.
pub const LEAST: Duration = Duration::from_secs(1);
/// What took a millisecond is read again after 0.4 s: a quarter of a percent of one processor.
const SHARE: u32 = 400;
/// A read that waited for a busy processor is no reason to wait for ever.
const MOST: Duration = Duration::from_secs(120);

/// What was read last.
#[derive(Debug)]
pub struct Paced<T> {
    latest: Option<(Arc<T>, Instant)>,
}

impl<T> Default for Paced<T> {
    fn default() -> Self {
        Paced { latest: None }
    }
}

impl<T> Paced<T> {
    /// What was read last, or what is read now if that is due.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn get(&mut self, now: Instant, read: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<Arc<T>> {
        if let Some((value, _)) = self.latest.as_ref().filter(|(_, due)| now < *due) {
            return Ok(Arc::clone(value));
        }
        let began = Instant::now();
        let value = Arc::new(read()?);
        let pause = (began.elapsed() * SHARE).clamp(LEAST, MOST);
        self.latest = Some((Arc::clone(&value), now + pause));
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_long_is_read_seldom() {
        let mut paced = Paced::default();
        let start = Instant::now();
        let slow = |value: u32| {
            move || {
                std::thread::sleep(Duration::from_millis(10));
                Ok(value)
            }
        };
        assert_eq!(*paced.get(start, slow(1)).unwrap(), 1);
        assert_eq!(*paced.get(start + Duration::from_millis(3900), slow(2)).unwrap(), 1);
        assert_eq!(*paced.get(start + Duration::from_secs(60), || Ok(3)).unwrap(), 3);
        assert_eq!(*paced.get(start + Duration::from_millis(60_900), || Ok(4)).unwrap(), 3);
        assert_eq!(*paced.get(start + Duration::from_secs(70), || Ok(5)).unwrap(), 5);
        let failed = paced.get(start + Duration::from_secs(80), || anyhow::bail!("the map is gone"));
        assert!(failed.is_err());
    }
}
