//! Where a server listens, as kube-proxy's flags and configuration have it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

pub const HEALTHZ_PORT: u16 = 10256;
pub const METRICS_PORT: u16 = 10249;

/// Where a server listens; `None`: nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BindAddress(pub Option<SocketAddr>);

/// As kube-proxy reads it: IP:PORT, IP alone (the default port), :PORT (every address), or nothing.
///
/// # Errors
/// When `text` is none of these; says what is allowed.
pub fn bind_address(text: &str, default_port: u16) -> Result<BindAddress, String> {
    if text.is_empty() {
        return Ok(BindAddress(None));
    }
    let any = || text.strip_prefix(':')?.parse().ok().map(|port| SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port));
    let alone = || {
        let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
        bare.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, default_port))
    };
    let address = text.parse().ok().or_else(any).or_else(alone);
    let address = address.ok_or("expected IP:PORT, [IPv6]:PORT, IP, :PORT, or \"\" for none")?;
    Ok(BindAddress(Some(address).filter(|a| a.port() != 0)))
}

/// Where health is served when nothing is said of it: on every address.
pub fn default_healthz(bind_address: Option<IpAddr>, port: Option<u16>) -> BindAddress {
    let ip = if is_ipv6(bind_address) { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    default(ip, port.unwrap_or(HEALTHZ_PORT))
}

/// Where metrics are served when nothing is said of it: on the loopback address.
pub fn default_metrics(bind_address: Option<IpAddr>, port: Option<u16>) -> BindAddress {
    let ip = if is_ipv6(bind_address) { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
    default(ip, port.unwrap_or(METRICS_PORT))
}

fn is_ipv6(bind_address: Option<IpAddr>) -> bool {
    bind_address.is_some_and(|ip| ip.is_ipv6())
}

fn default(ip: IpAddr, port: u16) -> BindAddress {
    BindAddress(Some(SocketAddr::new(ip, port)).filter(|address| address.port() != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: Option<&str>) -> BindAddress {
        BindAddress(text.map(|t| t.parse().unwrap()))
    }

    #[test]
    fn bind_addresses_are_read_as_kube_proxy_reads_them() {
        let table = [
            ("", None),
            ("0.0.0.0:10256", Some("0.0.0.0:10256")),
            ("0.0.0.0:0", None),
            ("127.0.0.1", Some("127.0.0.1:10256")),
            (":8080", Some("0.0.0.0:8080")),
            ("[::]:8080", Some("[::]:8080")),
            ("::1", Some("[::1]:10256")),
            ("[fd00::1]", Some("[fd00::1]:10256")),
        ];
        for (text, expected) in table {
            assert_eq!(bind_address(text, HEALTHZ_PORT), Ok(at(expected)), "{text}");
        }
        for bad in ["localhost:1", "1.2.3.4:99999", "1.2.3:80", "10256", "[::"] {
            assert!(bind_address(bad, HEALTHZ_PORT).is_err(), "{bad}");
        }
    }

    #[test]
    fn defaults_follow_the_family_of_the_bind_address_and_the_old_port_flags() {
        let table = [
            (None, None, Some("0.0.0.0:10256"), Some("127.0.0.1:10249")),
            (Some("0.0.0.0"), None, Some("0.0.0.0:10256"), Some("127.0.0.1:10249")),
            (Some("::"), None, Some("[::]:10256"), Some("[::1]:10249")),
            (Some("fd00::5"), Some(7), Some("[::]:7"), Some("[::1]:7")),
            (None, Some(0), None, None),
        ];
        for (bind, port, healthz, metrics) in table {
            let ip = bind.map(|text: &str| text.parse().unwrap());
            assert_eq!(default_healthz(ip, port), at(healthz), "{bind:?} {port:?}");
            assert_eq!(default_metrics(ip, port), at(metrics), "{bind:?} {port:?}");
        }
    }
}
