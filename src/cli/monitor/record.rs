//! An event as people and programs read it. `-o json` writes this object, and `--input` reads it back.

use std::net::SocketAddr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::kind::{Kind, Verdict, classify};
use super::names::Names;
use crate::abi::Ends;
use crate::abi::choice_reason::{CHOSEN_BY_AFFINITY, CHOSEN_BY_CHANCE, CHOSEN_OWN};
use crate::abi::flow_state::{FLOW_SECOND_MASK, FLOW_SECOND_SHIFT};
use crate::bpf::Event;
use crate::cli::snapshot::{PortName, protocol_name};
use crate::model::{Ipx, Protocol};

const NANOSECONDS: u64 = 1_000_000_000;
const SYN: u8 = 2;

/// Who has made a system call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub name: String,
    pub pid: u32,
    /// What its UTS namespace is called, if not as the node is: of a pod its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
}

/// An event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// RFC 3339, UTC.
    pub time: String,
    pub event: Kind,
    pub verdict: Verdict,
    /// As `--reason` knows it.
    pub reason: String,
    /// Of an ICMP error: that of the packet which it is about.
    pub protocol: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<Process>,
    /// Port 0: not known yet, or none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<PortName>,
    /// Whom the backend sees, if not `from`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<SocketAddr>,
    /// Of an ICMP error: the ends of the packet that it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub about: Option<(SocketAddr, SocketAddr)>,
    /// Of an ICMP error: to whom it was passed on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub passed_to: Option<SocketAddr>,
    /// Of packets: where they came in, or leave.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Of a flow that has ended: from its first packet to its last one, in whole seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<u64>,
    pub why: String,
}

impl Record {
    /// `monotonic_zero`: nanoseconds since 1970 at which CLOCK_MONOTONIC was 0; `begun_ns`: of its time, when a flow that has
    /// ended began. `None`: no event that is known.
    pub fn new(event: &Event, names: &mut Names, monotonic_zero: i128, begun_ns: Option<u64>) -> Option<Record> {
        let (kind, verdict, reason, words) = classify(event)?;
        let is_socket = event.process != 0;
        let [mut from, to] = ends(&event.asked);
        let [source, backend] = ends(&event.becomes);
        let process = is_socket.then(|| process(event, names));
        if is_socket {
            // It has none yet: one of its network namespace.
            let ip = to.and_then(|to| names.address_of(event.netns_cookie, event.process, to.ip()));
            from = ip.map(|ip| SocketAddr::new(ip, 0));
        }
        let (is_icmp, quoted) = (event.quoted != Ends::default(), ends(&event.quoted));
        let to_name = if is_icmp { backend.or(to) } else { to };
        let service = match event.has_backend {
            0 => to_name.and_then(|to| names.service_at(to, event.protocol)),
            _ => names.service(event.service_id),
        };
        let has_flow = matches!(kind, Kind::FlowBegun | Kind::FlowProved | Kind::FlowEnded);
        let is_failed = matches!(verdict, Verdict::Dropped | Verdict::Refused);
        Some(Record {
            time: time(monotonic_zero + i128::from(event.time_ns)),
            event: kind,
            verdict,
            reason: reason.to_owned(),
            protocol: protocol_name(event.protocol),
            process,
            from,
            to,
            service,
            // Of what did not become a flow no port was chosen.
            source: source.filter(|source| has_flow && Some(*source) != from && !source.ip().is_unspecified()),
            backend: backend.filter(|_| !(is_icmp || is_failed && event.has_backend == 0)),
            about: quoted[0].zip(quoted[1]).filter(|_| is_icmp),
            passed_to: backend.filter(|_| is_icmp),
            device: names.device(event.interface),
            seconds: begun_ns.map(|begun_ns| seconds(event, begun_ns)),
            why: why(event, kind, words),
        })
    }

    /// The pairs of ends that filters look at: as asked, as the backend sees it, and what an ICMP error is about.
    pub fn pairs(&self) -> [(Option<SocketAddr>, Option<SocketAddr>); 3] {
        let about = self.about.map_or((None, None), |(from, to)| (Some(from), Some(to)));
        [(self.from, self.to), (self.source.or(self.from), self.backend.or(self.passed_to)), about]
    }
}

fn process(event: &Event, names: &mut Names) -> Process {
    let pod = names.host_of(event.netns_cookie, event.process);
    Process { name: text(&event.command), pid: event.process, pod }
}

/// Of bytes that are padded with NULs.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// `None`: nothing is there.
fn ends(ends: &Ends) -> [Option<SocketAddr>; 2] {
    let end = |ip: [u8; 16], port: [u8; 2]| {
        (ip != [0; 16]).then(|| SocketAddr::new(Ipx(ip).to_ip(), u16::from_be_bytes(port)))
    };
    [end(ends.source, ends.source_port_be), end(ends.destination, ends.destination_port_be)]
}

fn time(nanoseconds: i128) -> String {
    let time = Timestamp::from_nanosecond(nanoseconds).unwrap_or(Timestamp::UNIX_EPOCH);
    format!("{time:.6}")
}

/// From the beginning to the later one of both directions' last packets.
fn seconds(event: &Event, begun_ns: u64) -> u64 {
    let now = (event.time_ns / NANOSECONDS) as u32;
    let idle = |state: u32| now.wrapping_sub(state >> FLOW_SECOND_SHIFT) & FLOW_SECOND_MASK;
    let states = [event.request_state, event.reply_state].into_iter().filter(|state| *state != 0);
    // Clocks of processors differ: a packet may be a moment later than the end.
    let idle = states.map(idle).filter(|idle| *idle < FLOW_SECOND_MASK - 60).min().unwrap_or(0);
    u64::from(now).saturating_sub(u64::from(idle)).saturating_sub(begun_ns / NANOSECONDS)
}

fn why(event: &Event, kind: Kind, words: &str) -> String {
    let chosen = match event.reason {
        CHOSEN_BY_CHANCE => "by chance",
        CHOSEN_BY_AFFINITY => "as before: session affinity",
        CHOSEN_OWN => "one of this node's, as the socket is bound to loopback",
        _ => "",
    };
    match kind {
        Kind::Connect | Kind::Datagram => chosen.to_owned(),
        Kind::FlowBegun => {
            let is_midstream = event.protocol == Protocol::Tcp as u8 && event.tcp_flags & SYN == 0;
            let midstream = if is_midstream { ", in the middle of a connection" } else { "" };
            format!("{chosen}{midstream}")
        }
        _ => words.to_owned(),
    }
}

/// The address without a port that is not known.
pub fn shown(end: SocketAddr) -> String {
    match (end.port(), end.ip()) {
        (0, ip) => ip.to_string(),
        _ => end.to_string(),
    }
}

#[cfg(test)]
pub mod tests {
    use bytemuck::Zeroable as _;

    use super::*;
    use crate::abi::event_number::EVENT_FLOW_ENDED;

    /// A flow that begins.
    pub fn record(from: &str, to: &str, source: &str, backend: &str) -> Record {
        let end = |text: &str| Some(text.parse().unwrap());
        Record {
            time: "2026-11-29T08:00:00.000001Z".to_owned(),
            event: Kind::FlowBegun,
            verdict: Verdict::Translated,
            reason: "flow_remote".to_owned(),
            protocol: "TCP".to_owned(),
            process: None,
            from: end(from),
            to: end(to),
            service: Some(PortName { namespace: "shop".into(), name: "web".into(), port_name: "http".into() }),
            source: end(source),
            backend: end(backend),
            about: None,
            passed_to: None,
            device: Some("eth0".to_owned()),
            seconds: None,
            why: "by chance".to_owned(),
        }
    }

    #[test]
    fn a_flow_has_lasted_from_its_beginning_to_its_last_packet() {
        let state = |second: u32| second << FLOW_SECOND_SHIFT;
        let event = |request, reply| Event {
            number: EVENT_FLOW_ENDED,
            time_ns: 1000 * NANOSECONDS,
            request_state: request,
            reply_state: reply,
            ..Event::zeroed()
        };
        let begun = 900 * NANOSECONDS;
        assert_eq!(seconds(&event(state(990), state(980)), begun), 90);
        assert_eq!(seconds(&event(state(980), state(991)), begun), 91);
        assert_eq!(seconds(&event(state(990), 0), begun), 90);
        assert_eq!(seconds(&event(state(1001), state(980)), begun), 80, "a clock that is ahead");
    }

    #[test]
    fn json_is_read_back_as_it_was_written() {
        let written = record("172.31.0.1:40000", "172.31.0.11:30080", "172.31.0.11:61000", "10.244.2.5:8080");
        let text = serde_json::to_string(&written).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), written);
        assert!(!text.contains("passedTo") && text.contains("\"event\":\"flow-begun\""), "{text}");
    }
}
