//! The real daemon and those who depend on it: the API server, load balancers, Prometheus. Needs root.

#[path = "../laboratory/mod.rs"]
mod laboratory;

mod health;
mod hostile;
mod kubernetes;
mod metrics;
mod probes;
