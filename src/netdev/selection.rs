//! Which of the node's addresses serve NodePorts: `--nodeport-addresses`, as a pure function.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::model::{Family, Ipx};

/// The keyword `all` in a list.
const WHOLE: [IpNet; 2] = [
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0)),
];
/// The keyword `localhost`. Loopback addresses serve NodePorts in any case; alone, it leaves no others.
const LOOPBACK: [IpNet; 2] = [
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128)),
];

/// The value of `--nodeport-addresses`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// Every address of the node.
    #[default]
    All,
    /// The first InternalIP of each family of the Node object.
    Primary,
    /// The same, but this address is the first one of its family, whatever the Node object says.
    PrimaryIs(Ipx),
    /// Addresses inside one of these. As in kube-proxy, a family with no range in the list is not restricted.
    Ranges(Vec<IpNet>),
}

impl NodePortAddresses {
    /// Picks from `bound` (the node's addresses) those that serve NodePorts. Link-local addresses never do: they mean
    /// nothing outside their link. `internal_ips` are the Node object's, in its order; while they are not known,
    /// `Primary` serves all.
    pub fn select(&self, bound: &[Ipx], internal_ips: &[Ipx]) -> Vec<Ipx> {
        let mut picked: Vec<Ipx> = bound.iter().copied().filter(|ip| !is_link_local(*ip)).collect();
        match self {
            NodePortAddresses::All => {}
            NodePortAddresses::Primary => retain_primary(&mut picked, internal_ips),
            NodePortAddresses::PrimaryIs(ip) => retain_primary(&mut picked, &[&[*ip], internal_ips].concat()),
            NodePortAddresses::Ranges(ranges) => picked.retain(|ip| in_ranges(ranges, ip.to_ip())),
        }
        picked
    }

    /// Both of two lists. Nothing said (`All`) adds nothing.
    ///
    /// # Errors
    /// `primary` is no part of a list.
    pub fn and(self, other: Self) -> Result<Self, String> {
        use NodePortAddresses::{All, Ranges};
        match (self, other) {
            (All, one) | (one, All) => Ok(one),
            (Ranges(a), Ranges(b)) => Ok(Ranges([a, b].concat())),
            (a, b) if a == b => Ok(a),
            _ => Err("`primary` cannot stand in a list; allowed are `primary` or CIDRs separated by commas".to_owned()),
        }
    }

    /// `Primary` with `ip` (`--bind-address`) in the place of the Node object's address of that family.
    #[must_use]
    pub fn with_primary(self, ip: Ipx) -> Self {
        if self == NodePortAddresses::Primary { NodePortAddresses::PrimaryIs(ip) } else { self }
    }
}

impl FromStr for NodePortAddresses {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        match text {
            "" => return Ok(NodePortAddresses::All),
            "primary" => return Ok(NodePortAddresses::Primary),
            _ => {}
        }
        let parse = |part: &str| -> Result<Vec<IpNet>, String> {
            let part = match part.trim() {
                "all" => return Ok(WHOLE.to_vec()),
                "localhost" => return Ok(LOOPBACK.to_vec()),
                part => part,
            };
            part.parse::<IpNet>().map(|net| vec![net.trunc()]).map_err(|_| {
                format!("{:?} is not a CIDR; allowed are `primary` or CIDRs separated by commas, such as 10.0.0.0/8,fd00::/8", part)
            })
        };
        let ranges = text.split(',').map(parse).collect::<Result<Vec<_>, _>>()?;
        Ok(NodePortAddresses::Ranges(ranges.concat()))
    }
}

fn retain_primary(picked: &mut Vec<Ipx>, internal_ips: &[Ipx]) {
    let primary = primary_of_each_family(internal_ips);
    if !primary.is_empty() {
        picked.retain(|ip| primary.contains(ip));
    }
}

fn primary_of_each_family(internal_ips: &[Ipx]) -> Vec<Ipx> {
    let first = |family| internal_ips.iter().copied().find(|ip| ip.family() == family);
    [Family::Ipv4, Family::Ipv6].into_iter().filter_map(first).collect()
}

fn in_ranges(ranges: &[IpNet], ip: IpAddr) -> bool {
    let mut of_family = ranges.iter().filter(|net| net.addr().is_ipv4() == ip.is_ipv4()).peekable();
    of_family.peek().is_none() || of_family.any(|net| net.contains(&ip))
}

pub(super) fn is_link_local(ip: Ipx) -> bool {
    match ip.to_ip() {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(text: &str) -> Vec<Ipx> {
        text.split_whitespace().map(|t| t.parse().unwrap()).collect()
    }

    #[test]
    fn node_ports_are_served_where_the_flag_says() {
        let bound = "10.0.0.5 10.0.0.6 169.254.20.10 192.168.1.1 fd00::5 fe80::1";
        let node = "10.0.0.6 10.0.0.5 fd00::5 fd00::6";
        let table = [
            ("", node, "10.0.0.5 10.0.0.6 192.168.1.1 fd00::5"),
            ("primary", node, "10.0.0.6 fd00::5"),
            ("primary", "10.0.0.5", "10.0.0.5"),
            // The Node object is not known yet.
            ("primary", "", "10.0.0.5 10.0.0.6 192.168.1.1 fd00::5"),
            // A family without a range is not restricted (kube-proxy).
            ("192.168.0.0/16", node, "192.168.1.1 fd00::5"),
            ("10.0.0.5/32, fd00::6/128", node, "10.0.0.5"),
            // Host bits are ignored.
            ("10.0.0.77/24,fd99::/16", node, "10.0.0.5 10.0.0.6"),
            ("all", node, "10.0.0.5 10.0.0.6 192.168.1.1 fd00::5"),
            ("localhost", node, ""),
            ("localhost,10.0.0.5/32", node, "10.0.0.5"),
            // A range cannot bring link-local addresses back.
            ("169.254.0.0/16,fe80::/10", node, ""),
        ];
        for (flag, internal, expected) in table {
            let selection: NodePortAddresses = flag.parse().unwrap();
            assert_eq!(selection.select(&ips(bound), &ips(internal)), ips(expected), "{flag:?} with Node {internal:?}");
        }
    }

    #[test]
    fn two_lists_are_one_and_primary_stands_alone() {
        let table = [
            ("10.0.0.0/8", "fd00::/8", Some("10.0.0.0/8,fd00::/8")),
            ("", "10.0.0.0/8", Some("10.0.0.0/8")),
            ("primary", "", Some("primary")),
            ("primary", "primary", Some("primary")),
            ("primary", "10.0.0.0/8", None),
        ];
        for (a, b, expected) in table {
            let read = |text: &str| text.parse::<NodePortAddresses>().unwrap();
            assert_eq!(read(a).and(read(b)).ok(), expected.map(read), "{a:?} and {b:?}");
        }
    }

    #[test]
    fn the_bind_address_is_the_primary_one_of_its_family() {
        let own = "10.0.0.5".parse().unwrap();
        let primary = NodePortAddresses::Primary.with_primary(own);
        let bound = ips("10.0.0.5 10.0.0.6 fd00::5 fd00::6");
        assert_eq!(primary.select(&bound, &ips("10.0.0.6 fd00::6")), ips("10.0.0.5 fd00::6"));
        assert_eq!(NodePortAddresses::All.with_primary(own), NodePortAddresses::All);
    }

    #[test]
    fn what_is_neither_primary_nor_a_cidr_is_refused_by_name() {
        for bad in ["Primary", "10.0.0.1", "10.0.0.0/33", "10.0.0.0/8,", "primary,10.0.0.0/8"] {
            let error = bad.parse::<NodePortAddresses>().unwrap_err();
            assert!(error.contains("is not a CIDR") && error.contains("primary"), "{bad}: {error}");
        }
    }
}
