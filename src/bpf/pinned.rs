//! What lives on in the kernel when the daemon is not there: the pin directory, and its lock.
//!
//! ```text
//! <pin path>/v3/maps/<map>       the state: ids, backends, frontends, flows
//! <pin path>/v3/links/<program>  each keeps one program attached to the cgroup, or to a device (see `hook`)
//! <pin path>/v3/handing-over/    a mark: `cleanup` hands connections over to netfilter
//! ```

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use libbpf_rs::MapHandle;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::MsFlags;

use super::link;
use crate::abi::abi_version::ABI_VERSION;

/// Where bpffs is by convention, and where it is mounted if nobody has.
pub const BPFFS: &str = "/sys/fs/bpf";

/// linux/magic.h.
const BPF_FS_MAGIC: i64 = 0xcafe4a11;

/// Parts of a version's directory: what is pinned, and the mark of a cleanup that hands connections over.
pub(super) const LINKS: &str = "links";
pub(super) const MAPS: &str = "maps";
pub(super) const HANDING_OVER: &str = "handing-over";

/// The directory of this ABI version.
pub fn abi_directory(pin_path: &Path) -> PathBuf {
    pin_path.join(format!("v{ABI_VERSION}"))
}

pub fn maps_directory(pin_path: &Path) -> PathBuf {
    abi_directory(pin_path).join(MAPS)
}

/// The map `name` of this ABI version.
///
/// # Errors
/// When it is not there, or the kernel refuses.
pub(super) fn open_map(pin_path: &Path, name: &str) -> Result<MapHandle> {
    open_map_at(&maps_directory(pin_path).join(name))
}

pub(super) fn open_map_at(path: &Path) -> Result<MapHandle> {
    MapHandle::from_pinned_path(path).with_context(|| format!("cannot open the pinned map {}", path.display()))
}

/// Fails with a remedy when nothing of this ABI version is pinned there.
pub fn expect_state(pin_path: &Path) -> Result<()> {
    let at = pin_path.display();
    if maps_directory(pin_path).try_exists().with_context(|| format!("cannot look into {at}"))? {
        return Ok(());
    }
    let others = fs::read_dir(pin_path).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut others: Vec<PathBuf> = others.filter(|path| is_abi_directory(path)).collect();
    others.sort();
    let name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match others.last().map(name) {
        Some(other) => bail!(
            "the state below {at} has map ABI {other}, and this binary reads v{ABI_VERSION} only: use the binary of \
             the daemon that created it"
        ),
        None => bail!("no kubelane state below {at}: the daemon has not run with this --pin-path, or was cleaned up"),
    }
}

pub fn links_directory(pin_path: &Path) -> PathBuf {
    abi_directory(pin_path).join(LINKS)
}

/// There while a cleanup hands connections over to netfilter, and after one that did not come to its end.
pub(super) fn handing_over(pin_path: &Path) -> PathBuf {
    abi_directory(pin_path).join(HANDING_OVER)
}

/// Whether `path`, or the closest parent of it that exists, is on a BPF file system.
pub fn is_on_bpffs(path: &Path) -> bool {
    let existing = path.ancestors().find(|p| p.exists());
    existing.and_then(|p| nix::sys::statfs::statfs(p).ok()).is_some_and(|s| s.filesystem_type().0 == BPF_FS_MAGIC)
}

/// An exclusive hold on a pin directory; two daemons must not write one state. Freed with the process, however it ends.
pub struct Lock(Flock<File>);

/// Makes the directories (mounting bpffs at its usual place when it is not there) and locks them. What a newer version has
/// left there is not for this one to take over: it fails, unless that is to be discarded.
pub fn prepare(pin_path: &Path, discard_newer: bool) -> Result<Lock> {
    if !is_on_bpffs(pin_path) {
        mount_bpffs(pin_path)?;
    }
    if let Some(existing) = pin_path.ancestors().find(|path| path.exists()) {
        expect_writable(existing)?;
    }
    if let Some(newer) = newest_version(pin_path).filter(|newest| *newest > ABI_VERSION && !discard_newer) {
        let at = pin_path.display();
        bail!(
            "the state below {at} has map ABI v{newer}: a newer kubelane has run here, and this one reads v{ABI_VERSION}. \
             Start that one again; or start this one with --discard-newer-state, which makes flows from outside and \
             clients' affinity begin anew"
        );
    }
    let lock = hold(pin_path)?;
    // Of a daemon that was killed while its maps grew: what was not in use yet.
    for pin in children(&maps_directory(pin_path))?.into_iter().filter(|pin| link::is_begun(pin)) {
        fs::remove_file(&pin).with_context(|| format!("cannot remove {}", pin.display()))?;
    }
    Ok(lock)
}

/// Fails with a remedy where nothing can be pinned, and no pin be opened.
pub(super) fn expect_writable(path: &Path) -> Result<()> {
    let at = path.display();
    let system = nix::sys::statvfs::statvfs(path).with_context(|| format!("cannot look into {at}"))?;
    if system.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY) {
        bail!(
            "the BPF file system of {at} is mounted read-only: what is attached serves on, but nothing can be attached \
             or inspected; mount it writable (`mount -o remount,rw DIRECTORY`; in a container, a volume that is not \
             readOnly)"
        );
    }
    Ok(())
}

/// Makes the directories and locks them.
pub(super) fn hold(pin_path: &Path) -> Result<Lock> {
    let lock = loop {
        create(pin_path)?;
        if let Some(lock) = lock(pin_path, "stop it first, or give this one its own --pin-path")? {
            break lock;
        }
    };
    make_directories(pin_path)?;
    Ok(lock)
}

/// By whoever holds the pin directory.
pub(super) fn make_directories(pin_path: &Path) -> Result<()> {
    [maps_directory(pin_path), links_directory(pin_path)].iter().try_for_each(|directory| create(directory))
}

fn create(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))
}

fn newest_version(pin_path: &Path) -> Option<u32> {
    let versions = fs::read_dir(pin_path).into_iter().flatten().flatten().map(|entry| entry.path());
    versions.filter(|path| is_abi_directory(path)).filter_map(|path| abi_version_of(&path)).max()
}

fn mount_bpffs(pin_path: &Path) -> Result<()> {
    if !pin_path.starts_with(BPFFS) {
        let path = pin_path.display();
        bail!(
            "--pin-path {path} is not on a BPF file system; mount one there: mkdir -p {path} && mount -t bpf bpf {path}"
        );
    }
    if has_own_mounts() {
        bail!(
            "the node has no BPF file system at {BPFFS}, and one mounted in this container would disappear with it: \
             run `mount -t bpf bpf {BPFFS}` on the node (systemd does so at boot)"
        );
    }
    nix::mount::mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
        .with_context(|| format!("no BPF file system at {BPFFS}, and it cannot be mounted"))?;
    tracing::info!("mounted a BPF file system at {BPFFS}");
    Ok(())
}

/// Whether this process has other mounts than the first process of its PID namespace; `false` when it may not know.
fn has_own_mounts() -> bool {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    matches!((namespace("self"), namespace("1")), (Some(own), Some(first)) if own != first)
}

/// `None`: there is no such directory, or none any more. A cleanup may have taken it away after it was opened here; whoever
/// locked what is left of it would hold nothing, beside a daemon that has made it anew.
pub(super) fn lock(pin_path: &Path, remedy: &str) -> Result<Option<Lock>> {
    let directory = match File::open(pin_path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.with_context(|| format!("cannot open {}", pin_path.display()))?,
    };
    let lock = match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Lock(lock),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
            bail!("a running kubelane holds {}: {remedy}", pin_path.display())
        }
        Err((_, error)) => return Err(error).with_context(|| format!("cannot lock {}", pin_path.display())),
    };
    Ok(lock.is_of(pin_path)?.then_some(lock))
}

impl Lock {
    /// A path to what is locked, whatever has become of its name.
    pub(super) fn reach(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }

    /// Whether what is locked still is the directory of this name.
    pub(super) fn is_of(&self, pin_path: &Path) -> Result<bool> {
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let locked = self.0.metadata().map(identity);
        match fs::metadata(pin_path).map(identity) {
            Ok(named) => Ok(named == locked.with_context(|| format!("cannot stat {}", pin_path.display()))?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error).with_context(|| format!("cannot look into {}", pin_path.display())),
        }
    }
}

fn abi_version_of(path: &Path) -> Option<u32> {
    let digits = path.file_name()?.to_str()?.strip_prefix('v')?;
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
}

pub(super) fn is_abi_directory(path: &Path) -> bool {
    abi_version_of(path).is_some() && path.is_dir()
}

/// What is in a directory, sorted.
pub(super) fn children(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).and_then(|d| d.map(|e| e.map(|e| e.path())).collect::<io::Result<Vec<_>>>());
    let mut entries = entries.with_context(|| format!("cannot read {}", directory.display()))?;
    entries.sort();
    Ok(entries)
}
