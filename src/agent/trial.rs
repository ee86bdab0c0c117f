//! The rows of the datapath's trial (`probe.rs`), while it goes on.
//!
//! The backend is number 0, which no Service ever gets (an id of 0 is an empty slot), behind a slot that is empty: what the
//! planner and the next daemon see in the maps does not change. Rows of a daemon that was killed meanwhile are orphans to
//! the next one, which removes them.

use std::net::SocketAddr;

use anyhow::{Context as _, ensure};
use bytemuck::bytes_of;
use tracing::warn;

use crate::abi::backend_flag::BACKEND_NODE_LOCAL;
use crate::abi::backend_state::BACKEND_ACTIVE;
use crate::abi::frontend_flag::FRONTEND_CLUSTER_IP;
use crate::abi::pool_empty::EMPTY_REFUSE;
use crate::abi::pool_member::POOL_CLUSTER;
use crate::abi::{Backend, Frontend, FrontendKey, Pool};
use crate::model::{Ipx, Protocol};
use crate::sync::{Failure, MapIo, MapName};

const BACKEND_ID: u32 = 0;
const GENERATION: u32 = 1;

/// A TCP frontend, and the listener where its connections have to end.
#[derive(Clone, Copy, Debug)]
pub struct Trial {
    pub frontend: SocketAddr,
    pub listener: SocketAddr,
}

/// They are in the kernel until `remove`.
#[must_use]
#[derive(Debug)]
pub struct TrialRows {
    trial: Trial,
    slot: u32,
    frontend: FrontendKey,
}

impl TrialRows {
    /// # Errors
    /// When there is no room, or the kernel refuses; nothing is left then.
    pub fn write(maps: &mut dyn MapIo, trial: &Trial) -> anyhow::Result<Self> {
        let slot = empty_slot(maps)?;
        let frontend = FrontendKey::new(Ipx::from(trial.frontend.ip()), trial.frontend.port(), Protocol::Tcp);
        let backend = Backend {
            address: Ipx::from(trial.listener.ip()).0,
            port_be: trial.listener.port().to_be_bytes(),
            state: BACKEND_ACTIVE as u8,
            pools: POOL_CLUSTER as u8,
            generation: GENERATION,
            protocol: Protocol::Tcp as u8,
            flags: BACKEND_NODE_LOCAL as u8,
            ..Backend::default()
        };
        let pool = Pool { base: slot, count: 1, member: POOL_CLUSTER as u8, on_empty: EMPTY_REFUSE as u8, zero: 0 };
        let row = Frontend { flags: FRONTEND_CLUSTER_IP, inside: pool, ..Frontend::default() };
        // The backend before the frontend that leads to it.
        let mut failures = maps.write(MapName::Backends, bytes_of(&BACKEND_ID), bytes_of(&backend), 1);
        if failures.is_empty() {
            failures = maps.write(MapName::Frontends, bytes_of(&frontend), bytes_of(&row), 1);
        }
        let rows = TrialRows { trial: *trial, slot, frontend };
        let Some(Failure { error, .. }) = failures.pop() else { return Ok(rows) };
        rows.remove(maps);
        Err(error).context("the kernel rejected the map entries of the test connection")
    }

    /// The slot is no longer the last one: a Service may get it. Answers the trial, to be written again.
    pub fn is_to_move(&self, maps: &dyn MapIo) -> Option<Trial> {
        (self.slot + 1 < maps.size(MapName::Slots)).then_some(self.trial)
    }

    pub fn remove(self, maps: &mut dyn MapIo) {
        let mut failures = maps.delete(MapName::Frontends, bytes_of(&self.frontend), 1);
        failures.extend(maps.write(MapName::Backends, bytes_of(&BACKEND_ID), bytes_of(&Backend::default()), 1));
        for failure in failures {
            warn!("a map entry of the test connection was left behind: {}; the next start removes it", failure.error);
        }
    }
}

/// A slot that says "backend 0", as all do that no pool uses: the last one, unless the map is full.
fn empty_slot(maps: &mut dyn MapIo) -> anyhow::Result<u32> {
    let last = maps.size(MapName::Slots).saturating_sub(1);
    // This row alone: to read all millions of them took longer than everything else after the first sync.
    let is_used = maps.read(MapName::Slots, &last.to_ne_bytes()).context("reading the last slot")?.is_some();
    ensure!(!is_used, "the map slots is full: no entry is left for the test connection; see --max-endpoints");
    Ok(last)
}
