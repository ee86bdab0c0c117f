//! The socket programs: real sockets of pods and nodes to cluster IPs, beside a real daemon. Needs root.

#[path = "../laboratory/mod.rs"]
mod laboratory;

mod affinity;
mod lifecycle;
mod protocols;
mod races;
mod selection;
