//! The inputs that the fuzzer of the packet programs has found (tests/fuzz/corpus), one for each way through them, once
//! more in the kernel: the same world in the maps, the same packets by BPF_PROG_TEST_RUN, and each must have the verdict,
//! the bytes and the counters that it has in the harness, where its oracle judges them. So the harness's helpers are shown to
//! be the kernel's. What a test run cannot be told of is not asked here: tags, aggregates, sums of devices, devices without
//! link headers, sockets, calls that fail.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::laboratory::packets::{self, Node, REDIRECT, interface_index, ip_command, set_sysctl};
use crate::laboratory::{preflight, skip};
use kubelane::abi::epoch::EPOCH_ROUTES;
use kubelane::bpf::run::{Outcome, run_from, run_marked, run_pod};
use kubelane::bpf::{Direction, FlowCollector};
use libbpf_rs::{MapCore, MapFlags};

/// The private range of source ports in a new namespace, whose local ports are Linux's own.
const SNAT_FIRST: u16 = 1024;
const SNAT_PORTS: u16 = 28_976;
/// Interfaces of the harness.
const UPLINK: u32 = 2;
const TUNNEL: u32 = 3;
const PODS: u32 = 4;
/// Those of pods: two ports of a bridge, and one with a route of its own.
const PODS_DEVICES: std::ops::RangeInclusive<u32> = 6..=8;
const VETH: u32 = 8;

/// The programs give a hundred answers in a tenth of a second, which one input alone does not use up.
const ANSWERS: u32 = 50;
const ANSWERS_INTERVAL: Duration = Duration::from_millis(100);

/// Tables that a world begins without.
const TABLES: [&str; 11] = [
    "addresses",
    "affinities",
    "flows4",
    "flows6",
    "fragments",
    "frontends",
    "handed",
    "new_affinities",
    "outgoing",
    "pod_devices",
    "source_ranges",
];

fn fuzz_directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz")
}

/// Files of a directory with this ending (none: all), in order.
fn files(directory: &Path, ending: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = entries.filter(|path| path.to_str().unwrap().ends_with(ending)).collect();
    files.sort();
    files
}

fn name_of_pods(interface: u32) -> String {
    format!("pods{interface}")
}

/// What the harness did with all inputs, line by line.
fn traces() -> String {
    let directory = fuzz_directory();
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("packet-replay");
    let sources = files(&directory, ".c").into_iter().filter(|path| !path.ends_with("fuzz.c"));
    let built = Command::new("clang")
        .args(["-O1", "-Wno-unknown-attributes", "-o"])
        .arg(&program)
        .arg("-I")
        .arg(directory.join("include"))
        .args(sources)
        .status()
        .unwrap();
    assert!(built.success());
    let ports = [SNAT_FIRST, SNAT_PORTS].map(|number| number.to_string());
    let out = Command::new(program).args(ports).args(files(&directory.join("corpus"), "")).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn bytes(text: &str) -> Vec<u8> {
    data_encoding::HEXLOWER.decode(text.as_bytes()).unwrap()
}

fn number<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().unwrap()
}

/// A node whose maps become one world after the other.
struct Replay {
    node: Node,
    collector: FlowCollector,
    /// Routes are remembered by this number, so that every world, and every change, has another.
    epoch: u32,
    /// What `wire_filter` is to hold.
    filter: Vec<u8>,
    filter_is_new: bool,
    runs: u32,
    collections: u32,
    /// What the programs may have answered with ICMP errors since the last pause.
    answers: u32,
}

impl Replay {
    fn new() -> Replay {
        let node = Node::new();
        for (family, place, kind) in [
            ("-4", "10.9.0.0/16", "unreachable"),
            ("-4", "10.10.0.0/16", "blackhole"),
            ("-6", "fd09::/32", "unreachable"),
            ("-6", "fd0a::/32", "blackhole"),
        ] {
            ip_command(&format!("{family} route add {kind} {place}"));
        }
        for interface in PODS_DEVICES {
            // Their link addresses are the harness's.
            let name = name_of_pods(interface);
            ip_command(&format!(
                "link add {name} address 02:00:00:00:00:{:02x} type veth peer name {name}-far",
                0x10 + interface
            ));
            ip_command(&format!("link set {name} up"));
            ip_command(&format!("link set {name}-far up"));
        }
        ip_command(&format!("route add 10.1.0.7 dev {}", name_of_pods(VETH)));
        ip_command(&format!("-6 route add fd01::7 dev {}", name_of_pods(VETH)));
        let collector = node.datapath.flow_collector().unwrap();
        Replay {
            node,
            collector,
            epoch: 0,
            filter: Vec::new(),
            filter_is_new: true,
            runs: 0,
            collections: 0,
            answers: 0,
        }
    }

    /// An empty world: no row, and no trace of earlier packets.
    fn forget(&mut self) {
        for map in TABLES.map(|name| self.node.pinned(name)) {
            map.keys().collect::<Vec<_>>().iter().for_each(|key| map.delete(key).unwrap());
        }
        for name in ["flow_openings", "flow_counts", "ports"] {
            let map = self.node.pinned(name);
            let (rows, size) = (map.max_entries(), map.value_size() as usize);
            let indices: Vec<u8> = (0..rows).flat_map(u32::to_ne_bytes).collect();
            map.update_batch(&indices, &vec![0; size * rows as usize], rows, MapFlags::ANY, MapFlags::ANY).unwrap();
        }
        if self.answers > ANSWERS {
            std::thread::sleep(ANSWERS_INTERVAL);
            self.answers = 0;
        }
        self.filter = vec![0; self.node.pinned("wire_filter").value_size() as usize];
    }

    fn advance_epoch(&mut self) {
        self.epoch += 1;
        let key = EPOCH_ROUTES.to_ne_bytes();
        self.node.pinned("epochs").update(&key, &self.epoch.to_ne_bytes(), MapFlags::ANY).unwrap();
    }

    fn interface(&self, number: u32) -> u32 {
        match number {
            UPLINK => self.node.uplink,
            TUNNEL => self.node.tunnel,
            PODS => interface_index(packets::PODS),
            _ if PODS_DEVICES.contains(&number) => interface_index(&name_of_pods(number)),
            _ => number,
        }
    }

    fn write(&mut self, map: &str, key: &[u8], value: &[u8]) {
        if map == "epochs" && key == EPOCH_ROUTES.to_ne_bytes() {
            return self.advance_epoch();
        }
        if map == "pod_devices" {
            let interface = self.interface(u32::from_ne_bytes(key.try_into().unwrap()));
            return self.node.pinned(map).update(&interface.to_ne_bytes(), value, MapFlags::ANY).unwrap();
        }
        self.node.pinned(map).update(key, value, MapFlags::ANY).unwrap();
    }

    fn pass(&mut self, kind: &str, index: usize) {
        let base = ["address", "port", "service"].iter().position(|known| *known == kind).unwrap();
        self.filter[base * 65_536 + index] = 1;
        self.filter_is_new = true;
    }

    /// One packet: how it fared here.
    fn run(&mut self, direction: &str, words: &[&str]) -> (Outcome, BTreeMap<u32, u64>) {
        let (interface, from) = (self.interface(number(words[0])), self.interface(number(words[1])));
        let (mark, frame): (u32, _) = (number(words[2]), bytes(words[3]));
        self.runs += 1;
        if std::mem::take(&mut self.filter_is_new) {
            self.node.pinned("wire_filter").update(&[0; 4], &self.filter, MapFlags::ANY).unwrap();
        }
        let before = self.counters();
        let devices = self.node.datapath.devices();
        let outcome = match direction {
            "in" => run_marked(devices, Direction::In, &frame, interface, mark, 1),
            "pod" => run_pod(devices, &frame, interface, 1),
            _ => run_from(devices, Direction::Out, &frame, from, interface),
        };
        let outcome = outcome.unwrap_or_else(|e| panic!("{e:#}: {}", words[3]));
        self.answers += u32::from(outcome.action == REDIRECT);
        let moved = self.counters().into_iter().zip(before).map(|(after, before)| after - before);
        (outcome, (0..).zip(moved).filter(|(_, by)| *by > 0).collect())
    }

    fn counters(&mut self) -> Vec<u64> {
        self.node.datapath.maps().read_counters().unwrap().into_iter().map(|(_, count)| count).collect()
    }

    /// Does what a line of a trace says, and compares.
    fn follow(&mut self, line: &str, story: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        match words[0] {
            "input" => {}
            "world" => self.forget(),
            "map" => self.write(words[1], &bytes(words[2]), &bytes(words[3])),
            "pass" => self.pass(words[1], number(words[2])),
            "rp_filter" => self.node.filter_reverse_paths(number(words[1])),
            "forwarding" => {
                for family in ["ipv4", "ipv6"] {
                    set_sysctl(&format!("net/{family}/conf/all/forwarding"), words[1]);
                }
            }
            "age" => self.node.age_flows(number(words[1])),
            "collect" => {
                self.collector.collect(usize::MAX / 4).unwrap();
                self.collections += 1;
            }
            "rows" => assert_eq!(self.node.flows().len(), number::<usize>(words[1]), "rows of flows, after {story}"),
            "run" => {
                let (outcome, moved) = self.run(words[1], &words[2..]);
                let counted = words[8..].iter().map(|word| word.split_once(':').unwrap());
                let expected: BTreeMap<u32, u64> = counted.map(|(at, by)| (number(at), number(by))).collect();
                let frame = data_encoding::HEXLOWER.encode(&outcome.frame);
                let action: i32 = number(words[6]);
                assert_eq!((outcome.action, frame.as_str(), moved), (action, words[7], expected), "{story}");
            }
            other => panic!("a line of a trace that begins with {other}"),
        }
    }
}

#[test]
fn what_the_fuzzer_found_fares_in_the_kernel_as_it_does_in_the_harness() {
    if let Err(reason) = preflight() {
        return skip(&format!("{reason:#}"));
    }
    let traces = traces();
    let mut replay = Replay::new();
    let mut story = String::new();
    for line in traces.lines() {
        if line.starts_with("input ") {
            story.clear();
        }
        story.push_str(line);
        story.push('\n');
        replay.follow(line, &story);
    }
    println!("{} packets, {} collections", replay.runs, replay.collections);
    assert!(replay.runs > 1000 && replay.collections > 10);
}
