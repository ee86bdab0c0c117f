//! From what Services ask for to rows with ids: keeps every Service port's place in the kernel, settles contested
//! frontends, and gives ids and regions back once nothing in the kernel leads to them.

use std::time::Instant;

use super::claims::{AddressRoles, Claims};
use super::compile::{Compiled, CompiledPort};
use super::port::{Port, Shortage};
use super::tables::{Space, is_gone};
use super::warnings::{Origin, WarningBook, service_warning};
use crate::abi::FrontendKey;
use crate::abi::address_flag::ADDRESS_NODE;
use crate::model::{Ipx, ObjectName, Protocol};
use crate::table::{HashMap, HashSet, Rows};

/// A Service's share: its ports' ids and the addresses it asked for.
#[derive(Debug, Default)]
pub struct Share {
    pub ports: Vec<u32>,
    /// Ports that found no id.
    pub nameless: usize,
    pub addresses: Vec<(Ipx, u32)>,
}

/// Every row that is wanted, and where.
#[derive(Debug, Default)]
pub struct Layout {
    pub space: Space,
    /// By service id.
    pub ports: HashMap<u32, Box<Port>>,
    pub services: HashMap<ObjectName, Share>,
    pub claims: Claims,
    addresses: AddressRoles,
    node_addresses: HashSet<Ipx>,
    /// Service ids that have something left behind.
    pub unsettled: HashSet<u32>,
    /// Services that did not get all they asked for.
    starved: HashSet<ObjectName>,
}

impl Layout {
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
        let before = std::mem::replace(&mut self.node_addresses, wanted);
        for ip in before.difference(&self.node_addresses) {
            let flags = self.addresses.remove(ip.0, ADDRESS_NODE);
            want_address(&mut self.space, *ip, flags);
        }
        for ip in self.node_addresses.difference(&before) {
            let flags = self.addresses.add(ip.0, ADDRESS_NODE);
            want_address(&mut self.space, *ip, flags);
        }
    }

    /// Wants for an address found in the kernel what is asked of it so far.
    pub fn reconsider_address(&mut self, ip: Ipx) {
        let flags = self.addresses.add(ip.0, 0);
        want_address(&mut self.space, ip, flags);
    }

    /// Lays out one Service; `None` when it is gone.
    pub fn place(&mut self, name: &ObjectName, compiled: Option<&Compiled>, book: &mut WarningBook) {
        let wanted: &[CompiledPort] = compiled.map_or(&[], |c| &c.ports);
        let Some(share) = self.services.remove(name).or_else(|| compiled.map(|_| Share::default())) else { return };

        let mut unmatched = share.ports;
        let matched: Vec<Option<u32>> = wanted.iter().map(|port| self.take_match(&mut unmatched, port)).collect();
        let mut touched: Vec<FrontendKey> = Vec::new();
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
        let affected = self.settle_owners(&ports, touched, book);
        self.place_addresses(share.addresses, compiled.map_or(&[], |c| &c.addresses));
        if let Some(compiled) = compiled {
            self.services.insert(name.clone(), Share { ports, nameless, addresses: compiled.addresses.clone() });
        }
        book.set(Origin::Compile(name.clone()), compiled.map_or(Vec::new(), |c| c.warnings.clone()));
        self.note_shortage(name, book);
        for other in affected.iter().filter(|other| *other != name) {
            self.note_shortage(other, book);
        }
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
            port.leaving.retain(|tenant| {
                let waits = space.tables.backends.applied(tenant.id).is_some_and(|row| !is_gone(&row));
                if !waits {
                    space.backend_ids.rest(tenant.id, now);
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

    /// Numbers of frontends and slots in the kernel, and of backends in use.
    pub fn counts(&self) -> (usize, usize, usize) {
        (self.space.tables.frontends.rows().len(), self.space.tenants, self.space.filled_slots)
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

    fn update_port(&mut self, id: u32, created: i64, wanted: &CompiledPort, touched: &mut Vec<FrontendKey>) {
        let Some(port) = self.ports.get_mut(&id) else { return };
        port.update(id, created, wanted, &mut self.space);
        for old in std::mem::replace(&mut port.frontends, wanted.frontends.clone()) {
            if wanted.frontends.binary_search_by_key(&old.key, |f| f.key).is_err() {
                self.claims.release(old.key, id);
                touched.push(old.key);
            }
        }
        for frontend in &wanted.frontends {
            self.claims.claim(frontend.key, id);
            touched.push(frontend.key);
        }
    }

    fn remove_port(&mut self, id: u32, touched: &mut Vec<FrontendKey>) {
        let Some(port) = self.ports.get_mut(&id) else { return };
        port.remove(id, &mut self.space);
        for old in std::mem::take(&mut port.frontends) {
            self.claims.release(old.key, id);
            touched.push(old.key);
        }
        self.unsettled.insert(id);
    }

    /// Gives every touched frontend to its owner, and fills the pools of `ports` and of every other port that may have
    /// won or lost one. Returns the Services of all these.
    fn settle_owners(&mut self, ports: &[u32], touched: Vec<FrontendKey>, book: &mut WarningBook) -> Vec<ObjectName> {
        let mut affected: Vec<u32> = ports.to_vec();
        affected.extend(touched.iter().flat_map(|key| self.claims.of(*key)));
        affected.sort_unstable();
        affected.dedup();
        let mut keys = touched;
        let mut services = Vec::new();
        for id in affected {
            let owned = self.owned_keys(id);
            let Some(port) = self.ports.get_mut(&id) else { continue };
            port.fill_pools(|f| owned.binary_search(&f.key).is_ok(), &mut self.space);
            if port.is_unsettled() {
                self.unsettled.insert(id);
            }
            keys.extend(owned);
            services.push(port.service.clone());
        }
        keys.sort_unstable();
        keys.dedup();
        for key in keys {
            self.resolve(key, book);
        }
        services.dedup();
        services
    }

    /// Of all claimants the oldest Service owns a frontend, then the first by name.
    fn owner(&self, key: FrontendKey) -> Option<(u32, &Port)> {
        let claimants = self.claims.of(key).filter_map(|id| Some((id, &**self.ports.get(&id)?)));
        claimants.min_by(|(a_id, a), (b_id, b)| {
            (a.created, &a.service, &a.name, a_id).cmp(&(b.created, &b.service, &b.name, b_id))
        })
    }

    /// Sorted.
    fn owned_keys(&self, id: u32) -> Vec<FrontendKey> {
        let keys = self.ports.get(&id).into_iter().flat_map(|port| &port.frontends).map(|f| f.key);
        keys.filter(|key| self.owner(*key).is_some_and(|(owner, _)| owner == id)).collect()
    }

    /// Wants the row of `key` as its owner has it, and warns the others.
    fn resolve(&mut self, key: FrontendKey, book: &mut WarningBook) {
        let owner = self.owner(key);
        let row = owner.and_then(|(id, port)| {
            let at = port.frontends.binary_search_by_key(&key, |f| f.key).ok()?;
            Some(port.row(id, &port.frontends[at]))
        });
        let mut warnings = Vec::new();
        if let Some((winner_id, winner)) = owner {
            let losers = self.claims.of(key).filter(|id| *id != winner_id).filter_map(|id| self.ports.get(&id));
            warnings.extend(losers.map(|loser| service_warning(&loser.service, contest(key, winner))));
            warnings.sort_unstable();
        }
        book.set(Origin::Contest(key), warnings);
        match row {
            Some(row) => self.space.tables.frontends.set(key, row),
            None => self.space.tables.frontends.unset(key),
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
        let share = self.services.get(name);
        let ports = share.into_iter().flat_map(|s| &s.ports).filter_map(|id| self.ports.get(id));
        let short = ports.fold(Shortage::default(), |sum, port| Shortage {
            backends: sum.backends + port.short.backends,
            slots: sum.slots + port.short.slots,
        });
        let nameless = share.map_or(0, |s| s.nameless);
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
        let remedy = "stop kubelane, run `kubelane cleanup`, and start it with a higher";
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

fn contest(key: FrontendKey, winner: &Port) -> String {
    let protocol = match key.protocol {
        6 => "TCP",
        17 => "UDP",
        _ => "SCTP",
    };
    let at = crate::model::SocketAddrx { ip: key.ip(), port: key.port() };
    format!("{at}/{protocol} belongs to Service {}, which is older or first by name: not served here", winner.service)
}
