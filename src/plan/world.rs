//! The cluster as the sources tell it: Services with their EndpointSlices, and this node. Applies changes one by one,
//! sweeps after relists, and knows which Services have to be compiled again.

use std::mem;

use super::arrivals::Arrivals;
use super::compile::{Compiled, Context, compile};
use super::explain::explain;
use super::fit;
use super::health::health_check;
use super::large::{Large, PortChange};
use super::quotas::{Amounts, Demand, Quotas, Resource};
use super::select::Place;
use super::warnings::{Origin, WarningBook};
use crate::explain as told;
use crate::model::{
    Change, HealthCheck, Ipx, Kind, Masquerade, Node, ObjectName, Protocol, Service, ServicePort, Slice,
};
use crate::table::{HashMap, HashSet};

/// A relist's state: what was not stamped with the current epoch when the list ends is gone.
#[derive(Debug, Default)]
struct Listing {
    epoch: u32,
    open: bool,
    listed: bool,
}

impl Listing {
    fn begin(&mut self) {
        self.epoch += 1;
        self.open = true;
    }

    /// True when there is something to sweep.
    fn end(&mut self) -> bool {
        self.listed = true;
        mem::take(&mut self.open)
    }
}

/// A Service and its slices; either may come first.
#[derive(Debug, Default)]
struct Entry {
    service: Option<Box<Service>>,
    stamp: u32,
    /// With the epoch of the list that had them last; sorted by name.
    slices: Vec<(u32, Box<Slice>)>,
    /// Of all slices, as `fit::endpoint_rows`.
    endpoint_rows: u32,
    /// What the Service asks for of the maps.
    demand: Amounts,
    /// Of a Service with many endpoints, since it was last laid out as a whole.
    large: Option<Box<Large>>,
}

impl Entry {
    /// Where the slice of this name is, or would be.
    fn find(&self, slice: &ObjectName) -> Result<usize, usize> {
        self.slices.binary_search_by(|(_, known)| known.name.cmp(slice))
    }

    /// The Service is another.
    fn ask(&mut self, quotas: &mut Quotas) {
        let rows = self.service.as_deref().map(|service| fit::demand(service, self.endpoint_rows)).unwrap_or_default();
        quotas.change(&std::mem::replace(&mut self.demand, rows), &rows);
    }

    /// One slice has this many rows now, where it had `before`.
    fn ask_for_slice(&mut self, before: u32, now: u32, quotas: &mut Quotas) {
        self.endpoint_rows = self.endpoint_rows.saturating_sub(before).saturating_add(now);
        if self.service.is_some() {
            let before = self.demand;
            self.demand[Resource::Endpoints as usize] = self.endpoint_rows;
            quotas.change(&before, &self.demand);
        }
    }
}

/// Of a Service with fewer endpoints all are compiled: that costs less than to keep count of them.
const LARGE_FROM: usize = 1024;

/// Services to be laid out.
#[derive(Debug, Default)]
struct Dirty {
    /// As a whole.
    whole: HashSet<ObjectName>,
    /// Or as their `Large` says.
    parts: HashSet<ObjectName>,
}

impl Dirty {
    fn note(&mut self, name: ObjectName, whole: bool) {
        let set = if whole { &mut self.whole } else { &mut self.parts };
        set.insert(name);
    }
}

/// Everything known of the cluster.
#[derive(Debug, Default)]
pub struct World {
    node_name: Box<str>,
    masquerade: Masquerade,
    node: Option<Box<Node>>,
    node_seen: bool,
    entries: HashMap<ObjectName, Entry>,
    /// Which Service (of the slice's namespace) each slice belongs to.
    owners: HashMap<ObjectName, ObjectName>,
    services: Listing,
    slices: Listing,
    nodes: Listing,
    bound: HashSet<Ipx>,
    dirty: Dirty,
    /// Services with as many endpoints are `Large`.
    large_from: usize,
    /// Every Service has to be compiled again, because the node's zone is another.
    zone_changed: bool,
    arrivals: Arrivals,
    quotas: Quotas,
    service_count: usize,
    endpoint_count: usize,
}

impl World {
    /// `node_name`: this node, as endpoints and hints name it.
    pub fn new(node_name: &str, masquerade: Masquerade) -> Self {
        World { node_name: node_name.into(), masquerade, large_from: LARGE_FROM, ..World::default() }
    }

    /// Applies one event of a source.
    pub fn apply(&mut self, change: Change, book: &mut WarningBook) {
        match &change {
            Change::Service(_) | Change::ServiceGone(_) => self.arrivals.services.total += 1,
            Change::Slice(_) | Change::SliceGone(_) => self.arrivals.slices.total += 1,
            _ => {}
        }
        match change {
            Change::Service(service) => self.service(service),
            Change::ServiceGone(name) => self.service_gone(&name),
            Change::Slice(slice) => self.slice(slice),
            Change::SliceGone(name) => self.slice_gone(&name),
            Change::Node(node) => {
                // A source may hold other nodes' objects too (a directory); they say nothing about this one.
                if *node.name == *self.node_name {
                    self.node_seen = true;
                    self.set_node(Some(node));
                }
            }
            Change::NodeGone => self.set_node(None),
            Change::ListBegin(kind) => self.begin(kind),
            Change::ListEnd(kind) => self.end(kind),
            Change::Warnings { subject, warnings } => book.set(Origin::Source(subject.into()), warnings),
        }
    }

    /// Services and EndpointSlices have both listed once.
    pub fn ready(&self) -> bool {
        self.services.listed && self.slices.listed
    }

    pub fn node(&self) -> Option<&Node> {
        self.node.as_deref()
    }

    /// Numbers of Services, EndpointSlices and endpoints in these.
    pub fn counts(&self) -> (usize, usize, usize) {
        (self.service_count, self.owners.len(), self.endpoint_count)
    }

    /// All addresses bound on this node's devices. Services whose cluster IP came or went among them are dirty.
    pub fn set_bound(&mut self, bound: HashSet<Ipx>) {
        let old = mem::replace(&mut self.bound, bound);
        let changed: HashSet<Ipx> = old.symmetric_difference(&self.bound).copied().collect();
        if changed.is_empty() {
            return;
        }
        let touched =
            |entry: &Entry| entry.service.as_ref().is_some_and(|s| s.cluster_ips.iter().any(|ip| changed.contains(ip)));
        self.dirty.whole.extend(self.entries.iter().filter(|(_, e)| touched(e)).map(|(name, _)| name.clone()));
    }

    /// What came, for the metrics.
    pub fn arrivals(&self) -> &Arrivals {
        &self.arrivals
    }

    pub fn arrivals_mut(&mut self) -> &mut Arrivals {
        &mut self.arrivals
    }

    /// Whether all Services were made dirty at once since this was last asked.
    pub fn take_zone_changed(&mut self) -> bool {
        mem::take(&mut self.zone_changed)
    }

    /// Marks a Service to be compiled again.
    pub fn mark(&mut self, name: ObjectName) {
        self.dirty.whole.insert(name);
    }

    /// The Services to be compiled, sorted; none of them is dirty any more.
    pub fn take_dirty(&mut self) -> Vec<ObjectName> {
        let Dirty { mut whole, parts } = mem::take(&mut self.dirty);
        for name in &whole {
            if let Some(entry) = self.entries.get_mut(name) {
                entry.large = None;
            }
        }
        whole.extend(parts);
        let mut names: Vec<ObjectName> = whole.into_iter().collect();
        names.sort_unstable();
        names
    }

    /// When the Service was created, as `Service::created`; `None` when there is no such Service.
    pub fn created(&self, name: &ObjectName) -> Option<i64> {
        Some(self.entries.get(name)?.service.as_deref()?.created)
    }

    /// What the Service of this name asks for now; `None` when there is no such Service.
    pub fn compile(&self, name: &ObjectName) -> Option<Compiled> {
        let entry = self.entries.get(name)?;
        let service = entry.service.as_deref()?;
        let slices: Vec<&Slice> = entry.slices.iter().map(|(_, slice)| &**slice).collect();
        Some(compile(service, &slices, self.context(name)))
    }

    /// What this Service is compiled against.
    fn context(&self, name: &ObjectName) -> Context<'_> {
        Context {
            place: place(&self.node_name, &self.node),
            bound: &self.bound,
            limits: self.quotas.of(name),
            masquerade: self.masquerade,
            internal_ips: self.node().map_or(&[], |node| &node.internal_ips),
        }
    }

    /// What the Service of this name asks for, and why it has it or not; `None` when there is no such Service.
    pub fn explain(&self, name: &ObjectName) -> Option<told::Service> {
        let entry = self.entries.get(name)?;
        let slices: Vec<&Slice> = entry.slices.iter().map(|(_, slice)| &**slice).collect();
        Some(explain(entry.service.as_deref()?, &slices, self.context(name)))
    }

    /// The Services that have `ip` among their addresses, or where it `is_node`, the number as a NodePort: those with the
    /// very port first, then by name.
    pub fn asking_for(&self, ip: Ipx, number: u16, protocol: Protocol, is_node: bool) -> Vec<ObjectName> {
        let rank = |service: &Service| {
            let mut ips = service.cluster_ips.iter().chain(&service.external_ips).chain(&service.load_balancer_ips);
            let has_port = |of: fn(&ServicePort) -> u16| {
                service.ports.iter().any(|port| of(port) == number && port.protocol == protocol)
            };
            match ips.any(|own| *own == ip) {
                true => Some(!has_port(|port| port.port)),
                false => (is_node && has_port(|port| port.node_port)).then_some(false),
            }
        };
        let services = self.entries.values().filter_map(|entry| entry.service.as_deref());
        let mut ranked: Vec<(bool, &ObjectName)> =
            services.filter_map(|service| Some((rank(service)?, &service.name))).collect();
        ranked.sort_unstable();
        ranked.into_iter().map(|(_, name)| name.clone()).collect()
    }

    /// This node's name, and its zone.
    pub fn place(&self) -> Place<'_> {
        place(&self.node_name, &self.node)
    }

    /// The Service of this name is laid out as `compiled` says: from now on its changes may be told one by one.
    pub fn laid_out(&mut self, name: &ObjectName, compiled: &Compiled) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        entry.large = None;
        let slices: Vec<&Slice> = entry.slices.iter().map(|(_, slice)| &**slice).collect();
        if slices.iter().map(|slice| slice.endpoints.len()).sum::<usize>() >= self.large_from {
            let service = entry.service.as_deref();
            let place = place(&self.node_name, &self.node);
            entry.large = service.and_then(|service| Large::new(service, &slices, compiled, place)).map(Box::new);
        }
    }

    /// What has changed of a large Service since it was last laid out, for each of its ports; `None` when it has to be
    /// compiled as a whole.
    pub fn take_changes(&mut self, name: &ObjectName) -> Option<Vec<PortChange>> {
        let entry = self.entries.get_mut(name)?;
        let large = entry.large.as_mut()?;
        let limit = self.quotas.of(name)[Resource::Endpoints as usize];
        let changes = large.take_changes(place(&self.node_name, &self.node));
        let changes = changes.filter(|_| entry.demand[Resource::Endpoints as usize] <= limit);
        if changes.is_none() {
            entry.large = None;
        }
        changes
    }

    /// Services with as many endpoints are large. For tests, which have fewer.
    pub fn set_large_from(&mut self, endpoints: usize) {
        self.large_from = endpoints;
    }

    /// How many rows of each `quotas::Resource` the maps hold. Services whose quota of them is another are dirty.
    pub fn set_capacity(&mut self, capacity: Amounts) {
        if self.quotas.set_capacity(capacity) {
            self.entries.values().for_each(|entry| self.quotas.change(&Amounts::default(), &entry.demand));
        }
        let entries = &self.entries;
        let all = || {
            let asking = entries.iter().filter_map(|(name, entry)| Some((name, entry, entry.service.as_deref()?)));
            asking.map(|(name, entry, service)| Demand { name, created: service.created, rows: &entry.demand })
        };
        self.dirty.whole.extend(self.quotas.settle(all));
    }

    /// Rows of `resource` that all Services together may get at most.
    pub fn asked(&self, resource: Resource) -> usize {
        self.quotas.asked(resource)
    }

    /// What load balancers are told of the Service of this name; `None` when they may not ask.
    pub fn health_check(&self, name: &ObjectName) -> Option<HealthCheck> {
        let entry = self.entries.get(name)?;
        let service = entry.service.as_deref().filter(|service| service.health_check_node_port != 0)?;
        if let Some(large) = &entry.large {
            let (service, port) = (service.name.clone(), service.health_check_node_port);
            return Some(HealthCheck { service, port, local_endpoints: large.local_endpoints() as u32 });
        }
        let slices: Vec<&Slice> = entry.slices.iter().map(|(_, slice)| &**slice).collect();
        health_check(service, &slices, &self.node_name)
    }

    fn service(&mut self, service: Box<Service>) {
        let entry = self.entries.entry(service.name.clone()).or_default();
        entry.stamp = self.services.epoch;
        if entry.service.as_ref() == Some(&service) {
            return;
        }
        self.service_count += usize::from(entry.service.is_none());
        self.dirty.whole.insert(service.name.clone());
        self.arrivals.services.pending += 1;
        if entry.service.as_ref().is_some_and(|before| before.created != service.created) {
            self.quotas.change_order();
        }
        entry.service = Some(service);
        entry.ask(&mut self.quotas);
    }

    fn service_gone(&mut self, name: &ObjectName) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        if entry.service.take().is_some() {
            self.service_count -= 1;
            self.arrivals.services.pending += 1;
            self.dirty.whole.insert(name.clone());
            entry.ask(&mut self.quotas);
        }
        if entry.slices.is_empty() {
            self.entries.remove(name);
        }
    }

    fn slice(&mut self, slice: Box<Slice>) {
        let owner = ObjectName { namespace: slice.name.namespace.clone(), name: slice.service.clone() };
        if self.owners.get(&slice.name).is_some_and(|before| *before != owner) {
            self.slice_gone(&slice.name.clone());
        }
        let stamp = self.slices.epoch;
        let place = place(&self.node_name, &self.node);
        let entry = self.entries.entry(owner.clone()).or_default();
        match entry.find(&slice.name) {
            Ok(at) => {
                let (old_stamp, old) = &mut entry.slices[at];
                *old_stamp = stamp;
                if old.ports != slice.ports || old.endpoints != slice.endpoints {
                    self.arrivals.slice_changed(&owner, &slice, Some(old));
                    let is_noted = note_slice(&mut entry.large, Some(old), Some(&slice), place);
                    self.dirty.note(owner, !is_noted);
                }
                self.endpoint_count = self.endpoint_count + slice.endpoints.len() - old.endpoints.len();
                let (before, now) = (fit::endpoint_rows(old), fit::endpoint_rows(&slice));
                *old = slice;
                entry.ask_for_slice(before, now, &mut self.quotas);
            }
            Err(at) => {
                self.endpoint_count += slice.endpoints.len();
                self.owners.insert(slice.name.clone(), owner.clone());
                self.arrivals.slice_changed(&owner, &slice, None);
                self.dirty.note(owner, !note_slice(&mut entry.large, None, Some(&slice), place));
                let rows = fit::endpoint_rows(&slice);
                entry.slices.insert(at, (stamp, slice));
                entry.ask_for_slice(0, rows, &mut self.quotas);
            }
        }
    }

    fn slice_gone(&mut self, name: &ObjectName) {
        let Some(owner) = self.owners.remove(name) else { return };
        let Some(entry) = self.entries.get_mut(&owner) else { return };
        let mut is_noted = false;
        if let Ok(at) = entry.find(name) {
            let (_, slice) = entry.slices.remove(at);
            self.endpoint_count -= slice.endpoints.len();
            entry.ask_for_slice(fit::endpoint_rows(&slice), 0, &mut self.quotas);
            let place = place(&self.node_name, &self.node);
            is_noted = note_slice(&mut entry.large, Some(&slice), None, place);
        }
        if entry.slices.is_empty() && entry.service.is_none() {
            self.entries.remove(&owner);
        }
        self.arrivals.slice_gone(&owner);
        self.dirty.note(owner, !is_noted);
    }

    /// The zone decides which endpoints are hinted for this node, so that a new one touches every Service.
    fn set_node(&mut self, node: Option<Box<Node>>) {
        let zone_of = |node: &Option<Box<Node>>| node.as_ref().and_then(|n| n.zone.clone());
        let moved = zone_of(&node) != zone_of(&self.node);
        let addresses_of = |node: &Option<Box<Node>>| node.as_ref().map(|n| n.internal_ips.clone()).unwrap_or_default();
        if addresses_of(&node) != addresses_of(&self.node) {
            let asks = |entry: &Entry| entry.service.as_ref().is_some_and(|s| !s.source_ranges.is_empty());
            self.dirty.whole.extend(self.entries.iter().filter(|(_, e)| asks(e)).map(|(name, _)| name.clone()));
        }
        self.node = node;
        if moved {
            self.zone_changed = true;
            self.dirty.whole.extend(self.entries.keys().cloned());
            // What has been counted was counted for the zone of before.
            self.entries.values_mut().for_each(|entry| entry.large = None);
        }
    }

    fn begin(&mut self, kind: Kind) {
        match kind {
            Kind::Services => self.services.begin(),
            Kind::EndpointSlices => self.slices.begin(),
            Kind::Node => {
                self.nodes.begin();
                self.node_seen = false;
            }
        }
    }

    fn end(&mut self, kind: Kind) {
        match kind {
            Kind::Services if self.services.end() => {
                let epoch = self.services.epoch;
                let stale = |entry: &Entry| entry.service.is_some() && entry.stamp != epoch;
                let gone: Vec<ObjectName> =
                    self.entries.iter().filter(|(_, e)| stale(e)).map(|(name, _)| name.clone()).collect();
                self.arrivals.services.total += gone.len() as u64;
                gone.iter().for_each(|name| self.service_gone(name));
            }
            Kind::EndpointSlices if self.slices.end() => {
                let epoch = self.slices.epoch;
                let all = self.entries.values().flat_map(|entry| &entry.slices);
                let gone: Vec<ObjectName> =
                    all.filter(|(stamp, _)| *stamp != epoch).map(|(_, slice)| slice.name.clone()).collect();
                self.arrivals.slices.total += gone.len() as u64;
                gone.iter().for_each(|name| self.slice_gone(name));
            }
            Kind::Node if self.nodes.end() && !self.node_seen => self.set_node(None),
            _ => {}
        }
    }
}

/// The slice `before` is `now`. True when that is for `large` to tell, and not for all endpoints together.
fn note_slice(large: &mut Option<Box<Large>>, before: Option<&Slice>, now: Option<&Slice>, place: Place) -> bool {
    let is_noted = large.as_mut().is_some_and(|large| large.change(before, now, place));
    if !is_noted {
        *large = None;
    }
    is_noted
}

fn place<'a>(node_name: &'a str, node: &'a Option<Box<Node>>) -> Place<'a> {
    Place { node: node_name, zone: node.as_ref().and_then(|node| node.zone.as_deref()) }
}

#[cfg(test)]
#[path = "world_tests.rs"]
mod tests;
