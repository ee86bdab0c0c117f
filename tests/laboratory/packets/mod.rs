//! A node for packets: a network namespace with an uplink and a tunnel, the programs loaded, and rows in the maps.

pub mod errors;
pub mod frame;
pub mod network;
mod pods;

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use frame::Frame;
use kubelane::abi::{
    Backend, DeviceAddresses, Ends, Flow, FlowKey, FlowKey4, Frontend, FrontendKey, Pool, SourceRangeKey, abi_version,
    address_flag, address_index, backend_flag, backend_state, flow_flag, flow_state, frontend_flag, pool_empty,
    pool_member, reply_filter_size, reply_index,
};
use kubelane::bpf::run::{Outcome, run, run_from, run_marked};
use kubelane::bpf::{Datapath, Direction, Settings};
use kubelane::model::{IpRange, Ipx, Protocol};
use kubelane::sync::{MapIo, MapName};
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use nix::sched::{CloneFlags, unshare};

use super::pins::Pins;

/// tc actions (linux/pkt_cls.h).
pub const PASS: i32 = -1;
pub const DROP: i32 = 2;
pub const REDIRECT: i32 = 7;

/// The node's addresses on its uplink, and on its tunnel.
pub const NODE4: &str = "10.0.0.1";
pub const NODE6: &str = "fd00::1";
pub const TUNNEL4: &str = "10.244.0.1";
pub const TUNNEL6: &str = "fd44::1";
/// Service addresses that nobody is bound to.
pub const VIP4: &str = "192.0.2.80";
pub const VIP6: &str = "2001:db8:80::80";
pub const CLIENT4: &str = "198.51.100.7";
pub const CLIENT6: &str = "2001:db8::7";
/// Pods: here, and behind the tunnel.
pub const LOCAL4: &str = "10.1.0.5";
pub const LOCAL6: &str = "fd01::5";
pub const REMOTE4: &str = "10.244.1.5";
pub const REMOTE6: &str = "fd44::1:5";
pub const TUNNEL_MTU: u32 = 1450;
/// The device that this node's pods are behind.
pub const PODS: &str = "pods0";
/// What tests send their frames to.
pub const GATEWAY: [u8; 6] = [2, 0, 0, 0, 0, 1];

pub struct Node {
    pub datapath: Datapath,
    pub pin_path: PathBuf,
    pub uplink: u32,
    pub tunnel: u32,
    next_slot: u32,
    next_backend: u32,
    pub pins: Pins,
}

/// Runs `ip` with these words, in the calling thread's namespace.
pub fn ip_command(words: &str) {
    let out = Command::new("ip").args(words.split_whitespace()).output().unwrap();
    assert!(out.status.success(), "ip {words}: {}", String::from_utf8_lossy(&out.stderr));
}

pub fn set_sysctl(name: &str, value: &str) {
    fs::write(Path::new("/proc/sys").join(name), value).unwrap_or_else(|e| panic!("{name}: {e}"));
}

pub fn interface_index(name: &str) -> u32 {
    nix::net::if_::if_nametoindex(name).unwrap()
}

/// Sets `local` up as one device of this node with a neighbour that need not exist.
fn device(name: &str, address4: &str, address6: &str, mtu: u32, neighbours: &[&str]) -> u32 {
    // The address that frames of the tests are sent to.
    ip_command(&format!(
        "link add {name} address 02:00:00:00:00:01 mtu {mtu} type veth peer name {name}-far mtu {mtu}"
    ));
    ip_command(&format!("addr add {address4} dev {name}"));
    ip_command(&format!("addr add {address6} dev {name} nodad"));
    ip_command(&format!("link set {name} up"));
    ip_command(&format!("link set {name}-far up"));
    for neighbour in neighbours {
        ip_command(&format!("neigh add {neighbour} lladdr 02:00:00:00:00:fe dev {name} nud permanent"));
    }
    interface_index(name)
}

impl Node {
    /// The calling thread moves into the node's namespace for good.
    pub fn new() -> Node {
        Node::opened_by(Datapath::open)
    }

    /// As [`Node::new`], with a datapath that is opened in another way.
    pub fn opened_by(open: impl FnOnce(&Settings) -> anyhow::Result<Datapath>) -> Node {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
        ip_command("link set lo up");
        for family in ["ipv4/conf", "ipv6/conf"] {
            set_sysctl(&format!("net/{family}/all/forwarding"), "1");
        }
        let uplink = device("up0", "10.0.0.1/24", "fd00::1/64", 1500, &["10.0.0.254", "fd00::254"]);
        let tunnel = device("over0", "10.244.0.1/16", "fd44::1/32", TUNNEL_MTU, &[REMOTE4, REMOTE6]);
        // Pods of this node are behind a device that is not outward.
        ip_command("link add pods0 address 02:00:00:00:00:01 type veth peer name pods0-far");
        ip_command("link set pods0 up");
        ip_command("link set pods0-far up");
        ip_command("route add 10.1.0.0/16 dev pods0");
        ip_command("-6 route add fd01::/64 dev pods0");
        ip_command("route add default via 10.0.0.254");
        ip_command("-6 route add default via fd00::254");
        let pins = Pins::new();
        let datapath = open(&pins.settings()).unwrap();
        let mut node = Node::with(datapath, pins, uplink, tunnel);
        node.note_device(uplink, NODE4, NODE6, 0);
        node.note_device(tunnel, TUNNEL4, TUNNEL6, 0);
        node.note_pod_device(GATEWAY, NODE4, NODE6);
        for (address, flags) in [
            (NODE4, address_flag::ADDRESS_NODE | address_flag::ADDRESS_LOCAL),
            (NODE6, address_flag::ADDRESS_NODE | address_flag::ADDRESS_LOCAL),
            (TUNNEL4, address_flag::ADDRESS_LOCAL),
            (TUNNEL6, address_flag::ADDRESS_LOCAL),
            (VIP4, address_flag::ADDRESS_SERVICE_VIP),
            (VIP6, address_flag::ADDRESS_SERVICE_VIP),
        ] {
            node.address(address, flags);
        }
        node
    }

    /// A node whose namespace somebody else has made.
    pub fn with(datapath: Datapath, pins: Pins, uplink: u32, tunnel: u32) -> Node {
        Node { datapath, pin_path: pins.settings().pin_path, uplink, tunnel, next_slot: 0, next_backend: 1, pins }
    }

    pub fn write(&mut self, map: MapName, key: &[u8], value: &[u8]) {
        let failures = self.datapath.maps().write(map, key, value, 1);
        assert!(failures.is_empty(), "{failures:?}");
    }

    pub fn address(&mut self, address: &str, flags: u32) {
        self.write(MapName::Addresses, &address.parse::<Ipx>().unwrap().0, &flags.to_ne_bytes());
    }

    /// An id for a backend, of a test that gives none itself.
    pub fn next_backend(&mut self) -> u32 {
        self.next_backend += 1;
        self.next_backend - 1
    }

    pub fn forget_address(&mut self, address: &str) {
        let failures = self.datapath.maps().delete(MapName::Addresses, &address.parse::<Ipx>().unwrap().0, 1);
        assert!(failures.is_empty(), "{failures:?}");
    }

    /// Writes backend `id`, of service 1 and generation 1.
    pub fn backend(&mut self, id: u32, address: &str, port: u16, protocol: Protocol, local: bool) {
        self.backend_row(id, &backend(address, port, protocol, local));
    }

    pub fn backend_row(&mut self, id: u32, row: &Backend) {
        self.write(MapName::Backends, &id.to_ne_bytes(), bytemuck::bytes_of(row));
    }

    /// A frontend whose outside pool, as of traffic policy Local, has these backends; a NodePort's if the address is 0.0.0.0 or ::.
    pub fn frontend(&mut self, address: &str, port: u16, protocol: Protocol, ids: &[u32]) -> Frontend {
        let base = self.next_slot;
        for id in ids {
            self.write(MapName::Slots, &self.next_slot.to_ne_bytes(), &id.to_ne_bytes());
            self.next_slot += 1;
        }
        let is_wildcard = ["0.0.0.0", "::"].contains(&address);
        let flags = if is_wildcard { frontend_flag::FRONTEND_NODE_PORT } else { frontend_flag::FRONTEND_LOAD_BALANCER };
        let row = Frontend {
            service_id: 1,
            flags,
            outside: Pool { base, count: ids.len() as u32, member: pool_member::POOL_LOCAL as u8, ..Pool::default() },
            ..Frontend::default()
        };
        self.frontend_row(address, port, protocol, &row);
        row
    }

    pub fn frontend_row(&mut self, address: &str, port: u16, protocol: Protocol, row: &Frontend) {
        let key = FrontendKey::new(address.parse().unwrap(), port, protocol);
        self.write(MapName::Frontends, bytemuck::bytes_of(&key), bytemuck::bytes_of(row));
    }

    pub fn pinned(&self, map: &str) -> MapHandle {
        MapHandle::from_pinned_path(self.pin_path.join(format!("v{}/maps", abi_version::ABI_VERSION)).join(map))
            .unwrap()
    }

    /// What attaching to a device notes, for kernels that do not name a route's source.
    fn note_device(&self, index: u32, ip4: &str, ip6: &str, rp_filter: u32) {
        let row = DeviceAddresses {
            ip4: ip4.parse::<Ipx>().unwrap().0,
            ip6: ip6.parse::<Ipx>().unwrap().0,
            is_bare: 0,
            rp_filter,
        };
        self.pinned("devices").update(&index.to_ne_bytes(), bytemuck::bytes_of(&row), MapFlags::ANY).unwrap();
    }

    /// What rows and flows would leave: packets to these addresses and ports, and from these ports, are looked at.
    pub fn pass(&self, addresses: &[&str], ports: &[u16]) {
        let set = |map: &str, indices: &mut dyn Iterator<Item = usize>| {
            let map = self.pinned(map);
            let mut bytes = map.lookup(&[0; 4], MapFlags::ANY).unwrap().unwrap();
            indices.for_each(|index| bytes[index] = 1);
            map.update(&[0; 4], &bytes, MapFlags::ANY).unwrap();
        };
        let addresses: Vec<[u8; 16]> = addresses.iter().map(|address| address.parse::<Ipx>().unwrap().0).collect();
        set("wire_filter", &mut addresses.iter().map(address_index));
        set("wire_filter", &mut ports.iter().map(|port| 65_536 + usize::from(*port)));
        let ends = addresses.iter().flat_map(|from| addresses.iter().map(move |to| (from, to)));
        let replies =
            ends.flat_map(|(from, to)| ports.iter().map(move |port| reply_index(from, to, port.to_be_bytes())));
        let size = reply_filter_size::REPLY_FILTER_SIZE as usize;
        set("ports", &mut replies.flat_map(|index| [65_536 + index, 65_536 + size + index]));
    }

    /// How many bytes are set in the filter of replies that is read.
    pub fn replies_noted(&self) -> usize {
        let size = reply_filter_size::REPLY_FILTER_SIZE as usize;
        let table = self.pinned("ports").lookup(&[0; 4], MapFlags::ANY).unwrap().unwrap();
        let read = usize::from(table[65_536 + 2 * size] & 1);
        table[65_536 + read * size..][..size].iter().filter(|byte| **byte != 0).count()
    }

    pub fn renew_reply_filter(&self) {
        let mut collector = self.datapath.flow_collector().unwrap();
        collector.renew_soon();
        collector.collect(usize::MAX / 4).unwrap();
    }

    pub fn source_range(&self, service: u32, ip: &str, prefix: u8) {
        let key = SourceRangeKey::new(service, IpRange { ip: ip.parse().unwrap(), prefix });
        self.pinned("source_ranges").update(bytemuck::bytes_of(&key), &1u32.to_ne_bytes(), MapFlags::ANY).unwrap();
    }

    /// The uplink looks for sources in the routing table: one of `rp_filter`.
    pub fn filter_reverse_paths(&self, rp_filter: u32) {
        self.note_device(self.uplink, NODE4, NODE6, rp_filter);
    }

    /// As the daemon tells of it.
    pub fn routes_changed(&self) {
        self.datapath.route_epoch().unwrap().advance().unwrap();
    }

    /// What becomes of a packet with a mark that comes in by the uplink.
    pub fn marked(&mut self, frame: &Frame) -> i32 {
        let uplink = self.uplink;
        run_marked(self.datapath.devices(), Direction::In, &frame.bytes(), uplink, 1, 1).unwrap().action
    }

    /// Every flow's last packet was so many seconds ago, however long they have been there.
    pub fn let_flows_rest(&self, seconds: u32) {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
        let then = (now.tv_sec() as u32).wrapping_sub(seconds);
        self.each_flow(|_, flow| set_second(flow, then));
    }

    /// Every flow's last packet was so many seconds earlier; and so was its first, of UDP and SCTP.
    pub fn age_flows(&self, seconds: u32) {
        self.each_flow(|key, flow| {
            set_second(flow, flow.second().wrapping_sub(seconds));
            if flow.has(flow_flag::FLOW_REPLY) && key.protocol != Protocol::Tcp as u8 {
                flow.backend_or_first = flow.backend_or_first.wrapping_sub(seconds);
            }
        });
    }

    /// The flows of UDP and SCTP began so many seconds earlier; their last packets were a second ago.
    pub fn begin_earlier(&self, seconds: u32) {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
        let last = (now.tv_sec() as u32).wrapping_sub(1);
        self.each_flow(|key, flow| {
            if key.protocol == Protocol::Tcp as u8 {
                return;
            }
            set_second(flow, last);
            if flow.has(flow_flag::FLOW_REPLY) {
                flow.backend_or_first = flow.backend_or_first.wrapping_sub(seconds);
            }
        });
    }

    /// The rows of flows, of both families.
    pub fn flows(&self) -> Vec<(FlowKey, Flow)> {
        let mut flows = Vec::new();
        for map in FLOW_MAPS.map(|name| self.pinned(name)) {
            for key in map.keys().collect::<Vec<_>>() {
                let row = map.lookup(&key, MapFlags::ANY).unwrap().unwrap();
                flows.push((flow_key(&key), bytemuck::pod_read_unaligned(&row)));
            }
        }
        flows
    }

    fn each_flow(&self, change: impl Fn(&FlowKey, &mut Flow)) {
        for map in FLOW_MAPS.map(|name| self.pinned(name)) {
            for key in map.keys().collect::<Vec<_>>() {
                let row = map.lookup(&key, MapFlags::ANY).unwrap().unwrap();
                let mut flow: Flow = bytemuck::pod_read_unaligned(&row);
                change(&flow_key(&key), &mut flow);
                map.update(&key, bytemuck::bytes_of(&flow), MapFlags::EXIST).unwrap();
            }
        }
    }

    /// Rows of flows that both ends have proved, and of those that they have not.
    pub fn flow_rows(&self) -> (usize, usize) {
        let flows = self.flows();
        let proved = flows.iter().filter(|(_, flow)| !flow.has(flow_flag::FLOW_REPLY));
        let proved = 2 * proved.filter(|(_, flow)| flow.has(flow_flag::FLOW_PROVED)).count();
        (proved, flows.len() - proved)
    }

    /// Rows of a map of flows.
    pub fn rows(&self, map: &str) -> usize {
        self.pinned(map).keys().count()
    }

    /// Writes a flow: both rows, as packets from its client and from its backend come, and what they become. `state`: of the
    /// requests' row.
    pub fn flow(&self, protocol: Protocol, request: Ends, becomes: Ends, state: u32) {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
        let second = (now.tv_sec() as u32 & flow_state::FLOW_SECOND_MASK) << flow_state::FLOW_SECOND_SHIFT;
        let reply = flow_flag::FLOW_REPLY | flow_flag::FLOW_PROVED | state & flow_flag::FLOW_PATH;
        let rows =
            [(request, becomes, state, [1, 1]), (becomes.reversed(), request.reversed(), reply, [second, self.uplink])];
        for (from, to, state, [backend_or_first, generation_or_interface]) in rows {
            let row = Flow {
                ends: to,
                change: Flow::change_of(&from, &to),
                state: state | second,
                sequence: 0,
                backend_or_first,
                generation_or_interface,
            };
            self.write_flow(&FlowKey { ends: from, protocol: protocol as u8, zero: [0; 3] }, &row);
        }
    }

    fn write_flow(&self, key: &FlowKey, row: &Flow) {
        let row = bytemuck::bytes_of(row);
        match short_key(key) {
            Some(key) => self.pinned("flows4").update(bytemuck::bytes_of(&key), row, MapFlags::ANY).unwrap(),
            None => self.pinned("flows6").update(bytemuck::bytes_of(key), row, MapFlags::ANY).unwrap(),
        }
    }

    /// Takes all flows away.
    pub fn forget_flows(&self) {
        for map in FLOW_MAPS.map(|name| self.pinned(name)) {
            map.keys().collect::<Vec<_>>().iter().for_each(|key| map.delete(key).unwrap());
        }
    }

    /// Removes the flow that this request is of, if there is one: both rows.
    pub fn forget_flow(&self, request: &Frame, protocol: Protocol) {
        self.each_row_of(request, protocol, |map, key, _| map.delete(key).unwrap());
    }

    /// The flow that this request is of began so many seconds earlier; its last packets were a second ago. Looks at no
    /// other row, so that it leaves the processor's caches as they are.
    pub fn begin_flow_earlier(&self, request: &Frame, protocol: Protocol, seconds: u32) {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
        let last = (now.tv_sec() as u32).wrapping_sub(1);
        self.each_row_of(request, protocol, |map, key, mut flow| {
            set_second(&mut flow, last);
            if flow.has(flow_flag::FLOW_REPLY) {
                flow.backend_or_first = flow.backend_or_first.wrapping_sub(seconds);
            }
            map.update(key, bytemuck::bytes_of(&flow), MapFlags::EXIST).unwrap();
        });
    }

    /// Both rows of the flow that this request is of, if there is one.
    fn each_row_of(&self, request: &Frame, protocol: Protocol, change: impl Fn(&MapHandle, &[u8], Flow)) {
        let mut key = FlowKey { ends: ends(request), protocol: protocol as u8, zero: [0; 3] };
        for _ in 0..2 {
            let short = short_key(&key);
            let (name, bytes) = match &short {
                Some(short) => ("flows4", bytemuck::bytes_of(short)),
                None => ("flows6", bytemuck::bytes_of(&key)),
            };
            let map = self.pinned(name);
            let Some(row) = map.lookup(bytes, MapFlags::ANY).unwrap() else { return };
            let flow: Flow = bytemuck::pod_read_unaligned(&row);
            let partner = key.partner(&flow.ends);
            change(&map, bytes, flow);
            key = partner;
        }
    }

    pub fn raw(&mut self, direction: Direction, interface: u32, bytes: &[u8]) -> Outcome {
        run(self.datapath.devices(), direction, bytes, interface, 1).unwrap()
    }

    /// A packet that comes in by the uplink.
    pub fn uplink_in(&mut self, frame: &Frame) -> (i32, Frame) {
        let outcome = self.raw(Direction::In, self.uplink, &frame.bytes());
        (outcome.action, frame::parse(&outcome.frame))
    }

    pub fn tunnel_in(&mut self, frame: &Frame) -> (i32, Frame) {
        let outcome = self.raw(Direction::In, self.tunnel, &frame.bytes());
        (outcome.action, frame::parse(&outcome.frame))
    }

    /// A packet that leaves by the tunnel.
    pub fn tunnel_out(&mut self, frame: &Frame) -> (i32, Frame) {
        let outcome = self.raw(Direction::Out, self.tunnel, &frame.bytes());
        (outcome.action, frame::parse(&outcome.frame))
    }

    /// A packet that leaves by the uplink.
    pub fn uplink_out(&mut self, frame: &Frame) -> (i32, Frame) {
        let outcome = self.raw(Direction::Out, self.uplink, &frame.bytes());
        (outcome.action, frame::parse(&outcome.frame))
    }

    /// A packet that came in by another device, and leaves by the uplink.
    pub fn forwarded_out(&mut self, frame: &Frame, from: u32) -> (i32, Frame) {
        let outcome = run_from(self.datapath.devices(), Direction::Out, &frame.bytes(), from, self.uplink).unwrap();
        (outcome.action, frame::parse(&outcome.frame))
    }

    pub fn counters(&mut self) -> BTreeMap<&'static str, u64> {
        self.datapath.maps().read_counters().unwrap().into_iter().collect()
    }

    /// Which counters `work` moved, and by how much.
    pub fn counted<T>(&mut self, work: impl FnOnce(&mut Node) -> T) -> (T, BTreeMap<&'static str, u64>) {
        let before = self.counters();
        let result = work(self);
        let moved = self.counters().into_iter().map(|(name, n)| (name, n - before[name])).filter(|(_, n)| *n > 0);
        (result, moved.collect())
    }
}

/// The tables of flows, IPv4 and IPv6.
const FLOW_MAPS: [&str; 2] = ["flows4", "flows6"];

fn set_second(flow: &mut Flow, second: u32) {
    flow.state = flow.state & flow_flag::FLOW_FLAGS | second << flow_state::FLOW_SECOND_SHIFT;
}

/// A key as the map has it.
fn flow_key(key: &[u8]) -> FlowKey {
    match key.len() {
        16 => bytemuck::pod_read_unaligned::<FlowKey4>(key).into(),
        _ => bytemuck::pod_read_unaligned(key),
    }
}

/// That of `flows4`, for IPv4.
fn short_key(key: &FlowKey) -> Option<FlowKey4> {
    let ip4 = |address: [u8; 16]| match Ipx(address).to_ip() {
        IpAddr::V4(ip) => Some(ip.octets()),
        IpAddr::V6(_) => None,
    };
    Some(FlowKey4 {
        source: ip4(key.ends.source)?,
        destination: ip4(key.ends.destination)?,
        source_port_be: key.ends.source_port_be,
        destination_port_be: key.ends.destination_port_be,
        protocol: key.protocol,
        zero: [0; 3],
    })
}

pub fn backend(address: &str, port: u16, protocol: Protocol, local: bool) -> Backend {
    Backend {
        address: address.parse::<Ipx>().unwrap().0,
        port_be: port.to_be_bytes(),
        state: backend_state::BACKEND_ACTIVE as u8,
        pools: (pool_member::POOL_CLUSTER | pool_member::POOL_LOCAL) as u8,
        generation: 1,
        service_id: 1,
        protocol: protocol as u8,
        flags: if local { backend_flag::BACKEND_NODE_LOCAL as u8 } else { 0 },
        zero: 0,
    }
}

/// A packet's ends, as keys of flows have them.
pub fn ends(frame: &Frame) -> Ends {
    let (source, destination) = frame.ports();
    Ends {
        source: Ipx::from(frame.source).0,
        destination: Ipx::from(frame.destination).0,
        source_port_be: source.to_be_bytes(),
        destination_port_be: destination.to_be_bytes(),
    }
}

/// An empty pool of a Service whose policy is Local.
pub fn empty_drop() -> Pool {
    Pool { on_empty: pool_empty::EMPTY_DROP as u8, ..Pool::default() }
}

/// The text form that frames take their addresses in.
pub fn text(ip: IpAddr) -> String {
    ip.to_string()
}
