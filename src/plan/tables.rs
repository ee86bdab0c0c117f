//! The maps' rows, and the space they are laid out in.

use super::ids::IdPool;
use super::region::Regions;
use crate::abi::{Backend, Frontend, FrontendKey, ServiceName, SourceRangeKey, backend_state};
use crate::table::{Hashed, Indexed, Table};

/// One table for each map of `sync::MapName`.
#[derive(Debug, Default)]
pub struct Tables {
    pub services: Table<Hashed<u32, ServiceName>>,
    pub backends: Table<Indexed<Backend>>,
    pub slots: Table<Indexed<u32>>,
    pub frontends: Table<Hashed<FrontendKey, Frontend>>,
    /// Keyed by the address's bytes.
    pub addresses: Table<Hashed<[u8; 16], u32>>,
    /// Each value is 1.
    pub source_ranges: Table<Hashed<SourceRangeKey, u32>>,
}

impl Tables {
    /// Nothing is left to be written.
    pub fn is_clean(&self) -> bool {
        self.services.is_clean()
            && self.backends.is_clean()
            && self.slots.is_clean()
            && self.frontends.is_clean()
            && self.addresses.is_clean()
            && self.source_ranges.is_clean()
    }
}

/// Tables, and the ids and regions that are still free in them.
#[derive(Debug, Default)]
pub struct Space {
    pub tables: Tables,
    pub service_ids: IdPool,
    pub backend_ids: IdPool,
    pub regions: Regions,
    /// Backends that ports have, and slots that pools fill. Kept with every step: to count them anew would make each
    /// change of one endpoint cost as much as there are Services.
    pub assignments: usize,
    pub filled_slots: usize,
}

/// What keeps its id and generation but serves nobody.
pub fn is_gone(backend: &Backend) -> bool {
    u32::from(backend.state) == backend_state::BACKEND_GONE
}
