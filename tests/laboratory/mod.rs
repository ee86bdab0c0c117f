//! The laboratory: nodes and pods as namespaces and cgroups, processes in them, the real daemon, and doubles of what it
//! talks to. tests/README.md says what there is.
//!
//! Everything that a [`Lab`] makes carries its id in the name and goes away with it; what a killed run left behind is
//! removed by the next one.
// Tests, benches and `kubelane-lab` compile this module for themselves, and each uses a part of it.
#![allow(dead_code)]

pub mod cgroup;
pub mod client;
pub mod cluster;
pub mod daemon;
pub mod lab;
pub mod load;
pub mod manifests;
pub mod messages;
pub mod netns;
pub mod pins;
pub mod process;
pub mod signals;
pub mod sweep;
pub mod tap;
pub mod tun;

// What follows takes dev-dependencies, which `kubelane-lab` does not have.
#[cfg(test)]
pub mod api_client;
#[cfg(test)]
pub mod api_cluster;
#[cfg(test)]
pub mod apiserver;
#[cfg(test)]
pub mod figures;
#[cfg(test)]
pub mod hostile_objects;
#[cfg(test)]
pub mod kustomize;
#[cfg(all(test, feature = "lab"))]
pub mod packets;
#[cfg(test)]
pub mod pki;
#[cfg(test)]
pub mod records;
#[cfg(test)]
pub mod rulesets;

use std::io::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

pub use lab::Lab;

/// The `kubelane` binary under test: cargo names it to integration tests; the lab binary finds it beside itself.
pub fn kubelane_binary() -> anyhow::Result<PathBuf> {
    binary(option_env!("CARGO_BIN_EXE_kubelane"), "kubelane")
}

/// The `kubelane-lab` binary: servers, clients and the way into a place.
pub fn lab_binary() -> anyhow::Result<PathBuf> {
    binary(option_env!("CARGO_BIN_EXE_kubelane-lab"), "kubelane-lab")
}

fn binary(from_cargo: Option<&str>, name: &str) -> anyhow::Result<PathBuf> {
    let path = match from_cargo {
        Some(path) => PathBuf::from(path),
        None => std::env::current_exe().context("finding the running binary")?.with_file_name(name),
    };
    if !path.exists() {
        bail!("{} is missing: build it with `cargo build --features lab`", path.display());
    }
    Ok(path)
}

/// Why the laboratory cannot run on this machine, with a remedy; `Ok` when it can.
pub fn preflight() -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("needs root: it makes network namespaces, cgroups and BPF programs (run it as root or with sudo)");
    }
    if !process::in_path("ip") {
        bail!("needs the `ip` command (Debian: apt-get install iproute2; `make setup` does it)");
    }
    cgroup::mount_point()?;
    let known = std::fs::read_to_string("/proc/filesystems").context("reading /proc/filesystems")?;
    if !known.lines().any(|line| line.ends_with("\tbpf")) {
        bail!("this kernel has no BPF file system (CONFIG_BPF_SYSCALL)");
    }
    if !PathBuf::from("/proc/sys/net/ipv6").exists() {
        bail!("this kernel has IPv6 switched off (ipv6.disable=1)");
    }
    Ok(())
}

/// A laboratory for a test, or `None` on a machine that cannot have one: said aloud, and counted by `make test`.
pub fn lab_or_skip(nodes: &[(&str, &[&str])]) -> Option<Lab> {
    if let Err(reason) = preflight() {
        skip(&format!("{reason:#}"));
        return None;
    }
    Some(Lab::new(nodes).expect("the laboratory can be laid out"))
}

/// Tells that a test, or a part of it, did not run. Goes past the test harness's capture, and into the file that
/// `KUBELANE_SKIPS` names.
pub fn skip(reason: &str) {
    let thread = std::thread::current();
    let line = format!("SKIPPED {}: {reason}\n", thread.name().unwrap_or("test"));
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(path) = std::env::var_os("KUBELANE_SKIPS") {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
        let _ = file.and_then(|mut file| file.write_all(line.as_bytes()));
    }
}

/// Polls until `condition` holds; `false` when it did not within `patience`.
pub fn eventually(patience: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
