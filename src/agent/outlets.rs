//! What the worker tells others after a sync: load balancers' health checks, notices for people, and whether this node
//! still carries its startup taint.

use std::collections::BTreeMap;

use tokio::sync::{mpsc, watch};

use crate::model::{About, Ipx, Notice, ObjectName, Warning};
use crate::netdev::NodePortAddresses;
use crate::serve::HealthChecks;
use crate::sync::{Core, SyncReport};

/// Where it goes. Nobody has to listen.
pub struct Outlets {
    pub health_checks: watch::Sender<HealthChecks>,
    pub notices: mpsc::Sender<Notice>,
    /// The key of the startup taint, and whether the Node has it.
    pub startup_taint: Option<(String, watch::Sender<bool>)>,
}

impl Outlets {
    /// Vouches for what load balancers are told, at this time of `bpf::clock_ns`.
    pub fn vouch(&self, now_ns: u64) {
        self.health_checks.send_modify(|told| told.vouched_ns = now_ns);
    }

    /// `addresses`: those that serve NodePorts.
    pub fn tell(&self, core: &Core, report: &SyncReport, choice: &NodePortAddresses, addresses: &[Ipx]) {
        let addresses = (*choice != NodePortAddresses::All).then(|| addresses.to_vec());
        if report.health_checks_changed || self.health_checks.borrow().addresses != addresses {
            let checks = core.health_checks().cloned().collect();
            self.health_checks.send_modify(|told| (told.addresses, told.checks) = (addresses, checks));
        }
        if let Some((key, tainted)) = &self.startup_taint {
            let is = core.node().is_some_and(|node| node.taints.iter().any(|taint| **taint == **key));
            tainted.send_if_modified(|was| std::mem::replace(was, is) != is);
        }
        for notice in notices(&report.warnings) {
            // A full queue has more to tell than anybody reads; the log has it all.
            let _ = self.notices.try_send(notice);
        }
    }
}

/// One notice per Service, with all that is new.
fn notices(warnings: &[Warning]) -> Vec<Notice> {
    let mut notes: BTreeMap<ObjectName, Vec<&str>> = BTreeMap::new();
    for warning in warnings {
        let service = warning.subject.strip_prefix("Service ").and_then(|name| name.split_once('/'));
        if let Some((namespace, name)) = service {
            notes.entry(ObjectName::new(namespace, name)).or_default().push(&warning.message);
        }
    }
    let notice = |(service, notes): (ObjectName, Vec<&str>)| Notice {
        about: About::Service(service),
        is_warning: true,
        reason: "NotServedAsAsked",
        action: "Program",
        note: notes.join("; "),
        is_of_cluster: true,
    };
    notes.into_iter().map(notice).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_gets_one_notice_and_other_objects_none() {
        let warning = |subject: &str, message: &str| Warning { subject: subject.into(), message: message.into() };
        let warnings = [
            warning("EndpointSlice shop/web-1", "no address"),
            warning("Service shop/web", "port 1: SCTP is not served yet"),
            warning("Service shop/web", "port 2: left out"),
            warning("Service shop/api", "port 80 is claimed by another"),
        ];
        let told: Vec<(About, String)> = notices(&warnings).into_iter().map(|n| (n.about, n.note)).collect();
        let about = |name| About::Service(ObjectName::new("shop", name));
        let expected = [
            (about("api"), "port 80 is claimed by another".to_owned()),
            (about("web"), "port 1: SCTP is not served yet; port 2: left out".to_owned()),
        ];
        assert_eq!(told, expected);
    }
}
