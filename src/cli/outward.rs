//! What `kubelane check` finds out about traffic from outside: the devices where it is met, and what is in its way.

use std::path::Path;

use anyhow::Context as _;

use crate::bpf::{Device, Direction, LinkLayer, PacketTrial, Role, programs_before_ours};
use crate::model::{Family, Ipx};
use crate::netdev::{self, DeviceSelection, Layer, NetDevice, Network};

const NAME_THEM: &str = "name devices with --devices (`ip address` lists them)";
const OTHER_DEVICE: &str = "direct clients to one of the other devices";
const LOOK: &str = "look at `ip link` (XDP programs), `bpftool net`, and `tc filter show dev DEVICE ingress`";

/// Devices, and each thing that is wrong with its remedy.
pub struct Outward {
    /// For people.
    pub devices: String,
    pub troubles: Vec<(String, &'static str)>,
}

/// Without the Node object: a device that only its InternalIPs choose is not known here.
///
/// # Errors
/// When the kernel does not list its devices.
pub fn outward(selection: &DeviceSelection, pin_path: &Path) -> anyhow::Result<Outward> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting a runtime")?;
    let network = runtime.block_on(async { anyhow::Ok(netdev::watch().await?.borrow().clone()) })?;
    let chosen = selection.select(&network.devices, &[]);
    let unserved = selection.unserved(&network.devices);
    let mut troubles: Vec<(String, &'static str)> = unserved
        .iter()
        .map(|device| (format!("clients behind {} are not served: {}", device.name, device.why), OTHER_DEVICE))
        .collect();
    if chosen.is_empty() {
        troubles.push(("none: clients outside are not served".to_owned(), NAME_THEM));
    }
    let trial = PacketTrial::open(pin_path).ok();
    for device in &chosen {
        troubles.extend(in_the_way(device, trial.as_ref()).into_iter().map(|what| (what, LOOK)));
    }
    Ok(Outward { devices: describe(&network, &chosen), troubles })
}

fn describe(network: &Network, chosen: &[&NetDevice]) -> String {
    let names = |devices: &[&NetDevice]| devices.iter().map(|d| d.name.as_str()).collect::<Vec<_>>().join(", ");
    let is_other = |device: &&NetDevice| {
        let is_chosen = chosen.iter().any(|chosen| chosen.index == device.index);
        device.is_up && !device.is_loopback && !device.addresses.is_empty() && !is_chosen
    };
    let others: Vec<&NetDevice> = network.devices.iter().filter(is_other).collect();
    match others.is_empty() {
        true => names(chosen),
        false => format!("{}; not {}, though it has addresses", names(chosen), names(&others)),
    }
}

/// What comes before the programs of a device, and whether packets get to them. Nothing before they are attached.
fn in_the_way(device: &NetDevice, trial: Option<&PacketTrial>) -> Vec<String> {
    let mut found = Vec::new();
    for direction in [Direction::In, Direction::Out] {
        // Without tcx there is no such list.
        let before = programs_before_ours(device.index, direction).unwrap_or_default();
        if !before.is_empty() {
            found.push(format!("{}: {} run before kubelane's program", device.name, before.join(", ")));
        }
    }
    let outcomes = trial.and_then(|trial| trial.run(&as_attached(device)).ok()).unwrap_or_default();
    if outcomes.iter().any(|(_, arrived)| !arrived) {
        found.push(format!("{}: ingress packets do not reach kubelane's program", device.name));
    }
    found
}

fn as_attached(device: &NetDevice) -> Device {
    Device {
        index: device.index,
        link_layer: if device.layer == Layer::Ethernet { LinkLayer::Ethernet } else { LinkLayer::None },
        role: Role::Outward,
        ip4: device.first(Family::Ipv4).and_then(Ipx::to_ip4),
        ip6: device.first(Family::Ipv6).and_then(Ipx::to_ip6),
        rp_filter: 0,
    }
}
