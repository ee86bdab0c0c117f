//! A BPF file system and a cgroup of a test's own, for programs that are loaded without a node around them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use kubelane::abi::FlowLimits;
use kubelane::bpf::Settings;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::cgroup;

/// Names begin with this, the process and a number.
const PREFIX: &str = "klpins-";

/// Both are removed when it is dropped.
#[derive(Debug)]
pub struct Pins {
    pub bpffs: PathBuf,
    pub cgroup: PathBuf,
}

impl Pins {
    /// Removes what processes that were killed left behind first.
    pub fn new() -> Pins {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        static SWEEP: Once = Once::new();
        SWEEP.call_once(sweep);
        let pins = Pins::named(&format!("{PREFIX}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir(&pins.bpffs).unwrap();
        mount(Some("bpf"), &pins.bpffs, Some("bpf"), MsFlags::empty(), None::<&str>)
            .expect("these tests need root and BPF");
        fs::create_dir(&pins.cgroup).unwrap();
        pins
    }

    fn named(name: &str) -> Pins {
        let mount_point = cgroup::mount_point().expect("these tests need cgroup2");
        Pins { bpffs: std::env::temp_dir().join(name), cgroup: mount_point.join(name) }
    }

    pub fn settings(&self) -> Settings {
        Settings {
            pin_path: self.bpffs.join("kl"),
            cgroup: self.cgroup.clone(),
            max_endpoints: 1024,
            max_services: 64,
            max_source_ranges: 65_536,
            discard_newer: false,
            flow_limits: FlowLimits::default(),
            tcp_be_liberal: false,
            host_sockets_only: false,
            has_pod_devices: true,
            external_cluster_ips: false,
        }
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = umount2(&self.bpffs, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&self.bpffs);
        let _ = cgroup::remove(&self.cgroup);
    }
}

fn sweep() {
    let entries = fs::read_dir(std::env::temp_dir()).unwrap().flatten();
    for name in entries.filter_map(|entry| entry.file_name().into_string().ok()) {
        let process = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            drop(Pins::named(&name));
        }
    }
}
