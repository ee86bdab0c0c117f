//! Reads what the pinned maps of a former daemon hold.

use anyhow::{Context as _, Result, ensure};
use bytemuck::Pod;

use super::{MapIo, MapName};
use crate::plan::adopt::Found;

/// # Errors
/// A map could not be read to its end, or has rows of another size.
pub(super) fn read(io: &mut dyn MapIo) -> Result<Found> {
    Ok(Found {
        names: dump(io, MapName::Services)?,
        backends: dump(io, MapName::Backends)?,
        slots: dump(io, MapName::Slots)?,
        frontends: dump(io, MapName::Frontends)?,
        addresses: dump(io, MapName::Addresses)?,
        source_ranges: dump(io, MapName::SourceRanges)?,
    })
}

fn dump<K: Pod + Ord, V: Pod>(io: &mut dyn MapIo, map: MapName) -> Result<Vec<(K, V)>> {
    let mut rows = Vec::new();
    let mut misfits = 0;
    let mut each = |key: &[u8], value: &[u8]| match (
        bytemuck::try_pod_read_unaligned(key),
        bytemuck::try_pod_read_unaligned(value),
    ) {
        (Ok(key), Ok(value)) => rows.push((key, value)),
        _ => misfits += 1,
    };
    io.dump(map, &mut each).with_context(|| format!("reading the pinned map {}", map.as_str()))?;
    ensure!(misfits == 0, "the pinned map {} has rows of another size", map.as_str());
    rows.sort_unstable_by_key(|(key, _)| *key);
    Ok(rows)
}
