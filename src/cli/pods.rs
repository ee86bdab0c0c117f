//! What `kubelane check` finds out about pods' devices: where packets of pods are met, and pods without such a device.

use std::collections::BTreeMap;

use anyhow::Context as _;
use rtnetlink::packet_route::link::InfoKind;

use crate::bpf;
use crate::netdev::{self, DeviceSelection, NetDevice, Network, PodDevices};

/// What pods have.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Pods {
    /// Devices on which the programs are, or would be.
    pub devices: usize,
    /// Network namespaces whose default route leads over a device without an end on the node, by its kind.
    pub without: BTreeMap<String, usize>,
    /// Namespaces that cannot be looked into.
    pub hidden: usize,
}

/// Devices as the daemon finds them without options.
///
/// # Errors
/// When the kernel does not list the node's devices.
pub fn pods(selection: &DeviceSelection) -> anyhow::Result<Pods> {
    let network = network()?;
    let external = selection.select(&network.devices, &[]);
    let devices = PodDevices::Found.select(&network.devices, &external).len();
    let (kinds, hidden) = bpf::in_other_namespaces(|| network_kind().ok().flatten());
    let mut pods = Pods { devices, hidden, ..Pods::default() };
    for kind in kinds.into_iter().flatten() {
        *pods.without.entry(kind).or_default() += 1;
    }
    Ok(pods)
}

fn network() -> anyhow::Result<Network> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting a runtime")?;
    runtime.block_on(async { Ok(netdev::watch().await?.borrow().clone()) })
}

/// Of the calling thread's namespace.
fn network_kind() -> anyhow::Result<Option<String>> {
    Ok(network()?.devices.iter().filter(|device| device.has_default_route).find_map(kind_without_end))
}

/// `None`: the node has the other end, or there is none.
fn kind_without_end(device: &NetDevice) -> Option<String> {
    match &device.kind {
        Some(InfoKind::IpVlan | InfoKind::IpVtap) => Some("ipvlan".to_owned()),
        Some(InfoKind::MacVlan | InfoKind::MacVtap) => Some("macvlan".to_owned()),
        None if !device.is_loopback => Some("SR-IOV or another device of hardware".to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_without_an_end_on_the_node_are_told_by_their_kind() {
        let device = |kind| NetDevice { has_default_route: true, ..NetDevice::for_test(2, "eth0", kind) };
        let kind = |kind| kind_without_end(&device(kind));
        assert_eq!(kind(Some(InfoKind::Veth)), None);
        assert_eq!(kind(Some(InfoKind::IpVlan)).as_deref(), Some("ipvlan"));
        assert_eq!(kind(Some(InfoKind::MacVlan)).as_deref(), Some("macvlan"));
        assert_eq!(kind(None).as_deref(), Some("SR-IOV or another device of hardware"));
    }
}
