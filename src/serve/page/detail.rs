//! A Service with its endpoints, and why each is in or out: what the worker tells (`plan/explain.rs`), in the words of
//! `kubelane explain`.

use serde::Serialize;

use crate::escape;
use crate::explain::{Answer, Endpoint, Frontend, LeftOut, Policy, Port, Service, State, words};
use crate::snapshot::kinds;

/// Endpoints of one port that are listed, of those that are in use and of those that are not.
const ENDPOINTS: usize = 50;
/// Frontends, warnings, ports and source ranges that are listed.
const LISTED: usize = 30;

/// A Service.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Detail {
    /// As it was asked for.
    pub service: String,
    pub text: String,
    /// The daemon knows it.
    pub is_known: bool,
    pub warnings: Vec<String>,
    /// What it asks for, in words.
    pub facts: Vec<String>,
    pub ports: Vec<PortDetail>,
}

/// One of its ports.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PortDetail {
    /// "http, 80/TCP".
    pub text: String,
    pub frontends: Vec<String>,
    /// Why these endpoints.
    pub why: Vec<String>,
    /// The sets that frontends use: Cluster, Local.
    pub sets: Vec<Policy>,
    pub endpoints: Vec<EndpointDetail>,
    pub more_endpoints: usize,
}

/// One endpoint.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointDetail {
    pub address: String,
    pub node: String,
    pub state: &'static str,
    /// Of each of the port's sets.
    pub places: Vec<Place>,
}

/// Whether an endpoint is in a set.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Place {
    /// Of the new connections of clients without affinity: 1 is all of them. `None`: it gets none.
    pub share: Option<f64>,
    pub why: Option<String>,
}

impl Detail {
    /// Of what was asked for by this namespace and name.
    pub fn new(answer: &Answer, (namespace, name): &(String, String)) -> Detail {
        let service = format!("{namespace}/{name}");
        let known = answer.services.first();
        Detail {
            text: shown(&service),
            service,
            is_known: known.is_some(),
            warnings: known.iter().flat_map(|known| &known.warnings).take(LISTED).map(|text| shown(text)).collect(),
            facts: known.map(facts).unwrap_or_default(),
            ports: known.iter().flat_map(|known| &known.ports).take(LISTED).map(|port| detail(port, answer)).collect(),
        }
    }
}

/// Names are whatever somebody wrote.
pub fn shown(text: &str) -> String {
    escape::line(text)
}

fn facts(service: &Service) -> Vec<String> {
    let mut facts = vec![format!(
        "internalTrafficPolicy {:?}, externalTrafficPolicy {:?}",
        service.internal_policy, service.external_policy
    )];
    if service.affinity_seconds > 0 {
        facts.push(format!("session affinity by client, {} s", service.affinity_seconds));
    }
    if !service.source_ranges.is_empty() {
        let ranges = listed(&service.source_ranges.iter().map(|range| shown(range)).collect::<Vec<_>>());
        facts.push(format!("load balancer IPs admit {ranges}"));
    }
    for ip in service.left_alone.iter().take(LISTED) {
        facts.push(format!("{ip} is left alone: a device of this node has it"));
    }
    facts
}

fn listed(words: &[String]) -> String {
    match words.len() {
        n if n > LISTED => format!("{} and {} more", words[..LISTED].join(", "), n - LISTED),
        _ => words.join(", "),
    }
}

fn detail(port: &Port, answer: &Answer) -> PortDetail {
    let name = if port.name.is_empty() { String::new() } else { format!("{}, ", shown(&port.name)) };
    let sets = sets(port);
    let mut why = Vec::new();
    for set in &sets {
        for choice in &port.choices {
            let of_family = |endpoint: &&Endpoint| endpoint.at.is_ipv6() == choice.is_ipv6;
            let has_endpoints = port.endpoints.iter().filter(of_family).any(|endpoint| out(endpoint, *set).is_none());
            if let Some(words) = words::choice(*set, choice, Some(&answer.daemon), has_endpoints) {
                let family = if choice.is_ipv6 { "IPv6" } else { "IPv4" };
                why.push(shown(&format!("{set:?} set, {family}: {words}")));
            }
        }
    }
    let (used, unused): (Vec<&Endpoint>, Vec<&Endpoint>) =
        port.endpoints.iter().partition(|endpoint| sets.iter().any(|set| out(endpoint, *set).is_none()));
    let sizes: Vec<[usize; 2]> = sets.iter().map(|set| sizes(port, *set)).collect();
    let listed = used.iter().take(ENDPOINTS).chain(unused.iter().take(ENDPOINTS));
    let endpoints: Vec<EndpointDetail> =
        listed.map(|endpoint| endpoint_detail(endpoint, port, &sets, &sizes)).collect();
    // NodePorts last.
    let mut frontends: Vec<&Frontend> = port.frontends.iter().collect();
    frontends.sort_by_key(|frontend| frontend.at.ip().is_unspecified());
    PortDetail {
        text: format!("{name}{}/{}", port.port, words::transport(port.protocol)),
        frontends: frontends.into_iter().take(LISTED).map(frontend).collect(),
        why,
        more_endpoints: port.endpoints.len() - endpoints.len(),
        sets,
        endpoints,
    }
}

/// Those that the port's frontends use, Cluster first.
fn sets(port: &Port) -> Vec<Policy> {
    let used = |set: Policy| port.frontends.iter().any(|f| f.inside.set == set || f.outside.set == set);
    [Policy::Cluster, Policy::Local].into_iter().filter(|set| used(*set)).collect()
}

fn out(endpoint: &Endpoint, set: Policy) -> Option<LeftOut> {
    match set {
        Policy::Cluster => endpoint.not_in_cluster,
        Policy::Local => endpoint.not_in_local,
    }
}

fn frontend(frontend: &Frontend) -> String {
    let at = match frontend.at.ip().is_unspecified() {
        true => {
            format!("port {} of this node, {}", frontend.at.port(), if frontend.at.is_ipv6() { "IPv6" } else { "IPv4" })
        }
        false => frontend.at.to_string(),
    };
    let (inside, outside) = (frontend.inside.set, frontend.outside.set);
    let used = match inside == outside {
        true => format!("{inside:?} set"),
        false => format!("{inside:?} set, from outside {outside:?} set"),
    };
    let owner = frontend.owner.as_ref().map(|owner| format!("; {} has it", shown(owner))).unwrap_or_default();
    format!("{at} ({}): {used}{owner}", kinds(frontend.flags).join(", "))
}

/// How many endpoints a set has: of IPv4, of IPv6.
fn sizes(port: &Port, set: Policy) -> [usize; 2] {
    let mut sizes = [0; 2];
    let all = port.endpoints.iter().filter(|endpoint| out(endpoint, set).is_none());
    all.for_each(|endpoint| sizes[usize::from(endpoint.at.is_ipv6())] += 1);
    sizes
}

/// `sizes`: of each of the `sets`.
fn endpoint_detail(endpoint: &Endpoint, port: &Port, sets: &[Policy], sizes: &[[usize; 2]]) -> EndpointDetail {
    let place = |(set, sizes): (&Policy, &[usize; 2])| match out(endpoint, *set) {
        Some(reason) => Place { share: None, why: Some(shown(&words::left_out(reason, port))) },
        None => Place { share: Some(1.0 / sizes[usize::from(endpoint.at.is_ipv6())] as f64), why: None },
    };
    EndpointDetail {
        address: if endpoint.at.port() == 0 { endpoint.at.ip().to_string() } else { endpoint.at.to_string() },
        node: endpoint.node.as_deref().map(shown).unwrap_or_default(),
        state: match endpoint.state {
            State::Ready => "ready",
            State::Terminating => "terminating",
            State::NotReady => "not ready",
        },
        places: sets.iter().zip(sizes).map(place).collect(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// As the daemon would send it.
    fn answer(endpoints: usize) -> Answer {
        let out = |reason: &str| json!(reason);
        let mut all: Vec<serde_json::Value> = (0..endpoints)
            .map(|n| {
                json!({"at": format!("10.0.{}.{}:80", n / 250, n % 250), "node": "n1", "state": "ready",
                "notInCluster": null, "notInLocal": null})
            })
            .collect();
        all.push(json!({"at": "10.9.0.1:80", "node": "n2\u{202e}", "state": "notReady",
            "notInCluster": out("notReady"), "notInLocal": out("otherNode")}));
        let pool = |set: &str| json!({"set": set, "drops": false});
        let frontend = |at: &str, outside: &str| json!({"at": at, "flags": 1, "inside": pool("Cluster"), "outside": pool(outside), "owner": null});
        let port = json!({"name": "http\x1b", "protocol": "TCP", "port": 80, "endpoints": all,
            "choices": [{"isIpv6": false, "anyReady": true, "anyLocalReady": true, "hints": "zones"}],
            "frontends": [frontend("10.96.0.1:80", "Cluster"), frontend("0.0.0.0:30080", "Local")]});
        let service = json!({"namespace": "shop", "name": "web", "internalPolicy": "Cluster", "externalPolicy": "Local",
            "affinitySeconds": 600, "sourceRanges": ["192.0.2.0/24"], "leftAlone": [], "warnings": ["bad\nline"],
            "ports": [port]});
        let daemon = json!({"node": "n1", "zone": "z1", "isReady": true, "waits": false, "unserved": null});
        serde_json::from_value(json!({"version": 1, "release": "0", "daemon": daemon, "services": [service]})).unwrap()
    }

    fn asked() -> (String, String) {
        ("shop".to_owned(), "web".to_owned())
    }

    #[test]
    fn each_endpoint_has_a_share_or_a_reason_for_each_set_in_use() {
        let detail = Detail::new(&answer(4), &asked());
        let port = &detail.ports[0];
        assert_eq!(
            (port.text.as_str(), &port.sets[..]),
            ("http\\u001b, 80/TCP", &[Policy::Cluster, Policy::Local][..])
        );
        assert_eq!(port.endpoints[0].places[0], Place { share: Some(0.25), why: None });
        let last = port.endpoints.last().unwrap();
        assert_eq!((last.node.as_str(), last.state), ("n2\\u202e", "not ready"));
        let why = |text: &str| Place { share: None, why: Some(text.to_owned()) };
        assert_eq!(last.places, [why("not ready"), why("on another node")]);
        assert_eq!(port.why, ["Cluster set, IPv4: hints are followed: endpoints for zone z1"]);
        assert_eq!(port.frontends[1], "port 30080 of this node, IPv4 (ClusterIP): Cluster set, from outside Local set");
        assert_eq!(detail.facts[1..], ["session affinity by client, 600 s", "load balancer IPs admit 192.0.2.0/24"]);
        assert_eq!(detail.warnings, ["bad\\u000aline"]);
    }

    #[test]
    fn a_service_with_thousands_of_endpoints_is_told_in_a_bounded_size() {
        let detail = Detail::new(&answer(5000), &asked());
        let port = &detail.ports[0];
        assert_eq!((port.endpoints.len(), port.more_endpoints), (ENDPOINTS + 1, 5000 - ENDPOINTS));
        assert!(port.endpoints.last().unwrap().places[0].why.is_some(), "those that are left out are listed, too");
        assert!(serde_json::to_string(&detail).unwrap().len() < 20_000);
    }

    #[test]
    fn a_service_that_the_daemon_does_not_know_is_said_to_be_so() {
        let detail = Detail::new(&Answer::new(), &("a\x07".to_owned(), "b".to_owned()));
        assert!(!detail.is_known && detail.ports.is_empty());
        assert_eq!(detail.text, "a\\u0007/b");
    }
}
