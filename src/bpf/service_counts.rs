//! How many connections, refusals and drops each Service had, if the programs count them.

use std::path::Path;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use super::batch::Batches;
use super::pinned;
use crate::abi::service_count::{self, SERVICE_COUNT_MAX};
use crate::abi::{ServiceName, counter};

const ROWS_AT_ONCE: usize = 1024;

/// The verdicts that are counted of Services, and the [`counter`] of the same name, by [`service_count`] less 1.
const VERDICTS: [u32; SERVICE_COUNT_MAX as usize - 1] = [
    counter::COUNTER_REFUSED_NO_ENDPOINT,
    counter::COUNTER_DROPPED_NO_LOCAL_ENDPOINT,
    counter::COUNTER_DROPPED_SOURCE_RANGE,
    counter::COUNTER_DROPPED_POD_QUOTA,
    counter::COUNTER_DROPPED_SNAT_EXHAUSTED,
    counter::COUNTER_DROPPED_SNAT_SOURCE,
    counter::COUNTER_DROPPED_NO_ROUTE,
    counter::COUNTER_DROPPED_FORWARDING_OFF,
    counter::COUNTER_DROPPED_FLOW_TABLE,
    counter::COUNTER_DROPPED_MARTIAN,
    counter::COUNTER_DROPPED_SCTP_PORT,
];

const _: () = {
    assert!(service_count::SERVICE_CONNECTIONS == 0);
    assert!(service_count::SERVICE_REFUSED_NO_ENDPOINT == 1);
    assert!(service_count::SERVICE_DROPPED_SCTP_PORT as usize == VERDICTS.len());
};

/// Handles on the counts, and on the names of those who have them.
pub struct ServiceCounts {
    counts: MapHandle,
    names: MapHandle,
}

/// What a Service port had since the daemon started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceCount {
    pub name: ServiceName,
    /// Connections, first datagrams of sockets, and flows.
    pub connections: u64,
    /// By [`ServiceCount::verdicts`].
    refused: [u64; VERDICTS.len()],
}

impl ServiceCount {
    /// As kubelane_datapath_verdicts_total names them, and how many there were, if any.
    pub fn verdicts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let all = VERDICTS.iter().zip(self.refused).filter(|(_, count)| *count > 0);
        all.filter_map(|(counter, count)| Some((counter::NAMES.get(*counter as usize)?.0, count)))
    }
}

impl ServiceCounts {
    pub(super) fn new(counts: MapHandle, pin_path: &Path) -> Result<ServiceCounts> {
        let names = pinned::maps_directory(pin_path).join("services");
        let names = MapHandle::from_pinned_path(&names).with_context(|| format!("cannot open {}", names.display()))?;
        Ok(ServiceCounts { counts, names })
    }

    /// The `most` Service ports with the most connections, refusals and drops, sorted by name. Reads the row of every
    /// Service that had one.
    ///
    /// # Errors
    /// When a map cannot be read.
    pub fn busiest(&self, most: usize) -> Result<Vec<ServiceCount>> {
        let mut rows: Vec<(u64, [u8; 4], [u64; SERVICE_COUNT_MAX as usize])> = Vec::new();
        let mut batches = Batches::new(&self.counts);
        loop {
            let batch = batches.next(&self.counts, ROWS_AT_ONCE).context("cannot read the counts of Services")?;
            for (id, values) in batch.rows() {
                let counts = sum(values);
                rows.extend(id.try_into().ok().map(|id| (counts.iter().sum(), id, counts)));
            }
            if batch.ended {
                break;
            }
        }
        rows.sort_unstable_by(|a, b| b.cmp(a));
        rows.truncate(most);
        let mut named = Vec::with_capacity(rows.len());
        for (_, id, [connections, refused @ ..]) in rows {
            let name = self.names.lookup(&id, MapFlags::ANY).context("cannot read the names of Services")?;
            // Without a name: the Service went a moment ago.
            if let Some(name) = name.and_then(|name| bytemuck::try_pod_read_unaligned::<ServiceName>(&name).ok()) {
                named.push(ServiceCount { name, connections, refused });
            }
        }
        named.sort_unstable_by_key(|count| count.name.text);
        Ok(named)
    }
}

/// Over the processors.
fn sum(values: &[u8]) -> [u64; SERVICE_COUNT_MAX as usize] {
    let mut sums = [0; SERVICE_COUNT_MAX as usize];
    for (at, value) in values.as_chunks::<8>().0.iter().enumerate() {
        sums[at % SERVICE_COUNT_MAX as usize] += u64::from_ne_bytes(*value);
    }
    sums
}
