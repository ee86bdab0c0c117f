//! Applying rows to the kernel: in order, in batches, and again until they are in.

mod adopt;
mod apply;
mod audit;
mod core;
mod mapio;

pub use self::adopt::AdoptReport;
pub use self::audit::Snapshot;
pub use self::core::{Core, CoreSettings, Counts, SyncReport};
pub use mapio::{Failure, MapIo, MapName};
