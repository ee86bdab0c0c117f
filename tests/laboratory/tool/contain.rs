//! What a container runtime does with a pod that has the host's network and PID namespaces: mounts and a cgroup
//! namespace of its own, a root file system that cannot be written to, a fixed set of capabilities; then exec.
//!
//! The root directory must have the directories of the mounts, as runtimes make them in an image.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context as _, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// The last one that any kernel may have; those that this one lacks are passed over.
const LAST_CAPABILITY: u32 = 63;

/// A directory of the host in the container: `SOURCE:TARGET`, with `:ro` and `:follow` (mounts made below it later
/// appear in the container) behind it.
#[derive(Clone, Debug)]
pub struct Bind {
    source: PathBuf,
    target: PathBuf,
    read_only: bool,
    follow: bool,
}

impl FromStr for Bind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(':');
        let (Some(source), Some(target)) = (parts.next(), parts.next()) else {
            return Err("SOURCE:TARGET is expected".to_owned());
        };
        let mut bind = Bind { source: source.into(), target: target.into(), read_only: false, follow: false };
        for part in parts {
            match part {
                "ro" => bind.read_only = true,
                "follow" => bind.follow = true,
                _ => return Err(format!("{part:?} is neither ro nor follow")),
            }
        }
        Ok(bind)
    }
}

#[derive(clap::Args)]
pub struct Options {
    /// The container's root directory.
    #[arg(long)]
    root: PathBuf,
    #[arg(long)]
    bind: Vec<Bind>,
    /// Numbers of the capabilities that are left (linux/capability.h).
    #[arg(long, value_delimiter = ',')]
    capabilities: Vec<u32>,
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

pub fn run(options: &Options) -> anyhow::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP).context("leaving the host's namespaces")?;
    let root = &options.root;
    // Nothing mounted here reaches the host; what the host mounts reaches those that follow.
    change(Path::new("/"), MsFlags::MS_SLAVE)?;
    bind_to(root, root)?;
    system_mounts(root)?;
    for bind in &options.bind {
        let target = root.join(bind.target.strip_prefix("/").context("a mount's target is absolute")?);
        bind_to(&bind.source, &target)?;
        change(&target, if bind.follow { MsFlags::MS_SLAVE } else { MsFlags::MS_PRIVATE })?;
        if bind.read_only {
            read_only(&target)?;
        }
    }
    read_only(root)?;
    nix::unistd::chroot(root).context("changing the root")?;
    nix::unistd::chdir("/").context("changing to the root")?;
    drop_capabilities(&options.capabilities)?;
    let (program, arguments) = options.command.split_first().context("no command")?;
    let error = Command::new(program).args(arguments).exec();
    Err(error).with_context(|| format!("running {program}"))
}

/// /proc, /sys and the container's own view of its cgroup, as runtimes mount them where nothing is `privileged`.
fn system_mounts(root: &Path) -> anyhow::Result<()> {
    let new = |kind: &str, target: &str, flags| {
        mount(Some(kind), &root.join(target), Some(kind), flags, None::<&str>)
            .with_context(|| format!("mounting {kind}"))
    };
    new("proc", "proc", MsFlags::empty())?;
    let sysctls = root.join("proc/sys");
    bind_to(&sysctls, &sysctls)?;
    read_only(&sysctls)?;
    new("sysfs", "sys", MsFlags::MS_RDONLY)?;
    new("cgroup2", "sys/fs/cgroup", MsFlags::MS_RDONLY)
}

fn bind_to(source: &Path, target: &Path) -> anyhow::Result<()> {
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .with_context(|| format!("mounting {} at {}", source.display(), target.display()))
}

fn change(target: &Path, propagation: MsFlags) -> anyhow::Result<()> {
    mount(None::<&str>, target, None::<&str>, propagation | MsFlags::MS_REC, None::<&str>)
        .with_context(|| format!("changing the propagation of {}", target.display()))
}

fn read_only(target: &Path) -> anyhow::Result<()> {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(None::<&str>, target, None::<&str>, flags, None::<&str>)
        .with_context(|| format!("making {} read-only", target.display()))
}

/// Takes the others out of the bounding set: root has what is left of it after exec (capabilities(7)).
fn drop_capabilities(kept: &[u32]) -> anyhow::Result<()> {
    for capability in (0..=LAST_CAPABILITY).filter(|capability| !kept.contains(capability)) {
        // SAFETY: PR_CAPBSET_DROP takes a number and touches no memory.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) };
        let error = std::io::Error::last_os_error();
        let is_unknown = error.raw_os_error() == Some(libc::EINVAL);
        ensure!(result == 0 || is_unknown, "dropping capability {capability}: {error}");
    }
    Ok(())
}
