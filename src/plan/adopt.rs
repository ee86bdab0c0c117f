//! Taking over the rows of a former daemon: who has which id, which region, which order. What is found becomes the applied
//! state as it is, and only what makes sense becomes the layout's; the first sync then compares with the world, so that an
//! unchanged world writes nothing, orphans go, and damage is repaired like any other difference.

use std::ops::Range;

use super::compile::{CompiledFrontend, PoolUse};
use super::layout::Layout;
use super::pool::Pool;
use super::port::{Assignment, Port, pool_index, row_name};
use super::tables::is_gone;
use crate::abi::backend_state::{BACKEND_ACTIVE, BACKEND_GONE, BACKEND_TERMINATING};
use crate::abi::pool_member::{POOL_CLUSTER, POOL_LOCAL};
use crate::abi::{Backend, Frontend, FrontendKey, ServiceName, SourceRangeKey};
use crate::model::{Ipx, ObjectName, Protocol, SocketAddrx};
use crate::table::HashMap;

/// What was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AdoptReport {
    /// Service ports taken over.
    pub services: usize,
    pub backends: usize,
    pub frontends: usize,
    /// Rows that make no sense; the first sync deletes them or marks them gone.
    pub unusable: usize,
}

/// Everything the maps hold, sorted by key.
#[derive(Default)]
pub struct Found {
    pub names: Vec<(u32, ServiceName)>,
    pub backends: Vec<(u32, Backend)>,
    pub slots: Vec<(u32, u32)>,
    pub frontends: Vec<(FrontendKey, Frontend)>,
    pub addresses: Vec<([u8; 16], u32)>,
    pub source_ranges: Vec<(SourceRangeKey, u32)>,
}

/// The pools that frontends show: by service id and [`pool_index`], the base and count of each row.
type Sightings = HashMap<(u32, usize), Vec<(u32, u32)>>;

impl Layout {
    /// Fills a fresh layout. Returns also the Services that have rows, each of which has to be compiled once.
    pub fn adopt(&mut self, found: &Found) -> (AdoptReport, Vec<ObjectName>) {
        record(self, found);
        let mut report = AdoptReport::default();
        adopt_names(self, found, &mut report);
        let sightings = adopt_frontends(self, found, &mut report);
        adopt_backends(self, found, &mut report);
        adopt_regions(self, found, sightings);
        for (address, _) in &found.addresses {
            self.reconsider_address(Ipx(*address));
        }
        adopt_source_ranges(self, found, &mut report);
        adopt_ids(self, found);
        (report, index_services(self))
    }
}

/// Applied is what the kernel has, sense or not.
fn record(layout: &mut Layout, found: &Found) {
    let tables = &mut layout.space.tables;
    found.names.iter().for_each(|(key, row)| tables.services.confirm(*key, Some(*row)));
    found.backends.iter().for_each(|(key, row)| tables.backends.confirm(*key, Some(*row)));
    found.slots.iter().for_each(|(key, row)| tables.slots.confirm(*key, Some(*row)));
    found.frontends.iter().for_each(|(key, row)| tables.frontends.confirm(*key, Some(*row)));
    found.addresses.iter().for_each(|(key, row)| tables.addresses.confirm(*key, Some(*row)));
    found.source_ranges.iter().for_each(|(key, row)| tables.source_ranges.confirm(*key, Some(*row)));
}

fn adopt_names(layout: &mut Layout, found: &Found, report: &mut AdoptReport) {
    for (id, row) in &found.names {
        match parse_name(row).filter(|_| layout.space.service_ids.contains(*id)) {
            Some((service, port)) => {
                layout.ports.insert(*id, Box::new(Port::new(service, port.into())));
                report.services += 1;
            }
            None => {
                layout.space.tables.services.unset(*id);
                report.unusable += 1;
            }
        }
    }
}

/// "namespace/name:port" or "namespace/name"; nothing that would not be written the same way again.
fn parse_name(row: &ServiceName) -> Option<(ObjectName, &str)> {
    let (namespace, rest) = row.as_str().split_once('/')?;
    let (name, port) = rest.split_once(':').unwrap_or((rest, ""));
    let service = ObjectName::new(namespace, name);
    (!namespace.is_empty() && !name.is_empty() && row_name(&service, port) == *row).then_some((service, port))
}

/// The port with this id, if rows of this protocol can be its.
fn port_for(layout: &mut Layout, id: u32, protocol: u8) -> Option<&mut Port> {
    let protocol = Protocol::of_number(protocol)?;
    let port = layout.ports.get_mut(&id)?;
    (*port.protocol.get_or_insert(protocol) == protocol).then_some(port)
}

fn adopt_frontends(layout: &mut Layout, found: &Found, report: &mut AdoptReport) -> Sightings {
    let mut sightings = Sightings::default();
    for (key, row) in &found.frontends {
        let Some(port) = port_for(layout, row.service_id, key.protocol).filter(|_| key.zero == 0) else {
            layout.space.tables.frontends.unset(*key);
            report.unusable += 1;
            continue;
        };
        let pool_use = |pool: &crate::abi::Pool| PoolUse { member: pool.member, on_empty: pool.on_empty };
        port.affinity_seconds = row.affinity_seconds;
        port.frontends.push(CompiledFrontend {
            key: *key,
            flags: row.flags as u8,
            inside: pool_use(&row.inside),
            outside: pool_use(&row.outside),
        });
        let rank = port.rank(row.service_id);
        layout.claim(*key, &rank);
        for pool in [row.inside, row.outside] {
            if [POOL_CLUSTER, POOL_LOCAL].contains(&u32::from(pool.member)) && pool.count > 0 {
                let index = pool_index(key.ip().family(), pool.member);
                sightings.entry((row.service_id, index)).or_default().push((pool.base, pool.count));
            }
        }
        report.frontends += 1;
    }
    sightings
}

fn adopt_backends(layout: &mut Layout, found: &Found, report: &mut AdoptReport) {
    for (id, row) in found.backends.iter().filter(|(_, row)| !is_gone(row)) {
        let at = SocketAddrx { ip: Ipx(row.address), port: u16::from_be_bytes(row.port_be) };
        let sound = [BACKEND_ACTIVE, BACKEND_TERMINATING].contains(&u32::from(row.state))
            && row.generation > 0
            && layout.space.backend_ids.contains(*id);
        let port = port_for(layout, row.service_id, row.protocol).filter(|_| sound);
        match port.and_then(|port| Some((port.assignments.binary_search_by_key(&at, |t| t.at).err()?, port))) {
            Some((place, port)) => {
                port.assignments.insert(place, Assignment { at, id: *id, pools: row.pools });
                layout.space.assignments += 1;
                report.backends += 1;
            }
            None => {
                let generation = row.generation.max(1);
                let gone = Backend { state: BACKEND_GONE as u8, pools: 0, generation, ..*row };
                layout.space.tables.backends.set(*id, gone);
                report.unusable += 1;
            }
        }
    }
}

/// Frontends of one pool may disagree after a sync that failed half way: the first sound region is kept, the other
/// rows are written again, and no slot found in use is given out before that has happened.
fn adopt_regions(layout: &mut Layout, found: &Found, sightings: Sightings) {
    let size = layout.space.regions.size();
    let mut regions: Vec<(u32, u32, u32, usize)> = Vec::new();
    let mut highest = found.slots.last().map_or(0, |(slot, _)| slot.saturating_add(1));
    for ((id, index), seen) in sightings {
        highest = seen.iter().fold(highest, |high, (base, count)| high.max(base.saturating_add(*count)));
        if let Some((base, count)) = sound_region(&seen, size) {
            regions.push((base, count, id, index));
        }
    }
    regions.sort_unstable();
    let mut used: Vec<Range<u32>> = Vec::new();
    for (base, count, id, index) in regions {
        let capacity = count.next_power_of_two();
        let free = used.last().is_none_or(|before| before.end <= base);
        if let Some(port) = layout.ports.get_mut(&id).filter(|_| free) {
            port.pools[index] = Pool { base, capacity, count };
            layout.space.filled_slots += count as usize;
            used.push(base..base + capacity);
        }
    }
    layout.space.regions.adopt(&used, highest.min(size));
}

/// The base that the first sound row shows, with the largest count of it.
fn sound_region(seen: &[(u32, u32)], size: u32) -> Option<(u32, u32)> {
    let is_sound = |base: u32, count: u32| {
        let capacity = count.checked_next_power_of_two().unwrap_or(u32::MAX);
        base.is_multiple_of(capacity) && base.checked_add(capacity).is_some_and(|end| end <= size)
    };
    seen.iter().find_map(|(base, _)| {
        let count = seen.iter().filter(|(b, _)| b == base).map(|(_, count)| *count).max()?;
        is_sound(*base, count).then_some((*base, count))
    })
}

/// Rows in the order of their keys, as `Port::source_ranges` is.
fn adopt_source_ranges(layout: &mut Layout, found: &Found, report: &mut AdoptReport) {
    for (key, _) in &found.source_ranges {
        match layout.ports.get_mut(&key.service_id) {
            Some(port) => {
                let at = port.source_ranges.partition_point(|known| known < key);
                port.source_ranges.insert(at, *key);
            }
            None => {
                layout.space.tables.source_ranges.unset(*key);
                report.unusable += 1;
            }
        }
    }
}

/// A service id whose name is gone from its hash map is still told by its backends' rows, which keep it until they rest
/// no more; one that never had a backend left nothing that a running program could mistake.
fn adopt_ids(layout: &mut Layout, found: &Found) {
    let owners = found.frontends.iter().map(|(_, row)| row.service_id);
    let assignments = found.backends.iter().map(|(_, row)| row.service_id);
    let services = found.names.iter().map(|(id, _)| *id).chain(owners).chain(assignments).max().unwrap_or(0);
    layout.space.service_ids.adopt(services, |id| layout.ports.contains_key(&id));
    let backends = found.backends.last().map_or(0, |(id, _)| *id);
    let used: crate::table::HashSet<u32> = layout.ports.values().flat_map(|p| &p.assignments).map(|t| t.id).collect();
    layout.space.backend_ids.adopt(backends, |id| used.contains(&id));
}

/// Of two ids with one name (a crash between a new name and the deletion of the old one) the one with frontends is
/// found first; the other is removed like any port that its Service no longer has.
fn index_services(layout: &mut Layout) -> Vec<ObjectName> {
    let mut order: Vec<(bool, u32, ObjectName)> =
        layout.ports.iter().map(|(id, port)| (port.frontends.is_empty(), *id, port.service.clone())).collect();
    order.sort_unstable();
    for (_, id, service) in &order {
        layout.services.entry(service.clone()).or_default().ports.push(*id);
    }
    layout.services.keys().cloned().collect()
}
