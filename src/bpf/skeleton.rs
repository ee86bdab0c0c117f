//! The skeleton that libbpf-cargo generates from bpf/kubelane.bpf.c, and the proof that its structs are `abi`'s.

#![allow(clippy::all, missing_docs, dead_code)]

use std::mem::{offset_of, size_of};

use crate::abi;

include!(concat!(env!("OUT_DIR"), "/kubelane.skel.rs"));

/// Same size, same offset of every named field: checked when the crate is compiled.
macro_rules! same_layout {
    ($c:ty, $rust:ty, $($c_field:ident = $rust_field:ident),+) => {
        const _: () = {
            assert!(size_of::<$c>() == size_of::<$rust>());
            $(assert!(offset_of!($c, $c_field) == offset_of!($rust, $rust_field));)+
        };
    };
}

same_layout!(types::frontend_key, abi::FrontendKey, address = address, port = port_be, protocol = protocol);
same_layout!(types::pool, abi::Pool, base = base, count = count, member = member, on_empty = on_empty);
same_layout!(
    types::frontend,
    abi::Frontend,
    service_id = service_id,
    flags = flags,
    affinity_seconds = affinity_seconds,
    inside = inside,
    outside = outside
);
same_layout!(
    types::backend,
    abi::Backend,
    address = address,
    port = port_be,
    state = state,
    pools = pools,
    generation = generation,
    service_id = service_id,
    protocol = protocol,
    flags = flags
);
same_layout!(types::service_name, abi::ServiceName, text = text);
same_layout!(
    types::source_range_key,
    abi::SourceRangeKey,
    prefix_length = prefix_length,
    service_id = service_id,
    address = address
);
same_layout!(
    types::pod_device,
    abi::PodDevice,
    ip4 = ip4,
    ip6 = ip6,
    gateway = gateway,
    zero = zero,
    second = second,
    openings = openings
);
same_layout!(types::affinity_key, abi::AffinityKey, client = client, service_id = service_id, kind = kind);
same_layout!(types::affinity, abi::Affinity, backend_id = backend_id, generation = generation, used_ns = used_ns);
same_layout!(types::device, abi::DeviceAddresses, ip4 = ip4, ip6 = ip6, is_bare = is_bare, rp_filter = rp_filter);
same_layout!(
    types::ends,
    abi::Ends,
    source = source,
    destination = destination,
    source_port = source_port_be,
    destination_port = destination_port_be
);
same_layout!(types::flow_key, abi::FlowKey, ends = ends, protocol = protocol);
same_layout!(
    types::flow_key4,
    abi::FlowKey4,
    source = source,
    destination = destination,
    source_port = source_port_be,
    destination_port = destination_port_be,
    protocol = protocol
);
same_layout!(
    types::flow,
    abi::Flow,
    ends = ends,
    change = change,
    state = state,
    sequence = sequence,
    backend_or_first = backend_or_first,
    generation_or_interface = generation_or_interface
);
same_layout!(
    types::flow_limits,
    abi::FlowLimits,
    tcp_opening = tcp_opening,
    tcp_established = tcp_established,
    tcp_half_closed = tcp_half_closed,
    tcp_closed = tcp_closed,
    tcp_time_wait = tcp_time_wait,
    tcp_reset = tcp_reset,
    udp = udp,
    udp_stream = udp_stream
);
