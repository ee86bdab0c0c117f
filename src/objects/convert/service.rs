//! v1 Service.

use super::wire::{Number, quoted};
use super::{Convert, Converted, Converter, Notes, parse, wire};
use crate::model::{Change, ClientSource, Family, IpRange, Ipx, Kind, Protocol, Service, ServicePort, TrafficPolicy};

/// The API's default for ClientIP affinity, and its upper limit, in seconds.
const AFFINITY_DEFAULT: u32 = 10_800;
const AFFINITY_MAX: i64 = 86_400;

impl Convert for wire::Service {
    const LISTED: Kind = Kind::Services;

    fn convert(self, converter: &mut Converter) -> Converted {
        let mut notes = Notes::new(Self::subject(&self.metadata));
        let change = match serves(&self, converter).then(|| record(&self, converter, &mut notes)).flatten() {
            Some(service) => Change::Service(Box::new(service)),
            None => Self::gone(&self.metadata, converter),
        };
        Converted { change: Some(change), warnings: notes.finish() }
    }

    fn gone(metadata: &wire::Metadata, converter: &mut Converter) -> Change {
        Change::ServiceGone(converter.object_name(metadata))
    }
}

/// The selectors, in this process: a directory has no server to apply them, and no server applies the one on the type
/// (an ExternalName Service passes `spec.clusterIP!=None`).
fn serves(service: &wire::Service, converter: &Converter) -> bool {
    let spec = &service.spec;
    let headless =
        spec.cluster_ip.as_deref() == Some("None") || spec.cluster_ips.first().is_some_and(|ip| ip == "None");
    service.metadata.labels.service_proxy_name == converter.settings.service_proxy_name
        && spec.r#type.as_deref() != Some("ExternalName")
        && !headless
}

fn record(service: &wire::Service, converter: &mut Converter, notes: &mut Notes) -> Option<Service> {
    let spec = &service.spec;
    if let Some(problem) =
        [&service.metadata.namespace, &service.metadata.name].into_iter().find_map(|n| parse::name(n).err())
    {
        notes.add(format!("{problem}: the Service is not served"));
        return None;
    }
    let cluster_ips = cluster_ips(spec, notes);
    if cluster_ips.is_empty() {
        notes.add("it has no usable cluster IP (and kubelane allocates none): the Service is not served".into());
        return None;
    }
    let families = Families::of(&cluster_ips);
    let external_policy = policy("externalTrafficPolicy", spec.external_traffic_policy.as_deref(), notes);
    Some(Service {
        name: converter.object_name(&service.metadata),
        created: created(&service.metadata, notes),
        external_ips: families.keep("external IP", spec.external_ips.iter(), notes),
        load_balancer_ips: families.keep("load balancer IP", load_balancer_ips(&service.status), notes),
        ports: ports(&spec.ports, converter, notes),
        affinity_seconds: affinity(spec, notes),
        internal_policy: policy("internalTrafficPolicy", spec.internal_traffic_policy.as_deref(), notes),
        external_policy,
        source_ranges: source_ranges(&spec.load_balancer_source_ranges, notes),
        health_check_node_port: health_port(spec, external_policy, notes),
        client_source: client_source(service.metadata.annotations.cluster_policy_source.as_deref(), notes),
        cluster_ips,
    })
}

fn created(metadata: &wire::Metadata, notes: &mut Notes) -> i64 {
    let Some(text) = metadata.creation_timestamp.as_deref() else { return i64::MAX };
    parse::time(text).map(|t| t.as_second()).unwrap_or_else(|problem| {
        notes.add(format!("creationTimestamp {problem}: the Service counts as the youngest"));
        i64::MAX
    })
}

fn client_source(annotation: Option<&str>, notes: &mut Notes) -> Option<ClientSource> {
    let text = annotation?;
    text.parse()
        .inspect_err(|problem| {
            notes.add(format!(
                "annotation kubelane.io/cluster-policy-source {}: {problem}: it is ignored",
                quoted(text)
            ));
        })
        .ok()
}

/// `clusterIPs`, or the older `clusterIP` when that list is empty.
fn cluster_ips(spec: &wire::ServiceSpec, notes: &mut Notes) -> Vec<Ipx> {
    let single = spec.cluster_ip.iter().filter(|ip| !ip.is_empty() && spec.cluster_ips.is_empty());
    let mut ips = Vec::new();
    for text in spec.cluster_ips.iter().chain(single) {
        notes.plain("cluster IP", text);
        match parse::virtual_ip(text) {
            Ok(ip) if ips.contains(&ip) => {}
            Ok(ip) => ips.push(ip),
            Err(problem) => notes.add(format!("cluster IP {problem}: it is ignored")),
        }
    }
    ips
}

/// The families that a Service has are those of its cluster IPs.
struct Families(Vec<Family>);

impl Families {
    fn of(cluster_ips: &[Ipx]) -> Self {
        Families(cluster_ips.iter().map(Ipx::family).collect())
    }

    /// The usable addresses of `texts`, in order, without duplicates and of these families only.
    fn keep<'a>(&self, what: &str, texts: impl Iterator<Item = &'a String>, notes: &mut Notes) -> Vec<Ipx> {
        let mut ips = Vec::new();
        for text in texts {
            notes.plain(what, text);
            match parse::virtual_ip(text) {
                Ok(ip) if ips.contains(&ip) => {}
                Ok(ip) if self.0.contains(&ip.family()) => ips.push(ip),
                Ok(_) => notes.add(format!(
                    "{what} {} is of a family that the Service does not have: it is ignored",
                    quoted(text)
                )),
                Err(problem) => notes.add(format!("{what} {problem}: it is ignored")),
            }
        }
        ips
    }
}

/// Only addresses that the node itself must answer for: ipMode absent or VIP (KEP-1860). Hostnames have no address.
fn load_balancer_ips(status: &wire::ServiceStatus) -> impl Iterator<Item = &String> {
    let ingress = status.load_balancer.ingress.iter();
    ingress
        .filter(|i| matches!(i.ip_mode.as_deref(), None | Some("" | "VIP")))
        .filter_map(|i| i.ip.as_ref())
        .filter(|ip| !ip.is_empty())
}

fn ports(wire: &[wire::ServicePort], converter: &mut Converter, notes: &mut Notes) -> Vec<ServicePort> {
    let mut ports: Vec<ServicePort> = Vec::with_capacity(wire.len());
    for entry in wire {
        let name = entry.name.as_deref().unwrap_or_default();
        let (protocol, port) = match port_of(entry) {
            Ok(parsed) => parsed,
            Err(problem) => {
                notes.add(format!("port {}: {problem}: the port is not served", quoted(name)));
                continue;
            }
        };
        if ports.iter().any(|p| p.port == port && p.protocol == protocol) {
            notes.add(format!("port {name:?}: {port}/{} appears twice: the first one is served", protocol.as_str()));
            continue;
        }
        let node_port = match nonzero(&entry.node_port).map(parse::port).transpose() {
            Ok(node_port) => node_port.unwrap_or(0),
            Err(problem) => {
                notes.add(format!("port {name:?}: nodePort {problem}: the port is served without it"));
                0
            }
        };
        ports.push(ServicePort { name: converter.names.name(name), protocol, port, node_port });
    }
    ports
}

fn port_of(entry: &wire::ServicePort) -> Result<(Protocol, u16), String> {
    parse::name(entry.name.as_deref().unwrap_or_default())?;
    let number = entry.port.as_ref().unwrap_or(&Number::Is(0));
    Ok((parse::protocol(entry.protocol.as_deref())?, parse::port(number)?))
}

/// In Go's types, and so in the API, 0 and nothing are the same.
fn nonzero(number: &Option<Number>) -> Option<&Number> {
    number.as_ref().filter(|n| **n != Number::Is(0))
}

fn affinity(spec: &wire::ServiceSpec, notes: &mut Notes) -> Option<u32> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => None,
        Some("ClientIP") => Some(match &spec.session_affinity_config.client_ip.timeout_seconds {
            None => AFFINITY_DEFAULT,
            Some(Number::Is(seconds @ 1..=AFFINITY_MAX)) => *seconds as u32,
            Some(seconds) => {
                notes.add(format!(
                    "affinity timeout {seconds} is not in 1 to {AFFINITY_MAX} seconds: {AFFINITY_DEFAULT} is used"
                ));
                AFFINITY_DEFAULT
            }
        }),
        Some(other) => {
            notes.add(format!("sessionAffinity {} is unknown: the Service has no affinity", quoted(other)));
            None
        }
    }
}

fn policy(field: &str, value: Option<&str>, notes: &mut Notes) -> TrafficPolicy {
    match value {
        None | Some("" | "Cluster") => TrafficPolicy::Cluster,
        Some("Local") => TrafficPolicy::Local,
        Some(other) => {
            notes.add(format!("{field} {} is unknown: Cluster is used", quoted(other)));
            TrafficPolicy::Cluster
        }
    }
}

/// A list of which nothing is usable lets nobody in: a typing error must not open what its author meant to close.
fn source_ranges(texts: &[String], notes: &mut Notes) -> Vec<IpRange> {
    let mut ranges = Vec::with_capacity(texts.len());
    for text in texts.iter().filter(|t| !t.trim().is_empty()) {
        notes.plain("source range", text.trim());
        match parse::cidr(text) {
            Ok(range) if ranges.contains(&range) => {}
            Ok(range) => ranges.push(range),
            Err(problem) => notes.add(format!("source range {problem}: it admits no client")),
        }
    }
    if ranges.is_empty() && texts.iter().any(|t| !t.trim().is_empty()) {
        // No packet comes from the unspecified address.
        ranges.push(IpRange { ip: Ipx::any(Family::Ipv4), prefix: 32 });
        ranges.push(IpRange { ip: Ipx::any(Family::Ipv6), prefix: 128 });
    }
    ranges
}

/// Served for externalTrafficPolicy Local only, as kube-proxy does.
fn health_port(spec: &wire::ServiceSpec, external: TrafficPolicy, notes: &mut Notes) -> u16 {
    let number = nonzero(&spec.health_check_node_port).filter(|_| external == TrafficPolicy::Local);
    number.map_or(Ok(0), parse::port).unwrap_or_else(|problem| {
        notes.add(format!("healthCheckNodePort {problem}: health checks are not answered"));
        0
    })
}
