//! Pods that are no processes of this kernel: `kubelane-lab tap-pod` behind a tap device of a node.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use anyhow::Context as _;
use kubelane::abi::PodDevice;
use libbpf_rs::{MapCore as _, MapFlags, MapHandle};

use super::client::Client;
use super::lab::{Lab, Place, bridge_address, link_text};
use super::lab_binary;

/// The address at which a routed pod finds its gateway, and the link address that the IPv6 one follows from: Calico's.
const GATEWAY: [&str; 2] = ["169.254.1.1", "fe80::ecee:eeff:feee:eeee"];
const GATEWAY_LINK: [u8; 6] = [0xee; 6];

/// How a pod's tap is part of its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wiring {
    /// A port of the bridge that the other pods are on.
    Bridged,
    /// The same, and what a virtual machine leaves to its network card: checksums, and the segments of TCP.
    Machine,
    /// A route to the pod and nothing else, and a gateway that is no address of the node: as Calico has it.
    Routed,
}

impl Wiring {
    pub const ALL: [Wiring; 3] = [Wiring::Bridged, Wiring::Machine, Wiring::Routed];
}

/// A pod with a TCP/IP stack of its own. It ends, and its device with it, when this is dropped.
pub struct TapPod {
    pub name: String,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    /// Its device on the node.
    pub device: String,
    /// The link address of its gateway.
    gateway: [u8; 6],
    pub client: Client,
}

impl TapPod {
    /// Starts a pod on a node. `number` is the last byte of its addresses, which no other pod of the node has; `listen`
    /// are options of `kubelane-lab tap-pod`: `--seen 9000`.
    pub fn start(
        lab: &Lab,
        node: &str,
        name: &str,
        number: u8,
        wiring: Wiring,
        listen: &str,
    ) -> anyhow::Result<TapPod> {
        let (place, addresses, gateways) = plan(lab, node, name, number, wiring)?;
        let device = format!("tap-{name}");
        let mut arguments = vec!["tap-pod", "--name", name, "--device", &device];
        arguments.extend(addresses.iter().flat_map(|address| ["--address", address]));
        arguments.extend(gateways.iter().flat_map(|gateway| ["--gateway", gateway]));
        arguments.extend(listen.split_whitespace());
        arguments.extend((wiring == Wiring::Machine).then_some("--offloads"));
        let client = Client::once_ready(place.spawn(&lab_binary()?, &arguments)?).with_context(|| place.log_tail())?;
        let gateway = if wiring == Wiring::Routed { GATEWAY_LINK } else { bridge_address(lab.node(node).number) };
        let pod = TapPod { name: name.to_owned(), v4: place.v4, v6: place.v6, device, gateway, client };
        match wiring {
            Wiring::Bridged | Wiring::Machine => place.ip(&[&format!("link set dev {} master cbr0 up", pod.device)])?,
            Wiring::Routed => pod.route(lab, &place)?,
        }
        Ok(pod)
    }

    /// Boots a virtual machine as a pod in the node's bridge: `kernel` has `vmlinux` and `initramfs-pod`, as tests/vm makes
    /// them. `listen` are options of `kubelane-lab serve`.
    pub fn boot(lab: &Lab, node: &str, name: &str, number: u8, kernel: &Path, listen: &str) -> anyhow::Result<TapPod> {
        let (place, [v4, v6], [gateway4, gateway6]) = plan(lab, node, name, number, Wiring::Machine)?;
        let device = format!("tap-{name}");
        place.ip(&[&format!("tuntap add dev {device} mode tap"), &format!("link set dev {device} master cbr0 up")])?;
        let (program, listen) = (lab_binary()?.display().to_string(), listen.replace(' ', ","));
        let append = format!(
            "console=ttyS0 panic=-1 mitigations=off random.trust_cpu=on apparmor=0 audit=0 pod.name={name} pod.v4={v4} \
             pod.v6={v6} pod.gateway4={gateway4} pod.gateway6={gateway6} pod.program={program} pod.listen={listen}"
        );
        let [vmlinux, initramfs] = ["vmlinux", "initramfs-pod"].map(|file| kernel.join(file).display().to_string());
        let console = format!("file:{}", lab.dir.join(format!("{name}.console")).display());
        let tap = format!("tap,id=pod,ifname={device},script=no,downscript=no");
        let machine = ["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,la57=off,smap=off", "-m", "512"];
        let bare =
            ["-nographic", "-no-reboot", "-nodefaults", "-monitor", "none", "-serial", &console, "-serial", "stdio"];
        let boot = ["-kernel", &vmlinux, "-initrd", &initramfs, "-append", &append];
        let files = ["-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"];
        let devices = ["-device", "virtio-9p-pci,fsdev=host,mount_tag=host", "-netdev", &tap];
        let card = ["-device", "virtio-net-pci,netdev=pod"];
        let arguments = [&machine[..], &bare, &boot, &files, &devices, &card].concat();
        let process = place.spawn(Path::new("/usr/bin/qemu-system-x86_64"), &arguments)?;
        let console = || std::fs::read_to_string(lab.dir.join(format!("{name}.console"))).unwrap_or_default();
        let client = Client::once_ready(process).with_context(|| format!("{}\n{}", place.log_tail(), console()))?;
        let gateway = bridge_address(lab.node(node).number);
        Ok(TapPod { name: name.to_owned(), v4: place.v4, v6: place.v6, device, gateway, client })
    }

    /// Whether the daemon of the pod's node has its programs on the device, for both directions, and knows at which link
    /// address the pod reaches the node: that of the bridge, once the device is in it.
    pub fn is_served(&self, lab: &Lab, node: &str) -> anyhow::Result<bool> {
        let node = lab.node(node);
        let device = self.device.as_str();
        let index = node.host.inside(|| nix::net::if_::if_nametoindex(device).context("looking the tap up"))?;
        let pins = fs::read_dir(node.pin_path.join("v3/links")).into_iter().flatten().flatten();
        let names: Vec<String> = pins.filter_map(|pin| pin.file_name().into_string().ok()).collect();
        let is_attached = |way| names.iter().any(|name| name.ends_with(&format!("_{index}_{way}")));
        let map = MapHandle::from_pinned_path(node.pin_path.join("v3/maps/pod_devices"))?;
        let row = map.lookup(&index.to_ne_bytes(), MapFlags::ANY)?;
        let knows = row.is_some_and(|row| bytemuck::pod_read_unaligned::<PodDevice>(&row).gateway == self.gateway);
        Ok(knows && is_attached("in") && is_attached("out"))
    }

    /// Both addresses, IPv4 first.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    fn route(&self, lab: &Lab, node: &Place) -> anyhow::Result<()> {
        let TapPod { device, v4, v6, .. } = self;
        node.sysctl(&[
            (&format!("ipv4/conf/{device}/proxy_arp"), "1"),
            (&format!("ipv4/neigh/{device}/proxy_delay"), "0"),
            (&format!("ipv6/conf/{device}/accept_ra"), "0"),
        ])?;
        node.ip(&[
            &format!("link set dev {device} address {}", link_text(self.gateway)),
            &format!("link set dev {device} up"),
            &format!("route add {v4}/32 dev {device} scope link"),
            &format!("route add {v6}/128 dev {device}"),
        ])?;
        let of =
            lab.nodes.iter().find(|other| other.host.netns == node.netns).context("the node is the laboratory's")?;
        for other in lab.nodes.iter().filter(|other| other.number != of.number) {
            other.host.ip(&[
                &format!("route add {v4}/32 via {}", of.host.v4),
                &format!("route add {v6}/128 via {}", of.host.v6),
            ])?;
        }
        Ok(())
    }
}

/// The place of a pod's process, its addresses with their prefixes, and its gateways; IPv4 first.
fn plan(
    lab: &Lab,
    node: &str,
    name: &str,
    number: u8,
    wiring: Wiring,
) -> anyhow::Result<(Place, [String; 2], [String; 2])> {
    let node = lab.node(node);
    let (net, of) = (if wiring == Wiring::Routed { 245 } else { 244 }, node.number);
    let v4 = Ipv4Addr::new(10, net, of, number);
    // Written as in decimal, as those of the laboratory's nodes.
    let v6: Ipv6Addr = format!("fd{}:0:0:{of}::{number}", net - 200).parse()?;
    let place = Place {
        name: name.to_owned(),
        v4,
        v6,
        cgroup: node.cgroup.join("pods").join(name),
        log: lab.dir.join(format!("{name}.log")),
        ..node.host.clone()
    };
    fs::create_dir_all(&place.cgroup).with_context(|| format!("creating {}", place.cgroup.display()))?;
    let (prefixes, gateways) = match wiring {
        Wiring::Bridged | Wiring::Machine => ([24, 64], [format!("10.244.{of}.1"), format!("fd44:0:0:{of}::1")]),
        Wiring::Routed => ([32, 128], GATEWAY.map(str::to_owned)),
    };
    Ok((place, [format!("{v4}/{}", prefixes[0]), format!("{v6}/{}", prefixes[1])], gateways))
}
