//! How many rows of each map one Service may have, so that none takes what others need.
//!
//! A pure function of what all Services ask for:
//!
//! - No Service gets more than the quota, a part of the map.
//! - As long as all fits, that is all. When it does not, half of the map is shared out evenly: each Service gets the
//!   floor, or what it asks for if that is less. The other half goes to those that ask for more, the oldest first.
//!
//! So a Service that asks for much costs no other Service anything, and a new one takes nothing from an older one that
//! has no more than the floor. The floor is the quota halved some times, so that small changes do not move it.

use crate::model::ObjectName;
use crate::table::{HashMap, HashSet};

/// What there is a quota of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// Service ports: rows of `services`.
    Ports,
    Frontends,
    Addresses,
    /// Rows of `backends`.
    Endpoints,
    SourceRanges,
}

const RESOURCES: [Resource; 5] =
    [Resource::Ports, Resource::Frontends, Resource::Addresses, Resource::Endpoints, Resource::SourceRanges];

/// Rows by `Resource as usize`.
pub type Amounts = [u32; RESOURCES.len()];

/// For a Service that is alone.
pub const UNLIMITED: Amounts = [u32::MAX; RESOURCES.len()];

/// This much of a small map any Service may have.
const SMALLEST_QUOTA: u32 = 1024;

/// A Service that asks for something.
#[derive(Clone, Copy, Debug)]
pub struct Demand<'a> {
    pub name: &'a ObjectName,
    /// As `Service::created`.
    pub created: i64,
    pub rows: &'a Amounts,
}

/// Who gets how much of a map that is too small for all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Ration {
    floor: u32,
    /// Those that get more than the floor.
    more: HashMap<ObjectName, u32>,
}

/// The quotas of all Services.
#[derive(Debug, Default)]
pub struct Quotas {
    capacity: Amounts,
    /// All that is asked for, up to the quota of each Service.
    asked: [u64; RESOURCES.len()],
    rations: [Option<Ration>; RESOURCES.len()],
    is_stale: bool,
}

impl Quotas {
    /// How many rows the maps hold. True when that is news: all demands are to be counted again.
    pub fn set_capacity(&mut self, capacity: Amounts) -> bool {
        let is_new = self.capacity != capacity;
        if is_new {
            (self.capacity, self.asked, self.is_stale) = (capacity, [0; RESOURCES.len()], true);
        }
        is_new
    }

    /// A Service asks for `now` and no longer for `before`.
    pub fn change(&mut self, before: &Amounts, now: &Amounts) {
        if before == now {
            return;
        }
        self.is_stale = true;
        for resource in RESOURCES {
            let (quota, index) = (self.quota(resource), resource as usize);
            let less = self.asked[index].saturating_sub(before[index].min(quota).into());
            self.asked[index] = less + u64::from(now[index].min(quota));
        }
    }

    /// Rows that all Services together may get at most.
    pub fn asked(&self, resource: Resource) -> usize {
        let asked = self.asked[resource as usize].min(self.capacity[resource as usize].into());
        asked.try_into().unwrap_or(usize::MAX)
    }

    /// A Service is older or younger than before: it was made anew.
    pub fn change_order(&mut self) {
        self.is_stale = true;
    }

    /// What a Service may have.
    pub fn of(&self, name: &ObjectName) -> Amounts {
        RESOURCES.map(|resource| self.limit(resource, self.rations[resource as usize].as_ref(), name))
    }

    /// Quotas out anew if anything has changed. Returns the Services that get more or less than before.
    pub fn settle<'a, D: Iterator<Item = Demand<'a>>>(&mut self, all: impl Fn() -> D) -> HashSet<ObjectName> {
        let mut changed = HashSet::default();
        if !std::mem::take(&mut self.is_stale) {
            return changed;
        }
        for resource in RESOURCES {
            let index = resource as usize;
            let is_scarce = self.asked[index] > self.usable(resource).into();
            let ration = is_scarce.then(|| self.divide(resource, all()));
            if ration == self.rations[index] {
                continue;
            }
            for demand in all() {
                let gets = |ration| demand.rows[index].min(self.limit(resource, ration, demand.name));
                if gets(ration.as_ref()) != gets(self.rations[index].as_ref()) {
                    changed.insert(demand.name.clone());
                }
            }
            self.rations[index] = ration;
        }
        changed
    }

    /// Some rows stay free: what goes is deleted after what comes was written, and the datapath's trial needs one.
    fn usable(&self, resource: Resource) -> u32 {
        let capacity = self.capacity[resource as usize];
        // Backend 0 is none.
        let unused = u32::from(resource == Resource::Endpoints);
        capacity.saturating_sub(capacity / 64 + unused)
    }

    fn quota(&self, resource: Resource) -> u32 {
        // Endpoints are what large Services have many of.
        let part = if resource == Resource::Endpoints { 4 } else { 16 };
        (self.usable(resource) / part).max(SMALLEST_QUOTA)
    }

    fn limit(&self, resource: Resource, ration: Option<&Ration>, name: &ObjectName) -> u32 {
        match ration {
            None => self.quota(resource),
            Some(ration) => ration.more.get(name).copied().unwrap_or(ration.floor),
        }
    }

    fn divide<'a>(&self, resource: Resource, all: impl Iterator<Item = Demand<'a>>) -> Ration {
        let (quota, usable) = (self.quota(resource), self.usable(resource));
        let wants: Vec<(i64, &ObjectName, u32)> = all
            .map(|demand| (demand.created, demand.name, demand.rows[resource as usize].min(quota)))
            .filter(|(_, _, rows)| *rows > 0)
            .collect();
        let sum = |floor: u32| wants.iter().map(|(_, _, rows)| u64::from(*rows.min(&floor))).sum::<u64>();
        let mut floor = quota / 2;
        while sum(floor) > u64::from(usable / 2) {
            floor /= 2;
        }
        let mut left = u64::from(usable).saturating_sub(sum(floor));
        let mut larger: Vec<_> = wants.into_iter().filter(|(_, _, rows)| *rows > floor).collect();
        larger.sort_unstable();
        let mut more = HashMap::default();
        for (_, name, rows) in larger {
            let extra = left.min(u64::from(rows - floor)) as u32;
            left -= u64::from(extra);
            if extra > 0 {
                more.insert(name.clone(), floor + extra);
            }
        }
        Ration { floor, more }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRONTENDS: usize = Resource::Frontends as usize;

    /// What each of these Services gets of 65,536 frontends (1,024 of them stay free): `(created, asked for)`.
    fn shared(demands: &[(i64, u32)]) -> Vec<u32> {
        let names: Vec<ObjectName> = (0..demands.len()).map(|n| ObjectName::new("d", &format!("s{n:04}"))).collect();
        let amounts = |rows| {
            let mut amounts = Amounts::default();
            amounts[FRONTENDS] = rows;
            amounts
        };
        let rows: Vec<Amounts> = demands.iter().map(|(_, rows)| amounts(*rows)).collect();
        let mut quotas = Quotas::default();
        assert!(quotas.set_capacity([65_536; 5]));
        rows.iter().for_each(|rows| quotas.change(&Amounts::default(), rows));
        let all = || {
            let each = names.iter().zip(&rows).zip(demands);
            each.map(|((name, rows), (created, _))| Demand { name, created: *created, rows })
        };
        quotas.settle(all);
        assert!(quotas.settle(all).is_empty(), "nothing has changed");
        names.iter().zip(demands).map(|(name, (_, rows))| quotas.of(name)[FRONTENDS].min(*rows)).collect()
    }

    #[test]
    fn no_service_gets_more_than_a_sixteenth_of_the_map() {
        assert_eq!(shared(&[(1, 100), (2, 300_000), (3, 4032)]), [100, 4032, 4032]);
    }

    #[test]
    fn where_all_ask_for_too_much_the_small_keep_what_they_have_and_the_oldest_get_what_is_left() {
        let mut demands = vec![(9, 1), (1, 3000), (9, 100)];
        demands.extend((0..60).map(|_| (5, 5000)));
        let got = shared(&demands);
        assert_eq!(got[..3], [1, 3000, 100], "the young and small, and the old");
        // The floor is 4032 / 8; sixty floors and three demands are less than half.
        assert_eq!((got[3], *got.last().unwrap()), (4032, 504));
        assert_eq!(got.iter().sum::<u32>(), 64_512);
        assert_eq!(got[3..].iter().filter(|rows| ![504, 4032].contains(*rows)).count(), 1, "{got:?}");
    }

    #[test]
    fn where_there_are_more_services_than_rows_the_youngest_get_none() {
        let demands: Vec<(i64, u32)> = (0..70_000).map(|n| (n, 1)).collect();
        let got = shared(&demands);
        assert_eq!((got[64_511], got[64_512], got.iter().sum::<u32>()), (1, 0, 64_512));
    }

    #[test]
    fn only_those_whose_quota_changes_are_named() {
        let names = ["a", "b", "c"].map(|name| ObjectName::new("d", name));
        let mut quotas = Quotas::default();
        quotas.set_capacity([2000; 5]);
        let settle = |quotas: &mut Quotas, rows: [u32; 3]| {
            let rows = rows.map(|rows| [0, rows, 0, 0, 0]);
            let all = || names.iter().zip(&rows).map(|(name, rows)| Demand { name, created: 1, rows });
            let mut changed: Vec<String> = quotas.settle(all).iter().map(|name| name.name.to_string()).collect();
            changed.sort();
            changed
        };
        quotas.change(&[0; 5], &[0, 900, 0, 0, 0]);
        quotas.change(&[0; 5], &[0, 900, 0, 0, 0]);
        assert!(settle(&mut quotas, [900, 900, 0]).is_empty());
        quotas.change(&[0; 5], &[0, 500, 0, 0, 0]);
        assert_eq!(settle(&mut quotas, [900, 900, 500]), ["b", "c"]);
        quotas.change(&[0, 900, 0, 0, 0], &[0; 5]);
        assert_eq!(settle(&mut quotas, [0, 900, 500]), ["b", "c"]);
    }
}
