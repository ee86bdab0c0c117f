//! What a source says: one stream of changes, whatever the source is.

use super::{Node, ObjectName, Service, Slice};

/// The watched kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Services,
    EndpointSlices,
    Node,
}

/// Something about an object that its owner should know. Logged once while it lasts.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Warning {
    /// The object: "Service default/web", "EndpointSlice default/web-abc".
    pub subject: String,
    /// One line, says what is wrong and what kubelane does about it.
    pub message: String,
}

/// One event of a source. Upserts replace the whole object of that name.
///
/// A (re)list is `ListBegin(kind)`, upserts, `ListEnd(kind)`: whatever of that kind was not upserted in between is gone
/// at the end. Upserts and deletes outside a list are live changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Service(Box<Service>),
    ServiceGone(ObjectName),
    Slice(Box<Slice>),
    SliceGone(ObjectName),
    Node(Box<Node>),
    NodeGone,
    ListBegin(Kind),
    ListEnd(Kind),
    /// The warnings that now hold for this object, as found while it was read; an empty list takes earlier ones back.
    /// Sent only when there are warnings or were before.
    Warnings {
        subject: String,
        warnings: Vec<Warning>,
    },
}
