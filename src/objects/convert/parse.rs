//! Scalars as the API writes them: addresses, CIDRs, ports, protocols, times.

use ipnet::IpNet;
use k8s_openapi::jiff::Timestamp;

use super::wire::{Number, quoted};
use crate::model::{Family, IpRange, Ipx, Protocol};

/// The longest name of a namespace, a Service or a port (a DNS label, RFC 1123).
const LONGEST_NAME: usize = 63;

/// A name that can stand in `namespace/name:port`. The API server's own rules are stricter; a directory has none.
pub fn name(text: &str) -> Result<(), String> {
    let odd = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':');
    match text.chars().find(|c| odd(*c)) {
        Some(c) => Err(format!("{} is not a name: it has a {c:?}", quoted(text))),
        None if text.len() > LONGEST_NAME => {
            Err(format!("{} is not a name: it is longer than {LONGEST_NAME} bytes", quoted(text)))
        }
        None => Ok(()),
    }
}

/// An address literal. IPv4 octets may have leading zeros, see [`plain`]; scoped IPv6 addresses are refused.
pub fn ip(text: &str) -> Result<Ipx, String> {
    let parsed = text.parse().or_else(|error| plain(text).ok_or(error)?.parse());
    parsed.map_err(|_| format!("{} is not an IP address", quoted(text)))
}

/// An IPv4 address (of a CIDR, perhaps) whose octets have leading zeros, without them. Objects from before Kubernetes 1.22
/// may have some; kube-proxy reads them as decimal, and so must whoever takes its place (CVE-2021-29923).
pub fn plain(text: &str) -> Option<String> {
    let (address, rest) = text.split_at(text.find('/').unwrap_or(text.len()));
    let octets: Vec<&str> = address.split('.').collect();
    let is_number = |octet: &&str| !octet.is_empty() && octet.bytes().all(|byte| byte.is_ascii_digit());
    let has_zeros = |octet: &&str| octet.len() > 1 && octet.starts_with('0');
    if octets.len() != 4 || !octets.iter().all(is_number) || !octets.iter().any(has_zeros) {
        return None;
    }
    let without = |octet: &&str| match octet.trim_start_matches('0') {
        "" => "0".to_owned(),
        digits => digits.to_owned(),
    };
    let plain = octets.iter().map(without).collect::<Vec<_>>().join(".");
    plain.parse::<std::net::Ipv4Addr>().ok().map(|_| plain + rest)
}

/// An address that may stand in a frontend. The wildcard is taken by node ports, and loopback and multicast are not
/// service addresses (the API server's own rule for externalIPs).
pub fn virtual_ip(text: &str) -> Result<Ipx, String> {
    let address = ip(text)?;
    let std = address.to_ip();
    match std.is_unspecified() || std.is_loopback() || std.is_multicast() {
        true => Err(format!("{} is an unspecified, loopback or multicast address", quoted(text))),
        false => Ok(address),
    }
}

/// A CIDR with blanks around it; host bits are cleared. IPv4 octets as in [`ip`].
pub fn cidr(text: &str) -> Result<IpRange, String> {
    let text = text.trim();
    let plain = plain(text);
    let net: Option<IpNet> = plain.as_deref().unwrap_or(text).parse().ok();
    let range = net.map(|net| (IpRange { ip: net.network().into(), prefix: net.prefix_len() }, net.max_prefix_len()));
    // An IPv4 address in IPv6's clothes has the prefix of neither.
    let range = range.filter(|(range, most)| (range.ip.family() == Family::Ipv4) == (*most == 32));
    range.map(|(range, _)| range).ok_or_else(|| format!("{} is not a CIDR", quoted(text)))
}

/// A port in 1..=65535.
pub fn port(number: &Number) -> Result<u16, String> {
    match number {
        Number::Is(number @ 1..=65_535) => Ok(*number as u16),
        other => Err(format!("{other} is not a port (1 to 65535)")),
    }
}

/// A transport protocol; the API's default is TCP.
pub fn protocol(text: Option<&str>) -> Result<Protocol, String> {
    match text.unwrap_or("TCP") {
        "TCP" | "" => Ok(Protocol::Tcp),
        "UDP" => Ok(Protocol::Udp),
        "SCTP" => Ok(Protocol::Sctp),
        other => Err(format!("{} is not a protocol (TCP, UDP or SCTP)", quoted(other))),
    }
}

/// RFC 3339, as Unix time.
pub fn time(text: &str) -> Result<Timestamp, String> {
    text.parse().map_err(|_| format!("{} is not an RFC 3339 time", quoted(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_bits_of_a_range_are_cleared_and_blanks_trimmed() {
        for (text, ip, prefix) in [
            ("198.51.100.7/24", "198.51.100.0", 24),
            (" 203.0.113.0/24 ", "203.0.113.0", 24),
            ("2001:db8:1::1/48", "2001:db8:1::", 48),
            ("0.0.0.0/0", "0.0.0.0", 0),
            ("::/0", "::", 0),
            ("192.0.2.1/32", "192.0.2.1", 32),
            ("2001:db8::1/128", "2001:db8::1", 128),
        ] {
            let expected = IpRange { ip: ip.parse().unwrap(), prefix };
            assert_eq!(cidr(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_not_a_range_is_refused() {
        for text in [
            "",
            "10.0.0.0",
            "10.0.0.0/33",
            "10.0.0.0/+8",
            "10.0.0.0/",
            "0400.0.0.0/8",
            "::/129",
            "a/8",
            "::ffff:10.0.0.0/104",
        ] {
            assert!(cidr(text).is_err(), "{text}");
        }
    }

    #[test]
    fn octets_with_leading_zeros_are_decimal() {
        for (text, expected) in [("010.0.0.01", "10.0.0.1"), ("10.00.000.099", "10.0.0.99")] {
            assert_eq!(ip(text), ip(expected), "{text}");
            assert_eq!(plain(text).as_deref(), Some(expected));
        }
        assert_eq!(cidr("010.0.0.0/8"), cidr("10.0.0.0/8"));
        assert_eq!(plain("010.0.0.0/8").as_deref(), Some("10.0.0.0/8"));
        for text in ["10.0.0.1", "0.0.0.0", "10.0.0.0/08", "::", "1.2.3", "0x0a.0.0.01", "+01.2.3.4"] {
            assert_eq!(plain(text), None, "{text}");
        }
        for text in ["1.2.3", "fe80::1%eth0", "10.0.0.256", "0400.0.0.1", " 10.0.0.1", "01.2.3"] {
            assert!(ip(text).is_err(), "{text}");
        }
    }
}
