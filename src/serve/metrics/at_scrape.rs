//! Families that others count: they are asked when somebody scrapes.

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{CounterVec, GaugeVec, Opts};

/// One sample: label values, value.
pub type Sample = (Vec<String>, f64);

pub type Read = Box<dyn Fn() -> Vec<Sample> + Send + Sync>;

/// A family whose samples are made anew at each scrape, so that two scrapes at once share nothing.
pub struct ReadAtScrape {
    pub options: Opts,
    pub labels: Vec<&'static str>,
    /// Counters; else gauges.
    pub counts: bool,
    pub desc: Vec<Desc>,
    pub read: Read,
}

impl ReadAtScrape {
    fn families(&self) -> prometheus::Result<Vec<MetricFamily>> {
        let samples = (self.read)();
        if self.counts {
            let family = CounterVec::new(self.options.clone(), &self.labels)?;
            for (labels, value) in samples {
                family.get_metric_with_label_values(&labels)?.inc_by(value);
            }
            return Ok(family.collect());
        }
        let family = GaugeVec::new(self.options.clone(), &self.labels)?;
        for (labels, value) in samples {
            family.get_metric_with_label_values(&labels)?.set(value);
        }
        Ok(family.collect())
    }
}

impl Collector for ReadAtScrape {
    fn desc(&self) -> Vec<&Desc> {
        self.desc.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.families().unwrap_or_else(|error| {
            tracing::warn!("metric {}: {error}", self.options.name);
            Vec::new()
        })
    }
}
