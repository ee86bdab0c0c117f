//! What a sync did, and how much there is.

use std::time::Duration;

use super::MapName;
use crate::model::{Family, Protocol, SocketAddrx, Warning};

/// What one sync did.
#[derive(Debug, Default)]
pub struct SyncReport {
    /// Services compiled.
    pub services: usize,
    pub rows_written: usize,
    pub rows_deleted: usize,
    /// Calls of `MapIo::write` and `MapIo::delete`.
    pub calls: usize,
    /// Rows that the kernel did not take, with its words.
    pub failures: Vec<(MapName, String)>,
    /// Of these, rows for which a map had no room.
    pub rows_without_room: usize,
    /// Something that is wanted is not in the kernel, and not for want of room alone: that is a shortage of whoever asks
    /// for it, and no update that waits.
    pub waits: bool,
    /// Warnings that appeared, and those that hold no longer.
    pub warnings: Vec<Warning>,
    pub resolved: Vec<Warning>,
    /// Backends that were marked gone: sockets connected to them are stale.
    pub backends_gone: Vec<(Protocol, SocketAddrx)>,
    /// A UDP frontend is new or became another Service port's: sockets connected through it before are stale.
    pub datagram_frontends_changed_owner: bool,
    /// A UDP frontend has an endpoint, and had none before: sockets may have been connected to it without one.
    pub datagram_frontends_served: bool,
    /// [`super::Core::health_checks`] has something else to say.
    pub health_checks_changed: bool,
    /// Every Service was compiled: the first sync, or the node's zone is another.
    pub full: bool,
    /// When the changes of endpoints that are in the kernel now had been triggered, in Unix nanoseconds, by the family
    /// of their slice. Empty as long as something waits.
    pub triggers: Vec<(Family, i64)>,
    pub duration: Duration,
}

/// Sizes for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub services: usize,
    pub slices: usize,
    /// In slices, usable or not.
    pub endpoints: usize,
    /// Rows in the kernel.
    pub frontends: usize,
    /// Backend ids in use.
    pub backends: usize,
    /// Slots in use.
    pub slots: usize,
    /// Rows in the kernel.
    pub names: usize,
    pub addresses: usize,
    pub source_ranges: usize,
    /// Services that have not got all they ask for.
    pub degraded: usize,
}
