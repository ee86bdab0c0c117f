//! The words for the planner's own decisions: which set is used, and why an endpoint is in none.

use super::{Choice, Daemon, Hints, HintsIgnored, LeftOut, Policy, Port, Transport};
use crate::model::Protocol;

pub const FALLBACK: &str = "no endpoint is ready: terminating endpoints that still serve are used";

/// Why this set.
pub fn policy(set: Policy, is_outside: bool, has_cluster_ip: bool) -> String {
    let field = if is_outside { "externalTrafficPolicy" } else { "internalTrafficPolicy" };
    match set {
        Policy::Local => format!("{field} is Local: endpoints of this node"),
        Policy::Cluster if is_outside || has_cluster_ip => format!("{field} is Cluster: endpoints of all nodes"),
        Policy::Cluster => {
            "clients on this node use the endpoints of all nodes, whatever externalTrafficPolicy is".to_owned()
        }
    }
}

/// What the endpoints decide together.
pub fn choice(set: Policy, choice: &Choice, daemon: Option<&Daemon>, has_endpoints: bool) -> Option<String> {
    let any_ready = if set == Policy::Local { choice.any_local_ready } else { choice.any_ready };
    if !any_ready {
        return has_endpoints.then(|| match set {
            Policy::Cluster => FALLBACK.to_owned(),
            Policy::Local => {
                "no endpoint of this node is ready: terminating endpoints that still serve are used".to_owned()
            }
        });
    }
    let node = daemon.map_or("this one", |daemon| &daemon.node);
    let zone = daemon.and_then(|daemon| daemon.zone.as_deref()).unwrap_or("unknown");
    match choice.hints {
        _ if set == Policy::Local => None,
        Hints::None => None,
        Hints::Nodes => Some(format!("hints are followed: endpoints for node {node}")),
        Hints::Zones => Some(format!("hints are followed: endpoints for zone {zone}")),
        Hints::Ignored(HintsIgnored::SomeHaveNone) => Some("hints are ignored: a ready endpoint has none".to_owned()),
        Hints::Ignored(HintsIgnored::NoneIsForHere) => {
            Some(format!("hints are ignored: none is for node {node} or its zone ({zone})"))
        }
    }
}

/// Why an endpoint gets no new connections.
pub fn left_out(reason: LeftOut, port: &Port) -> String {
    match reason {
        LeftOut::NotReady => "not ready".to_owned(),
        LeftOut::Terminating => "terminating, and others are ready".to_owned(),
        LeftOut::HintsOtherNodes => "its hints are for other nodes".to_owned(),
        LeftOut::HintsOtherZones => "its hints are for other zones".to_owned(),
        LeftOut::OtherNode => "on another node".to_owned(),
        LeftOut::NoSuchPort => {
            let name =
                if port.name.is_empty() { "without a name".to_owned() } else { format!("named {:?}", port.name) };
            format!("its EndpointSlice has no {} port {name}", transport(port.protocol))
        }
        LeftOut::OverQuota => "exceeds the Service's quota of the maps".to_owned(),
    }
}

pub fn transport(transport: Transport) -> &'static str {
    Protocol::from(transport).as_str()
}
