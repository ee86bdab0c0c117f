//! What events name by numbers: Services, devices, and the addresses of those who call. What was found out is kept for a
//! moment.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::abi::{Frontend, FrontendKey, ServiceName};
use crate::bpf::{NetworkNamespace, PinnedMap, look_into};
use crate::cli::snapshot::{PortName, port_name};
use crate::model::{Ipx, Protocol};

/// A Service's id may be another's two seconds after it is gone.
const FOR_A_MOMENT: Duration = Duration::from_secs(1);
/// Between two searches for the addresses of a network namespace, which walk all processes.
const SEARCH_EVERY: Duration = Duration::from_secs(5);
/// Entries of each kind.
const MOST: usize = 65_536;

/// The live maps, and what was read from them.
pub struct Names {
    pin_path: PathBuf,
    services: PinnedMap,
    frontends: PinnedMap,
    own_host: String,
    since: Instant,
    by_id: HashMap<u32, Option<PortName>>,
    by_destination: HashMap<(SocketAddr, u8), Option<u32>>,
    devices: HashMap<u32, Option<String>>,
    /// Network namespaces, by cookie, and when they were looked for.
    namespaces: HashMap<u64, (NetworkNamespace, Instant)>,
}

impl Names {
    /// # Errors
    /// When nothing is pinned there, or a map cannot be opened.
    pub fn open(pin_path: &Path) -> Result<Names> {
        let own_host = nix::sys::utsname::uname().map(|names| names.nodename().to_string_lossy().into_owned());
        Ok(Names {
            pin_path: pin_path.to_owned(),
            services: PinnedMap::open(pin_path, "services")?,
            frontends: PinnedMap::open(pin_path, "frontends")?,
            own_host: own_host.unwrap_or_default(),
            since: Instant::now(),
            by_id: HashMap::new(),
            by_destination: HashMap::new(),
            devices: HashMap::new(),
            namespaces: HashMap::new(),
        })
    }

    /// Lets go of what may be out of date.
    pub fn refresh(&mut self) {
        let is_full = self.by_destination.len() >= MOST || self.namespaces.len() >= MOST;
        if self.since.elapsed() < FOR_A_MOMENT && !is_full {
            return;
        }
        self.since = Instant::now();
        // Maps that have grown are others.
        let open = |name| PinnedMap::open(&self.pin_path, name);
        if let (Ok(services), Ok(frontends)) = (open("services"), open("frontends")) {
            (self.services, self.frontends) = (services, frontends);
        }
        self.by_id.clear();
        self.by_destination.clear();
        self.devices.clear();
        self.namespaces.retain(|_, (_, since)| since.elapsed() < 12 * SEARCH_EVERY);
    }

    /// `None`: it has gone.
    pub fn service(&mut self, id: u32) -> Option<PortName> {
        let services = &self.services;
        let read = || services.get::<u32, ServiceName>(&id).ok().flatten().map(|name| port_name(name.as_str()));
        self.by_id.entry(id).or_insert_with(read).clone()
    }

    /// Whose frontend a destination is, as the programs look it up.
    pub fn service_at(&mut self, to: SocketAddr, protocol: u8) -> Option<PortName> {
        let frontends = &self.frontends;
        let read = |ip: Ipx| {
            let protocol = Protocol::of_number(protocol)?;
            frontends.get::<_, Frontend>(&FrontendKey::new(ip, to.port(), protocol)).ok().flatten()
        };
        let ip = Ipx::from(to.ip());
        let find = || read(ip).or_else(|| read(Ipx::any(ip.family()))).map(|frontend| frontend.service_id);
        let id = *self.by_destination.entry((to, protocol)).or_insert_with(find);
        self.service(id?)
    }

    /// `None`: there is none, or it is in another network namespace.
    pub fn device(&mut self, index: u32) -> Option<String> {
        if index == 0 {
            return None;
        }
        let read = || nix::net::if_::if_indextoname(index).ok().map(|name| name.to_string_lossy().into_owned());
        self.devices.entry(index).or_insert_with(read).clone()
    }

    /// An address of the network namespace with this cookie, of the family of `like`. `process`: one that was there.
    pub fn address_of(&mut self, cookie: u64, process: u32, like: IpAddr) -> Option<IpAddr> {
        of_family(&self.namespace(cookie, process)?.addresses, like)
    }

    /// What its UTS namespace is called, of a pod its name; `None`: as this process's is, or it is not known.
    pub fn host_of(&mut self, cookie: u64, process: u32) -> Option<String> {
        let own = self.own_host.clone();
        self.namespace(cookie, process)?.host.clone().filter(|host| *host != own)
    }

    fn namespace(&mut self, cookie: u64, process: u32) -> Option<&NetworkNamespace> {
        let known = self.namespaces.get(&cookie);
        let is_due = known.is_none_or(|(found, since)| found.addresses.is_empty() && since.elapsed() > SEARCH_EVERY);
        if is_due {
            self.namespaces.insert(cookie, (look_into(cookie, process), Instant::now()));
        }
        self.namespaces.get(&cookie).map(|(found, _)| found)
    }
}

/// The first of the same family.
fn of_family(addresses: &[IpAddr], like: IpAddr) -> Option<IpAddr> {
    addresses.iter().copied().find(|ip| ip.is_ipv4() == like.is_ipv4())
}
