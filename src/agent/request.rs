//! What other parts ask the worker, because the world and its rows are the worker's alone.

use tokio::sync::oneshot;

use super::trial::Trial;
use crate::explain::{About, Answer};
use crate::sync::{MapName, Snapshot};

pub enum Request {
    /// What was written to a map; `None`: something waits to be written.
    Snapshot(MapName, oneshot::Sender<Option<Snapshot>>),
    /// Whether these rows are as written, and if not, to write them again.
    Correct(MapName, Vec<Vec<u8>>),
    /// What the planner knows, for a person who asks.
    Explain(About, oneshot::Sender<Answer>),
    /// Whether the programs are still on the devices, and if not, to attach them again.
    Devices,
    /// The rows of a trial of the datapath, in the place of those of an earlier one; `None`: they have done their work.
    Trial(Option<Trial>, oneshot::Sender<anyhow::Result<()>>),
}
