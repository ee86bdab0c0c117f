//! Outward and pods' devices: keeping the packet programs attached to each, across restarts and upgrades of the daemon.
//!
//! Where the kernel has tcx links (6.6) a pinned link holds each program and is updated in place. Elsewhere the program
//! is a filter of the device's clsact qdisc, at a priority and handle of our own, beside which a pin of the program
//! says that the filter is ours; replacing it is atomic as well. Other people's programs and filters stay as they are.
//! Programs of tcx run after ours: what we do not drop or redirect goes on to them.
//!
//! Replies are attached before requests, and detached after them: no packet is translated whose answer would not be.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::{Context, Result, bail};
use libbpf_rs::{MapCore, MapFlags, MapHandle, Program};

use super::hook::{self, Direction, Fault};
use super::link::Attached;
use super::pinned;
use super::skeleton::KubelaneSkel;
use crate::abi::{DeviceAddresses, PodDevice};
use crate::model::Ipx;

/// What comes before the IP header in a device's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkLayer {
    /// An Ethernet header: cards, bonds, VLANs, VXLAN.
    Ethernet,
    /// Nothing: IPIP, SIT, WireGuard, tun.
    None,
}

/// How programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// tcx links, from 6.6.
    Tcx,
    /// Filters of a clsact qdisc.
    Clsact,
}

/// What is behind a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Other hosts.
    Outward,
    /// A pod, which reaches the node at this link address. (Its device is an Ethernet one.)
    Pod { gateway: [u8; 6] },
}

/// A device of the namespace that the daemon runs in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Interface index.
    pub index: u32,
    pub link_layer: LinkLayer,
    pub role: Role,
    /// Its first address, by which clients are hidden, and for kernels before 6.7 that do not name the source of a route.
    /// Of a pod's device another one of the node's.
    pub ip4: Option<Ipv4Addr>,
    /// As above; of global scope.
    pub ip6: Option<Ipv6Addr>,
    /// Whether IPv4 sources are looked for in the routing table: one of [`rp_filter`](crate::abi::rp_filter).
    pub rp_filter: u32,
}

/// The packet programs.
pub(super) struct Programs {
    /// In and out, for each link layer.
    ethernet: [OwnedFd; 2],
    bare: [OwnedFd; 2],
    /// In, of pods' devices; out is as of other Ethernet devices.
    pod: OwnedFd,
}

impl Programs {
    pub fn new(skeleton: &KubelaneSkel<'_>) -> Result<Programs> {
        let own = |program: BorrowedFd<'_>| program.try_clone_to_owned().context("cannot keep a BPF program");
        let programs = &skeleton.progs;
        Ok(Programs {
            ethernet: [own(programs.wire_in_ethernet.as_fd())?, own(programs.wire_out_ethernet.as_fd())?],
            bare: [own(programs.wire_in_bare.as_fd())?, own(programs.wire_out_bare.as_fd())?],
            pod: own(programs.pod_in_ethernet.as_fd())?,
        })
    }

    /// Of an outward device of this link layer.
    pub fn of(&self, direction: Direction, link_layer: LinkLayer) -> BorrowedFd<'_> {
        let pair = match link_layer {
            LinkLayer::Ethernet => &self.ethernet,
            LinkLayer::None => &self.bare,
        };
        match direction {
            Direction::In => pair[0].as_fd(),
            Direction::Out => pair[1].as_fd(),
        }
    }

    /// Of what comes in by a pod's device.
    pub fn of_pods(&self) -> BorrowedFd<'_> {
        self.pod.as_fd()
    }

    fn of_device(&self, direction: Direction, device: &Device) -> BorrowedFd<'_> {
        match (direction, device.role) {
            (Direction::In, Role::Pod { .. }) => self.of_pods(),
            _ => self.of(direction, device.link_layer),
        }
    }

    fn all(&self) -> [&OwnedFd; 5] {
        let [ethernet_in, ethernet_out] = &self.ethernet;
        let [bare_in, bare_out] = &self.bare;
        [ethernet_in, ethernet_out, bare_in, bare_out, &self.pod]
    }
}

/// The programs of today, for all who attach them.
#[derive(Clone)]
pub(super) struct SharedPrograms {
    programs: Arc<RwLock<Arc<Programs>>>,
    links: PathBuf,
}

impl SharedPrograms {
    pub fn get(&self) -> Arc<Programs> {
        Arc::clone(&self.programs.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// These programs take the place of an earlier version's, whose links are pinned here, on outward devices.
    pub fn take_over(&self, devices: &[(u32, DeviceAddresses)]) {
        let programs = self.get();
        self.put_in_place(|index, direction, _| {
            let (_, row) = devices.iter().find(|(device, _)| *device == index)?;
            Some(programs.of(direction, if row.is_bare == 0 { LinkLayer::Ethernet } else { LinkLayer::None }))
        });
    }

    /// These programs take the place of the running ones, each atomically, wherever these still are.
    pub fn replace(&self, new: Programs) {
        let new = Arc::new(new);
        let mut programs = self.programs.write().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *programs, Arc::clone(&new));
        drop(programs);
        let id = |program: &OwnedFd| Program::id_from_fd(program.as_fd()).ok();
        let pairs = old.all().into_iter().zip(new.all());
        let successors: Vec<_> = pairs.filter_map(|(old, new)| Some((id(old)?, new.as_fd()))).collect();
        self.put_in_place(|_, _, id| successors.iter().find(|(old, _)| *old == id).map(|(_, new)| *new));
    }

    /// `successor`: of the program with this id, on this device, which one is to run in its place.
    fn put_in_place<'p>(&self, successor: impl Fn(u32, Direction, u32) -> Option<BorrowedFd<'p>>) {
        let pins = pinned::children(&self.links).unwrap_or_else(|error| {
            tracing::warn!("cannot replace the programs on devices: {error:#}");
            Vec::new()
        });
        for pin in pins {
            let Some((index, direction)) = hook::device_of_pin(&pin) else { continue };
            if let Err(error) = hook::replace(&pin, index, direction, |id| successor(index, direction, id), &self.links)
            {
                tracing::warn!("cannot replace the program of {}: {error:#}", pin.display());
            }
        }
    }
}

/// The packet programs, loaded, and where they are attached.
pub struct Devices {
    shared: SharedPrograms,
    outward_rows: MapHandle,
    pod_rows: MapHandle,
    links: PathBuf,
    method: Method,
}

impl Devices {
    pub(super) fn new(skeleton: &KubelaneSkel<'_>, pin_path: &Path) -> Result<Devices> {
        let programs = Programs::new(skeleton)?;
        let links = pinned::links_directory(pin_path);
        Ok(Devices {
            shared: SharedPrograms { programs: Arc::new(RwLock::new(Arc::new(programs))), links: links.clone() },
            outward_rows: MapHandle::try_from(&skeleton.maps.devices).context("cannot keep the map devices")?,
            pod_rows: MapHandle::try_from(&skeleton.maps.pod_devices).context("cannot keep the map pod_devices")?,
            links,
            method: if hook::has_tcx() { Method::Tcx } else { Method::Clsact },
        })
    }

    pub(super) fn shared(&self) -> SharedPrograms {
        self.shared.clone()
    }

    pub(super) fn programs(&self) -> Arc<Programs> {
        self.shared.get()
    }

    /// How this kernel's programs are attached.
    pub fn method(&self) -> Method {
        self.method
    }

    /// Attaches as kernels before 6.6 do, although this one may have tcx.
    #[cfg(feature = "lab")]
    pub fn use_clsact(&mut self) {
        self.method = Method::Clsact;
    }

    /// Attaches both programs, or replaces those of an earlier daemon without a gap, and notes what the programs have to know of it.
    /// Call again when the addresses change. Fails with ENODEV in its chain when the device has vanished.
    pub fn attach(&mut self, device: &Device) -> Result<Attached> {
        self.note(device)?;
        let mut outcome = Attached::Replaced;
        let method = self.method_for(device).with_context(|| format!("cannot attach to device {}", device.index))?;
        let programs = self.programs();
        for direction in [Direction::Out, Direction::In] {
            let program = programs.of_device(direction, device);
            let attached = match method {
                Method::Tcx => hook::attach_tcx(program, device.index, direction, &self.links),
                Method::Clsact => hook::attach_filter(program, device.index, direction, &self.links),
            };
            if attached.with_context(|| format!("cannot attach to device {}", device.index))? == Attached::New {
                outcome = Attached::New;
            }
            let other = match method {
                Method::Tcx => hook::filter_pin(&self.links, device.index, direction),
                Method::Clsact => hook::tcx_pin(&self.links, device.index, direction),
            };
            if other.exists() {
                hook::remove_pin(&other)?;
            }
        }
        Ok(outcome)
    }

    /// A tcx link waits for an RCU grace period while it holds the lock of all network devices (26 ms, measured; a filter
    /// takes 0.1): with one at each direction of each pod's device a node would start, and pods would come, slowly. So
    /// pods' devices have filters, unless others' tcx programs come before these.
    fn method_for(&self, device: &Device) -> Result<Method> {
        if self.method == Method::Clsact || !matches!(device.role, Role::Pod { .. }) {
            return Ok(self.method);
        }
        for direction in [Direction::Out, Direction::In] {
            let is_tcx = hook::tcx_pin(&self.links, device.index, direction).exists();
            if is_tcx || !hook::tcx_programs_of_others(device.index, direction)?.is_empty() {
                return Ok(Method::Tcx);
            }
        }
        Ok(Method::Clsact)
    }

    /// What is no longer as [`Devices::attach`] left it; to attach again puts it right.
    pub fn faults(&self, device: &Device) -> Result<Vec<Fault>> {
        let mut faults = Vec::new();
        let method = self.method_for(device).with_context(|| format!("cannot inspect device {}", device.index))?;
        let programs = self.programs();
        for direction in [Direction::Out, Direction::In] {
            let program = programs.of_device(direction, device);
            let fault = match method {
                // Next time it is a link, which comes before all others.
                Method::Tcx if hook::filter_pin(&self.links, device.index, direction).exists() => {
                    let others = hook::tcx_programs_of_others(device.index, direction);
                    others.map(|others| (!others.is_empty()).then_some(Fault::Overtaken(direction, others)))
                }
                Method::Tcx => hook::tcx_fault(program, device.index, direction, &self.links),
                Method::Clsact => hook::filter_fault(program, device.index, direction, &self.links),
            };
            faults.extend(fault.with_context(|| format!("cannot inspect device {}", device.index))?);
        }
        Ok(faults)
    }

    /// Detaches from a device; nothing happens if it was not attached or has vanished.
    pub fn detach(&mut self, index: u32) -> Result<()> {
        for direction in [Direction::In, Direction::Out] {
            for pin in [hook::tcx_pin(&self.links, index, direction), hook::filter_pin(&self.links, index, direction)] {
                if pin.exists() {
                    hook::remove_pin(&pin)?;
                }
            }
        }
        forget(&self.outward_rows, "devices", index)?;
        forget(&self.pod_rows, "pod_devices", index)
    }

    /// Interface indices of the devices that programs are pinned for, an earlier daemon's included; ascending.
    pub fn attached(&self) -> Result<Vec<u32>> {
        let entries = fs::read_dir(&self.links).with_context(|| format!("cannot read {}", self.links.display()))?;
        let mut indices = Vec::new();
        for entry in entries {
            let path = entry.with_context(|| format!("cannot read {}", self.links.display()))?.path();
            indices.extend(hook::device_of_pin(&path).map(|(index, _)| index));
        }
        indices.sort_unstable();
        indices.dedup();
        Ok(indices)
    }

    fn note(&self, device: &Device) -> Result<()> {
        if device.index == 0 {
            bail!("an interface index is never 0");
        }
        let ip4 = device.ip4.map(|ip| Ipx::from(ip).0).unwrap_or_default();
        let ip6 = device.ip6.map(|ip| Ipx::from(ip).0).unwrap_or_default();
        let Role::Pod { gateway } = device.role else {
            let is_bare = u32::from(device.link_layer == LinkLayer::None);
            let row = DeviceAddresses { ip4, ip6, is_bare, rp_filter: device.rp_filter };
            write(&self.outward_rows, "devices", device.index, bytemuck::bytes_of(&row))?;
            return forget(&self.pod_rows, "pod_devices", device.index);
        };
        let row = PodDevice { ip4, ip6, gateway, ..bytemuck::Zeroable::zeroed() };
        write(&self.pod_rows, "pod_devices", device.index, bytemuck::bytes_of(&row))?;
        forget(&self.outward_rows, "devices", device.index)
    }
}

fn write(map: &MapHandle, name: &str, index: u32, row: &[u8]) -> Result<()> {
    map.update(&index.to_ne_bytes(), row, MapFlags::ANY).with_context(|| format!("cannot write the map {name}"))
}

/// There may be no such row.
fn forget(map: &MapHandle, name: &str, index: u32) -> Result<()> {
    match map.delete(&index.to_ne_bytes()) {
        Err(error) if error.kind() != libbpf_rs::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot delete from the map {name}"))
        }
        _ => Ok(()),
    }
}
