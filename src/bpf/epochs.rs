//! The map `epochs`: what the daemon counts up when records of the datapath may be out of date.

use std::path::Path;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use super::pinned;
use crate::abi::epoch::EPOCH_ROUTES;

/// Tells the packet programs that routes have changed: what they remember of them is asked for again.
pub struct RouteEpoch(MapHandle);

impl RouteEpoch {
    /// Opens the map pinned below `pin_path`.
    pub fn open(pin_path: &Path) -> Result<RouteEpoch> {
        open(pin_path).map(RouteEpoch)
    }

    pub fn advance(&self) -> Result<()> {
        count_up(&self.0, EPOCH_ROUTES)
    }
}

pub(super) fn open(pin_path: &Path) -> Result<MapHandle> {
    let path = pinned::maps_directory(pin_path).join("epochs");
    MapHandle::from_pinned_path(&path).with_context(|| format!("cannot open the pinned map {}", path.display()))
}

/// Counts an element up. Each has one writer.
pub(super) fn count_up(epochs: &MapHandle, index: u32) -> Result<()> {
    let key = index.to_ne_bytes();
    let value = epochs.lookup(&key, MapFlags::ANY).context("cannot read the map epochs")?.unwrap_or_default();
    let next = value.try_into().map_or(0, u32::from_ne_bytes).wrapping_add(1);
    epochs.update(&key, &next.to_ne_bytes(), MapFlags::ANY).context("cannot write the map epochs")
}
