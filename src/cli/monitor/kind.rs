//! What events are: each counter of the datapath that counts one, and the end of a flow.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::abi::counter::{self, *};
use crate::abi::event_number::EVENT_FLOW_ENDED;
use crate::abi::flow_flag::{FLOW_FIN, FLOW_PROVED, FLOW_RESET};
use crate::abi::removal::{REMOVE_OPENING, REMOVE_PORT, REMOVE_REPLACED};
use crate::bpf::Event;

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// connect() to a Service.
    Connect,
    /// A socket's first datagram to a Service.
    Datagram,
    FlowBegun,
    /// Both ends have shown that they are there.
    FlowProved,
    FlowEnded,
    Drop,
    Refusal,
    /// A source port towards a backend was hard to find.
    SourcePort,
    Icmp,
    /// Something that should not be, and that stopped nothing.
    Failure,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Connect => "connect",
            Kind::Datagram => "datagram",
            Kind::FlowBegun => "flow-begun",
            Kind::FlowProved => "flow-proved",
            Kind::FlowEnded => "flow-ended",
            Kind::Drop => "drop",
            Kind::Refusal => "refusal",
            Kind::SourcePort => "source-port",
            Kind::Icmp => "icmp",
            Kind::Failure => "failure",
        }
    }
}

/// What became of a connection or a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It goes to a backend, or back to a client
    Translated,
    /// Its sender was told no
    Refused,
    /// Its sender hears nothing (a socket: what it would have timed out with)
    Dropped,
    /// None: something that happens beside
    Noted,
}

impl Verdict {
    pub fn as_str(self) -> &'static str {
        match self {
            Verdict::Translated => "translated",
            Verdict::Refused => "refused",
            Verdict::Dropped => "dropped",
            Verdict::Noted => "noted",
        }
    }
}

/// Counters that are events.
const EVENTS: [(u32, Kind, Verdict); 31] = [
    (COUNTER_CONNECT_TRANSLATED, Kind::Connect, Verdict::Translated),
    (COUNTER_DATAGRAM_TRANSLATED, Kind::Datagram, Verdict::Translated),
    (COUNTER_REFUSED_NO_ENDPOINT, Kind::Refusal, Verdict::Refused),
    (COUNTER_REFUSED_UNKNOWN_PORT, Kind::Refusal, Verdict::Refused),
    (COUNTER_REFUSED_LOOPBACK_SOURCE, Kind::Refusal, Verdict::Refused),
    (COUNTER_DROPPED_NO_LOCAL_ENDPOINT, Kind::Drop, Verdict::Dropped),
    (COUNTER_DROPPED_SOURCE_RANGE, Kind::Drop, Verdict::Dropped),
    (COUNTER_DROPPED_SNAT_EXHAUSTED, Kind::Drop, Verdict::Dropped),
    (COUNTER_DROPPED_SNAT_SOURCE, Kind::Drop, Verdict::Dropped),
    (COUNTER_DROPPED_NO_ROUTE, Kind::Drop, Verdict::Dropped),
    (COUNTER_DROPPED_FORWARDING_OFF, Kind::Drop, Verdict::Dropped),
    (COUNTER_DROPPED_FRAGMENT, Kind::Drop, Verdict::Dropped),
    (COUNTER_DROPPED_UNKNOWN_RESET, Kind::Drop, Verdict::Dropped),
    (COUNTER_DROPPED_FLOW_TABLE, Kind::Drop, Verdict::Dropped),
    (COUNTER_DROPPED_REWRITE, Kind::Drop, Verdict::Dropped),
    (COUNTER_DROPPED_ANSWER_LIMIT, Kind::Drop, Verdict::Dropped),
    (COUNTER_DROPPED_SCTP_PORT, Kind::Drop, Verdict::Dropped),
    (COUNTER_DROPPED_FLOW_CHANGING, Kind::Drop, Verdict::Dropped),
    (COUNTER_DROPPED_MARTIAN, Kind::Drop, Verdict::Dropped),
    (COUNTER_DROPPED_OPTIONS, Kind::Drop, Verdict::Dropped),
    (COUNTER_DROPPED_POD_QUOTA, Kind::Drop, Verdict::Dropped),
    (COUNTER_FLOW_LOCAL, Kind::FlowBegun, Verdict::Translated),
    (COUNTER_FLOW_REMOTE, Kind::FlowBegun, Verdict::Translated),
    (COUNTER_FLOW_POD, Kind::FlowBegun, Verdict::Translated),
    (COUNTER_FLOW_ESTABLISHED, Kind::FlowProved, Verdict::Noted),
    (COUNTER_SNAT_RETRY, Kind::SourcePort, Verdict::Noted),
    (COUNTER_SNAT_RECLAIMED, Kind::SourcePort, Verdict::Noted),
    (COUNTER_ICMP_TRANSLATED, Kind::Icmp, Verdict::Translated),
    (COUNTER_ICMP_TOO_BIG, Kind::Icmp, Verdict::Refused),
    (COUNTER_ICMP_TTL_EXCEEDED, Kind::Icmp, Verdict::Refused),
    (COUNTER_FLOW_TABLE_FULL, Kind::Failure, Verdict::Noted),
];

/// The same that only tell of something odd.
const FAILURES: [u32; 3] = [COUNTER_FAILED_BACKEND_MISSING, COUNTER_FAILED_STORAGE, COUNTER_NEIGHBOUR_UNKNOWN];

/// Why flows end, as `--reason` has it, and in words.
const ENDS: [(&str, &str); 7] = [
    ("closed", "both ends have closed it"),
    ("reset", "it was reset"),
    ("timed_out", "it was silent for too long"),
    ("never_proved", "its backend or its client never answered"),
    ("pushed_out", "it was not proved, and newer ones needed the room"),
    ("port_needed", "it was over or not proved, and another flow needed its source port"),
    ("port_used_again", "its client begins another one from the same port"),
];

/// What an event is, and its reason: a counter's label as in the metrics, or why a flow ended. `None`: a number that no
/// event has.
pub fn classify(event: &Event) -> Option<(Kind, Verdict, &'static str, &'static str)> {
    if event.number == EVENT_FLOW_ENDED {
        let (reason, words) = ENDS[end(event)];
        return Some((Kind::FlowEnded, Verdict::Noted, reason, words));
    }
    let (kind, verdict) = of_counter(event.number)?;
    let (label, words) = counter::NAMES.get(event.number as usize)?;
    // "dropped: no free port" says its verdict twice.
    let words = words.strip_prefix("dropped: ").or(words.strip_prefix("refused: ")).unwrap_or(words);
    Some((kind, verdict, label, words))
}

fn of_counter(number: u32) -> Option<(Kind, Verdict)> {
    let found = EVENTS.iter().find(|(counter, ..)| *counter == number).map(|(_, kind, verdict)| (*kind, *verdict));
    found.or_else(|| FAILURES.contains(&number).then_some((Kind::Failure, Verdict::Noted)))
}

/// Index into [`ENDS`].
fn end(event: &Event) -> usize {
    let (request, reply) = (event.request_state, event.reply_state);
    match event.reason {
        REMOVE_OPENING => 4,
        REMOVE_PORT => 5,
        REMOVE_REPLACED => 6,
        _ if (request | reply) & FLOW_RESET != 0 => 1,
        _ if request & reply & FLOW_FIN != 0 => 0,
        _ if request & FLOW_PROVED != 0 => 2,
        _ => 3,
    }
}

/// Every reason that there is, for `--reason`.
pub fn reasons() -> impl Iterator<Item = &'static str> {
    let all = counter::NAMES.iter().enumerate();
    let counters = all.filter(|(number, _)| of_counter(*number as u32).is_some()).map(|(_, (label, _))| *label);
    counters.chain(ENDS.iter().map(|(label, _)| *label))
}

/// The numbers, a bit each, of which some event has one of these verdicts and one of these reasons; none: any.
pub fn numbers(verdicts: &[Verdict], reasons: &[String]) -> u64 {
    let is_wanted = |verdict: Verdict, labels: &[&str]| {
        (verdicts.is_empty() || verdicts.contains(&verdict))
            && (reasons.is_empty() || reasons.iter().any(|reason| labels.contains(&reason.as_str())))
    };
    let mut numbers = 0;
    for (number, (label, _)) in counter::NAMES.iter().enumerate() {
        let of_event = of_counter(number as u32);
        if of_event.is_some_and(|(_, verdict)| is_wanted(verdict, &[*label])) {
            numbers |= 1 << number;
        }
    }
    if is_wanted(Verdict::Noted, &ENDS.map(|(label, _)| label)) {
        numbers |= 1 << EVENT_FLOW_ENDED;
    }
    numbers
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;

    use super::*;

    const _: () = assert!(EVENT_FLOW_ENDED >= COUNTER_MAX);

    /// What a packet or a call may count again and again, or what another event tells.
    const SILENT: [u32; 6] = [
        COUNTER_REPLY_TRANSLATED,
        COUNTER_PEER_TRANSLATED,
        COUNTER_FLOW_MIDSTREAM,
        COUNTER_FLOW_PUSHED_OUT,
        COUNTER_HANDED_TO_STACK,
        COUNTER_PROBE_ANSWERED,
    ];

    #[test]
    fn every_counter_is_an_event_or_is_known_not_to_be() {
        for number in 0..COUNTER_MAX {
            assert_ne!(of_counter(number).is_some(), SILENT.contains(&number), "{}", counter::NAMES[number as usize].0);
        }
        let labels: Vec<&str> = reasons().collect();
        let unique: std::collections::BTreeSet<&str> = labels.iter().copied().collect();
        assert_eq!(labels.len(), unique.len());
    }

    #[test]
    fn a_flow_ends_for_what_its_rows_and_its_removal_say() {
        let (closed, proved) = (FLOW_FIN | FLOW_PROVED, FLOW_PROVED);
        for (why, request, reply, expected) in [
            (0, closed, closed, "closed"),
            (3, closed, closed, "closed"),
            (0, closed, proved, "timed_out"),
            (0, proved, proved, "timed_out"),
            (0, closed, closed | FLOW_RESET, "reset"),
            (0, 0, 0, "never_proved"),
            (REMOVE_OPENING, 0, 0, "pushed_out"),
            (REMOVE_PORT, closed, closed, "port_needed"),
            (REMOVE_REPLACED, closed, 0, "port_used_again"),
        ] {
            let event = Event {
                number: EVENT_FLOW_ENDED,
                reason: why,
                request_state: request,
                reply_state: reply,
                ..Event::zeroed()
            };
            assert_eq!(classify(&event).unwrap().2, expected);
        }
    }

    #[test]
    fn the_kernel_is_asked_for_no_less_than_the_filters_let_through() {
        assert_eq!(numbers(&[], &[]).count_ones() as usize, EVENTS.len() + FAILURES.len() + 1);
        let refused = numbers(&[Verdict::Refused], &[]);
        assert_eq!(refused & (1 << COUNTER_ICMP_TOO_BIG), 1 << COUNTER_ICMP_TOO_BIG);
        assert_eq!(refused.count_ones(), 5);
        assert_eq!(numbers(&[], &["reset".to_owned()]), 1 << EVENT_FLOW_ENDED);
        assert_eq!(numbers(&[Verdict::Dropped], &["reset".to_owned()]), 0);
    }
}
