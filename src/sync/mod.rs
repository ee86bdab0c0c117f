//! Applying rows to the kernel: in order, in batches, and again until they are in.

mod mapio;

pub use mapio::{Failure, MapIo, MapName};
