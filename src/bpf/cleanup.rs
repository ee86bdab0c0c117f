//! Taking away what lives on in the kernel: all of it, or what other versions left.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::hand_over::{HandOver, HandedOver};
use super::hook;
use super::pinned::{abi_directory, children, is_abi_directory, links_directory, lock};

/// What [`cleanup`] did.
#[derive(Debug)]
pub struct Cleanup {
    /// Names of what was removed; empty when there was nothing.
    pub removed: Vec<String>,
    /// An error: netfilter could not be told of any.
    pub connections: Result<HandedOver>,
}

/// Hands the node's connections over to netfilter, and removes everything below `pin_path` and the directory itself: links
/// first, so that no program runs on a map that is going away.
///
/// # Errors
/// While a daemon holds the directory, and when something cannot be removed.
pub fn cleanup(pin_path: &Path) -> Result<Cleanup> {
    let _lock = loop {
        if !pin_path.try_exists().with_context(|| format!("cannot look into {}", pin_path.display()))? {
            return Ok(Cleanup { removed: Vec::new(), connections: Ok(HandedOver::default()) });
        }
        if let Some(lock) = lock(pin_path, "stop it first")? {
            break lock;
        }
    };
    // Nothing translates flows whose programs an interrupted cleanup has detached, and a state left half made has none.
    let is_attached = children(&links_directory(pin_path)).is_ok_and(|links| !links.is_empty());
    let mut flows = if is_attached { HandOver::open(pin_path).ok() } else { None };
    let mut hand_over = || flows.as_mut().map_or(Ok(()), HandOver::pass);
    let before = hand_over();
    let mut removed = Vec::new();
    let mut versions = children(pin_path)?;
    versions.retain(|p| is_abi_directory(p));
    for version in versions {
        remove_abi_directory(&version, &mut removed)?;
    }
    match fs::remove_dir(pin_path) {
        Ok(()) => removed.push(pin_path.display().to_string()),
        // Somebody else's file, or the mount point of the BPF file system: not ours to take.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTEMPTY | libc::EBUSY | libc::EPERM)) => {}
        Err(e) => return Err(e).with_context(|| format!("cannot remove {}", pin_path.display())),
    }
    let connections = before.and_then(|()| hand_over()).map(|()| flows.map(HandOver::outcome).unwrap_or_default());
    Ok(Cleanup { removed, connections })
}

/// Removes what other ABI versions left: called once this version's programs are attached, so that traffic is served
/// throughout (a destination that one version has translated is no service to the other).
pub fn remove_other_versions(pin_path: &Path) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    let own = abi_directory(pin_path);
    for version in children(pin_path)?.into_iter().filter(|p| is_abi_directory(p) && *p != own) {
        remove_abi_directory(&version, &mut removed)?;
    }
    Ok(removed)
}

fn remove_abi_directory(version: &Path, removed: &mut Vec<String>) -> Result<()> {
    for part in ["links", "maps"] {
        let directory = version.join(part);
        if !directory.exists() {
            continue;
        }
        for pin in children(&directory)? {
            if part == "links" {
                hook::remove_pin(&pin)?;
            } else {
                fs::remove_file(&pin).with_context(|| format!("cannot remove the pin {}", pin.display()))?;
            }
            removed.push(pin.display().to_string());
        }
        fs::remove_dir(&directory).with_context(|| format!("cannot remove {}", directory.display()))?;
    }
    fs::remove_dir(version).with_context(|| format!("cannot remove {}", version.display()))
}
