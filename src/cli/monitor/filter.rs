//! Which events are shown.

use std::net::IpAddr;
use std::str::FromStr;

use super::expression::Expression;
use super::kind::{Kind, Verdict, numbers, reasons};
use super::record::Record;
use crate::bpf::Wanted;
use crate::cli::get::ServiceFilter;
use crate::model::{IpRange, Ipx, Protocol};

/// An address, or a range of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range(IpRange);

impl FromStr for Range {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const ALLOWED: &str = "allowed are IP and IP/LENGTH";
        let (ip, length) = text.split_once('/').map_or((text, None), |(ip, length)| (ip, Some(length)));
        let ip = Ipx::from(ip.parse::<IpAddr>().map_err(|_| ALLOWED)?).to_ip();
        let most = if ip.is_ipv4() { 32 } else { 128 };
        let prefix = length.map_or(Ok(most), str::parse).ok().filter(|prefix| *prefix <= most).ok_or(ALLOWED)?;
        Ok(Range(IpRange { ip: ip.into(), prefix }))
    }
}

impl Range {
    fn has(self, ip: IpAddr) -> bool {
        self.0.contains(ip.into())
    }

    fn single(self) -> Option<Ipx> {
        let most = if self.0.ip.to_ip().is_ipv4() { 32 } else { 128 };
        (self.0.prefix == most).then_some(self.0.ip)
    }
}

/// A protocol of packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Of(Protocol),
    /// Errors of ICMP and ICMPv6.
    Icmp,
}

impl FromStr for Transport {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.to_ascii_lowercase().as_str() {
            "tcp" => Ok(Transport::Of(Protocol::Tcp)),
            "udp" => Ok(Transport::Of(Protocol::Udp)),
            "sctp" => Ok(Transport::Of(Protocol::Sctp)),
            "icmp" => Ok(Transport::Icmp),
            _ => Err("allowed are tcp, udp, sctp and icmp"),
        }
    }
}

/// One of the reasons that events have.
///
/// # Errors
/// What is allowed, when `text` is not.
pub fn reason(text: &str) -> Result<String, String> {
    match reasons().any(|reason| reason == text) {
        true => Ok(text.to_owned()),
        false => Err(format!("allowed are {}", reasons().collect::<Vec<_>>().join(", "))),
    }
}

/// All that is asked of an event. Of one flag's values one has to hold, of the flags all.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub services: Vec<ServiceFilter>,
    pub namespaces: Vec<String>,
    pub from: Vec<Range>,
    pub to: Vec<Range>,
    pub ports: Vec<u16>,
    pub protocols: Vec<Transport>,
    pub verdicts: Vec<Verdict>,
    pub reasons: Vec<String>,
    pub expression: Option<Expression>,
    /// What the others do not let through.
    pub is_inverted: bool,
}

/// True when nothing is asked, or one holds.
fn one<T>(wanted: &[T], holds: impl FnMut(&T) -> bool) -> bool {
    wanted.is_empty() || wanted.iter().any(holds)
}

impl Filter {
    /// Whether nothing is asked.
    pub fn is_empty(&self) -> bool {
        let counts = [self.services.len(), self.namespaces.len(), self.from.len(), self.to.len(), self.ports.len()];
        let more = [self.protocols.len(), self.verdicts.len(), self.reasons.len()];
        self.expression.is_none() && counts.iter().chain(&more).all(|count| *count == 0)
    }

    pub fn takes(&self, record: &Record) -> bool {
        self.holds(record) != self.is_inverted
    }

    fn holds(&self, record: &Record) -> bool {
        let pairs = record.pairs();
        let froms = || pairs.iter().filter_map(|(from, _)| *from);
        let tos = || pairs.iter().filter_map(|(_, to)| *to);
        let service = record.service.as_ref();
        let is_icmp = record.event == Kind::Icmp;
        let is_of = |protocol: &Protocol| record.protocol.eq_ignore_ascii_case(protocol.as_str());
        one(&self.verdicts, |verdict| record.verdict == *verdict)
            && one(&self.reasons, |reason| record.reason == *reason)
            && one(&self.services, |wanted| service.is_some_and(|service| wanted.is(service)))
            && one(&self.namespaces, |wanted| service.is_some_and(|service| service.namespace == *wanted))
            && one(&self.from, |range| froms().any(|end| range.has(end.ip())))
            && one(&self.to, |range| tos().any(|end| range.has(end.ip())))
            && one(&self.ports, |port| froms().chain(tos()).any(|end| end.port() == *port))
            && one(&self.protocols, |protocol| match protocol {
                Transport::Of(protocol) => is_of(protocol),
                Transport::Icmp => is_icmp,
            })
            && self.expression.as_ref().is_none_or(|expression| expression.takes(record))
    }

    /// What the kernel can leave out at little cost; everything that [`Filter::takes`] lets through is told. `rate`: events
    /// in a second from each processor; 0: all.
    pub fn wanted(&self, one_in: u32, rate: u32) -> Wanted {
        let all = Wanted { numbers: numbers(&[], &[]), protocol: 0, from: None, to: None, port: 0, one_in, rate };
        if self.is_inverted {
            return all;
        }
        fn single<T: Copy>(values: &[T]) -> Option<T> {
            if let [only] = values { Some(*only) } else { None }
        }
        Wanted {
            numbers: numbers(&self.verdicts, &self.reasons),
            protocol: match single(&self.protocols) {
                Some(Transport::Of(protocol)) => protocol as u8,
                _ => 0,
            },
            from: single(&self.from).and_then(Range::single),
            to: single(&self.to).and_then(Range::single),
            port: single(&self.ports).unwrap_or(0),
            ..all
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::record;
    use super::*;

    fn event() -> Record {
        record("172.31.0.1:40000", "172.31.0.11:30080", "172.31.0.11:61000", "10.244.2.5:8080")
    }

    fn ranges(texts: &[&str]) -> Vec<Range> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn services(texts: &[&str]) -> Vec<ServiceFilter> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn each_flag_is_asked_and_one_of_its_values_is_enough() {
        let none = Filter::default();
        let table = [
            (none.clone(), true),
            (Filter { services: services(&["shop/web"]), ..none.clone() }, true),
            (Filter { services: services(&["shop/web:http"]), ..none.clone() }, true),
            (Filter { services: services(&["shop/web:https"]), ..none.clone() }, false),
            (Filter { services: services(&["a/b", "shop/web"]), ..none.clone() }, true),
            (Filter { namespaces: vec!["shop".into()], ..none.clone() }, true),
            (Filter { namespaces: vec!["default".into()], ..none.clone() }, false),
            (Filter { from: ranges(&["172.31.0.1"]), ..none.clone() }, true),
            (Filter { from: ranges(&["172.31.0.11"]), ..none.clone() }, true),
            (Filter { from: ranges(&["10.244.2.5"]), ..none.clone() }, false),
            (Filter { from: ranges(&["172.31.0.0/30"]), ..none.clone() }, true),
            (Filter { to: ranges(&["10.244.0.0/16"]), ..none.clone() }, true),
            (Filter { to: ranges(&["172.31.0.1", "::/0"]), ..none.clone() }, false),
            (Filter { ports: vec![61_000], ..none.clone() }, true),
            (Filter { ports: vec![80], ..none.clone() }, false),
            (Filter { protocols: vec![Transport::Icmp, Transport::Of(Protocol::Tcp)], ..none.clone() }, true),
            (Filter { protocols: vec![Transport::Icmp], ..none.clone() }, false),
            (Filter { verdicts: vec![Verdict::Translated], ..none.clone() }, true),
            (Filter { verdicts: vec![Verdict::Dropped, Verdict::Refused], ..none.clone() }, false),
            (Filter { reasons: vec!["flow_remote".into()], ..none.clone() }, true),
            (Filter { reasons: vec!["closed".into()], ..none.clone() }, false),
            (Filter { expression: Some("port 8080".parse().unwrap()), ..none.clone() }, true),
            (Filter { ports: vec![8080], namespaces: vec!["default".into()], ..none.clone() }, false),
        ];
        for (filter, expected) in table {
            assert_eq!(filter.takes(&event()), expected, "{filter:?}");
            let inverted = Filter { is_inverted: true, ..filter.clone() };
            assert_eq!(inverted.takes(&event()), !expected, "{filter:?}");
        }
    }

    #[test]
    fn the_kernel_leaves_out_what_is_asked_of_single_values_and_nothing_when_inverted() {
        let filter = Filter {
            from: ranges(&["10.0.0.1"]),
            to: ranges(&["10.0.0.0/8"]),
            ports: vec![80],
            protocols: vec![Transport::Of(Protocol::Udp)],
            verdicts: vec![Verdict::Dropped],
            ..Filter::default()
        };
        let wanted = filter.wanted(1, 0);
        assert_eq!(wanted.from, Some("10.0.0.1".parse().unwrap()));
        assert_eq!((wanted.to, wanted.port, wanted.protocol), (None, 80, 17), "a range is asked here");
        assert_eq!(wanted.numbers, numbers(&[Verdict::Dropped], &[]));
        let inverted = Filter { is_inverted: true, ..filter }.wanted(1, 0);
        assert_eq!(inverted, Filter::default().wanted(1, 0));
    }

    #[test]
    fn values_that_nothing_has_are_refused_with_what_is_allowed() {
        assert!(reason("dropped_no_route").is_ok() && reason("closed").is_ok());
        assert!(reason("dropped_by_magic").unwrap_err().contains("dropped_no_route, "));
        for bad in ["", "web", "10.0.0.1/33", "::/129", "10.0.0.1/", "10.0.0.1/x"] {
            assert!(bad.parse::<Range>().is_err(), "{bad}");
        }
        assert!("::ffff:10.0.0.1".parse::<Range>().unwrap().has("10.0.0.1".parse().unwrap()));
        assert!("gre".parse::<Transport>().is_err() && "TCP".parse::<Transport>().is_ok());
    }
}
