//! The only door to libbpf and the only `unsafe`: loading, pinning and attaching the BPF object, the kernel maps as a
//! [`MapIo`](crate::sync::MapIo), probes of kernel features, and the search for sockets whose backend is gone.

mod attach;
mod btf;
mod load;
mod maps;
pub mod memory;
mod namespaces;
pub mod pinned;
mod privileges;
pub mod probe;
mod skeleton;
mod stale;
pub mod verifier;

pub use load::{Datapath, Settings};
pub use maps::Maps;
pub use pinned::cleanup;
pub use privileges::Privileges;
pub use stale::{StalePass, StaleSockets};
