//! Addresses. Every address is 128 bits in network order; IPv4 is v4-mapped (RFC 4291 section 2.5.5.2), so that one
//! code path and one set of kernel maps serves both families.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// An address family of the Kubernetes API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    Ipv4,
    Ipv6,
}

/// An IP address as 16 bytes in network order, IPv4 as `::ffff:a.b.c.d`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Ipx(pub [u8; 16]);

impl Ipx {
    /// The wildcard of `family`: the NodePort frontends' address.
    pub fn any(family: Family) -> Self {
        match family {
            Family::Ipv4 => Ipv4Addr::UNSPECIFIED.into(),
            Family::Ipv6 => Ipv6Addr::UNSPECIFIED.into(),
        }
    }

    /// The family: IPv4 exactly when the address is v4-mapped.
    pub fn family(&self) -> Family {
        match self.to_ip() {
            IpAddr::V4(_) => Family::Ipv4,
            IpAddr::V6(_) => Family::Ipv6,
        }
    }

    /// The address in the standard library's type; a v4-mapped one becomes IPv4.
    pub fn to_ip(&self) -> IpAddr {
        let v6 = Ipv6Addr::from(self.0);
        v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
    }
}

impl Ipx {
    /// `None`: of the other family.
    pub fn to_ip4(self) -> Option<Ipv4Addr> {
        if let IpAddr::V4(ip) = self.to_ip() { Some(ip) } else { None }
    }

    /// `None`: of the other family.
    pub fn to_ip6(self) -> Option<Ipv6Addr> {
        if let IpAddr::V6(ip) = self.to_ip() { Some(ip) } else { None }
    }
}

impl From<Ipv4Addr> for Ipx {
    fn from(ip: Ipv4Addr) -> Self {
        Ipx(ip.to_ipv6_mapped().octets())
    }
}

impl From<Ipv6Addr> for Ipx {
    fn from(ip: Ipv6Addr) -> Self {
        Ipx(ip.octets())
    }
}

impl From<IpAddr> for Ipx {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(v4) => v4.into(),
            IpAddr::V6(v6) => v6.into(),
        }
    }
}

impl FromStr for Ipx {
    type Err = std::net::AddrParseError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(text.parse::<IpAddr>()?.into())
    }
}

impl fmt::Display for Ipx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.to_ip().fmt(f)
    }
}

impl fmt::Debug for Ipx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.to_ip().fmt(f)
    }
}

/// An address and a port (host order).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SocketAddrx {
    pub ip: Ipx,
    pub port: u16,
}

impl fmt::Display for SocketAddrx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        std::net::SocketAddr::new(self.ip.to_ip(), self.port).fmt(f)
    }
}

impl fmt::Debug for SocketAddrx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A CIDR with its host bits cleared.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct IpRange {
    /// Network address.
    pub ip: Ipx,
    /// Prefix length within the address's own family: 0..=32 or 0..=128.
    pub prefix: u8,
}

impl IpRange {
    /// Whether the address is in it; one of the other family never is.
    pub fn contains(&self, ip: Ipx) -> bool {
        let width = if self.ip.family() == Family::Ipv4 { 32 } else { 128 };
        let difference = u128::from_be_bytes(self.ip.0) ^ u128::from_be_bytes(ip.0);
        self.ip.family() == ip.family() && difference.checked_shr(width - u32::from(self.prefix)).unwrap_or(0) == 0
    }
}
