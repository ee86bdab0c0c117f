//! ICMP and ICMPv6 errors that say that a packet was too big, as routers and hosts send them.

use super::frame::{Frame, Inside, ip, parse_packet};

/// An ICMP error of `router` to `quoted`'s sender, quoting `bytes` of it.
pub fn error(router: &str, quoted: &Frame, bytes: usize, mtu: u32) -> Frame {
    let (kind, code) = if quoted.source.is_ipv4() { (3, 4) } else { (2, 0) };
    let data = quoted.packet()[..bytes.min(quoted.packet().len())].to_vec();
    let inside = Inside::Icmp { kind, code, rest: mtu, data };
    Frame { source: ip(router), destination: quoted.source, ttl: 60, inside }
}

/// `frame` is an error from `source` to `destination` that quotes a packet with the ends `from`, `to`.
pub fn assert_error(frame: &Frame, ends: (&str, &str), from: (&str, u16), to: (&str, u16), mtu: u32) {
    assert_eq!((frame.source, frame.destination), (ip(ends.0), ip(ends.1)));
    let Inside::Icmp { rest, data, .. } = &frame.inside else { panic!("{frame:?}") };
    let quoted = parse_packet(data, false);
    assert_eq!((quoted.source, quoted.destination, quoted.ports()), (ip(from.0), ip(to.0), (from.1, to.1)));
    assert_eq!(*rest, mtu);
}
