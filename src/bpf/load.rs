//! From the object file to a running datapath: configure, load, pin, attach; adopting whatever an earlier daemon left.

use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail, ensure};
use libbpf_rs::skel::OpenSkel;
use libbpf_rs::{ErrorKind, MapCore, MapHandle, PrintLevel};

use super::attach::{Cgroup, SocketHooks};
use super::devices::Devices;
use super::epochs::RouteEpoch;
use super::flows::{FlowCollector, SharedProgram};
use super::grow::Grower;
use super::link::Attached;
use super::maps::Maps;
use super::object::{Loader, btf_stand_in, collecting_program, size_and_pin_maps};
use super::pins::Pins;
use super::privileges::Privileges;
use super::probes::ProbeRows;
use super::service_counts::{CountMaps, ServiceCounts};
use super::settings::{Counting, FlowQuotas, Settings, processors};
use super::signals::uninterrupted;
use super::sizes::Limits;
use super::stale::StaleSockets;
use super::upgrade::Upgrade;
use super::usage::MapUsage;
use super::{cleanup, flows, grow, pinned, probe};
use crate::abi::FlowLimits;
use crate::abi::flow_limits_of::{FLOW_LIMITS_NOW, FLOW_LIMITS_SET};
use crate::sync::MapName;

/// The attached datapath. Dropping it leaves everything attached and pinned.
pub struct Datapath {
    maps: Maps,
    /// `None` where the kernel has no way to find them.
    stale_sockets: Option<StaleSockets>,
    /// True when an earlier daemon's links were taken over.
    adopted: bool,
    socket_hooks: SocketHooks,
    devices: Devices,
    /// The program that takes away flows which have ended.
    flow_collect: SharedProgram,
    flow_limits: FlowLimits,
    /// `None`: nothing is counted by Service.
    count_maps: Option<CountMaps>,
    pin_path: PathBuf,
    pins: Pins,
}

impl Datapath {
    /// Loads the object, takes over what is pinned, and attaches the programs to the cgroup. On an error nothing that
    /// was attached before is touched.
    pub fn open(settings: &Settings) -> Result<Datapath> {
        Datapath::open_counting(settings, Counting::Nothing)
    }

    /// As [`Datapath::open`], and the programs count.
    pub fn open_counting(settings: &Settings, counting: Counting) -> Result<Datapath> {
        libbpf_rs::set_print(Some((PrintLevel::Warn, log_libbpf)));
        let missing = Privileges::own().missing();
        ensure!(
            missing.is_empty(),
            "{} missing: run kubelane as root, or give it these capabilities",
            missing.join(", ")
        );
        let cgroup = Cgroup::open(&settings.cgroup)?;
        let lock = pinned::prepare(&settings.pin_path, settings.discard_newer)?;
        if cleanup::finish(&settings.pin_path)? {
            tracing::info!("finished an interrupted cleanup: its connections stay netfilter's, and new maps are made");
            pinned::make_directories(&settings.pin_path)?;
        }
        let loader = Loader { settings: settings.clone(), counting, search: probe::socket_search() };
        let mut storage = MaybeUninit::uninit();
        let btf = btf_stand_in()?;
        let mut skeleton = loader.open(&mut storage, btf.as_ref())?;
        let mut upgrade = Upgrade::begin(&settings.pin_path)?;
        let new = maps_to_be_made(&settings.pin_path);
        size_and_pin_maps(&mut skeleton, settings)?;
        let load = AssertUnwindSafe(|| skeleton.load());
        let Ok(loaded) = uninterrupted(|| catch_unwind(load)) else { bail!(unnamed(&settings.pin_path)) };
        let skeleton = loaded.map_err(|error| {
            let rejected = rejected(&error, &settings.pin_path);
            anyhow::Error::from(error).context(rejected)
        })?;
        if !new.is_empty() {
            expect_names(&settings.pin_path)?;
        }
        for index in [FLOW_LIMITS_SET, FLOW_LIMITS_NOW] {
            flows::write_limits(&skeleton.maps.flow_limits, index, &settings.flow_limits)?;
        }
        if let Some(upgrade) = &mut upgrade {
            upgrade.fill()?;
        }
        let (socket_hooks, attached) = SocketHooks::attach(&skeleton, cgroup, &settings.pin_path, counting)?;
        let devices = Devices::new(&skeleton, &settings.pin_path)?;
        if let Some(upgrade) = upgrade {
            upgrade.finish(&devices.shared())?;
        }
        for pin in cleanup::remove_other_versions(&settings.pin_path)? {
            tracing::info!("removed {pin}, left by another version");
        }
        let iterators = loader.iterators(&skeleton)?;
        let stale_sockets =
            iterators.map(|(stale, unserved)| StaleSockets::new(stale, unserved, settings.host_sockets_only));
        let count_maps = CountMaps::new(&skeleton, counting)?;
        let flow_collect = Arc::new(Mutex::new(collecting_program(&skeleton)?));
        let pins = Pins::new(&settings.pin_path, lock)?;
        let grower = Grower {
            loader,
            pins: pins.clone(),
            maps: grow::shared_maps(&skeleton)?,
            hooks: socket_hooks.clone(),
            devices: devices.shared(),
            stale: stale_sockets.clone(),
            flow_collect: Arc::clone(&flow_collect),
            directory: pinned::maps_directory(&settings.pin_path),
            retry_at: None,
        };
        let mut maps = Maps::open(&settings.pin_path)?;
        maps.know_empty(new);
        maps.count_by_service(count_maps.as_ref().map_or(Ok(Vec::new()), CountMaps::handles)?);
        maps.grow_by(grower, Limits::new(settings));
        Ok(Datapath {
            maps,
            count_maps,
            stale_sockets,
            adopted: attached == Attached::Replaced,
            socket_hooks,
            devices,
            flow_collect,
            flow_limits: settings.flow_limits,
            pin_path: settings.pin_path.clone(),
            pins,
        })
    }

    /// The maps to write to.
    pub fn maps(&mut self) -> &mut Maps {
        &mut self.maps
    }

    /// Both, for an owner that writes to one and attaches with the other.
    pub fn parts(&mut self) -> (&mut Maps, &mut Devices) {
        (&mut self.maps, &mut self.devices)
    }

    /// Whether an earlier daemon's programs were found attached, and replaced without a gap.
    pub fn adopted(&self) -> bool {
        self.adopted
    }

    /// The programs of the cgroup's hooks, for putting them back; for use in another task.
    pub fn socket_hooks(&self) -> SocketHooks {
        self.socket_hooks.clone()
    }

    /// What is pinned, to be looked after; for use in another task.
    pub fn pins(&self) -> Pins {
        self.pins.clone()
    }

    /// The outward devices, where packets from the wire are met.
    pub fn devices(&mut self) -> &mut Devices {
        &mut self.devices
    }

    /// Takes away flows that have ended; for use on another thread.
    pub fn flow_collector(&self) -> Result<FlowCollector> {
        let program = Arc::clone(&self.flow_collect);
        let quotas = FlowQuotas::new(processors()?);
        FlowCollector::open(&self.pin_path, program, [quotas.tcp.into(), quotas.other.into()], self.flow_limits)
    }

    /// Counts the rows of the maps that programs fill; for use on another thread.
    pub fn map_usage(&self) -> Result<MapUsage> {
        MapUsage::open(&self.pin_path)
    }

    /// Reads what the programs count, once; for use on another thread. `None`: they do not.
    pub fn service_counts(&mut self) -> Option<ServiceCounts> {
        self.count_maps.take().map(|maps| ServiceCounts::new(maps, &self.pin_path))
    }

    /// Writes what is answered to health probes; for use in another task.
    pub fn probe_rows(&self) -> Result<ProbeRows> {
        ProbeRows::open(&self.pin_path, self.maps.shared_filter())
    }

    /// For telling that routes have changed; for use in another task.
    pub fn route_epoch(&self) -> Result<RouteEpoch> {
        RouteEpoch::open(&self.pin_path)
    }

    /// Finds and ends sockets whose backend is gone; for use on another thread. `None` where the kernel cannot find them.
    pub fn stale_sockets(&self) -> Option<StaleSockets> {
        self.stale_sockets.clone()
    }
}

fn log_libbpf(level: PrintLevel, message: String) {
    match level {
        // The kernel's words about what is asked of a qdisc, "exists" and "not found" for instance: whoever asks judges.
        PrintLevel::Warn if message.contains("Kernel error message") => tracing::debug!("{}", message.trim_end()),
        PrintLevel::Warn => tracing::warn!("{}", message.trim_end()),
        _ => tracing::debug!("{}", message.trim_end()),
    }
}

/// The generated code panics when libbpf has other names for maps than the object: those that the kernel tells.
fn unnamed(pin_path: &Path) -> String {
    let at = pin_path.display();
    format!(
        "the kernel does not tell the maps in {at} by their names: start again, and if that does not help, `kubelane \
         cleanup` removes them, and nothing is served until the next start"
    )
}

/// libbpf asks the kernel once whether maps can have names, and takes every failure for a no. Maps without are unpinned
/// at once: no daemon could take them over.
fn expect_names(pin_path: &Path) -> Result<()> {
    let mut nameless = 0;
    for pin in pinned::children(&pinned::maps_directory(pin_path))? {
        let map = MapHandle::from_pinned_path(&pin).with_context(|| format!("cannot open {}", pin.display()))?;
        if map.name().is_empty() {
            std::fs::remove_file(&pin).with_context(|| format!("cannot remove the pin {}", pin.display()))?;
            nameless += 1;
        }
    }
    ensure!(
        nameless == 0,
        "{nameless} new maps in {} could not be told by their names, and have been removed: start again",
        pin_path.display()
    );
    Ok(())
}

/// What to say of an object that was not loaded. (To clean up is to stop serving: only what cannot be helped otherwise.)
fn rejected(error: &libbpf_rs::Error, pin_path: &Path) -> String {
    let remedy = match error.kind() {
        ErrorKind::OutOfMemory => {
            "raise the memory limit of the daemon's container, or free memory on the node".to_owned()
        }
        ErrorKind::InvalidInput => format!(
            "if the maps in {} have another layout, `kubelane cleanup` removes them, and nothing is served until the \
             next start",
            pin_path.display()
        ),
        _ => "`kubelane check` names what is missing".to_owned(),
    };
    format!("the kernel rejected the BPF object (the lines above say which part; {remedy})")
}

/// The maps that nothing is pinned of yet.
fn maps_to_be_made(pin_path: &Path) -> Vec<MapName> {
    let directory = pinned::maps_directory(pin_path);
    MapName::ALL.into_iter().filter(|map| !directory.join(map.as_str()).exists()).collect()
}
