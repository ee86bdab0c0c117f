//! How many rows the maps that the daemon fills have room for. They begin small and grow with what is in them, so that a
//! node pays for the rows that its cluster has, and `--max-*` only say where that ends.

use super::settings::Settings;
use crate::sync::MapName;

/// Hash maps, and `backends`, begin with room for so many rows.
const FIRST: u32 = 4096;
/// Slots of each backend: regions are powers of two, and a pool that moves has two for a moment.
const SLOTS: u32 = 4;

/// How many rows each map may have at most, by [`MapName`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits([u32; MapName::ALL.len()]);

/// How many rows the maps may have with these limits of the command line, by [`MapName`].
pub fn rows_at_most(services: u32, endpoints: u32, source_ranges: u32) -> [u32; MapName::ALL.len()] {
    MapName::ALL.map(|map| match map {
        MapName::Services | MapName::Addresses => services.saturating_mul(2),
        MapName::Frontends => services.saturating_mul(4),
        MapName::Backends => endpoints,
        // One block of the buddy allocator, which is filled from its beginning.
        MapName::Slots => endpoints.saturating_mul(SLOTS).checked_next_power_of_two().unwrap_or(1 << 31),
        MapName::SourceRanges => source_ranges,
    })
}

impl Limits {
    pub fn new(settings: &Settings) -> Limits {
        Limits(rows_at_most(settings.max_services, settings.max_endpoints, settings.max_source_ranges))
    }

    pub fn of(&self, map: MapName) -> u32 {
        self.0[map as usize]
    }

    /// Rows that a new map has room for.
    pub fn first(&self, map: MapName) -> u32 {
        let first = match map {
            MapName::Slots => FIRST * SLOTS,
            // A trie takes memory by the row; its size is only a limit.
            MapName::SourceRanges => u32::MAX,
            _ => FIRST,
        };
        first.min(self.of(map))
    }

    /// Whether a map that has room for `size` rows is three quarters full with `rows`, and may grow.
    pub fn is_short(&self, map: MapName, rows: usize, size: u32) -> bool {
        rows as u64 * 4 > u64::from(size) * 3 && size < self.of(map)
    }

    /// What it grows to: half full at most, or as far as it may.
    pub fn next(&self, map: MapName, rows: usize, size: u32) -> u32 {
        let next = u64::from(size).max(rows as u64).saturating_mul(2).next_power_of_two();
        next.min(self.of(map).into()) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits([131_072, 300_000, 1 << 21, 262_144, 131_072, 1000])
    }

    #[test]
    fn a_map_grows_when_it_is_three_quarters_full_until_it_may_not() {
        let map = MapName::Frontends;
        assert_eq!((limits().first(map), limits().first(MapName::SourceRanges)), (4096, 1000));
        assert!(!limits().is_short(map, 3072, 4096) && limits().is_short(map, 3073, 4096));
        assert_eq!(limits().next(map, 3073, 4096), 8192);
        assert_eq!(limits().next(map, 100_000, 4096), 262_144);
        assert!(!limits().is_short(map, 262_144, 262_144));
        assert_eq!(limits().next(MapName::Backends, 200_000, 4096), 300_000);
    }
}
