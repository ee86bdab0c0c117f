//! The map `epochs`: what the daemon counts up when records of the datapath may be out of date, and what it tells of the
//! node's routing.

use std::path::Path;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use super::pinned;
use crate::abi::epoch::{EPOCH_ROUTES, EPOCH_ROUTES_BY_ADDRESS, EPOCH_THROUGH_STACK};

/// Packets that programs could send on themselves, and the host's stack is to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThroughStack {
    None,
    All,
    /// Those of IPv4 with more bytes than this.
    Above(u32),
}

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

    /// Whether routes are chosen by addresses alone, so that all flows between two addresses may share one answer.
    pub fn set_by_address(&self, by_address: bool) -> Result<()> {
        set(&self.0, EPOCH_ROUTES_BY_ADDRESS, by_address.into())
    }

    /// Which packets to and from backends elsewhere the host's stack must see.
    pub fn set_through_stack(&self, which: ThroughStack) -> Result<()> {
        let least = match which {
            ThroughStack::None => 0,
            ThroughStack::All => 1,
            ThroughStack::Above(mtu) => mtu.saturating_add(1).max(2),
        };
        set(&self.0, EPOCH_THROUGH_STACK, least)
    }
}

pub(super) fn open(pin_path: &Path) -> Result<MapHandle> {
    pinned::open_map(pin_path, "epochs")
}

/// Counts an element up. Each has one writer.
pub(super) fn count_up(epochs: &MapHandle, index: u32) -> Result<()> {
    let key = index.to_ne_bytes();
    let value = epochs.lookup(&key, MapFlags::ANY).context("cannot read the map epochs")?.unwrap_or_default();
    set(epochs, index, value.try_into().map_or(0, u32::from_ne_bytes).wrapping_add(1))
}

fn set(epochs: &MapHandle, index: u32, value: u32) -> Result<()> {
    epochs.update(&index.to_ne_bytes(), &value.to_ne_bytes(), MapFlags::ANY).context("cannot write the map epochs")
}
