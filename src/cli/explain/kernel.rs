//! The rows of the live maps that one explanation needs, by look-ups.

use std::path::Path;

use anyhow::Result;

use crate::abi::{Affinity, AffinityKey, Backend, DeviceAddresses, Frontend, FrontendKey, ServiceName, SourceRangeKey};
use crate::bpf::{Configuration, PinnedMap, WireMarks, configuration};
use crate::chain::chain;
use crate::model::Ipx;

/// What a decision asks of the maps.
pub trait Kernel {
    fn frontend(&self, key: &FrontendKey) -> Result<Option<Frontend>>;
    /// Bits of `abi::address_flag`.
    fn roles(&self, ip: Ipx) -> Result<u32>;
    /// A backend id.
    fn slot(&self, index: u32) -> Result<u32>;
    fn backend(&self, id: u32) -> Result<Option<Backend>>;
    /// "namespace/name:port".
    fn name(&self, service_id: u32) -> Result<Option<String>>;
    /// Whether one of the Service port's source ranges has this client.
    fn admits(&self, service_id: u32, client: Ipx) -> Result<bool>;
    /// Of clients that are known to be there, and if not so, of those that have only knocked.
    fn affinity(&self, key: &AffinityKey) -> Result<Option<Affinity>>;
    fn new_affinity(&self, key: &AffinityKey) -> Result<Option<Affinity>>;
    /// Whether the programs look any further at this destination.
    fn lets_look(&self, key: &FrontendKey, for_sockets: bool) -> bool;
    /// What the programs were told.
    fn configuration(&self) -> Configuration;
    /// How many devices packets from outside are met on.
    fn devices(&self) -> Result<usize>;
    /// Nanoseconds of CLOCK_MONOTONIC.
    fn now_ns(&self) -> u64;
}

/// The pinned maps.
pub struct Live {
    frontends: PinnedMap,
    addresses: PinnedMap,
    slots: PinnedMap,
    backends: PinnedMap,
    services: PinnedMap,
    source_ranges: PinnedMap,
    affinities: PinnedMap,
    new_affinities: PinnedMap,
    devices: PinnedMap,
    marks: WireMarks,
    configuration: Configuration,
    /// Why it is taken to be as it is without options.
    pub unknown_configuration: Option<String>,
}

impl Live {
    /// # Errors
    /// When nothing of this version is pinned there, or the kernel refuses.
    pub fn open(pin_path: &Path) -> Result<Live> {
        let open = |name| PinnedMap::open(pin_path, name);
        let configuration = configuration(pin_path);
        let unknown_configuration = configuration.as_ref().err().map(|error| {
            format!(
                "{}: what the daemon was told (--external-cluster-ip, --pod-devices) is not known",
                chain(error.as_ref())
            )
        });
        Ok(Live {
            frontends: open("frontends")?,
            addresses: open("addresses")?,
            slots: open("slots")?,
            backends: open("backends")?,
            services: open("services")?,
            source_ranges: open("source_ranges")?,
            affinities: open("affinities")?,
            new_affinities: open("new_affinities")?,
            devices: open("devices")?,
            marks: WireMarks::read(pin_path)?,
            configuration: configuration.ok().flatten().unwrap_or_default(),
            unknown_configuration,
        })
    }

    /// The frontends of a Service, of one of its ports if `port` is that name.
    ///
    /// # Errors
    /// When the maps cannot be read.
    pub fn frontends_of(
        &self,
        namespace: &str,
        name: &str,
        port: Option<&str>,
    ) -> Result<Vec<(FrontendKey, Frontend)>> {
        let service = format!("{namespace}/{name}");
        let mut ids = Vec::new();
        self.services.each(|id: u32, row: ServiceName| {
            let (of, port_name) = row.as_str().split_once(':').unwrap_or((row.as_str(), ""));
            // Longer ones than Kubernetes allows are cut.
            let is_cut = row.as_str().len() == row.text.len() && service.starts_with(of);
            if is_cut || (of == service && port.is_none_or(|port| port == port_name)) {
                ids.push(id);
            }
            Ok(())
        })?;
        let mut found = Vec::new();
        if !ids.is_empty() {
            self.frontends.each(|key: FrontendKey, row: Frontend| {
                if ids.contains(&row.service_id) {
                    found.push((key, row));
                }
                Ok(())
            })?;
        }
        // A row that was met twice, while others came or went.
        found.sort_by_key(|(key, row): &(FrontendKey, Frontend)| (row.service_id, row.flags, *key));
        found.dedup_by_key(|(key, _)| *key);
        Ok(found)
    }

    /// Every backend that is not gone of these Service ports.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn backends_of(&self, service_id: u32) -> Result<Vec<Backend>> {
        let mut found = Vec::new();
        self.backends.each(|_: u32, row: Backend| {
            if row.service_id == service_id && row.state != 0 {
                found.push(row);
            }
            Ok(())
        })?;
        Ok(found)
    }
}

impl Kernel for Live {
    fn frontend(&self, key: &FrontendKey) -> Result<Option<Frontend>> {
        self.frontends.get(key)
    }

    fn roles(&self, ip: Ipx) -> Result<u32> {
        Ok(self.addresses.get(&ip.0)?.unwrap_or(0))
    }

    fn slot(&self, index: u32) -> Result<u32> {
        Ok(self.slots.get(&index)?.unwrap_or(0))
    }

    fn backend(&self, id: u32) -> Result<Option<Backend>> {
        self.backends.get(&id)
    }

    fn name(&self, service_id: u32) -> Result<Option<String>> {
        Ok(self.services.get(&service_id)?.map(|name: ServiceName| name.as_str().to_owned()))
    }

    fn admits(&self, service_id: u32, client: Ipx) -> Result<bool> {
        let key = SourceRangeKey { prefix_length: 160, service_id, address: client.0 };
        Ok(self.source_ranges.get::<_, u32>(&key)?.is_some())
    }

    fn affinity(&self, key: &AffinityKey) -> Result<Option<Affinity>> {
        self.affinities.get(key)
    }

    fn new_affinity(&self, key: &AffinityKey) -> Result<Option<Affinity>> {
        self.new_affinities.get(key)
    }

    fn lets_look(&self, key: &FrontendKey, for_sockets: bool) -> bool {
        self.marks.lets_look(&key.address, key.port(), for_sockets, is_this_host(key.ip()))
    }

    fn configuration(&self) -> Configuration {
        self.configuration
    }

    fn devices(&self) -> Result<usize> {
        let mut count = 0;
        self.devices.each(|_: u32, _: DeviceAddresses| {
            count += 1;
            Ok(())
        })?;
        Ok(count)
    }

    fn now_ns(&self) -> u64 {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
        now.map_or(0, |now| std::time::Duration::from(now).as_nanos() as u64)
    }
}

/// 127.0.0.0/8, ::1 and the wildcards, as `address_is_loopback()` has it.
pub fn is_this_host(ip: Ipx) -> bool {
    let ip = ip.to_ip();
    ip.is_loopback() || ip.is_unspecified()
}
