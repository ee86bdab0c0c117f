//! What keeps traffic from being served on this node, for as long as it does. Each such condition is a line in the log
//! when it comes up and one when it is over, one more in `kubelane_unserved`, and words in the answer of `/readyz`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::{info, warn};

use crate::serve::{Health, Metrics, Sample};

/// Why something is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// A program cannot be attached.
    NotAttached,
    /// Somebody takes a program off its hook whenever it is put back.
    Contested,
    /// A device's packets cannot be read.
    LinkLayer,
    /// There is no device where packets are met.
    NoDevice,
    /// Packets do not get to the program of a device.
    PacketsKeptAway,
}

/// Where a program was put back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Cgroup,
    Device,
}

impl Reason {
    const ALL: [Reason; 5] =
        [Reason::NotAttached, Reason::Contested, Reason::LinkLayer, Reason::NoDevice, Reason::PacketsKeptAway];

    fn as_str(self) -> &'static str {
        match self {
            Reason::NotAttached => "not_attached",
            Reason::Contested => "contested",
            Reason::LinkLayer => "link_layer",
            Reason::NoDevice => "no_device",
            Reason::PacketsKeptAway => "packets_kept_away",
        }
    }
}

#[derive(Default)]
struct Known {
    /// By what it is about (`device eth1`), with what to say of it.
    holding: BTreeMap<(String, Reason), String>,
    /// Programs that were put back, by [`Place`].
    restored: [u64; 2],
    health: Option<Arc<Health>>,
}

/// Shared by all that find such conditions.
#[derive(Clone, Default)]
pub struct Conditions(Arc<Mutex<Known>>);

impl Conditions {
    /// Told to `health` and `metrics`.
    ///
    /// # Errors
    /// When a metric's name is taken: a mistake in this file.
    pub fn new(health: Arc<Health>, metrics: &Metrics) -> anyhow::Result<Self> {
        let conditions = Conditions(Arc::new(Mutex::new(Known { health: Some(health), ..Known::default() })));
        let read = conditions.clone();
        let gauges = move || -> Vec<Sample> {
            let known = read.lock();
            let count = |reason| known.holding.keys().filter(|(_, held)| *held == reason).count();
            Reason::ALL.map(|reason| (vec![reason.as_str().to_owned()], count(reason) as f64)).into()
        };
        const UNSERVED: &str = "Conditions that keep traffic from being served now, by reason; the log says what to do";
        metrics.read_gauges("kubelane_unserved", UNSERVED, &["reason"], gauges)?;
        let read = conditions.clone();
        let counters = move || -> Vec<Sample> {
            let [cgroup, device] = read.lock().restored;
            [("cgroup", cgroup), ("device", device)].map(|(place, n)| (vec![place.to_owned()], n as f64)).into()
        };
        const RESTORED: &str =
            "Programs attached again after another process had detached them, by place (cgroup, device)";
        metrics.read_counters("kubelane_attachments_restored_total", RESTORED, &["place"], counters)?;
        Ok(conditions)
    }

    /// The condition holds; `detail` says what is not served, and what to do.
    pub fn holds(&self, subject: &str, reason: Reason, detail: &str) {
        let mut known = self.lock();
        let before = known.holding.insert((subject.to_owned(), reason), detail.to_owned());
        if before.as_deref() != Some(detail) {
            warn!("{subject}: {detail}");
            known.tell();
        }
    }

    /// The condition does not hold, or no longer.
    pub fn over(&self, subject: &str, reason: Reason) {
        let mut known = self.lock();
        if let Some(detail) = known.holding.remove(&(subject.to_owned(), reason)) {
            info!("{subject}: resolved: {detail}");
            known.tell();
        }
    }

    /// A program was put back.
    pub fn restored(&self, place: Place) {
        self.lock().restored[place as usize] += 1;
    }

    /// A holder that panicked has ended the daemon; until then what it knew is as good as any.
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn tell(&self) {
        let Some(health) = &self.health else { return };
        let lines: Vec<String> =
            self.holding.iter().map(|((subject, _), detail)| format!("{subject}: {detail}")).collect();
        health.unserved((!lines.is_empty()).then(|| lines.join("; ")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_are_shown_while_they_hold() {
        let (health, metrics) = (Arc::new(Health::default()), Metrics::new().unwrap());
        let conditions = Conditions::new(Arc::clone(&health), &metrics).unwrap();
        conditions.holds("device eth1", Reason::NotAttached, "busy");
        conditions.holds("connect4", Reason::Contested, "somebody");
        conditions.restored(Place::Device);
        let text = metrics.text().unwrap();
        for sample in [
            "kubelane_unserved{reason=\"not_attached\"} 1",
            "kubelane_unserved{reason=\"contested\"} 1",
            "kubelane_unserved{reason=\"no_device\"} 0",
            "kubelane_attachments_restored_total{place=\"cgroup\"} 0",
            "kubelane_attachments_restored_total{place=\"device\"} 1",
        ] {
            assert!(text.contains(sample), "{sample}: {text}");
        }
        conditions.over("device eth1", Reason::NotAttached);
        conditions.holds("device eth2", Reason::NotAttached, "busy");
        conditions.over("connect4", Reason::Contested);
        let text = metrics.text().unwrap();
        assert!(text.contains("not_attached\"} 1") && text.contains("contested\"} 0"), "{text}");
    }
}
