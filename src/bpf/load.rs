//! From the object file to a running datapath: configure, load, pin, attach; adopting whatever an earlier daemon left.

use std::mem::MaybeUninit;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail, ensure};
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{ErrorKind, Link, Map, MapCore, MapHandle, Object, OpenMapMut, OpenObject, PrintLevel};

use super::attach::{Attached, Cgroup, SocketHooks};
use super::btf::EmptyBtf;
use super::devices::Devices;
use super::epochs::RouteEpoch;
use super::flows::{FlowCollector, SharedProgram};
use super::grow::Grower;
use super::maps::Maps;
use super::pins::Pins;
use super::privileges::Privileges;
use super::probe::SocketSearch;
use super::probes::ProbeRows;
use super::service_counts::{CountMaps, ServiceCounts};
use super::signals::uninterrupted;
use super::sizes::Limits;
use super::skeleton::{KubelaneSkel, KubelaneSkelBuilder, OpenKubelaneSkel, types};
use super::stale::{Iterators, StaleSockets};
use super::upgrade::Upgrade;
use super::usage::MapUsage;
use super::{flows, grow, namespaces, pinned, ports, probe};
use crate::abi::flow_limits_of::{FLOW_LIMITS_NOW, FLOW_LIMITS_SET};
use crate::abi::{FlowLimits, flow_openings};
use crate::sync::MapName;

/// As many flows as kube-proxy lets conntrack have: 32768 for each processor, 131072 at least.
const FLOWS_EACH: u32 = 32_768;
const FLOWS: u32 = 131_072;

/// The map that stands for one of an earlier version: see bpf/former.h.
pub(super) const FORMER_MAP: &str = "datagram_tables_v2";
/// Programs of [`load_carrier`]: over the sockets that the former map has rows of, everywhere; over the UDP sockets of the
/// network namespace that the iterator is opened in.
pub(super) const CARRY_OF_MAP: &str = "carry_datagrams";
pub(super) const CARRY_OF_NAMESPACE: &str = "carry_datagrams_udp";

/// How the table of flows is shared out.
struct FlowQuotas {
    /// Not proved yet.
    opening: u32,
    tcp: u32,
    /// UDP and SCTP.
    other: u32,
}

impl FlowQuotas {
    fn new(processors: u32) -> FlowQuotas {
        let opening = processors * flow_openings::FLOW_OPENINGS;
        let proved = FLOWS.max(processors * FLOWS_EACH) - opening;
        FlowQuotas { opening, tcp: proved - proved / 4, other: proved / 4 }
    }

    /// Flows have two rows each.
    fn rows(&self) -> u32 {
        2 * (self.opening + self.tcp + self.other)
    }
}

/// Where the datapath lives and how much it can hold.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The pin directory, on a BPF file system.
    pub pin_path: PathBuf,
    /// The cgroup2 directory whose processes are served.
    pub cgroup: PathBuf,
    /// Backends that the maps may hold; like the others, they have room for as many as there are.
    pub max_endpoints: u32,
    /// Services that the maps may hold, with up to four frontends each.
    pub max_services: u32,
    /// Ranges of clients, of all Service ports together, that the maps may hold.
    pub max_source_ranges: u32,
    /// How long flows last.
    pub flow_limits: FlowLimits,
    /// A FIN counts whatever its sequence number is; a reset never does (nf_conntrack_tcp_be_liberal).
    pub tcp_be_liberal: bool,
    /// Sockets of pods are left alone.
    pub host_sockets_only: bool,
    /// Pods' packets are served: programs will be on their devices.
    pub has_pod_devices: bool,
    /// Cluster IPs serve the wire.
    pub external_cluster_ips: bool,
    /// What a newer version has left, which this one cannot read, is removed.
    pub discard_newer: bool,
}

/// What the programs count of each Service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Counting {
    #[default]
    Nothing,
    /// Connections, refusals and drops.
    Connections,
    /// And what its clients and backends send each other: packets of flows, and TCP sockets that are translated.
    Traffic,
}

/// How the programs are made, and made again when their maps grow.
pub(super) struct Loader {
    settings: Settings,
    counting: Counting,
    search: SocketSearch,
}

impl Loader {
    /// The object, configured for this kernel and as the daemon was told.
    pub fn open<'o>(
        &self,
        storage: &'o mut MaybeUninit<OpenObject>,
        btf: Option<&EmptyBtf>,
    ) -> Result<OpenKubelaneSkel<'o>> {
        let mut skeleton = open_object(storage, btf, self.search)?;
        let (settings, config) = (&self.settings, &mut rodata(&mut skeleton)?.config);
        config.tcp_be_liberal = settings.tcp_be_liberal.into();
        config.host_sockets_only = settings.host_sockets_only.into();
        config.has_pod_devices = settings.has_pod_devices.into();
        config.external_cluster_ips = settings.external_cluster_ips.into();
        count_services(&mut skeleton, settings, self.counting)?;
        Ok(skeleton)
    }

    /// Over sockets whose backend is gone, and over UDP sockets that nobody served. `None` where the kernel has no way.
    pub fn iterators(&self, skeleton: &KubelaneSkel<'_>) -> Result<Option<(Iterators, Link)>> {
        let (progs, origins) = (&skeleton.progs, skeleton.maps.socket_origins.as_fd());
        let why = "cannot create the socket iterator";
        let stale = match self.search {
            SocketSearch::Origins => Iterators::Origins(progs.find_stale_sockets.attach_iter(origins).context(why)?),
            SocketSearch::Namespaces => Iterators::Namespaces {
                udp: progs.find_stale_udp.attach().context(why)?,
                tcp: progs.find_stale_tcp.attach().context(why)?,
            },
            SocketSearch::None => return Ok(None),
        };
        Ok(Some((stale, progs.find_unserved_udp.attach().context(why)?)))
    }
}

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
        for pin in pinned::remove_other_versions(&settings.pin_path)? {
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

pub(super) fn collecting_program(skeleton: &KubelaneSkel<'_>) -> Result<OwnedFd> {
    skeleton.progs.flow_collect.as_fd().try_clone_to_owned().context("cannot keep a BPF program")
}

/// What the object is relocated against on a kernel without BTF; must live until the object is loaded.
pub(super) fn btf_stand_in() -> Result<Option<EmptyBtf>> {
    if probe::has_kernel_btf() {
        return Ok(None);
    }
    EmptyBtf::new().map(Some).context("cannot create a file in memory")
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

/// The object, configured for this kernel.
pub(super) fn open_object<'o>(
    storage: &'o mut MaybeUninit<OpenObject>,
    btf: Option<&EmptyBtf>,
    search: SocketSearch,
) -> Result<OpenKubelaneSkel<'o>> {
    let mut builder = KubelaneSkelBuilder::default();
    if let Some(btf) = btf {
        builder.obj_builder.btf_custom_path(btf.path())?;
    }
    let mut skeleton = builder.open(storage).context("cannot open the BPF object")?;
    let rodata = rodata(&mut skeleton)?;
    rodata.config.host_netns_cookie = namespaces::own_cookie().unwrap_or(0);
    rodata.config.has_set_retval = probe::has_set_retval().into();
    // Each has at most 64512: it starts at 1024 or later.
    let length = |range: &RangeInclusive<u16>| range.end() - range.start() + 1;
    let [snat, moved] = ports::private_ranges();
    (rodata.config.snat_first, rodata.config.snat_ports) = (*snat.start(), length(&snat));
    (rodata.config.moved_first, rodata.config.moved_ports) = (*moved.start(), length(&moved));
    let quotas = FlowQuotas::new(processors()?);
    rodata.config.flows_tcp = quotas.tcp;
    rodata.config.flows_other = quotas.other;
    skeleton.progs.find_stale_sockets.set_autoload(search == SocketSearch::Origins);
    skeleton.progs.find_stale_udp.set_autoload(search == SocketSearch::Namespaces);
    skeleton.progs.find_stale_tcp.set_autoload(search == SocketSearch::Namespaces);
    skeleton.progs.find_unserved_udp.set_autoload(search != SocketSearch::None);
    skeleton.progs.carry_datagrams.set_autoload(false);
    skeleton.progs.carry_datagrams_udp.set_autoload(false);
    skeleton.maps.datagram_tables_v2.set_autocreate(false).context("cannot leave out a map")?;
    Ok(skeleton)
}

/// An iterator over sockets: `program`, alone, which reads what they remember as `former`, an earlier version's map, says,
/// and writes that into `datagram_tables`, the present map.
pub(super) fn load_carrier(program: &str, former: &MapHandle, datagram_tables: &Path) -> Result<Link> {
    let mut storage = MaybeUninit::uninit();
    let btf = btf_stand_in()?;
    let mut skeleton = open_object(&mut storage, btf.as_ref(), SocketSearch::None)?;
    for mut each in skeleton.open_object_mut().progs_mut() {
        let is_carrier = each.name() == program;
        each.set_autoload(is_carrier);
    }
    for mut map in skeleton.open_object_mut().maps_mut() {
        match map.name().to_string_lossy().as_ref() {
            "datagram_tables" => map.reuse_pinned_map(datagram_tables)?,
            FORMER_MAP => {
                map.set_autocreate(true)?;
                map.reuse_fd(former.as_fd())?;
            }
            name if !name.contains('.') => map.set_autocreate(false)?,
            _ => {}
        }
    }
    let skeleton = uninterrupted(|| skeleton.load())?;
    match program {
        CARRY_OF_MAP => Ok(skeleton.progs.carry_datagrams.attach_iter(former.as_fd())?),
        _ => Ok(skeleton.progs.carry_datagrams_udp.attach()?),
    }
}

/// The maps of a loaded object, but for the one that was never made: libbpf has a descriptor of something else for it.
pub(super) fn made_maps(object: &Object) -> impl Iterator<Item = (String, Map<'_>)> {
    let named = object.maps().map(|map| (map.name().to_string_lossy().into_owned(), map));
    named.filter(|(name, _)| name != FORMER_MAP)
}

/// Rows of an LRU map in which so many are of use: before 6.16 each processor keeps up to 128 free ones for itself.
fn lru_rows(rows: u32, processors: u32) -> u32 {
    rows + 128 * processors
}

fn processors() -> Result<u32> {
    Ok(libbpf_rs::num_possible_cpus().context("cannot count the processors")? as u32)
}

fn rodata<'s>(skeleton: &'s mut OpenKubelaneSkel<'_>) -> Result<&'s mut types::rodata> {
    skeleton.maps.rodata_data.as_deref_mut().context("the BPF object has no read-only data")
}

/// The maps that nothing is pinned of yet.
fn maps_to_be_made(pin_path: &Path) -> Vec<MapName> {
    let directory = pinned::maps_directory(pin_path);
    MapName::ALL.into_iter().filter(|map| !directory.join(map.as_str()).exists()).collect()
}

/// A map that is pinned keeps its size until it grows.
fn size_and_pin_maps(skeleton: &mut OpenKubelaneSkel<'_>, settings: &Settings) -> Result<()> {
    let directory = pinned::maps_directory(&settings.pin_path);
    let limits = Limits::new(settings);
    let first = |map| Some(limits.first(map));
    let processors = processors()?;
    let quotas = FlowQuotas::new(processors);
    let maps = &mut skeleton.maps;
    let sized: [(&str, &mut OpenMapMut<'_>, Option<u32>); 30] = [
        ("services", &mut maps.services, first(MapName::Services)),
        ("frontends", &mut maps.frontends, first(MapName::Frontends)),
        ("addresses", &mut maps.addresses, first(MapName::Addresses)),
        ("backends", &mut maps.backends, first(MapName::Backends)),
        ("slots", &mut maps.slots, first(MapName::Slots)),
        ("affinities", &mut maps.affinities, Some(lru_rows(65_536, processors))),
        ("socket_origins", &mut maps.socket_origins, None),
        ("datagram_tables", &mut maps.datagram_tables, None),
        ("datagram_more", &mut maps.datagram_more, None),
        ("counters", &mut maps.counters, None),
        ("source_ranges", &mut maps.source_ranges, first(MapName::SourceRanges)),
        ("devices", &mut maps.devices, None),
        ("pod_devices", &mut maps.pod_devices, None),
        ("new_affinities", &mut maps.new_affinities, Some(lru_rows(16_384, processors))),
        ("flows4", &mut maps.flows4, Some(quotas.rows())),
        ("flows6", &mut maps.flows6, Some(quotas.rows())),
        ("outgoing", &mut maps.outgoing, Some(quotas.opening)),
        ("handed", &mut maps.handed, Some(quotas.opening)),
        ("flow_limits", &mut maps.flow_limits, None),
        ("flow_counts", &mut maps.flow_counts, None),
        ("flow_openings", &mut maps.flow_openings, Some(quotas.opening)),
        ("fragments", &mut maps.fragments, Some(lru_rows(8192, processors))),
        ("ports", &mut maps.ports, None),
        ("wire_filter", &mut maps.wire_filter, None),
        ("epochs", &mut maps.epochs, None),
        ("probes", &mut maps.probes, None),
        ("probe_state", &mut maps.probe_state, None),
        ("listening", &mut maps.listening, None),
        ("listener_states", &mut maps.listener_states, None),
        ("listener_rings", &mut maps.listener_rings, None),
    ];
    for (name, map, wanted) in sized {
        let pin = directory.join(name);
        if let Some(wanted) = wanted {
            map.set_max_entries(pinned_size(&pin)?.unwrap_or(wanted))
                .with_context(|| format!("cannot size the map {name}"))?;
        }
        map.set_pin_path(&pin).with_context(|| format!("cannot pin the map {name}"))?;
    }
    Ok(())
}

/// Before 5.11 the kernel reserves a per-CPU map's rows at once, filled or not, and refuses more than 4 GiB.
const COUNTED_BYTES: usize = 256 << 20;

/// Rows for as many Services as may have names, if that is not too much.
fn counted_rows(services: u32, row: usize) -> Result<u32> {
    let most = COUNTED_BYTES / (row * processors()? as usize);
    Ok(services.saturating_mul(2).min(u32::try_from(most).unwrap_or(u32::MAX)))
}

fn count_services(skeleton: &mut OpenKubelaneSkel<'_>, settings: &Settings, counting: Counting) -> Result<()> {
    let config = &mut rodata(skeleton)?.config;
    config.counts_services = (counting != Counting::Nothing).into();
    config.counts_traffic = (counting == Counting::Traffic).into();
    skeleton.progs.tcp_states.set_autoload(counting == Counting::Traffic);
    let services = settings.max_services;
    let maps = &mut skeleton.maps;
    if counting != Counting::Nothing {
        let rows = counted_rows(services, size_of::<types::service_counts>())?;
        maps.service_counts.set_max_entries(rows).context("cannot size the map service_counts")?;
    }
    if counting == Counting::Traffic {
        let rows = counted_rows(services, size_of::<types::service_traffic>())?;
        maps.service_traffic.set_max_entries(rows).context("cannot size the map service_traffic")?;
        maps.service_births.set_max_entries(rows).context("cannot size the map service_births")?;
    }
    Ok(())
}

/// The size of the map that is pinned there, if one is.
fn pinned_size(pin: &Path) -> Result<Option<u32>> {
    if !pin.exists() {
        return Ok(None);
    }
    let pinned = MapHandle::from_pinned_path(pin).with_context(|| format!("cannot open {}", pin.display()))?;
    Ok(Some(pinned.max_entries()))
}
