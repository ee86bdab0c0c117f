//! EndpointSlices: where a Service's traffic may go.

use std::sync::Arc;

use super::{Ipx, ObjectName, Protocol};

/// One port of an EndpointSlice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// Empty when unnamed.
    pub name: Arc<str>,
    pub protocol: Protocol,
    /// Host order, never 0 (a slice port without a number is not usable and is left out).
    pub port: u16,
}

/// `hints.forZones` and `hints.forNodes` (KEP-2433, KEP-4444), names only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Hints {
    pub zones: Box<[Arc<str>]>,
    pub nodes: Box<[Arc<str>]>,
}

/// One endpoint: one address (the API says that only the first of `addresses` is used), its conditions with the
/// API's defaults already applied, and where it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub ip: Ipx,
    /// Missing means true.
    pub ready: bool,
    /// Missing follows `ready`.
    pub serving: bool,
    /// Missing means false.
    pub terminating: bool,
    /// `nodeName`; shared between the endpoints of a source.
    pub node: Option<Arc<str>>,
    /// `None` when neither list has an entry; shared between equal hints.
    pub hints: Option<Arc<Hints>>,
}

/// An EndpointSlice of one address family (FQDN slices never get here).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The slice's own name.
    pub name: ObjectName,
    /// Label `kubernetes.io/service-name`, in the slice's namespace.
    pub service: Arc<str>,
    /// Label `endpointslice.kubernetes.io/managed-by`: the control plane makes it of the Service and its pods.
    pub is_controlled: bool,
    pub ports: Vec<SlicePort>,
    pub endpoints: Vec<Endpoint>,
    /// Annotation `endpoints.kubernetes.io/last-change-trigger-time`, Unix nanoseconds.
    pub triggered: Option<i64>,
}
