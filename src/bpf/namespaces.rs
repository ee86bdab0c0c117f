//! Network namespaces: the daemon's own, and the way into a pod's.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, statfs};

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

/// A handle of the calling thread's own.
const OWN: &str = "/proc/thread-self/ns/net";

/// Where container runtimes and iproute2 keep handles of namespaces.
const HANDLE_DIRECTORIES: [&str; 2] = ["/run/netns", "/run/docker/netns"];

/// The network namespaces that can be found.
#[derive(Debug, Default)]
pub struct Namespaces {
    /// One handle for each, by inode number.
    pub handles: HashMap<u32, PathBuf>,
    /// Processes whose namespace may not be looked at.
    pub hidden: usize,
}

/// Every network namespace that has a handle: the calling thread's, those of the runtimes' handle directories, and of
/// the processes that /proc shows (all of the node's when the daemon shares its PID namespace).
pub fn all() -> Namespaces {
    let mut namespaces = Namespaces::default();
    let own = std::iter::once(PathBuf::from(OWN));
    let handles = HANDLE_DIRECTORIES.iter().flat_map(|d| entries(Path::new(d)));
    let processes = entries(Path::new("/proc")).filter(|p| is_process(p)).map(|p| p.join("ns/net"));
    for path in own.chain(handles).chain(processes) {
        match fs::metadata(&path) {
            Ok(metadata) if is_namespace(&path) => {
                namespaces.handles.entry(metadata.ino() as u32).or_insert(path);
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => namespaces.hidden += 1,
            // A process that has ended, or the file that a handle was once mounted on.
            _ => {}
        }
    }
    namespaces
}

/// The calling thread's alone.
pub fn own() -> Namespaces {
    let inode = fs::metadata(OWN).map(|metadata| metadata.ino() as u32);
    Namespaces { handles: inode.into_iter().map(|inode| (inode, PathBuf::from(OWN))).collect(), hidden: 0 }
}

fn is_namespace(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| found.filesystem_type() == NSFS_MAGIC)
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|e| e.path())
}

fn is_process(path: &Path) -> bool {
    path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()))
}

/// What `work` gives in each network namespace but the calling thread's, and how many could not be looked into.
pub fn in_other_namespaces<T: Send>(work: impl Fn() -> T + Sync) -> (Vec<T>, usize) {
    let own = fs::metadata(OWN).map(|metadata| metadata.ino() as u32).ok();
    let Namespaces { handles, mut hidden } = all();
    let mut results = Vec::new();
    for (_, handle) in handles.iter().filter(|(inode, _)| Some(**inode) != own) {
        match run_inside(handle, &work) {
            Ok(result) => results.push(result),
            Err(_) => hidden += 1,
        }
    }
    (results, hidden)
}

/// A client of Services on this node, as session affinity knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    /// Of its network namespace; `None` before 5.14, where the kernel does not tell.
    pub cookie: Option<u64>,
    /// It is in the namespace of whoever asks.
    pub is_own: bool,
}

/// The namespaces in which a device has this address (mostly one), and how many could not be looked into.
pub fn find_clients(ip: IpAddr) -> (Vec<Client>, usize) {
    let own = fs::metadata(OWN).map(|metadata| metadata.ino() as u32).ok();
    let namespaces = all();
    let (mut found, mut hidden) = (Vec::new(), namespaces.hidden);
    for (inode, handle) in &namespaces.handles {
        let look = || has_address(ip).then(own_cookie);
        match run_inside(handle, look) {
            Ok(Some(cookie)) => found.push(Client { cookie, is_own: own == Some(*inode) }),
            Ok(None) => {}
            Err(_) => hidden += 1,
        }
    }
    (found, hidden)
}

/// What can be seen of a network namespace from within.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkNamespace {
    /// Without loopback's and those of links.
    pub addresses: Vec<IpAddr>,
    /// What the UTS namespace of its processes is called.
    pub host: Option<String>,
}

/// The network namespace with this cookie, which `process` was in a moment ago; nothing is known of one that has no handle,
/// and before 5.14 of none.
pub fn look_into(cookie: u64, process: u32) -> NetworkNamespace {
    let of_process = Path::new("/proc").join(process.to_string());
    if let Some(found) = look_through(&of_process.join("ns/net"), cookie, Some(&of_process.join("ns/uts"))) {
        return found;
    }
    // It has ended; others of the pod may be there.
    let find = |handle: &PathBuf| look_through(handle, cookie, handle.parent().map(|path| path.join("uts")).as_deref());
    all().handles.values().find_map(find).unwrap_or_default()
}

/// `None`: it is another one. `uts`: a handle of the UTS namespace, if there is one.
fn look_through(handle: &Path, cookie: u64, uts: Option<&Path>) -> Option<NetworkNamespace> {
    let look = || (own_cookie() == Some(cookie)).then(own_addresses);
    let addresses = run_inside(handle, look).ok()??;
    let is_link_local = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    let addresses = addresses.into_iter().filter(|ip| !ip.is_loopback() && !is_link_local(ip)).collect();
    Some(NetworkNamespace { addresses, host: uts.and_then(host_name) })
}

/// What a UTS namespace is called.
fn host_name(uts: &Path) -> Option<String> {
    let file = File::open(uts).ok()?;
    let inside = || {
        setns(file.as_fd(), CloneFlags::CLONE_NEWUTS).ok()?;
        Some(nix::sys::utsname::uname().ok()?.nodename().to_string_lossy().into_owned())
    };
    // A namespace belongs to a thread, and this one ends.
    std::thread::scope(|scope| scope.spawn(inside).join().ok().flatten())
}

/// Whether a device of the calling thread's namespace has this address.
fn has_address(ip: IpAddr) -> bool {
    own_addresses().contains(&ip)
}

/// Those of the devices of the calling thread's namespace.
fn own_addresses() -> Vec<IpAddr> {
    let addresses = nix::ifaddrs::getifaddrs().into_iter().flatten().filter_map(|device| device.address);
    let ip = |address: nix::sys::socket::SockaddrStorage| {
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        v4.or(address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
    };
    addresses.filter_map(ip).collect()
}

/// What `work` gives inside the namespace, on a thread of its own: a namespace belongs to a thread, and this one ends.
/// The caller's own needs neither a thread nor a right. Fails when the namespace cannot be entered.
pub fn run_inside<T: Send>(namespace: &Path, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    if namespace == Path::new(OWN) {
        return Ok(work());
    }
    let file = File::open(namespace)?;
    let inside = || {
        setns(file.as_fd(), CloneFlags::CLONE_NEWNET)?;
        Ok(work())
    };
    std::thread::scope(|scope| match scope.spawn(inside).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
