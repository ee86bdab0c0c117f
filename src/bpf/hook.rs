//! One program on one hook of one device: as a tcx link, or as a filter of the device's clsact qdisc.
//!
//! ```text
//! links/tcx_<interface index>_<in|out>     a pinned link: holds the program on its hook
//! links/filter_<interface index>_<in|out>  a pinned program: its filter, by this priority and handle, is ours
//! ```

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use libbpf_rs::query::LinkTypeInfo;
use libbpf_rs::{Link, Program, TC_EGRESS, TC_INGRESS, TcHook, TcHookBuilder};

use super::link::{self, Attached};
use super::trial;

/// Of our filters: a priority that other projects do not use (Cilium 1, Calico 49152 and up), and "kl".
const FILTER_PRIORITY: u32 = 27_499;
const FILTER_HANDLE: u32 = 0x6b6c;

/// Which way packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    In,
    Out,
}

fn word(direction: Direction) -> &'static str {
    match direction {
        Direction::In => "in",
        Direction::Out => "out",
    }
}

pub(super) fn tcx_pin(links: &Path, index: u32, direction: Direction) -> PathBuf {
    links.join(format!("tcx_{index}_{}", word(direction)))
}

pub(super) fn filter_pin(links: &Path, index: u32, direction: Direction) -> PathBuf {
    links.join(format!("filter_{index}_{}", word(direction)))
}

/// The device and direction that a pin's name says; `None` for pins of other hooks.
pub(super) fn device_of_pin(pin: &Path) -> Option<(u32, Direction)> {
    let name = pin.file_name()?.to_str()?;
    let (index, direction) = name.strip_prefix("tcx_").or(name.strip_prefix("filter_"))?.split_once('_')?;
    let direction = [Direction::In, Direction::Out].into_iter().find(|d| word(*d) == direction)?;
    Some((index.parse().ok()?, direction))
}

/// Whether the kernel has tcx links: asked for no device at all, it misses the device; without tcx it does not know
/// the hook.
pub(super) fn has_tcx() -> bool {
    let is_known = |program: OwnedFd| create_link(program.as_fd(), -1, Direction::In);
    matches!(trial::next_program().and_then(is_known), Err(error) if error.raw_os_error() == Some(libc::ENODEV))
}

fn create_link(program: BorrowedFd<'_>, index: i32, direction: Direction) -> io::Result<OwnedFd> {
    link::create(program, index, tcx_hook(direction), libbpf_sys::BPF_F_BEFORE)
}

fn tcx_hook(direction: Direction) -> libbpf_sys::bpf_attach_type {
    match direction {
        Direction::In => libbpf_sys::BPF_TCX_INGRESS,
        Direction::Out => libbpf_sys::BPF_TCX_EGRESS,
    }
}

/// What is wrong with a program's attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Somebody took it off, or removed the pin that holds it.
    Detached(Direction),
    /// Others come before it, and may keep packets from it: their names.
    Overtaken(Direction, Vec<String>),
}

/// As the first on its hook: a program before ours that answers TC_ACT_OK, as agents that only watch do, would keep all
/// packets from us. Ours lets go on to others what it does not send on itself.
pub(super) fn attach_tcx(program: BorrowedFd<'_>, index: u32, direction: Direction, links: &Path) -> Result<Attached> {
    let path = tcx_pin(links, index, direction);
    let former = pinned_tcx(&path, index)?;
    if let Some((former, id)) = &former
        && tcx_programs(index, direction)?.before(*id).is_empty()
    {
        link::update(former, program).with_context(|| format!("cannot replace the program of {}", path.display()))?;
        return Ok(Attached::Replaced);
    }
    let new = match (create_link(program, index as i32, direction), &former) {
        // One program cannot be on a hook twice.
        (Err(error), Some((former, _))) if error.raw_os_error() == Some(libc::EEXIST) => {
            overtake(former, program, index, direction)
        }
        (new, _) => new,
    };
    let new = new.context("cannot create a tcx link")?;
    link::pin(new.as_fd(), &path)?;
    // For this moment both see packets; what the first has translated is no Service's to the second.
    let Some((former, _)) = former else { return Ok(Attached::New) };
    former.detach().with_context(|| format!("cannot detach the previous link of {}", path.display()))?;
    Ok(Attached::Replaced)
}

/// A link before all others for the program of `former`, which keeps its place with a program that does nothing. Some
/// microseconds lie between the two: to detach `former` first would be without a program until RCU has come round.
fn overtake(former: &Link, program: BorrowedFd<'_>, index: u32, direction: Direction) -> io::Result<OwnedFd> {
    let next = trial::next_program()?;
    link::update(former, next.as_fd())?;
    create_link(program, index as i32, direction).or_else(|error| link::update(former, program).and(Err(error)))
}

/// The pinned link and its id, if it is still on this device: when a device goes its links stay, on interface 0.
fn pinned_tcx(path: &Path, index: u32) -> Result<Option<(Link, u32)>> {
    Ok(link::pinned(path)?.and_then(|(link, info)| match info.info {
        LinkTypeInfo::Tcx(tcx) if tcx.ifindex == index => Some((link, info.id)),
        _ => None,
    }))
}

/// What is wrong with the tcx link of a direction.
pub(super) fn tcx_fault(
    program: BorrowedFd<'_>,
    index: u32,
    direction: Direction,
    links: &Path,
) -> Result<Option<Fault>> {
    let Some((_, id)) = pinned_tcx(&tcx_pin(links, index, direction), index)? else {
        return Ok(Some(Fault::Detached(direction)));
    };
    let programs = tcx_programs(index, direction)?;
    let is_ours = match programs.program_of(id) {
        Some(running) => link::is_program(running, program)?,
        None => false,
    };
    let before = programs.before(id);
    Ok(match (is_ours, before) {
        (false, _) => Some(Fault::Detached(direction)),
        (true, []) => None,
        (true, before) => Some(Fault::Overtaken(direction, link::program_names(before))),
    })
}

/// What is attached to one tcx hook, in the order in which it runs.
struct TcxPrograms {
    links: Vec<u32>,
    programs: Vec<u32>,
}

impl TcxPrograms {
    /// Ids of the programs that run before that of this link; all, when it is not there.
    fn before(&self, link: u32) -> &[u32] {
        let place = self.links.iter().position(|id| *id == link).unwrap_or(self.programs.len());
        &self.programs[..place]
    }

    fn program_of(&self, link: u32) -> Option<u32> {
        let place = self.links.iter().position(|id| *id == link)?;
        self.programs.get(place).copied()
    }
}

/// The programs that come before ours on a device's tcx hook, for people; none when ours is not there.
///
/// # Errors
/// When the kernel has no tcx, or the device has gone.
pub fn programs_before_ours(index: u32, direction: Direction) -> Result<Vec<String>> {
    let mut names = link::program_names(&tcx_programs(index, direction)?.programs);
    let ours = names.iter().position(|name| is_ours(name));
    names.truncate(ours.unwrap_or(0));
    Ok(names)
}

/// Programs of others on a device's tcx hook, which run before any filter.
pub(super) fn tcx_programs_of_others(index: u32, direction: Direction) -> Result<Vec<String>> {
    let mut names = link::program_names(&tcx_programs(index, direction)?.programs);
    names.retain(|name| !is_ours(name));
    Ok(names)
}

fn is_ours(name: &str) -> bool {
    ["wire_in_", "wire_out_", "pod_in_"].iter().any(|ours| name.starts_with(ours))
}

fn tcx_programs(index: u32, direction: Direction) -> Result<TcxPrograms> {
    /// BPF_MPROG_MAX: more fit on no hook.
    const MOST: usize = 64;
    let (mut programs, mut links) = (vec![0u32; MOST], vec![0u32; MOST]);
    let mut options = libbpf_sys::bpf_prog_query_opts {
        sz: size_of::<libbpf_sys::bpf_prog_query_opts>() as _,
        prog_ids: programs.as_mut_ptr(),
        link_ids: links.as_mut_ptr(),
        __bindgen_anon_1: libbpf_sys::bpf_prog_query_opts__bindgen_ty_1 { count: MOST as u32 },
        ..Default::default()
    };
    // SAFETY: both lists have room for as many ids as is said, and outlive the call.
    let result = unsafe { libbpf_sys::bpf_prog_query_opts(index as i32, tcx_hook(direction), &mut options) };
    if result != 0 {
        let error = io::Error::from_raw_os_error(-result);
        return Err(error).with_context(|| format!("cannot list the programs on device {index}"));
    }
    // SAFETY: both members of the union are the same number.
    let count = unsafe { options.__bindgen_anon_1.count } as usize;
    programs.truncate(count);
    links.truncate(count);
    Ok(TcxPrograms { links, programs })
}

fn filter(program: BorrowedFd<'_>, index: u32, direction: Direction, replace: bool) -> TcHook {
    let mut builder = TcHookBuilder::new(program);
    builder.ifindex(index as i32).replace(replace).handle(FILTER_HANDLE).priority(FILTER_PRIORITY);
    builder.hook(match direction {
        Direction::In => TC_INGRESS,
        Direction::Out => TC_EGRESS,
    })
}

/// The pin comes before the filter: one that is left alone by a crash in between claims nothing that is not ours.
pub(super) fn attach_filter(
    program: BorrowedFd<'_>,
    index: u32,
    direction: Direction,
    links: &Path,
) -> Result<Attached> {
    let path = filter_pin(links, index, direction);
    let known = path.exists();
    let mut filter = filter(program, index, direction, known);
    let running = filter.query().ok();
    if running.is_none() {
        // "Exists" is no failure, the wrapper knows.
        filter.create().context("cannot create the clsact qdisc")?;
    }
    if !known {
        link::pin(program, &path)?;
        match running {
            None => {}
            // Only its pin was gone.
            Some(running) if link::is_program(running, program)? => return Ok(Attached::Replaced),
            Some(_) => {
                let _ = fs::remove_file(&path);
                bail!("another program's filter has priority {FILTER_PRIORITY} and handle {FILTER_HANDLE:#x}");
            }
        }
    }
    let existed = known && running.is_some();
    if let Err(error) = filter.attach() {
        if !known {
            let _ = fs::remove_file(&path);
        }
        return Err(error).context("cannot attach a clsact filter");
    }
    if known {
        link::pin(program, &path)?;
    }
    Ok(if existed { Attached::Replaced } else { Attached::New })
}

/// Gives what is pinned at `pin` the successor of the program that it runs, by its id; what has none, or has gone with its
/// device, stays as it is.
pub(super) fn replace<'p>(
    pin: &Path,
    index: u32,
    direction: Direction,
    successor: impl Fn(u32) -> Option<BorrowedFd<'p>>,
    links: &Path,
) -> Result<()> {
    if pin == filter_pin(links, index, direction) {
        let running = Program::fd_from_pinned_path(pin).with_context(|| format!("cannot open {}", pin.display()))?;
        let new = successor(Program::id_from_fd(running.as_fd()).context("cannot ask the kernel about a program")?);
        let is_there = |new: BorrowedFd<'_>| filter(new, index, direction, false).query().is_ok();
        let Some(new) = new.filter(|new| is_there(*new)) else { return Ok(()) };
        return attach_filter(new, index, direction, links).map(drop);
    }
    let Some((link, info)) = link::pinned(pin)? else { return Ok(()) };
    let is_there = matches!(&info.info, LinkTypeInfo::Tcx(tcx) if tcx.ifindex == index);
    let Some(new) = successor(info.prog_id).filter(|_| is_there) else { return Ok(()) };
    link::update(&link, new).context("updating the link")
}

/// What is wrong with the filter of a direction.
pub(super) fn filter_fault(
    program: BorrowedFd<'_>,
    index: u32,
    direction: Direction,
    links: &Path,
) -> Result<Option<Fault>> {
    let running = filter(program, index, direction, false).query();
    let is_ours = match running {
        Ok(running) => link::is_program(running, program)?,
        Err(_) => false,
    };
    let is_right = is_ours && filter_pin(links, index, direction).exists();
    Ok((!is_right).then_some(Fault::Detached(direction)))
}

/// Takes a pin of `links` away and with it what it stands for, of a device or of a cgroup.
///
/// Links are detached now: one that only loses its last reference is taken off its hook later, by a worker of the
/// kernel's, and goes on translating until then (BPF_LINK_DETACH is from 5.9). Filters have to be removed by name. Their
/// qdisc stays, as others may have filters there.
pub(super) fn remove_pin(path: &Path) -> Result<()> {
    let is_filter = path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"filter_"));
    match device_of_pin(path) {
        Some((index, direction)) if is_filter => {
            let program =
                Program::fd_from_pinned_path(path).with_context(|| format!("cannot open {}", path.display()))?;
            let mut filter = filter(program.as_fd(), index, direction, false);
            // A device that vanished has taken its filters along.
            if filter.query().is_ok() {
                filter.detach().with_context(|| format!("cannot detach the filter of {}", path.display()))?;
            }
        }
        _ => {
            let link = Link::open(path).with_context(|| format!("cannot open the pinned link {}", path.display()))?;
            link.detach().with_context(|| format!("cannot detach {}", path.display()))?;
        }
    }
    fs::remove_file(path).with_context(|| format!("cannot remove the pin {}", path.display()))
}
