//! `kubelane trace`: one packet, or one connect(), through the programs, each step with the rows that it met, the verdict
//! and its time. A packet meets the programs a second time, on copies of the tables that packets write (`bpf::Rehearsal`),
//! so that nothing that is attached ever sees it.

mod capture;
mod connect;
mod flags;
mod journey;
mod packet;
mod render;
mod rows;

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;

pub use flags::TraceFlags;

use super::UsageError;
use super::flags::Format;
use crate::bpf::hardware_address;
use crate::chain::chain;
use crate::model::Protocol;
use journey::{Node, Passage};
use packet::{Ask, Packet, answer, build, untagged};

/// Of a client that did not say.
const CLIENT_PORT: u16 = 40_000;
/// Bytes of a packet that BPF_PROG_TEST_RUN takes everywhere: a page, less room before and behind it.
const LARGEST: usize = 3500;

/// Everything that is told. JSON is this object.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Trace {
    device: String,
    request: Passage,
    /// `None`: nobody answers, or none was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    answer: Option<Passage>,
    notes: Vec<String>,
}

/// Runs the subcommand.
///
/// # Errors
/// A [`UsageError`] for a packet that cannot be; when nothing is pinned there, no programs are attached, or a right is
/// missing.
pub fn run(flags: &TraceFlags) -> Result<()> {
    if flags.connect {
        let to = flags.to.as_ref().context("no destination")?;
        if to.protocol == Protocol::Sctp {
            return Err(UsageError("--connect: TCP and UDP only; the kernel has no hook for SCTP".to_owned()).into());
        }
        let connected = connect::connect(&flags.pins.pin_path, flags.cgroup.as_deref(), to)?;
        return show(flags, &connected, render::connected);
    }
    let trace = trace(flags)?;
    show(flags, &trace, render::text)
}

fn show<T: Serialize>(flags: &TraceFlags, told: &T, text: impl FnOnce(&T) -> String) -> Result<()> {
    super::print(&match flags.output {
        Some(Format::Json) => serde_json::to_string_pretty(told)? + "\n",
        Some(Format::Yaml) => super::yaml(told)?,
        None => text(told),
    })
}

fn trace(flags: &TraceFlags) -> Result<Trace> {
    let mut node = Node::open(&flags.pins.pin_path)?;
    let (device, frame) = match &flags.read {
        Some(path) => {
            let number = || format!("packet {}", flags.packet);
            let frame = untagged(capture::packet(path, flags.packet as usize)?).with_context(number)?;
            ensure!(
                frame.len() <= LARGEST,
                "packet {} has {} bytes, and the kernel tries single packets of {LARGEST} at most",
                flags.packet,
                frame.len()
            );
            let packet = Packet::read(&frame).with_context(number)?;
            let from = packet.from.context("the packet has no source")?;
            (device(flags, &node, from.ip())?, frame)
        }
        None => {
            let (Some(from), Some(to)) = (flags.from, flags.to) else { bail!("no client, or no destination") };
            let ask = Ask {
                protocol: to.protocol,
                from: (from.ip, from.port.unwrap_or(CLIENT_PORT)).into(),
                to: (to.at.ip.to_ip(), to.at.port).into(),
                flags: flags.tcp_flags,
            };
            if from.ip.is_ipv4() != ask.to.is_ipv4() {
                return Err(UsageError(format!("{} and {} are of different families", from.ip, ask.to.ip())).into());
            }
            let device = device(flags, &node, from.ip)?;
            (device, build(&ask, hardware_address(device).unwrap_or_default())?)
        }
    };
    let mut notes = Vec::new();
    if !node.is_attached_build() {
        notes.push(
            "the programs that are attached are not those of this binary, which were tried: use the daemon's own"
                .to_owned(),
        );
    }
    let device_name = node.device_name(device);
    let (request, arrival) = node.receive(frame, device)?;
    if request.steps.is_empty() {
        notes.push(format!(
            "no programs of kubelane are on {device_name} (`kubelane get node` lists where they are): if it is a bridge that \
             has not learned yet where the client is, name the client's device with --device"
        ));
    }
    let answer = match arrival.filter(|arrival| !arrival.is_answer && !flags.no_answer) {
        Some(arrival) => answered(&mut node, &arrival).unwrap_or_else(|error| {
            notes.push(format!("no answer was tried: {}", chain(error.as_ref())));
            None
        }),
        None => None,
    };
    Ok(Trace { device: device_name, request, answer, notes })
}

fn device(flags: &TraceFlags, node: &Node, from: std::net::IpAddr) -> Result<u32> {
    match &flags.device {
        Some(name) => {
            nix::net::if_::if_nametoindex(name.as_str()).with_context(|| format!("this node has no device {name}"))
        }
        None => node.device_towards(from),
    }
}

/// What comes back from where a request has got to.
fn answered(node: &mut Node, arrival: &journey::Arrival) -> Result<Option<Passage>> {
    let link = arrival.device.map(hardware_address).transpose();
    // Behind a device without link addresses everything is for this node.
    let Some(frame) = answer(&arrival.packet, link.ok().flatten().unwrap_or_default())? else { return Ok(None) };
    let (passage, _) = match arrival.device {
        Some(device) => node.receive(frame, device)?,
        None => node.send(frame)?,
    };
    Ok(Some(passage))
}
