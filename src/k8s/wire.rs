//! Slim wire types: the fields of v1 Service, discovery.k8s.io/v1 EndpointSlice and v1 Node that a proxy needs, and
//! nothing else. Unknown fields (managedFields above all) are skipped by the parser without becoming values. The same
//! types read JSON and YAML. Numbers are wide, so that a port of 70000 is one bad port and not an unreadable object;
//! every list and struct may be `null` or missing, as the API's Go types allow.

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, IgnoredAny};

/// An object kind that can be listed and watched.
pub trait Wire: DeserializeOwned + Clone + std::fmt::Debug + Send + 'static {
    const KIND: &'static str;
    const GROUP: &'static str;
    const VERSION: &'static str;
    const PLURAL: &'static str;

    fn metadata(&self) -> &Metadata;
}

macro_rules! wire {
    ($type:ty, $group:literal, $plural:literal) => {
        impl Wire for $type {
            const KIND: &'static str = stringify!($type);
            const GROUP: &'static str = $group;
            const VERSION: &'static str = "v1";
            const PLURAL: &'static str = $plural;

            fn metadata(&self) -> &Metadata {
                &self.metadata
            }
        }
    };
}

wire!(Service, "", "services");
wire!(EndpointSlice, "discovery.k8s.io", "endpointslices");
wire!(Node, "", "nodes");

/// `null` and a missing field are the type's default.
fn lenient<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// True when the key is there, whatever its value.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    IgnoredAny::deserialize(deserializer).map(|_| true)
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Metadata {
    #[serde(default, deserialize_with = "lenient")]
    pub name: String,
    #[serde(default, deserialize_with = "lenient")]
    pub namespace: String,
    #[serde(default, deserialize_with = "lenient")]
    pub resource_version: String,
    pub creation_timestamp: Option<String>,
    pub deletion_timestamp: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    pub labels: Labels,
    #[serde(default, deserialize_with = "lenient")]
    pub annotations: Annotations,
}

/// The labels that a proxy looks at.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Labels {
    #[serde(rename = "kubernetes.io/service-name")]
    pub service_name: Option<String>,
    #[serde(rename = "service.kubernetes.io/service-proxy-name")]
    pub service_proxy_name: Option<String>,
    #[serde(rename = "service.kubernetes.io/headless", default, deserialize_with = "present")]
    pub headless: bool,
    #[serde(rename = "topology.kubernetes.io/zone")]
    pub zone: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct Annotations {
    #[serde(rename = "endpoints.kubernetes.io/last-change-trigger-time")]
    pub last_change_trigger_time: Option<String>,
}

/// v1 Service.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Service {
    #[serde(default, deserialize_with = "lenient")]
    pub metadata: Metadata,
    #[serde(default, deserialize_with = "lenient")]
    pub spec: ServiceSpec,
    #[serde(default, deserialize_with = "lenient")]
    pub status: ServiceStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSpec {
    pub r#type: Option<String>,
    #[serde(rename = "clusterIP")]
    pub cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs", default, deserialize_with = "lenient")]
    pub cluster_ips: Vec<String>,
    #[serde(rename = "externalIPs", default, deserialize_with = "lenient")]
    pub external_ips: Vec<String>,
    #[serde(default, deserialize_with = "lenient")]
    pub ports: Vec<ServicePort>,
    pub session_affinity: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    pub session_affinity_config: SessionAffinityConfig,
    pub internal_traffic_policy: Option<String>,
    pub external_traffic_policy: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    pub load_balancer_source_ranges: Vec<String>,
    pub health_check_node_port: Option<i64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    pub name: Option<String>,
    pub protocol: Option<String>,
    pub port: Option<i64>,
    pub node_port: Option<i64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct SessionAffinityConfig {
    #[serde(rename = "clientIP", default, deserialize_with = "lenient")]
    pub client_ip: ClientIpConfig,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClientIpConfig {
    pub timeout_seconds: Option<i64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceStatus {
    #[serde(default, deserialize_with = "lenient")]
    pub load_balancer: LoadBalancerStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct LoadBalancerStatus {
    #[serde(default, deserialize_with = "lenient")]
    pub ingress: Vec<Ingress>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ingress {
    pub ip: Option<String>,
    pub ip_mode: Option<String>,
}

/// discovery.k8s.io/v1 EndpointSlice.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointSlice {
    #[serde(default, deserialize_with = "lenient")]
    pub metadata: Metadata,
    #[serde(default, deserialize_with = "lenient")]
    pub address_type: String,
    #[serde(default, deserialize_with = "lenient")]
    pub endpoints: Vec<Endpoint>,
    #[serde(default, deserialize_with = "lenient")]
    pub ports: Vec<SlicePort>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    #[serde(default, deserialize_with = "lenient")]
    pub addresses: Vec<String>,
    #[serde(default, deserialize_with = "lenient")]
    pub conditions: Conditions,
    pub node_name: Option<String>,
    pub hints: Option<EndpointHints>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub struct Conditions {
    pub ready: Option<bool>,
    pub serving: Option<bool>,
    pub terminating: Option<bool>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointHints {
    #[serde(default, deserialize_with = "lenient")]
    pub for_zones: Vec<Named>,
    #[serde(default, deserialize_with = "lenient")]
    pub for_nodes: Vec<Named>,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct Named {
    pub name: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct SlicePort {
    pub name: Option<String>,
    pub protocol: Option<String>,
    pub port: Option<i64>,
}

/// v1 Node.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Node {
    #[serde(default, deserialize_with = "lenient")]
    pub metadata: Metadata,
    #[serde(default, deserialize_with = "lenient")]
    pub spec: NodeSpec,
    #[serde(default, deserialize_with = "lenient")]
    pub status: NodeStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct NodeSpec {
    #[serde(default, deserialize_with = "lenient")]
    pub taints: Vec<Taint>,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct Taint {
    #[serde(default, deserialize_with = "lenient")]
    pub key: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct NodeStatus {
    #[serde(default, deserialize_with = "lenient")]
    pub addresses: Vec<NodeAddress>,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct NodeAddress {
    #[serde(default, deserialize_with = "lenient")]
    pub r#type: String,
    #[serde(default, deserialize_with = "lenient")]
    pub address: String,
}
