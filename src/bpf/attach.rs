//! Keeping one program per hook attached to the cgroup, across restarts and upgrades of the daemon.
//!
//! A link pinned by an earlier daemon is updated in place: the kernel swaps its program atomically, so that there is
//! no moment without one and none with two. Only when the link belongs to another cgroup is a new one made, and when
//! somebody has detached or unpinned it: [`SocketHooks`] finds that out.

use std::fs::File;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};
use libbpf_rs::query::{LinkInfo, LinkTypeInfo};

use super::link::{self, Attached};
use super::pinned;
use super::settings::Counting;
use super::skeleton::KubelaneSkel;

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

/// One program and its place on the cgroup. The name is the pin's, too.
struct Hook {
    name: &'static str,
    kind: libbpf_sys::bpf_attach_type,
    program: OwnedFd,
}

/// The program that is attached only while it counts.
const TCP_STATES: &str = "tcp_states";

/// The programs of the cgroup's hooks, for putting back what somebody takes off. Clones share them.
#[derive(Clone)]
pub struct SocketHooks {
    cgroup: Arc<Cgroup>,
    hooks: Arc<Mutex<Hooks>>,
    links: PathBuf,
}

pub(super) struct Hooks {
    /// Those that translate.
    serving: Vec<Hook>,
    /// Of `TCP_STATES`, while it is attached.
    observer: Option<Hook>,
}

/// Replies and names before requests: no socket is translated whose answers would not be.
fn serving_hooks(skeleton: &KubelaneSkel<'_>) -> Result<Vec<Hook>> {
    let progs = &skeleton.progs;
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
    hooks.into_iter().map(|(name, kind, program)| hook(name, kind, program)).collect()
}

fn observing_hook(skeleton: &KubelaneSkel<'_>) -> Result<Hook> {
    hook(TCP_STATES, libbpf_sys::BPF_CGROUP_SOCK_OPS, skeleton.progs.tcp_states.as_fd())
}

fn hook(name: &'static str, kind: libbpf_sys::bpf_attach_type, program: BorrowedFd<'_>) -> Result<Hook> {
    let program = program.try_clone_to_owned().context("cannot keep a BPF program")?;
    Ok(Hook { name, kind, program })
}

impl SocketHooks {
    /// Attaches all. [`Attached::Replaced`]: all that translate took an earlier daemon's place.
    pub(super) fn attach(
        skeleton: &KubelaneSkel<'_>,
        cgroup: Cgroup,
        pin_path: &Path,
        counting: Counting,
    ) -> Result<(SocketHooks, Attached)> {
        let hooks = Hooks { serving: serving_hooks(skeleton)?, observer: None };
        let links = pinned::links_directory(pin_path);
        let all = SocketHooks { cgroup: Arc::new(cgroup), hooks: Arc::new(Mutex::new(hooks)), links };
        let mut outcome = Attached::Replaced;
        let mut hooks = all.lock();
        for hook in &hooks.serving {
            if all.attach_one(hook)? == Attached::New {
                outcome = Attached::New;
            }
        }
        if counting == Counting::Traffic {
            let observer = observing_hook(skeleton)?;
            // Somebody's older program may have the hook for itself. To serve is more than to measure.
            match all.attach_one(&observer) {
                Ok(_) => hooks.observer = Some(observer),
                Err(error) => tracing::warn!("--service-traffic does not measure TCP sockets: {error:#}"),
            }
        } else {
            take_off(&all.links.join(TCP_STATES))?;
        }
        drop(hooks);
        Ok((all, outcome))
    }

    /// What [`SocketHooks::replace`] is given.
    pub(super) fn successors(&self, skeleton: &KubelaneSkel<'_>) -> Result<Hooks> {
        let observer = self.lock().observer.is_some().then(|| observing_hook(skeleton)).transpose()?;
        Ok(Hooks { serving: serving_hooks(skeleton)?, observer })
    }

    /// These programs take the place of the running ones, each atomically, wherever these still are. Nobody looks at the
    /// attachments meanwhile.
    pub(super) fn replace(&self, successors: Hooks) {
        let mut hooks = self.lock();
        *hooks = successors;
        for hook in hooks.serving.iter().chain(&hooks.observer) {
            let replaced = link::pinned(&self.links.join(hook.name)).and_then(|pinned| match pinned {
                Some((link, info)) if self.is_attached_here(&info) => Ok(link::update(&link, hook.program.as_fd())?),
                // The next look at the attachments finds that out, too.
                _ => Ok(()),
            });
            if let Err(error) = replaced {
                tracing::warn!("cannot replace the program of cgroup hook {}: {error:#}", hook.name);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Hooks> {
        self.hooks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Names of all hooks, in the order in which to attach to them.
    pub fn names(&self) -> Vec<&'static str> {
        self.lock().serving.iter().map(|hook| hook.name).collect()
    }

    /// Names of the hooks whose program is no longer attached, or pinned; in the same order.
    pub fn missing(&self) -> Result<Vec<&'static str>> {
        let mut missing = Vec::new();
        for hook in &self.lock().serving {
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
        let hooks = self.lock();
        hooks.observer.as_ref().map(|hook| Ok((hook.name, self.is_there(hook)?))).transpose()
    }

    /// Attaches and pins the program of one hook again.
    pub fn restore(&self, name: &str) -> Result<()> {
        let hooks = self.lock();
        let hook = hooks.serving.iter().chain(&hooks.observer).find(|hook| hook.name == name);
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
