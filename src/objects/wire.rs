//! Slim wire types: the fields of v1 Service, discovery.k8s.io/v1 EndpointSlice and v1 Node that a proxy needs, and
//! nothing else. Unknown fields (managedFields above all) are skipped by the parser without becoming values. The same
//! types read JSON and YAML. A number may be anything, so that a port of 70000 or "http" is one bad port and not an
//! unreadable object; every list, entry of a list and struct may be `null` or missing, as the API's Go types allow.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

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

/// As [`lenient`], for the list and for each of its entries.
fn list<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    Ok(Option::<List<T>>::deserialize(deserializer)?.map(|list| list.0).unwrap_or_default())
}

struct List<T>(Vec<T>);

impl<'de, T: Default + Deserialize<'de>> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ListVisitor(PhantomData)).map(List)
    }
}

struct ListVisitor<T>(PhantomData<T>);

impl<'de, T: Default + Deserialize<'de>> Visitor<'de> for ListVisitor<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element::<Option<T>>()? {
            items.push(item.unwrap_or_default());
        }
        Ok(items)
    }
}

/// A whole number, or what stands in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Number {
    Is(i64),
    /// As it is to be shown.
    Not(String),
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Number::Is(number) => number.fmt(f),
            Number::Not(text) => f.write_str(text),
        }
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NumberVisitor)
    }
}

struct NumberVisitor;

impl<'de> Visitor<'de> for NumberVisitor {
    type Value = Number;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number")
    }

    fn visit_i64<E>(self, number: i64) -> Result<Number, E> {
        Ok(Number::Is(number))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Number, E> {
        Ok(i64::try_from(number).map_or_else(|_| Number::Not(number.to_string()), Number::Is))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Number, E> {
        Ok(Number::Not(number.to_string()))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Number, E> {
        Ok(Number::Not(value.to_string()))
    }

    fn visit_str<E>(self, text: &str) -> Result<Number, E> {
        Ok(Number::Not(quoted(text)))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Number, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Number::Not("a list".into()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Number, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Number::Not("an object".into()))
    }
}

/// Text for a message: in quotes, and no longer than a line can bear.
pub fn quoted(text: &str) -> String {
    const LONGEST: usize = 80;
    match text.char_indices().nth(LONGEST) {
        None => format!("{text:?}"),
        Some((end, _)) => format!("{:?}... ({} bytes)", &text[..end], text.len()),
    }
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
    #[serde(rename = "endpointslice.kubernetes.io/managed-by")]
    pub managed_by: Option<String>,
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
    #[serde(rename = "kubelane.io/cluster-policy-source")]
    pub cluster_policy_source: Option<String>,
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
    #[serde(rename = "clusterIPs", default, deserialize_with = "list")]
    pub cluster_ips: Vec<String>,
    #[serde(rename = "externalIPs", default, deserialize_with = "list")]
    pub external_ips: Vec<String>,
    #[serde(default, deserialize_with = "list")]
    pub ports: Vec<ServicePort>,
    pub session_affinity: Option<String>,
    #[serde(default, deserialize_with = "lenient")]
    pub session_affinity_config: SessionAffinityConfig,
    pub internal_traffic_policy: Option<String>,
    pub external_traffic_policy: Option<String>,
    #[serde(default, deserialize_with = "list")]
    pub load_balancer_source_ranges: Vec<String>,
    pub health_check_node_port: Option<Number>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    pub name: Option<String>,
    pub protocol: Option<String>,
    pub port: Option<Number>,
    pub node_port: Option<Number>,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct SessionAffinityConfig {
    #[serde(rename = "clientIP", default, deserialize_with = "lenient")]
    pub client_ip: ClientIpConfig,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClientIpConfig {
    pub timeout_seconds: Option<Number>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceStatus {
    #[serde(default, deserialize_with = "lenient")]
    pub load_balancer: LoadBalancerStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct LoadBalancerStatus {
    #[serde(default, deserialize_with = "list")]
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
    #[serde(default, deserialize_with = "list")]
    pub endpoints: Vec<Endpoint>,
    #[serde(default, deserialize_with = "list")]
    pub ports: Vec<SlicePort>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    #[serde(default, deserialize_with = "list")]
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
    #[serde(default, deserialize_with = "list")]
    pub for_zones: Vec<Named>,
    #[serde(default, deserialize_with = "list")]
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
    pub port: Option<Number>,
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
    #[serde(default, deserialize_with = "list")]
    pub taints: Vec<Taint>,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct Taint {
    #[serde(default, deserialize_with = "lenient")]
    pub key: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct NodeStatus {
    #[serde(default, deserialize_with = "list")]
    pub addresses: Vec<NodeAddress>,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct NodeAddress {
    #[serde(default, deserialize_with = "lenient")]
    pub r#type: String,
    #[serde(default, deserialize_with = "lenient")]
    pub address: String,
}
