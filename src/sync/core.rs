//! The control plane's heart as the agent sees it: changes in, rows out. One owner, no locks, no clock of its own.

use std::collections::BTreeMap;
use std::time::{Instant, SystemTime};

use anyhow::Result;

use super::apply::Applier;
use super::audit::{self, Snapshot};
use super::report::{Counts, SyncReport};
use super::{MapIo, MapName, found};
use crate::abi::FrontendKey;
use crate::explain::{self, About, Answer, SERVICES_MAX};
use crate::model::{Change, HealthCheck, Ipx, Masquerade, Node, ObjectName};
use crate::plan::adopt::AdoptReport;
use crate::plan::arrivals::Tally;
use crate::plan::compile::Compiled;
use crate::plan::layout::Layout;
use crate::plan::no_local::NoLocal;
use crate::plan::quotas::{Amounts, Resource};
use crate::plan::tables::Tables;
use crate::plan::warnings::WarningBook;
use crate::plan::world::World;
use crate::table::{HashMap, Rows as _};

/// Services of a first sync that are laid out before their rows are written. All at once, it would hold every row of a
/// cluster as one that is wanted, which takes more than to hold it as one that is there.
const SERVICES_OF_A_PASS: usize = 4096;

/// What does not change while the daemon runs.
#[derive(Clone, Debug, Default)]
pub struct CoreSettings {
    /// This node, as endpoints, hints and the Node object name it.
    pub node_name: String,
    pub masquerade: Masquerade,
}

/// World, layout and tables.
#[derive(Debug)]
pub struct Core {
    world: World,
    layout: Layout,
    book: WarningBook,
    health_checks: BTreeMap<ObjectName, HealthCheck>,
    /// Of Services that have any, and their sum.
    no_local: HashMap<ObjectName, NoLocal>,
    no_local_sum: NoLocal,
    synced: bool,
    /// Rows of an earlier daemon have been taken over, and no sync has compared them with the world yet.
    has_found: bool,
}

impl Core {
    pub fn new(settings: CoreSettings) -> Core {
        Core {
            world: World::new(&settings.node_name, settings.masquerade),
            layout: Layout::default(),
            book: WarningBook::default(),
            health_checks: BTreeMap::new(),
            no_local: HashMap::default(),
            no_local_sum: NoLocal::default(),
            synced: false,
            has_found: false,
        }
    }

    /// Changes of Services with this many endpoints are laid out one by one. For tests, which have fewer.
    pub fn set_large_from(&mut self, endpoints: usize) {
        self.world.set_large_from(endpoints);
    }

    /// Changes of endpoints that were triggered before `time` are not reported in [`SyncReport::triggers`].
    pub fn measure_after(&mut self, time: SystemTime) {
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.world.arrivals_mut().measure_after(i64::try_from(since.as_nanos()).unwrap_or(i64::MAX));
    }

    /// Takes over what the pinned maps hold. Called once, before the first sync; without it the maps must be empty.
    ///
    /// # Errors
    /// A map could not be read to its end.
    pub fn adopt(&mut self, io: &mut dyn MapIo) -> Result<AdoptReport> {
        self.set_capacity(io);
        let (report, names) = self.layout.adopt(&found::read(io)?);
        self.has_found = report != AdoptReport::default();
        for name in names {
            self.world.mark(name);
        }
        Ok(report)
    }

    /// Applies one event of a source. Nothing is written before `sync`.
    pub fn apply(&mut self, change: Change) {
        self.world.apply(change, &mut self.book);
    }

    /// `nodeport`: the addresses that serve NodePorts. `bound`: every address bound on this node's devices.
    pub fn set_node_addresses(&mut self, nodeport: Vec<Ipx>, bound: Vec<Ipx>) {
        self.layout.set_node_addresses(nodeport.into_iter().collect());
        self.world.set_bound(bound.into_iter().collect());
    }

    /// The addresses of the devices where packets from the wire are met.
    pub fn set_outward_addresses(&mut self, outward: Vec<Ipx>) {
        self.layout.set_outward_addresses(outward.into_iter().collect());
    }

    /// Services and EndpointSlices have both listed once.
    pub fn ready(&self) -> bool {
        self.world.ready()
    }

    /// Compiles what changed and writes what differs. Before `ready` it writes nothing and only hands out warnings.
    /// `now` never goes back.
    pub fn sync(&mut self, io: &mut dyn MapIo, now: Instant) -> SyncReport {
        let started = Instant::now();
        let mut report = SyncReport::default();
        if self.ready() {
            self.set_capacity(io);
            for name in self.layout.release(now) {
                self.world.mark(name);
            }
            self.write(io, now, &mut report);
            self.has_found = false;
            report.full = self.world.take_zone_changed() | !std::mem::replace(&mut self.synced, true);
            let is_short = report.rows_without_room > 0 && report.rows_without_room == report.failures.len();
            report.waits = self.pending() && !is_short;
            if !report.waits {
                report.triggers = self.world.arrivals_mut().settle();
            }
        }
        self.layout.tell_contests(&mut self.book);
        (report.warnings, report.resolved) = self.book.take();
        report.duration = started.elapsed();
        report
    }

    /// Lays out the Services that changed, and writes. A first sync does so in parts, the oldest Services first: they win
    /// where several want one frontend, so that no later part takes anything from an earlier one.
    fn write(&mut self, io: &mut dyn MapIo, now: Instant, report: &mut SyncReport) {
        let mut dirty = self.world.take_dirty();
        // What was found in the kernel is not to be judged before all have said what they want of it. And a change of
        // much at once is to be one step for every row that it concerns.
        let in_parts = !self.synced && !self.has_found;
        if in_parts {
            dirty.sort_by_key(|name| self.world.created(name));
            // All at once, and not part after part.
            io.reserve(&self.expected_rows());
        }
        let mut waiting = dirty.as_slice();
        loop {
            // After a failure each further part would only try in vain again what failed: the last one does.
            let size = if in_parts && report.failures.is_empty() { SERVICES_OF_A_PASS } else { usize::MAX };
            report.failures.clear();
            report.rows_without_room = 0;
            let (part, rest) = waiting.split_at(size.min(waiting.len()));
            part.iter().for_each(|name| self.place(name, report));
            Applier::new(io, &mut self.layout, &mut self.book, report).run(now);
            if rest.is_empty() {
                break;
            }
            waiting = rest;
        }
    }

    /// By what all Services ask for.
    fn expected_rows(&self) -> [(MapName, usize); 6] {
        let asked = |resource| self.world.asked(resource);
        [
            (MapName::Services, asked(Resource::Ports)),
            (MapName::Backends, asked(Resource::Endpoints)),
            // Regions are powers of two.
            (MapName::Slots, 2 * asked(Resource::Endpoints)),
            (MapName::Frontends, asked(Resource::Frontends)),
            (MapName::Addresses, asked(Resource::Addresses)),
            (MapName::SourceRanges, asked(Resource::SourceRanges)),
        ]
    }

    fn place(&mut self, name: &ObjectName, report: &mut SyncReport) {
        let changes = self.world.take_changes(name);
        if changes.is_some_and(|changes| self.layout.adjust(name, &changes)) {
            report.services += 1;
            report.health_checks_changed |= self.note_health_check(name);
            return;
        }
        let compiled = self.world.compile(name);
        self.layout.place(name, compiled.as_ref(), &mut self.book);
        if let Some(compiled) = &compiled {
            self.world.laid_out(name, compiled);
        }
        report.services += usize::from(compiled.is_some());
        self.note_no_local(name, compiled.as_ref());
        report.health_checks_changed |= self.note_health_check(name);
    }

    /// What is known of it, and why it is so.
    pub fn explain(&self, about: &About) -> Answer {
        let names = match about {
            About::Service { namespace, name } => vec![ObjectName::new(namespace, name)],
            About::Destination { ip, port, protocol } => {
                let is_node = ip.is_loopback() || ip.is_unspecified() || self.layout.serves_node_ports((*ip).into());
                self.world.asking_for((*ip).into(), *port, (*protocol).into(), is_node)
            }
            About::Daemon | About::Metrics => Vec::new(),
        };
        let place = self.world.place();
        let daemon = explain::Daemon {
            node: place.node.to_owned(),
            zone: place.zone.map(str::to_owned),
            is_ready: self.ready(),
            waits: self.pending(),
            unserved: None,
            last_sync_seconds: None,
        };
        let services = names.iter().take(SERVICES_MAX).filter_map(|name| self.explain_service(name)).collect();
        let services_left_out = names.len().saturating_sub(SERVICES_MAX);
        let mut warnings = Vec::new();
        if *about == About::Daemon {
            warnings =
                self.book.all().iter().map(|warning| format!("{}: {}", warning.subject, warning.message)).collect();
        }
        Answer { daemon, services, services_left_out, warnings, ..Answer::new() }
    }

    fn explain_service(&self, name: &ObjectName) -> Option<explain::Service> {
        let mut told = self.world.explain(name)?;
        told.warnings = self.book.of(&format!("Service {name}"));
        for port in &mut told.ports {
            let protocol = port.protocol.into();
            for frontend in &mut port.frontends {
                let key = FrontendKey::new(frontend.at.ip().into(), frontend.at.port(), protocol);
                frontend.owner = self.layout.other_owner(key, name);
            }
        }
        Some(told)
    }

    /// Something that the last sync wanted is not in the kernel: sync again later.
    pub fn pending(&self) -> bool {
        !self.layout.tables().is_clean()
    }

    /// When ids or regions will have rested that a Service waits for.
    pub fn next_due(&self) -> Option<Instant> {
        self.layout.next_due()
    }

    /// What load balancers may ask about, sorted.
    pub fn health_checks(&self) -> impl Iterator<Item = &HealthCheck> {
        self.health_checks.values()
    }

    /// Service ports with a traffic policy of Local and endpoints on other nodes only.
    pub fn no_local(&self) -> NoLocal {
        self.no_local_sum
    }

    /// What an audit compares a map with; `None` while a sync has something left to write.
    pub fn snapshot(&self, map: MapName) -> Option<Snapshot> {
        (self.synced && !self.pending()).then(|| Snapshot::take(self.layout.tables(), map))
    }

    /// Reads the rows that an audit found different again; the next sync writes those that are not as they were
    /// written. Returns how many these are.
    ///
    /// # Errors
    /// A row could not be read.
    pub fn correct(&mut self, map: MapName, keys: &[Vec<u8>], io: &mut dyn MapIo) -> Result<usize> {
        audit::correct(self.layout.tables_mut(), map, keys, io)
    }

    /// Changes of Services, and of EndpointSlices.
    pub fn tallies(&self) -> (Tally, Tally) {
        (self.world.arrivals().services, self.world.arrivals().slices)
    }

    fn note_no_local(&mut self, name: &ObjectName, compiled: Option<&Compiled>) {
        let now = compiled.map(NoLocal::of).unwrap_or_default();
        let before = match now == NoLocal::default() {
            true => self.no_local.remove(name),
            false => self.no_local.insert(name.clone(), now),
        };
        self.no_local_sum.subtract(before.unwrap_or_default());
        self.no_local_sum.add(now);
    }

    /// True when there is something new to tell.
    fn note_health_check(&mut self, name: &ObjectName) -> bool {
        let check = self.world.health_check(name);
        let before = match check.clone() {
            Some(check) => self.health_checks.insert(name.clone(), check),
            None => self.health_checks.remove(name),
        };
        before != check
    }

    /// The rows that are wanted, and those that have been written.
    pub fn tables(&self) -> &Tables {
        self.layout.tables()
    }

    pub fn node(&self) -> Option<&Node> {
        self.world.node()
    }

    pub fn counts(&self) -> Counts {
        let (services, slices, endpoints) = self.world.counts();
        let (frontends, backends, slots) = self.layout.counts();
        let tables = self.layout.tables();
        let (names, addresses) = (tables.services.rows().len(), tables.addresses.rows().len());
        let source_ranges = tables.source_ranges.rows().len();
        Counts {
            services,
            slices,
            endpoints,
            frontends,
            backends,
            slots,
            names,
            addresses,
            source_ranges,
            degraded: self.layout.degraded(),
        }
    }

    fn set_capacity(&mut self, io: &dyn MapIo) {
        let of = |map| io.capacity(map);
        self.layout.set_capacity(of(MapName::Services), of(MapName::Backends), of(MapName::Slots));
        let mut capacity = Amounts::default();
        for (resource, map) in [
            (Resource::Ports, MapName::Services),
            (Resource::Frontends, MapName::Frontends),
            (Resource::Addresses, MapName::Addresses),
            (Resource::Endpoints, MapName::Backends),
            (Resource::SourceRanges, MapName::SourceRanges),
        ] {
            capacity[resource as usize] = of(map);
        }
        self.world.set_capacity(capacity);
    }
}
