//! Network namespaces: the daemon's own, and the way into a pod's.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};

/// asm-generic/socket.h (5.14).
const SO_NETNS_COOKIE: libc::c_int = 71;

/// The cookie of the calling thread's network namespace; `None` before 5.14.
pub fn own_cookie() -> Option<u64> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    use std::os::fd::AsRawFd;
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).ok()?;
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the option writes at most `length` bytes to `cookie`, which is that long.
    let result = unsafe {
        let value: *mut u64 = &mut cookie;
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, value.cast(), &mut length)
    };
    (result == 0).then_some(cookie)
}

/// Where container runtimes and iproute2 keep handles of namespaces.
const HANDLE_DIRECTORIES: [&str; 2] = ["/run/netns", "/run/docker/netns"];

/// Finds a handle for each wanted namespace (inode number): the daemon's own, the runtimes' handle directories, and
/// the processes that /proc shows (all of the node's when the daemon shares its PID namespace). Those that have no
/// handle anywhere are missing from the result.
pub fn find(wanted: &[u32]) -> HashMap<u32, PathBuf> {
    let mut found = HashMap::new();
    let own = std::iter::once(PathBuf::from("/proc/self/ns/net"));
    let handles = HANDLE_DIRECTORIES.iter().flat_map(|d| entries(Path::new(d)));
    let processes = entries(Path::new("/proc")).filter(|p| is_process(p)).map(|p| p.join("ns/net"));
    for path in own.chain(handles).chain(processes) {
        if found.len() == wanted.len() {
            break;
        }
        let Ok(metadata) = fs::metadata(&path) else { continue };
        let inum = metadata.ino() as u32;
        if wanted.contains(&inum) {
            found.entry(inum).or_insert(path);
        }
    }
    found
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|e| e.path())
}

fn is_process(path: &Path) -> bool {
    path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()))
}

/// Runs `work` inside the namespace, on a thread of its own: a namespace belongs to a thread, and this one ends.
pub fn run_inside<T: Send>(namespace: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let file = File::open(namespace).with_context(|| format!("cannot open {}", namespace.display()))?;
    let inside = || {
        setns(file.as_fd(), CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("cannot enter {} (CAP_SYS_ADMIN is needed)", namespace.display()))?;
        work()
    };
    std::thread::scope(|scope| match scope.spawn(inside).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
