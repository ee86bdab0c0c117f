//! Which devices face outwards, as a pure function of what netlink tells: where packets from the wire are met.
//!
//! | device | outward |
//! |---|---|
//! | with a default route, or with an InternalIP of the Node | yes, a veth or bridge too (containers as nodes have such uplinks); a bridge needs the address |
//! | tunnels (vxlan, geneve, ipip, gre, sit, wireguard, ...) | yes: replies of pods elsewhere come in there |
//! | a card, bond, VLAN, macvlan, IP tunnel of a VPN with an address of its own | yes: clients reach NodePorts there |
//! | a bridge with an address and a card, bond or VLAN in it | yes: the node's own uplink is in it |
//! | a veth whose address has a subnet | yes: a cable to a network; a pod's end has no address, or a single one |
//! | a VLAN on an outward device | yes |
//! | other bridges, Open vSwitch's ports, any other veth, taps, dummies | no: pods' and VMs' own ends, addresses without a device |
//! | loopback, members of a bridge or bond, what is down | never |
//! | what has other link headers (InfiniBand) | cannot be, and [`DeviceSelection::unserved`] tells |

use std::str::FromStr;

use rtnetlink::packet_route::link::{InfoKind, LinkLayerType};

use super::globs::Globs;
use crate::model::{Family, Ipx};

/// What comes before the IP header, or that the datapath does not know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    Ethernet,
    None,
    Unknown,
}

impl From<LinkLayerType> for Layer {
    fn from(kind: LinkLayerType) -> Self {
        use LinkLayerType::{Ether, Ip6gre, Ipgre, None, Ppp, Rawip, Sit, Tunnel, Tunnel6};
        match kind {
            Ether => Layer::Ethernet,
            Tunnel | Tunnel6 | Sit | Ipgre | Ip6gre | Rawip | Ppp | None => Layer::None,
            _ => Layer::Unknown,
        }
    }
}

/// A device of the namespace, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetDevice {
    /// Interface index.
    pub index: u32,
    pub name: String,
    /// IFLA_INFO_KIND; `None` for hardware.
    pub kind: Option<InfoKind>,
    pub layer: Layer,
    pub is_up: bool,
    pub is_loopback: bool,
    /// It belongs to a bridge, a bond or the like, which has the addresses and the routes. (A VRF does not count.)
    pub is_member: bool,
    /// The index of that bridge or bond.
    pub controller: Option<u32>,
    /// Of a VLAN or macvlan: the index of the device below.
    pub below: Option<u32>,
    /// Some table has a default route by it.
    pub has_default_route: bool,
    /// In the kernel's order, link-local ones left out.
    pub addresses: Vec<Ipx>,
    /// One of them has a subnet, and is not on its own (/32, /128).
    pub has_subnet: bool,
    /// Of Ethernet devices.
    pub link_address: Option<[u8; 6]>,
    /// What it is linked to (of a veth its peer) is in another network namespace.
    pub peer_is_elsewhere: bool,
    /// How IPv4 sources are looked for in the routing table, as the kernel has it for this device: one of
    /// [`rp_filter`](crate::abi::rp_filter).
    pub rp_filter: u32,
}

#[cfg(test)]
impl NetDevice {
    /// An Ethernet device that is up, without addresses or routes.
    pub(crate) fn for_test(index: u32, name: &str, kind: Option<InfoKind>) -> NetDevice {
        NetDevice {
            index,
            name: name.to_owned(),
            kind,
            layer: Layer::Ethernet,
            is_up: true,
            is_loopback: false,
            is_member: false,
            controller: None,
            below: None,
            has_default_route: false,
            addresses: Vec::new(),
            has_subnet: false,
            link_address: Some([2, 0, 0, 0, 0, index as u8]),
            peer_is_elsewhere: false,
            rp_filter: 0,
        }
    }
}

/// A device that clients may be behind, and where nothing is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unserved {
    pub name: String,
    pub why: &'static str,
}

impl NetDevice {
    /// Its first address of this family.
    pub fn first(&self, family: Family) -> Option<Ipx> {
        self.addresses.iter().copied().find(|ip| ip.family() == family)
    }

    fn is_tunnel(&self) -> bool {
        use InfoKind::{Geneve, GreTap, GreTap6, GreTun, GreTun6, Ip6Tnl, IpIp, SitTun, Vxlan, Wireguard};
        let kind = self.kind.as_ref();
        kind.is_some_and(|kind| {
            matches!(kind, Geneve | GreTap | GreTap6 | GreTun | GreTun6 | Ip6Tnl | IpIp | SitTun | Vxlan | Wireguard)
        })
    }
}

/// The value of `--devices`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DeviceSelection {
    /// As the table above says.
    #[default]
    Found,
    /// Those whose name one of these matches, and no others.
    Named(Globs),
}

impl FromStr for DeviceSelection {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.trim().is_empty() {
            true => Ok(DeviceSelection::Found),
            false => Ok(DeviceSelection::Named(text.parse()?)),
        }
    }
}

impl DeviceSelection {
    /// Picks the outward devices. `internal_ips` are the Node object's.
    pub fn select<'d>(&self, devices: &'d [NetDevice], internal_ips: &[Ipx]) -> Vec<&'d NetDevice> {
        let usable = devices.iter().filter(|d| d.is_up && !d.is_loopback && d.layer != Layer::Unknown);
        match self {
            DeviceSelection::Found => found(usable.filter(|d| !d.is_member), devices, internal_ips),
            DeviceSelection::Named(_) => usable.filter(|d| self.names(d)).collect(),
        }
    }

    /// Devices that would be outward if their packets could be read.
    pub fn unserved(&self, devices: &[NetDevice]) -> Vec<Unserved> {
        const WHY: &str = "its link layer is not one that can be read (Ethernet and devices without link headers can)";
        let is_wanted = |device: &NetDevice| match self {
            DeviceSelection::Found => {
                !device.is_member && (device.has_default_route || carries_addresses(device, devices))
            }
            DeviceSelection::Named(_) => self.names(device),
        };
        let unreadable = devices.iter().filter(|d| d.is_up && !d.is_loopback && d.layer == Layer::Unknown);
        unreadable.filter(|d| is_wanted(d)).map(|d| Unserved { name: d.name.clone(), why: WHY }).collect()
    }

    fn names(&self, device: &NetDevice) -> bool {
        matches!(self, DeviceSelection::Named(globs) if globs.name(device))
    }
}

fn found<'d>(
    usable: impl Iterator<Item = &'d NetDevice>,
    devices: &[NetDevice],
    internal_ips: &[Ipx],
) -> Vec<&'d NetDevice> {
    let is_outward = |device: &&NetDevice| {
        let is_bridge = device.kind == Some(InfoKind::Bridge);
        (device.has_default_route && !is_bridge)
            || device.is_tunnel()
            || device.addresses.iter().any(|ip| internal_ips.contains(ip))
            || carries_addresses(device, devices)
    };
    let (mut outward, mut others): (Vec<_>, Vec<_>) = usable.partition(is_outward);
    // VLANs may stand on VLANs.
    loop {
        let stands_on_outward = |device: &&NetDevice| {
            device.kind == Some(InfoKind::Vlan)
                && device.below.is_some_and(|below| outward.iter().any(|other| other.index == below))
        };
        let (more, rest): (Vec<_>, Vec<_>) = others.into_iter().partition(stands_on_outward);
        if more.is_empty() {
            return outward;
        }
        outward.extend(more);
        others = rest;
    }
}

/// Whether the device has addresses at which clients outside may ask, and is no end of pods or virtual machines.
fn carries_addresses(device: &NetDevice, devices: &[NetDevice]) -> bool {
    use InfoKind::{Bridge, Dummy, Ifb, IpVlan, MacVlan, Netkit, Nlmon, Other, Tun, Veth, Vlan, Vrf};
    let below = || device.below.and_then(|below| devices.iter().find(|other| other.index == below));
    let is_of_pods =
        |below: &NetDevice| is_open_vswitch(below) || (below.kind == Some(Bridge) && !has_uplink(below, devices));
    !device.addresses.is_empty()
        && match &device.kind {
            Some(Bridge) => has_uplink(device, devices),
            Some(Vlan | MacVlan | IpVlan) => !below().is_some_and(is_of_pods),
            Some(Veth | Netkit) => device.has_subnet,
            // Taps are virtual machines' ends.
            Some(Tun) => device.layer == Layer::None,
            Some(Dummy | Ifb | Nlmon | Vrf) => false,
            Some(Other(_)) => !is_open_vswitch(device),
            _ => true,
        }
}

/// Its internal ports are pods' gateways as well as uplinks: these have a default route or the Node's address.
pub(super) fn is_open_vswitch(device: &NetDevice) -> bool {
    matches!(&device.kind, Some(InfoKind::Other(kind)) if kind == "openvswitch")
}

/// Whether a bridge has a member that leads out of the node.
fn has_uplink(bridge: &NetDevice, devices: &[NetDevice]) -> bool {
    use InfoKind::{Bond, MacVlan, Team, Vlan};
    let leads_out = |member: &NetDevice| match &member.kind {
        None | Some(Bond | Team | MacVlan) => true,
        Some(Vlan) => member.below != Some(bridge.index),
        _ => false,
    };
    devices.iter().any(|member| member.controller == Some(bridge.index) && leads_out(member))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(index: u32, name: &str, kind: Option<InfoKind>) -> NetDevice {
        NetDevice { has_subnet: true, ..NetDevice::for_test(index, name, kind) }
    }

    fn names(selection: &str, devices: &[NetDevice]) -> Vec<String> {
        let internal_ips = ["192.0.2.9".parse().unwrap()];
        let selection: DeviceSelection = selection.parse().unwrap();
        selection.select(devices, &internal_ips).into_iter().map(|d| d.name.clone()).collect()
    }

    fn node() -> Vec<NetDevice> {
        let veth = || Some(InfoKind::Veth);
        vec![
            NetDevice { is_loopback: true, has_default_route: true, ..device(1, "lo", None) },
            NetDevice { has_default_route: true, ..device(2, "eth0", veth()) },
            NetDevice { addresses: vec!["192.0.2.9".parse().unwrap()], ..device(3, "bond0", Some(InfoKind::Bond)) },
            NetDevice { is_member: true, ..device(4, "eth1", None) },
            NetDevice { has_default_route: true, ..device(5, "cni0", Some(InfoKind::Bridge)) },
            device(6, "vethpod", veth()),
            NetDevice { below: Some(9), ..device(7, "q.7.8", Some(InfoKind::Vlan)) },
            NetDevice { below: Some(4), ..device(8, "eth1.8", Some(InfoKind::Vlan)) },
            NetDevice { below: Some(3), ..device(9, "q.7", Some(InfoKind::Vlan)) },
            device(10, "flannel.1", Some(InfoKind::Vxlan)),
            NetDevice { layer: Layer::None, ..device(11, "wg0", Some(InfoKind::Wireguard)) },
            NetDevice { is_up: false, layer: Layer::None, ..device(12, "tunl0", Some(InfoKind::IpIp)) },
            NetDevice { has_default_route: true, layer: Layer::Unknown, ..device(13, "ib0", None) },
        ]
    }

    #[test]
    fn devices_with_default_routes_or_node_addresses_tunnels_and_vlans_on_them_face_outwards() {
        assert_eq!(names("", &node()), ["eth0", "bond0", "flannel.1", "wg0", "q.7", "q.7.8"]);
    }

    /// A device with an address; of what kind, and what it stands on or belongs to.
    fn with_address(index: u32, name: &str, kind: Option<InfoKind>) -> NetDevice {
        NetDevice { addresses: vec!["198.51.100.7".parse().unwrap()], ..device(index, name, kind) }
    }

    #[test]
    fn every_device_with_an_address_that_clients_may_ask_at_faces_outwards_and_pods_ends_do_not() {
        let member = |index: u32, name: &str, kind, controller: u32| NetDevice {
            is_member: true,
            controller: Some(controller),
            ..device(index, name, kind)
        };
        let on = |index: u32, name: &str, kind, below: u32| NetDevice {
            below: Some(below),
            ..with_address(index, name, Some(kind))
        };
        let bridge = |index, name: &str| with_address(index, name, Some(InfoKind::Bridge));
        let single = |index, name: &str, kind| NetDevice { has_subnet: false, ..with_address(index, name, Some(kind)) };
        let devices = [
            with_address(1, "eth1", None),
            device(2, "eth2", None),
            bridge(3, "br0"),
            member(4, "eth3", None, 3),
            member(5, "tap0", Some(InfoKind::Tun), 3),
            bridge(6, "br-bond"),
            member(7, "bond1", Some(InfoKind::Bond), 6),
            bridge(8, "virbr0"),
            member(9, "vnet0", Some(InfoKind::Tun), 8),
            bridge(10, "cni0"),
            member(11, "vethpod", Some(InfoKind::Veth), 10),
            bridge(12, "docker0"),
            on(13, "eth2.5", InfoKind::Vlan, 2),
            on(14, "cni0.5", InfoKind::Vlan, 10),
            on(15, "br0.5", InfoKind::Vlan, 3),
            on(16, "mac0", InfoKind::MacVlan, 2),
            with_address(17, "cable", Some(InfoKind::Veth)),
            single(18, "ptp-pod", InfoKind::Veth),
            NetDevice { layer: Layer::None, ..single(19, "tailscale0", InfoKind::Tun) },
            with_address(20, "tap1", Some(InfoKind::Tun)),
            with_address(21, "nodelocaldns", Some(InfoKind::Dummy)),
            with_address(22, "antrea-gw0", Some(InfoKind::Other("openvswitch".into()))),
            bridge(23, "loops"),
            NetDevice { below: Some(23), ..member(24, "loops.7", Some(InfoKind::Vlan), 23) },
        ];
        let expected = ["eth1", "br0", "br-bond", "eth2.5", "br0.5", "mac0", "cable", "tailscale0"];
        assert_eq!(names("", &devices), expected);
    }

    #[test]
    fn a_bridge_needs_more_than_a_default_route() {
        let bridge = |address: &str| NetDevice {
            has_default_route: true,
            addresses: vec![address.parse().unwrap()],
            ..device(1, "br0", Some(InfoKind::Bridge))
        };
        assert_eq!(names("", &[bridge("198.51.100.7")]), [""; 0]);
        assert_eq!(names("", &[bridge("192.0.2.9")]), ["br0"], "the Node's InternalIP");
    }

    #[test]
    fn a_device_whose_packets_cannot_be_read_is_told_of_when_clients_may_be_behind_it() {
        let unreadable = |device: NetDevice| NetDevice { layer: Layer::Unknown, ..device };
        let devices = [
            unreadable(with_address(1, "ib0", Some(InfoKind::Ipoib))),
            unreadable(device(2, "ib1", None)),
            unreadable(NetDevice { has_default_route: true, ..device(3, "ib2", None) }),
            unreadable(NetDevice { is_up: false, ..with_address(4, "ib3", None) }),
            unreadable(NetDevice { is_member: true, ..with_address(5, "ib4", None) }),
            with_address(6, "eth0", None),
        ];
        for (selection, expected) in [("", &["ib0", "ib2"][..]), ("ib1,eth*", &["ib1"]), ("eth0", &[])] {
            let selection: DeviceSelection = selection.parse().unwrap();
            let unserved = selection.unserved(&devices);
            assert_eq!(unserved.iter().map(|device| device.name.as_str()).collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn named_devices_are_taken_as_named_but_never_loopback_or_what_is_down() {
        let table: [(&str, &[&str]); 4] = [
            ("eth*", &["eth0", "eth1", "eth1.8"]),
            ("cni?, *", &["eth0", "bond0", "eth1", "cni0", "vethpod", "q.7.8", "eth1.8", "q.7", "flannel.1", "wg0"]),
            ("eth?", &["eth0", "eth1"]),
            ("lo,tunl0,nothing", &[]),
        ];
        for (globs, expected) in table {
            assert_eq!(names(globs, &node()), expected, "{globs}");
        }
    }

    #[test]
    fn a_list_with_something_that_is_no_device_name_is_refused() {
        for text in ["eth0,", "a b", "../x"] {
            assert!(text.parse::<DeviceSelection>().is_err(), "{text}");
        }
    }
}
