//! The private ranges of source ports: towards backends on other nodes, where the node is the client, and towards backends
//! on this one, where a client keeps its address but not its port.
//!
//! The node's own connections take their ports from `ip_local_port_range` and NodePorts have theirs, so that a port
//! outside both is nobody's and needs no tracking. Of the gaps that are left, the longest is taken for the first, and the
//! next one for the second: a client may be another node, which has the same ranges.

use std::fs;
use std::ops::{Range, RangeInclusive};

/// The API server's default `--service-node-port-range`.
const NODE_PORTS: RangeInclusive<u16> = 30_000..=32_767;
/// RFC 6335: below are the system ports.
const FIRST: u16 = 1024;
/// Fewer would be used up by a few thousand connections to one backend.
const FEWEST: u16 = 1024;
/// What is taken when the sysctl leaves no gap: above Linux's default range.
const LAST_RESORT: RangeInclusive<u16> = 61_000..=65_535;
const SYSCTL: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// Both ranges for this network namespace, as its sysctl says; for both families.
pub(super) fn private_ranges() -> [RangeInclusive<u16>; 2] {
    let local = fs::read_to_string(SYSCTL).ok().and_then(|text| parse(&text)).unwrap_or(32_768..=60_999);
    let mut gaps = gaps(&local).into_iter();
    let longest = gaps.next().unwrap_or_else(|| {
        tracing::warn!(
            "{SYSCTL} ({} {}) leaves no room for the source ports of forwarded connections: {}-{} are used, and may collide with the node's own; narrow the sysctl to 32768 60999",
            local.start(),
            local.end(),
            LAST_RESORT.start(),
            LAST_RESORT.end()
        );
        LAST_RESORT
    });
    let next = gaps.next().unwrap_or_else(|| longest.clone());
    [longest, next]
}

/// How many ports the first of [`private_ranges`] has now.
pub fn snat_ports() -> usize {
    let local = fs::read_to_string(SYSCTL).ok().and_then(|text| parse(&text)).unwrap_or(32_768..=60_999);
    gaps(&local).into_iter().next().unwrap_or(LAST_RESORT).count()
}

fn parse(text: &str) -> Option<RangeInclusive<u16>> {
    let mut numbers = text.split_whitespace().map(str::parse);
    match (numbers.next()?, numbers.next()?) {
        (Ok(first), Ok(last)) => Some(first..=last),
        _ => None,
    }
}

/// Those that are long enough, the longest first.
fn gaps(local: &RangeInclusive<u16>) -> Vec<RangeInclusive<u16>> {
    let mut gaps: Vec<Range<u32>> = std::iter::once(u32::from(FIRST)..65_536).collect();
    for taken in [local, &NODE_PORTS] {
        let (first, end) = (u32::from(*taken.start()), u32::from(*taken.end()) + 1);
        gaps = gaps.into_iter().flat_map(|gap| [gap.start..gap.end.min(first), gap.start.max(end)..gap.end]).collect();
    }
    let length = |gap: &Range<u32>| gap.end.saturating_sub(gap.start);
    gaps.retain(|gap| length(gap) >= u32::from(FEWEST));
    gaps.sort_by_key(|gap| std::cmp::Reverse(length(gap)));
    gaps.into_iter().map(|gap| gap.start as u16..=(gap.end - 1) as u16).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_beside_local_ports_and_node_ports_are_taken_the_longest_first() {
        for (local, expected) in [
            ("32768\t60999\n", &[1024..=29_999, 61_000..=65_535][..]),
            ("1024 49151", &[49_152..=65_535]),
            ("1024 65535", &[]),
            ("1024 65000", &[]),
            ("20000 40000", &[40_001..=65_535, 1024..=19_999]),
            ("10000 65535", &[1024..=9_999]),
        ] {
            assert_eq!(gaps(&parse(local).unwrap()), expected, "{local}");
        }
    }
}
