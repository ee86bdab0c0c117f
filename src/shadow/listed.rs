//! Rules by the destination that they are for, until all chains are known.

use super::chains::{Chains, Rule};
use super::{Affinity, Answer, Client, Row, Rules, remark};
use crate::abi::FrontendKey;
use crate::model::Protocol;
use crate::table::HashMap;

/// The rules of one destination.
#[derive(Debug, Default)]
struct Listed {
    label: String,
    /// Those that translate come first, then those that filter what was not translated.
    nat: Vec<Rule>,
    filter: Vec<Rule>,
}

/// Rules by destination.
#[derive(Debug, Default)]
pub struct Destinations(HashMap<FrontendKey, Listed>);

impl Destinations {
    pub fn add(&mut self, key: FrontendKey, is_nat: bool, rule: Rule, label: &str) {
        let listed = self.0.entry(key).or_default();
        if listed.label.is_empty() {
            label.clone_into(&mut listed.label);
        }
        if is_nat { listed.nat.push(rule) } else { listed.filter.push(rule) }
    }

    /// What all this comes to.
    pub fn finish(self, chains: &Chains, rules: &mut Rules) {
        for (key, listed) in self.0 {
            let mut affinity = 0;
            let mut answer = |client| {
                let found = chains.walk(&listed.nat, client);
                affinity = affinity.max(found.affinity);
                found.answer().or_else(|| chains.walk(&listed.filter, client).answer())
            };
            let (inside, outside) = (answer(Client::Inside), answer(Client::Outside));
            if [&inside, &outside].into_iter().any(|answer| *answer == Some(Answer::Unknown)) {
                let about = format!("the {} rules of {} are not understood and not compared", rules.mode, shown(&key));
                remark(&mut rules.remarks, &about, &listed.label);
            }
            if inside.is_some() || outside.is_some() {
                let affinity = Affinity::Seconds(affinity);
                rules.rows.insert(key, Row { label: listed.label, inside, outside, affinity });
            }
        }
    }
}

/// "10.96.0.1:80/TCP", "NodePort 30080/TCP (IPv4)".
pub fn shown(key: &FrontendKey) -> String {
    let protocol = crate::snapshot::protocol_name(key.protocol);
    let at = crate::model::SocketAddrx { ip: key.ip(), port: key.port() };
    match (key.ip().to_ip().is_unspecified(), key.ip().family()) {
        (true, crate::model::Family::Ipv4) => format!("NodePort {}/{protocol} (IPv4)", key.port()),
        (true, crate::model::Family::Ipv6) => format!("NodePort {}/{protocol} (IPv6)", key.port()),
        _ => format!("{at}/{protocol}"),
    }
}

/// As rules name it.
pub fn protocol(name: &str) -> Option<Protocol> {
    match name {
        "tcp" | "TCP" | "6" => Some(Protocol::Tcp),
        "udp" | "UDP" | "17" => Some(Protocol::Udp),
        "sctp" | "SCTP" | "132" => Some(Protocol::Sctp),
        _ => None,
    }
}
