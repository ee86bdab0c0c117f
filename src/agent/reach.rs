//! Whether clients outside reach what is served: devices that cannot be looked at, no device at all, and devices where
//! something keeps packets from the programs, by a packet through each. The log, the metrics and `/readyz` tell.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tracing::debug;

use super::conditions::{Conditions, Reason};
use super::wire::AttachedDevices;
use crate::bpf::{Device, PacketTrial};
use crate::model::Family;
use crate::netdev::{DeviceSelection, Network};

/// Between two trials of a device.
const EVERY: Duration = Duration::from_secs(60);
/// Trials in a row that fail before it is believed.
const TIMES: u32 = 3;

const NODE: &str = "this node";
const NO_DEVICE: &str = "there is no external device, or none matches --devices: NodePorts and load balancer \
    addresses are not served to clients outside; name the devices with --devices (`ip address` lists them)";
const LINK_LAYER: &str = "NodePorts and load balancer addresses are not served to clients behind it; direct them to \
    another device of the node (`kubelane check` lists the devices in use)";

fn kept_away(name: &str, families: &str) -> String {
    format!(
        "ingress {families} packets do not reach kubelane's program, so NodePorts and load balancer addresses are \
         not served there: something ahead of it takes them; look for an XDP program (`ip link show dev {name}`), \
         other programs (`bpftool net`) and, before Linux 6.6, filters with a lower pref (`tc filter show dev \
         {name} ingress`)"
    )
}

/// Runs for ever. `attached`: where programs are, once the first sync is in the kernel.
///
/// # Errors
/// When the worker or the watch of devices ended.
pub async fn watch(
    pin_path: PathBuf,
    mut attached: watch::Receiver<Option<AttachedDevices>>,
    mut network: watch::Receiver<Network>,
    selection: DeviceSelection,
    conditions: Conditions,
) -> anyhow::Result<()> {
    let pin_path: Arc<Path> = pin_path.into();
    let mut told = Told { conditions, unserved: BTreeSet::new(), tried: BTreeSet::new() };
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    told.unserved(&selection, &network.borrow_and_update());
    loop {
        tokio::select! {
            changed = network.changed() => {
                changed.context("the watch of devices ended")?;
                told.unserved(&selection, &network.borrow_and_update());
                continue;
            }
            changed = attached.changed() => changed.context("the worker ended")?,
            _ = ticks.tick() => {}
        }
        let Some(devices) = attached.borrow_and_update().clone() else { continue };
        told.devices(&devices);
        for (device, name) in devices {
            let pin_path = Arc::clone(&pin_path);
            let outcome = tokio::task::spawn_blocking(move || missing(&pin_path, &device)).await;
            match outcome.context("a trial failed")? {
                Ok(families) => told.tried(&name, &families),
                Err(error) => debug!(device = name, "cannot send a packet through the program: {error:#}"),
            }
        }
    }
}

/// Families of which packets do not get to the program of a device, though tried again.
fn missing(pin_path: &Path, device: &Device) -> anyhow::Result<Vec<Family>> {
    let trial = PacketTrial::open(pin_path)?;
    let mut missing = Vec::new();
    for _ in 0..TIMES {
        let outcomes = trial.run(device)?;
        missing = outcomes.into_iter().filter(|(_, arrived)| !arrived).map(|(family, _)| family).collect();
        if missing.is_empty() {
            break;
        }
    }
    Ok(missing)
}

struct Told {
    conditions: Conditions,
    /// Devices that cannot be looked at.
    unserved: BTreeSet<String>,
    /// Devices that packets were sent through.
    tried: BTreeSet<String>,
}

impl Told {
    fn unserved(&mut self, selection: &DeviceSelection, network: &Network) {
        let mut now = BTreeSet::new();
        for device in selection.unserved(&network.devices) {
            let subject = format!("device {}", device.name);
            self.conditions.holds(&subject, Reason::LinkLayer, &format!("{}: {LINK_LAYER}", device.why));
            now.insert(subject);
        }
        self.unserved.difference(&now).for_each(|subject| self.conditions.over(subject, Reason::LinkLayer));
        self.unserved = now;
    }

    fn devices(&mut self, devices: &AttachedDevices) {
        match devices.is_empty() {
            true => self.conditions.holds(NODE, Reason::NoDevice, NO_DEVICE),
            false => self.conditions.over(NODE, Reason::NoDevice),
        }
        let now: BTreeSet<String> = devices.iter().map(|(_, name)| format!("device {name}")).collect();
        self.tried.difference(&now).for_each(|subject| self.conditions.over(subject, Reason::PacketsKeptAway));
        self.tried = now;
    }

    fn tried(&self, name: &str, missing: &[Family]) {
        let subject = format!("device {name}");
        if missing.is_empty() {
            return self.conditions.over(&subject, Reason::PacketsKeptAway);
        }
        let name_of = |family: &Family| if *family == Family::Ipv4 { "IPv4" } else { "IPv6" };
        let families: Vec<&str> = missing.iter().map(name_of).collect();
        self.conditions.holds(&subject, Reason::PacketsKeptAway, &kept_away(name, &families.join(" and ")));
    }
}
