//! One reading of the namespace: devices and their addresses, and default routes.

use anyhow::Context as _;
use futures::TryStreamExt as _;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{
    AfSpecInet, AfSpecUnspec, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteType};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::{IPVS_DEVICE, NetDevice, Network};
use crate::model::Ipx;

/// Devices and addresses; default routes are not looked at.
pub(super) async fn network(handle: &Handle) -> anyhow::Result<Network> {
    let links: Vec<LinkMessage> =
        handle.link().get().execute().try_collect().await.context("listing devices (netlink)")?;
    let mut network = Network { addresses: Vec::new(), devices: links.iter().map(device).collect() };
    network.devices.sort_unstable_by_key(|d| d.index);
    let of_all = rp_filter_of_all();
    for device in &mut network.devices {
        device.rp_filter = device.rp_filter.max(of_all);
    }
    for device in network.devices.iter_mut().filter(|d| d.is_member) {
        device.is_member = !is_vrf_member(device.index, &links);
    }
    read_addresses(handle, &mut network).await?;
    Ok(network)
}

fn device(link: &LinkMessage) -> NetDevice {
    let mut device = NetDevice {
        index: link.header.index,
        name: String::new(),
        kind: None,
        layer: link.header.link_layer_type.into(),
        is_up: link.header.flags.contains(LinkFlags::Up),
        is_loopback: link.header.flags.contains(LinkFlags::Loopback),
        is_member: false,
        controller: None,
        below: None,
        has_default_route: false,
        addresses: Vec::new(),
        has_subnet: false,
        link_address: None,
        peer_is_elsewhere: false,
        rp_filter: 0,
    };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => device.name.clone_from(name),
            LinkAttribute::Controller(index) => {
                device.is_member = *index != 0;
                device.controller = Some(*index).filter(|index| *index != 0);
            }
            LinkAttribute::Address(bytes) => device.link_address = bytes.as_slice().try_into().ok(),
            LinkAttribute::LinkNetNsId(_) => device.peer_is_elsewhere = true,
            LinkAttribute::Link(index) => device.below = Some(*index),
            LinkAttribute::LinkInfo(infos) => device.kind = kind(infos),
            LinkAttribute::AfSpecUnspec(families) => device.rp_filter = rp_filter(families).unwrap_or(0),
            _ => {}
        }
    }
    device
}

/// The device's own sysctl.
fn rp_filter(families: &[AfSpecUnspec]) -> Option<u32> {
    let inet = families.iter().find_map(|family| match family {
        AfSpecUnspec::Inet(attributes) => Some(attributes),
        _ => None,
    })?;
    inet.iter().find_map(|attribute| match attribute {
        AfSpecInet::DevConf(sysctls) => u32::try_from(sysctls.rp_filter).ok(),
        _ => None,
    })
}

/// The sysctl of all devices, of which the larger one counts (Documentation/networking/ip-sysctl.rst).
fn rp_filter_of_all() -> u32 {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/conf/all/rp_filter").unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

fn kind(infos: &[LinkInfo]) -> Option<InfoKind> {
    infos.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind.clone()),
        _ => None,
    })
}

/// A VRF only chooses the routing table: its members keep their addresses and routes.
fn is_vrf_member(index: u32, links: &[LinkMessage]) -> bool {
    let of = |index: u32| links.iter().find(move |link| link.header.index == index);
    let controller = of(index).and_then(|link| {
        link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Controller(index) => Some(*index),
            _ => None,
        })
    });
    controller.and_then(of).is_some_and(|link| device(link).kind == Some(InfoKind::Vrf))
}

async fn read_addresses(handle: &Handle, network: &mut Network) -> anyhow::Result<()> {
    let ipvs = network.devices.iter().find(|d| d.name == IPVS_DEVICE).map(|d| d.index);
    let mut messages = handle.address().get().execute();
    while let Some(message) = messages.try_next().await.context("listing addresses (netlink)")? {
        let Some(ip) = own_address(&message).filter(|ip| !ip.to_ip().is_loopback()) else { continue };
        if Some(message.header.index) == ipvs {
            continue;
        }
        network.addresses.push(ip);
        let at = network.devices.binary_search_by_key(&message.header.index, |d| d.index);
        if let (Ok(at), false) = (at, super::selection::is_link_local(ip)) {
            network.devices[at].addresses.push(ip);
            let whole = if ip.to_ip().is_ipv4() { 32 } else { 128 };
            network.devices[at].has_subnet |= message.header.prefix_len < whole;
        }
    }
    network.addresses.sort_unstable();
    network.addresses.dedup();
    Ok(())
}

/// Indices of the devices that a default route of any table leads to.
pub(super) async fn default_routes(handle: &Handle) -> anyhow::Result<Vec<u32>> {
    let mut indices = Vec::new();
    let requests = [
        RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
        RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
    ];
    for request in requests {
        let mut routes = handle.route().get(request).execute();
        while let Some(route) = routes.try_next().await.context("listing routes (netlink)")? {
            if route.header.destination_prefix_length == 0 && route.header.kind == RouteType::Unicast {
                indices.extend(devices_of(&route));
            }
        }
    }
    Ok(indices)
}

fn devices_of(route: &RouteMessage) -> Vec<u32> {
    let of = |attribute: &RouteAttribute| match attribute {
        RouteAttribute::Oif(index) => vec![*index],
        RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
        _ => Vec::new(),
    };
    route.attributes.iter().flat_map(of).collect()
}

/// IFA_LOCAL where there is one: on point-to-point devices IFA_ADDRESS is the peer's (rtnetlink(7)).
pub(super) fn own_address(message: &AddressMessage) -> Option<Ipx> {
    let local = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    let address = message.attributes.iter().find_map(|a| match a {
        AddressAttribute::Address(ip) => Some(*ip),
        _ => None,
    });
    local.or(address).map(Ipx::from)
}
