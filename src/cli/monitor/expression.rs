//! The common part of pcap-filter(7), asked of an event's ends and not of a packet's bytes: `host`, `net`, `port`,
//! `portrange`, each with `src`, `dst`, `src or dst`, `src and dst`; `tcp`, `udp`, `sctp`, `icmp`, `icmp6`, `ip`, `ip6`;
//! `and`, `or`, `not` (`&&`, `||`, `!`) and parentheses. What else libpcap knows is refused by name.
//!
//! An event has up to three pairs of ends: as asked for, as the backend sees them, and those of the packet that an ICMP
//! error is about. An expression holds of an event if it holds of one of them, as somebody who captures on both sides of
//! the node would see it.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::str::FromStr;

use super::kind::Kind;
use super::record::Record;
use crate::model::Ipx;

/// Parentheses and negations within each other.
const DEPTH: usize = 50;
const LENGTH: usize = 4096;

/// What of an event is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Primitive {
    Net(IpAddr, u8),
    Ports(RangeInclusive<u16>),
}

/// Which ends it is asked of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
    Either,
    Both,
}

/// Asked of all ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Ip,
    Ip6,
    Tcp,
    Udp,
    Sctp,
    Icmp,
    Icmp6,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Node {
    Protocol(Protocol),
    End(Side, Primitive),
    Not(Box<Node>),
    And(Box<Node>, Box<Node>),
    Or(Box<Node>, Box<Node>),
}

/// A filter expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expression(Node);

/// A pair of ends, with what else is asked.
struct View<'a> {
    record: &'a Record,
    from: Option<SocketAddr>,
    to: Option<SocketAddr>,
}

impl Expression {
    pub fn takes(&self, record: &Record) -> bool {
        let views = record.pairs().map(|(from, to)| View { record, from, to });
        views.iter().filter(|view| view.from.is_some() || view.to.is_some()).any(|view| self.0.holds(view))
    }
}

impl Node {
    fn holds(&self, view: &View) -> bool {
        match self {
            Node::Protocol(protocol) => protocol.holds(view),
            Node::End(side, primitive) => side.holds(view, |end| primitive.holds(end)),
            Node::Not(inner) => !inner.holds(view),
            Node::And(a, b) => a.holds(view) && b.holds(view),
            Node::Or(a, b) => a.holds(view) || b.holds(view),
        }
    }
}

impl Protocol {
    fn holds(self, view: &View) -> bool {
        let is_ip6 = view.from.or(view.to).is_some_and(|end| end.is_ipv6());
        // What an ICMP error is about is in it, and no packet of its own.
        let is_icmp = view.record.about.is_some() && view.record.event == Kind::Icmp;
        let transport = |name: &str| !is_icmp && view.record.protocol.eq_ignore_ascii_case(name);
        match self {
            Protocol::Ip => !is_ip6,
            Protocol::Ip6 => is_ip6,
            Protocol::Tcp => transport("tcp"),
            Protocol::Udp => transport("udp"),
            Protocol::Sctp => transport("sctp"),
            Protocol::Icmp => is_icmp && !is_ip6,
            Protocol::Icmp6 => is_icmp && is_ip6,
        }
    }
}

impl Side {
    fn holds(self, view: &View, of: impl Fn(SocketAddr) -> bool) -> bool {
        let (source, destination) = (view.from.is_some_and(&of), view.to.is_some_and(&of));
        match self {
            Side::Source => source,
            Side::Destination => destination,
            Side::Either => source || destination,
            Side::Both => source && destination,
        }
    }
}

impl Primitive {
    fn holds(&self, end: SocketAddr) -> bool {
        match self {
            Primitive::Net(ip, length) => is_within(end.ip(), *ip, *length),
            Primitive::Ports(range) => range.contains(&end.port()),
        }
    }
}

/// `length` counts the bits of the network's own family.
fn is_within(ip: IpAddr, network: IpAddr, length: u8) -> bool {
    let length = if network.is_ipv4() { length + 96 } else { length };
    let difference = u128::from_be_bytes(Ipx::from(ip).0) ^ u128::from_be_bytes(Ipx::from(network).0);
    ip.is_ipv4() == network.is_ipv4() && difference.checked_shr(128 - u32::from(length)).unwrap_or(0) == 0
}

impl FromStr for Expression {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.len() > LENGTH {
            return Err(format!("it is longer than {LENGTH} bytes"));
        }
        let mut parser = Parser { words: words(text), at: 0, last: None };
        let node = parser.alternatives(0)?;
        match parser.peek() {
            None => Ok(Expression(node)),
            Some(word) => Err(format!("{word:?} is not expected there: `and` or `or` is")),
        }
    }
}

fn words(text: &str) -> Vec<String> {
    let mut spaced = text.replace('(', " ( ").replace(')', " ) ").replace("&&", " and ").replace("||", " or ");
    spaced = spaced.replace('!', " not ");
    spaced.split_whitespace().map(str::to_owned).collect()
}

/// What a primitive is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Host,
    Net,
    Port,
    PortRange,
}

struct Parser {
    words: Vec<String>,
    at: usize,
    /// `port 80 or 443`: an identifier alone has the qualifiers of the one before.
    last: Option<(Vec<Protocol>, Side, What)>,
}

impl Parser {
    fn peek(&self) -> Option<&str> {
        self.words.get(self.at).map(String::as_str)
    }

    fn take(&mut self, word: &str) -> bool {
        let found = self.peek() == Some(word);
        self.at += usize::from(found);
        found
    }

    fn alternatives(&mut self, depth: usize) -> Result<Node, String> {
        let mut node = self.conjunction(depth)?;
        // pcap-filter(7): `and` and `or` have the same precedence, and associate left to right.
        loop {
            if self.take("or") {
                node = Node::Or(Box::new(node), Box::new(self.conjunction(depth)?));
            } else if self.take("and") {
                node = Node::And(Box::new(node), Box::new(self.conjunction(depth)?));
            } else {
                return Ok(node);
            }
        }
    }

    /// One operand, in spite of negations.
    fn conjunction(&mut self, depth: usize) -> Result<Node, String> {
        if depth > DEPTH {
            return Err(format!("there are more than {DEPTH} parentheses and negations within each other"));
        }
        if self.take("not") {
            return Ok(Node::Not(Box::new(self.conjunction(depth + 1)?)));
        }
        if self.take("(") {
            let node = self.alternatives(depth + 1)?;
            return if self.take(")") { Ok(node) } else { Err("a closing parenthesis is missing".to_owned()) };
        }
        self.primitive()
    }

    fn primitive(&mut self) -> Result<Node, String> {
        let start = self.at;
        let mut protocols = Vec::new();
        while let Some(protocol) = self.peek().and_then(protocol) {
            self.at += 1;
            protocols.push(protocol);
            // `tcp` alone, unless a qualifier follows.
            if !self.peek().is_some_and(|word| is_qualifier(word) || self::protocol(word).is_some()) {
                return all(protocols.into_iter().map(Node::Protocol));
            }
        }
        let side = self.side();
        let what = self.peek().and_then(what);
        self.at += usize::from(what.is_some());
        let is_bare = self.at == start;
        let (protocols, side, what) = match (is_bare, what, &self.last) {
            (true, _, Some(last)) => last.clone(),
            // `src 10.0.0.1` is about a host.
            (_, what, _) => (protocols, side.unwrap_or(Side::Either), what.unwrap_or(What::Host)),
        };
        let word = self.peek().ok_or("something is missing at its end")?.to_owned();
        if is_bare && !word.starts_with(|c: char| c.is_ascii_digit() || c == ':') && word.parse::<IpAddr>().is_err() {
            return Err(refusal(&word));
        }
        let primitive = value(what, &word)?;
        self.at += 1;
        self.last = Some((protocols.clone(), side, what));
        let of_ends = Node::End(side, primitive);
        all(protocols.into_iter().map(Node::Protocol).chain([of_ends]))
    }

    fn side(&mut self) -> Option<Side> {
        let first = match self.peek()? {
            "src" => Side::Source,
            "dst" => Side::Destination,
            _ => return None,
        };
        self.at += 1;
        let other = if first == Side::Source { "dst" } else { "src" };
        let joined = match (self.peek(), self.words.get(self.at + 1).map(String::as_str)) {
            (Some("or"), Some(word)) if word == other => Side::Either,
            (Some("and"), Some(word)) if word == other => Side::Both,
            _ => return Some(first),
        };
        self.at += 2;
        Some(joined)
    }
}

/// All of them; there is one at least.
fn all(nodes: impl Iterator<Item = Node>) -> Result<Node, String> {
    nodes.reduce(|a, b| Node::And(Box::new(a), Box::new(b))).ok_or_else(|| "it is empty".to_owned())
}

fn protocol(word: &str) -> Option<Protocol> {
    Some(match word {
        "ip" => Protocol::Ip,
        "ip6" => Protocol::Ip6,
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        "icmp" => Protocol::Icmp,
        "icmp6" => Protocol::Icmp6,
        _ => return None,
    })
}

fn what(word: &str) -> Option<What> {
    Some(match word {
        "host" => What::Host,
        "net" => What::Net,
        "port" => What::Port,
        "portrange" => What::PortRange,
        _ => return None,
    })
}

fn is_qualifier(word: &str) -> bool {
    matches!(word, "src" | "dst") || what(word).is_some()
}

fn value(what: What, word: &str) -> Result<Primitive, String> {
    let port = |text: &str| {
        text.parse::<u16>()
            .map_err(|_| format!("{text:?} is no port: a number is needed, since names differ between machines"))
    };
    match what {
        What::Host => {
            let ip: IpAddr = word.parse().map_err(|_| format!("{word:?} is no address: names are not looked up"))?;
            let ip = Ipx::from(ip).to_ip();
            Ok(Primitive::Net(ip, if ip.is_ipv4() { 32 } else { 128 }))
        }
        What::Net => {
            let refused = || format!("{word:?} is no network: ADDRESS/LENGTH is needed");
            let (ip, length) = word.split_once('/').ok_or_else(refused)?;
            let (ip, length): (IpAddr, u8) =
                (ip.parse().map_err(|_| refused())?, length.parse().map_err(|_| refused())?);
            let most = if ip.is_ipv4() { 32 } else { 128 };
            if length > most { Err(refused()) } else { Ok(Primitive::Net(ip, length)) }
        }
        What::Port => port(word).map(|port| Primitive::Ports(port..=port)),
        What::PortRange => {
            let (first, last) =
                word.split_once('-').ok_or_else(|| format!("{word:?} is no range: FIRST-LAST is needed"))?;
            Ok(Primitive::Ports(port(first)?..=port(last)?))
        }
    }
}

/// For what libpcap may know.
fn refusal(word: &str) -> String {
    format!(
        "{word:?} is not understood: of pcap-filter(7) there are host, net, port, portrange, src, dst, tcp, udp, sctp, icmp, \
         icmp6, ip, ip6, and, or, not and parentheses, which are asked of an event's ends and not of a packet's bytes"
    )
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::record;
    use super::*;

    fn takes(expression: &str, record: &Record) -> bool {
        expression.parse::<Expression>().unwrap_or_else(|error| panic!("{expression}: {error}")).takes(record)
    }

    #[test]
    fn an_expression_holds_of_what_a_capture_on_either_side_would_show() {
        let event = record("172.31.0.1:40000", "172.31.0.11:30080", "172.31.0.11:61000", "10.244.2.5:8080");
        let table = [
            ("host 172.31.0.1", true),
            ("host 10.244.2.5", true),
            ("172.31.0.1", true),
            ("src 172.31.0.1 and dst port 30080", true),
            ("src host 172.31.0.11 and dst host 10.244.2.5", true),
            // On no side are these two together.
            ("src host 172.31.0.1 and dst host 10.244.2.5", false),
            ("dst host 172.31.0.1", false),
            ("net 10.244.0.0/16", true),
            ("src net 10.244.0.0/16", false),
            ("net 0.0.0.0/0", true),
            ("net ::/0", false),
            ("port 8080", true),
            ("port 80", false),
            ("port 80 or 8080", true),
            ("portrange 30000-32767", true),
            ("tcp port 30080", true),
            ("udp port 30080", false),
            ("tcp", true),
            ("tcp and not port 30080 and not port 8080", false),
            ("ip and tcp", true),
            ("ip6", false),
            ("ip6 or (tcp && (port 30080 || port 1))", true),
            ("! udp", true),
            ("not (tcp or udp)", false),
            ("src or dst port 30080", true),
            ("src and dst port 30080", false),
            ("dst or src host 172.31.0.1", true),
            // Left to right, as libpcap has it.
            ("tcp or udp and port 1", false),
            ("tcp or (udp and port 1)", true),
            ("icmp", false),
        ];
        for (expression, expected) in table {
            assert_eq!(takes(expression, &event), expected, "{expression}");
        }
    }

    #[test]
    fn an_icmp_error_is_found_by_what_it_is_about() {
        let mut event = record("10.0.0.254:0", "172.31.0.11:0", "10.0.0.1:1", "172.31.0.1:40000");
        event.event = Kind::Icmp;
        (event.source, event.backend) = (None, None);
        event.passed_to = Some("172.31.0.1:40000".parse().unwrap());
        event.about = Some(("172.31.0.11:61000".parse().unwrap(), "10.244.2.5:8080".parse().unwrap()));
        for (expression, expected) in [
            ("icmp", true),
            ("tcp", false),
            ("icmp6", false),
            ("dst host 10.244.2.5 and dst port 8080", true),
            ("host 10.0.0.254", true),
            ("port 1", false),
        ] {
            assert_eq!(takes(expression, &event), expected, "{expression}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused_with_its_word() {
        for (bad, word) in [
            ("", "missing"),
            ("port", "missing"),
            ("tcp[13] & 2 != 0", "\"tcp[13]\""),
            ("ether host 00:11:22:33:44:55", "\"ether\""),
            ("vlan 5", "\"vlan\""),
            ("port http", "\"http\""),
            ("host example.com", "\"example.com\""),
            ("net 10.0.0.0", "ADDRESS/LENGTH"),
            ("net 10.0.0.0/33", "ADDRESS/LENGTH"),
            ("portrange 80", "FIRST-LAST"),
            ("port 65536", "\"65536\""),
            ("(tcp", "parenthesis"),
            ("tcp)", "\")\""),
            ("tcp udp port", "missing"),
            ("port 80 443", "\"443\""),
            ("and", "\"and\""),
        ] {
            let error = bad.parse::<Expression>().expect_err(bad);
            assert!(error.contains(word), "{bad}: {error}");
        }
        assert!("(".repeat(4000).parse::<Expression>().unwrap_err().contains("within each other"));
        assert!("!".repeat(4000).parse::<Expression>().unwrap_err().contains("within each other"));
        assert!(" ".repeat(5000).parse::<Expression>().unwrap_err().contains("longer"));
    }
}
