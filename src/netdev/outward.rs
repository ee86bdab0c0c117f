//! Which devices face outwards, as a pure function of what netlink tells: where packets from the wire are met.
//!
//! | device | outward |
//! |---|---|
//! | with a default route, or with an InternalIP of the Node | yes, a veth too (containers as nodes have such uplinks) |
//! | tunnels (vxlan, geneve, ipip, gre, sit, wireguard, ...) | yes: replies of pods elsewhere come in there |
//! | a VLAN on an outward device | yes |
//! | any other veth, tap, dummy | no: pods' and VMs' own ends |
//! | loopback, bridges, members of a bridge or bond, what is down | never, `--devices` may name bridges |

use std::str::FromStr;

use rtnetlink::packet_route::link::{InfoKind, LinkLayerType};

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
    /// Of a VLAN: the index of the device below.
    pub below: Option<u32>,
    /// Some table has a default route by it.
    pub has_default_route: bool,
    /// In the kernel's order, link-local ones left out.
    pub addresses: Vec<Ipx>,
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
    Named(Vec<String>),
}

impl FromStr for DeviceSelection {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.trim().is_empty() {
            return Ok(DeviceSelection::Found);
        }
        let globs: Vec<String> = text.split(',').map(|glob| glob.trim().to_owned()).collect();
        match globs.iter().any(|glob| glob.is_empty() || glob.contains(['/', ' '])) {
            true => Err(format!("{text:?} is not a list of device names, such as eth0,bond*,vxlan.calico")),
            false => Ok(DeviceSelection::Named(globs)),
        }
    }
}

impl DeviceSelection {
    /// Picks the outward devices. `internal_ips` are the Node object's.
    pub fn select<'d>(&self, devices: &'d [NetDevice], internal_ips: &[Ipx]) -> Vec<&'d NetDevice> {
        let usable = devices.iter().filter(|d| d.is_up && !d.is_loopback && d.layer != Layer::Unknown);
        let DeviceSelection::Named(globs) = self else {
            return found(usable.filter(|d| !d.is_member && d.kind != Some(InfoKind::Bridge)), internal_ips);
        };
        usable.filter(|d| globs.iter().any(|glob| matches_glob(glob.as_bytes(), d.name.as_bytes()))).collect()
    }
}

fn found<'d>(usable: impl Iterator<Item = &'d NetDevice>, internal_ips: &[Ipx]) -> Vec<&'d NetDevice> {
    let (mut outward, mut others): (Vec<_>, Vec<_>) = usable.partition(|device| {
        device.has_default_route || device.is_tunnel() || device.addresses.iter().any(|ip| internal_ips.contains(ip))
    });
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

/// `*` stands for any number of characters, `?` for one.
fn matches_glob(glob: &[u8], name: &[u8]) -> bool {
    match (glob, name) {
        ([], []) => true,
        ([b'*', rest @ ..], _) => (0..=name.len()).any(|skipped| matches_glob(rest, &name[skipped..])),
        ([b'?', glob @ ..], [_, name @ ..]) => matches_glob(glob, name),
        ([a, glob @ ..], [b, name @ ..]) => a == b && matches_glob(glob, name),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(index: u32, name: &str, kind: Option<InfoKind>) -> NetDevice {
        NetDevice {
            index,
            name: name.to_owned(),
            kind,
            layer: Layer::Ethernet,
            is_up: true,
            is_loopback: false,
            is_member: false,
            below: None,
            has_default_route: false,
            addresses: vec![],
        }
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
