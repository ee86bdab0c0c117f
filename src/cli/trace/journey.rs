//! A packet's way through this node: the program of the device that it comes in by, the host's stack, and the program of
//! the device that it leaves by.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use serde::Serialize;

use super::packet::{Packet, address_to, route};
use super::rows::{Row, changed, choice, flow_words};
use crate::abi::flow_flag::FLOW_REPLY;
use crate::abi::{DeviceAddresses, Ends, Flow, FlowKey, FlowKey4, PodDevice, counter};
use crate::bpf::{Direction, Hook, PinnedMap, Rehearsal, Trial, hardware_address};
use crate::cli::explain::{Client, Destination, Live, decide};
use crate::cli::monitor::{Names, Record, monotonic_zero};
use crate::cli::snapshot::kinds;
use crate::model::{Ipx, SocketAddrx};
use crate::netdev::{Way, way};

/// TC_ACT_SHOT and TC_ACT_REDIRECT (linux/pkt_cls.h).
const SHOT: i32 = 2;
const REDIRECT: i32 = 7;

/// One program that ran.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Step {
    pub device: String,
    /// "in" or "out".
    pub direction: &'static str,
    pub program: &'static str,
    pub packet: Packet,
    /// What was looked up, and what was left.
    pub rows: Vec<Row>,
    /// As `kubelane monitor` tells them.
    pub events: Vec<Record>,
    /// As kubelane_datapath_verdicts_total names them.
    pub counted: Vec<&'static str>,
    pub verdict: &'static str,
    /// `None`: as it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub becomes: Option<Packet>,
    /// Of this one run, on caches that are as cold as they happen to be.
    pub nanoseconds: u64,
}

/// The steps of one packet, and where it ended.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Passage {
    pub steps: Vec<Step>,
    pub end: String,
}

/// Where a packet that was not dropped has got to.
pub struct Arrival {
    pub packet: Packet,
    /// Interface index; `None`: a socket of this node.
    pub device: Option<u32>,
    /// To whoever sent it: an error.
    pub is_answer: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Outward,
    /// Its packets begin with an IP header.
    Bare,
    /// A pod reaches the node at this link address.
    Pod {
        gateway: [u8; 6],
    },
}

/// The node, as far as a packet meets it.
pub struct Node {
    rehearsal: Rehearsal,
    live: Live,
    names: Names,
    devices: BTreeMap<u32, Role>,
    runtime: tokio::runtime::Runtime,
    monotonic_zero: i128,
}

impl Node {
    /// # Errors
    /// When nothing is pinned there, no programs are attached, or a right is missing.
    pub fn open(pin_path: &Path) -> Result<Node> {
        let mut devices = BTreeMap::new();
        PinnedMap::open(pin_path, "devices")?.each(|index: u32, row: DeviceAddresses| {
            devices.insert(index, if row.is_bare != 0 { Role::Bare } else { Role::Outward });
            Ok(())
        })?;
        PinnedMap::open(pin_path, "pod_devices")?.each(|index: u32, row: PodDevice| {
            devices.insert(index, Role::Pod { gateway: row.gateway });
            Ok(())
        })?;
        Ok(Node {
            rehearsal: Rehearsal::open(pin_path)?,
            live: Live::open(pin_path)?,
            names: Names::open(pin_path)?,
            devices,
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .context("starting a runtime")?,
            monotonic_zero: monotonic_zero()?,
        })
    }

    /// Whether the programs that are attached are those of this binary.
    pub fn is_attached_build(&self) -> bool {
        self.rehearsal.is_attached_build
    }

    pub fn device_name(&mut self, index: u32) -> String {
        self.names.device(index).unwrap_or_else(|| format!("device {index}"))
    }

    /// Of a bridge the port, if programs are there.
    fn end_of(&self, way: &Way) -> u32 {
        way.port.filter(|port| self.devices.contains_key(port)).unwrap_or(way.interface)
    }

    /// Where the kernel sends a packet; `forwarded`: its source, and the device that it came in by.
    ///
    /// # Errors
    /// When netlink does not answer.
    pub fn way(&self, to: IpAddr, forwarded: Option<(IpAddr, u32)>) -> Result<Option<Way>> {
        self.runtime.block_on(way(to, forwarded))
    }

    /// The device by which packets of `from` come in: the one that leads there.
    ///
    /// # Errors
    /// When there is none, or it is this node's own address.
    pub fn device_towards(&self, from: IpAddr) -> Result<u32> {
        match self.way(from, None)? {
            Some(Way { is_local: true, .. }) => bail!(
                "{from} is this node's own address: its own packets are translated when they are sent (kubelane trace \
                 --connect, kubelane explain --from node)"
            ),
            Some(way) => Ok(self.end_of(&way)),
            None => bail!("this node has no route to {from}: name the device that its packets come in by (--device)"),
        }
    }

    /// A packet that comes in by a device. `None`: it went nowhere.
    ///
    /// # Errors
    /// When the kernel cannot run a program on it.
    pub fn receive(&mut self, mut frame: Vec<u8>, device: u32) -> Result<(Passage, Option<Arrival>)> {
        let mut steps = Vec::new();
        let packet = Packet::read(&frame)?;
        let from = packet.from.map(|from| from.ip()).context("the packet has no source")?;
        let hook = match self.devices.get(&device) {
            Some(Role::Outward) => Some((Hook::Wire(Direction::In), hardware_address(device)?)),
            Some(Role::Pod { gateway }) => Some((Hook::FromPod, *gateway)),
            Some(Role::Bare) => bail!(
                "{} has no link headers: the kernel cannot run its programs on a single packet",
                self.device_name(device)
            ),
            None => None,
        };
        let mut is_sent = false;
        if let Some((hook, own)) = hook {
            // The kernel takes what is for another link address for a stranger's.
            address_to(&mut frame, own);
            let (step, after, action) = self.step(hook, &frame, 0, device)?;
            steps.push(step);
            if action == SHOT {
                return Ok((Passage { steps, end: "it is dropped".to_owned() }, None));
            }
            frame = after;
            is_sent = action == REDIRECT;
        }
        let now = Packet::read(&frame)?;
        let is_answer = is_sent && now.answers(&packet);
        let to = now.to.map(|to| to.ip()).context("the packet has no destination")?;
        let way = match (is_sent, is_answer) {
            (true, true) => Some(Way { interface: device, port: None, is_local: false }),
            (true, false) => self.way(to, None)?,
            (false, _) => self.way(to, Some((from, device)))?,
        };
        let Some(way) = way else {
            let end = format!("the host's stack has no way to {to} for it, and drops it");
            return Ok((Passage { steps, end }, None));
        };
        if way.is_local {
            let end = format!("it is delivered on this node: {}", now.words());
            return Ok((Passage { steps, end }, Some(Arrival { packet: now, device: None, is_answer })));
        }
        if !is_sent && !route(&mut frame)? {
            return Ok((Passage { steps, end: "its hop limit is used up in the host's stack".to_owned() }, None));
        }
        self.leave(steps, frame, device, self.end_of(&way), is_answer)
    }

    /// A packet that this node sends.
    ///
    /// # Errors
    /// As for [`Node::receive`].
    pub fn send(&mut self, frame: Vec<u8>) -> Result<(Passage, Option<Arrival>)> {
        let packet = Packet::read(&frame)?;
        let to = packet.to.map(|to| to.ip()).context("the packet has no destination")?;
        match self.way(to, None)? {
            Some(way) if !way.is_local => self.leave(Vec::new(), frame, 0, self.end_of(&way), false),
            Some(_) => Ok((
                Passage { steps: Vec::new(), end: "it stays on this node".to_owned() },
                Some(Arrival { packet, device: None, is_answer: false }),
            )),
            None => Ok((Passage { steps: Vec::new(), end: format!("this node has no route to {to}") }, None)),
        }
    }

    fn leave(
        &mut self,
        mut steps: Vec<Step>,
        mut frame: Vec<u8>,
        from: u32,
        device: u32,
        is_answer: bool,
    ) -> Result<(Passage, Option<Arrival>)> {
        let mut device = device;
        // A packet that is sent elsewhere has been translated, and is no reply any more.
        for _ in 0..2 {
            if !matches!(self.devices.get(&device), Some(Role::Outward | Role::Pod { .. })) {
                break;
            }
            // A reply that leaves by another device than its client's packets come in by is sent there.
            let flow = self.flow(&Packet::read(&frame)?)?.filter(|(_, _, flow)| flow.has(FLOW_REPLY));
            let elsewhere = flow.map(|(_, _, flow)| flow.generation_or_interface).filter(|interface| *interface != 0);
            let (step, after, action) = self.step(Hook::Wire(Direction::Out), &frame, from, device)?;
            steps.push(step);
            if action == SHOT {
                return Ok((Passage { steps, end: "it is dropped".to_owned() }, None));
            }
            frame = after;
            match elsewhere.filter(|elsewhere| action == REDIRECT && *elsewhere != device) {
                Some(elsewhere) => device = elsewhere,
                None => break,
            }
        }
        let packet = Packet::read(&frame)?;
        let untried = match self.devices.get(&device) {
            Some(Role::Bare) => ", whose program was not tried: it has no link headers",
            _ => "",
        };
        let end = format!("it leaves by {}{untried}: {}", self.device_name(device), packet.words());
        Ok((Passage { steps, end }, Some(Arrival { packet, device: Some(device), is_answer })))
    }

    fn step(&mut self, hook: Hook, frame: &[u8], from: u32, device: u32) -> Result<(Step, Vec<u8>, i32)> {
        let packet = Packet::read(frame)?;
        let mut rows = self.look_up(hook, &packet)?;
        let Trial { outcome, events, counted, changes } = self.rehearsal.run(hook, frame, from, device)?;
        rows.extend(events.iter().find_map(choice));
        rows.extend(changes.iter().map(|change| changed(change, &mut self.names)));
        let (zero, names) = (self.monotonic_zero, &mut self.names);
        let events = events.iter().filter_map(|event| Record::new(event, names, zero, None)).collect();
        let becomes = Packet::read(&outcome.frame).ok().filter(|after| *after != packet);
        let is_answer = becomes.as_ref().is_some_and(|after| after.answers(&packet));
        let verdict = match (outcome.action, hook) {
            (SHOT, _) => "dropped",
            (REDIRECT, _) if is_answer => "answered from here",
            (REDIRECT, _) => "sent on from here",
            (_, Hook::Wire(Direction::Out)) => "let go",
            _ => "handed to the host's stack",
        };
        let name = |(number, _): &(u32, u64)| counter::NAMES.get(*number as usize).map(|(label, _)| *label);
        let step = Step {
            device: self.device_name(device),
            direction: if hook == Hook::Wire(Direction::Out) { "out" } else { "in" },
            program: hook.program(),
            packet,
            rows,
            events,
            counted: counted.iter().filter_map(name).collect(),
            verdict,
            becomes,
            nanoseconds: outcome.duration.as_nanos() as u64,
        };
        Ok((step, outcome.frame, outcome.action))
    }

    /// The row of a packet's flow, with its table and key.
    fn flow(&self, packet: &Packet) -> Result<Option<(&'static str, FlowKey, Flow)>> {
        let Some((table, key)) = flow_key(packet) else { return Ok(None) };
        let flow: Option<Flow> = match (packet.from, packet.to) {
            (Some(SocketAddr::V4(from)), Some(SocketAddr::V4(to))) => {
                let key = FlowKey4 {
                    source: from.ip().octets(),
                    destination: to.ip().octets(),
                    source_port_be: key.ends.source_port_be,
                    destination_port_be: key.ends.destination_port_be,
                    protocol: key.protocol,
                    zero: key.zero,
                };
                self.rehearsal.get(table, &key)?
            }
            _ => self.rehearsal.get(table, &key)?,
        };
        if let Some(flow) = flow {
            return Ok(Some((table, key, flow)));
        }
        Ok(self.rehearsal.get("handed", &key)?.map(|flow| ("handed", key, flow)))
    }

    /// The rows that decide, in the order in which programs look at them.
    fn look_up(&self, hook: Hook, packet: &Packet) -> Result<Vec<Row>> {
        let read = |map, text| Row { map, what: "read", text };
        if let Some((table, key, flow)) = self.flow(packet)? {
            return Ok(vec![read(table, flow_words(&key, &flow))]);
        }
        let (Some(from), Some(to), Some(protocol)) = (packet.from, packet.to, packet.known_protocol()) else {
            return Ok(Vec::new());
        };
        let Some((table, _)) = flow_key(packet) else { return Ok(Vec::new()) };
        let mut rows = vec![read(table, "no row: no flow that is known".to_owned())];
        if hook == Hook::Wire(Direction::Out) {
            return Ok(rows);
        }
        let at = SocketAddrx { ip: Ipx::from(to.ip()), port: to.port() };
        let ip = Some(Ipx::from(from.ip()));
        let client = match hook {
            Hook::FromPod => Client::PodPacket(ip),
            Hook::Wire(_) => Client::Packet(ip),
        };
        let decision = decide(&self.live, Destination { at, protocol }, &client)?;
        let Some(found) = decision.found else {
            rows.push(read("frontends", "no row that it may ask for".to_owned()));
            return Ok(rows);
        };
        let name = found.name.as_deref().unwrap_or("a Service without a name");
        let frontend = SocketAddrx { ip: found.key.ip(), port: found.key.port() };
        let kinds = kinds(found.row.flags).join(", ");
        rows.push(read("frontends", format!("{frontend} {} of {name} ({kinds})", protocol.as_str())));
        if let Some(is_admitted) = found.is_admitted {
            let words = if is_admitted { "is in one of its ranges" } else { "is in none of its ranges" };
            rows.push(read("source_ranges", format!("{} {words}", from.ip())));
        }
        if let Some(remembered) = found.remembered {
            rows.push(read("affinities", format!("{} had {}", from.ip(), remembered.at)));
        }
        let pool = if found.pool.count == 0 {
            "none: nobody to send it to".to_owned()
        } else {
            format!("{} from {} on, of {} backends", found.pool.count, found.pool.base, found.candidates.len())
        };
        rows.push(read("slots", pool));
        Ok(rows)
    }
}

/// Of a packet that has ports: its flow's table and key.
fn flow_key(packet: &Packet) -> Option<(&'static str, FlowKey)> {
    let (from, to, protocol) = (packet.from?, packet.to?, packet.known_protocol()?);
    let ends = Ends {
        source: Ipx::from(from.ip()).0,
        destination: Ipx::from(to.ip()).0,
        source_port_be: from.port().to_be_bytes(),
        destination_port_be: to.port().to_be_bytes(),
    };
    let table = if from.is_ipv4() { "flows4" } else { "flows6" };
    Some((table, FlowKey { ends, protocol: protocol as u8, zero: [0; 3] }))
}
