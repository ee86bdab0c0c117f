//! Packets of random clients through the real programs, each compared with what the model says, and what is known of
//! the flows that they made.

use std::collections::{BTreeMap, HashMap, HashSet};

use kubelane::bpf::Direction;
use kubelane::model::{Family, Ipx, Protocol};

use super::random::Random;
use super::semantics::{PortId, Target, Verdict, is_affine, is_pod_of_this_node, is_usable, port_at, verdict};
use super::world::{World, ip};
use crate::wire::frame::{ACK, FIN, Frame, Inside, RST, SYN, parse};
use crate::wire::{DROP, NODE4, NODE6, Node, PASS, REDIRECT, TUNNEL4, TUNNEL6};

/// The private range beside the usual `ip_local_port_range` and the NodePorts.
const PRIVATE_PORTS: std::ops::Range<u16> = 1024..30_000;
/// Those that clients get towards local backends in the place of their own.
const MOVED_PORTS: std::ops::RangeInclusive<u16> = 61_000..=65_535;
/// The last ones are pods, here and elsewhere: what they ask goes out to a load balancer and comes back.
const CLIENTS4: [&str; 7] =
    ["198.51.100.7", "198.51.100.9", "198.51.100.130", "203.0.113.5", "203.0.114.5", "10.0.0.20", "10.1.0.20"];
const CLIENTS6: [&str; 6] =
    ["2001:db8:7::7", "2001:db8:7::9", "2001:db8:8::1", "2001:db8:9::1", "fd00::20", "fd01::20"];
/// The backends' first sequence number, and the clients'.
const BACKEND_SEQUENCE: u32 = 7000;
const CLIENT_SEQUENCE: u32 = 1000;
/// May move with any new flow: how often a port was taken is the hash's business.
const CHANCE: [&str; 1] = ["snat_retry"];

type End = (Ipx, u16);
type Counted = BTreeMap<&'static str, u64>;

/// Who asks what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Request {
    client: End,
    to: End,
    protocol: Protocol,
    /// Comes in by the tunnel and not by the uplink: from a host behind it.
    by_tunnel: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The backend has not answered.
    Opening,
    /// Both ends were heard twice.
    Open,
    /// TCP: both have sent a FIN. The one who was first keeps the connection in TIME_WAIT.
    Closed { client_first: bool },
}

/// A flow that the programs must know of.
#[derive(Clone, Debug)]
struct Flow {
    request: Request,
    port: PortId,
    target: Target,
    /// What the backend sees as its client.
    seen: End,
    stage: Stage,
    /// The backend was not to be had for a while, or is not now.
    left: bool,
}

impl Flow {
    fn backend(&self) -> End {
        (self.target.ip, self.target.port)
    }

    /// Whose replies they are, and to whom: no other flow may have the same.
    fn place(&self) -> (End, End, Protocol) {
        (self.backend(), self.seen, self.request.protocol)
    }
}

/// A packet, and what the programs made of it.
struct Passage {
    frame: Frame,
    action: i32,
    seen: Frame,
    counted: Counted,
}

/// One run over one world and what becomes of it.
pub struct Traffic {
    /// As of the last packet.
    counters: Counted,
    flows: Vec<Flow>,
    requests: HashSet<(End, End, Protocol)>,
    /// Who has the replies of a backend to an address and port.
    places: HashMap<(End, End, Protocol), Request>,
    /// Where clients of Service ports with session affinity went last.
    remembered: HashMap<(Ipx, PortId), (Ipx, u16)>,
    pub packets: u64,
    /// What was seen, and how often.
    pub noted: BTreeMap<&'static str, u64>,
}

fn is_tcp(request: &Request) -> bool {
    request.protocol == Protocol::Tcp
}

fn packet(protocol: Protocol, from: End, to: End, flags: u8, bytes: usize) -> Frame {
    let ports = (from.1, to.1);
    let data = vec![bytes as u8; bytes];
    let inside = match protocol {
        Protocol::Tcp => Inside::Tcp { ports, flags, sequence: CLIENT_SEQUENCE, acknowledgement: 0, data },
        Protocol::Udp => Inside::Udp { ports, checked: true, data },
        Protocol::Sctp => Inside::Sctp { ports, tag: 1, data },
    };
    Frame { source: from.0.to_ip(), destination: to.0.to_ip(), ttl: 61, inside }
}

/// The node's own address towards a backend elsewhere: the route decides.
fn near_address(backend: Ipx) -> Ipx {
    let text = backend.to_string();
    match backend.family() {
        Family::Ipv4 => ip(if text.starts_with("10.244.") { TUNNEL4 } else { NODE4 }),
        Family::Ipv6 => ip(if text.starts_with("fd44:") { TUNNEL6 } else { NODE6 }),
    }
}

/// Whom the backend sees: its client, or, if it is elsewhere, this node. A pod that is its own client sees the
/// Service, or it would answer to itself.
fn seen_address(request: &Request, target: &Target) -> Ipx {
    match target.local {
        true if target.ip == request.client.0 => request.to.0,
        true => request.client.0,
        false => near_address(target.ip),
    }
}

impl Traffic {
    pub fn new(node: &mut Node) -> Traffic {
        Traffic {
            counters: node.counters(),
            flows: vec![],
            requests: HashSet::new(),
            places: HashMap::new(),
            remembered: HashMap::new(),
            packets: 0,
            noted: BTreeMap::new(),
        }
    }

    /// The world has changed, and the kernel's rows with it.
    pub fn world_changed(&mut self, world: &World) {
        for flow in &mut self.flows {
            flow.left |= !is_usable(world, &flow.port, flow.target.ip, flow.target.port);
        }
        self.remembered
            .retain(|(_, port), (ip, number)| is_affine(world, port) && is_usable(world, port, *ip, *number));
    }

    /// `fresh` packets that begin flows, or would, and one of each of up to `known` flows.
    pub fn run(&mut self, node: &mut Node, world: &World, random: &mut Random, fresh: usize, known: usize) {
        for _ in 0..known.min(self.flows.len()) {
            let at = random.below(self.flows.len());
            self.go_on(node, world, random, at);
        }
        let places = self.places_to_ask(world);
        for _ in 0..fresh {
            self.begin_anew(node, world, random, &places);
        }
    }

    /// Every external address and port that a Service asks for, and some that none does.
    fn places_to_ask(&self, world: &World) -> Vec<(End, Protocol)> {
        let mut places = Vec::new();
        for service in world.services.values() {
            for port in &service.ports {
                for ip in service.external_ips.iter().chain(&service.load_balancer_ips) {
                    places.push(((*ip, port.port), port.protocol));
                }
                for ip in [NODE4, NODE6].map(ip) {
                    places.push(((ip, port.node_port), port.protocol));
                }
            }
        }
        places.retain(|((_, number), _)| *number != 0);
        places = [&places[..]; 3].concat();
        for (address, number) in [
            ("10.96.0.1", 80),
            ("fd96::1", 80),
            ("192.0.2.1", 80),
            ("192.0.2.2", 30_001),
            ("2001:db8:80::1", 53),
            (TUNNEL4, 30_001),
            (TUNNEL6, 30_002),
            (NODE4, 30_003),
            ("10.9.9.9", 443),
        ] {
            places.extend(
                [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].map(|protocol| ((ip(address), number), protocol)),
            );
        }
        places
    }

    fn begin_anew(&mut self, node: &mut Node, world: &World, random: &mut Random, places: &[(End, Protocol)]) {
        let (to, protocol) = random.pick(places);
        let address = match to.0.family() {
            Family::Ipv4 => random.pick(&CLIENTS4),
            Family::Ipv6 => random.pick(&CLIENTS6),
        };
        let by_tunnel = random.percent(10);
        // Few ports, so that a client meets one backend by several addresses and from one port.
        let port = match protocol {
            // It keeps its port, and has no other to give way to: no two of these meet.
            Protocol::Sctp => 40_000 + self.requests.len() as u16,
            _ => 33_000 + random.below(200) as u16,
        };
        let request = Request { client: (ip(address), port), to, protocol, by_tunnel };
        if !self.requests.insert((request.client, to, protocol)) {
            return;
        }
        let flags = match random.below(20) {
            0 => RST,
            1 | 2 => ACK,
            _ => SYN,
        };
        if let Some(flow) = self.begin(node, world, &request, flags, random.below(50)) {
            self.flows.push(flow);
            let last = self.flows.len() - 1;
            if random.percent(60) {
                self.establish(node, last);
            }
        }
    }

    /// Sends what belongs to no flow. `Some`: it made one.
    fn begin(&mut self, node: &mut Node, world: &World, request: &Request, flags: u8, bytes: usize) -> Option<Flow> {
        let Request { client, to, protocol, .. } = *request;
        let is_reset = is_tcp(request) && flags & RST != 0;
        let expected = verdict(world, client.0, to.0, to.1, protocol, is_reset);
        let passage = self.ask(node, request, packet(protocol, client, to, flags, bytes));
        let Passage { frame, action, seen, counted } = &passage;
        let context = format!("{request:?} flags {flags}: expected {expected:?}; got {action}, {seen:?}, {counted:?}");
        let name = match &expected {
            Verdict::Untouched => {
                assert!(*action == PASS && seen == frame && counted.is_empty(), "{context}");
                "untouched"
            }
            Verdict::Dropped(counter) => {
                assert!(*action == DROP && *counted == [(*counter, 1)].into(), "{context}");
                counter
            }
            Verdict::Refused => {
                let is_answered = !counted.contains_key("dropped_answer_limit");
                let mut moved = Counted::from([("refused_no_endpoint", 1)]);
                if is_answered {
                    assert_refusal(&passage);
                } else {
                    // Too many already, as the flood that this test is to the programs.
                    moved.insert("dropped_answer_limit", 1);
                    assert_eq!(*action, DROP, "{context}");
                }
                assert_eq!(*counted, moved, "{context}");
                if is_answered { "refused" } else { "refused and not answered" }
            }
            Verdict::Sent { port, targets, .. } if *action == DROP => {
                // SCTP's checksum covers ports: those of a backend must be those that were asked for.
                let is_possible = protocol == Protocol::Sctp && targets.iter().any(|target| target.port != to.1);
                assert!(is_possible && *counted == [("dropped_sctp_port", 1)].into(), "{context}");
                self.remembered.remove(&(client.0, port.clone()));
                "dropped_sctp_port"
            }
            Verdict::Sent { port, targets, affine } => {
                let (source_port, number) = seen.ports();
                let backend = (Ipx::from(seen.destination), number);
                let target = targets.iter().find(|t| (t.ip, t.port) == backend);
                let target = *target.unwrap_or_else(|| panic!("no such backend: {context}"));
                if *affine {
                    self.assert_remembered(client.0, port, targets, backend, &context);
                }
                let seen = (seen_address(request, &target), source_port);
                let flow =
                    Flow { request: *request, port: port.clone(), target, seen, stage: Stage::Opening, left: false };
                self.assert_sent(&flow, &passage, is_tcp(request) && flags & SYN == 0, &context);
                return Some(flow);
            }
        };
        self.note(name);
        None
    }

    /// The client is where it was before, if that backend may still be had.
    fn assert_remembered(&mut self, client: Ipx, port: &PortId, targets: &[Target], backend: End, context: &str) {
        let before = self.remembered.insert((client, port.clone()), backend);
        let before = before.filter(|(ip, number)| targets.iter().any(|t| (t.ip, t.port) == (*ip, *number)));
        assert!(before.is_none_or(|before| before == backend), "was at {before:?}: {context}");
        if before.is_some() && targets.len() > 1 {
            self.note("kept by affinity");
        }
    }

    /// The whole packet is as it should be, counted as a new flow, and its answers will be nobody else's.
    fn assert_sent(&mut self, flow: &Flow, passage: &Passage, midstream: bool, context: &str) {
        let name = match flow.target.local {
            true if flow.target.ip == flow.request.client.0 => "its own client",
            true => "local",
            false => "remote",
        };
        let mut moved: Counted = [(if flow.target.local { "flow_local" } else { "flow_remote" }, 1)].into();
        moved.extend(midstream.then_some(("flow_midstream", 1)));
        let counted = passage.counted.clone().into_iter().filter(|(name, _)| !CHANCE.contains(name));
        assert_eq!(counted.collect::<Counted>(), moved, "{context}");
        assert_passed(flow, context, passage, flow.seen, flow.backend());
        let request = flow.request;
        let holder = self.places.insert(flow.place(), request);
        assert!(holder.is_none_or(|holder| holder == request), "the place of {holder:?}: {context}");
        if request.protocol == Protocol::Sctp {
            assert_eq!((flow.seen.1, flow.target.port), (request.client.1, request.to.1), "{context}");
        } else if !flow.target.local {
            assert!(PRIVATE_PORTS.contains(&flow.seen.1), "{context}");
        } else if request.protocol == Protocol::Udp && MOVED_PORTS.contains(&flow.seen.1) {
            // Policy Cluster: the client may ask the backend itself from its own port.
        } else if flow.seen.1 != request.client.1 {
            assert!(PRIVATE_PORTS.contains(&flow.seen.1), "{context}");
            let own = self.places.get(&(flow.backend(), (flow.seen.0, request.client.1), request.protocol));
            assert!(own.is_some_and(|holder| *holder != request), "the client's port was free: {context}");
        }
        self.note(name);
    }

    /// The backend answers, and the client again: both directions, and the flow is proved.
    fn establish(&mut self, node: &mut Node, at: usize) {
        let flow = self.flows[at].clone();
        self.reply(node, &flow, SYN | ACK);
        node.begin_earlier(2);
        let counted = self.request(node, &flow, ACK);
        assert_eq!(counted, [("flow_established", 1)].into(), "{flow:?}");
        self.flows[at].stage = Stage::Open;
    }

    /// One more packet of a known flow, or several that end it.
    fn go_on(&mut self, node: &mut Node, world: &World, random: &mut Random, at: usize) {
        let flow = self.flows[at].clone();
        if is_tcp(&flow.request) {
            return self.go_on_tcp(node, world, random, at, &flow);
        }
        let owner = port_at(world, flow.request.to.0, flow.request.to.1, flow.request.protocol);
        let is_anothers = owner.is_some_and(|owner| owner != flow.port);
        if flow.left || is_anothers {
            return self.begin_again(node, world, at, &flow, SYN);
        }
        if flow.stage == Stage::Opening && random.percent(40) {
            return self.establish(node, at);
        }
        let counted = self.request(node, &flow, ACK);
        assert!(counted.is_empty(), "{flow:?}: {counted:?}");
        if flow.stage == Stage::Open {
            self.reply(node, &flow, ACK);
        }
    }

    fn go_on_tcp(&mut self, node: &mut Node, world: &World, random: &mut Random, at: usize, flow: &Flow) {
        match (flow.stage, random.below(4)) {
            (Stage::Closed { .. }, _) => self.begin_again(node, world, at, flow, SYN),
            // Nobody has answered, and nobody will.
            (Stage::Opening, 0 | 1) if flow.left => self.begin_again(node, world, at, flow, SYN),
            (Stage::Opening, 0) => self.establish(node, at),
            (Stage::Open, 0) => {
                let client_first = random.percent(50);
                for by_client in [client_first, !client_first] {
                    let counted =
                        if by_client { self.request(node, flow, FIN | ACK) } else { self.reply(node, flow, FIN | ACK) };
                    assert!(counted.is_empty(), "{flow:?}: {counted:?}");
                }
                self.flows[at].stage = Stage::Closed { client_first };
            }
            (stage, n) => {
                if flow.left {
                    self.note("ran on without its backend");
                }
                let counted = self.request(node, flow, if n == 1 { SYN } else { ACK });
                assert!(counted.is_empty(), "{flow:?}: {counted:?}");
                if stage == Stage::Open {
                    self.reply(node, flow, ACK);
                }
            }
        }
    }

    /// The flow has ended or its backend has gone: its client's next packet begins another.
    fn begin_again(&mut self, node: &mut Node, world: &World, at: usize, flow: &Flow, flags: u8) {
        self.places.remove(&flow.place());
        self.note(if flow.stage == Stage::Opening || !is_tcp(&flow.request) {
            "left its backend"
        } else {
            "opened again"
        });
        match self.begin(node, world, &flow.request, flags, 3) {
            Some(next) => self.flows[at] = next,
            None => drop(self.flows.swap_remove(at)),
        }
    }

    /// A packet of the flow's client must reach the flow's backend.
    fn request(&mut self, node: &mut Node, flow: &Flow, flags: u8) -> Counted {
        let frame = packet(flow.request.protocol, flow.request.client, flow.request.to, flags, 9)
            .numbered(CLIENT_SEQUENCE + 1, BACKEND_SEQUENCE + 1);
        let passage = self.ask(node, &flow.request, frame);
        assert_passed(flow, "a request", &passage, flow.seen, flow.backend());
        passage.counted
    }

    /// A packet of the flow's backend must reach the flow's client, from the address that it asked.
    fn reply(&mut self, node: &mut Node, flow: &Flow, flags: u8) -> Counted {
        let frame = packet(flow.request.protocol, flow.backend(), flow.seen, flags, 7)
            .numbered(BACKEND_SEQUENCE, CLIENT_SEQUENCE + 1);
        let by_tunnel = [TUNNEL4, TUNNEL6].map(ip).contains(&flow.seen.0);
        let passage = match flow.target.local {
            true => self.send(node, Direction::Out, node.uplink, frame),
            false => self.send(node, Direction::In, if by_tunnel { node.tunnel } else { node.uplink }, frame),
        };
        // A client that is a pod of this node is behind the pods' device: where its packets came in elsewhere, the answers
        // are sent there.
        let is_pod = is_pod_of_this_node(flow.request.client.0);
        let is_own = flow.target.ip == flow.request.client.0;
        if flow.target.local && is_pod && (flow.request.by_tunnel || is_own) {
            let (to, client) = (flow.request.to, flow.request.client);
            let wanted = passage.frame.with_ends((&to.0.to_string(), to.1), (&client.0.to_string(), client.1));
            assert_eq!((passage.action, &passage.seen), (REDIRECT, &wanted), "a reply of {flow:?}");
        } else {
            assert_passed(flow, "a reply", &passage, flow.request.to, flow.request.client);
        }
        passage.counted
    }

    fn note(&mut self, what: &'static str) {
        *self.noted.entry(what).or_default() += 1;
    }

    fn ask(&mut self, node: &mut Node, request: &Request, frame: Frame) -> Passage {
        let device = if request.by_tunnel { node.tunnel } else { node.uplink };
        self.send(node, Direction::In, device, frame)
    }

    fn send(&mut self, node: &mut Node, direction: Direction, device: u32, frame: Frame) -> Passage {
        self.packets += 1;
        let outcome = node.raw(direction, device, &frame.bytes());
        // Nothing else runs these programs: what was read after the packet before holds before this one.
        let counters = node.counters();
        let moved = counters.iter().map(|(name, count)| (*name, count - self.counters[name]));
        let mut counted: Counted = moved.filter(|(_, by)| *by > 0).collect();
        self.counters = counters;
        // Nobody has told this node's neighbours' link addresses.
        counted.remove("neighbour_unknown");
        Passage { seen: parse(&outcome.frame), frame, action: outcome.action, counted }
    }
}

/// The packet came out with these ends and nothing else changed, but that one which is forwarded here has a hop less.
fn assert_passed(flow: &Flow, what: &str, passage: &Passage, from: End, to: End) {
    let wanted = passage.frame.with_ends((&from.0.to_string(), from.1), (&to.0.to_string(), to.1));
    let wanted = if flow.target.local { (PASS, &wanted) } else { (REDIRECT, &wanted.living(60)) };
    assert_eq!((passage.action, &passage.seen), wanted, "{what} of {flow:?}");
}

/// Port unreachable, from the address that was asked, quoting the packet as it came.
fn assert_refusal(passage: &Passage) {
    let Passage { frame, action, seen, .. } = passage;
    assert_eq!((*action, seen.source, seen.destination), (REDIRECT, frame.destination, frame.source));
    let Inside::Icmp { kind, code, data, .. } = &seen.inside else { panic!("no ICMP: {seen:?}") };
    assert_eq!((*kind, *code), if frame.source.is_ipv4() { (3, 3) } else { (1, 4) });
    let packet = frame.packet();
    assert!(data.len() >= packet.len().min(96) && packet.starts_with(data), "quoted as it came");
}
