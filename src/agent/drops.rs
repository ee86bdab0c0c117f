//! Tells the log of packets and sockets that fared badly, with what to do: one line for each reason that somebody has
//! to act upon, at once when it comes up and then once in [`INTERVAL`] while it goes on. What is a Service's own doing
//! (no endpoint, source ranges, policy Local) is counted for the metrics and said nowhere.

use std::time::{Duration, Instant};

use tokio::time::{MissedTickBehavior, interval};

use crate::abi::counter;
use crate::bpf::Maps;

/// Between two lines for one reason.
const INTERVAL: Duration = Duration::from_secs(30);
/// Between two looks at the counters.
const EVERY: Duration = Duration::from_secs(2);

/// The counters that call for somebody, and what that somebody should do.
const REMEDIES: [(&str, &str); 15] = [
    (
        "failed_backend_missing",
        "this should never happen: restart the daemon, which repairs its maps, and report it with the output of \
         `kubelane get backends -o yaml`",
    ),
    (
        "failed_storage",
        "such a socket is not destroyed when its backend is removed, and getpeername() returns the pod: raise the \
         sysctl net.core.optmem_max, and find out what uses up the node's memory",
    ),
    (
        "flow_table_full",
        "these flows continue, but new ones may evict them: kubelane_flows shows which protocol has so many; spread \
         its clients over more nodes, or use shorter timeouts (--conntrack-tcp-timeout-established, \
         --conntrack-udp-timeout-stream)",
    ),
    (
        "flow_pushed_out",
        "flows begin faster than they are completed: a flood of SYNs or datagrams, or a backend that does not \
         answer. Established connections are not affected; find out where the packets come from",
    ),
    (
        "dropped_pod_quota",
        "a pod begins thousands of connections a second that nobody answers, or asks a Service without endpoints as \
         often: a flood. Other pods are not affected; tc -s on pods' devices, or the pods' own logs, show which it is",
    ),
    (
        "dropped_martian",
        "packets from outside have source addresses that are impossible on this device: they are forged, or replies \
         would leave by another device than requests arrive on (`ip route get` with the client's address); \
         net.ipv4.conf.DEVICE.rp_filter=2 allows the latter, as for the host itself",
    ),
    (
        "snat_reclaimed",
        "connections to one backend on another node begin faster than they are completed, or than its TIME_WAIT \
         ends: a flood, a backend that does not answer, or one that closes hundreds of connections a second itself; \
         add endpoints, or use externalTrafficPolicy Local",
    ),
    (
        "dropped_snat_exhausted",
        "one backend on another node has a connection from every port of this node: add endpoints, use \
         externalTrafficPolicy Local, or widen the range by narrowing the sysctl net.ipv4.ip_local_port_range to \
         `32768 60999` and restarting the daemon",
    ),
    (
        "dropped_snat_source",
        "replies to that address would not pass kubelane's programs: find it with `ip route get` and the backend's \
         address, and name the device that has it with --devices, or remove `src` from the route",
    ),
    (
        "dropped_no_route",
        "run `ip route get` with the backends' addresses (`kubelane get backends`) and with the client's, and check \
         that the CNI is up",
    ),
    (
        "dropped_forwarding_off",
        "traffic from outside reaches no pod on another node: sysctl -w net.ipv4.conf.all.forwarding=1; sysctl -w \
         net.ipv6.conf.all.forwarding=1, in /etc/sysctl.d as well; if `all` is 1, the device's own setting is 0",
    ),
    (
        "dropped_answer_limit",
        "clients that get no ICMP error wait for their timeout instead of failing at once: \
         kubelane_datapath_verdicts_total shows which errors are sent (refused_no_endpoint, icmp_too_big, \
         icmp_ttl_exceeded); look for a client that tries thousands of times a second",
    ),
    (
        LASTING,
        "a node or gateway does not answer ARP or neighbour discovery, and packets sent there are lost: `ip neigh` \
         shows which (FAILED, INCOMPLETE), `ip route get` with the backends' addresses why it is used",
    ),
    (
        "dropped_flow_table",
        "raise the memory limit of the daemon's container, to which entries of its maps are charged, or find out what \
         uses up the node's memory",
    ),
    ("dropped_rewrite", "find out what uses up the node's memory"),
];

/// Every next hop is unknown for a moment: told of only when it came up in so many looks in a row.
const LASTING: &str = "neighbour_unknown";
const LOOKS: u32 = 4;

/// What is known of one counter.
#[derive(Clone, Copy, Debug)]
struct Seen {
    /// When last told of.
    count: u64,
    told: Option<Instant>,
    /// At the last look, and how many looks in a row found more.
    last: u64,
    rises: u32,
}

/// What has been told so far. Pure: it is given the counters and the time.
#[derive(Debug)]
pub struct Drops(Vec<(&'static str, Seen)>);

impl Drops {
    /// Starts from what an earlier daemon may have told.
    pub fn new(counters: &[(&'static str, u64)]) -> Drops {
        Drops(
            counters
                .iter()
                .map(|(label, count)| (*label, Seen { count: *count, told: None, last: *count, rises: 0 }))
                .collect(),
        )
    }

    /// The lines that are due, in the order of the counters.
    pub fn look(&mut self, counters: &[(&'static str, u64)], now: Instant) -> Vec<String> {
        let mut lines = Vec::new();
        for (label, count) in counters {
            let Some((_, remedy)) = REMEDIES.iter().find(|(name, _)| name == label) else { continue };
            let Some((_, seen)) = self.0.iter_mut().find(|(name, _)| name == label) else { continue };
            seen.rises = if *count > seen.last { seen.rises + 1 } else { 0 };
            seen.last = *count;
            if *label == LASTING && seen.rises < LOOKS {
                continue;
            }
            let rests = seen.told.is_some_and(|told| now.duration_since(told) < INTERVAL);
            if *count <= seen.count || rests {
                continue;
            }
            let times = match count - seen.count {
                1 => "once".to_owned(),
                n => format!("{n} times"),
            };
            let since = match seen.told {
                Some(told) => format!("in the last {} s", now.duration_since(told).as_secs()),
                None => "since the daemon started".to_owned(),
            };
            lines.push(format!("{} ({label}: {times} {since}); {remedy}", meaning(label)));
            (seen.count, seen.told) = (*count, Some(now));
        }
        lines
    }
}

fn meaning(label: &str) -> &'static str {
    counter::NAMES.iter().find(|(name, _)| *name == label).map_or("", |(_, meaning)| meaning)
}

/// Runs for ever; counters that cannot be read are told of when the reason is new.
///
/// # Errors
/// Never: it ends with the daemon.
pub async fn watch(maps: Maps) -> anyhow::Result<()> {
    let mut drops: Option<Drops> = None;
    let mut told = None;
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match (maps.read_counters(), &mut drops) {
            (Ok(counters), Some(drops)) => {
                drops.look(&counters, Instant::now()).into_iter().for_each(|line| tracing::warn!("{line}"));
                told = None;
            }
            (Ok(counters), None) => drops = Some(Drops::new(&counters)),
            (Err(error), _) => {
                let error = format!("{error:#}");
                if told.as_ref() != Some(&error) {
                    tracing::warn!("cannot read the datapath's counters: {error}; trying again");
                    told = Some(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// What Services, clients and load balancers do every day.
    const NORMAL: [&str; 25] = [
        "handed_to_stack",
        "dropped_flow_changing",
        "dropped_options",
        "connect_translated",
        "datagram_translated",
        "reply_translated",
        "peer_translated",
        "refused_no_endpoint",
        "refused_unknown_port",
        "refused_loopback_source",
        "dropped_no_local_endpoint",
        "flow_local",
        "flow_remote",
        "flow_pod",
        "probe_answered",
        "flow_midstream",
        "flow_established",
        "snat_retry",
        "icmp_translated",
        "icmp_too_big",
        "icmp_ttl_exceeded",
        "dropped_source_range",
        "dropped_sctp_port",
        "dropped_fragment",
        "dropped_unknown_reset",
    ];

    const FORWARDING: &str = "dropped_forwarding_off";
    const ROUTE: &str = "dropped_no_route";

    #[test]
    fn every_counter_either_has_a_remedy_or_is_normal() {
        let remedies: BTreeSet<&str> = REMEDIES.iter().map(|(label, _)| *label).collect();
        let normal = BTreeSet::from(NORMAL);
        let all: BTreeSet<&str> = counter::NAMES.iter().map(|(label, _)| *label).collect();
        assert!(remedies.is_disjoint(&normal));
        assert_eq!(remedies.union(&normal).copied().collect::<BTreeSet<_>>(), all);
    }

    #[test]
    fn a_reason_is_told_at_once_then_once_an_interval_while_it_goes_on_and_again_at_once_later() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut drops = Drops::new(&[(FORWARDING, 100)]);
        let mut look = |count, seconds| drops.look(&[(FORWARDING, count)], at(seconds));
        assert!(look(100, 0).is_empty(), "told by an earlier daemon");
        let lines = look(101, 2);
        assert_eq!(lines.len(), 1);
        assert!(
            lines[0].contains("forwarding` is off") && lines[0].contains("once since the daemon started"),
            "{lines:?}"
        );
        assert!(lines[0].contains("sysctl -w net.ipv4.conf.all.forwarding=1"), "{lines:?}");
        assert!(look(500, 4).is_empty() && look(600, 31).is_empty());
        assert!(look(601, 32)[0].contains("500 times in the last 30 s"));
        assert!(look(601, 90).is_empty() && look(601, 1000).is_empty(), "it is over");
        assert!(look(603, 1002)[0].contains("2 times in the last 970 s"));
    }

    #[test]
    fn a_neighbour_that_is_unknown_for_a_moment_is_not_told_of() {
        let start = Instant::now();
        let mut drops = Drops::new(&[(LASTING, 0)]);
        let mut look = |count, seconds| drops.look(&[(LASTING, count)], start + Duration::from_secs(seconds)).len();
        assert_eq!([(1, 2), (2, 4), (2, 6), (3, 8), (4, 10), (5, 12)].map(|(n, s)| look(n, s)), [0; 6]);
        assert_eq!((look(6, 14), look(7, 16)), (1, 0), "it lasts");
    }

    #[test]
    fn each_reason_has_its_own_line_and_what_is_normal_has_none() {
        let zeros: Vec<(&str, u64)> = counter::NAMES.iter().map(|(label, _)| (*label, 0)).collect();
        let mut drops = Drops::new(&zeros);
        let risen: Vec<(&str, u64)> = counter::NAMES.iter().map(|(label, _)| (*label, 7)).collect();
        let lines = drops.look(&risen, Instant::now());
        assert_eq!(lines.len(), REMEDIES.len() - 1);
        for (label, remedy) in REMEDIES.into_iter().filter(|(label, _)| *label != LASTING) {
            let of = |line: &&String| line.contains(&format!("({label}: 7 times")) && line.ends_with(remedy);
            assert_eq!(lines.iter().filter(of).count(), 1, "{label}: {lines:?}");
        }
        assert!(drops.look(&[(ROUTE, 8)], Instant::now()).is_empty(), "told a moment ago");
    }
}
