//! The private range of source ports towards backends on other nodes.
//!
//! The node's own connections take their ports from `ip_local_port_range` and NodePorts have theirs, so that a port
//! outside both is nobody's and needs no tracking. Of the gaps that are left, the longest is taken.

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

/// The range for this network namespace, as its sysctl says; for both families.
pub(super) fn snat_range() -> RangeInclusive<u16> {
    let local = fs::read_to_string(SYSCTL).ok().and_then(|text| parse(&text)).unwrap_or(32_768..=60_999);
    longest_gap(&local).unwrap_or_else(|| {
        tracing::warn!(
            "{SYSCTL} ({} {}) leaves no room for the source ports of forwarded connections: {}-{} are used, and may meet the node's own; narrow the sysctl to 32768 60999",
            local.start(),
            local.end(),
            LAST_RESORT.start(),
            LAST_RESORT.end()
        );
        LAST_RESORT
    })
}

/// How many ports [`snat_range`] has now.
pub fn snat_ports() -> usize {
    let local = fs::read_to_string(SYSCTL).ok().and_then(|text| parse(&text)).unwrap_or(32_768..=60_999);
    longest_gap(&local).unwrap_or(LAST_RESORT).count()
}

fn parse(text: &str) -> Option<RangeInclusive<u16>> {
    let mut numbers = text.split_whitespace().map(str::parse);
    match (numbers.next()?, numbers.next()?) {
        (Ok(first), Ok(last)) => Some(first..=last),
        _ => None,
    }
}

fn longest_gap(local: &RangeInclusive<u16>) -> Option<RangeInclusive<u16>> {
    let mut gaps: Vec<Range<u32>> = std::iter::once(u32::from(FIRST)..65_536).collect();
    for taken in [local, &NODE_PORTS] {
        let (first, end) = (u32::from(*taken.start()), u32::from(*taken.end()) + 1);
        gaps = gaps.into_iter().flat_map(|gap| [gap.start..gap.end.min(first), gap.start.max(end)..gap.end]).collect();
    }
    let longest = gaps.into_iter().max_by_key(|gap| gap.end.saturating_sub(gap.start))?;
    (longest.end.saturating_sub(longest.start) >= u32::from(FEWEST))
        .then(|| longest.start as u16..=(longest.end - 1) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_beside_local_ports_and_node_ports_is_taken() {
        for (local, gap) in [
            ("32768\t60999\n", Some(1024..=29_999)),
            ("1024 49151", Some(49_152..=65_535)),
            ("1024 65535", None),
            ("1024 65000", None),
            ("20000 40000", Some(40_001..=65_535)),
            ("10000 65535", Some(1024..=9_999)),
        ] {
            assert_eq!(longest_gap(&parse(local).unwrap()), gap, "{local}");
        }
    }
}
