//! What the servers of this module answer, written down in advance: the packet programs give these answers to probes from
//! outside, also while there is no daemon (bpf/probe.h). Only ports whose listening sockets this daemon has are among them,
//! so that both agree.

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use axum::http::StatusCode;

use super::health::{Answer, Facts};
use super::{code, service_health};
use crate::abi::probe_limit::PROBE_LONGEST;
use crate::abi::probe_path::{PROBE_ANY, PROBE_HEALTHZ, PROBE_LIVEZ, PROBE_METHOD, PROBE_READYZ};
use crate::model::{Family, HealthCheck, Ipx, ProbeAnswer};

const JSON: [(&str, &str); 2] = [("content-type", "application/json"), ("x-content-type-options", "nosniff")];
const TEXT: [(&str, &str); 1] = [("content-type", "text/plain; charset=utf-8")];

/// Answers that tell the time are written again after this long.
const RENEWAL: Duration = Duration::from_secs(1);

/// The ports that are listened at, and when all that is said there was last known to be true.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Probed {
    /// Where `/healthz` is.
    pub healthz: Option<SocketAddr>,
    pub checks: Vec<(SocketAddr, HealthCheck)>,
    /// Nanoseconds of CLOCK_MONOTONIC; 0: not yet.
    pub vouched_ns: u64,
}

/// What answers were made of, and when.
#[derive(Debug)]
pub struct Said {
    probed: Probed,
    facts: Facts,
    at: Instant,
}

impl Probed {
    /// The answers at this moment; `None`: those that were `said` before are true.
    pub fn answers(&self, health: &super::Health, said: &mut Option<Said>) -> Option<Vec<ProbeAnswer>> {
        let (facts, now) = (health.facts(), Instant::now());
        let is_true = |said: &Said| {
            let Probed { healthz, checks, .. } = &said.probed;
            now.duration_since(said.at) < RENEWAL
                && (healthz, checks, &said.facts) == (&self.healthz, &self.checks, &facts)
        };
        if said.as_ref().is_some_and(is_true) {
            return None;
        }
        let answers = self.answers_by(&facts, now, SystemTime::now());
        *said = Some(Said { probed: self.clone(), facts, at: now });
        Some(answers)
    }

    fn answers_by(&self, facts: &Facts, now: Instant, wall: SystemTime) -> Vec<ProbeAnswer> {
        let healthz = self.healthz.iter().flat_map(|at| of_healthz(*at, facts, now, wall));
        let serves = facts.serves(now);
        let checks = self.checks.iter().flat_map(|(at, check)| of_service(*at, check, serves));
        healthz.chain(checks).collect()
    }
}

fn of_healthz(at: SocketAddr, facts: &Facts, now: Instant, wall: SystemTime) -> Vec<ProbeAnswer> {
    let of = |answer: &Answer, headers: &[(&str, &str)]| response(code(answer), headers, &answer.body);
    let refusal = [("allow", "GET,HEAD")];
    let all = [
        (PROBE_HEALTHZ, of(&facts.healthz(now, wall), &JSON)),
        (PROBE_LIVEZ, of(&facts.livez(now, wall), &JSON)),
        (PROBE_READYZ, of(&facts.readyz(), &TEXT)),
        (PROBE_METHOD, response(StatusCode::METHOD_NOT_ALLOWED, &refusal, "")),
        (PROBE_ANY, response(StatusCode::NOT_FOUND, &[], "")),
    ];
    let everywhere = addresses(at);
    let at_each = all.into_iter().flat_map(|(path, response)| {
        everywhere.iter().map(move |address| answer(*address, at.port(), path, true, response.clone()))
    });
    at_each.collect()
}

fn of_service(at: SocketAddr, check: &HealthCheck, serves: bool) -> Vec<ProbeAnswer> {
    let (code, body) = service_health::answer_of(&check.service, check.local_endpoints, serves);
    let weight = check.local_endpoints.to_string();
    let headers = [JSON[0], JSON[1], (service_health::WEIGHT, &weight)];
    let response = response(code, &headers, &body);
    let at_each = addresses(at).into_iter().map(|ip| answer(ip, at.port(), PROBE_ANY, false, response.clone()));
    at_each.collect()
}

fn answer(address: Ipx, port: u16, path: u32, has_paths: bool, (head, body): (String, String)) -> ProbeAnswer {
    ProbeAnswer { address, port, path, has_paths, head, body }
}

/// The wildcard of either family means both, as where it is listened at.
fn addresses(at: SocketAddr) -> Vec<Ipx> {
    if at.ip().is_unspecified() {
        return [Family::Ipv4, Family::Ipv6].map(Ipx::any).into();
    }
    // What comes from outside never goes there.
    if at.ip().is_loopback() { Vec::new() } else { vec![at.ip().into()] }
}

/// Head and body, which is cut if both are too long for one segment: only remarks of `/readyz` are.
fn response(code: StatusCode, headers: &[(&str, &str)], body: &str) -> (String, String) {
    let reason = code.canonical_reason().unwrap_or_default();
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let head = |length: usize| {
        format!("HTTP/1.1 {} {reason}\r\n{headers}content-length: {length}\r\nconnection: close\r\n\r\n", code.as_str())
    };
    let room = (PROBE_LONGEST as usize).saturating_sub(head(body.len()).len());
    let body = &body[..body.floor_char_boundary(room)];
    (head(body.len()), body.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ObjectName;
    use crate::serve::Health;

    fn find(answers: &[ProbeAnswer], address: &str, path: u32) -> Option<(String, String)> {
        let address: Ipx = address.parse().unwrap();
        let found = answers.iter().find(|answer| answer.address == address && answer.path == path);
        found.map(|answer| (answer.head.clone(), answer.body.clone()))
    }

    #[test]
    fn health_has_an_answer_for_each_path_at_both_wildcards() {
        let health = Health::default();
        health.up_to_date(SystemTime::now());
        let probed = Probed { healthz: Some(([0, 0, 0, 0], 10256).into()), ..Probed::default() };
        let answers = probed.answers(&health, &mut None).unwrap();
        assert_eq!(answers.len(), 10);
        for address in ["0.0.0.0", "::"] {
            let (head, body) = find(&answers, address, PROBE_HEALTHZ).unwrap();
            assert!(head.starts_with("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"), "{head}");
            assert!(
                head.ends_with("connection: close\r\n\r\n") && body.contains("\"nodeEligible\":true"),
                "{head}{body}"
            );
            assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{head}{body}");
            assert!(find(&answers, address, PROBE_READYZ).unwrap().0.starts_with("HTTP/1.1 503 Service Unavailable"));
            assert!(find(&answers, address, PROBE_ANY).unwrap().0.starts_with("HTTP/1.1 404 Not Found\r\n"));
            assert!(find(&answers, address, PROBE_METHOD).unwrap().0.contains("405 Method Not Allowed\r\nallow: GET"));
        }
        let one = Probed { healthz: Some(([192, 0, 2, 5], 10256).into()), ..Probed::default() };
        assert_eq!(one.answers(&health, &mut None).unwrap().len(), 5);
        let own = Probed { healthz: Some(([127, 0, 0, 1], 10256).into()), ..Probed::default() };
        assert!(own.answers(&health, &mut None).unwrap().is_empty(), "nobody asks there from outside");
    }

    #[test]
    fn answers_are_made_again_when_something_has_changed() {
        let health = Health::default();
        let (mut probed, mut said) =
            (Probed { healthz: Some(([0, 0, 0, 0], 10256).into()), ..Probed::default() }, None);
        assert!(probed.answers(&health, &mut said).is_some());
        probed.vouched_ns = 5;
        assert!(probed.answers(&health, &mut said).is_none());
        health.up_to_date(SystemTime::now());
        assert!(probed.answers(&health, &mut said).is_some(), "another state");
        probed.healthz = None;
        assert_eq!(probed.answers(&health, &mut said), Some(vec![]), "other ports");
        if let Some(said) = &mut said {
            said.at -= RENEWAL;
        }
        assert!(probed.answers(&health, &mut said).is_some(), "another time");
    }

    #[test]
    fn the_longest_names_fit_and_remarks_are_cut() {
        let health = Health::default();
        health.up_to_date(SystemTime::now());
        health.probed(None);
        health.unserved(Some("é".repeat(400)));
        let service = ObjectName::new(&"n".repeat(63), &"s".repeat(63));
        let check = HealthCheck { service, port: 32100, local_endpoints: u32::MAX };
        let probed = Probed {
            healthz: Some(([0, 0, 0, 0], 10256).into()),
            checks: vec![(([192, 0, 2, 5], 32100).into(), check)],
            vouched_ns: 0,
        };
        let answers = probed.answers(&health, &mut None).unwrap();
        for answer in &answers {
            assert!(answer.head.len() + answer.body.len() <= PROBE_LONGEST as usize, "{answer:?}");
            assert!(answer.head.contains(&format!("content-length: {}\r\n", answer.body.len())), "{answer:?}");
        }
        let (head, body) = find(&answers, "192.0.2.5", PROBE_ANY).unwrap();
        assert!(
            head.contains("x-load-balancing-endpoint-weight: 4294967295\r\n") && body.ends_with("true\n}"),
            "{body}"
        );
        let (_, remarks) = find(&answers, "::", PROBE_READYZ).unwrap();
        assert!(remarks.starts_with("ok; not served: éé") && remarks.len() > 300, "{remarks}");
    }
}
