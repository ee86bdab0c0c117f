//! What `compile` makes of a Service, with the reasons: for people who ask. Nothing is decided here. Frontends and
//! endpoints are those that `compile` gives, sets and reasons those of `select`.

use std::net::SocketAddr;

use super::compile::{Compiled, CompiledFrontend, CompiledPort, Context, PoolUse, candidates, compile};
use super::select::{Candidate, Choice, HintRule, LeftOut, Tally};
use crate::abi::pool_empty::EMPTY_DROP;
use crate::abi::pool_member::{POOL_CLUSTER, POOL_LOCAL};
use crate::explain::{self, Endpoint, Frontend, Hints, Policy, Pool, Port, State};
use crate::model::{Endpoint as Known, Family, Ipx, Service, ServicePort, Slice, SocketAddrx};
use crate::table::{HashMap, HashSet};

/// `Frontend::owner` is left open: claims are the layout's.
pub fn explain(service: &Service, slices: &[&Slice], context: Context) -> explain::Service {
    let compiled = compile(service, slices, context);
    let ports = ports(service, &compiled);
    explain::Service {
        namespace: service.name.namespace.to_string(),
        name: service.name.name.to_string(),
        internal_policy: service.internal_policy.into(),
        external_policy: service.external_policy.into(),
        affinity_seconds: service.affinity_seconds.unwrap_or(0),
        source_ranges: service.source_ranges.iter().map(|r| format!("{}/{}", r.ip, r.prefix)).collect(),
        left_alone: service.cluster_ips.iter().filter(|ip| context.bound.contains(*ip)).map(Ipx::to_ip).collect(),
        warnings: compiled.warnings.iter().map(|warning| warning.message.clone()).collect(),
        ports: ports.map(|(port, compiled)| explain_port(service, port, compiled, slices, context)).collect(),
    }
}

/// Each port that is laid out, beside what the Service says of it.
fn ports<'a>(
    service: &'a Service,
    compiled: &'a Compiled,
) -> impl Iterator<Item = (&'a ServicePort, &'a CompiledPort)> {
    let of = |port: &&CompiledPort| service.ports.iter().find(|p| p.name == port.name && p.protocol == port.protocol);
    compiled.ports.iter().filter_map(move |port| Some((of(&port)?, port)))
}

fn explain_port(
    service: &Service,
    port: &ServicePort,
    compiled: &CompiledPort,
    slices: &[&Slice],
    context: Context,
) -> Port {
    let (mut choices, mut endpoints) = (Vec::new(), Vec::new());
    let nodes = nodes(slices);
    for family in [Family::Ipv4, Family::Ipv6] {
        let mut every_ip = service.cluster_ips.iter().chain(&service.external_ips).chain(&service.load_balancer_ips);
        if !every_ip.any(|ip| ip.family() == family) {
            continue;
        }
        let candidates = candidates(port, slices, family, context.place);
        let mut tally = Tally::default();
        candidates.iter().for_each(|candidate| tally.add(candidate, context.place));
        let choice = tally.decide();
        choices.push(explain::Choice {
            is_ipv6: family == Family::Ipv6,
            any_ready: choice.any_ready,
            any_local_ready: choice.any_local_ready,
            hints: match choice.hints {
                HintRule::Node => Hints::Nodes,
                HintRule::Zone => Hints::Zones,
                HintRule::Ignore => tally.hints_ignored().map_or(Hints::None, Hints::Ignored),
            },
        });
        endpoints.extend(candidates.iter().map(|candidate| {
            let node = nodes.get(&candidate.at.ip).and_then(|node| node.map(str::to_owned));
            explain_endpoint(candidate, choice, compiled, context, node)
        }));
        endpoints.extend(portless(port, slices, family, &candidates));
    }
    endpoints.sort_by_key(|endpoint| endpoint.at);
    Port {
        name: port.name.to_string(),
        protocol: port.protocol.into(),
        port: port.port,
        frontends: compiled.frontends.iter().map(frontend).collect(),
        choices,
        endpoints,
    }
}

fn frontend(compiled: &CompiledFrontend) -> Frontend {
    let pool = |r#use: PoolUse| Pool {
        set: if u32::from(r#use.member) == POOL_LOCAL { Policy::Local } else { Policy::Cluster },
        drops: u32::from(r#use.on_empty) == EMPTY_DROP,
    };
    Frontend {
        at: SocketAddr::new(compiled.key.ip().to_ip(), compiled.key.port()),
        flags: compiled.flags.into(),
        inside: pool(compiled.inside),
        outside: pool(compiled.outside),
        owner: None,
    }
}

/// What the endpoint's row says counts; why it says so is asked of the choice.
fn explain_endpoint(
    candidate: &Candidate,
    choice: Choice,
    compiled: &CompiledPort,
    context: Context,
    node: Option<String>,
) -> Endpoint {
    let asked = compiled.frontends.iter().fold(0, |sets, f| sets | u32::from(f.inside.member | f.outside.member));
    let row = compiled.endpoints.binary_search_by_key(&candidate.at, |e| e.at).ok().map(|at| compiled.endpoints[at]);
    let why = |set: u32, judged: Result<(), LeftOut>| match judged {
        Ok(()) if asked & set != 0 && row.is_none_or(|row| u32::from(row.pools) & set == 0) => Some(LeftOut::OverQuota),
        judged => judged.err(),
    };
    let state = match candidate.is_usable() {
        true if candidate.ready => State::Ready,
        true => State::Terminating,
        false => State::NotReady,
    };
    Endpoint {
        at: socket(candidate.at),
        node,
        state,
        not_in_cluster: why(POOL_CLUSTER, choice.cluster(candidate, context.place)),
        not_in_local: why(POOL_LOCAL, choice.local(candidate)),
    }
}

/// Endpoints of slices that do not name the port.
fn portless(port: &ServicePort, slices: &[&Slice], family: Family, candidates: &[Candidate]) -> Vec<Endpoint> {
    let mut known: HashSet<Ipx> = candidates.iter().map(|candidate| candidate.at.ip).collect();
    let lacks_port = |slice: &&&Slice| !slice.ports.iter().any(|p| p.name == port.name && p.protocol == port.protocol);
    let all = slices.iter().filter(lacks_port).flat_map(|slice| &slice.endpoints);
    let fresh = all.filter(|endpoint| endpoint.ip.family() == family && known.insert(endpoint.ip));
    fresh
        .map(|endpoint| Endpoint {
            at: SocketAddr::new(endpoint.ip.to_ip(), 0),
            node: endpoint.node.as_deref().map(str::to_owned),
            state: if endpoint.ready { State::Ready } else { State::NotReady },
            not_in_cluster: Some(LeftOut::NoSuchPort),
            not_in_local: Some(LeftOut::NoSuchPort),
        })
        .collect()
}

fn nodes<'a>(slices: &[&'a Slice]) -> HashMap<Ipx, Option<&'a str>> {
    let all = slices.iter().flat_map(|slice| &slice.endpoints);
    all.map(|endpoint: &Known| (endpoint.ip, endpoint.node.as_deref())).collect()
}

fn socket(at: SocketAddrx) -> SocketAddr {
    SocketAddr::new(at.ip.to_ip(), at.port)
}
