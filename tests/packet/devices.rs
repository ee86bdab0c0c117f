//! Attaching the packet programs to devices: taken over without a gap, beside other people's, and gone after cleanup.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::laboratory::packets::{NODE6, Node, ip_command};
use crate::laboratory::pins::Pins;
use kubelane::bpf::{
    self, Attached, Datapath, Device, Devices, Direction, Fault, LinkLayer, Method, PacketTrial, Role,
};
use kubelane::model::{Family, Protocol};

fn device(index: u32) -> Device {
    Device {
        index,
        link_layer: LinkLayer::Ethernet,
        role: Role::Outward,
        ip4: Some("10.0.0.1".parse().unwrap()),
        ip6: None,
        rp_filter: 0,
    }
}

fn tc(words: &str) -> String {
    let out = Command::new("tc").args(words.split_whitespace()).output().unwrap();
    assert!(out.status.success(), "tc {words}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

type Choose = fn(&mut Devices);

/// A method, how to choose it, and the file names that it pins.
const METHODS: [(Method, Choose, &str); 2] =
    [(Method::Tcx, |_| {}, "tcx"), (Method::Clsact, |d| d.use_clsact(), "filter")];

#[test]
fn programs_are_taken_over_by_the_next_daemon_and_gone_after_detaching() {
    for (method, choose, word) in METHODS {
        let mut node = Node::new();
        if node.datapath.devices().method() == Method::Clsact && method == Method::Tcx {
            continue;
        }
        let (uplink, tunnel) = (node.uplink, node.tunnel);
        choose(node.datapath.devices());
        assert_eq!(node.datapath.devices().attach(&device(uplink)).unwrap(), Attached::New, "{method:?}");
        assert_eq!(node.datapath.devices().attach(&device(uplink)).unwrap(), Attached::Replaced, "{method:?}");
        let settings = node.pins.settings();
        let Node { datapath, pins: _pins, .. } = node;
        drop(datapath);
        let mut datapath = Datapath::open(&settings).unwrap();
        let devices = datapath.devices();
        choose(devices);
        assert_eq!(devices.attach(&device(uplink)).unwrap(), Attached::Replaced, "{method:?}");
        assert_eq!(devices.attach(&device(tunnel)).unwrap(), Attached::New, "{method:?}");
        assert_eq!(devices.attached().unwrap(), [uplink, tunnel]);
        let pin = settings.pin_path.join(format!("v3/links/{word}_{uplink}_in"));
        assert!(pin.exists());
        devices.detach(uplink).unwrap();
        devices.detach(uplink).unwrap();
        assert!(!pin.exists());
        assert_eq!(devices.attached().unwrap(), [tunnel]);
        if method == Method::Clsact {
            assert_eq!(tc("filter show dev up0 ingress"), "");
            assert!(tc("filter show dev over0 egress").contains("wire_out"));
        }
    }
}

#[test]
fn other_peoples_filters_stay_and_cleanup_takes_ours_only() {
    for (method, choose, _) in METHODS {
        let mut node = Node::new();
        let uplink = node.uplink;
        // Somebody else's filter: any program will do, at a priority of its own.
        let other = Pins::new();
        let mut others = Datapath::open(&other.settings()).unwrap();
        others.devices().use_clsact();
        others.devices().attach(&device(uplink)).unwrap();
        let program = other.settings().pin_path.join(format!("v3/links/filter_{uplink}_in"));
        tc(&format!("filter add dev up0 ingress prio 5 bpf da pinned {}", program.display()));
        others.devices().detach(uplink).unwrap();
        choose(node.datapath.devices());
        node.datapath.devices().attach(&device(uplink)).unwrap();
        if method == Method::Clsact {
            assert!(tc("filter show dev up0 ingress").contains("pref 27499"));
        }
        let Node { datapath, pin_path, pins: _pins, .. } = node;
        drop(datapath);
        bpf::cleanup(&pin_path).unwrap();
        let left = tc("filter show dev up0 ingress");
        assert!(left.contains("pref 5 ") && !left.contains("pref 27499"), "{method:?}: {left}");
        assert_eq!(tc("filter show dev up0 egress"), "");
        assert!(!pin_path.exists());
    }
}

#[test]
fn a_device_that_vanishes_disturbs_nothing() {
    for (method, choose, _) in METHODS {
        let mut node = Node::new();
        let (uplink, tunnel) = (node.uplink, node.tunnel);
        choose(node.datapath.devices());
        node.datapath.devices().attach(&device(uplink)).unwrap();
        node.datapath.devices().attach(&device(tunnel)).unwrap();
        ip_command("link del over0");
        let error = node.datapath.devices().attach(&device(tunnel)).unwrap_err();
        assert!(format!("{error:#}").contains(&format!("device {tunnel}")), "{method:?}: {error:#}");
        node.datapath.devices().detach(tunnel).unwrap();
        assert_eq!(node.datapath.devices().attached().unwrap(), [uplink]);
        assert_eq!(node.datapath.devices().attach(&device(uplink)).unwrap(), Attached::Replaced);
    }
}

#[test]
fn somebody_elses_filter_in_our_place_is_not_replaced() {
    let mut node = Node::new();
    let uplink = node.uplink;
    node.datapath.devices().use_clsact();
    node.datapath.devices().attach(&device(uplink)).unwrap();
    // As another installation would see it: the filter is there, and no pin of its own.
    let other = Pins::new();
    let mut datapath = Datapath::open(&other.settings()).unwrap();
    datapath.devices().use_clsact();
    let error = format!("{:#}", datapath.devices().attach(&device(uplink)).unwrap_err());
    assert!(error.contains("another program's filter"), "{error}");
}

#[test]
fn what_somebody_takes_off_a_device_is_found_and_attached_again() {
    for (method, choose, word) in METHODS {
        let mut node = Node::new();
        let uplink = node.uplink;
        let links = node.pin_path.join("v3/links");
        let devices = node.datapath.devices();
        if devices.method() == Method::Clsact && method == Method::Tcx {
            continue;
        }
        choose(devices);
        devices.attach(&device(uplink)).unwrap();
        assert_eq!(devices.faults(&device(uplink)).unwrap(), [], "{method:?}");
        let pin = |direction: &str| links.join(format!("{word}_{uplink}_{direction}"));
        let incoming = vec![Fault::Detached(Direction::In)];
        let both = vec![Fault::Detached(Direction::Out), Fault::Detached(Direction::In)];
        let unpin = || std::fs::remove_file(pin("in")).unwrap();
        let take_off = || match method {
            Method::Tcx => {
                ["in", "out"].iter().for_each(|way| libbpf_rs::Link::open(pin(way)).unwrap().detach().unwrap())
            }
            Method::Clsact => drop(tc("qdisc del dev up0 clsact")),
        };
        for (take, expected) in [(&unpin as &dyn Fn(), incoming), (&take_off, both)] {
            take();
            assert_eq!(devices.faults(&device(uplink)).unwrap(), expected, "{method:?}");
            // A link that lost its pin is let go of after an RCU grace period, by a worker, and until then its program is
            // on the hook: the daemon tries again with the next audit (agent/wire.rs).
            let patience = Instant::now() + Duration::from_secs(10);
            while let Err(error) = devices.attach(&device(uplink)) {
                assert!(format!("{error:#}").contains("File exists") && Instant::now() < patience, "{error:#}");
                std::thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(devices.faults(&device(uplink)).unwrap(), [], "{method:?}");
        }
        if method == Method::Clsact {
            tc("filter del dev up0 egress pref 27499");
            assert_eq!(devices.faults(&device(uplink)).unwrap(), [Fault::Detached(Direction::Out)]);
            devices.attach(&device(uplink)).unwrap();
            assert!(tc("filter show dev up0 egress").contains("wire_out"));
        }
    }
}

#[test]
fn a_packet_on_trial_arrives_while_the_program_is_there_and_leaves_no_trace() {
    for (method, choose, _) in METHODS {
        let mut node = Node::new();
        let device = Device { ip6: Some(NODE6.parse().unwrap()), ..device(node.uplink) };
        if node.datapath.devices().method() == Method::Clsact && method == Method::Tcx {
            continue;
        }
        choose(node.datapath.devices());
        node.datapath.devices().attach(&device).unwrap();
        let trial = PacketTrial::open(&node.pin_path).unwrap();
        assert_eq!(trial.run(&device).unwrap(), [], "nothing is served");
        // One protocol of each, so that another is free.
        for (wildcard, protocol) in [("0.0.0.0", Protocol::Udp), ("::", Protocol::Tcp)] {
            node.frontend(wildcard, 30_001, protocol, &[]);
        }
        let counters = node.counters();
        for _ in 0..3 {
            assert_eq!(trial.run(&device).unwrap(), [(Family::Ipv4, true), (Family::Ipv6, true)], "{method:?}");
        }
        assert_eq!(node.counters(), counters);
        node.datapath.devices().detach(device.index).unwrap();
        assert_eq!(trial.run(&device).unwrap(), [(Family::Ipv4, false), (Family::Ipv6, false)], "{method:?}");
    }
}
