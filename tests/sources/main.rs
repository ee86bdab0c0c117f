//! Where Services come from: an API server (the tests' double, mostly in virtual time) and directories of manifests.
//! Needs nothing but openssl.

#[path = "../laboratory/mod.rs"]
mod laboratory;

mod convert;
mod credentials;
mod events;
mod files;
mod hostile;
mod kubernetes;
mod lists;
