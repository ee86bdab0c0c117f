//! The desired map entries and the order in which they are written, on a model of the kernel. Needs nothing.

#[path = "../laboratory/records.rs"]
mod records;

mod adopt;
mod bench;
mod core;
mod model_kernel;
mod properties;
mod scale;
