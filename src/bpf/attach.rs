//! Keeping one program per hook attached to the cgroup, across restarts and upgrades of the daemon.
//!
//! A link pinned by an earlier daemon is updated in place: the kernel swaps its program atomically, so that there is
//! no moment without one and none with two. Only when the link belongs to another cgroup is a new one made.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};
use libbpf_rs::query::LinkTypeInfo;
use libbpf_rs::{Link, ProgramMut};

/// The cgroup that the programs are attached to.
pub struct Cgroup {
    directory: File,
    /// The kernel's 64-bit cgroup id, which is the directory's inode number.
    id: u64,
}

impl Cgroup {
    pub fn open(path: &Path) -> Result<Cgroup> {
        let directory = File::open(path).with_context(|| format!("cannot open the cgroup {}", path.display()))?;
        let id = directory.metadata().with_context(|| format!("cannot stat the cgroup {}", path.display()))?.ino();
        Ok(Cgroup { directory, id })
    }
}

/// What happened to a program's link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attached {
    /// A new link.
    New,
    /// The pinned link now runs this program.
    Replaced,
}

/// Attaches `program` to `cgroup`, pinned at `pin`.
pub fn attach(program: &ProgramMut<'_>, cgroup: &Cgroup, pin: &Path) -> Result<Attached> {
    let former = match pinned_link(pin)? {
        Some(mut link) if is_attached_to(&link, cgroup.id, pin)? => {
            link.update_prog(program).with_context(|| format!("cannot replace the program of {}", pin.display()))?;
            return Ok(Attached::Replaced);
        }
        former => former,
    };
    let mut link = program
        .attach_cgroup(cgroup.directory.as_raw_fd())
        .with_context(|| format!("cannot attach {:?} to the cgroup", program.name()))?;
    // The new link serves before the old one, of another cgroup, goes.
    // bpffs allows no dots in names.
    let mut new = pin.as_os_str().to_owned();
    new.push("_new");
    let new = Path::new(&new);
    let _ = fs::remove_file(new);
    link.pin(new).with_context(|| format!("cannot pin {}", new.display()))?;
    fs::rename(new, pin).with_context(|| format!("cannot rename {} to {}", new.display(), pin.display()))?;
    // A link that only loses its last reference is taken off its hook later, by a worker of the kernel's.
    if let Some(former) = former {
        former.detach().with_context(|| format!("cannot detach the former link of {}", pin.display()))?;
    }
    Ok(Attached::New)
}

fn pinned_link(pin: &Path) -> Result<Option<Link>> {
    if !pin.exists() {
        return Ok(None);
    }
    Link::open(pin).map(Some).with_context(|| format!("cannot open the pinned link {}", pin.display()))
}

/// Whether the link is attached to this very cgroup. A cgroup that was removed leaves a link with id 0.
fn is_attached_to(link: &Link, cgroup_id: u64, pin: &Path) -> Result<bool> {
    let info = link.info().with_context(|| format!("cannot ask the kernel about {}", pin.display()))?;
    Ok(matches!(info.info, LinkTypeInfo::Cgroup(info) if info.cgroup_id == cgroup_id))
}
