//! One program on one hook of one device: as a tcx link, or as a filter of the device's clsact qdisc.
//!
//! ```text
//! links/tcx_<interface index>_<in|out>     a pinned link: holds the program on its hook
//! links/filter_<interface index>_<in|out>  a pinned program: its filter, by this priority and handle, is ours
//! ```

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use libbpf_rs::query::LinkTypeInfo;
use libbpf_rs::{Link, Program, TC_EGRESS, TC_INGRESS, TcHook, TcHookBuilder};

use super::attach::Attached;
use super::devices::Direction;

/// Of our filters: a priority that other projects do not use (Cilium 1, Calico 49152 and up), and "kl".
const FILTER_PRIORITY: u32 = 27_499;
const FILTER_HANDLE: u32 = 0x6b6c;

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
pub(super) fn has_tcx(program: BorrowedFd<'_>) -> bool {
    matches!(create_link(program, -1, Direction::In), Err(error) if error.raw_os_error() == Some(libc::ENODEV))
}

fn create_link(program: BorrowedFd<'_>, index: i32, direction: Direction) -> io::Result<OwnedFd> {
    let hook = match direction {
        Direction::In => libbpf_sys::BPF_TCX_INGRESS,
        Direction::Out => libbpf_sys::BPF_TCX_EGRESS,
    };
    // SAFETY: the call takes no pointers but the options, which may be null.
    let fd = unsafe { libbpf_sys::bpf_link_create(program.as_raw_fd(), index, hook, std::ptr::null()) };
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(-fd));
    }
    // SAFETY: the kernel has just given this descriptor to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Pins a link or a program at `path`, in place of what was pinned there.
fn pin(object: BorrowedFd<'_>, path: &Path) -> Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push("_new");
    let new = Path::new(&new);
    let _ = fs::remove_file(new);
    let name = CString::new(new.as_os_str().as_bytes()).context("a pin path holds a NUL byte")?;
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    let result = unsafe { libbpf_sys::bpf_obj_pin(object.as_raw_fd(), name.as_ptr()) };
    if result != 0 {
        return Err(io::Error::from_raw_os_error(-result)).with_context(|| format!("cannot pin {}", new.display()));
    }
    fs::rename(new, path).with_context(|| format!("cannot rename {} to {}", new.display(), path.display()))
}

pub(super) fn attach_tcx(program: BorrowedFd<'_>, index: u32, direction: Direction, links: &Path) -> Result<Attached> {
    let path = tcx_pin(links, index, direction);
    if let Some(link) = pinned_tcx(&path, index)? {
        // SAFETY: the call takes no pointers but the options, which may be null.
        let result =
            unsafe { libbpf_sys::bpf_link_update(link.as_fd().as_raw_fd(), program.as_raw_fd(), std::ptr::null()) };
        if result != 0 {
            return Err(io::Error::from_raw_os_error(-result))
                .with_context(|| format!("cannot replace the program of {}", path.display()));
        }
        return Ok(Attached::Replaced);
    }
    let link = create_link(program, index as i32, direction).context("cannot create a tcx link")?;
    pin(link.as_fd(), &path)?;
    Ok(Attached::New)
}

/// The pinned link if it is still on this device: when a device goes its links stay, on interface 0.
fn pinned_tcx(path: &Path, index: u32) -> Result<Option<Link>> {
    if !path.exists() {
        return Ok(None);
    }
    let link = Link::open(path).with_context(|| format!("cannot open the pinned link {}", path.display()))?;
    let info = link.info().with_context(|| format!("cannot ask the kernel about {}", path.display()))?;
    match info.info {
        LinkTypeInfo::Tcx(info) if info.ifindex == index => Ok(Some(link)),
        _ => Ok(None),
    }
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
    // "Exists" is no failure, the wrapper knows.
    filter.create().context("cannot create the clsact qdisc")?;
    if !known {
        if filter.query().is_ok() {
            bail!("a filter of somebody else has priority {FILTER_PRIORITY} and handle {FILTER_HANDLE:#x}");
        }
        pin(program, &path)?;
    }
    let existed = known && filter.query().is_ok();
    if let Err(error) = filter.attach() {
        if !known {
            let _ = fs::remove_file(&path);
        }
        return Err(error).context("cannot attach a clsact filter");
    }
    if known {
        pin(program, &path)?;
    }
    Ok(if existed { Attached::Replaced } else { Attached::New })
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
