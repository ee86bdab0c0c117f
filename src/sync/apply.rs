//! One pass over everything that is pending, in an order in which each single write leaves the kernel in a state that
//! is valid for packets and sockets that pass at that moment.
//!
//! | phase | why the state after each of its rows is safe |
//! |---|---|
//! | 1 names | nothing in the datapath follows them; adoption finds what a crash leaves behind by them |
//! | 1 source ranges written | before the frontend that begins to ask for them: else it would turn every client away. One that cannot be written holds nothing back: without it its clients are turned away, which is better than to let all in |
//! | 2 backends, new and changed | no slot leads to a new one yet; a changed one is the same endpoint |
//! | 3 slots | what a frontend can see is only ever replaced by a backend of the same pool, written in 2 |
//! | 4 frontends written | bases and counts cover slots that 3 wrote; one row flips one frontend as a whole |
//! | 4 frontends closed | of what a failure holds back only this: that source ranges are asked for from now on |
//! | 5 address roles taken away | before the frontends go: else a port of an address left alone would be refused |
//! | 6 frontends deleted | nothing leads to a frontend but its key |
//! | 6 source ranges deleted | after the frontend that asks for them no longer: else it would turn clients away |
//! | 7 address roles added | after the frontends: else a live port would be refused as unknown |
//! | 8 backends gone | no frontend in the kernel covers a slot with them any more, after 3, 4 and 6 |
//! | 9 names deleted | nothing of that service id is left |
//!
//! A row that fails holds back what depends on it: later phases of the same service port. Everything else goes on, and
//! the next pass tries again. Ids and regions are given back only when the frontends that led there are rewritten.

use std::time::Instant;

use bytemuck::Pod;

use super::report::SyncReport;
use super::{MapIo, MapName};
use crate::abi::address_flag::ADDRESS_CLUSTER_IP;
use crate::abi::frontend_flag::FRONTEND_SOURCE_RANGES;
use crate::abi::{Backend, Frontend, FrontendKey};
use crate::model::{Ipx, Protocol, SocketAddrx, Warning};
use crate::plan::layout::Layout;
use crate::plan::tables::{Tables, is_gone};
use crate::plan::warnings::{Origin, WarningBook};
use crate::table::{HashSet, Rows, Table};

/// Rows of one call: large enough to make the call cheap, small enough to keep its buffers out of the resident size.
const BATCH: usize = 4096;

type Row<R> = (<R as Rows>::Key, Option<<R as Rows>::Value>);

/// One pass.
pub struct Applier<'a> {
    io: &'a mut dyn MapIo,
    layout: &'a mut Layout,
    book: &'a mut WarningBook,
    report: &'a mut SyncReport,
    /// Service ids with a failed row: what depends on it waits.
    blocked: HashSet<u32>,
    full: HashSet<MapName>,
}

impl<'a> Applier<'a> {
    pub fn new(
        io: &'a mut dyn MapIo,
        layout: &'a mut Layout,
        book: &'a mut WarningBook,
        report: &'a mut SyncReport,
    ) -> Self {
        Applier { io, layout, book, report, blocked: HashSet::default(), full: HashSet::default() }
    }

    /// Writes what is pending, then gives back what nothing leads to any more.
    pub fn run(mut self, now: Instant) {
        if !self.layout.tables().is_clean() {
            self.io.reserve(&rows_to_come(self.layout.tables()));
            self.write_names();
            self.write_source_ranges();
            self.write_backends();
            self.write_slots();
            self.write_frontends();
            self.narrow_addresses();
            self.delete_frontends();
            self.widen_addresses();
            self.block_stale_frontends();
            self.delete_source_ranges();
            self.write_gone_backends();
            self.delete_names();
            self.note_full_maps();
        }
        self.layout.settle(&self.blocked, now);
        if self.layout.tables().is_clean() {
            self.layout.end_quarantine(now);
        }
    }

    fn write_names(&mut self) {
        let rows = collect(&self.layout.tables().services, |_, name| name.is_some());
        let failed = self.put(MapName::Services, |t| &mut t.services, rows);
        self.blocked.extend(failed);
    }

    fn write_source_ranges(&mut self) {
        let ranges = &self.layout.tables().source_ranges;
        let rows = collect(ranges, |key, row| row.is_some() && !self.is_blocked(key.service_id));
        self.put(MapName::SourceRanges, |t| &mut t.source_ranges, rows);
    }

    /// A service id rests only when none is left of it: its next owner's clients would be judged by them. Whatever else of
    /// a Service has failed, clients whom it lets in no longer are turned away; only if it does not ask for ranges any
    /// more, its frontends are rewritten first.
    fn delete_source_ranges(&mut self) {
        let rows = collect(&self.layout.tables().source_ranges, |key, row| {
            row.is_none() && (!self.is_blocked(key.service_id) || self.layout.asks_for_source_ranges(key.service_id))
        });
        self.put(MapName::SourceRanges, |t| &mut t.source_ranges, rows);
    }

    fn write_backends(&mut self) {
        let backends = &self.layout.tables().backends;
        let rows = collect(backends, |_, row| row.is_some_and(|b| !is_gone(&b) && !self.is_blocked(b.service_id)));
        let failed = self.put(MapName::Backends, |t| &mut t.backends, rows);
        let backends = &self.layout.tables().backends;
        self.blocked.extend(failed.into_iter().filter_map(|id| Some(backends.desired(id)?.service_id)));
    }

    fn write_slots(&mut self) {
        let tables = self.layout.tables();
        let rows =
            collect(&tables.slots, |_, id| owner(tables, id).is_some_and(|service_id| !self.is_blocked(service_id)));
        let failed = self.put(MapName::Slots, |t| &mut t.slots, rows);
        let tables = self.layout.tables();
        self.blocked.extend(failed.into_iter().filter_map(|slot| owner(tables, tables.slots.desired(slot))));
    }

    fn write_frontends(&mut self) {
        let frontends = &self.layout.tables().frontends;
        let rows = collect(frontends, |_, row| row.is_some_and(|f| !self.is_blocked(f.service_id)));
        let service_of = |row: Option<Frontend>| row.map(|f| f.service_id);
        let changes_owner = |(key, row): &(FrontendKey, _)| service_of(frontends.applied(*key)) != service_of(*row);
        let mut datagrams = rows.iter().filter(|(key, _)| key.protocol != Protocol::Tcp as u8);
        let changed_owner = datagrams.clone().any(changes_owner);
        let serves = |row: Option<Frontend>| row.is_some_and(|f| f.inside.count > 0);
        let served = datagrams.any(|(key, row)| serves(*row) && !serves(frontends.applied(*key)));
        self.report.datagram_frontends_served |= served;
        self.put(MapName::Frontends, |t| &mut t.frontends, rows);
        self.close_frontends();
        if changed_owner {
            self.report.datagram_frontends_changed_owner = true;
            if let Err(error) = self.io.note_new_owners() {
                self.report.failures.push((MapName::Frontends, error.to_string()));
            }
        }
    }

    /// A frontend that is to ask for source ranges and cannot be rewritten as a whole asks for them all the same.
    fn close_frontends(&mut self) {
        let frontends = &self.layout.tables().frontends;
        let asks = |row: &Frontend| row.flags & FRONTEND_SOURCE_RANGES != 0;
        let closed = |(key, wanted): (FrontendKey, Option<Frontend>)| {
            let (has, wanted) =
                (frontends.applied(key)?, wanted.filter(|row| asks(row) && self.is_blocked(row.service_id))?);
            let is_open = has.service_id == wanted.service_id && !asks(&has);
            is_open.then_some((key, Some(Frontend { flags: has.flags | FRONTEND_SOURCE_RANGES, ..has })))
        };
        let mut rows: Vec<(FrontendKey, Option<Frontend>)> = frontends.pending().filter_map(closed).collect();
        rows.sort_unstable_by_key(|(key, _)| *key);
        self.put(MapName::Frontends, |t| &mut t.frontends, rows);
    }

    fn narrow_addresses(&mut self) {
        let addresses = &self.layout.tables().addresses;
        let mut rows: Vec<([u8; 16], Option<u32>)> = Vec::new();
        for (address, wanted) in addresses.pending() {
            let unwanted = wanted.is_none();
            let (has, wanted) = (addresses.applied(address).unwrap_or(0), wanted.unwrap_or(0));
            // A row without a role, which is never written, goes too.
            if has & !wanted != 0 || unwanted {
                rows.push((address, Some(has & wanted).filter(|left| *left != 0)));
            }
        }
        rows.sort_unstable();
        let (written, deleted) = rows.into_iter().partition(|(_, flags)| flags.is_some());
        self.put(MapName::Addresses, |t| &mut t.addresses, written);
        self.put(MapName::Addresses, |t| &mut t.addresses, deleted);
    }

    fn delete_frontends(&mut self) {
        let Tables { frontends, addresses, .. } = self.layout.tables();
        let refuses = |flags: Option<u32>| flags.unwrap_or(0) & ADDRESS_CLUSTER_IP != 0;
        let rows = collect(frontends, |key, row| {
            row.is_none() && (refuses(addresses.desired(key.address)) || !refuses(addresses.applied(key.address)))
        });
        self.put(MapName::Frontends, |t| &mut t.frontends, rows);
    }

    fn widen_addresses(&mut self) {
        let Tables { frontends, addresses, .. } = self.layout.tables();
        let unwritten: HashSet<[u8; 16]> =
            frontends.pending().filter(|(_, row)| row.is_some()).map(|(key, _)| key.address).collect();
        let rows = collect(addresses, |address, flags| {
            let gained = flags.unwrap_or(0) & !addresses.applied(address).unwrap_or(0);
            gained != 0 && (gained & ADDRESS_CLUSTER_IP == 0 || !unwritten.contains(&address))
        });
        self.put(MapName::Addresses, |t| &mut t.addresses, rows);
    }

    /// A frontend still to be rewritten or deleted may lead to anything its service port ever had.
    fn block_stale_frontends(&mut self) {
        let frontends = &self.layout.tables().frontends;
        for (key, wanted) in frontends.pending() {
            let both = [frontends.applied(key), wanted];
            self.blocked.extend(both.into_iter().flatten().map(|row| row.service_id));
        }
    }

    fn write_gone_backends(&mut self) {
        let backends = &self.layout.tables().backends;
        let rows = collect(backends, |_, row| row.is_some_and(|b| is_gone(&b) && !self.is_blocked(b.service_id)));
        let all: Vec<(u32, Backend)> = rows.iter().filter_map(|(id, row)| Some((*id, (*row)?))).collect();
        let failed: HashSet<u32> = self.put(MapName::Backends, |t| &mut t.backends, rows).into_iter().collect();
        let gone = all.into_iter().filter(|(id, _)| !failed.contains(id)).filter_map(|(_, row)| endpoint_of(&row));
        self.report.backends_gone.extend(gone);
    }

    fn delete_names(&mut self) {
        let layout = &self.layout;
        let filtered: HashSet<u32> = layout.tables().source_ranges.pending().map(|(key, _)| key.service_id).collect();
        let rows = collect(&layout.tables().services, |id, name| {
            name.is_none() && !self.is_blocked(id) && !layout.has_living_backends(id) && !filtered.contains(&id)
        });
        self.put(MapName::Services, |t| &mut t.services, rows);
    }

    fn note_full_maps(&mut self) {
        for map in MapName::ALL {
            let name = map.as_str();
            let flag = match map {
                MapName::SourceRanges => "--max-source-ranges",
                MapName::Backends | MapName::Slots => "--max-endpoints",
                MapName::Services | MapName::Frontends | MapName::Addresses => "--max-services",
            };
            let remedy = format!("start kubelane with a higher {flag}");
            let warnings = match self.full.contains(&map) {
                true => vec![Warning {
                    subject: format!("map {name}"),
                    message: format!(
                        "full at {} entries: what does not fit is not served; {remedy}",
                        self.io.capacity(map)
                    ),
                }],
                false => Vec::new(),
            };
            self.book.set(Origin::Full(name), warnings);
        }
    }

    fn is_blocked(&self, service_id: u32) -> bool {
        self.blocked.contains(&service_id)
    }

    /// Writes rows that are `Some` or deletes rows that are `None` (never both in one call), notes what succeeded, and
    /// returns the keys of those that failed.
    fn put<R: Rows>(
        &mut self,
        map: MapName,
        table: fn(&mut Tables) -> &mut Table<R>,
        rows: Vec<Row<R>>,
    ) -> Vec<R::Key> {
        let mut failed = Vec::new();
        for batch in rows.chunks(BATCH) {
            let keys: Vec<R::Key> = batch.iter().map(|(key, _)| *key).collect();
            let values: Vec<R::Value> = batch.iter().filter_map(|(_, value)| *value).collect();
            let failures = if values.is_empty() {
                self.io.delete(map, bytes(&keys), keys.len())
            } else {
                self.io.write(map, bytes(&keys), bytes(&values), keys.len())
            };
            self.report.calls += 1;
            let done = if values.is_empty() { &mut self.report.rows_deleted } else { &mut self.report.rows_written };
            *done += batch.len().saturating_sub(failures.len());
            let mut missed = HashSet::default();
            for failure in failures {
                missed.insert(failure.row);
                // A map that may grow and could not is short of memory, which is nobody's quota.
                if failure.is_full() && self.io.size(map) >= self.io.capacity(map) {
                    self.full.insert(map);
                    self.report.rows_without_room += 1;
                }
                self.report.failures.push((map, failure.reason()));
            }
            let table = table(self.layout.tables_mut());
            for (index, (key, value)) in batch.iter().enumerate() {
                match missed.contains(&index) {
                    true => failed.push(*key),
                    false => table.confirm(*key, *value),
                }
            }
        }
        failed
    }
}

/// How many rows each map has before anything is deleted.
fn rows_to_come(tables: &Tables) -> [(MapName, usize); 6] {
    fn hashed<R: Rows>(table: &Table<R>) -> usize {
        let is_new = |(key, row): &(R::Key, Option<R::Value>)| row.is_some() && table.applied(*key).is_none();
        table.rows().len() + table.pending().filter(is_new).count()
    }
    fn indexed<R: Rows<Key = u32>>(table: &Table<R>) -> usize {
        table.pending().map(|(index, _)| index as usize + 1).max().unwrap_or(0)
    }
    [
        (MapName::Services, hashed(&tables.services)),
        (MapName::Backends, indexed(&tables.backends)),
        (MapName::Slots, indexed(&tables.slots)),
        (MapName::Frontends, hashed(&tables.frontends)),
        (MapName::Addresses, hashed(&tables.addresses)),
        (MapName::SourceRanges, hashed(&tables.source_ranges)),
    ]
}

/// The pending rows that `wanted` picks, sorted by key: same world, same writes.
fn collect<R: Rows>(table: &Table<R>, wanted: impl Fn(R::Key, Option<R::Value>) -> bool) -> Vec<Row<R>> {
    let mut rows: Vec<Row<R>> = table.pending().filter(|(key, value)| wanted(*key, *value)).collect();
    rows.sort_unstable_by_key(|(key, _)| *key);
    rows
}

fn bytes<T: Pod>(rows: &[T]) -> &[u8] {
    bytemuck::cast_slice(rows)
}

/// The service id of the backend that a slot is to lead to.
fn owner(tables: &Tables, backend_id: Option<u32>) -> Option<u32> {
    Some(tables.backends.desired(backend_id?)?.service_id)
}

fn endpoint_of(row: &Backend) -> Option<(Protocol, SocketAddrx)> {
    let protocol = match row.protocol {
        6 => Protocol::Tcp,
        17 => Protocol::Udp,
        132 => Protocol::Sctp,
        _ => return None,
    };
    Some((protocol, SocketAddrx { ip: Ipx(row.address), port: u16::from_be_bytes(row.port_be) }))
}

const _: () = assert!(size_of::<FrontendKey>() == 20, "keys are handed over as bytes, one after another");
