//! From records to rows, without a kernel: `world` holds what the sources say, `select` and `compile` define what a
//! Service means, `quotas` and `fit` how much of it there is room for, `layout` gives it ids and a place in the maps,
//! `adopt` those that an earlier daemon gave it.

pub mod adopt;
pub mod arrivals;
pub mod claims;
pub mod compile;
mod explain;
mod fit;
pub mod health;
pub mod ids;
pub mod large;
pub mod layout;
pub mod no_local;
pub mod pool;
pub mod port;
pub mod quotas;
mod ranges;
pub mod region;
pub mod select;
pub mod tables;
pub mod warnings;
pub mod world;
