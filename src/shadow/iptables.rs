//! kube-proxy's rules in the output of `iptables-save` and `ip6tables-save`, read line by line. What a chain does follows
//! from its rules; only the chains that kube-proxy begins with are known by their names.

use std::io::{self, BufRead};

use super::chains::{Chains, Rule, Then, When};
use super::listed::{Destinations, protocol};
use super::{Rules, remark};
use crate::abi::FrontendKey;
use crate::model::{Family, Ipx, SocketAddrx};

pub const MODE: &str = "iptables";
/// Where the search for Services begins, in the tables nat and filter.
const SERVICES: &str = "KUBE-SERVICES";
const EXTERNAL_SERVICES: &str = "KUBE-EXTERNAL-SERVICES";

/// What a line of `iptables-save` says.
#[derive(Debug, Default)]
struct Parsed<'a> {
    /// With whether it is negated.
    source: Option<bool>,
    destination: Option<(bool, &'a str)>,
    protocol: Option<&'a str>,
    port: Option<u16>,
    from_local: bool,
    to_local: bool,
    is_random: bool,
    /// Seconds of a `--rcheck`.
    recent: Option<u32>,
    comment: &'a str,
    target: Option<&'a str>,
    is_goto: bool,
    to: Option<&'a str>,
    /// Conditions on sets: those are of IPVS mode.
    has_set: bool,
    is_odd: bool,
}

/// The rules of one family.
///
/// # Errors
/// When `text` cannot be read to its end.
pub fn parse(text: &mut dyn BufRead, family: Family) -> io::Result<Rules> {
    let mut reader = Reader::new(family);
    let mut line = Vec::new();
    while text.read_until(b'\n', &mut line)? > 0 {
        reader.line(String::from_utf8_lossy(&line).trim_end());
        line.clear();
    }
    Ok(reader.finish())
}

/// A rule for a port of whichever address leads here: chain, port, what then, the Service.
type ByPort = (u32, FrontendKey, Rule, String);

struct Reader {
    family: Family,
    is_nat: bool,
    is_hooked: bool,
    chains: Chains,
    destinations: Destinations,
    /// The chains that are for NodePorts.
    node_port_chains: Vec<u32>,
    by_port: Vec<ByPort>,
    rules: Rules,
}

impl Reader {
    fn new(family: Family) -> Reader {
        Reader {
            family,
            is_nat: false,
            is_hooked: false,
            chains: Chains::default(),
            destinations: Destinations::default(),
            node_port_chains: Vec::new(),
            by_port: Vec::new(),
            rules: Rules::new(MODE),
        }
    }

    fn line(&mut self, line: &str) {
        if let Some(table) = line.strip_prefix('*') {
            self.is_nat = table == "nat";
        } else if let Some(rule) = line.strip_prefix("-A ") {
            let (chain, rest) = rule.split_once(' ').unwrap_or((rule, ""));
            match (self.is_nat, chain) {
                (true, "PREROUTING" | "OUTPUT") => {
                    self.is_hooked |= parse_rule(rest).target == Some(SERVICES);
                }
                (true, _) if chain.starts_with("KUBE-") => self.nat(chain, rest),
                (false, SERVICES | EXTERNAL_SERVICES) => self.filter(rest),
                _ => {}
            }
        } else if line.starts_with("# Table") {
            // The kernel's own: iptables cannot show what other tools have added.
            remark(&mut self.rules.remarks, "iptables-save says", line);
        }
    }

    fn nat(&mut self, chain: &str, text: &str) {
        let parsed = parse_rule(text);
        let then = self.then(&parsed);
        if chain == SERVICES {
            return self.service(&parsed, then, text);
        }
        let chain = self.chains.id(chain);
        if let (None, Some(key)) = (parsed.destination, self.key(&parsed, Ipx::any(self.family))) {
            // It may be one of NodePorts, which only the rules of other chains say.
            self.by_port.push((chain, key, Rule { when: when(&parsed, true), then: then.clone() }, title(&parsed)));
        }
        let when = when(&parsed, parsed.destination.is_none() && parsed.port.is_none());
        self.chains.append(chain, Rule { when, then });
    }

    /// A rule of the chain that is for all Services.
    fn service(&mut self, parsed: &Parsed, then: Then, text: &str) {
        let address = parsed.destination.filter(|(negated, _)| !negated).and_then(|(_, at)| address(at));
        match (address.and_then(|ip| self.key(parsed, ip)), &then) {
            (Some(key), _) => {
                self.destinations.add(key, true, Rule { when: when(parsed, true), then }, &title(parsed));
            }
            (None, Then::Jump(chain)) if parsed.port.is_none() && !parsed.is_odd && !parsed.has_set => {
                self.node_port_chains.push(*chain);
            }
            // They mark what IPVS is to translate, or let it in.
            _ if parsed.has_set => {}
            _ => remark(&mut self.rules.remarks, "a rule of KUBE-SERVICES in the table nat is not understood", text),
        }
    }

    fn filter(&mut self, text: &str) {
        let parsed = parse_rule(text);
        let then = match parsed.target {
            Some("REJECT") => Then::Refuse,
            Some("DROP") => Then::Drop,
            _ => Then::Unknown,
        };
        let ip = match parsed.destination {
            Some((false, at)) => address(at),
            Some(_) => None,
            None => parsed.to_local.then(|| Ipx::any(self.family)),
        };
        match ip.and_then(|ip| self.key(&parsed, ip)) {
            Some(key) => {
                self.destinations.add(key, false, Rule { when: when(&parsed, true), then }, &title(&parsed));
            }
            None if parsed.has_set => {}
            None => remark(&mut self.rules.remarks, "a rule for Services in the table filter is not understood", text),
        }
    }

    fn key(&self, parsed: &Parsed, ip: Ipx) -> Option<FrontendKey> {
        Some(FrontendKey::new(ip, parsed.port?, protocol(parsed.protocol?)?))
    }

    fn then(&mut self, parsed: &Parsed) -> Then {
        match parsed.target {
            None | Some("MARK" | "MASQUERADE" | "LOG" | "CONNMARK") => Then::Nothing,
            Some("RETURN") => Then::Return,
            Some("REJECT") => Then::Refuse,
            Some("DROP") => Then::Drop,
            Some("DNAT") => parsed
                .to
                .and_then(|to| to.parse().ok())
                .map(|at: std::net::SocketAddr| {
                    Then::Translate([SocketAddrx { ip: at.ip().into(), port: at.port() }].into())
                })
                .unwrap_or(Then::Unknown),
            Some(chain) if chain.starts_with("KUBE-") && parsed.is_goto => Then::Goto(self.chains.id(chain)),
            Some(chain) if chain.starts_with("KUBE-") => Then::Jump(self.chains.id(chain)),
            Some(_) => Then::Unknown,
        }
    }

    fn finish(mut self) -> Rules {
        if !self.is_hooked {
            // Left behind: no packet meets them.
            return Rules::new(MODE);
        }
        for (chain, key, rule, label) in self.by_port {
            if self.node_port_chains.contains(&chain) {
                self.destinations.add(key, true, rule, &label);
            }
        }
        self.destinations.finish(&self.chains, &mut self.rules);
        self.rules
    }
}

/// `is_known`: destination and port of the rule have been looked at, or there are none.
fn when(parsed: &Parsed, is_known: bool) -> When {
    let conditions = [parsed.from_local, parsed.source.is_some(), parsed.is_random, parsed.recent.is_some()];
    if parsed.is_odd || parsed.has_set || !is_known || conditions.iter().filter(|is| **is).count() > 1 {
        return When::Unknown;
    }
    match (parsed.from_local, parsed.source, parsed.is_random, parsed.recent) {
        (true, ..) => When::Local,
        (_, Some(false), ..) => When::Source,
        (_, Some(true), ..) => When::OtherSource,
        (_, _, true, _) => When::Sometimes,
        (.., Some(seconds)) => When::Recent(seconds),
        _ => When::Always,
    }
}

/// kube-proxy's comments begin with the Service port's name.
fn title(parsed: &Parsed) -> String {
    parsed.comment.split(' ').next().unwrap_or_default().to_owned()
}

/// One address: a range is none.
fn address(text: &str) -> Option<Ipx> {
    let (ip, prefix) = text.split_once('/').unwrap_or((text, ""));
    let ip: Ipx = ip.parse().ok()?;
    let whole = if ip.family() == Family::Ipv4 { "32" } else { "128" };
    (prefix.is_empty() || prefix == whole).then_some(ip)
}

fn parse_rule(text: &str) -> Parsed<'_> {
    let mut parsed = Parsed::default();
    let mut words = Words(text);
    let mut is_negated = false;
    while let Some(word) = words.next() {
        let negated = std::mem::take(&mut is_negated);
        let mut next = || words.next().unwrap_or_default();
        match word {
            "!" => is_negated = true,
            "-s" => {
                next();
                parsed.source = Some(negated);
            }
            "-d" => parsed.destination = Some((negated, next())),
            "-p" if !negated => parsed.protocol = Some(next()),
            "-m" => {
                next();
            }
            "--dport" if !negated => parsed.port = next().parse().ok(),
            "--comment" => parsed.comment = next(),
            "--src-type" if !negated && next() == "LOCAL" => parsed.from_local = true,
            "--dst-type" if !negated && next() == "LOCAL" => parsed.to_local = true,
            "--mode" if next() == "random" => parsed.is_random = true,
            "--probability" | "--name" | "--mask" | "--reject-with" | "--set-xmark" | "--or-mark" | "--xor-mark"
            | "--log-prefix" | "--log-level" => {
                next();
            }
            "--rcheck" if !negated => parsed.recent = Some(parsed.recent.unwrap_or_default()),
            "--seconds" => parsed.recent = next().parse().ok(),
            "--set" | "--reap" | "--rsource" | "--random-fully" | "--random" => {}
            "--match-set" => {
                parsed.has_set = true;
                next();
                next();
            }
            "-j" => parsed.target = Some(next()),
            "-g" => (parsed.target, parsed.is_goto) = (Some(next()), true),
            "--to-destination" => parsed.to = Some(next()),
            _ => parsed.is_odd = true,
        }
    }
    parsed
}

/// Words, of which those in quotes may have blanks and escaped quotes; escapes stay.
struct Words<'a>(&'a str);

impl<'a> Iterator for Words<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let text = self.0.trim_start_matches(' ');
        if text.is_empty() {
            return None;
        }
        let Some(quoted) = text.strip_prefix('"') else {
            let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
            self.0 = rest;
            return Some(word);
        };
        let mut is_escaped = false;
        let end = quoted.bytes().position(|byte| {
            let is_end = byte == b'"' && !is_escaped;
            is_escaped = byte == b'\\' && !is_escaped;
            is_end
        });
        let end = end.unwrap_or(quoted.len());
        self.0 = quoted.get(end + 1..).unwrap_or_default();
        Some(&quoted[..end])
    }
}
