//! The end of laboratories: everything that carries the id of one goes, also of one whose owner was killed.

use std::fs::{self, File};
use std::path::Path;

use anyhow::Context as _;
use nix::mount::{MntFlags, umount2};

use super::lab::{CGROUP_PREFIX, NETNS_PREFIX, OWN, RUN};
use super::{cgroup, netns};

/// Taken for the short times in which laboratories appear or are swept, so that a new one is never taken for a dead one.
pub fn global_lock() -> anyhow::Result<File> {
    // The parent directory is what is locked: RUN itself comes and goes with the laboratories.
    let file = File::open("/run").context("opening /run")?;
    file.lock().context("locking /run")?;
    fs::create_dir_all(RUN).with_context(|| format!("creating {RUN}"))?;
    Ok(file)
}

/// Removes everything that carries the id of a laboratory whose owner is dead; returns the ids.
pub fn sweep() -> anyhow::Result<Vec<String>> {
    let _guard = global_lock()?;
    let mut swept = Vec::new();
    for entry in fs::read_dir(RUN).with_context(|| format!("reading {RUN}"))?.flatten() {
        let path = entry.path();
        let Some(id) = path.file_stem().and_then(|stem| stem.to_str()) else { continue };
        if path.extension().is_none_or(|extension| extension != "lock") {
            continue;
        }
        let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        // The kernel drops a lock with its owner, however it ended.
        if file.try_lock().is_ok() {
            remove(id)?;
            swept.push(id.to_owned());
        }
    }
    // Succeeds when no laboratory is left.
    let _ = fs::remove_dir(RUN);
    Ok(swept)
}

/// Removes a laboratory of this process, and the directory of all when it was the last.
pub(super) fn remove_and_tell(id: &str) {
    if let Err(error) = remove(id) {
        eprintln!("the laboratory {id} was not removed: {error:#}");
    }
    if let Ok(_guard) = global_lock() {
        let _ = fs::remove_dir(RUN);
    }
}

/// Removes this process's laboratories: for a signal handler thread, which then ends the process.
pub fn remove_own() {
    let ids = OWN.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
    for id in ids {
        remove_and_tell(&id);
    }
}

/// Processes first, so that nothing is in use; the lock last, so that a failure is found by the next sweep.
fn remove(id: &str) -> anyhow::Result<()> {
    let dir = Path::new(RUN).join(id);
    cgroup::remove(&cgroup::mount_point()?.join(format!("{CGROUP_PREFIX}{id}")))?;
    if let Some(mount) = cgroup::memory_mount_point() {
        cgroup::remove(&mount.join(format!("{CGROUP_PREFIX}{id}")))?;
    }
    // Sockets of its daemons are named by their pin directories.
    for pins in fs::read_dir(dir.join("bpf")).into_iter().flatten().flatten() {
        let _ = kubelane::explain::sockets_path(&pins.path()).and_then(fs::remove_file);
    }
    let _ = fs::remove_dir(kubelane::explain::DIRECTORY);
    let _ = umount2(&dir.join("bpf"), MntFlags::MNT_DETACH);
    netns::delete(&netns::with_prefix(&format!("{NETNS_PREFIX}{id}-")));
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("removing {}", dir.display()))?;
    }
    let _ = fs::remove_file(dir.with_extension("lock"));
    OWN.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).retain(|own| own != id);
    Ok(())
}
