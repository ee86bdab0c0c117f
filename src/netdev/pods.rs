//! Which devices are the node's ends of pods and virtual machines, as a pure function of what netlink tells: where packets
//! are met that no socket of this kernel's has sent.
//!
//! | device | of a pod |
//! |---|---|
//! | outward (see [`super::DeviceSelection`]) | never |
//! | a veth or netkit whose peer is in another network namespace | yes, in a bridge or not |
//! | a tap | yes: a virtual machine's end |
//! | a port of Open vSwitch | no: it forwards frames by rules of its own, past what comes in here |
//! | anything else (ipvlan, macvlan, SR-IOV have no end on the node) | no |

use std::str::FromStr;

use rtnetlink::packet_route::link::InfoKind;

use super::globs::Globs;
use super::outward::is_open_vswitch;
use super::{Layer, NetDevice};
use crate::model::{Family, Ipx};

/// The value of `--pod-devices`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PodDevices {
    /// As the table above says.
    #[default]
    Found,
    /// No device: pods are served by their sockets alone.
    Off,
    /// Those whose name one of these matches, if they are not outward, and no others.
    Named(Globs),
}

impl FromStr for PodDevices {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.trim() {
            "auto" => Ok(PodDevices::Found),
            "none" => Ok(PodDevices::Off),
            _ => text.parse().map(PodDevices::Named).map_err(|error| format!("{error}; or `auto`, or `none`")),
        }
    }
}

/// The node's end of a pod's device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodEnd<'d> {
    pub device: &'d NetDevice,
    /// The link address at which the pod reaches the node: that of the bridge which the device is in, or its own.
    pub gateway: [u8; 6],
    /// The addresses of that bridge, or its own.
    pub addresses: &'d [Ipx],
}

impl PodEnd<'_> {
    /// The first of those of this family.
    pub fn first(&self, family: Family) -> Option<Ipx> {
        self.addresses.iter().copied().find(|ip| ip.family() == family)
    }
}

impl PodDevices {
    /// Picks the pods' ends, also those that are down: a pod's first packet comes as soon as its device is up.
    pub fn select<'d>(&self, devices: &'d [NetDevice], outward: &[&NetDevice]) -> Vec<PodEnd<'d>> {
        let is_outward = |device: &NetDevice| outward.iter().any(|other| other.index == device.index);
        let candidates = devices.iter().filter(|d| d.layer == Layer::Ethernet && !d.is_loopback && !is_outward(d));
        let chosen = candidates.filter(|device| match self {
            PodDevices::Found => is_end_of_pod(device) && !controller(device, devices).is_some_and(is_open_vswitch),
            PodDevices::Off => false,
            PodDevices::Named(globs) => globs.name(device),
        });
        let end = |device: &'d NetDevice| {
            let gateway = controller(device, devices).unwrap_or(device);
            Some(PodEnd { device, gateway: gateway.link_address?, addresses: &gateway.addresses })
        };
        chosen.filter_map(end).collect()
    }
}

fn is_end_of_pod(device: &NetDevice) -> bool {
    match device.kind {
        Some(InfoKind::Veth | InfoKind::Netkit) => device.peer_is_elsewhere,
        Some(InfoKind::Tun) => true,
        _ => false,
    }
}

fn controller<'d>(device: &NetDevice, devices: &'d [NetDevice]) -> Option<&'d NetDevice> {
    let index = device.controller?;
    devices.iter().find(|other| other.index == index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> Vec<NetDevice> {
        let veth = |index, name: &str| NetDevice {
            peer_is_elsewhere: true,
            ..NetDevice::for_test(index, name, Some(InfoKind::Veth))
        };
        vec![
            NetDevice { is_loopback: true, ..NetDevice::for_test(1, "lo", None) },
            NetDevice { has_default_route: true, ..veth(2, "eth0") },
            NetDevice::for_test(3, "cni0", Some(InfoKind::Bridge)),
            NetDevice { controller: Some(3), is_member: true, ..veth(4, "vethbridged") },
            NetDevice { is_up: false, ..veth(5, "cali1") },
            NetDevice::for_test(6, "local", Some(InfoKind::Veth)),
            NetDevice { controller: Some(3), is_member: true, ..NetDevice::for_test(7, "tap0", Some(InfoKind::Tun)) },
            NetDevice { layer: Layer::None, ..NetDevice::for_test(8, "tun0", Some(InfoKind::Tun)) },
            NetDevice::for_test(9, "ovs-system", Some(InfoKind::Other("openvswitch".into()))),
            NetDevice { controller: Some(9), is_member: true, ..veth(10, "antrea1") },
            NetDevice::for_test(11, "eth1", None),
            NetDevice { link_address: None, ..veth(12, "odd") },
        ]
    }

    #[test]
    fn pods_ends_are_veths_to_other_namespaces_and_taps_and_their_gateway_is_the_bridge_if_there_is_one() {
        let devices = node();
        let outward: Vec<&NetDevice> = devices.iter().filter(|d| d.name == "eth0").collect();
        let table: [(&str, &[(&str, u8)]); 4] = [
            ("auto", &[("vethbridged", 3), ("cali1", 5), ("tap0", 3)]),
            ("none", &[]),
            ("cali*,eth0,local", &[("cali1", 5), ("local", 6)]),
            ("antrea?", &[("antrea1", 9)]),
        ];
        for (flag, expected) in table {
            let selection: PodDevices = flag.parse().unwrap();
            let chosen = selection.select(&devices, &outward);
            let chosen: Vec<(&str, u8)> = chosen.iter().map(|end| (end.device.name.as_str(), end.gateway[5])).collect();
            assert_eq!(chosen, expected, "{flag}");
        }
    }

    #[test]
    fn what_is_no_list_of_names_is_refused_with_what_is_allowed() {
        for text in ["", "a b", "cali*,"] {
            let error = text.parse::<PodDevices>().unwrap_err();
            assert!(error.contains("auto"), "{text}: {error}");
        }
    }
}
