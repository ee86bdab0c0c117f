//! What one way costs: many short rounds, in each of which the empty program, the reference and the way are run one
//! after the other, so that whatever disturbs one is likely to disturb the others. What counts is the lowest tenth of
//! each: neighbours and interrupts only ever add to it.

use kubelane::bpf::reference::Reference;
use kubelane::bpf::run::{Outcome, run_bare, run_marked, run_pod};
use kubelane::bpf::{Direction, LinkLayer};

use crate::laboratory::figures::{CLOCK_NS, Found};
use crate::laboratory::packets::{DROP, Node};

/// Runs in one system call: a forwarded packet loses a hop in each.
const REPEAT: u32 = 200;
const ROUNDS: usize = 1000;
/// Of ways that are run once in a system call, which are disturbed more easily.
const ROUNDS_OF_SINGLES: usize = 250;
const SINGLES: usize = 8;
/// How often the budget of answers is waited for, a tenth of a second each.
const WAITS: usize = 10;
/// The part of the rounds that counts, those that took least: a mean of them is finer than the clock, which counts whole
/// nanoseconds, and depends less on luck than the lowest of all.
const COUNTED: f64 = 0.1;
/// The same of single runs, which are no means, and most of which meet caches that something else has been through.
const COUNTED_OF_SINGLES: f64 = 0.03;

/// The frame that the reference is run on; it does not look.
const FRAME: [u8; 64] = [0; 64];

/// Where a packet meets a program.
#[derive(Clone, Copy)]
pub struct Hook {
    pub direction: Direction,
    pub link_layer: LinkLayer,
    pub interface: u32,
    pub mark: u32,
    /// A pod's device, and no outward one.
    pub is_pods: bool,
}

impl Hook {
    fn run(&self, node: &mut Node, packet: &[u8], repeat: u32) -> Outcome {
        let devices = node.datapath.devices();
        match self.link_layer {
            _ if self.is_pods => run_pod(devices, packet, self.interface, repeat),
            LinkLayer::Ethernet => run_marked(devices, self.direction, packet, self.interface, self.mark, repeat),
            LinkLayer::None => run_bare(devices, self.direction, packet, self.interface, repeat),
        }
        .unwrap()
    }
}

/// Makes the next packet, on a node that it may send others through first.
type Make = dyn FnMut(&mut Node) -> Vec<u8>;

/// The packets that take a way.
pub enum Packets {
    /// One, which is run again and again on what the last run left of it.
    Same(Vec<u8>),
    /// Another for each run, made ready by this.
    Fresh(Box<Make>),
}

/// A way through a program.
pub struct Way {
    pub name: String,
    pub hook: Hook,
    pub packets: Packets,
    /// What the program must answer, or it was another way.
    pub action: i32,
}

/// Nanoseconds, the lowest seen.
#[derive(Clone, Copy, Debug)]
pub struct Lowest {
    /// A run of the empty program, as often in a system call as the way's.
    empty: f64,
    way: f64,
    /// The reference, run as often in a system call as the way, without what an empty run costs.
    reference: f64,
}

impl Lowest {
    /// Of both.
    pub fn and(self, other: Lowest) -> Lowest {
        Lowest {
            empty: self.empty.min(other.empty),
            way: self.way.min(other.way),
            reference: self.reference.min(other.reference),
        }
    }

    /// Nanoseconds of the way itself.
    pub fn ns(&self) -> f64 {
        (self.way - self.empty).max(0.0)
    }

    /// References that the clock's grain may make of nothing.
    pub fn grain(&self) -> f64 {
        CLOCK_NS / self.reference
    }

    pub fn reference_ns(&self) -> f64 {
        self.reference
    }

    pub fn found(&self, name: &str) -> Found {
        Found { name: name.to_owned(), value: self.ns() / self.reference, ns: Some(self.ns()) }
    }
}

/// What was measured in rounds, in whole nanoseconds: all three as often in a system call, so that what a first run pays
/// for cold caches is in all of them.
#[derive(Default)]
struct Times {
    empty: Vec<u64>,
    reference: Vec<u64>,
    way: Vec<u64>,
}

/// The mean of the part that counts.
fn low(mut times: Vec<u64>, part: f64) -> f64 {
    times.sort_unstable();
    let counted = &times[..(times.len() as f64 * part).ceil() as usize];
    counted.iter().sum::<u64>() as f64 / counted.len() as f64
}

/// Measures a way `rounds` times as long as usual.
pub fn measure(node: &mut Node, reference: &Reference, way: &mut Way, rounds: usize) -> Lowest {
    let (times, part) = match &mut way.packets {
        Packets::Same(packet) => {
            let mut times = Times::default();
            for _ in 0..rounds * ROUNDS {
                refer(reference, &mut times, REPEAT);
                let outcome = way.hook.run(node, packet, REPEAT);
                assert_eq!(outcome.action, way.action, "{}", way.name);
                times.way.push(outcome.duration.as_nanos() as u64);
            }
            (times, COUNTED)
        }
        Packets::Fresh(_) => (measure_singles(node, reference, way, rounds), COUNTED_OF_SINGLES),
    };
    let empty = low(times.empty, part);
    Lowest { empty, way: low(times.way, part), reference: low(times.reference, part) - empty }
}

fn refer(reference: &Reference, times: &mut Times, repeat: u32) {
    times.empty.push(reference.run_empty(&FRAME, repeat).unwrap().as_nanos() as u64);
    times.reference.push(reference.run(&FRAME, repeat).unwrap().as_nanos() as u64);
}

fn measure_singles(node: &mut Node, reference: &Reference, way: &mut Way, rounds: usize) -> Times {
    let (hook, action) = (way.hook, way.action);
    let Packets::Fresh(make) = &mut way.packets else { unreachable!("packets that are used once") };
    let (mut times, mut waits) = (Times::default(), 0);
    for _ in 0..rounds * ROUNDS_OF_SINGLES {
        for _ in 0..SINGLES {
            let packet = make(node);
            refer(reference, &mut times, 1);
            let time = single(node, hook, action, &packet, &way.name);
            waits += usize::from(time.is_none());
            times.way.extend(time);
        }
        if waits > rounds * WAITS {
            break;
        }
    }
    times
}

/// The time of a single run. None: the program's budget of answers is used up, and was waited for.
fn single(node: &mut Node, hook: Hook, action: i32, packet: &[u8], name: &str) -> Option<u64> {
    let outcome = hook.run(node, packet, 1);
    if outcome.action == DROP && action != DROP {
        // ANSWERS_INTERVAL_NS of bpf/icmp.h.
        std::thread::sleep(std::time::Duration::from_millis(100));
        let again = hook.run(node, packet, 1);
        assert_eq!(again.action, action, "{name}");
        return None;
    }
    assert_eq!(outcome.action, action, "{name}");
    Some(outcome.duration.as_nanos() as u64)
}
