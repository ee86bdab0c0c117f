//! What people who look at the cluster should hear of: a source that can tells them (Kubernetes: events).

use super::ObjectName;

/// Whom a notice is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum About {
    /// This node's Node object.
    Node,
    Service(ObjectName),
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    pub about: About,
    /// Something is wrong.
    pub is_warning: bool,
    /// Why, in one word for machines: "Starting".
    pub reason: &'static str,
    /// What was done, in one word for machines: "Listen".
    pub action: &'static str,
    /// For people.
    pub note: String,
    /// Every node says the same of it.
    pub is_of_cluster: bool,
}

/// What a load balancer asks this node about one Service with traffic policy Local.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HealthCheck {
    pub service: ObjectName,
    /// `healthCheckNodePort`, never 0.
    pub port: u16,
    /// Ready endpoints on this node. A pod with an address of either family is one.
    pub local_endpoints: u32,
}
