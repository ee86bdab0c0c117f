//! Looking at the daemon from outside: its rows in the pinned maps, and what /proc says of the process.

use std::collections::BTreeSet;
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use kubelane::abi::{Backend, Frontend, FrontendKey, backend_state};
use kubelane::bpf::Maps;
use kubelane::model::{Ipx, Protocol};
use kubelane::sync::{MapIo as _, MapName};
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::common::world::{BenchWorld, SERVICE_PORT};
use crate::map_path;

/// How long a watcher waits before it gives up.
const PATIENCE: Duration = Duration::from_secs(120);
/// Pause of a watcher that has to leave the processor to the daemon.
const PAUSE: Duration = Duration::from_micros(200);

/// The pinned maps, read row by row.
pub struct Eyes {
    frontends: MapHandle,
    slots: MapHandle,
    backends: MapHandle,
    addresses: MapHandle,
}

impl Eyes {
    pub fn open(pin_path: &Path) -> anyhow::Result<Eyes> {
        let open = |map: MapName| {
            let path = map_path(pin_path, map.as_str());
            MapHandle::from_pinned_path(&path).with_context(|| format!("opening {}", path.display()))
        };
        Ok(Eyes {
            frontends: open(MapName::Frontends)?,
            slots: open(MapName::Slots)?,
            backends: open(MapName::Backends)?,
            addresses: open(MapName::Addresses)?,
        })
    }

    /// Waits until the maps are there and hold every frontend and every address of the world; how long after `began`
    /// the last one was seen. Backends and slots are written before the frontends that lead to them, and are counted
    /// afterwards by [`check_complete`].
    pub fn wait_for_all(pin_path: &Path, world: &BenchWorld, began: Instant) -> anyhow::Result<Duration> {
        let eyes = loop {
            match Eyes::open(pin_path) {
                Ok(eyes) => break eyes,
                Err(error) if began.elapsed() > PATIENCE => return Err(error),
                Err(_) => std::thread::sleep(PAUSE),
            }
        };
        for service in &world.services {
            let key = frontend_key(service.cluster_ip());
            eyes.wait_for(&eyes.frontends, bytemuck::bytes_of(&key), began)?;
        }
        for service in &world.services {
            eyes.wait_for(&eyes.addresses, &Ipx::from(service.cluster_ip()).0, began)?;
        }
        Ok(began.elapsed())
    }

    fn wait_for(&self, map: &MapHandle, key: &[u8], began: Instant) -> anyhow::Result<()> {
        while map.lookup(key, MapFlags::ANY)?.is_none() {
            if began.elapsed() > PATIENCE {
                bail!("a row of {:?} has not come within {PATIENCE:?}", map.name());
            }
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Spins until new connections to the cluster IP would go to `wanted`, all of them and no other.
    pub fn spin_until(&self, cluster_ip: Ipv4Addr, wanted: &BTreeSet<Ipv4Addr>) -> anyhow::Result<()> {
        let began = Instant::now();
        while self.endpoints(cluster_ip)? != *wanted {
            if began.elapsed() > PATIENCE {
                bail!("{cluster_ip} does not lead to {wanted:?} within {PATIENCE:?}");
            }
        }
        Ok(())
    }

    /// Where the programs would send a new connection now.
    fn endpoints(&self, cluster_ip: Ipv4Addr) -> anyhow::Result<BTreeSet<Ipv4Addr>> {
        let key = frontend_key(cluster_ip);
        let row = self.frontends.lookup(bytemuck::bytes_of(&key), MapFlags::ANY)?;
        let Some(row) = row else { return Ok(BTreeSet::new()) };
        let frontend: Frontend = bytemuck::pod_read_unaligned(&row);
        let mut endpoints = BTreeSet::new();
        for slot in frontend.inside.base..frontend.inside.base + frontend.inside.count {
            let id = self.slots.lookup(&slot.to_ne_bytes(), MapFlags::ANY)?.context("a slot beyond the map's end")?;
            let row = self.backends.lookup(&id, MapFlags::ANY)?.context("a backend beyond the map's end")?;
            let backend: Backend = bytemuck::pod_read_unaligned(&row);
            if let std::net::IpAddr::V4(ip) = Ipx(backend.address).to_ip() {
                endpoints.insert(ip);
            }
        }
        Ok(endpoints)
    }
}

fn frontend_key(cluster_ip: Ipv4Addr) -> FrontendKey {
    FrontendKey::new(cluster_ip.into(), SERVICE_PORT, Protocol::Tcp)
}

/// Fails unless the maps hold exactly the world: a fast start that left something out would be no start.
pub fn check_complete(pin_path: &Path, world: &BenchWorld) -> anyhow::Result<()> {
    let mut maps = Maps::open(pin_path)?;
    let (mut frontends, mut backends) = (0, 0);
    maps.dump(MapName::Frontends, &mut |_, row| {
        let frontend: Frontend = bytemuck::pod_read_unaligned(row);
        frontends += usize::from(frontend.inside.count > 0);
    })?;
    maps.dump(MapName::Backends, &mut |_, row| {
        let backend: Backend = bytemuck::pod_read_unaligned(row);
        backends += usize::from(u32::from(backend.state) == backend_state::BACKEND_ACTIVE);
    })?;
    let wanted = (world.services.len(), world.endpoints());
    if (frontends, backends) != wanted {
        bail!("the maps hold {frontends} frontends and {backends} backends instead of {wanted:?}");
    }
    Ok(())
}

/// What the kernel accounts for all pinned maps.
pub fn maps_bytes(pin_path: &Path) -> anyhow::Result<u64> {
    Ok(kubelane::bpf::map_memory(pin_path)?.iter().map(|map| map.bytes).sum())
}

/// What a process has used.
pub struct Usage {
    pub cpu: Duration,
    pub resident_kib: u64,
    pub peak_kib: u64,
}

impl Usage {
    pub fn of(pid: u32) -> anyhow::Result<Usage> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).context("reading the daemon's status")?;
        let kib = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|text| text.split_whitespace().next()?.parse().ok()).with_context(|| format!("no {name}"))
        };
        Ok(Usage { cpu: cpu_time(pid)?, resident_kib: kib("VmRSS")?, peak_kib: kib("VmHWM")? })
    }
}

/// User and system time of all threads, ended ones included (utime and stime of /proc/PID/stat, in 1/100 s).
pub fn cpu_time(pid: u32) -> anyhow::Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("reading the daemon's stat")?;
    // The name in parentheses may hold spaces; the third field follows it.
    let fields = stat.rsplit_once(") ").context("stat without a name")?.1;
    let ticks = |index: usize| fields.split(' ').nth(index).and_then(|field| field.parse::<u64>().ok());
    let (user, system) = (ticks(11).context("no utime")?, ticks(12).context("no stime")?);
    Ok(Duration::from_millis(10 * (user + system)))
}
