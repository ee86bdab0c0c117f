//! Families that others count: they are asked when somebody scrapes.

use prometheus::core::{Collector, Desc};
use prometheus::proto::{Bucket, Histogram, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{CounterVec, GaugeVec, Opts};

/// One sample: label values, value.
pub type Sample = (Vec<String>, f64);

/// How often something took how long.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Durations {
    /// Upper limit in seconds, and how many took no longer; the last has all.
    pub buckets: Vec<(f64, u64)>,
    /// Seconds of all together.
    pub sum: f64,
}

/// What is asked for samples.
pub enum Read {
    Counters(Box<dyn Fn() -> Vec<Sample> + Send + Sync>),
    Gauges(Box<dyn Fn() -> Vec<Sample> + Send + Sync>),
    Histograms(Box<dyn Fn() -> Vec<(Vec<String>, Durations)> + Send + Sync>),
}

/// A family whose samples are made anew at each scrape, so that two scrapes at once share nothing.
pub struct ReadAtScrape {
    pub options: Opts,
    pub labels: Vec<&'static str>,
    pub desc: Vec<Desc>,
    pub read: Read,
}

impl ReadAtScrape {
    fn families(&self) -> prometheus::Result<Vec<MetricFamily>> {
        match &self.read {
            Read::Counters(read) => {
                let family = CounterVec::new(self.options.clone(), &self.labels)?;
                for (labels, value) in read() {
                    family.get_metric_with_label_values(&labels)?.inc_by(value);
                }
                Ok(family.collect())
            }
            Read::Gauges(read) => {
                let family = GaugeVec::new(self.options.clone(), &self.labels)?;
                for (labels, value) in read() {
                    family.get_metric_with_label_values(&labels)?.set(value);
                }
                Ok(family.collect())
            }
            Read::Histograms(read) => Ok(vec![self.histograms(read())]),
        }
    }

    /// The crate's own histograms can only observe one value after the other.
    fn histograms(&self, samples: Vec<(Vec<String>, Durations)>) -> MetricFamily {
        let metric = |(labels, durations): (Vec<String>, Durations)| {
            let mut histogram = Histogram::default();
            histogram.set_sample_count(durations.buckets.last().map_or(0, |(_, count)| *count));
            histogram.set_sample_sum(durations.sum);
            let bucket = |(limit, count): &(f64, u64)| {
                let mut bucket = Bucket::default();
                bucket.set_upper_bound(*limit);
                bucket.set_cumulative_count(*count);
                bucket
            };
            // The encoder adds the one without a limit.
            let limited = durations.buckets.iter().filter(|(limit, _)| limit.is_finite());
            histogram.set_bucket(limited.map(bucket).collect());
            let pair = |(name, value): (&&str, String)| {
                let mut pair = LabelPair::default();
                pair.set_name((*name).to_owned());
                pair.set_value(value);
                pair
            };
            let mut metric = Metric::default();
            metric.set_label(self.labels.iter().zip(labels).map(pair).collect());
            metric.set_histogram(histogram);
            metric
        };
        let mut family = MetricFamily::default();
        family.set_name(self.options.name.clone());
        family.set_help(self.options.help.clone());
        family.set_field_type(MetricType::HISTOGRAM);
        family.set_metric(samples.into_iter().map(metric).collect());
        family
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
