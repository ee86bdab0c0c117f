//! Keeps the packet programs on outward devices, and on pods' ends, while these come, change and go. One device that fails
//! never disturbs another: it is told of once, and tried again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::conditions::{Conditions, Place, Reason};
use super::contest::{Contests, Verdict};
use super::links::CONTEST_REMEDY;
use super::retry::Retry;
use crate::bpf::{Attached, Device, Devices, Direction, Fault, LinkLayer, Role};
use crate::model::{Family, Ipx};
use crate::netdev::{Layer, NetDevice, PodEnd};

/// Pods' devices that one audit looks at: there may be hundreds, and each takes some system calls.
const PODS_AN_AUDIT: usize = 32;

const DETACH_REMEDY: &str = "the device is still served; trying again";

/// Where programs are attached: [`Devices`], or the tests' model of it.
pub trait Hooks {
    /// Attaches, or replaces what an earlier daemon attached, and notes the device's addresses.
    fn attach(&mut self, device: &Device) -> anyhow::Result<Attached>;
    /// Detaches; nothing happens if the device was not attached or has vanished.
    fn detach(&mut self, index: u32) -> anyhow::Result<()>;
    /// Interface indices of the devices that have programs, an earlier daemon's included.
    fn attached(&self) -> anyhow::Result<Vec<u32>>;
    /// What is no longer as it was attached; to attach again puts it right.
    fn faults(&self, device: &Device) -> anyhow::Result<Vec<Fault>>;
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

    fn faults(&self, device: &Device) -> anyhow::Result<Vec<Fault>> {
        Devices::faults(self, device)
    }
}

/// Outward devices with programs, and their names.
pub type AttachedDevices = Vec<(Device, String)>;

/// The devices as they are attached.
pub struct Wire<'d> {
    hooks: &'d mut dyn Hooks,
    /// By interface index, with the name.
    attached: BTreeMap<u32, (Device, String)>,
    /// Devices that could not be attached or detached, with their names.
    failures: BTreeMap<u32, String>,
    contests: Contests,
    conditions: Conditions,
    /// Who wants to know where programs are attached.
    listeners: Option<watch::Sender<Option<AttachedDevices>>>,
    /// Devices of an earlier daemon have been looked for.
    adopted: bool,
    /// The pod's device that the last audit ended with.
    audited: u32,
    /// What audits found wrong, and could not put right at once.
    faulty: BTreeMap<u32, Vec<Fault>>,
    /// Devices that an audit could not look at: attached anew by the next round, whatever they are.
    unknown: BTreeSet<u32>,
    /// Devices of an earlier daemon that this one has not attached to yet.
    inherited: BTreeSet<u32>,
    retry: Retry,
}

impl<'d> Wire<'d> {
    pub fn new(hooks: &'d mut dyn Hooks) -> Self {
        Wire {
            hooks,
            attached: BTreeMap::new(),
            failures: BTreeMap::new(),
            contests: Contests::default(),
            conditions: Conditions::default(),
            listeners: None,
            adopted: false,
            audited: 0,
            faulty: BTreeMap::new(),
            unknown: BTreeSet::new(),
            inherited: BTreeSet::new(),
            retry: Retry::default(),
        }
    }

    /// Tells of what is not served there, and of the devices that programs are attached to, once they are known.
    pub fn telling(self, conditions: Conditions, listeners: watch::Sender<Option<AttachedDevices>>) -> Self {
        Wire { conditions, listeners: Some(listeners), ..self }
    }

    /// When to call again although nothing changed; `None` when nothing failed.
    pub fn due(&self) -> Option<Instant> {
        self.retry.due()
    }

    /// Attaches to these devices and to no others.
    pub fn follow(&mut self, outward: &[&NetDevice], pods: &[PodEnd<'_>], now: Instant) {
        let mut failures = BTreeMap::new();
        let wanted = wanted(outward, pods);
        for (index, name) in self.leaving(&wanted) {
            match self.hooks.detach(index) {
                Ok(()) if self.attached.get(&index).is_some_and(|(device, _)| is_of_pod(device)) => {
                    debug!(device = name, index, "detached from this pod's device");
                }
                Ok(()) => info!(device = name, index, "detached from this device"),
                Err(error) => drop(failures.insert(index, (name.clone(), format!("{error:#}; {DETACH_REMEDY}")))),
            }
            self.attached.remove(&index);
            self.faulty.remove(&index);
            self.unknown.remove(&index);
            self.conditions.over(&subject(&name), Reason::Contested);
        }
        for (device, name) in wanted {
            let index = device.index;
            let is_known = self.attached.get(&index).is_some_and(|(known, called)| *known == device && *called == name);
            if is_known && !self.unknown.contains(&index) {
                continue;
            }
            match self.hooks.attach(&device) {
                Ok(how) => {
                    match self.faulty.remove(&index) {
                        Some(faults) => self.put_right(&faults, &name, now),
                        None => tell(&device, &name, self.attached.contains_key(&index), how),
                    }
                    self.attached.insert(index, (device, name));
                    self.unknown.remove(&index);
                    self.inherited.remove(&index);
                }
                // Pods come and go; netlink will tell. One of the two programs may have been attached.
                Err(error) if is_gone(&error) => {
                    debug!(device = name, "gone: {error:#}");
                    if let Err(error) = self.hooks.detach(index) {
                        failures.insert(index, (name, format!("{error:#}; {DETACH_REMEDY}")));
                    }
                }
                Err(error) => drop(failures.insert(index, (name, self.explain(&error, &device)))),
            }
        }
        self.note(failures, now);
        let outward = self.attached.values().filter(|(device, _)| !is_of_pod(device));
        let attached: AttachedDevices = outward.cloned().collect();
        if let Some(listeners) = &self.listeners {
            listeners.send_if_modified(|known| known.replace(attached.clone()).as_ref() != Some(&attached));
        }
    }

    /// Attached devices that are not wanted any more. Those of an earlier daemon are found by their pins.
    fn leaving(&mut self, wanted: &[(Device, String)]) -> Vec<(u32, String)> {
        let mut leaving: Vec<(u32, String)> =
            self.attached.iter().map(|(index, (_, name))| (*index, name.clone())).collect();
        leaving.extend(self.failures.iter().map(|(index, name)| (*index, name.clone())));
        if !self.adopted {
            match self.hooks.attached() {
                Ok(indices) => {
                    self.inherited = indices.iter().copied().collect();
                    leaving.extend(indices.into_iter().map(|index| (index, format!("interface {index}"))));
                    self.adopted = true;
                }
                Err(error) => warn!("cannot list the devices of an earlier daemon: {error:#}; trying again"),
            }
        }
        let wanted: BTreeSet<u32> = wanted.iter().map(|(device, _)| device.index).collect();
        leaving.retain(|(index, _)| !wanted.contains(index));
        leaving.sort_unstable();
        leaving.dedup_by_key(|(index, _)| *index);
        leaving
    }

    /// Why a device could not be attached to, or looked at, and what that means: what was attached stays as it is.
    fn explain(&self, error: &anyhow::Error, device: &Device) -> String {
        let index = &device.index;
        let was_attached = self.attached.contains_key(index) || self.inherited.contains(index);
        let meaning = match (was_attached && !self.faulty.contains_key(index), is_of_pod(device)) {
            (true, _) => "what was attached there before still serves; trying again",
            (false, true) => {
                "Services are not served to this pod's packets, only to its sockets; trying again (to leave this \
                 device alone, name the others with --pod-devices)"
            }
            (false, false) => {
                "NodePorts and load balancer addresses are not served there; trying again (to leave this device \
                 alone, name the others with --devices)"
            }
        };
        format!("{error:#}; {meaning}")
    }

    /// The failures of a round, which are all that there are.
    fn note(&mut self, failures: BTreeMap<u32, (String, String)>, now: Instant) {
        let over = self.failures.iter().filter(|(index, _)| !failures.contains_key(index));
        over.for_each(|(_, name)| self.conditions.over(&subject(name), Reason::NotAttached));
        self.failures.clear();
        match failures.is_empty() && self.adopted {
            true => self.retry.succeeded(),
            false => self.hold(failures, now),
        }
    }

    fn hold(&mut self, failures: BTreeMap<u32, (String, String)>, now: Instant) {
        for (index, (name, error)) in failures {
            self.conditions.holds(&subject(&name), Reason::NotAttached, &error);
            self.failures.insert(index, name);
        }
        self.retry.failed(now);
    }

    /// The next ones, in the order of their indices.
    fn pods_to_audit(&mut self) -> BTreeSet<u32> {
        let pods = |from: u32| {
            let rows = self.attached.range(from..).filter(|(_, (device, _))| is_of_pod(device));
            rows.map(|(index, _)| *index).take(PODS_AN_AUDIT)
        };
        let mut next: Vec<u32> = pods(self.audited.saturating_add(1)).collect();
        if next.is_empty() {
            next = pods(0).collect();
        }
        self.audited = next.last().copied().unwrap_or_default();
        next.into_iter().collect()
    }

    fn put_right(&mut self, faults: &[Fault], name: &str, now: Instant) {
        self.contests.put_back(&subject(name), now);
        self.conditions.restored(Place::Device);
        warn!("{}: repaired", describe(faults, name));
    }

    /// Puts back what somebody has taken off the devices, or put others before.
    pub fn audit(&mut self, now: Instant) {
        let (mut failures, mut righted) = (BTreeMap::new(), Vec::new());
        let pods = self.pods_to_audit();
        for (index, (device, name)) in &self.attached {
            if is_of_pod(device) && !pods.contains(index) {
                continue;
            }
            let subject = subject(name);
            if self.failures.contains_key(index) || self.contests.rests(&subject, now) {
                continue;
            }
            let error = match self.hooks.faults(device) {
                Ok(faults) if faults.is_empty() => {
                    if self.contests.there(&subject, now) {
                        self.conditions.over(&subject, Reason::Contested);
                    }
                    continue;
                }
                Ok(faults) => match self.contests.gone(&subject, now) {
                    Verdict::PutBack => match self.hooks.attach(device) {
                        Ok(_) => {
                            righted.push((faults, name.clone()));
                            continue;
                        }
                        Err(error) if is_gone(&error) => continue,
                        Err(error) => {
                            self.faulty.insert(*index, faults);
                            error
                        }
                    },
                    Verdict::LeaveAlone(_) => {
                        let detail = format!("{}; {CONTEST_REMEDY}", describe(&faults, name));
                        self.conditions.holds(&subject, Reason::Contested, &detail);
                        continue;
                    }
                },
                Err(error) if is_gone(&error) => continue,
                Err(error) => {
                    self.unknown.insert(*index);
                    error
                }
            };
            failures.insert(*index, (name.clone(), self.explain(&error, device)));
        }
        righted.into_iter().for_each(|(faults, name)| self.put_right(&faults, &name, now));
        // Attached anew by the next round.
        if !failures.is_empty() {
            self.attached.retain(|index, _| !self.faulty.contains_key(index));
            self.hold(failures, now);
        }
    }
}

/// All outward devices, and pods' ends. A pod's clients are hidden by the address of the bridge that it is on, as
/// masquerading would choose it, or of the first outward device that has one of the family, a default route's before
/// others'.
fn wanted(outward: &[&NetDevice], pods: &[PodEnd<'_>]) -> Vec<(Device, String)> {
    let mut by_route: Vec<&NetDevice> = outward.to_vec();
    by_route.sort_by_key(|device| !device.has_default_route);
    let own = |family| by_route.iter().find_map(|device| device.first(family));
    let (ip4, ip6) = (own(Family::Ipv4).and_then(Ipx::to_ip4), own(Family::Ipv6).and_then(Ipx::to_ip6));
    let pod = |end: &PodEnd<'_>| Device {
        index: end.device.index,
        link_layer: LinkLayer::Ethernet,
        role: Role::Pod { gateway: end.gateway },
        ip4: end.first(Family::Ipv4).and_then(Ipx::to_ip4).or(ip4),
        ip6: end.first(Family::Ipv6).and_then(Ipx::to_ip6).or(ip6),
        rp_filter: 0,
    };
    let outward = outward.iter().map(|device| (hook_of(device), device.name.clone()));
    outward.chain(pods.iter().map(|end| (pod(end), end.device.name.clone()))).collect()
}

fn is_of_pod(device: &Device) -> bool {
    matches!(device.role, Role::Pod { .. })
}

/// Whether the device has vanished meanwhile.
fn is_gone(error: &anyhow::Error) -> bool {
    let errno = |cause: &(dyn std::error::Error + 'static)| cause.downcast_ref::<std::io::Error>()?.raw_os_error();
    error.chain().any(|cause| errno(cause) == Some(libc::ENODEV))
}

fn tell(device: &Device, name: &str, known: bool, how: Attached) {
    let index = device.index;
    match how {
        _ if is_of_pod(device) => debug!(device = name, index, "attached to this pod's device"),
        Attached::New => info!(device = name, index, "attached to this device"),
        Attached::Replaced if known => debug!(device = name, index, "the device's addresses changed"),
        Attached::Replaced => info!(device = name, index, "took over this device from an earlier daemon"),
    }
}

fn subject(name: &str) -> String {
    format!("device {name}")
}

fn describe(faults: &[Fault], name: &str) -> String {
    let packets = |direction: &Direction| match direction {
        Direction::In => "ingress",
        Direction::Out => "egress",
    };
    let describe = |fault: &Fault| match fault {
        Fault::Detached(direction) => {
            format!("another process detached the {} program from device {name}", packets(direction))
        }
        Fault::Overtaken(direction, others) => {
            format!("{} was attached ahead of the {} program on device {name}", others.join(", "), packets(direction))
        }
    };
    faults.iter().map(describe).collect::<Vec<_>>().join(", ")
}

fn hook_of(device: &NetDevice) -> Device {
    let link_layer = match device.layer {
        Layer::Ethernet => LinkLayer::Ethernet,
        // A device of an unknown layer is never selected.
        Layer::None | Layer::Unknown => LinkLayer::None,
    };
    Device {
        index: device.index,
        link_layer,
        role: Role::Outward,
        ip4: device.first(Family::Ipv4).and_then(Ipx::to_ip4),
        ip6: device.first(Family::Ipv6).and_then(Ipx::to_ip6),
        rp_filter: device.rp_filter,
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
