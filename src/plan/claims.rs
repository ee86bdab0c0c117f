//! Who claims which frontend and which address. Several Services may claim one (the same externalIP and port): all
//! claims are kept, so that the next in line takes over when the owner goes.

use crate::abi::FrontendKey;
use crate::abi::address_flag::{ADDRESS_CLUSTER_IP, ADDRESS_LOCAL, ADDRESS_NODE, ADDRESS_SERVICE_VIP};
use crate::table::HashMap;

/// Service ids by frontend.
#[derive(Debug, Default)]
pub struct Claims {
    /// The first claimant: of nearly every frontend the only one.
    first: HashMap<FrontendKey, u32>,
    /// The others.
    more: HashMap<FrontendKey, Vec<u32>>,
}

impl Claims {
    pub fn claim(&mut self, key: FrontendKey, service_id: u32) {
        match self.first.get(&key) {
            None => {
                self.first.insert(key, service_id);
            }
            Some(first) if *first == service_id => {}
            Some(_) => {
                let more = self.more.entry(key).or_default();
                if !more.contains(&service_id) {
                    more.push(service_id);
                }
            }
        }
    }

    pub fn release(&mut self, key: FrontendKey, service_id: u32) {
        if let Some(more) = self.more.get_mut(&key) {
            more.retain(|id| *id != service_id);
            if self.first.get(&key) == Some(&service_id)
                && let Some(next) = more.pop()
            {
                self.first.insert(key, next);
            }
            if more.is_empty() {
                self.more.remove(&key);
            }
        } else if self.first.get(&key) == Some(&service_id) {
            self.first.remove(&key);
        }
    }

    /// Everyone who claims `key`, in no order.
    pub fn of(&self, key: FrontendKey) -> impl Iterator<Item = u32> + '_ {
        self.first.get(&key).into_iter().chain(self.more.get(&key).into_iter().flatten()).copied()
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
