//! The pins of a running daemon, which somebody may take away: the BPF file system is mounted read-only, or unmounted and
//! mounted anew, which is an empty one. While the daemon holds the old directory open nothing that was pinned there goes,
//! so that all of it can be pinned again where it belongs, and no packet is without its program meanwhile.

use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, bail};

use super::link;
use super::pinned::{self, Lock, children};

/// Shared by all who need the pins to be there.
#[derive(Clone)]
pub struct Pins(Arc<Held>);

struct Held {
    path: PathBuf,
    /// By name.
    maps: Mutex<Vec<(OsString, OwnedFd)>>,
    lock: Mutex<Lock>,
}

impl Pins {
    /// Of a directory in which everything has been pinned.
    pub(super) fn new(path: &Path, lock: Lock) -> Result<Pins> {
        let maps = children(&pinned::maps_directory(path))?;
        let maps = maps.iter().map(|pin| Ok((name_of(pin), open(pin)?))).collect::<Result<_>>()?;
        Ok(Pins(Arc::new(Held { path: path.to_owned(), maps: Mutex::new(maps), lock: Mutex::new(lock) })))
    }

    /// Another map has been pinned in the place of the one of this name.
    pub(super) fn exchange(&self, name: &str, map: OwnedFd) {
        let mut maps = self.0.maps.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = maps.iter_mut().find(|(held, _)| held.as_os_str() == name) {
            held.1 = map;
        }
    }

    /// Pins again what is not pinned any more; answers how much that was. (A link that somebody has unpinned is attached
    /// nowhere, and not found here.)
    ///
    /// # Errors
    /// The file system is away or read-only: what to do about it.
    pub fn look_after(&self) -> Result<usize> {
        let Held { path, maps, lock } = &*self.0;
        let mut lock = lock.lock().unwrap_or_else(PoisonError::into_inner);
        let mut pinned_again = 0;
        if !lock.is_of(path)? {
            let at = path.display();
            if !pinned::is_on_bpffs(path) {
                bail!(
                    "the BPF file system of {at} has been unmounted: all is served, but only for as long as this daemon \
                     runs. Do not restart it; mount one there again (`mount -t bpf bpf DIRECTORY`), and the daemon pins \
                     everything there"
                );
            }
            pinned_again += move_links(path, &mut lock)?;
        }
        pinned::expect_writable(path)?;
        pinned::make_directories(path)?;
        let directory = pinned::maps_directory(path);
        for (name, map) in maps.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let pin = directory.join(name);
            if !pin.exists() {
                link::pin(map.as_fd(), &pin)?;
                pinned_again += 1;
            }
        }
        Ok(pinned_again)
    }
}

/// From the directory that is held to the one that has its name now, and holds that.
fn move_links(path: &Path, lock: &mut Lock) -> Result<usize> {
    let fresh = pinned::hold(path)?;
    let former = pinned::links_directory(&lock.reach());
    let pins = if former.exists() { children(&former)? } else { Vec::new() };
    for pin in &pins {
        link::pin(open(pin)?.as_fd(), &pinned::links_directory(path).join(name_of(pin)))?;
    }
    *lock = fresh;
    Ok(pins.len())
}

fn name_of(pin: &Path) -> OsString {
    pin.file_name().unwrap_or_default().to_owned()
}

/// Whatever is pinned there.
fn open(pin: &Path) -> Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes()).context("a pin path holds a NUL byte")?;
    // SAFETY: `path` is a NUL-terminated string that outlives the call.
    let fd = unsafe { libbpf_sys::bpf_obj_get(path.as_ptr()) };
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(-fd))
            .with_context(|| format!("cannot open the pin {}", pin.display()));
    }
    // SAFETY: the kernel has just given this descriptor to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
