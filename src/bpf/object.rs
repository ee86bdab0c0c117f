//! The BPF object, configured: as the daemon was told, for this kernel, and for the maps that are pinned.

use std::mem::MaybeUninit;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{Link, Map, MapCore, MapHandle, Object, OpenMapMut, OpenObject};

use super::btf::EmptyBtf;
use super::probe::SocketSearch;
use super::settings::{Counting, FlowQuotas, Settings, lru_rows, processors};
use super::signals::uninterrupted;
use super::sizes::Limits;
use super::skeleton::{KubelaneSkel, KubelaneSkelBuilder, OpenKubelaneSkel, types};
use super::stale::Iterators;
use super::{namespaces, pinned, ports, probe};
use crate::sync::MapName;

/// The map that stands for one of an earlier version: see bpf/former.h.
pub(super) const FORMER_MAP: &str = "datagram_tables_v2";
/// Programs of [`load_carrier`]: over the sockets that the former map has rows of, everywhere; over the UDP sockets of the
/// network namespace that the iterator is opened in.
pub(super) const CARRY_OF_MAP: &str = "carry_datagrams";
pub(super) const CARRY_OF_NAMESPACE: &str = "carry_datagrams_udp";

/// How the programs are made, and made again when their maps grow.
pub(super) struct Loader {
    pub settings: Settings,
    pub counting: Counting,
    pub search: SocketSearch,
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

fn rodata<'s>(skeleton: &'s mut OpenKubelaneSkel<'_>) -> Result<&'s mut types::rodata> {
    skeleton.maps.rodata_data.as_deref_mut().context("the BPF object has no read-only data")
}

/// A map that is pinned keeps its size until it grows.
pub(super) fn size_and_pin_maps(skeleton: &mut OpenKubelaneSkel<'_>, settings: &Settings) -> Result<()> {
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

/// What the object is relocated against on a kernel without BTF; must live until the object is loaded.
pub(super) fn btf_stand_in() -> Result<Option<EmptyBtf>> {
    if probe::has_kernel_btf() {
        return Ok(None);
    }
    EmptyBtf::new().map(Some).context("cannot create a file in memory")
}

pub(super) fn collecting_program(skeleton: &KubelaneSkel<'_>) -> Result<OwnedFd> {
    skeleton.progs.flow_collect.as_fd().try_clone_to_owned().context("cannot keep a BPF program")
}
