//! Links and pins by file descriptor: programs that outlive the skeleton they came from are attached again with these.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use libbpf_rs::query::{LinkInfo, ProgInfoIter};
use libbpf_rs::{Link, Program};

/// What happened to a program's link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attached {
    /// A new link.
    New,
    /// The pinned link now runs this program.
    Replaced,
}

/// Attaches `program` to a hook of `target` (a cgroup's descriptor, an interface index). `flags` are those of
/// BPF_LINK_CREATE.
pub(super) fn create(
    program: BorrowedFd<'_>,
    target: i32,
    hook: libbpf_sys::bpf_attach_type,
    flags: u32,
) -> io::Result<OwnedFd> {
    let options = libbpf_sys::bpf_link_create_opts {
        sz: size_of::<libbpf_sys::bpf_link_create_opts>() as _,
        flags,
        ..Default::default()
    };
    // SAFETY: the options are of the size that they say and hold no pointers.
    let fd = unsafe { libbpf_sys::bpf_link_create(program.as_raw_fd(), target, hook, &options) };
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(-fd));
    }
    // SAFETY: the kernel has just given this descriptor to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Swaps the program of a link, atomically.
pub(super) fn update(link: &Link, program: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the call takes no pointers but the options, which may be null.
    let result =
        unsafe { libbpf_sys::bpf_link_update(link.as_fd().as_raw_fd(), program.as_raw_fd(), std::ptr::null()) };
    if result != 0 {
        return Err(io::Error::from_raw_os_error(-result));
    }
    Ok(())
}

/// Of what will be pinned, but has not got its name yet. (bpffs allows no dots in names.)
const BEGUN: &str = "_new";

/// Where what will be pinned at `path` is pinned first.
pub(super) fn begun(path: &Path) -> PathBuf {
    let mut new = path.as_os_str().to_owned();
    new.push(BEGUN);
    new.into()
}

/// Whether [`begun`] gave this path.
pub(super) fn is_begun(path: &Path) -> bool {
    path.as_os_str().as_bytes().ends_with(BEGUN.as_bytes())
}

/// Pins a link or a program at `path`, in place of what was pinned there.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> Result<()> {
    let new = &begun(path);
    let _ = fs::remove_file(new);
    let name = CString::new(new.as_os_str().as_bytes()).context("a pin path holds a NUL byte")?;
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    let result = unsafe { libbpf_sys::bpf_obj_pin(object.as_raw_fd(), name.as_ptr()) };
    if result != 0 {
        return Err(io::Error::from_raw_os_error(-result)).with_context(|| format!("cannot pin {}", new.display()));
    }
    fs::rename(new, path).with_context(|| format!("cannot rename {} to {}", new.display(), path.display()))
}

/// The link pinned at `path` and what the kernel knows of it; `None` when nothing is pinned there.
pub(super) fn pinned(path: &Path) -> Result<Option<(Link, LinkInfo)>> {
    if !path.exists() {
        return Ok(None);
    }
    let link = Link::open(path).with_context(|| format!("cannot open the pinned link {}", path.display()))?;
    let info = link.info().with_context(|| format!("cannot ask the kernel about {}", path.display()))?;
    Ok(Some((link, info)))
}

/// Whether `id` is this program's.
pub(super) fn is_program(id: u32, program: BorrowedFd<'_>) -> Result<bool> {
    Ok(Program::id_from_fd(program).context("cannot ask the kernel about a program")? == id)
}

/// What the programs with these ids are called, for people: `watcher (program 7)`. To see names takes CAP_SYS_ADMIN.
pub(super) fn program_names(ids: &[u32]) -> Vec<String> {
    if ids.is_empty() {
        return Vec::new();
    }
    let known: Vec<_> = ProgInfoIter::default().filter(|program| ids.contains(&program.id)).collect();
    let name = |id: &u32| match known.iter().find(|program| program.id == *id) {
        Some(program) => format!("{} (program {id})", program.name.to_string_lossy()),
        None => format!("program {id}"),
    };
    ids.iter().map(name).collect()
}
