//! Source ranges as the trie needs them.
//!
//! There an IPv4 address is ::ffff:a.b.c.d, which an IPv6 range like ::/0 would hold: the IPv4 clients of a Service with
//! ranges of both families would all be let in. Such a range is taken apart into those around ::ffff:0:0/96.

use crate::model::{Family, IpRange, Ipx};

/// Of ::ffff:0:0/96.
const MAPPED_PREFIX: u8 = 96;

/// The same clients in ranges of which none of IPv6 holds an IPv4 address; sorted, without duplicates.
pub fn disjoint_families(ranges: &[IpRange]) -> Vec<IpRange> {
    let mut all: Vec<IpRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match range.ip.family() == Family::Ipv6 && holds_mapped(range) {
            true => all.extend((range.prefix..MAPPED_PREFIX).map(beside_mapped)),
            false => all.push(*range),
        }
    }
    all.sort_unstable_by_key(|range| (range.ip, range.prefix));
    all.dedup();
    all
}

fn mapped() -> u128 {
    u128::from_be_bytes(Ipx::any(Family::Ipv4).0)
}

fn holds_mapped(range: &IpRange) -> bool {
    let differs = u128::from_be_bytes(range.ip.0) ^ mapped();
    range.prefix <= MAPPED_PREFIX && differs.leading_zeros() >= range.prefix.into()
}

/// The range that shares `shared` bits with ::ffff:0:0/96, and not the next one.
fn beside_mapped(shared: u8) -> IpRange {
    let bit = 1u128 << (127 - shared);
    let address = (mapped() ^ bit) & !(bit - 1);
    IpRange { ip: Ipx(address.to_be_bytes()), prefix: shared + 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(ip: &str, prefix: u8) -> IpRange {
        IpRange { ip: ip.parse().unwrap(), prefix }
    }

    fn holds(ranges: &[IpRange], ip: Ipx) -> bool {
        ranges.iter().any(|range| {
            let prefix = u32::from(range.prefix) + if range.ip.family() == Family::Ipv4 { 96 } else { 0 };
            let differs = u128::from_be_bytes(range.ip.0) ^ u128::from_be_bytes(ip.0);
            differs.leading_zeros() >= prefix
        })
    }

    #[test]
    fn an_ipv6_range_never_lets_an_ipv4_client_in_and_still_all_of_its_own() {
        let all = disjoint_families(&[range("::", 0), range("10.0.0.0", 8), range("10.0.0.0", 8)]);
        assert_eq!(all.len(), 97);
        for (client, is_in) in [
            ("10.1.2.3", true),
            ("11.0.0.1", false),
            ("0.0.0.0", false),
            ("255.255.255.255", false),
            ("2001:db8::1", true),
            ("::", true),
            ("::1", true),
            ("::fffe:ffff:ffff", true),
            ("::1:0:0:0", true),
            ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", true),
        ] {
            assert_eq!(holds(&all, client.parse().unwrap()), is_in, "{client}");
        }
    }

    #[test]
    fn ranges_that_hold_no_ipv4_address_stay_as_they_are() {
        let given = [range("fd00::", 8), range("2001:db8::1", 128), range("0.0.0.0", 0), range("1::", 16)];
        let mut sorted = given.to_vec();
        sorted.sort_unstable_by_key(|r| (r.ip, r.prefix));
        assert_eq!(disjoint_families(&given), sorted);
    }
}
