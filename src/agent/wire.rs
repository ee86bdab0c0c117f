//! Keeps the packet programs on the outward devices while these come, change and go. One device that fails never
//! disturbs another: it is told of once, and tried again.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tracing::{debug, info, warn};

use crate::bpf::{Attached, Device, Devices, LinkLayer};
use crate::model::Family;
use crate::netdev::{Layer, NetDevice};

/// Before a device that failed is tried again, unless something changes earlier.
const RETRY: Duration = Duration::from_secs(30);

/// Where programs are attached: [`Devices`], or the tests' model of it.
pub trait Hooks {
    /// Attaches, or replaces what an earlier daemon attached, and notes the device's addresses.
    fn attach(&mut self, device: &Device) -> anyhow::Result<Attached>;
    /// Detaches; nothing happens if the device was not attached or has vanished.
    fn detach(&mut self, index: u32) -> anyhow::Result<()>;
    /// Interface indices of the devices that have programs, an earlier daemon's included.
    fn attached(&self) -> anyhow::Result<Vec<u32>>;
}

impl Hooks for Devices {
    fn attach(&mut self, device: &Device) -> anyhow::Result<Attached> {
        Devices::attach(self, device)
    }

    fn detach(&mut self, index: u32) -> anyhow::Result<()> {
        Devices::detach(self, index)
    }

    fn attached(&self) -> anyhow::Result<Vec<u32>> {
        Devices::attached(self)
    }
}

/// The outward devices as they are attached.
pub struct Wire<'d> {
    hooks: &'d mut dyn Hooks,
    /// By interface index, with the name.
    attached: BTreeMap<u32, (Device, String)>,
    /// What was said of devices that could not be attached or detached.
    failures: BTreeMap<u32, String>,
    /// Devices of an earlier daemon have been looked for.
    adopted: bool,
    due: Option<Instant>,
}

impl<'d> Wire<'d> {
    pub fn new(hooks: &'d mut dyn Hooks) -> Self {
        Wire { hooks, attached: BTreeMap::new(), failures: BTreeMap::new(), adopted: false, due: None }
    }

    /// When to call again although nothing changed; `None` when nothing failed.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Attaches to these devices and to no others.
    pub fn follow(&mut self, outward: &[&NetDevice], now: Instant) {
        let mut failures = BTreeMap::new();
        for (index, name) in self.leaving(outward) {
            match self.hooks.detach(index) {
                Ok(()) => info!(device = name, index, "packets of this device are no longer looked at"),
                Err(error) => drop(failures.insert(index, (name.clone(), format!("{error:#}")))),
            }
            self.attached.remove(&index);
        }
        for device in outward {
            let wanted = (hook_of(device), device.name.clone());
            if self.attached.get(&device.index) == Some(&wanted) {
                continue;
            }
            match self.hooks.attach(&wanted.0) {
                Ok(how) => {
                    let known = self.attached.insert(device.index, wanted).is_some();
                    self.tell(device, known, how);
                }
                Err(error) => drop(failures.insert(device.index, (device.name.clone(), format!("{error:#}")))),
            }
        }
        self.note(failures, now);
    }

    /// Attached devices that are no longer outward. Those of an earlier daemon are found by their pins.
    fn leaving(&mut self, outward: &[&NetDevice]) -> Vec<(u32, String)> {
        let mut leaving: Vec<(u32, String)> =
            self.attached.iter().map(|(index, (_, name))| (*index, name.clone())).collect();
        leaving.extend(self.failures.keys().map(|index| (*index, format!("interface {index}"))));
        if !self.adopted {
            match self.hooks.attached() {
                Ok(indices) => {
                    leaving.extend(indices.into_iter().map(|index| (index, format!("interface {index}"))));
                    self.adopted = true;
                }
                Err(error) => warn!("devices of an earlier daemon cannot be listed: {error:#}; trying again"),
            }
        }
        leaving.retain(|(index, _)| outward.iter().all(|device| device.index != *index));
        leaving.sort_unstable();
        leaving.dedup_by_key(|(index, _)| *index);
        leaving
    }

    fn tell(&self, device: &NetDevice, known: bool, how: Attached) {
        let (name, index) = (&device.name, device.index);
        match how {
            Attached::New => info!(device = name, index, "packets of this device are looked at from now on"),
            Attached::Replaced if known => debug!(device = name, index, "the device's addresses changed"),
            Attached::Replaced => info!(device = name, index, "took over this device from an earlier daemon"),
        }
    }

    fn note(&mut self, failures: BTreeMap<u32, (String, String)>, now: Instant) {
        for (index, (name, error)) in &failures {
            if self.failures.get(index) != Some(error) {
                warn!(
                    "device {name}: {error}; NodePorts and load balancer addresses are not served there (trying \
                     again; if the device should be left alone, name the others with --devices)"
                );
            }
        }
        self.due = (!failures.is_empty() || !self.adopted).then(|| now + RETRY);
        self.failures = failures.into_iter().map(|(index, (_, error))| (index, error)).collect();
    }
}

fn hook_of(device: &NetDevice) -> Device {
    let first = |family| device.first(family).map(|ip| ip.to_ip());
    let link_layer = match device.layer {
        Layer::Ethernet => LinkLayer::Ethernet,
        // A device of an unknown layer is never selected.
        Layer::None | Layer::Unknown => LinkLayer::None,
    };
    Device {
        index: device.index,
        link_layer,
        ip4: first(Family::Ipv4).and_then(|ip| if let std::net::IpAddr::V4(ip) = ip { Some(ip) } else { None }),
        ip6: first(Family::Ipv6).and_then(|ip| if let std::net::IpAddr::V6(ip) = ip { Some(ip) } else { None }),
        rp_filter: rp_filter(&device.name),
    }
}

/// What the kernel makes of both sysctls: the larger one counts (Documentation/networking/ip-sysctl.rst). 0 where there is
/// none: the device has just gone.
fn rp_filter(device: &str) -> u32 {
    let read = |name: &str| -> u32 {
        let text = std::fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{name}/rp_filter")).unwrap_or_default();
        text.trim().parse().unwrap_or_default()
    };
    read("all").max(read(device))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[derive(Default)]
    struct Model {
        attached: BTreeMap<u32, Device>,
        refuses: BTreeSet<u32>,
        calls: usize,
    }

    impl Hooks for Model {
        fn attach(&mut self, device: &Device) -> anyhow::Result<Attached> {
            self.calls += 1;
            anyhow::ensure!(!self.refuses.contains(&device.index), "no such device");
            let before = self.attached.insert(device.index, device.clone());
            Ok(if before.is_some() { Attached::Replaced } else { Attached::New })
        }

        fn detach(&mut self, index: u32) -> anyhow::Result<()> {
            self.calls += 1;
            anyhow::ensure!(!self.refuses.contains(&index), "busy");
            self.attached.remove(&index);
            Ok(())
        }

        fn attached(&self) -> anyhow::Result<Vec<u32>> {
            Ok(self.attached.keys().copied().collect())
        }
    }

    fn device(index: u32, address: &str) -> NetDevice {
        NetDevice {
            index,
            name: format!("eth{index}"),
            kind: None,
            layer: Layer::Ethernet,
            is_up: true,
            is_loopback: false,
            is_member: false,
            below: None,
            has_default_route: true,
            addresses: vec![address.parse().unwrap()],
        }
    }

    fn model(hooks: &Model) -> Vec<u32> {
        hooks.attached.keys().copied().collect()
    }

    #[test]
    fn devices_are_attached_once_again_when_addresses_change_and_detached_when_they_go() {
        let mut hooks = Model::default();
        // Left by an earlier daemon.
        let left = device(9, "192.0.2.9");
        hooks.attached.insert(9, hook_of(&left));
        let (one, two, now) = (device(1, "192.0.2.1"), device(2, "2001:db8::2"), Instant::now());
        let mut wire = Wire::new(&mut hooks);
        wire.follow(&[&one, &two], now);
        wire.follow(&[&one, &two], now);
        assert_eq!(wire.due(), None);
        assert_eq!((model(&hooks), hooks.calls), (vec![1, 2], 3));
        assert_eq!(hooks.attached[&2].ip6, Some("2001:db8::2".parse().unwrap()));

        let mut wire = Wire::new(&mut hooks);
        wire.follow(&[&one, &two], now);
        let moved = device(2, "192.0.2.2");
        wire.follow(&[&one, &moved], now);
        wire.follow(&[&moved], now);
        assert_eq!((model(&hooks), hooks.calls), (vec![2], 7));
        assert_eq!((hooks.attached[&2].ip4, hooks.attached[&2].ip6), (Some([192, 0, 2, 2].into()), None));
    }

    #[test]
    fn a_device_that_fails_disturbs_no_other_and_is_tried_again() {
        let mut hooks = Model { refuses: [1].into(), ..Model::default() };
        let (one, two, now) = (device(1, "192.0.2.1"), device(2, "192.0.2.2"), Instant::now());
        let mut wire = Wire::new(&mut hooks);
        wire.follow(&[&one, &two], now);
        assert_eq!(wire.due(), Some(now + RETRY));
        wire.follow(&[&one, &two], now + RETRY);
        assert_eq!((model(&hooks), hooks.calls), (vec![2], 3));

        hooks.refuses.clear();
        let mut wire = Wire::new(&mut hooks);
        wire.follow(&[&one, &two], now);
        assert_eq!(wire.due(), None);
        assert_eq!(model(&hooks), [1, 2]);
    }

    #[test]
    fn a_device_that_cannot_be_detached_is_tried_again() {
        let mut hooks = Model { refuses: [1].into(), ..Model::default() };
        hooks.attached.insert(1, hook_of(&device(1, "192.0.2.1")));
        let now = Instant::now();
        let mut wire = Wire::new(&mut hooks);
        wire.follow(&[], now);
        wire.follow(&[], now);
        assert_eq!(wire.due(), Some(now + RETRY));
        assert_eq!((model(&hooks), hooks.calls), (vec![1], 2));
    }
}
