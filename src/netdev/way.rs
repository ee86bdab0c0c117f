//! Asking the kernel where it sends a packet (RTM_GETROUTE of one destination, as `ip route get`), and behind which port of a
//! bridge that is (RTM_GETNEIGH, as `ip neighbour` and `bridge fdb`).

use std::net::IpAddr;

use anyhow::Context as _;
use futures::TryStreamExt as _;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::{InfoPortKind, LinkAttribute, LinkInfo};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use rtnetlink::{Error, Handle, RouteMessageBuilder};

/// Where a packet goes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// Interface index; of this node's own addresses that of `lo`.
    pub interface: u32,
    /// The port of that bridge; `None`: it is no bridge, or has not learned yet where that is.
    pub port: Option<u32>,
    /// To a socket of this namespace.
    pub is_local: bool,
}

/// Of a packet to `to`; `forwarded`: its source, and the device that it came in by, else this namespace sends it. `None`:
/// there is no route, or it is refused.
///
/// # Errors
/// When netlink does not answer.
pub async fn way(to: IpAddr, forwarded: Option<(IpAddr, u32)>) -> anyhow::Result<Option<Way>> {
    let (connection, handle, _) = rtnetlink::new_connection().context("opening a netlink socket")?;
    let connection = tokio::spawn(connection);
    let found = find(&handle, to, forwarded).await;
    connection.abort();
    found
}

async fn find(handle: &Handle, to: IpAddr, forwarded: Option<(IpAddr, u32)>) -> anyhow::Result<Option<Way>> {
    let length = if to.is_ipv4() { 32 } else { 128 };
    let mut request = RouteMessageBuilder::<IpAddr>::new().destination_prefix(to, length)?;
    if let Some((from, interface)) = forwarded {
        let interface = bridge_of(handle, interface).await?.unwrap_or(interface);
        request = request.source_prefix(from, length)?.input_interface(interface);
    }
    let route = match handle.route().get(request.build()).execute().try_next().await {
        Ok(Some(route)) => route,
        // ENETUNREACH, EHOSTUNREACH, EXDEV (the source is nobody's there), EINVAL (a source that no packet may have)...
        Ok(None) | Err(Error::NetlinkError(_)) => return Ok(None),
        Err(error) => return Err(error).context("asking for a route (netlink)"),
    };
    let Some(mut way) = way_of(&route) else { return Ok(None) };
    if !way.is_local {
        way.port = port(handle, way.interface, gateway(&route).unwrap_or(to)).await?;
    }
    Ok(Some(way))
}

/// What comes in by the port of a bridge comes to the host's stack by the bridge.
async fn bridge_of(handle: &Handle, port: u32) -> anyhow::Result<Option<u32>> {
    let link =
        handle.link().get().match_index(port).execute().try_next().await.context("asking for a device (netlink)")?;
    let attributes = link.map(|link| link.attributes).unwrap_or_default();
    let is_port = |info: &LinkInfo| matches!(info, LinkInfo::PortKind(InfoPortKind::Bridge));
    let is_bridged = attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.iter().any(is_port),
        _ => false,
    });
    let controller = attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Controller(index) => Some(*index),
        _ => None,
    });
    Ok(controller.filter(|_| is_bridged))
}

fn way_of(route: &RouteMessage) -> Option<Way> {
    let of = |attribute: &RouteAttribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    };
    let is_local = route.header.kind == RouteType::Local;
    let is_way = is_local || route.header.kind == RouteType::Unicast;
    is_way.then(|| Way { interface: route.attributes.iter().find_map(of).unwrap_or(1), port: None, is_local })
}

fn gateway(route: &RouteMessage) -> Option<IpAddr> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(RouteAddress::Inet(ip)) => Some((*ip).into()),
        RouteAttribute::Gateway(RouteAddress::Inet6(ip)) => Some((*ip).into()),
        _ => None,
    })
}

async fn port(handle: &Handle, bridge: u32, to: IpAddr) -> anyhow::Result<Option<u32>> {
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let to = match to {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    };
    let neighbours = neighbours(handle, family).await?;
    let is_next = |neighbour: &&NeighbourMessage| {
        let is_it = neighbour.attributes.contains(&NeighbourAttribute::Destination(to.clone()));
        neighbour.header.ifindex == bridge && is_it
    };
    let address = neighbours.iter().find(is_next).and_then(|neighbour| {
        neighbour.attributes.iter().find(|attribute| matches!(attribute, NeighbourAttribute::LinkLayerAddress(_)))
    });
    let Some(address) = address else { return Ok(None) };
    let ports = self::neighbours(handle, AddressFamily::Bridge).await?;
    let is_there = |entry: &&NeighbourMessage| {
        entry.attributes.contains(&NeighbourAttribute::Controller(bridge)) && entry.attributes.contains(address)
    };
    Ok(ports.iter().find(is_there).map(|entry| entry.header.ifindex))
}

async fn neighbours(handle: &Handle, family: AddressFamily) -> anyhow::Result<Vec<NeighbourMessage>> {
    let all = handle.neighbours().get().set_address_family(family).execute();
    all.try_collect().await.context("listing neighbours (netlink)")
}
