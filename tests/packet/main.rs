//! The packet programs without a daemon: single packets in a node's namespace, and real sockets between namespaces.
//! Needs root.

#[path = "../laboratory/mod.rs"]
mod laboratory;

mod claims;
mod counters;
mod devices;
mod flows;
mod fuzz;
mod local;
mod model;
mod monitor;
mod network;
mod pods;
mod probes;
mod race;
mod random;
mod remote;
mod verdicts;
