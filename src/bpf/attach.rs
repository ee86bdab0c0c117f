//! Keeping one program per hook attached to the cgroup, across restarts and upgrades of the daemon.
//!
//! A link pinned by an earlier daemon is updated in place: the kernel swaps its program atomically, so that there is
//! no moment without one and none with two. Only when the link belongs to another cgroup is a new one made, and when
//! somebody has detached or unpinned it: [`SocketHooks`] finds that out.

use std::fs::File;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use libbpf_rs::query::{LinkInfo, LinkTypeInfo};

use super::load::Counting;
use super::skeleton::KubelaneSkel;
use super::{link, pinned};

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

/// One program and its place on the cgroup. The name is the pin's, too.
struct Hook {
    name: &'static str,
    kind: libbpf_sys::bpf_attach_type,
    program: OwnedFd,
}

/// The program that is attached only while it counts.
const TCP_STATES: &str = "tcp_states";

/// The programs of the cgroup's hooks, for putting back what somebody takes off.
#[derive(Clone)]
pub struct SocketHooks {
    cgroup: Arc<Cgroup>,
    hooks: Arc<[Hook]>,
    /// Of `TCP_STATES`, while it is attached.
    observer: Option<Arc<Hook>>,
    links: PathBuf,
}

impl SocketHooks {
    /// Attaches all, replies and names before requests: no socket is translated whose answers would not be.
    /// [`Attached::Replaced`]: all that translate took an earlier daemon's place.
    pub(super) fn attach(
        skeleton: &KubelaneSkel<'_>,
        cgroup: Cgroup,
        pin_path: &Path,
        counting: Counting,
    ) -> Result<(SocketHooks, Attached)> {
        let progs = &skeleton.progs;
        let links = pinned::links_directory(pin_path);
        let hooks = [
            ("recvmsg4", libbpf_sys::BPF_CGROUP_UDP4_RECVMSG, progs.recvmsg4.as_fd()),
            ("recvmsg6", libbpf_sys::BPF_CGROUP_UDP6_RECVMSG, progs.recvmsg6.as_fd()),
            ("getpeername4", libbpf_sys::BPF_CGROUP_INET4_GETPEERNAME, progs.getpeername4.as_fd()),
            ("getpeername6", libbpf_sys::BPF_CGROUP_INET6_GETPEERNAME, progs.getpeername6.as_fd()),
            ("sendmsg4", libbpf_sys::BPF_CGROUP_UDP4_SENDMSG, progs.sendmsg4.as_fd()),
            ("sendmsg6", libbpf_sys::BPF_CGROUP_UDP6_SENDMSG, progs.sendmsg6.as_fd()),
            ("connect4", libbpf_sys::BPF_CGROUP_INET4_CONNECT, progs.connect4.as_fd()),
            ("connect6", libbpf_sys::BPF_CGROUP_INET6_CONNECT, progs.connect6.as_fd()),
        ];
        let own = |(name, kind, program): (&'static str, libbpf_sys::bpf_attach_type, BorrowedFd<'_>)| {
            let program = program.try_clone_to_owned().context("cannot keep a BPF program")?;
            Ok(Hook { name, kind, program })
        };
        let hooks = hooks.into_iter().map(own).collect::<Result<Vec<Hook>>>()?;
        let mut all = SocketHooks { cgroup: Arc::new(cgroup), hooks: hooks.into(), observer: None, links };
        let mut outcome = Attached::Replaced;
        for hook in all.hooks.iter() {
            if all.attach_one(hook)? == Attached::New {
                outcome = Attached::New;
            }
        }
        if counting == Counting::Traffic {
            let observer = own((TCP_STATES, libbpf_sys::BPF_CGROUP_SOCK_OPS, progs.tcp_states.as_fd()))?;
            // Somebody's older program may have the hook for itself. To serve is more than to measure.
            match all.attach_one(&observer) {
                Ok(_) => all.observer = Some(Arc::new(observer)),
                Err(error) => tracing::warn!("--service-traffic does not measure TCP sockets: {error:#}"),
            }
        } else {
            take_off(&all.links.join(TCP_STATES))?;
        }
        Ok((all, outcome))
    }

    /// Names of all hooks, in the order in which to attach to them.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.hooks.iter().map(|hook| hook.name)
    }

    /// Names of the hooks whose program is no longer attached, or pinned; in the same order.
    pub fn missing(&self) -> Result<Vec<&'static str>> {
        let mut missing = Vec::new();
        for hook in self.hooks.iter() {
            if !self.is_there(hook)? {
                missing.push(hook.name);
            }
        }
        Ok(missing)
    }

    fn is_there(&self, hook: &Hook) -> Result<bool> {
        match link::pinned(&self.links.join(hook.name))? {
            Some((_, info)) if self.is_attached_here(&info) => link::is_program(info.prog_id, hook.program.as_fd()),
            _ => Ok(false),
        }
    }

    /// Of the program that only measures: its hook's name, and whether it still is attached. `None`: it never was.
    pub fn observer(&self) -> Result<Option<(&'static str, bool)>> {
        let observer = self.observer.as_deref();
        observer.map(|hook| Ok((hook.name, self.is_there(hook)?))).transpose()
    }

    /// Attaches and pins the program of one hook again.
    pub fn restore(&self, name: &str) -> Result<()> {
        let hook = self.hooks.iter().chain(self.observer.as_deref()).find(|hook| hook.name == name);
        hook.map_or(Ok(()), |hook| self.attach_one(hook).map(drop))
    }

    fn attach_one(&self, hook: &Hook) -> Result<Attached> {
        let (pin, program) = (self.links.join(hook.name), hook.program.as_fd());
        let former = match link::pinned(&pin)? {
            Some((link, info)) if self.is_attached_here(&info) => {
                link::update(&link, program)
                    .with_context(|| format!("cannot replace the program of {}", pin.display()))?;
                return Ok(Attached::Replaced);
            }
            former => former,
        };
        let new = link::create(program, self.cgroup.directory.as_raw_fd(), hook.kind, 0)
            .with_context(|| format!("cannot attach {} to the cgroup", hook.name))?;
        // The new link serves before the old one, of another cgroup, goes.
        link::pin(new.as_fd(), &pin)?;
        // A link that only loses its last reference is taken off its hook later, by a worker of the kernel's.
        if let Some((former, _)) = former {
            former.detach().with_context(|| format!("cannot detach the previous link of {}", pin.display()))?;
        }
        Ok(Attached::New)
    }

    /// Whether a link is attached to this very cgroup. One that was detached, or whose cgroup was removed, has id 0.
    fn is_attached_here(&self, info: &LinkInfo) -> bool {
        matches!(&info.info, LinkTypeInfo::Cgroup(info) if info.cgroup_id == self.cgroup.id)
    }
}

/// Removes the link that an earlier daemon has pinned here, if it has, or was about to.
fn take_off(pin: &Path) -> Result<()> {
    for pin in [link::begun(pin), pin.to_owned()] {
        let Some((link, _)) = link::pinned(&pin)? else { continue };
        link.detach().with_context(|| format!("cannot detach the link of {}", pin.display()))?;
        std::fs::remove_file(&pin).with_context(|| format!("cannot remove {}", pin.display()))?;
    }
    Ok(())
}
