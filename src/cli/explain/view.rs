//! What is told of one destination and one kind of client: records, as JSON has them.

use std::collections::HashMap;
use std::net::SocketAddr;

use serde::Serialize;

use super::decide::{Candidate, Client, Decision, Found, Reason, Verdict};
use super::target::Destination;
use super::words;
use crate::abi::frontend_flag::{FRONTEND_CLUSTER_IP, FRONTEND_SOURCE_RANGES};
use crate::abi::pool_member::POOL_LOCAL;
use crate::cli::snapshot::{PortName, kinds, port_name};
use crate::explain::{self as told, LeftOut, Policy};
use crate::model::Family;

/// One destination, as one kind of client has it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct View {
    /// "IP:port/PROTOCOL".
    pub to: String,
    pub from: String,
    /// The client is outside the node.
    pub is_outside: bool,
    /// `None`: no Service port has the destination.
    pub service: Option<PortName>,
    pub kinds: Vec<&'static str>,
    pub pool: Option<Pool>,
    pub affinity: Option<Affinity>,
    pub source_ranges: Option<SourceRanges>,
    pub endpoints: Vec<Endpoint>,
    pub left_out: Vec<LeftOutEndpoint>,
    /// backend, refused, dropped or untouched.
    pub verdict: &'static str,
    /// Why no backend gets it.
    pub reason: Option<&'static str>,
    /// What the next connection gets.
    pub next: String,
    pub remedy: Option<String>,
}

/// Which set of endpoints is used.
#[derive(Clone, Debug, Serialize)]
pub struct Pool {
    /// Cluster or Local.
    pub set: Policy,
    pub why: Vec<String>,
}

/// Session affinity.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Affinity {
    pub seconds: u32,
    /// The backend that this client had, if it is remembered.
    pub backend: Option<String>,
    pub left_seconds: Option<u64>,
    /// Whether the client was looked for.
    pub is_known_client: bool,
}

/// `loadBalancerSourceRanges`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceRanges {
    /// CIDRs; empty when only the daemon would know them.
    pub ranges: Vec<String>,
    /// `None`: no client was named.
    pub has_client: Option<bool>,
}

/// An endpoint that new connections may get.
#[derive(Clone, Debug, Serialize)]
pub struct Endpoint {
    pub address: String,
    /// Of new connections without affinity: 1 is all of them.
    pub share: f64,
    pub node: Option<String>,
    /// ready or terminating.
    pub state: &'static str,
}

/// One that gets none.
#[derive(Clone, Debug, Serialize)]
pub struct LeftOutEndpoint {
    pub address: String,
    pub node: Option<String>,
    /// `None`: only the daemon knows.
    pub reason: Option<LeftOut>,
    pub why: String,
}

/// What goes into a view.
pub struct Asked<'a> {
    pub to: Destination,
    /// As it is shown.
    pub to_text: String,
    pub from_text: String,
    pub client: &'a Client,
    pub decision: &'a Decision,
    /// What the daemon says of the Service and port that was found.
    pub told: Option<(&'a told::Service, &'a told::Port)>,
    /// What else it says of Services with this address.
    pub others: &'a [told::Service],
    pub daemon: Option<&'a told::Daemon>,
    /// Endpoints in the kernel that are in another pool, where the daemon does not tell.
    pub strangers: Vec<LeftOutEndpoint>,
}

pub fn view(asked: Asked) -> View {
    let found = asked.decision.found.as_ref();
    let is_outside = matches!(asked.client, Client::Packet(_));
    let service = found.map(|found| port_name(found.name.as_deref().unwrap_or("-/-")));
    let (verdict, reason) = match asked.decision.verdict {
        Verdict::Backend => ("backend", None),
        Verdict::Refused(reason) => ("refused", Some(reason)),
        Verdict::Dropped(reason) => ("dropped", Some(reason)),
        Verdict::Untouched(reason) => ("untouched", Some(reason)),
    };
    // A frontend that is no business of this client's has no pool for it.
    let concerned = found.filter(|_| !matches!(reason, Some(Reason::ClusterIpOutside | Reason::SctpSocket)));
    View {
        is_outside,
        kinds: found.map(|found| kinds(found.row.flags)).unwrap_or_default(),
        pool: concerned.map(|found| pool(found, &asked, is_outside)),
        affinity: concerned.filter(|found| found.row.affinity_seconds > 0).map(|found| affinity(found, asked.client)),
        source_ranges: concerned.and_then(|found| source_ranges(found, &asked)),
        endpoints: concerned.map(|found| endpoints(found, asked.told)).unwrap_or_default(),
        left_out: concerned.map(|found| left_out(found, &asked)).unwrap_or_default(),
        verdict,
        reason: reason.map(words::label),
        next: words::next(&asked),
        remedy: reason.and_then(|reason| words::remedy(reason, &asked)),
        to: asked.to_text,
        from: asked.from_text,
        service,
    }
}

fn set_of(found: &Found) -> Policy {
    if u32::from(found.pool.member) == POOL_LOCAL { Policy::Local } else { Policy::Cluster }
}

fn is_ipv6(found: &Found) -> bool {
    found.key.ip().family() == Family::Ipv6
}

fn pool(found: &Found, asked: &Asked, is_outside: bool) -> Pool {
    let set = set_of(found);
    let has_cluster_ip = found.row.flags & FRONTEND_CLUSTER_IP != 0;
    let mut why = vec![words::policy(set, is_outside, has_cluster_ip)];
    let choice = asked.told.and_then(|(_, port)| port.choices.iter().find(|c| c.is_ipv6 == is_ipv6(found)));
    match choice {
        Some(choice) => why.extend(words::choice(set, choice, asked.daemon, !found.candidates.is_empty())),
        None if !found.candidates.is_empty() && found.candidates.iter().all(|candidate| candidate.is_terminating) => {
            why.push(words::FALLBACK.to_owned());
        }
        None => {}
    }
    Pool { set, why }
}

fn affinity(found: &Found, client: &Client) -> Affinity {
    Affinity {
        seconds: found.row.affinity_seconds,
        backend: found.remembered.map(|known| known.at.to_string()),
        left_seconds: found.remembered.map(|known| known.left_seconds),
        is_known_client: match client {
            Client::Packet(ip) | Client::PodPacket(ip) => ip.is_some(),
            Client::Socket { cookies, .. } => !cookies.is_empty(),
        },
    }
}

fn source_ranges(found: &Found, asked: &Asked) -> Option<SourceRanges> {
    if found.row.flags & FRONTEND_SOURCE_RANGES == 0 {
        return None;
    }
    let ranges = asked.told.map(|(service, _)| service.source_ranges.clone()).unwrap_or_default();
    Some(SourceRanges { ranges, has_client: found.is_admitted })
}

fn endpoints(found: &Found, told: Option<(&told::Service, &told::Port)>) -> Vec<Endpoint> {
    let all = told.iter().flat_map(|(_, port)| &port.endpoints);
    let known: HashMap<SocketAddr, &told::Endpoint> = all.map(|endpoint| (endpoint.at, endpoint)).collect();
    let endpoint = |candidate: &Candidate| {
        let at = SocketAddr::new(candidate.at.ip.to_ip(), candidate.at.port);
        let told = known.get(&at).and_then(|endpoint| endpoint.node.clone());
        let here = if candidate.is_local { "this node" } else { "another node" };
        Endpoint {
            share: candidate.share,
            node: told.or(Some(here.to_owned())),
            state: if candidate.is_terminating { "terminating" } else { "ready" },
            address: candidate.at.to_string(),
        }
    };
    found.candidates.iter().map(endpoint).collect()
}

fn left_out(found: &Found, asked: &Asked) -> Vec<LeftOutEndpoint> {
    let Some((_, port)) = asked.told else { return asked.strangers.clone() };
    let of_family = |endpoint: &&told::Endpoint| endpoint.at.is_ipv6() == is_ipv6(found);
    let reason = |endpoint: &told::Endpoint| match set_of(found) {
        Policy::Cluster => endpoint.not_in_cluster,
        Policy::Local => endpoint.not_in_local,
    };
    let record = |endpoint: &told::Endpoint| {
        let reason = reason(endpoint)?;
        let address = if endpoint.at.port() == 0 { endpoint.at.ip().to_string() } else { endpoint.at.to_string() };
        let why = words::left_out(reason, port);
        Some(LeftOutEndpoint { address, node: endpoint.node.clone(), reason: Some(reason), why })
    };
    port.endpoints.iter().filter(of_family).filter_map(record).collect()
}
