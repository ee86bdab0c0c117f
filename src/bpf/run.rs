//! BPF_PROG_TEST_RUN: a packet through a program, without a device. For tests and benches.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bytemuck::{Pod, Zeroable};
use libbpf_rs::skel::OpenSkel;

use super::devices::{Devices, Direction, LinkLayer};
use super::load::{btf_stand_in, open_object};
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
    let mut out = vec![0u8; frame.len() + 512];
    let mut options = libbpf_sys::bpf_test_run_opts {
        sz: size_of::<libbpf_sys::bpf_test_run_opts>() as _,
        data_in: frame.as_ptr().cast(),
        data_size_in: frame.len() as u32,
        data_out: out.as_mut_ptr().cast(),
        data_size_out: out.len() as u32,
        ctx_in: std::ptr::from_ref(&context).cast(),
        ctx_size_in: size_of::<Context>() as u32,
        repeat: repeat as i32,
        ..Default::default()
    };
    let program = devices.program(direction, LinkLayer::Ethernet).as_fd().as_raw_fd();
    // SAFETY: the pointers lead to buffers of the given sizes that outlive the call.
    let result = unsafe { libbpf_sys::bpf_prog_test_run_opts(program, &mut options) };
    if result != 0 {
        bail!("BPF_PROG_TEST_RUN: {}", io::Error::from_raw_os_error(-result));
    }
    out.truncate(options.data_size_out as usize);
    Ok(Outcome {
        action: options.retval as i32,
        frame: out,
        duration: Duration::from_nanos(u64::from(options.duration)),
    })
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
    Devices::new(&skeleton.load()?, pin_path)
}
