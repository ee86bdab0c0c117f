//! Who claims which frontend and which address. Several Services may claim one (the same externalIP and port): all
//! claims are kept in order, so that the next in line takes over when the owner goes.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::abi::FrontendKey;
use crate::abi::address_flag::{ADDRESS_CLUSTER_IP, ADDRESS_LOCAL, ADDRESS_NODE, ADDRESS_SERVICE_VIP};
use crate::model::ObjectName;
use crate::table::HashMap;

/// Where a Service port stands among all that claim the same: the oldest Service first, then the first by name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// As `Service::created`.
    pub created: i64,
    pub service: ObjectName,
    pub port: Arc<str>,
    pub id: u32,
}

/// Service ids by frontend.
#[derive(Debug, Default)]
pub struct Claims {
    owners: HashMap<FrontendKey, u32>,
    /// All claimants, where there are several. The first one is the owner.
    groups: HashMap<FrontendKey, BTreeSet<Rank>>,
}

impl Claims {
    /// `rank` claims `key`, once more or for the first time. `rank_of` is asked for that of a claimant who was alone.
    pub fn claim(&mut self, key: FrontendKey, rank: &Rank, rank_of: impl Fn(u32) -> Option<Rank>) {
        let Some(owner) = self.owners.get(&key).copied() else {
            self.owners.insert(key, rank.id);
            return;
        };
        let group = match self.groups.get_mut(&key) {
            Some(group) => group,
            None if owner == rank.id => return,
            None => self.groups.entry(key).or_insert_with(|| rank_of(owner).into_iter().collect()),
        };
        group.insert(rank.clone());
        self.choose(key);
    }

    /// `rank` claims `key` no longer.
    pub fn release(&mut self, key: FrontendKey, rank: &Rank) {
        let Some(group) = self.groups.get_mut(&key) else {
            if self.owners.get(&key) == Some(&rank.id) {
                self.owners.remove(&key);
            }
            return;
        };
        group.remove(rank);
        self.choose(key);
        if self.groups.get(&key).is_some_and(|group| group.len() < 2) {
            self.groups.remove(&key);
        }
    }

    fn choose(&mut self, key: FrontendKey) {
        if let Some(first) = self.groups.get(&key).and_then(BTreeSet::first) {
            self.owners.insert(key, first.id);
        }
    }

    /// The Service port to which `key` belongs.
    pub fn owner(&self, key: FrontendKey) -> Option<u32> {
        self.owners.get(&key).copied()
    }

    /// Everyone who claims `key`, where there are several: the owner first.
    pub fn group(&self, key: FrontendKey) -> Option<&BTreeSet<Rank>> {
        self.groups.get(&key)
    }
}

/// What an address is asked to be, by how many.
#[derive(Clone, Copy, Debug, Default)]
struct Roles {
    cluster_ip: u32,
    service_vip: u32,
    node: bool,
    outward: bool,
}

/// Roles by address.
#[derive(Debug, Default)]
pub struct AddressRoles(HashMap<[u8; 16], Roles>);

impl AddressRoles {
    /// One more Service uses `address` so (bits of `abi::address_flag`). Returns all bits it has now.
    pub fn add(&mut self, address: [u8; 16], flags: u32) -> u32 {
        self.change(address, |roles| {
            roles.cluster_ip += u32::from(flags & ADDRESS_CLUSTER_IP != 0);
            roles.service_vip += u32::from(flags & ADDRESS_SERVICE_VIP != 0);
            roles.node |= flags & ADDRESS_NODE != 0;
            roles.outward |= flags & ADDRESS_LOCAL != 0;
        })
    }

    /// One Service less.
    pub fn remove(&mut self, address: [u8; 16], flags: u32) -> u32 {
        self.change(address, |roles| {
            roles.cluster_ip = roles.cluster_ip.saturating_sub(u32::from(flags & ADDRESS_CLUSTER_IP != 0));
            roles.service_vip = roles.service_vip.saturating_sub(u32::from(flags & ADDRESS_SERVICE_VIP != 0));
            roles.node &= flags & ADDRESS_NODE == 0;
            roles.outward &= flags & ADDRESS_LOCAL == 0;
        })
    }

    fn change(&mut self, address: [u8; 16], change: impl FnOnce(&mut Roles)) -> u32 {
        let roles = self.0.entry(address).or_default();
        change(roles);
        let flag = |is: bool, flag: u32| if is { flag } else { 0 };
        let flags = flag(roles.cluster_ip > 0, ADDRESS_CLUSTER_IP)
            | flag(roles.service_vip > 0, ADDRESS_SERVICE_VIP)
            | flag(roles.node, ADDRESS_NODE)
            | flag(roles.outward, ADDRESS_LOCAL);
        if flags == 0 {
            self.0.remove(&address);
        }
        flags
    }
}
