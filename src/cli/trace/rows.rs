//! Rows of the tables that packets write, in words.

use bytemuck::AnyBitPattern;
use serde::Serialize;

use crate::abi::choice_reason::CHOSEN_NONE;
use crate::abi::client_kind::CLIENT_ADDRESS;
use crate::abi::event_number::EVENT_FLOW_ENDED;
use crate::abi::flow_flag::{FLOW_FIN, FLOW_PATH, FLOW_PROVED, FLOW_REPLY, FLOW_RESET};
use crate::abi::flow_path::{PATH_HAIRPIN, PATH_HALVES, PATH_ROUTED, PATH_STACK};
use crate::abi::{Affinity, AffinityKey, Ends, Flow, FlowKey, FlowKey4};
use crate::bpf::{Change, Event};
use crate::cli::monitor::{Names, name, shown};
use crate::cli::snapshot::protocol_name;
use crate::model::Ipx;

/// A row, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    pub map: &'static str,
    /// "read", "new", "changed" or "gone".
    pub what: &'static str,
    pub text: String,
}

/// What a packet left in a table.
pub fn changed(change: &Change, names: &mut Names) -> Row {
    let what = match (change.was_there, &change.value) {
        (_, None) => "gone",
        (true, Some(_)) => "changed",
        (false, Some(_)) => "new",
    };
    Row { map: change.map, what, text: text(change, names) }
}

fn text(change: &Change, names: &mut Names) -> String {
    match change.map {
        "flows4" => read::<FlowKey4>(&change.key).map(|key| with_flow(&key.into(), change)),
        "flows6" | "handed" => read::<FlowKey>(&change.key).map(|key| with_flow(&key, change)),
        "outgoing" => read::<FlowKey>(&change.key).map(|key| ends_of(&key)),
        "affinities" | "new_affinities" => read::<AffinityKey>(&change.key).map(|key| affinity(&key, change, names)),
        // struct fragment_key: source, destination, id, protocol.
        "fragments" => change.key.get(..32).map(|ends| {
            let ip = |bytes: &[u8]| Ipx(bytes.try_into().unwrap_or_default()).to_ip();
            format!("a datagram in pieces, {} -> {}", ip(&ends[..16]), ip(&ends[16..]))
        }),
        _ => None,
    }
    .unwrap_or_else(|| "of another version".to_owned())
}

fn read<T: AnyBitPattern>(bytes: &[u8]) -> Option<T> {
    bytemuck::try_pod_read_unaligned(bytes).ok()
}

fn with_flow(key: &FlowKey, change: &Change) -> String {
    let flow = change.value.as_ref().and_then(|value| read::<Flow>(value));
    flow.map_or_else(|| ends_of(key), |flow| flow_words(key, &flow))
}

/// "TCP 172.31.0.1:40000 -> 172.31.0.11:30080 => 172.31.0.11:61000 -> 10.244.2.5:8080, request, opening, routed"
pub fn flow_words(key: &FlowKey, flow: &Flow) -> String {
    let state = match () {
        () if flow.has(FLOW_RESET) => "reset",
        () if flow.has(FLOW_FIN) => "closing",
        () if flow.has(FLOW_PROVED) => "proved",
        () => "opening",
    };
    let way = match flow.state & FLOW_PATH {
        PATH_ROUTED => "sent on from here",
        PATH_HAIRPIN => "sent back by the pod's device",
        PATH_HALVES => "translated by halves, through the host's stack",
        PATH_STACK => "through the host's stack",
        _ => "by no way that is known",
    };
    let side = if flow.has(FLOW_REPLY) { "reply" } else { "request" };
    format!("{} => {}, {side}, {state}, {way}", ends_of(key), ends(&flow.ends))
}

fn ends_of(key: &FlowKey) -> String {
    format!("{} {}", protocol_name(key.protocol), ends(&key.ends))
}

fn ends(ends: &Ends) -> String {
    let end = |ip: [u8; 16], port: [u8; 2]| shown((Ipx(ip).to_ip(), u16::from_be_bytes(port)).into());
    format!("{} -> {}", end(ends.source, ends.source_port_be), end(ends.destination, ends.destination_port_be))
}

fn affinity(key: &AffinityKey, change: &Change, names: &mut Names) -> String {
    let service = names.service(key.service_id);
    let service = service.map_or_else(|| "a Service that has gone".to_owned(), |service| name(&service));
    let client = match key.kind {
        CLIENT_ADDRESS => Ipx(key.client).to_ip().to_string(),
        _ => "a network namespace".to_owned(),
    };
    let backend = change.value.as_ref().and_then(|value| read::<Affinity>(value));
    let backend = backend.map(|row| format!(" => backend {}", row.backend_id)).unwrap_or_default();
    format!("{client} of {service}{backend}")
}

/// Which backend an event has chosen.
pub fn choice(event: &Event) -> Option<Row> {
    // Of a flow that ends `reason` is another.
    let is_choice = event.has_backend != 0 && event.reason != CHOSEN_NONE && event.number != EVENT_FLOW_ENDED;
    let at =
        shown((Ipx(event.becomes.destination).to_ip(), u16::from_be_bytes(event.becomes.destination_port_be)).into());
    let text = format!("{} (generation {}): {at}", event.backend_id, event.generation);
    is_choice.then_some(Row { map: "backends", what: "read", text })
}
