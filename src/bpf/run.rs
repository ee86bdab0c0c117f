//! BPF_PROG_TEST_RUN: a packet through a program, without a device. For `kubelane trace`, tests and benches.

use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bytemuck::{Pod, Zeroable};
use libbpf_rs::skel::OpenSkel;

use super::devices::{Devices, LinkLayer};
use super::hook::Direction;
use super::object::{btf_stand_in, open_object};
use super::signals::uninterrupted;
use super::test_run::test_run;
use super::{pinned, probe};

/// What a program did to a packet.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The TC action: -1 unspecified (pass on), 2 shot, 7 redirect.
    pub action: i32,
    /// The frame afterwards.
    pub frame: Vec<u8>,
    /// Mean time of one run.
    pub duration: Duration,
}

/// What the kernel is told of the packet: the leading part of `struct __sk_buff` (linux/bpf.h).
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Context {
    unused: [u32; 2],
    /// Byte 8.
    mark: u32,
    unused_too: [u32; 6],
    /// Byte 36 is `ingress_ifindex`, byte 40 `ifindex`.
    ingress_interface: u32,
    interface: u32,
    rest: [u32; 37],
}

/// Runs the program of an Ethernet device on `frame` (at least 14 bytes, or the kernel refuses) as if on device
/// `interface` of the calling thread's network namespace, `repeat` times.
pub fn run(devices: &Devices, direction: Direction, frame: &[u8], interface: u32, repeat: u32) -> Result<Outcome> {
    run_marked(devices, direction, frame, interface, 0, repeat)
}

/// The same for a packet with a mark, as `ip rule` knows it.
pub fn run_marked(
    devices: &Devices,
    direction: Direction,
    frame: &[u8],
    interface: u32,
    mark: u32,
    repeat: u32,
) -> Result<Outcome> {
    let context = Context { interface, mark, ..Zeroable::zeroed() };
    run_program(devices.programs().of(direction, LinkLayer::Ethernet), frame, &context, repeat)
}

/// As [`run`], for a packet that comes in by a pod's device.
pub fn run_pod(devices: &Devices, frame: &[u8], interface: u32, repeat: u32) -> Result<Outcome> {
    let context = Context { interface, ..Zeroable::zeroed() };
    run_program(devices.programs().of_pods(), frame, &context, repeat)
}

/// As [`run`], once, for a packet that came in by the device `from`.
pub fn run_from(devices: &Devices, direction: Direction, frame: &[u8], from: u32, interface: u32) -> Result<Outcome> {
    let context = Context { ingress_interface: from, interface, ..Zeroable::zeroed() };
    run_program(devices.programs().of(direction, LinkLayer::Ethernet), frame, &context, 1)
}

/// As [`run`], with the program of a device without link headers: `packet` begins with its IP header.
///
/// The kernel knows no such packets here: it takes the first 14 bytes for an Ethernet header, learns the protocol from
/// it, and then shows the program all bytes all the same. So bytes 12 and 13, which belong to the source address, must
/// be the number of the packet's protocol: 8.0.x.y in IPv4, the third group 86dd in IPv6. A program that sends such a
/// packet on puts a link header before it, so that only the first run sees a packet.
pub fn run_bare(
    devices: &Devices,
    direction: Direction,
    packet: &[u8],
    interface: u32,
    repeat: u32,
) -> Result<Outcome> {
    let context = Context { interface, ..Zeroable::zeroed() };
    run_program(devices.programs().of(direction, LinkLayer::None), packet, &context, repeat)
}

/// Runs any packet program on `frame`, in a context that says nothing.
#[cfg(feature = "lab")]
pub(super) fn run_plain(program: BorrowedFd<'_>, frame: &[u8], repeat: u32) -> Result<Outcome> {
    run_program(program, frame, &Zeroable::zeroed(), repeat)
}

fn run_program(program: BorrowedFd<'_>, frame: &[u8], context: &Context, repeat: u32) -> Result<Outcome> {
    let mut out = vec![0u8; frame.len() + 512];
    let (action, length, nanoseconds) = test_run(program, frame, bytemuck::bytes_of(context), &mut out, repeat)?;
    out.truncate(length as usize);
    Ok(Outcome { action: action as i32, frame: out, duration: Duration::from_nanos(u64::from(nanoseconds)) })
}

/// The packet programs loaded once more, on the maps pinned below `pin_path` but for the one named `map`: there they
/// find `stand_in`, with the same keys and values. So a test sees what they do when a map does not take a row.
pub fn with_stand_in(pin_path: &Path, map: &str, stand_in: BorrowedFd<'_>) -> Result<Devices> {
    let mut storage = MaybeUninit::uninit();
    let btf = btf_stand_in()?;
    let mut skeleton = open_object(&mut storage, btf.as_ref(), probe::socket_search())?;
    for mut theirs in skeleton.open_object_mut().maps_mut() {
        let name = theirs.name().to_string_lossy().into_owned();
        let pin = pinned::maps_directory(pin_path).join(&name);
        if name == map {
            theirs.reuse_fd(stand_in).with_context(|| format!("putting another map in the place of {name}"))?;
        } else if pin.exists() {
            theirs.reuse_pinned_map(&pin).with_context(|| format!("using {}", pin.display()))?;
        }
    }
    Devices::new(&uninterrupted(|| skeleton.load())?, pin_path)
}
