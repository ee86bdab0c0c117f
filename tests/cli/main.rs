//! The commands of `kubelane` beside a real daemon, and what they say when something is wrong. Needs root.

#[path = "../laboratory/mod.rs"]
mod laboratory;

mod browser;
mod errors;
mod explain;
mod get;
mod kubectl_plugin;
mod monitor;
mod page;
mod report;
mod run;
mod terminal;
mod top;
mod trace;
