//! The daemon's real control path, from records to the kernel's rows, without its tasks: the core that plans, and the
//! sync that writes. Only the clock is the test's, so that ids and regions are used again at once.

use std::time::{Duration, Instant};

use kubelane::abi::{Backend, backend_state};
use kubelane::model::{Change, Kind};
use kubelane::sync::{Core, CoreSettings, MapIo, MapName, SyncReport};

use super::random_cluster::{HERE, RandomCluster, bound};

/// Longer than anything rests.
const STEP: Duration = Duration::from_secs(2);

pub struct Daemon {
    core: Core,
    clock: Instant,
    told: RandomCluster,
}

fn new_core(maps: &mut dyn MapIo) -> Core {
    let mut core = Core::new(CoreSettings { node_name: HERE.into(), ..CoreSettings::default() });
    core.adopt(maps).unwrap();
    core
}

impl Daemon {
    /// Starts with no objects at all: whatever the maps hold is taken over, and taken away.
    pub fn start(maps: &mut dyn MapIo) -> Daemon {
        let mut daemon = Daemon { core: new_core(maps), clock: Instant::now(), told: RandomCluster::default() };
        daemon.list();
        daemon.sync(maps);
        daemon
    }

    /// Tells what is different now, and syncs.
    pub fn follow(&mut self, world: &RandomCluster, maps: &mut dyn MapIo) {
        let told = std::mem::replace(&mut self.told, world.clone());
        for name in told.services.keys().filter(|name| !world.services.contains_key(*name)) {
            self.core.apply(Change::ServiceGone(name.clone()));
        }
        for (_, service) in world.services.iter().filter(|(name, service)| told.services.get(*name) != Some(*service)) {
            self.core.apply(Change::Service(Box::new(service.clone())));
        }
        for (_, slice) in world.slices.iter().filter(|(name, slice)| told.slices.get(*name) != Some(*slice)) {
            self.core.apply(Change::Slice(Box::new(slice.clone())));
        }
        for name in told.slices.keys().filter(|name| !world.slices.contains_key(*name)) {
            self.core.apply(Change::SliceGone(name.clone()));
        }
        self.core.apply(Change::Node(Box::new(world.node())));
        self.set_addresses();
        self.sync(maps);
    }

    /// Ends and starts again: the same objects, the maps as they are. Nothing may be written.
    pub fn restart(&mut self, maps: &mut dyn MapIo) {
        self.core = new_core(maps);
        self.list();
        let report = self.sync(maps);
        assert_eq!((report.rows_written, report.rows_deleted), (0, 0), "a restart with an unchanged world: {report:?}");
    }

    fn list(&mut self) {
        let node = Change::Node(Box::new(self.told.node()));
        let services = self.told.services.values().map(|s| Change::Service(Box::new(s.clone()))).collect();
        let slices = self.told.slices.values().map(|s| Change::Slice(Box::new(s.clone()))).collect();
        for (kind, changes) in [(Kind::Node, vec![node]), (Kind::Services, services), (Kind::EndpointSlices, slices)] {
            self.core.apply(Change::ListBegin(kind));
            changes.into_iter().for_each(|change| self.core.apply(change));
            self.core.apply(Change::ListEnd(kind));
        }
        self.set_addresses();
    }

    fn set_addresses(&mut self) {
        let nodeport = self.told.nodeport.iter().copied().collect();
        self.core.set_node_addresses(nodeport, bound());
        // Answers are looked at that come to the outward devices' addresses, and to those by which pods see this node.
        self.core.set_outward_addresses(if self.told.nodeport.is_empty() { vec![] } else { bound() });
    }

    fn sync(&mut self, maps: &mut dyn MapIo) -> SyncReport {
        self.clock += STEP;
        let report = self.core.sync(maps, self.clock);
        assert!(report.failures.is_empty(), "{report:?}");
        assert!(!self.core.pending(), "a sync left something: {report:?}");
        report
    }
}

/// Nothing of a world that is gone is left in the kernel: arrays keep rows, but none that a packet finds.
pub fn assert_empty(maps: &mut dyn MapIo) {
    for map in [MapName::Services, MapName::Frontends, MapName::Addresses, MapName::SourceRanges] {
        maps.dump(map, &mut |key, _| panic!("{}: a row is left: {key:?}", map.as_str())).unwrap();
    }
    let mut check = |id: &[u8], row: &[u8]| {
        let row: Backend = bytemuck::pod_read_unaligned(row);
        assert_eq!(u32::from(row.state), backend_state::BACKEND_GONE, "backend {id:?} is left: {row:?}");
        assert_eq!(row.pools, 0);
    };
    maps.dump(MapName::Backends, &mut check).unwrap();
}
