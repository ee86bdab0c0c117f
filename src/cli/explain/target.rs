//! What `kubelane explain` is asked: a destination or a Service, and from where.

use std::net::IpAddr;
use std::str::FromStr;

use crate::model::{Ipx, Protocol, SocketAddrx};

/// What is to be explained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    Destination(Destination),
    /// Every frontend of a Service, or of one of its ports.
    Service {
        namespace: String,
        name: String,
        port: Option<String>,
    },
}

/// Where a client wants to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    pub at: SocketAddrx,
    pub protocol: Protocol,
}

impl std::fmt::Display for Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.at, self.protocol.as_str())
    }
}

/// Who wants to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asker {
    /// A process in the node's own network namespace.
    Node,
    /// The pod of this address.
    Pod(IpAddr),
    /// A client outside the node, by its address if it matters.
    Outside(Option<IpAddr>),
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const ALLOWED: &str = "expected IP:PORT or [IPv6]:PORT, either with /tcp, /udp or /sctp, or \
            svc/NAMESPACE/NAME, with or without :PORT";
        let words: Vec<&str> = text.split('/').collect();
        match words[..] {
            ["svc" | "service" | "services", namespace, name] if !namespace.is_empty() && !name.is_empty() => {
                let (name, port) = match name.split_once(':') {
                    Some((name, port)) => (name, Some(port.to_owned())),
                    None => (name, None),
                };
                Ok(Target::Service { namespace: namespace.to_owned(), name: name.to_owned(), port })
            }
            [at] => destination(at, Protocol::Tcp).ok_or(ALLOWED.to_owned()),
            [at, name] => {
                let all = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
                let protocol = all.into_iter().find(|protocol| protocol.as_str().eq_ignore_ascii_case(name));
                protocol.and_then(|protocol| destination(at, protocol)).ok_or(ALLOWED.to_owned())
            }
            _ => Err(ALLOWED.to_owned()),
        }
    }
}

fn destination(text: &str, protocol: Protocol) -> Option<Target> {
    let at: std::net::SocketAddr = text.parse().ok()?;
    let at = SocketAddrx { ip: Ipx::from(at.ip()), port: at.port() };
    Some(Target::Destination(Destination { at, protocol }))
}

impl FromStr for Asker {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const ALLOWED: &str = "expected a pod's IP address, `node`, `outside` or outside:IP";
        let ip = |text: &str| text.parse::<IpAddr>().map(|ip| Ipx::from(ip).to_ip()).map_err(|_| ALLOWED);
        match (text, text.strip_prefix("outside:")) {
            ("node", _) => Ok(Asker::Node),
            ("outside", _) => Ok(Asker::Outside(None)),
            (_, Some(client)) => Ok(Asker::Outside(Some(ip(client)?))),
            _ => Ok(Asker::Pod(ip(text)?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_an_address_with_a_port_or_a_service() {
        let at = |text: &str, protocol| destination(text, protocol).unwrap();
        let service = |port: Option<&str>| {
            let (namespace, name) = ("shop".to_owned(), "web".to_owned());
            Target::Service { namespace, name, port: port.map(str::to_owned) }
        };
        for (text, expected) in [
            ("10.96.0.80:80", at("10.96.0.80:80", Protocol::Tcp)),
            ("10.96.0.80:53/UDP", at("10.96.0.80:53", Protocol::Udp)),
            ("[fd96::80]:80/sctp", at("[fd96::80]:80", Protocol::Sctp)),
            ("[::ffff:10.96.0.80]:80", at("10.96.0.80:80", Protocol::Tcp)),
            ("svc/shop/web", service(None)),
            ("service/shop/web:http", service(Some("http"))),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        for bad in ["", "10.96.0.80", "web", "web/shop", "svc/web", "svc//web", "10.96.0.80:80/icmp", "a.b:80", "x/y/z"]
        {
            assert!(bad.parse::<Target>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_client_is_the_node_a_pod_or_outside() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        for (text, expected) in [
            ("node", Asker::Node),
            ("10.244.1.2", Asker::Pod(ip("10.244.1.2"))),
            ("outside", Asker::Outside(None)),
            ("outside:fd31::1", Asker::Outside(Some(ip("fd31::1")))),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        for bad in ["", "pod", "outside:", "outside:web", "10.244.1.2:80"] {
            assert!(bad.parse::<Asker>().is_err(), "{bad}");
        }
    }
}
