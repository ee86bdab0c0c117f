//! kubelane: a kube-proxy replacement in eBPF that runs beside any CNI.
//!
//! Knowledge flows one way: `k8s` and `files` turn Kubernetes objects into `model` records; `plan` turns records into
//! kernel rows; `sync` applies rows through the `MapIo` trait; `bpf` alone speaks to the kernel. `agent` wires them.
//! See ARCHITECTURE.md.

pub mod abi;
pub mod agent;
pub mod bpf;
mod chain;
pub mod cli;
pub mod explain;
pub mod files;
pub mod k8s;
pub mod model;
pub mod netdev;
pub mod plan;
pub mod serve;
pub mod sync;
pub mod table;
