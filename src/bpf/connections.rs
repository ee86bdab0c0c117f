//! How many connections each Service had, if the programs count them.

use std::path::Path;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use super::batch::Batches;
use super::pinned;
use crate::abi::ServiceName;

const ROWS_AT_ONCE: usize = 1024;

/// Handles on the counts, and on the names of those who have them.
pub struct ServiceConnections {
    counts: MapHandle,
    names: MapHandle,
}

impl ServiceConnections {
    pub(super) fn new(counts: MapHandle, pin_path: &Path) -> Result<ServiceConnections> {
        let names = pinned::maps_directory(pin_path).join("services");
        let names = MapHandle::from_pinned_path(&names).with_context(|| format!("cannot open {}", names.display()))?;
        Ok(ServiceConnections { counts, names })
    }

    /// The `most` Service ports with the most connections since the daemon started, and how many those are; sorted by
    /// name. Reads the count of every Service that had one.
    pub fn busiest(&self, most: usize) -> Result<Vec<(ServiceName, u64)>> {
        let mut counts: Vec<(u64, [u8; 4])> = Vec::new();
        let mut batches = Batches::new(&self.counts);
        loop {
            let batch = batches.next(&self.counts, ROWS_AT_ONCE).context("cannot read the counts of Services")?;
            counts.extend(batch.rows().filter_map(|(id, values)| Some((sum(values), id.try_into().ok()?))));
            if batch.ended {
                break;
            }
        }
        counts.sort_unstable_by(|a, b| b.cmp(a));
        counts.truncate(most);
        let mut named = Vec::with_capacity(counts.len());
        for (count, id) in counts {
            let name = self.names.lookup(&id, MapFlags::ANY).context("cannot read the names of Services")?;
            // Without a name: the Service went a moment ago.
            if let Some(name) = name.and_then(|name| bytemuck::try_pod_read_unaligned::<ServiceName>(&name).ok()) {
                named.push((name, count));
            }
        }
        named.sort_unstable_by_key(|(name, _)| name.text);
        Ok(named)
    }
}

/// Over the processors.
fn sum(values: &[u8]) -> u64 {
    values.as_chunks::<8>().0.iter().map(|value| u64::from_ne_bytes(*value)).sum()
}
