//! v1 Node: this node only.

use super::{Convert, Converted, Converter, Notes, parse, wire};
use crate::model::{Change, Kind, Node};

/// Set by the cluster autoscaler on a node that it is about to delete.
const DELETION_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

impl Convert for wire::Node {
    const LISTED: Kind = Kind::Node;

    fn convert(self, converter: &mut Converter) -> Converted {
        if self.metadata.name != converter.settings.node_name {
            return Converted { change: None, warnings: Vec::new() };
        }
        let mut notes = Notes::new(Self::subject(&self.metadata));
        let mut internal_ips = Vec::new();
        for address in self.status.addresses.iter().filter(|a| a.r#type == "InternalIP") {
            notes.plain("InternalIP", &address.address);
            match parse::ip(&address.address) {
                Ok(ip) if internal_ips.contains(&ip) => {}
                Ok(ip) => internal_ips.push(ip),
                Err(problem) => notes.add(format!("InternalIP {problem}: it is ignored")),
            }
        }
        let node = Node {
            name: self.metadata.name.as_str().into(),
            zone: self.metadata.labels.zone.filter(|z| !z.is_empty()).map(Into::into),
            internal_ips,
            being_deleted: self.metadata.deletion_timestamp.is_some()
                || self.spec.taints.iter().any(|t| t.key == DELETION_TAINT),
            taints: self.spec.taints.iter().map(|taint| taint.key.as_str().into()).collect(),
        };
        Converted { change: Some(Change::Node(Box::new(node))), warnings: notes.finish() }
    }

    fn gone(_: &wire::Metadata, _: &mut Converter) -> Change {
        Change::NodeGone
    }
}
