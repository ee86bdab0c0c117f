//! discovery.k8s.io/v1 EndpointSlice.

use super::wire::quoted;
use super::{Convert, Converted, Converter, Notes, parse, wire};
use crate::model::{Change, Endpoint, Family, Hints, Ipx, Kind, Slice, SlicePort};
use std::sync::Arc;

/// Makes the slices of Services with a selector. (Those of mirrored Endpoints have another name: people write them.)
const CONTROLLER: &str = "endpointslice-controller.k8s.io";

impl Convert for wire::EndpointSlice {
    const LISTED: Kind = Kind::EndpointSlices;

    fn convert(self, converter: &mut Converter) -> Converted {
        let mut notes = Notes::new(Self::subject(&self.metadata));
        let change = match (!self.metadata.labels.headless).then(|| record(&self, converter, &mut notes)).flatten() {
            Some(slice) => Change::Slice(Box::new(slice)),
            None => Self::gone(&self.metadata, converter),
        };
        Converted { change: Some(change), warnings: notes.finish() }
    }

    fn gone(metadata: &wire::Metadata, converter: &mut Converter) -> Change {
        Change::SliceGone(converter.object_name(metadata))
    }
}

fn record(slice: &wire::EndpointSlice, converter: &mut Converter, notes: &mut Notes) -> Option<Slice> {
    let family = match slice.address_type.as_str() {
        "IPv4" => Family::Ipv4,
        "IPv6" => Family::Ipv6,
        // Names are for others to resolve; a proxy has nothing to do with them.
        "FQDN" => return None,
        other => {
            notes.add(format!("addressType {} is unknown: the slice is not used", quoted(other)));
            return None;
        }
    };
    let service = slice.metadata.labels.service_name.as_deref().unwrap_or_default();
    if service.is_empty() {
        notes.add("it has no label kubernetes.io/service-name: the slice is not used".into());
        return None;
    }
    // Room for all and no more: collected, ten would have room for sixteen for as long as the slice is known.
    let mut endpoints = Vec::with_capacity(slice.endpoints.len());
    endpoints.extend(slice.endpoints.iter().filter_map(|e| endpoint(e, family, converter, notes)));
    Some(Slice {
        name: converter.object_name(&slice.metadata),
        service: converter.names.name(service),
        is_controlled: slice.metadata.labels.managed_by.as_deref() == Some(CONTROLLER),
        ports: ports(&slice.ports, converter, notes),
        endpoints,
        triggered: triggered(&slice.metadata, notes),
    })
}

fn triggered(metadata: &wire::Metadata, notes: &mut Notes) -> Option<i64> {
    let text = metadata.annotations.last_change_trigger_time.as_deref()?;
    match parse::time(text) {
        Ok(time) => i64::try_from(time.as_nanosecond()).ok(),
        Err(problem) => {
            notes.add(format!("last-change-trigger-time {problem}: this change is not timed"));
            None
        }
    }
}

fn ports(wire: &[wire::SlicePort], converter: &mut Converter, notes: &mut Notes) -> Vec<SlicePort> {
    let mut ports = Vec::with_capacity(wire.len());
    for entry in wire {
        // A missing number means "all ports", which a proxy cannot serve and other consumers may.
        let Some(number) = &entry.port else { continue };
        let name = entry.name.as_deref().unwrap_or_default();
        match (parse::protocol(entry.protocol.as_deref()), parse::port(number)) {
            (Ok(protocol), Ok(port)) => ports.push(SlicePort { name: converter.names.name(name), protocol, port }),
            (Err(problem), _) | (_, Err(problem)) => {
                notes.add(format!("port {}: {problem}: the port is not used", quoted(name)));
            }
        }
    }
    ports
}

fn endpoint(wire: &wire::Endpoint, family: Family, converter: &mut Converter, notes: &mut Notes) -> Option<Endpoint> {
    wire.addresses.first().into_iter().for_each(|text| notes.plain("endpoint", text));
    let ip = match address(wire, family) {
        Ok(ip) => ip,
        Err(problem) => {
            notes.add(format!("endpoint {problem}: it is not used"));
            return None;
        }
    };
    let ready = wire.conditions.ready.unwrap_or(true);
    Some(Endpoint {
        ip,
        ready,
        serving: wire.conditions.serving.unwrap_or(ready),
        terminating: wire.conditions.terminating.unwrap_or(false),
        node: wire.node_name.as_deref().filter(|n| !n.is_empty()).map(|n| converter.names.name(n)),
        hints: wire.hints.as_ref().and_then(|h| hints(h, converter)),
    })
}

/// The API says that only the first address is used.
fn address(wire: &wire::Endpoint, family: Family) -> Result<Ipx, String> {
    let text = wire.addresses.first().ok_or("without an address")?;
    let ip = parse::ip(text)?;
    match ip.to_ip() {
        _ if ip.family() != family => Err(format!("{text:?} is not of the slice's addressType")),
        std if std.is_unspecified() || std.is_multicast() => {
            Err(format!("{text:?} is an unspecified or multicast address"))
        }
        _ => Ok(ip),
    }
}

fn hints(wire: &wire::EndpointHints, converter: &mut Converter) -> Option<Arc<Hints>> {
    let mut list = |named: &[wire::Named]| named.iter().map(|n| converter.names.name(&n.name)).collect();
    let hints = Hints { zones: list(&wire.for_zones), nodes: list(&wire.for_nodes) };
    let empty = hints.zones.is_empty() && hints.nodes.is_empty();
    (!empty).then(|| converter.names.hints(hints))
}
