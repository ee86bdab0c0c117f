//! From what Services ask for to rows with ids: keeps every Service port's place in the kernel, settles contested
//! frontends, and gives ids and regions back once nothing in the kernel leads to them.

use std::collections::BTreeSet;
use std::time::Instant;

use super::claims::{AddressRoles, Claims, Rank};
use super::compile::{Compiled, CompiledPort};
use super::large::PortChange;
use super::port::{Port, Shortage, row_name};
use super::tables::{Space, Tables, is_gone};
use super::warnings::{Origin, WarningBook, service_warning};
use crate::abi::FrontendKey;
use crate::abi::address_flag::{ADDRESS_LOCAL, ADDRESS_NODE};
use crate::model::{Ipx, ObjectName, Protocol, Warning};
use crate::table::{HashMap, HashSet, Rows};

/// A Service's allocation: its ports' ids and the addresses it asked for.
#[derive(Debug, Default)]
pub(super) struct Allocation {
    pub ports: Vec<u32>,
    /// Ports that found no id.
    pub nameless: usize,
    pub addresses: Vec<(Ipx, u32)>,
    /// As `Compiled::is_cut`.
    pub is_cut: bool,
}

/// Every row that is wanted, and where.
#[derive(Debug, Default)]
pub struct Layout {
    pub(super) space: Space,
    /// By service id.
    pub(super) ports: HashMap<u32, Box<Port>>,
    pub(super) services: HashMap<ObjectName, Allocation>,
    claims: Claims,
    addresses: AddressRoles,
    node_addresses: HashSet<Ipx>,
    outward_addresses: HashSet<Ipx>,
    /// Service ids that have something left behind.
    unsettled: HashSet<u32>,
    /// Services that did not get all they asked for.
    starved: HashSet<ObjectName>,
    /// These, and Services that ask for more than their allocation.
    degraded: HashSet<ObjectName>,
    /// Frontends whose claims have changed since their warnings were last brought up to date, and those with warnings.
    contests: BTreeSet<FrontendKey>,
    contested: HashSet<FrontendKey>,
}

/// Frontends, each with the owner that it had.
type Touched = Vec<(FrontendKey, Option<u32>)>;

impl Layout {
    /// The rows that are wanted, and those that are in the kernel.
    pub fn tables(&self) -> &Tables {
        &self.space.tables
    }

    pub fn tables_mut(&mut self) -> &mut Tables {
        &mut self.space.tables
    }

    /// Whether frontends of the Service port with this id ask for source ranges.
    pub fn asks_for_source_ranges(&self, id: u32) -> bool {
        self.ports.get(&id).is_some_and(|port| port.asks_for_source_ranges())
    }

    /// Whether the kernel has backends that the Service port with this id had and that are not marked gone yet.
    pub fn has_living_backends(&self, id: u32) -> bool {
        let lives = |id: u32| self.space.tables.backends.applied(id).is_some_and(|row| !is_gone(&row));
        self.ports.get(&id).is_some_and(|port| port.leaving.iter().any(|assignment| lives(assignment.id)))
    }

    /// How many rows the maps hold.
    pub fn set_capacity(&mut self, services: u32, backends: u32, slots: u32) {
        self.space.service_ids.set_last(services);
        // Index 0 is never used, so that the last index is one less than the number of rows.
        self.space.backend_ids.set_last(backends.saturating_sub(1));
        self.space.regions.set_size(slots);
    }

    /// Takes back what has rested. Returns the Services that waited for room.
    pub fn release(&mut self, now: Instant) -> Vec<ObjectName> {
        let ids = self.space.service_ids.release(now) | self.space.backend_ids.release(now);
        if self.space.regions.release(now) | ids { self.starved.iter().cloned().collect() } else { Vec::new() }
    }

    /// When waiting Services may get more; `None` when none waits or nothing rests.
    pub fn next_due(&self) -> Option<Instant> {
        if self.starved.is_empty() {
            return None;
        }
        let space = &self.space;
        [space.service_ids.next_due(), space.backend_ids.next_due(), space.regions.next_due()]
            .into_iter()
            .flatten()
            .min()
    }

    /// The addresses that serve NodePorts.
    pub fn set_node_addresses(&mut self, wanted: HashSet<Ipx>) {
        let before = std::mem::replace(&mut self.node_addresses, wanted.clone());
        self.change_role(ADDRESS_NODE, &before, &wanted);
    }

    /// The addresses of outward devices.
    pub fn set_outward_addresses(&mut self, wanted: HashSet<Ipx>) {
        let before = std::mem::replace(&mut self.outward_addresses, wanted.clone());
        self.change_role(ADDRESS_LOCAL, &before, &wanted);
    }

    fn change_role(&mut self, role: u32, before: &HashSet<Ipx>, wanted: &HashSet<Ipx>) {
        for ip in before.difference(wanted) {
            let flags = self.addresses.remove(ip.0, role);
            want_address(&mut self.space, *ip, flags);
        }
        for ip in wanted.difference(before) {
            let flags = self.addresses.add(ip.0, role);
            want_address(&mut self.space, *ip, flags);
        }
    }

    /// Wants for an address found in the kernel what is asked of it so far.
    pub(super) fn reconsider_address(&mut self, ip: Ipx) {
        let flags = self.addresses.add(ip.0, 0);
        want_address(&mut self.space, ip, flags);
    }

    /// Lays out one Service; `None` when it is gone.
    pub fn place(&mut self, name: &ObjectName, compiled: Option<&Compiled>, book: &mut WarningBook) {
        let wanted: &[CompiledPort] = compiled.map_or(&[], |c| &c.ports);
        let Some(allocation) = self.services.remove(name).or_else(|| compiled.map(|_| Allocation::default())) else {
            return;
        };

        let mut unmatched = allocation.ports;
        let matched: Vec<Option<u32>> = wanted.iter().map(|port| self.take_match(&mut unmatched, port)).collect();
        let mut touched = Touched::new();
        let (mut ports, mut nameless) = (Vec::with_capacity(wanted.len()), 0);
        for (port, known) in wanted.iter().zip(matched) {
            match known.or_else(|| self.new_port(name, port)) {
                Some(id) => {
                    self.update_port(id, compiled.map_or(i64::MAX, |c| c.created), port, &mut touched);
                    ports.push(id);
                }
                None => nameless += 1,
            }
        }
        for id in unmatched {
            self.remove_port(id, &mut touched);
        }
        let affected = self.settle_owners(&ports, touched);
        self.place_addresses(allocation.addresses, compiled.map_or(&[], |c| &c.addresses));
        if let Some(compiled) = compiled {
            let (addresses, is_cut) = (compiled.addresses.clone(), compiled.is_cut);
            self.services.insert(name.clone(), Allocation { ports, nameless, addresses, is_cut });
        }
        book.set(Origin::Compile(name.clone()), compiled.map_or(Vec::new(), |c| c.warnings.clone()));
        self.note_shortage(name, book);
        for other in affected.iter().filter(|other| *other != name) {
            self.note_shortage(other, book);
        }
    }

    /// Lays out what has changed of a Service, for each of its ports. False: it has to be placed as a whole, because it has
    /// not got all it asks for, or needs another region.
    pub fn adjust(&mut self, name: &ObjectName, changes: &[PortChange]) -> bool {
        let Some(allocation) = self.services.get(name) else { return false };
        if allocation.nameless > 0 || allocation.ports.len() != changes.len() {
            return false;
        }
        for (id, change) in allocation.ports.iter().zip(changes).filter(|(_, change)| !change.is_empty()) {
            let Some(port) = self.ports.get_mut(id) else { return false };
            let is_done = port.adjust(*id, change, &mut self.space);
            if port.is_unsettled() {
                self.unsettled.insert(*id);
            }
            if !is_done {
                return false;
            }
            for frontend in port.frontends.iter().filter(|f| self.claims.owner(f.key) == Some(*id)) {
                self.space.tables.frontends.set(frontend.key, port.row(*id, frontend));
            }
        }
        true
    }

    /// Whether something that the kernel may still follow leads to what `id` has left behind is for the caller to say:
    /// `busy` ports are passed over. The others' regions and ids start their rest.
    pub fn settle(&mut self, busy: &HashSet<u32>, now: Instant) {
        let ids: Vec<u32> = self.unsettled.iter().copied().filter(|id| !busy.contains(id)).collect();
        for id in ids {
            let Some(port) = self.ports.get_mut(&id) else {
                self.unsettled.remove(&id);
                continue;
            };
            let space = &mut self.space;
            for range in port.retired.drain(..) {
                space.regions.rest(range, now);
            }
            port.leaving.retain(|assignment| {
                let waits = space.tables.backends.applied(assignment.id).is_some_and(|row| !is_gone(&row));
                if !waits {
                    space.backend_ids.rest(assignment.id, now);
                }
                waits
            });
            if port.removed && port.leaving.is_empty() && space.tables.services.applied(id).is_none() {
                self.ports.remove(&id);
                space.service_ids.rest(id, now);
                self.unsettled.remove(&id);
            } else if !port.is_unsettled() {
                self.unsettled.remove(&id);
            }
        }
    }

    /// Nothing is left to be written, so that nothing in the kernel leads to what was found unused at adoption.
    pub fn end_quarantine(&mut self, now: Instant) {
        self.space.service_ids.end_quarantine(now);
        self.space.backend_ids.end_quarantine(now);
        self.space.regions.end_quarantine(now);
    }

    /// Whether NodePorts are served at this address.
    pub fn serves_node_ports(&self, ip: Ipx) -> bool {
        self.node_addresses.contains(&ip)
    }

    /// "namespace/name:port" of the port of another Service than `service` that has this frontend.
    pub fn other_owner(&self, key: FrontendKey, service: &ObjectName) -> Option<String> {
        let owner = self.ports.get(&self.claims.owner(key)?).filter(|port| port.service != *service)?;
        Some(row_name(&owner.service, &owner.name).as_str().to_owned())
    }

    /// How many Services have not got all they ask for.
    pub fn degraded(&self) -> usize {
        self.degraded.len()
    }

    /// Numbers of frontends and slots in the kernel, and of backends in use.
    pub fn counts(&self) -> (usize, usize, usize) {
        (self.space.tables.frontends.rows().len(), self.space.assignments, self.space.filled_slots)
    }

    fn take_match(&self, unmatched: &mut Vec<u32>, wanted: &CompiledPort) -> Option<u32> {
        let fits = |known: Option<Protocol>| known.is_none_or(|p| p == wanted.protocol);
        let at = unmatched
            .iter()
            .position(|id| self.ports.get(id).is_some_and(|port| port.name == wanted.name && fits(port.protocol)))?;
        Some(unmatched.remove(at))
    }

    fn new_port(&mut self, service: &ObjectName, wanted: &CompiledPort) -> Option<u32> {
        let id = self.space.service_ids.allocate()?;
        self.ports.insert(id, Box::new(Port::new(service.clone(), wanted.name.clone())));
        Some(id)
    }

    /// `touched` gets the frontends whose claims change, with their owners of before.
    fn update_port(&mut self, id: u32, created: i64, wanted: &CompiledPort, touched: &mut Touched) {
        let Some(port) = self.ports.get_mut(&id) else { return };
        let before = port.rank(id);
        port.update(id, created, wanted, &mut self.space);
        let rank = port.rank(id);
        for old in std::mem::replace(&mut port.frontends, wanted.frontends.clone()) {
            if before != rank || wanted.frontends.binary_search_by_key(&old.key, |f| f.key).is_err() {
                touched.push((old.key, self.claims.owner(old.key)));
                self.claims.release(old.key, &before);
            }
        }
        for frontend in &wanted.frontends {
            touched.push((frontend.key, self.claims.owner(frontend.key)));
            self.claim(frontend.key, &rank);
        }
    }

    fn remove_port(&mut self, id: u32, touched: &mut Touched) {
        let Some(port) = self.ports.get_mut(&id) else { return };
        let rank = port.rank(id);
        port.remove(id, &mut self.space);
        for old in std::mem::take(&mut port.frontends) {
            touched.push((old.key, self.claims.owner(old.key)));
            self.claims.release(old.key, &rank);
        }
        self.unsettled.insert(id);
    }

    /// The Service port of this rank asks for `key`.
    pub(super) fn claim(&mut self, key: FrontendKey, rank: &Rank) {
        let ports = &self.ports;
        self.claims.claim(key, rank, |id| ports.get(&id).map(|port| port.rank(id)));
    }

    /// Gives every touched frontend to its owner, and fills the pools of `ports` and of those that have won or lost one;
    /// the others that claim it have nothing to do with it. Returns the Services of all these.
    fn settle_owners(&mut self, ports: &[u32], touched: Touched) -> Vec<ObjectName> {
        let mut affected: Vec<u32> = ports.to_vec();
        for (key, before) in &touched {
            let owner = self.claims.owner(*key);
            if owner != *before {
                affected.extend([owner, *before].into_iter().flatten());
            }
        }
        affected.sort_unstable();
        affected.dedup();
        let mut keys: Vec<FrontendKey> = touched.into_iter().map(|(key, _)| key).collect();
        let mut services = Vec::new();
        for id in affected {
            let Some(port) = self.ports.get_mut(&id) else { continue };
            port.fill_pools(|f| self.claims.owner(f.key) == Some(id), &mut self.space);
            if port.is_unsettled() {
                self.unsettled.insert(id);
            }
            keys.extend(port.frontends.iter().map(|f| f.key).filter(|key| self.claims.owner(*key) == Some(id)));
            services.push(port.service.clone());
        }
        keys.sort_unstable();
        keys.dedup();
        keys.iter().for_each(|key| self.resolve(*key));
        services.dedup();
        services
    }

    /// Wants the row of `key` as its owner has it.
    fn resolve(&mut self, key: FrontendKey) {
        let owner = self.claims.owner(key).and_then(|id| Some((id, self.ports.get(&id)?)));
        let row = owner.and_then(|(id, port)| {
            let at = port.frontends.binary_search_by_key(&key, |f| f.key).ok()?;
            Some(port.row(id, &port.frontends[at]))
        });
        match row {
            Some(row) => self.space.tables.frontends.set(key, row),
            None => self.space.tables.frontends.unset(key),
        }
        let is_contested = self.claims.group(key).is_some();
        if is_contested || self.contested.contains(&key) {
            self.contests.insert(key);
        }
    }

    /// Warns once of each frontend that several claim, since this was last called.
    pub fn tell_contests(&mut self, book: &mut WarningBook) {
        for key in std::mem::take(&mut self.contests) {
            let warning = self.claims.group(key).and_then(|group| contest(key, group));
            match warning.is_some() {
                true => self.contested.insert(key),
                false => self.contested.remove(&key),
            };
            book.set(Origin::Contest(key), warning.into_iter().collect());
        }
    }

    fn place_addresses(&mut self, before: Vec<(Ipx, u32)>, wanted: &[(Ipx, u32)]) {
        if before == wanted {
            return;
        }
        for (ip, flags) in wanted {
            self.addresses.add(ip.0, *flags);
        }
        for (ip, flags) in &before {
            self.addresses.remove(ip.0, *flags);
        }
        for (ip, _) in before.iter().chain(wanted) {
            self.reconsider_address(*ip);
        }
    }

    /// Warns of what did not fit, and remembers who waits for room.
    fn note_shortage(&mut self, name: &ObjectName, book: &mut WarningBook) {
        let allocation = self.services.get(name);
        let ports = allocation.into_iter().flat_map(|s| &s.ports).filter_map(|id| self.ports.get(id));
        let short = ports.fold(Shortage::default(), |sum, port| Shortage {
            backends: sum.backends + port.short.backends,
            slots: sum.slots + port.short.slots,
        });
        let nameless = allocation.map_or(0, |s| s.nameless);
        let is_cut = allocation.is_some_and(|s| s.is_cut);
        match is_cut || nameless > 0 || short != Shortage::default() {
            true => self.degraded.insert(name.clone()),
            false => self.degraded.remove(name),
        };
        if short == Shortage::default() && nameless == 0 {
            if self.starved.remove(name) {
                book.set(Origin::Capacity(name.clone()), Vec::new());
            }
            return;
        }
        self.starved.insert(name.clone());
        let mut messages = Vec::new();
        if short.backends > 0 {
            let left_out = format!("{} endpoints are left out: the map backends is full", short.backends);
            messages.push((left_out, "--max-endpoints"));
        }
        if short.slots > 0 {
            let unreached = format!("{} endpoints get no connections: the map slots is full", short.slots);
            messages.push((unreached, "--max-endpoints"));
        }
        if nameless > 0 {
            messages.push((format!("{nameless} ports are not served: the map services is full"), "--max-services"));
        }
        let remedy = "start kubelane with a higher";
        let warning = |(problem, flag)| service_warning(name, format!("{problem}; {remedy} {flag}"));
        book.set(Origin::Capacity(name.clone()), messages.into_iter().map(warning).collect());
    }
}

fn want_address(space: &mut Space, ip: Ipx, flags: u32) {
    match flags {
        0 => space.tables.addresses.unset(ip.0),
        flags => space.tables.addresses.set(ip.0, flags),
    }
}

/// The youngest is told: most likely it is the one that made a contest of it.
fn contest(key: FrontendKey, group: &BTreeSet<Rank>) -> Option<Warning> {
    const NAMED: usize = 3;
    let protocol = match key.protocol {
        6 => "TCP",
        17 => "UDP",
        _ => "SCTP",
    };
    let at = crate::model::SocketAddrx { ip: key.ip(), port: key.port() };
    let (winner, youngest) = (group.first()?, group.last()?);
    let others = group.len() - 2;
    let names: Vec<String> =
        group.iter().skip(1).take(others.min(NAMED)).map(|rank| rank.service.to_string()).collect();
    let also = match (names.is_empty(), others - names.len()) {
        (true, _) => String::new(),
        (false, 0) => format!(", nor for {}", names.join(", ")),
        (false, more) => format!(", nor for {} and {more} more", names.join(", ")),
    };
    let message = format!(
        "{at}/{protocol} belongs to Service {}, which is older or first by name: not served here{also}",
        winner.service
    );
    Some(service_warning(&youngest.service, message))
}
