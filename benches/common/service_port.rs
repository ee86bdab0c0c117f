//! A Service of a bench's world as kube-proxy's rules have it. A module of the benches that write rules.

use std::net::{IpAddr, SocketAddr};

use crate::common::world::{BenchService, ENDPOINT_PORT, SERVICE_PORT};
use crate::laboratory::rulesets::{Endpoint, ServicePort, State};

/// The namespace of all of them.
pub const NAMESPACE: &str = "bench";

/// The one port of a Service; its endpoints are on other nodes.
pub fn service_port(service: &BenchService) -> ServicePort {
    let endpoint = |ip: &std::net::Ipv4Addr| Endpoint {
        at: SocketAddr::new(IpAddr::V4(*ip), ENDPOINT_PORT),
        is_local: false,
        state: State::Ready,
    };
    ServicePort {
        namespace: NAMESPACE.to_owned(),
        name: format!("service-{}", service.number),
        port_name: "http".to_owned(),
        cluster_ips: vec![service.cluster_ip().into()],
        port: SERVICE_PORT,
        endpoints: service.endpoints.iter().map(endpoint).collect(),
        ..ServicePort::default()
    }
}
