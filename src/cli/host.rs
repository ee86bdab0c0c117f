//! What the command line must know of its host: the cgroup2 mount and the host's name.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context as _, ensure};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

pub const CGROUP_REMEDY: &str =
    "mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified, or name a cgroup2 directory with --cgroup";

/// The cgroup whose processes are served.
#[derive(Debug, PartialEq, Eq)]
pub struct Cgroup {
    pub path: PathBuf,
    /// Whether it is the root of the hierarchy, so that no process of the node is left out.
    pub is_root: bool,
}

/// The cgroup given with --cgroup, or the first mount of cgroup2, the hierarchy's root preferred. A container with a
/// cgroup namespace of its own may see a mount whose top is no more than the container itself.
///
/// # Errors
/// When there is none, or `wanted` is not a directory of a cgroup2 hierarchy.
pub fn find_cgroup(wanted: Option<&Path>) -> anyhow::Result<Cgroup> {
    if let Some(path) = wanted {
        return open_cgroup(path).context("--cgroup");
    }
    let text = fs::read("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?;
    let mounts = cgroup2_mounts(&text);
    let mut found: Vec<Cgroup> = mounts.iter().filter_map(|path| open_cgroup(path).ok()).collect();
    found.sort_by_key(|cgroup| !cgroup.is_root);
    found.into_iter().next().with_context(|| format!("no cgroup2 filesystem is mounted: {CGROUP_REMEDY}"))
}

fn open_cgroup(path: &Path) -> anyhow::Result<Cgroup> {
    let magic = statfs(path).with_context(|| format!("cannot use {}", path.display()))?.filesystem_type();
    ensure!(magic == CGROUP2_SUPER_MAGIC, "{} is not in a cgroup2 hierarchy: {CGROUP_REMEDY}", path.display());
    ensure!(path.is_dir(), "{} is not a directory", path.display());
    // Only the root of the whole hierarchy has no cgroup.events (kernel: Documentation/admin-guide/cgroup-v2.rst).
    let is_root = !path.join("cgroup.events").exists();
    Ok(Cgroup { path: path.to_owned(), is_root })
}

/// Mount points of type cgroup2 in a mountinfo table, in order (proc_pid_mountinfo(5)).
fn cgroup2_mounts(mountinfo: &[u8]) -> Vec<PathBuf> {
    let mut mounts = Vec::new();
    for line in mountinfo.split(|b| *b == b'\n') {
        let fields: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
        // Optional fields end with a lone hyphen; the type follows it.
        let hyphen = fields.iter().skip(6).position(|f| *f == b"-");
        let kind = hyphen.and_then(|at| fields.get(6 + at + 1));
        if let (Some(&b"cgroup2"), Some(point)) = (kind, fields.get(4)) {
            mounts.push(PathBuf::from(OsString::from_vec(unescape(point))));
        }
    }
    mounts
}

/// Space, tab, newline and backslash are written as three octal digits after a backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|d| first == b'\\' && d.iter().all(|b| (b'0'..b'8').contains(b)));
        if let Some(digits) = octal {
            plain.push(digits.iter().fold(0u8, |n, d| n.wrapping_mul(8).wrapping_add(d - b'0')));
            rest = &after[3..];
        } else {
            plain.push(first);
            rest = after;
        }
    }
    plain
}

/// This node's name: the flag's (or $NODE_NAME's) value, else the host name; trimmed and in lower case, as kube-proxy
/// does, because names of Node objects are.
///
/// # Errors
/// When the host has no name.
pub fn node_name(wanted: Option<&str>) -> anyhow::Result<String> {
    let wanted = wanted.map(str::trim).filter(|name| !name.is_empty()).map(str::to_lowercase);
    if let Some(name) = wanted {
        return Ok(name);
    }
    let name = fs::read_to_string("/proc/sys/kernel/hostname").context("reading the host name")?;
    let name = name.trim().to_lowercase();
    ensure!(!name.is_empty() && name != "(none)", "the host has no name: give --hostname-override or $NODE_NAME");
    Ok(name)
}

/// How many processors are running: the node's, whatever a container may use of them.
pub fn processors() -> u32 {
    let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    online_processors(&online).unwrap_or_else(|| thread::available_parallelism().map_or(1, |n| n.get() as u32))
}

/// In a list such as `0-3,6` (Documentation/admin-guide/cputopology.rst).
fn online_processors(list: &str) -> Option<u32> {
    let count = |range: &str| -> Option<u32> {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        last.checked_sub(first)?.checked_add(1)
    };
    list.trim().split(',').map(count).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_counted_in_lists_of_ranges() {
        let table = [("0\n", Some(1)), ("0-3\n", Some(4)), ("0-1,4,6-7", Some(5)), ("", None), ("3-1", None)];
        for (list, expected) in table {
            assert_eq!(online_processors(list), expected, "{list:?}");
        }
        assert!(processors() >= 1);
    }

    const HYBRID: &str = "\
22 28 0:21 / /sys rw,nosuid shared:7 - sysfs sysfs rw
25 22 0:24 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,mode=755
26 25 0:25 / /sys/fs/cgroup/unified rw,nosuid shared:10 master:3 - cgroup2 cgroup2 rw,nsdelegate
27 25 0:26 / /sys/fs/cgroup/systemd rw,nosuid shared:11 - cgroup cgroup rw,name=systemd
";

    #[test]
    fn cgroup2_mounts_are_found_in_any_mountinfo() {
        let table = [
            ("hybrid hierarchy", HYBRID, vec!["/sys/fs/cgroup/unified"]),
            (
                "unified, no optional fields",
                "30 22 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup rw",
                vec!["/sys/fs/cgroup"],
            ),
            ("blanks in the path", r"31 22 0:27 / /mnt/a\040b\134c rw x:1 - cgroup2 c rw", vec![r"/mnt/a b\c"]),
            ("a mount named like the type", "32 22 0:28 / /cgroup2 rw - tmpfs cgroup2 rw", vec![]),
            ("a path that is a hyphen's neighbour", "33 22 0:29 / - rw - cgroup2 cgroup2 rw", vec!["-"]),
            ("cgroup1 only", "27 25 0:26 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw", vec![]),
            ("cut short", "26 25 0:25 / /sys", vec![]),
            ("empty", "", vec![]),
        ];
        for (name, text, expected) in table {
            let expected: Vec<PathBuf> = expected.into_iter().map(PathBuf::from).collect();
            assert_eq!(cgroup2_mounts(text.as_bytes()), expected, "{name}");
        }
    }

    #[test]
    fn a_directory_elsewhere_is_not_taken_for_a_cgroup() {
        let directory = tempfile::tempdir().unwrap();
        let error = format!("{:#}", find_cgroup(Some(directory.path())).unwrap_err());
        assert!(error.starts_with("--cgroup: ") && error.contains("not in a cgroup2 hierarchy"), "{error}");
        let missing = directory.path().join("missing");
        let error = format!("{:#}", find_cgroup(Some(&missing)).unwrap_err());
        assert!(error.contains("missing") && error.contains("ENOENT"), "{error}");
    }

    #[test]
    fn a_node_name_is_trimmed_and_in_lower_case() {
        assert_eq!(node_name(Some(" Node-A ")).unwrap(), "node-a");
        let own = node_name(None).unwrap();
        assert_eq!(node_name(Some("  ")).unwrap(), own);
        assert_eq!(own, own.to_lowercase());
    }
}
