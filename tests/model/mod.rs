//! A slow model of what a Service means to a client on the wire, and random clusters to compare it with the programs on.
//!
//! | file | |
//! |---|---|
//! | `random.rs` | choices that a seed brings back |
//! | `world.rs` | clusters and what happens to them |
//! | `semantics.rs` | the model: what becomes of a packet that begins a flow |
//! | `traffic.rs` | packets through the real programs, and what is known of their flows |
//! | `flow.rs` | a flow, and what its packets look like on either side |
//! | `memory.rs` | session affinity |
//! | `daemon.rs` | the real control path from a cluster to the kernel's maps |

pub mod daemon;
pub mod flow;
pub mod memory;
pub mod random;
pub mod semantics;
pub mod traffic;
pub mod world;
