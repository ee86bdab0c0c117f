//! What load balancers are told of a Service with traffic policy Local, as a pure function.

use crate::model::{Family, HealthCheck, Service, Slice};
use crate::table::HashSet;

/// `None`: nobody may ask. As in kube-proxy, endpoints count by address, whatever their port, and only ready ones do:
/// traffic to those that terminate should end. Of two families the one with more counts.
pub fn health_check(service: &Service, slices: &[&Slice], node: &str) -> Option<HealthCheck> {
    if service.health_check_node_port == 0 {
        return None;
    }
    let local = || {
        let with_ports = slices.iter().filter(|slice| !slice.ports.is_empty()).flat_map(|slice| &slice.endpoints);
        with_ports.filter(|endpoint| endpoint.ready && endpoint.node.as_deref() == Some(node))
    };
    let of = |family| local().map(|e| e.ip).filter(|ip| ip.family() == family).collect::<HashSet<_>>().len();
    let local_endpoints = of(Family::Ipv4).max(of(Family::Ipv6)) as u32;
    Some(HealthCheck { service: service.name.clone(), port: service.health_check_node_port, local_endpoints })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Endpoint, ObjectName, Protocol, SlicePort, TrafficPolicy};

    fn endpoint(ip: &str, node: &str, ready: bool) -> Endpoint {
        Endpoint {
            ip: ip.parse().unwrap(),
            ready,
            serving: true,
            terminating: !ready,
            node: Some(node.into()),
            hints: None,
        }
    }

    fn slice(ports: &[&str], endpoints: Vec<Endpoint>) -> Slice {
        let port = |name: &&str| SlicePort { name: (*name).into(), protocol: Protocol::Tcp, port: 80 };
        let ports = ports.iter().map(port).collect();
        Slice {
            name: ObjectName::new("d", "s"),
            service: "s".into(),
            is_controlled: false,
            ports,
            endpoints,
            triggered: None,
        }
    }

    #[test]
    fn ready_endpoints_of_this_node_count_once_each() {
        let service = Service {
            name: ObjectName::new("d", "s"),
            created: 0,
            cluster_ips: vec![],
            external_ips: vec![],
            load_balancer_ips: vec![],
            ports: vec![],
            affinity_seconds: None,
            internal_policy: TrafficPolicy::Cluster,
            external_policy: TrafficPolicy::Local,
            source_ranges: vec![],
            health_check_node_port: 32000,
            client_source: None,
        };
        let here = |ip| endpoint(ip, "here", true);
        let table = [
            ("none", vec![], 0),
            ("elsewhere", vec![slice(&["a"], vec![endpoint("10.0.0.1", "there", true)])], 0),
            ("terminating", vec![slice(&["a"], vec![endpoint("10.0.0.1", "here", false)])], 0),
            ("a slice without ports", vec![slice(&[], vec![here("10.0.0.1")])], 0),
            ("two", vec![slice(&["a"], vec![here("10.0.0.1"), here("10.0.0.2")])], 2),
            (
                "one, in a slice for each port",
                vec![slice(&["a"], vec![here("10.0.0.1")]), slice(&["b"], vec![here("10.0.0.1")])],
                1,
            ),
            (
                "two of each family",
                vec![
                    slice(&["a"], vec![here("10.0.0.1"), here("10.0.0.2")]),
                    slice(&["a"], vec![here("fd00::1"), here("fd00::2")]),
                ],
                2,
            ),
        ];
        for (name, slices, expected) in &table {
            let slices: Vec<&Slice> = slices.iter().collect();
            let check = health_check(&service, &slices, "here").unwrap();
            assert_eq!((check.port, check.local_endpoints), (32000, *expected), "{name}");
        }
        let silent = Service { health_check_node_port: 0, ..service };
        assert_eq!(health_check(&silent, &[], "here"), None);
    }
}
