//! Packets of random clients through the real programs, each compared with what the model says, and what is known of
//! the flows that they made.

use std::collections::{BTreeMap, HashMap, HashSet};

use kubelane::bpf::Direction;
use kubelane::model::{Family, Ipx, Protocol, Service};

use super::flow::{
    BACKEND_SEQUENCE, CLIENT_SEQUENCE, Counted, End, Entry, Flow, Passage, Request, Stage, Way, assert_passed,
    assert_refusal, packet, seen_address,
};
use super::memory::Memory;
use super::random::Random;
use super::random_cluster::{GATEWAY4, GATEWAY6, RandomCluster, ip};
use super::semantics::{Sent, Verdict, is_pod_of_this_node, is_usable, port_at, verdict};
use crate::laboratory::packets::frame::{ACK, FIN, Frame, RST, SYN, parse};
use crate::laboratory::packets::{
    DROP, GATEWAY, NODE4, NODE6, Node, PASS, PODS, REDIRECT, TUNNEL4, TUNNEL6, interface_index,
};

/// The private range beside the usual `ip_local_port_range` and the NodePorts.
const PRIVATE_PORTS: std::ops::Range<u16> = 1024..30_000;
/// Those that clients get towards local backends in the place of their own.
const MOVED_PORTS: std::ops::RangeInclusive<u16> = 61_000..=65_535;
/// The last ones are pods, here and elsewhere: what they ask goes out to a load balancer and comes back.
const CLIENTS4: [&str; 7] =
    ["198.51.100.7", "198.51.100.9", "198.51.100.130", "203.0.113.5", "203.0.114.5", "10.0.0.20", "10.1.0.20"];
const CLIENTS6: [&str; 6] =
    ["2001:db8:7::7", "2001:db8:7::9", "2001:db8:8::1", "2001:db8:9::1", "fd00::20", "fd01::20"];
/// Whose packets come in by the device of this node's pods. Of the last ones no Service has an endpoint.
const PODS4: [&str; 4] = ["10.1.0.20", "10.1.0.21", "10.1.0.22", "10.1.0.9"];
const PODS6: [&str; 4] = ["fd01::20", "fd01::21", "fd01::22", "fd01::9"];
/// May move with any new flow: how often a port was taken is the hash's business.
const CHANCE: [&str; 1] = ["snat_retry"];

/// One run over one world and what becomes of it.
pub struct Traffic {
    /// As of the last packet.
    counters: Counted,
    flows: Vec<Flow>,
    requests: HashSet<(End, End, Protocol)>,
    /// Who has the replies of a backend to an address and port.
    places: HashMap<(End, End, Protocol), Request>,
    memory: Memory,
    pub packets: u64,
    /// What was seen, and how often.
    pub noted: BTreeMap<String, u64>,
    pods: u32,
}

impl Traffic {
    pub fn new(node: &mut Node) -> Traffic {
        Traffic {
            counters: node.counters(),
            flows: vec![],
            requests: HashSet::new(),
            places: HashMap::new(),
            memory: Memory::default(),
            packets: 0,
            noted: BTreeMap::new(),
            pods: interface_index(PODS),
        }
    }

    /// The world has changed, and the kernel's rows with it.
    pub fn world_changed(&mut self, world: &RandomCluster) {
        for flow in &mut self.flows {
            flow.left |= !is_usable(world, &flow.port, flow.target.ip, flow.target.port);
        }
        self.memory.world_changed(world);
    }

    /// `fresh` packets that begin flows, or would, and one of each of up to `known` flows.
    pub fn run(&mut self, node: &mut Node, world: &RandomCluster, random: &mut Random, fresh: usize, known: usize) {
        // A flood of pods is none of this test's: no pod has begun anything.
        node.note_pod_device(GATEWAY, GATEWAY4, GATEWAY6);
        for _ in 0..known.min(self.flows.len()) {
            let at = random.below(self.flows.len());
            self.go_on(node, world, random, at);
        }
        let outside = places_to_ask(world, |service| [&service.external_ips[..], &service.load_balancer_ips].concat());
        let inside = places_to_ask(world, |service| {
            [&service.cluster_ips[..], &service.external_ips, &service.load_balancer_ips].concat()
        });
        for _ in 0..fresh {
            if random.percent(40) {
                self.begin_anew(node, world, random, &inside, Entry::Pod);
            } else {
                let entry = if random.percent(10) { Entry::Tunnel } else { Entry::Uplink };
                self.begin_anew(node, world, random, &outside, entry);
            }
        }
    }

    fn begin_anew(
        &mut self,
        node: &mut Node,
        world: &RandomCluster,
        random: &mut Random,
        places: &[(End, Protocol)],
        entry: Entry,
    ) {
        let (to, protocol) = random.pick(places);
        let address = match (to.0.family(), entry) {
            (Family::Ipv4, Entry::Pod) => random.pick(&PODS4),
            (Family::Ipv6, Entry::Pod) => random.pick(&PODS6),
            (Family::Ipv4, _) => random.pick(&CLIENTS4),
            (Family::Ipv6, _) => random.pick(&CLIENTS6),
        };
        // Few ports, so that a client meets one backend by several addresses and from one port.
        let port = match protocol {
            // It keeps its port, and has no other to give way to: no two of these meet.
            Protocol::Sctp => 40_000 + self.requests.len() as u16,
            _ => 33_000 + random.below(200) as u16,
        };
        let request = Request { client: (ip(address), port), to, protocol, entry };
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
    fn begin(
        &mut self,
        node: &mut Node,
        world: &RandomCluster,
        request: &Request,
        flags: u8,
        bytes: usize,
    ) -> Option<Flow> {
        let Request { client, to, protocol, .. } = *request;
        let expected = verdict(world, &request.asked(request.is_tcp() && flags & RST != 0));
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
            Verdict::Refused(counter) => {
                let is_answered = !counted.contains_key("dropped_answer_limit");
                let mut moved = Counted::from([(*counter, 1)]);
                if is_answered {
                    assert_refusal(&passage);
                } else {
                    // Too many already, as the flood that this test is to the programs.
                    moved.insert("dropped_answer_limit", 1);
                    assert_eq!(*action, DROP, "{context}");
                }
                assert_eq!(*counted, moved, "{context}");
                if is_answered { counter } else { "refused and not answered" }
            }
            Verdict::Sent(sent) if *action == DROP => {
                // SCTP's checksum covers ports: those of a backend must be those that were asked for.
                let is_other = |(_, number): End| number != to.1;
                let is_possible = match self.memory.recall(client.0, sent) {
                    Some(known) => is_other(known),
                    None => sent.targets.iter().any(|target| is_other(target.end())),
                };
                assert!(protocol == Protocol::Sctp && is_possible, "{context}");
                assert_eq!(*counted, [("dropped_sctp_port", 1)].into(), "{context}");
                self.memory.began(client.0, sent, None);
                "dropped_sctp_port"
            }
            Verdict::Sent(sent) => {
                let flow = self.flow_of(request, sent, &passage, &context);
                self.assert_sent(&flow, &passage, request.is_tcp() && flags & SYN == 0, &context);
                sent.rules.iter().for_each(|rule| self.note(request, rule));
                return Some(flow);
            }
        };
        self.note(request, name);
        None
    }

    /// The backend is one of those that may be had, and the one where the client was before, if it is among them.
    fn flow_of(&mut self, request: &Request, sent: &Sent, passage: &Passage, context: &str) -> Flow {
        let (source_port, number) = passage.seen.ports();
        let backend = (Ipx::from(passage.seen.destination), number);
        let target = sent.targets.iter().find(|target| target.end() == backend);
        let target = *target.unwrap_or_else(|| panic!("no such backend: {context}"));
        let client = request.client.0;
        if let Some(before) = self.memory.recall(client, sent) {
            assert_eq!(before, backend, "was there before: {context}");
            if sent.targets.len() > 1 {
                self.note(request, "kept by affinity");
            }
        }
        self.memory.began(client, sent, Some(backend));
        Flow {
            request: *request,
            port: sent.port.clone(),
            target,
            affine: sent.affine,
            seen: (seen_address(request, &target), source_port),
            stage: Stage::Opening,
            left: false,
        }
    }

    /// The whole packet is as it should be, counted as a new flow, and its answers will be nobody else's.
    fn assert_sent(&mut self, flow: &Flow, passage: &Passage, midstream: bool, context: &str) {
        let name = match flow.target.local {
            _ if flow.way() == Way::Back => "own backend",
            true if flow.is_to_itself() => "its own client",
            true => "local",
            false => "remote",
        };
        let counter = match (flow.request.entry, flow.target.local) {
            (Entry::Pod, _) => "flow_pod",
            (_, true) => "flow_local",
            (_, false) => "flow_remote",
        };
        let mut moved: Counted = [(counter, 1)].into();
        moved.extend(midstream.then_some(("flow_midstream", 1)));
        let counted = passage.counted.clone().into_iter().filter(|(name, _)| !CHANCE.contains(name));
        assert_eq!(counted.collect::<Counted>(), moved, "{context}");
        assert_passed(flow, context, passage, flow.seen, flow.target.end());
        let request = flow.request;
        let holder = self.places.insert(flow.place(), request);
        assert!(holder.is_none_or(|holder| holder == request), "the place of {holder:?}: {context}");
        self.assert_port(flow, context);
        self.note(&request, name);
    }

    /// Which port the backend sees.
    fn assert_port(&self, flow: &Flow, context: &str) {
        let (request, seen) = (flow.request, flow.seen);
        if request.protocol == Protocol::Sctp {
            assert_eq!((seen.1, flow.target.port), (request.client.1, request.to.1), "{context}");
        } else if flow.way() != Way::Stack {
            assert!(PRIVATE_PORTS.contains(&seen.1), "{context}");
        } else if !request.is_of_pod() && request.protocol == Protocol::Udp && MOVED_PORTS.contains(&seen.1) {
            // Policy Cluster: the client may ask the backend itself from its own port.
        } else if seen.1 != request.client.1 {
            assert!(PRIVATE_PORTS.contains(&seen.1), "{context}");
            let own = self.places.get(&(flow.target.end(), (seen.0, request.client.1), request.protocol));
            assert!(own.is_some_and(|holder| *holder != request), "the client's port was free: {context}");
        }
    }

    /// The backend answers, and the client again: both directions, and the flow is proved.
    fn establish(&mut self, node: &mut Node, at: usize) {
        let flow = self.flows[at].clone();
        self.reply(node, &flow, SYN | ACK);
        if !flow.request.is_tcp() {
            let first = packet(flow.request.protocol, flow.request.client, flow.request.to, 0, 0);
            node.begin_flow_earlier(&first, flow.request.protocol, 2);
        }
        let counted = self.request(node, &flow, ACK);
        assert_eq!(counted, [("flow_established", 1)].into(), "{flow:?}");
        self.flows[at].stage = Stage::Open;
        self.memory.proved(&flow);
    }

    /// One more packet of a known flow, or several that end it.
    fn go_on(&mut self, node: &mut Node, world: &RandomCluster, random: &mut Random, at: usize) {
        let flow = self.flows[at].clone();
        if flow.request.is_tcp() {
            return self.go_on_tcp(node, world, random, at, &flow);
        }
        let owner = port_at(world, &flow.request.asked(false));
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

    fn go_on_tcp(&mut self, node: &mut Node, world: &RandomCluster, random: &mut Random, at: usize, flow: &Flow) {
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
                    self.note(&flow.request, "ran on without its backend");
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
    fn begin_again(&mut self, node: &mut Node, world: &RandomCluster, at: usize, flow: &Flow, flags: u8) {
        let was_open = flow.stage != Stage::Opening && flow.request.is_tcp();
        self.note(&flow.request, if was_open { "opened again" } else { "left its backend" });
        let next = self.begin(node, world, &flow.request, flags, 3);
        // A flow that no other has replaced keeps its place until it is collected.
        if next.as_ref().is_some_and(|next| next.place() != flow.place()) {
            self.places.remove(&flow.place());
        }
        match next {
            Some(next) => self.flows[at] = next,
            None => drop(self.flows.swap_remove(at)),
        }
    }

    /// A packet of the flow's client must reach the flow's backend.
    fn request(&mut self, node: &mut Node, flow: &Flow, flags: u8) -> Counted {
        let frame = packet(flow.request.protocol, flow.request.client, flow.request.to, flags, 9)
            .numbered(CLIENT_SEQUENCE + 1, BACKEND_SEQUENCE + 1);
        let passage = self.ask(node, &flow.request, frame);
        assert_passed(flow, "a request", &passage, flow.seen, flow.target.end());
        passage.counted
    }

    /// A packet of the flow's backend must reach the flow's client, from the address that it asked.
    fn reply(&mut self, node: &mut Node, flow: &Flow, flags: u8) -> Counted {
        let frame = packet(flow.request.protocol, flow.target.end(), flow.seen, flags, 7)
            .numbered(BACKEND_SEQUENCE, CLIENT_SEQUENCE + 1);
        let by_tunnel = [TUNNEL4, TUNNEL6].map(ip).contains(&flow.seen.0);
        let passage = match (flow.way(), flow.request.entry) {
            (Way::Stack, Entry::Pod) => self.send(node, Direction::Out, self.pods, frame),
            (Way::Stack, _) => self.send(node, Direction::Out, node.uplink, frame),
            (Way::Routed, _) => {
                self.send(node, Direction::In, if by_tunnel { node.tunnel } else { node.uplink }, frame)
            }
            (Way::Back, _) => self.send_from_pod(node, frame),
        };
        // A client outside that is a pod of this node is behind the pods' device: where its packets came in elsewhere, the
        // answers are sent there.
        let is_back_in = flow.way() == Way::Stack && !flow.request.is_of_pod() && flow.target.local;
        let is_sent_there = flow.request.entry == Entry::Tunnel || flow.is_to_itself();
        if is_back_in && is_pod_of_this_node(flow.request.client.0) && is_sent_there {
            let (to, client) = (flow.request.to, flow.request.client);
            let wanted = passage.frame.with_ends((&to.0.to_string(), to.1), (&client.0.to_string(), client.1));
            assert_eq!((passage.action, &passage.seen), (REDIRECT, &wanted), "a reply of {flow:?}");
        } else {
            assert_passed(flow, "a reply", &passage, flow.request.to, flow.request.client);
        }
        passage.counted
    }

    /// What a pod meets is told apart.
    fn note(&mut self, request: &Request, what: &str) {
        let what = if request.is_of_pod() { format!("a pod's {what}") } else { what.to_owned() };
        *self.noted.entry(what).or_default() += 1;
    }

    fn ask(&mut self, node: &mut Node, request: &Request, frame: Frame) -> Passage {
        match request.entry {
            Entry::Uplink => self.send(node, Direction::In, node.uplink, frame),
            Entry::Tunnel => self.send(node, Direction::In, node.tunnel, frame),
            Entry::Pod => self.send_from_pod(node, frame),
        }
    }

    fn send(&mut self, node: &mut Node, direction: Direction, device: u32, frame: Frame) -> Passage {
        let outcome = node.raw(direction, device, &frame.bytes());
        self.passed(node, frame, outcome.action, &outcome.frame)
    }

    fn send_from_pod(&mut self, node: &mut Node, frame: Frame) -> Passage {
        let (action, bytes) = node.pod_in_bytes(&frame.bytes());
        self.passed(node, frame, action, &bytes)
    }

    fn passed(&mut self, node: &mut Node, frame: Frame, action: i32, bytes: &[u8]) -> Passage {
        self.packets += 1;
        // Nothing else runs these programs: what was read after the packet before holds before this one.
        let counters = node.counters();
        let moved = counters.iter().map(|(name, count)| (*name, count - self.counters[name]));
        let mut counted: Counted = moved.filter(|(_, by)| *by > 0).collect();
        self.counters = counters;
        // Nobody has told this node's neighbours' link addresses.
        counted.remove("neighbour_unknown");
        Passage { seen: parse(bytes), frame, action, counted }
    }
}

/// Every address and port that a Service asks for, as far as clients may know of `addresses`, and some that none does.
fn places_to_ask(world: &RandomCluster, addresses: impl Fn(&Service) -> Vec<Ipx>) -> Vec<(End, Protocol)> {
    let mut places = Vec::new();
    for service in world.services.values() {
        for port in &service.ports {
            for ip in addresses(service) {
                places.push(((ip, port.port), port.protocol));
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
        (GATEWAY4, 30_001),
        ("10.9.9.9", 443),
    ] {
        places.extend([Protocol::Tcp, Protocol::Udp, Protocol::Sctp].map(|protocol| ((ip(address), number), protocol)));
    }
    places
}
