//! kubelane: a kube-proxy replacement in eBPF that runs beside any CNI.
//!
//! Knowledge flows one way: `k8s` and `files` read `objects` and turn them into `model` records; `plan` turns records into
//! kernel rows; `sync` applies rows through the `MapIo` trait; `bpf` alone speaks to the kernel. `agent` wires them.
//! See ARCHITECTURE.md.

pub mod abi;
pub mod agent;
mod backoff;
pub mod bpf;
mod chain;
pub mod cli;
mod escape;
pub mod explain;
pub mod files;
pub mod k8s;
pub mod model;
pub mod netdev;
pub mod objects;
mod overview;
pub mod plan;
pub mod serve;
pub mod shadow;
mod snapshot;
pub mod sync;
pub mod table;
mod takeover;
mod tool;

/// Held by unit tests that start programs, and by those that bind an address again: until a child becomes another program
/// it has a copy of each socket of this process, and the address of one that was closed is not free.
#[cfg(test)]
static FORKS: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
