//! Applying rows to the kernel: in order, in batches, and again until they are in.

mod apply;
mod audit;
mod core;
mod found;
mod mapio;
mod report;

pub use self::audit::Snapshot;
pub use self::core::{Core, CoreSettings};
pub use self::report::{Counts, SyncReport};
pub use crate::plan::adopt::AdoptReport;
pub use mapio::{Failure, MapIo, MapName};
