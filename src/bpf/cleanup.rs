//! Taking away what lives on in the kernel: all of it, or what other versions left.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, anyhow};

use super::hand_over::{HandOver, HandedOver};
use super::hook;
use super::pinned::{HANDING_OVER, LINKS, MAPS, abi_directory, children, handing_over, is_abi_directory, lock};

/// What [`cleanup`] did.
#[derive(Debug)]
pub struct Cleanup {
    /// Names of what was removed; empty when there was nothing.
    pub removed: Vec<String>,
    /// An error: they could not be handed over, and end.
    pub connections: Result<HandedOver>,
    /// An error: what could not be removed once the programs were detached.
    pub rest: Result<()>,
}

/// Hands the node's connections over to netfilter, and removes everything below `pin_path` and the directory itself: links
/// first, so that no program runs on a map that is going away.
///
/// # Errors
/// While a daemon holds the directory, and when a program cannot be detached.
pub fn cleanup(pin_path: &Path) -> Result<Cleanup> {
    let _lock = loop {
        if !pin_path.try_exists().with_context(|| format!("cannot look into {}", pin_path.display()))? {
            return Ok(Cleanup { removed: Vec::new(), connections: Ok(HandedOver::default()), rest: Ok(()) });
        }
        if let Some(lock) = lock(pin_path, "stop it first")? {
            break lock;
        }
    };
    let mut versions = children(pin_path)?;
    versions.retain(|p| is_abi_directory(p));
    let own = abi_directory(pin_path);
    // What an interrupted cleanup has detached is netfilter's by now, and the maps do not know what has become of it.
    let flows = is_attached(&own).then(|| begin_hand_over(pin_path));
    let other = versions.iter().find(|version| **version != own && is_attached(version));
    let mut removed = Vec::new();
    for version in &versions {
        remove_part(version, LINKS, &mut removed).context(
            "not all programs are detached, and connections that were handed over to netfilter stand still: run it again, \
             or start the daemon",
        )?;
    }
    let connections = match (flows, other) {
        (Some(flows), _) => flows.and_then(|mut flows| flows.pass().map(|()| flows.outcome())),
        (None, Some(other)) => {
            Err(anyhow!("{} is another version's, whose own cleanup hands them over", other.display()))
        }
        (None, None) => Ok(HandedOver::default()),
    };
    let rest = versions.iter().try_for_each(|version| remove_abi_directory(version, &mut removed));
    let rest = rest.and_then(|()| match fs::remove_dir(pin_path) {
        Ok(()) => {
            removed.push(pin_path.display().to_string());
            Ok(())
        }
        // Somebody else's file, or the mount point of the BPF file system: not ours to take.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTEMPTY | libc::EBUSY | libc::EPERM)) => Ok(()),
        Err(e) => Err(e).with_context(|| format!("cannot remove {}", pin_path.display())),
    });
    Ok(Cleanup { removed, connections, rest })
}

/// Whether anything of this version is.
fn is_attached(version: &Path) -> bool {
    children(&version.join(LINKS)).is_ok_and(|links| !links.is_empty())
}

/// Finishes a cleanup that was interrupted when it had detached all programs: nothing has served since, and what it has left
/// of the maps is not the state of anything. Answers whether there was one.
///
/// # Errors
/// When something cannot be removed.
pub(super) fn finish(pin_path: &Path) -> Result<bool> {
    let own = abi_directory(pin_path);
    if is_attached(&own) || !handing_over(pin_path).exists() {
        return Ok(false);
    }
    remove_abi_directory(&own, &mut Vec::new())?;
    Ok(true)
}

/// The mark is there before netfilter has anything, for the next start, should this be interrupted ([`take_back`]).
///
/// [`take_back`]: super::hand_over::take_back
fn begin_hand_over(pin_path: &Path) -> Result<HandOver> {
    let mark = handing_over(pin_path);
    match fs::create_dir(&mark) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("cannot create {}", mark.display()));
        }
        _ => {}
    }
    let mut flows = HandOver::open(pin_path)?;
    flows.pass()?;
    Ok(flows)
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
    for part in [LINKS, MAPS, HANDING_OVER] {
        remove_part(version, part, removed)?;
    }
    fs::remove_dir(version).with_context(|| format!("cannot remove {}", version.display()))
}

fn remove_part(version: &Path, part: &str, removed: &mut Vec<String>) -> Result<()> {
    let directory = version.join(part);
    if !directory.exists() {
        return Ok(());
    }
    for pin in children(&directory)? {
        if part == LINKS {
            hook::remove_pin(&pin)?;
        } else {
            fs::remove_file(&pin).with_context(|| format!("cannot remove the pin {}", pin.display()))?;
        }
        removed.push(pin.display().to_string());
    }
    fs::remove_dir(&directory).with_context(|| format!("cannot remove {}", directory.display()))
}
