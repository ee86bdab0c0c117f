//! How full the maps are that nobody but the programs fills: they are counted, because the kernel does not say.

use std::path::Path;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapHandle};

use super::batch::Batches;
use super::pinned;

/// Those that are not counted for another reason anyway: tables of flows by their collector, what the daemon writes by
/// its own tables. Storage of sockets has no bound.
const MAPS: [&str; 6] = ["affinities", "new_affinities", "devices", "fragments", "handed", "outgoing"];
const ROWS_AT_ONCE: usize = 1024;

/// Handles on these maps.
pub struct MapUsage(Vec<(&'static str, MapHandle)>);

impl MapUsage {
    /// Opens the maps pinned below `pin_path`.
    pub fn open(pin_path: &Path) -> Result<MapUsage> {
        let open = |name: &'static str| Ok((name, pinned::open_map(pin_path, name)?));
        Ok(MapUsage(MAPS.into_iter().map(open).collect::<Result<_>>()?))
    }

    /// Of each map its name, rows in use, and rows that fit. Walks through all rows: some milliseconds when all are full.
    pub fn count(&self) -> Result<Vec<(&'static str, usize, usize)>> {
        let count = |(name, map): &(&'static str, MapHandle)| {
            let rows = count_rows(map).with_context(|| format!("cannot read the map {name}"))?;
            Ok((*name, rows, map.max_entries() as usize))
        };
        self.0.iter().map(count).collect()
    }
}

fn count_rows(map: &MapHandle) -> std::io::Result<usize> {
    let mut batches = Batches::new(map);
    let mut rows = 0;
    loop {
        let batch = batches.next(map, ROWS_AT_ONCE)?;
        rows += batch.len();
        if batch.ended {
            return Ok(rows);
        }
    }
}
