//! Looking at the daemon from outside: its rows in the pinned maps, and what /proc says of the process.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use kubelane::abi::{Backend, Frontend, FrontendKey, backend_state};
use kubelane::bpf::{Maps, pinned};
use kubelane::model::{Ipx, Protocol};
use kubelane::sync::{MapIo as _, MapName};
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use nix::sys::prctl::set_timerslack;
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

use super::world::{BenchWorld, SERVICE_PORT};

/// How long a watcher waits before it gives up: ten times as long as 100,000 Services take a debug build.
const PATIENCE: Duration = Duration::from_secs(900);
/// Pause of a watcher that waits for a whole world.
const PAUSE: Duration = Duration::from_micros(200);
/// Pause of one that times a single change: it would be in the way of daemon and server if it spun. What it adds to a
/// time, half of it in the mean, stays in there.
const LOOK_EVERY: Duration = Duration::from_micros(50);

/// The maps of a daemon may be larger ones after so long.
const REOPEN: Duration = Duration::from_millis(10);

/// The pinned maps, read row by row.
pub struct Eyes {
    pin_path: PathBuf,
    open: RefCell<(Instant, Rc<Open>)>,
}

struct Open {
    frontends: MapHandle,
    slots: MapHandle,
    backends: MapHandle,
    addresses: MapHandle,
}

impl Open {
    fn new(pin_path: &Path) -> anyhow::Result<Open> {
        let open = |map: MapName| {
            let path = pinned::maps_directory(pin_path).join(map.as_str());
            MapHandle::from_pinned_path(&path).with_context(|| format!("opening {}", path.display()))
        };
        Ok(Open {
            frontends: open(MapName::Frontends)?,
            slots: open(MapName::Slots)?,
            backends: open(MapName::Backends)?,
            addresses: open(MapName::Addresses)?,
        })
    }
}

impl Eyes {
    pub fn open(pin_path: &Path) -> anyhow::Result<Eyes> {
        let open = RefCell::new((Instant::now(), Rc::new(Open::new(pin_path)?)));
        Ok(Eyes { pin_path: pin_path.to_owned(), open })
    }

    fn maps(&self) -> anyhow::Result<Rc<Open>> {
        let mut open = self.open.borrow_mut();
        if open.0.elapsed() > REOPEN {
            *open = (Instant::now(), Rc::new(Open::new(&self.pin_path)?));
        }
        Ok(Rc::clone(&open.1))
    }

    /// Waits until the maps are there and hold every frontend and every address of the world; how long after `began`
    /// the last one was seen. Backends and slots are written before the frontends that lead to them, and are counted
    /// afterwards by [`check_complete`]. `check` ends the wait with an error when there is nothing to wait for any more.
    pub fn wait_for_all(
        pin_path: &Path,
        world: &BenchWorld,
        began: Instant,
        check: &mut dyn FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<Duration> {
        let eyes = loop {
            check()?;
            match Eyes::open(pin_path) {
                Ok(eyes) => break eyes,
                Err(error) if began.elapsed() > PATIENCE => return Err(error),
                Err(_) => std::thread::sleep(PAUSE),
            }
        };
        for service in &world.services {
            let key = frontend_key(service.cluster_ip());
            eyes.wait_for(|maps| &maps.frontends, bytemuck::bytes_of(&key), began, check)?;
        }
        for service in &world.services {
            eyes.wait_for(|maps| &maps.addresses, &Ipx::from(service.cluster_ip()).0, began, check)?;
        }
        Ok(began.elapsed())
    }

    fn wait_for(
        &self,
        map: fn(&Open) -> &MapHandle,
        key: &[u8],
        began: Instant,
        check: &mut dyn FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        loop {
            let maps = self.maps()?;
            if map(&maps).lookup(key, MapFlags::ANY)?.is_some() {
                return Ok(());
            }
            check()?;
            if began.elapsed() > PATIENCE {
                bail!("a row of {:?} has not come within {PATIENCE:?}", map(&maps).name());
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Waits until the maps know the cluster IP.
    pub fn wait_for_frontend(&self, cluster_ip: Ipv4Addr) -> anyhow::Result<()> {
        let key = frontend_key(cluster_ip);
        self.wait_for(|maps| &maps.frontends, bytemuck::bytes_of(&key), Instant::now(), &mut || Ok(()))
    }

    /// Looks until new connections to the cluster IP would go to `wanted`, all of them and no other.
    pub fn watch_until(&self, cluster_ip: Ipv4Addr, wanted: &BTreeSet<Ipv4Addr>) -> anyhow::Result<()> {
        watch(&mut || self.leads_to(cluster_ip, wanted))?
            .with_context(|| format!("{cluster_ip} does not lead to {wanted:?} within {PATIENCE:?}"))
    }

    /// Whether new connections to the cluster IP would go to `wanted`, all of them and no other.
    pub fn leads_to(&self, cluster_ip: Ipv4Addr, wanted: &BTreeSet<Ipv4Addr>) -> anyhow::Result<bool> {
        let pool = self.pool(cluster_ip)?;
        // Else a look at a Service with thousands of endpoints would take longer than what is waited for.
        if pool.len() != wanted.len() {
            return Ok(false);
        }
        let found: BTreeSet<Ipv4Addr> = pool.map(|slot| self.endpoint(slot)).collect::<Result<_, _>>()?;
        Ok(found == *wanted)
    }

    /// Which of the pool's slots leads to an endpoint.
    pub fn slot_of(&self, cluster_ip: Ipv4Addr, endpoint: Ipv4Addr) -> anyhow::Result<usize> {
        let at = self.endpoints(cluster_ip)?.iter().position(|ip| *ip == endpoint);
        at.with_context(|| format!("{cluster_ip} does not lead to {endpoint}"))
    }

    /// Looks until this slot of the pool leads to `endpoint`: an endpoint that takes another's place takes its slot.
    /// Three look-ups each time, however large the pool is.
    pub fn watch_until_slot(&self, cluster_ip: Ipv4Addr, slot: usize, endpoint: Ipv4Addr) -> anyhow::Result<()> {
        watch(&mut || {
            let slot = self.pool(cluster_ip)?.nth(slot);
            Ok(slot.map(|slot| self.endpoint(slot)).transpose()? == Some(endpoint))
        })?
        .with_context(|| format!("{cluster_ip} does not lead to {endpoint} within {PATIENCE:?}"))
    }

    /// Where the programs would send a new connection now, in the order of the slots.
    fn endpoints(&self, cluster_ip: Ipv4Addr) -> anyhow::Result<Vec<Ipv4Addr>> {
        self.pool(cluster_ip)?.map(|slot| self.endpoint(slot)).collect()
    }

    /// The slots of a cluster IP's pool; none without a frontend.
    fn pool(&self, cluster_ip: Ipv4Addr) -> anyhow::Result<Range<u32>> {
        let key = frontend_key(cluster_ip);
        let row = self.maps()?.frontends.lookup(bytemuck::bytes_of(&key), MapFlags::ANY)?;
        let pool = row.map(|row| bytemuck::pod_read_unaligned::<Frontend>(&row).inside);
        Ok(pool.map_or(0..0, |pool| pool.base..pool.base + pool.count))
    }

    fn endpoint(&self, slot: u32) -> anyhow::Result<Ipv4Addr> {
        let maps = self.maps()?;
        let id = maps.slots.lookup(&slot.to_ne_bytes(), MapFlags::ANY)?.context("a slot beyond the map's end")?;
        let row = maps.backends.lookup(&id, MapFlags::ANY)?.context("a backend beyond the map's end")?;
        match Ipx(bytemuck::pod_read_unaligned::<Backend>(&row).address).to_ip() {
            IpAddr::V4(ip) => Ok(ip),
            // An empty row, which a slot leads to only for as long as it takes to read both.
            IpAddr::V6(_) => Ok(Ipv4Addr::UNSPECIFIED),
        }
    }
}

/// Looks again and again. `None`: too long.
fn watch(is_there: &mut dyn FnMut() -> anyhow::Result<bool>) -> anyhow::Result<Option<()>> {
    // Of this thread; by itself the kernel may let each pause last twice as long.
    set_timerslack(1).context("asking for exact timers")?;
    let began = Instant::now();
    while !is_there()? {
        if began.elapsed() > PATIENCE {
            return Ok(None);
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(Some(()))
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

/// User and system time of all threads, ended ones included, in nanoseconds (CLOCK_PROCESS_CPUTIME_ID of the process).
pub fn cpu_time(pid: u32) -> anyhow::Result<Duration> {
    let clock =
        clock_getcpuclockid(Pid::from_raw(pid.cast_signed())).context("the clock of the daemon's processor time")?;
    Ok(Duration::from(clock_gettime(clock).context("reading the daemon's processor time")?))
}
