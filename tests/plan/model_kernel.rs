//! The kernel's maps as the daemon sees them, with a judge: after every single row it checks that no frontend leads to
//! a backend that is missing, gone or of another Service, and that nothing is used again before it has rested.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::time::{Duration, Instant};

use kubelane::abi::{Backend, Frontend, FrontendKey, Pool, ServiceName, SourceRangeKey, address_flag, frontend_flag};
use kubelane::model::{Family, Ipx};
use kubelane::sync::{Failure, MapIo, MapName};

/// Which pool of which Service port a slot belonged to: service id, family is IPv6, `pool_member`.
type PoolName = (u32, bool, u8);

const REST: Duration = Duration::from_secs(1);

pub struct ModelKernel {
    pub services: BTreeMap<u32, ServiceName>,
    pub backends: BTreeMap<u32, Backend>,
    pub slots: BTreeMap<u32, u32>,
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    pub addresses: BTreeMap<[u8; 16], u32>,
    pub source_ranges: BTreeMap<SourceRangeKey, u32>,
    pub capacity: BTreeMap<MapName, u32>,
    /// Of maps that could not grow so far: how many rows they have room for.
    pub room: BTreeMap<MapName, u32>,
    /// What the kernel's clock says; the test moves it.
    pub now: Instant,
    /// Decides for each row whether it fails.
    pub fails: Box<dyn FnMut(MapName) -> bool>,
    /// `(map, rows)` of each call.
    pub calls: Vec<(MapName, usize)>,
    /// Off for tests that damage the maps.
    pub judging: bool,
    /// When each id became gone, and each slot was last seen by a pool.
    gone_since: HashMap<u32, Instant>,
    /// Service ids of source ranges that were not taken: they may be closed to all.
    refused_ranges: BTreeSet<u32>,
    slot_left: HashMap<u32, (PoolName, Instant)>,
    generations: HashMap<u32, u32>,
}

impl Default for ModelKernel {
    fn default() -> Self {
        Self::with_capacity(10_000, 131_072, 262_144)
    }
}

impl ModelKernel {
    pub fn with_capacity(services: u32, backends: u32, slots: u32) -> Self {
        let capacity = [
            (MapName::Services, services),
            (MapName::Backends, backends),
            (MapName::Slots, slots),
            (MapName::Frontends, 40_000),
            (MapName::Addresses, 40_000),
            (MapName::SourceRanges, 40_000),
        ];
        ModelKernel {
            services: BTreeMap::new(),
            backends: BTreeMap::new(),
            slots: BTreeMap::new(),
            frontends: BTreeMap::new(),
            addresses: BTreeMap::new(),
            source_ranges: BTreeMap::new(),
            capacity: capacity.into(),
            room: BTreeMap::new(),
            now: Instant::now(),
            fails: Box::new(|_| false),
            calls: Vec::new(),
            judging: true,
            gone_since: HashMap::new(),
            refused_ranges: BTreeSet::new(),
            slot_left: HashMap::new(),
            generations: HashMap::new(),
        }
    }

    pub fn never_fails(&mut self) {
        self.fails = Box::new(|_| false);
    }

    fn rested(&self, since: Option<&Instant>) -> bool {
        since.is_none_or(|since| self.now.duration_since(*since) >= REST)
    }

    fn put(&mut self, map: MapName, key: &[u8], value: &[u8]) -> io::Result<()> {
        let full = |len: usize, known: bool| !known && len >= self.size(map) as usize;
        match map {
            MapName::Services => {
                let id = number(key);
                if full(self.services.len(), self.services.contains_key(&id)) {
                    return Err(io::Error::from_raw_os_error(libc::E2BIG));
                }
                if !self.services.contains_key(&id) && self.judging {
                    let recent = self
                        .gone_since
                        .iter()
                        .find(|(backend, since)| self.backends[backend].service_id == id && !self.rested(Some(since)));
                    assert_eq!(recent, None, "service id {id} was used again too early");
                }
                self.services.insert(id, bytemuck::pod_read_unaligned(value));
            }
            MapName::Backends => self.put_backend(number(key), bytemuck::pod_read_unaligned(value)),
            MapName::Slots => self.put_slot(number(key), number(value)),
            MapName::Frontends => {
                let key = bytemuck::pod_read_unaligned(key);
                if full(self.frontends.len(), self.frontends.contains_key(&key)) {
                    return Err(io::Error::from_raw_os_error(libc::E2BIG));
                }
                self.put_frontend(key, Some(bytemuck::pod_read_unaligned(value)));
            }
            MapName::Addresses => {
                let address = key.try_into().unwrap();
                if full(self.addresses.len(), self.addresses.contains_key(&address)) {
                    return Err(io::Error::from_raw_os_error(libc::E2BIG));
                }
                self.addresses.insert(address, number(value));
            }
            MapName::SourceRanges => {
                let key: SourceRangeKey = bytemuck::pod_read_unaligned(key);
                assert_eq!(number(value), 1);
                assert!(self.services.contains_key(&key.service_id), "{key:?} is of a Service without a name");
                if full(self.source_ranges.len(), self.source_ranges.contains_key(&key)) {
                    // A trie says it in other words.
                    return Err(io::Error::from_raw_os_error(libc::ENOSPC));
                }
                self.source_ranges.insert(key, 1);
            }
        }
        Ok(())
    }

    fn put_backend(&mut self, id: u32, row: Backend) {
        assert!(id < self.capacity[&MapName::Backends], "backend {id} is beyond the array");
        let before = self.backends.insert(id, row);
        if row.state == 0 {
            self.gone_since.insert(id, self.now);
        } else if before.is_none_or(|b| b.state == 0) && self.judging {
            assert!(self.rested(self.gone_since.get(&id)), "backend id {id} was used again too early");
            let last = self.generations.get(&id).copied().unwrap_or(0);
            assert!(row.generation > last, "backend id {id} has a new assignment without a new generation");
        } else if let Some(before) = before.filter(|_| self.judging) {
            let assignment = |b: &Backend| (b.address, b.port_be, b.protocol, b.service_id, b.generation);
            assert_eq!(assignment(&before), assignment(&row), "backend id {id} changed its assignment while in use");
        }
        self.generations.insert(id, row.generation);
    }

    fn put_slot(&mut self, slot: u32, id: u32) {
        assert!(slot < self.capacity[&MapName::Slots], "slot {slot} is beyond the array");
        if self.judging
            && let Some((left, since)) = self.slot_left.get(&slot)
            && !self.rested(Some(since))
        {
            let row = self.backends.get(&id).expect("a slot is written after its backend");
            let family = Ipx(row.address).family() == Family::Ipv6;
            assert_eq!((left.0, left.1), (row.service_id, family), "slot {slot} was used again too early");
        }
        self.slots.insert(slot, id);
    }

    fn put_frontend(&mut self, key: FrontendKey, row: Option<Frontend>) {
        let before = match row {
            Some(row) => self.frontends.insert(key, row),
            None => self.frontends.remove(&key),
        };
        if let Some(row) = row.filter(|_| self.judging) {
            for (slot, name) in covered(key, &row) {
                if let Some((left, since)) = self.slot_left.get(&slot)
                    && !self.rested(Some(since))
                {
                    assert_eq!(*left, name, "slot {slot} was used again too early by {key:?}");
                }
            }
        }
        for (slot, name) in before.iter().filter(|_| self.judging).flat_map(|row| covered(key, row)) {
            self.slot_left.insert(slot, (name, self.now));
        }
    }

    fn remove(&mut self, map: MapName, key: &[u8]) {
        match map {
            MapName::Services => {
                let id = number(key);
                let left = self.source_ranges.keys().find(|range| range.service_id == id);
                assert!(!self.judging || left.is_none(), "{left:?} is left of a Service whose name is deleted");
                self.services.remove(&id);
            }
            MapName::Frontends => self.put_frontend(bytemuck::pod_read_unaligned(key), None),
            MapName::Addresses => {
                self.addresses.remove::<[u8; 16]>(&key.try_into().unwrap());
            }
            MapName::SourceRanges => {
                self.source_ranges.remove(&bytemuck::pod_read_unaligned::<SourceRangeKey>(key));
            }
            MapName::Backends | MapName::Slots => panic!("rows of an array cannot be deleted"),
        }
    }

    /// The invariant that must hold after every row.
    pub fn check(&self) {
        for (key, row) in &self.frontends {
            self.check_frontend(key, row);
        }
        let mut owners: HashMap<u32, PoolName> = HashMap::new();
        for (slot, name) in self.frontends.iter().flat_map(|(key, row)| covered(*key, row)) {
            let owner = *owners.entry(slot).or_insert(name);
            assert_eq!(owner, name, "slot {slot} belongs to two pools");
        }
    }

    fn check_frontend(&self, key: &FrontendKey, row: &Frontend) {
        assert!(self.services.contains_key(&row.service_id), "{key:?} has a Service without a name");
        if row.flags & frontend_flag::FRONTEND_SOURCE_RANGES != 0 {
            let asked = self.refused_ranges.contains(&row.service_id)
                || self.source_ranges.keys().any(|range| range.service_id == row.service_id);
            assert!(asked, "{key:?} asks for source ranges, and there are none");
        }
        for pool in [row.inside, row.outside] {
            for slot in pool.base..pool.base + pool.count {
                let id = self.slots.get(&slot).unwrap_or_else(|| panic!("{key:?} leads to the empty slot {slot}"));
                let backend = self.backends.get(id).unwrap_or_else(|| panic!("{key:?} leads to missing {id}"));
                assert_ne!(backend.state, 0, "{key:?} leads to backend {id}, which is gone");
                assert_eq!(backend.service_id, row.service_id, "{key:?} leads to a backend of another Service");
                assert_eq!(backend.protocol, key.protocol, "{key:?} leads to a backend of another protocol");
                assert_eq!(Ipx(backend.address).family(), key.ip().family(), "{key:?} leads to another family");
            }
        }
    }

    /// What a client can observe, free of ids: by frontend the Service, flags and the endpoints of each pool.
    pub fn meaning(&self) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        for (key, row) in &self.frontends {
            let pool = |pool: &Pool| {
                let ids = (pool.base..pool.base + pool.count).map(|slot| self.slots[&slot]);
                let mut ends: Vec<String> = ids.map(|id| describe(&self.backends[&id])).collect();
                ends.sort();
                assert_eq!(ends.iter().collect::<BTreeSet<_>>().len(), ends.len(), "an endpoint is in a pool twice");
                format!("{}/{} {ends:?}", pool.member, pool.on_empty)
            };
            let name = self.services[&row.service_id].as_str();
            let (inside, outside) = (pool(&row.inside), pool(&row.outside));
            let text = format!("{name} {} {} in {inside} out {outside}", row.flags, row.affinity_seconds);
            all.insert(format!("frontend {}:{}/{}", key.ip(), key.port(), key.protocol), text);
        }
        for (address, flags) in &self.addresses {
            all.insert(format!("address {}", Ipx(*address)), flags.to_string());
        }
        for key in self.source_ranges.keys() {
            let name = self.services[&key.service_id].as_str();
            all.insert(format!("range {name} {}/{}", Ipx(key.address), key.prefix_length), String::new());
        }
        for name in self.services.values() {
            let known = all.insert(format!("service {}", name.as_str()), String::new());
            assert!(known.is_none(), "{name:?} is there twice");
        }
        for row in self.backends.values().filter(|row| row.state != 0) {
            let name = self.services[&row.service_id].as_str();
            let known = all.insert(format!("backend {name} {}", describe(row)), String::new());
            assert!(known.is_none(), "a backend is there twice");
        }
        all
    }

    /// True when a port of `ip` that has no frontend is refused.
    pub fn refuses(&self, ip: Ipx) -> bool {
        self.addresses.get(&ip.0).is_some_and(|flags| flags & address_flag::ADDRESS_CLUSTER_IP != 0)
    }

    fn note_refused_range(&mut self, map: MapName, key: &[u8]) {
        if map == MapName::SourceRanges {
            self.refused_ranges.insert(bytemuck::pod_read_unaligned::<SourceRangeKey>(key).service_id);
        }
    }

    fn fails_now(&mut self, map: MapName) -> bool {
        (self.fails)(map)
    }
}

fn describe(row: &Backend) -> String {
    let port = u16::from_be_bytes(row.port_be);
    format!("{}:{port} state {} pools {} flags {}", Ipx(row.address), row.state, row.pools, row.flags)
}

fn covered(key: FrontendKey, row: &Frontend) -> Vec<(u32, PoolName)> {
    let six = key.ip().family() == Family::Ipv6;
    let slots = [row.inside, row.outside].into_iter().flat_map(move |pool| {
        (pool.base..pool.base + pool.count).map(move |slot| (slot, (row.service_id, six, pool.member)))
    });
    slots.collect()
}

fn number(bytes: &[u8]) -> u32 {
    u32::from_ne_bytes(bytes.try_into().unwrap())
}

impl MapIo for ModelKernel {
    fn write(&mut self, map: MapName, keys: &[u8], values: &[u8], rows: usize) -> Vec<Failure> {
        self.calls.push((map, rows));
        let (key_size, value_size) = (keys.len() / rows, values.len() / rows);
        let mut failures = Vec::new();
        for row in 0..rows {
            if self.fails_now(map) {
                failures.push(Failure { row, error: io::Error::from_raw_os_error(libc::ENOMEM) });
                self.note_refused_range(map, &keys[row * key_size..][..key_size]);
                continue;
            }
            let key = &keys[row * key_size..][..key_size];
            if let Err(error) = self.put(map, key, &values[row * value_size..][..value_size]) {
                self.note_refused_range(map, key);
                failures.push(Failure { row, error });
            }
            if self.judging {
                self.check();
            }
        }
        failures
    }

    fn delete(&mut self, map: MapName, keys: &[u8], rows: usize) -> Vec<Failure> {
        self.calls.push((map, rows));
        let key_size = keys.len() / rows;
        let mut failures = Vec::new();
        for row in 0..rows {
            if self.fails_now(map) {
                failures.push(Failure { row, error: io::Error::from_raw_os_error(libc::EPERM) });
                continue;
            }
            self.remove(map, &keys[row * key_size..][..key_size]);
            if self.judging {
                self.check();
            }
        }
        failures
    }

    fn dump(&mut self, map: MapName, each: &mut dyn FnMut(&[u8], &[u8])) -> io::Result<()> {
        if self.fails_now(map) {
            return Err(io::Error::from_raw_os_error(libc::EINTR));
        }
        let of = bytemuck::bytes_of::<u32>;
        match map {
            MapName::Services => self.services.iter().for_each(|(k, v)| each(of(k), bytemuck::bytes_of(v))),
            MapName::Backends => self.backends.iter().for_each(|(k, v)| each(of(k), bytemuck::bytes_of(v))),
            MapName::Slots => self.slots.iter().filter(|(_, v)| **v != 0).for_each(|(k, v)| each(of(k), of(v))),
            MapName::Frontends => {
                self.frontends.iter().for_each(|(k, v)| each(bytemuck::bytes_of(k), bytemuck::bytes_of(v)));
            }
            MapName::Addresses => self.addresses.iter().for_each(|(k, v)| each(k, of(v))),
            MapName::SourceRanges => self.source_ranges.iter().for_each(|(k, v)| each(bytemuck::bytes_of(k), of(v))),
        }
        Ok(())
    }

    fn note_new_owners(&mut self) -> std::io::Result<()> {
        Ok(())
    }

    fn capacity(&self, map: MapName) -> u32 {
        self.capacity[&map]
    }

    fn size(&self, map: MapName) -> u32 {
        self.room.get(&map).copied().unwrap_or(self.capacity[&map])
    }
}
