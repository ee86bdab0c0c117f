//! The words for what was decided, and what to do about it.

use super::decide::{Client, Reason, Verdict};
use super::view::Asked;
use crate::explain::Service;
pub use crate::explain::words::{FALLBACK, choice, left_out, policy, transport};
use crate::model::Protocol;

/// As the counters of the datapath name it, where it counts.
pub fn label(reason: Reason) -> &'static str {
    match reason {
        Reason::UnknownPort => "refused_unknown_port",
        Reason::NoEndpoint => "refused_no_endpoint",
        Reason::NoLocalEndpoint => "dropped_no_local_endpoint",
        Reason::SourceRange => "dropped_source_range",
        Reason::SctpPort => "dropped_sctp_port",
        Reason::SctpSocket => "sctp_socket",
        Reason::PodsNotServed => "pods_not_served",
        Reason::NoService => "no_service",
        Reason::ClusterIpOutside => "cluster_ip_outside",
        Reason::LoopbackInPod => "loopback_in_pod",
        Reason::LoopbackOutside => "loopback_outside",
        Reason::NotMarked => "not_marked",
        Reason::BackendMissing => "failed_backend_missing",
    }
}

/// What the next connection gets.
pub fn next(asked: &Asked) -> String {
    let found = asked.decision.found.as_ref();
    let is_packet = !matches!(asked.client, Client::Socket { .. });
    match asked.decision.verdict {
        Verdict::Backend => {
            let remembered = found.and_then(|found| found.remembered);
            let candidates = found.map(|found| &found.candidates[..]).unwrap_or_default();
            match (remembered, candidates) {
                (Some(known), _) => format!("{}, as before (affinity)", known.at),
                (None, [only]) => format!("{}, the only one", only.at),
                (None, many) => format!("one of {}, at random", many.len()),
            }
        }
        Verdict::Refused(_) if is_packet => "refused: ICMP port unreachable".to_owned(),
        Verdict::Refused(_) => "refused: ECONNREFUSED at once (EPERM before Linux 5.18)".to_owned(),
        Verdict::Dropped(_) if is_packet => "dropped without an answer".to_owned(),
        Verdict::Dropped(_) if asked.to.protocol == Protocol::Tcp => {
            "dropped: ETIMEDOUT at once (EPERM before Linux 5.18)".to_owned()
        }
        Verdict::Dropped(_) => "dropped: EPERM".to_owned(),
        Verdict::Untouched(_) => format!("left alone: it goes to {} unchanged", asked.to),
    }
}

/// What the reason means, and what to do about it.
pub fn remedy(reason: Reason, asked: &Asked) -> Option<String> {
    let name = asked.decision.found.as_ref().and_then(|found| found.name.as_deref()).unwrap_or("-/-");
    let service = name.split_once(':').map_or(name, |(service, _)| service);
    let (namespace, bare) = service.split_once('/').unwrap_or(("-", service));
    Some(match reason {
        Reason::UnknownPort => unknown_port(asked),
        Reason::NoEndpoint => format!(
            "no endpoint is ready, or terminating and still serving: kubectl -n {namespace} get endpointslices -l \
             kubernetes.io/service-name={bare}; check the Service's selector and the pods' readiness"
        ),
        Reason::NoLocalEndpoint => format!(
            "the traffic policy is Local and no endpoint of {service} is on this node, but other nodes have some: \
             connect to one of these (load balancers do, by the health check), or set the policy to Cluster"
        ),
        Reason::SourceRange => "spec.loadBalancerSourceRanges has no range with this client: add one, or connect \
            from an address in a range"
            .to_owned(),
        Reason::SctpPort => {
            "SCTP's checksum rules out another port: give the endpoints the Service's own port".to_owned()
        }
        Reason::SctpSocket => {
            "the kernel has no hook for SCTP sockets: connect from a pod whose device has the programs (--pod-devices), or \
             from outside"
                .to_owned()
        }
        Reason::PodsNotServed => "the daemon runs with --socket-lb host and without pods' devices: one of both \
            (--socket-lb all, --pod-devices auto) has to serve pods"
            .to_owned(),
        Reason::NoService => no_service(asked),
        Reason::ClusterIpOutside => {
            "cluster IPs serve clients on nodes only: use a NodePort, a load balancer IP or an \
                                     external IP"
                .to_owned()
        }
        Reason::LoopbackInPod => "in a pod, loopback is the pod itself: use an address of the node".to_owned(),
        Reason::LoopbackOutside => "loopback cannot be reached from outside: use an address of the node".to_owned(),
        Reason::NotMarked => {
            "the programs' filter (map wire_filter) lacks it, although its frontend exists: restart the daemon, and \
             report this with `kubelane report`"
                .to_owned()
        }
        Reason::BackendMissing => {
            "no slot of the pool leads to a backend: this should never happen; restart the daemon, and report this"
                .to_owned()
        }
    })
}

fn unknown_port(asked: &Asked) -> String {
    let has = |service: &Service| {
        let ports: Vec<String> =
            service.ports.iter().map(|port| format!("{}/{}", port.port, transport(port.protocol))).collect();
        format!("Service {}/{}, which has {}", service.namespace, service.name, ports.join(", "))
    };
    match asked.others.first() {
        Some(service) => format!("the cluster IP belongs to {}: use one of these", has(service)),
        None => {
            "the cluster IP belongs to a Service, but the Service does not have this port: see `kubelane get services`"
                .to_owned()
        }
    }
}

fn no_service(asked: &Asked) -> String {
    let left_alone = |service: &&Service| service.left_alone.contains(&asked.to.at.ip.to_ip());
    if let Some(service) = asked.others.iter().find(left_alone) {
        return format!(
            "it is a cluster IP of Service {}/{}, but a device of this node has the address (a node-local DNS cache), and answers",
            service.namespace, service.name
        );
    }
    match asked.others.first() {
        Some(service) => format!(
            "Service {}/{} has this address, but not this port for this client: see `kubelane explain svc/{0}/{1}`",
            service.namespace, service.name
        ),
        None => "no Service has this address and port: see `kubelane get services`".to_owned(),
    }
}
