//! What the kernel accounts for each pinned map: `memlock` of its fdinfo (Documentation/bpf, bpf_map_show_fdinfo).
//! From 6.4 on it is what the map takes up now; before that, what it would take up when full. Storage of sockets counts
//! on the sockets' side.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapHandle};

use super::pinned;

/// One pinned map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapMemory {
    pub name: String,
    pub bytes: u64,
    /// Rows that fit.
    pub capacity: u32,
}

/// All maps pinned below `pin_path`, by name.
///
/// # Errors
/// When nothing is pinned there, or a map cannot be opened.
pub fn map_memory(pin_path: &Path) -> Result<Vec<MapMemory>> {
    let pins = pinned::children(&pinned::maps_directory(pin_path))?;
    pins.iter()
        .map(|pin| read(pin).with_context(|| format!("cannot read the memory use of {}", pin.display())))
        .collect()
}

fn read(pin: &Path) -> Result<MapMemory> {
    let map = MapHandle::from_pinned_path(pin)?;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", map.as_fd().as_raw_fd()))?;
    let bytes = info.lines().find_map(|line| line.strip_prefix("memlock:")?.trim().parse().ok());
    let name = pin.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(MapMemory { name, bytes: bytes.context("the kernel does not say")?, capacity: map.max_entries() })
}
