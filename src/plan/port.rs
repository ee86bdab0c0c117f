//! One Service port in the kernel: which backend ids its endpoints have, which pools they stand in, and what it has
//! left behind and may give back once nothing in the kernel leads there.

use std::ops::Range;
use std::sync::Arc;

use super::claims::Rank;
use super::compile::{CompiledEndpoint, CompiledFrontend, CompiledPort, PoolUse};
use super::large::PortChange;
use super::pool::Pool;
use super::tables::{Space, is_gone};
use crate::abi::frontend_flag::FRONTEND_SOURCE_RANGES;
use crate::abi::pool_member::{POOL_CLUSTER, POOL_LOCAL};
use crate::abi::{self, Backend, Frontend, ServiceName, SourceRangeKey};
use crate::model::{Family, ObjectName, Protocol, SocketAddrx};
use crate::table::HashSet;

/// An endpoint and its backend id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assignment {
    pub at: SocketAddrx,
    pub id: u32,
    /// Bits of `abi::pool_member`.
    pub pools: u8,
}

/// A Service port with the id that is its index in `Layout`.
#[derive(Debug)]
pub struct Port {
    pub service: ObjectName,
    pub name: Arc<str>,
    /// Unknown only after adoption, when no row told.
    pub protocol: Option<Protocol>,
    /// As `Service::created`. Of an adopted port not yet compiled: before all others, so that it keeps what it has.
    pub created: i64,
    pub affinity_seconds: u32,
    /// Sorted.
    pub source_ranges: Vec<SourceRangeKey>,
    /// Sorted by address and port.
    pub assignments: Vec<Assignment>,
    /// By [`pool_index`].
    pub pools: [Pool; 4],
    /// Sorted by key. Those it does not own (contested) included.
    pub frontends: Vec<CompiledFrontend>,
    /// Backends to be marked gone, or so marked and not yet resting.
    pub leaving: Vec<Assignment>,
    /// Regions that a frontend may still lead to.
    pub retired: Vec<Range<u32>>,
    /// What did not fit.
    pub short: Shortage,
    /// The Service port is no more; only what it leaves behind is left.
    pub removed: bool,
}

/// What did not fit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shortage {
    pub backends: usize,
    pub slots: usize,
}

/// Where in `Port::pools` the pool of `family` and set `member` is.
pub fn pool_index(family: Family, member: u8) -> usize {
    usize::from(family == Family::Ipv6) * 2 + usize::from(u32::from(member) == POOL_LOCAL)
}

/// "namespace/name:port", or "namespace/name" for an unnamed port.
pub fn row_name(service: &ObjectName, port: &str) -> ServiceName {
    let separator = if port.is_empty() { "" } else { ":" };
    ServiceName::new(&format!("{service}{separator}{port}"))
}

impl Port {
    pub fn new(service: ObjectName, name: Arc<str>) -> Self {
        Port {
            service,
            name,
            protocol: None,
            created: i64::MIN,
            affinity_seconds: 0,
            source_ranges: Vec::new(),
            assignments: Vec::new(),
            pools: [Pool::default(); 4],
            frontends: Vec::new(),
            leaving: Vec::new(),
            retired: Vec::new(),
            short: Shortage::default(),
            removed: false,
        }
    }

    /// Where this port, which has the id `id`, stands among those that claim the same frontend.
    pub fn rank(&self, id: u32) -> Rank {
        Rank { created: self.created, service: self.service.clone(), port: self.name.clone(), id }
    }

    /// Brings the backends to what `wanted` says. The pools follow once the owners of the frontends are known.
    pub fn update(&mut self, id: u32, created: i64, wanted: &CompiledPort, space: &mut Space) {
        self.created = created;
        self.protocol = Some(wanted.protocol);
        self.affinity_seconds = wanted.affinity_seconds;
        space.tables.services.set(id, row_name(&self.service, &self.name));
        self.filter(wanted.source_ranges.iter().map(|range| SourceRangeKey::new(id, *range)).collect(), space);
        self.short.backends = self.assign(id, wanted, space);
    }

    /// Some of its frontends let in source ranges only, be there any or not.
    pub fn asks_for_source_ranges(&self) -> bool {
        self.frontends.iter().any(|f| u32::from(f.flags) & FRONTEND_SOURCE_RANGES != 0)
    }

    /// Lets these source ranges in, and no others.
    fn filter(&mut self, mut wanted: Vec<SourceRangeKey>, space: &mut Space) {
        wanted.sort_unstable();
        let before = std::mem::replace(&mut self.source_ranges, wanted);
        for gone in before.iter().filter(|key| self.source_ranges.binary_search(key).is_err()) {
            space.tables.source_ranges.unset(*gone);
        }
        for key in &self.source_ranges {
            space.tables.source_ranges.set(*key, 1);
        }
    }

    /// Leaves every backend, region and the name.
    pub fn remove(&mut self, id: u32, space: &mut Space) {
        self.removed = true;
        space.assignments -= self.assignments.len();
        for assignment in std::mem::take(&mut self.assignments) {
            self.dismiss(assignment, space);
        }
        self.filter(Vec::new(), space);
        for mut pool in std::mem::take(&mut self.pools) {
            pool.retire(space, &mut self.retired);
        }
        space.tables.services.unset(id);
    }

    /// True while something is left behind.
    pub fn is_unsettled(&self) -> bool {
        self.removed || !self.leaving.is_empty() || !self.retired.is_empty()
    }

    /// The row of a frontend that this port owns.
    pub fn row(&self, id: u32, frontend: &CompiledFrontend) -> Frontend {
        let family = frontend.key.ip().family();
        let pool = |r#use: PoolUse| {
            let pool = self.pools[pool_index(family, r#use.member)];
            abi::Pool { base: pool.base, count: pool.count, member: r#use.member, on_empty: r#use.on_empty, zero: 0 }
        };
        Frontend {
            service_id: id,
            flags: frontend.flags.into(),
            affinity_seconds: self.affinity_seconds,
            inside: pool(frontend.inside),
            outside: pool(frontend.outside),
        }
    }

    /// Gives every endpoint a backend id and row, and dismisses those that are no longer wanted. Returns how many
    /// endpoints found no id.
    fn assign(&mut self, service_id: u32, wanted: &CompiledPort, space: &mut Space) -> usize {
        space.assignments -= self.assignments.len();
        let mut before = std::mem::take(&mut self.assignments).into_iter().peekable();
        let mut assigned = Vec::with_capacity(wanted.endpoints.len());
        let mut missing = 0;
        for endpoint in &wanted.endpoints {
            while let Some(assignment) = before.next_if(|t| t.at < endpoint.at) {
                self.dismiss(assignment, space);
            }
            let known =
                before.next_if(|t| t.at == endpoint.at).map(|t| t.id).or_else(|| self.recall(endpoint.at, space));
            match known.or_else(|| space.backend_ids.allocate()) {
                Some(id) => {
                    let row = backend_row(service_id, id, known.is_none(), wanted.protocol, endpoint, space);
                    space.tables.backends.set(id, row);
                    assigned.push(Assignment { at: endpoint.at, id, pools: endpoint.pools });
                }
                None => missing += 1,
            }
        }
        for assignment in before {
            self.dismiss(assignment, space);
        }
        space.assignments += assigned.len();
        self.assignments = assigned;
        missing
    }

    /// Brings some endpoints to what `changes` says, and nothing else. False: that cannot be done alone; what has been
    /// done is right all the same.
    pub fn adjust(&mut self, id: u32, changes: &PortChange, space: &mut Space) -> bool {
        let Some(protocol) = self.protocol.filter(|_| self.short == Shortage::default()) else { return false };
        let mut moves: [Moves; 4] = Default::default();
        let (mut gone, mut came) = (Vec::new(), Vec::new());
        let mut is_complete = true;
        for (at, wanted) in changes {
            let place = self.assignments.binary_search_by_key(at, |assignment| assignment.at);
            let before = place.ok().map(|place| self.assignments[place]);
            let known =
                before.map(|assignment| assignment.id).or_else(|| self.recall(*at, space).filter(|_| wanted.is_some()));
            let Some(endpoint) = wanted else {
                gone.extend(before);
                note_moves(&mut moves, before.as_ref(), None);
                continue;
            };
            let Some(backend_id) = known.or_else(|| space.backend_ids.allocate()) else {
                is_complete = false;
                continue;
            };
            let row = backend_row(id, backend_id, known.is_none(), protocol, endpoint, space);
            space.tables.backends.set(backend_id, row);
            let assignment = Assignment { at: *at, id: backend_id, pools: endpoint.pools };
            note_moves(&mut moves, before.as_ref(), Some(&assignment));
            match place {
                Ok(place) => self.assignments[place] = assignment,
                Err(_) => came.push(assignment),
            }
        }
        self.exchange(gone, came, space);
        for (pool, (out, into)) in self.pools.iter_mut().zip(&moves) {
            is_complete &= pool.exchange(out, into, space);
        }
        is_complete
    }

    /// Dismisses those that are `gone`, and assigns ids to those that `came`: few, among many assignments.
    fn exchange(&mut self, gone: Vec<Assignment>, came: Vec<Assignment>, space: &mut Space) {
        space.assignments = space.assignments + came.len() - gone.len();
        let assignments = &mut self.assignments;
        let place = |assignments: &[Assignment], at| assignments.partition_point(|assignment| assignment.at < at);
        match (&gone[..], &came[..]) {
            ([], []) => {}
            ([], [one]) => assignments.insert(place(assignments, one.at), *one),
            ([one], []) => drop(assignments.remove(place(assignments, one.at))),
            // As a rollout does: only those between the two move.
            ([old], [new]) => {
                let (hole, to) = (place(assignments, old.at), place(assignments, new.at));
                match hole < to {
                    true => assignments[hole..to].rotate_left(1),
                    false => assignments[to..=hole].rotate_right(1),
                }
                assignments[if hole < to { to - 1 } else { to }] = *new;
            }
            _ => {
                let ids: HashSet<u32> = gone.iter().map(|assignment| assignment.id).collect();
                assignments.retain(|assignment| !ids.contains(&assignment.id));
                assignments.extend(came);
                assignments.sort_by_key(|assignment| assignment.at);
            }
        }
        gone.into_iter().for_each(|assignment| self.dismiss(assignment, space));
    }

    /// A backend that was to go and comes back before the kernel heard of it keeps its id and generation.
    fn recall(&mut self, at: SocketAddrx, space: &Space) -> Option<u32> {
        let lives = |id| space.tables.backends.applied(id).is_some_and(|row| !is_gone(&row));
        let index = self.leaving.iter().position(|t| t.at == at && lives(t.id))?;
        Some(self.leaving.swap_remove(index).id)
    }

    fn dismiss(&mut self, assignment: Assignment, space: &mut Space) {
        let backends = &mut space.tables.backends;
        match backends.applied(assignment.id).filter(|row| !is_gone(row)) {
            Some(row) => {
                let state = abi::backend_state::BACKEND_GONE as u8;
                backends.set(assignment.id, Backend { state, pools: 0, ..row });
            }
            // The kernel never saw this assignment.
            None => backends.forget(assignment.id),
        }
        self.leaving.push(assignment);
    }

    /// Brings the pools to what the backends say. A pool has a region only while a frontend that this port `owns` uses
    /// it: whoever adopts the maps learns of pools by frontends.
    pub fn fill_pools(&mut self, owns: impl Fn(&CompiledFrontend) -> bool, space: &mut Space) {
        let mut used = [false; 4];
        for frontend in self.frontends.iter().filter(|f| owns(f)) {
            let family = frontend.key.ip().family();
            used[pool_index(family, frontend.inside.member)] = true;
            used[pool_index(family, frontend.outside.member)] = true;
        }
        self.short.slots = 0;
        for family in [Family::Ipv4, Family::Ipv6] {
            for member in [POOL_CLUSTER as u8, POOL_LOCAL as u8] {
                let index = pool_index(family, member);
                let holds = |t: &&Assignment| used[index] && t.pools & member != 0 && t.at.ip.family() == family;
                let wanted: Vec<u32> = self.assignments.iter().filter(holds).map(|t| t.id).collect();
                self.short.slots += self.pools[index].hold(&wanted, space, &mut self.retired);
            }
        }
    }
}

/// Backend ids that leave a pool, and those that come.
type Moves = (Vec<u32>, Vec<u32>);

fn note_moves(moves: &mut [Moves; 4], before: Option<&Assignment>, now: Option<&Assignment>) {
    for member in [POOL_CLUSTER as u8, POOL_LOCAL as u8] {
        let stands = |assignment: Option<&Assignment>| assignment.filter(|t| t.pools & member != 0).copied();
        match (stands(before), stands(now)) {
            (Some(assignment), None) => moves[pool_index(assignment.at.ip.family(), member)].0.push(assignment.id),
            (None, Some(assignment)) => moves[pool_index(assignment.at.ip.family(), member)].1.push(assignment.id),
            _ => {}
        }
    }
}

/// A new assignment of an id starts the next generation, so that records of the former one are known as such.
fn backend_row(
    service_id: u32,
    id: u32,
    new: bool,
    protocol: Protocol,
    endpoint: &CompiledEndpoint,
    space: &Space,
) -> Backend {
    let backends = &space.tables.backends;
    let generation = match new {
        true => backends.applied(id).map_or(1, |row| row.generation.wrapping_add(1).max(1)),
        // A row on its way (never applied) or in place; either has the assignment's generation.
        false => backends.desired(id).map_or(1, |row| row.generation),
    };
    Backend {
        address: endpoint.at.ip.0,
        port_be: endpoint.at.port.to_be_bytes(),
        state: endpoint.state,
        pools: endpoint.pools,
        generation,
        service_id,
        protocol: protocol as u8,
        flags: endpoint.flags,
        zero: 0,
    }
}
