//! The packet programs once more, for a packet that is only tried: they read the live rows of Services, and write to copies
//! of the tables that packets write. What is attached, and what it remembers, never sees the packet.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::mem::MaybeUninit;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use bytemuck::Pod;
use libbpf_rs::query::ProgInfoIter;
use libbpf_rs::skel::{OpenSkel, Skel as _};
use libbpf_rs::{MapCore, MapFlags, MapHandle, Program};

use super::attached::attached;
use super::batch::Batches;
use super::devices::{Devices, LinkLayer};
use super::hook::Direction;
use super::monitor::{Event, Overheard};
use super::object::{btf_stand_in, made_maps, open_object};
use super::run::{self, Outcome};
use super::signals::uninterrupted;
use super::skeleton::OpenKubelaneSkel;
use super::{pinned, probe};
use crate::abi::counter::COUNTER_MAX;

/// No packet program writes to them.
const READ_ONLY: [&str; 11] = [
    "frontends",
    "slots",
    "backends",
    "addresses",
    "services",
    "source_ranges",
    "devices",
    "flow_limits",
    "wire_filter",
    "probes",
    "probe_state",
];
/// Begun with the rows that the live ones have. All others begin empty: the ring of flows that are not proved, too, whose
/// position each processor keeps for itself, so that a packet that is tried pushes nobody out.
const COPIED: [&str; 11] = [
    "flows4",
    "flows6",
    "affinities",
    "new_affinities",
    "outgoing",
    "handed",
    "fragments",
    "flow_counts",
    "ports",
    "epochs",
    "pod_devices",
];
/// Of those, the tables in which a packet leaves rows that are told of.
const WATCHED: [&str; 7] = ["flows4", "flows6", "affinities", "new_affinities", "outgoing", "handed", "fragments"];
const ROWS_AT_ONCE: usize = 4096;
/// Rows of arrays that are read one by one.
const LARGE_VALUE: u32 = 4096;

/// Which program a packet meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Of an outward device, or out of a pod's.
    Wire(Direction),
    /// In by a pod's device.
    FromPod,
}

impl Hook {
    /// As the kernel knows it.
    pub fn program(self) -> &'static str {
        match self {
            Hook::Wire(Direction::In) => "wire_in_ethernet",
            Hook::Wire(Direction::Out) => "wire_out_ethernet",
            Hook::FromPod => "pod_in_ethernet",
        }
    }
}

/// A row that a packet wrote or took away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub map: &'static str,
    pub key: Vec<u8>,
    pub was_there: bool,
    /// `None`: it is gone.
    pub value: Option<Vec<u8>>,
}

/// What one run did.
#[derive(Debug)]
pub struct Trial {
    pub outcome: Outcome,
    pub events: Vec<Event>,
    /// Indices of [`counter`](crate::abi::counter), and by how much each grew.
    pub counted: Vec<(u32, u64)>,
    pub changes: Vec<Change>,
}

/// The programs, and the tables that they write to.
pub struct Rehearsal {
    devices: Devices,
    maps: HashMap<String, MapHandle>,
    overheard: Overheard,
    hasher: RandomState,
    /// Of each row of the watched tables a hash, after the last run.
    known: HashMap<&'static str, HashMap<Vec<u8>, u64>>,
    counters: Vec<u64>,
    /// Whether the programs that are attached are these.
    pub is_attached_build: bool,
}

impl Rehearsal {
    /// # Errors
    /// When nothing is pinned there or no packet program is attached, a right is missing, or the kernel refuses.
    pub fn open(pin_path: &Path) -> Result<Rehearsal> {
        pinned::expect_state(pin_path)?;
        let Some(attached) = attached(pin_path, Hook::Wire(Direction::In).program())? else {
            bail!("no device of this node has the packet programs: see the attachments in `kubelane get node`")
        };
        let mut storage = MaybeUninit::uninit();
        let btf = btf_stand_in()?;
        let mut skeleton = open_object(&mut storage, btf.as_ref(), probe::SocketSearch::None)?;
        attached.configure(&mut skeleton)?;
        let live = arrange(&mut skeleton, pin_path)?;
        let skeleton = uninterrupted(|| skeleton.load()).context("the kernel rejected the BPF object")?;
        let mut maps = HashMap::new();
        for (name, map) in made_maps(skeleton.object()) {
            maps.insert(name, MapHandle::try_from(&map).context("cannot keep a map")?);
        }
        for (name, live) in &live {
            copy(live, &maps[*name]).with_context(|| format!("cannot copy the map {name}"))?;
        }
        let devices = Devices::new(&skeleton, pin_path)?;
        let own = Program::id_from_fd(devices.programs().of(Direction::In, LinkLayer::Ethernet));
        let own = own.context("cannot ask the kernel about a program")?;
        let own = ProgInfoIter::default().find(|program| program.id == own);
        let listening = MapHandle::try_from(&maps["listening"]).context("cannot keep a map")?;
        let overheard = Overheard::new(listening, &maps["listener_rings"])?;
        let mut rehearsal = Rehearsal {
            devices,
            overheard,
            hasher: RandomState::new(),
            known: HashMap::new(),
            counters: vec![0; COUNTER_MAX as usize],
            is_attached_build: own.is_some_and(|own| own.tag.0 == attached.tag),
            maps,
        };
        rehearsal.changes()?;
        Ok(rehearsal)
    }

    /// Runs the program of this hook once, on `frame` (an Ethernet frame) at the device `interface` of this network
    /// namespace; `from`: the device by which it came in, of a packet that leaves.
    ///
    /// # Errors
    /// When the kernel refuses, or a map cannot be read.
    pub fn run(&mut self, hook: Hook, frame: &[u8], from: u32, interface: u32) -> Result<Trial> {
        self.overheard.begin()?;
        let outcome = match hook {
            Hook::Wire(direction) => match run::run_from(&self.devices, direction, frame, from, interface) {
                // Before 5.16 nothing can be said of the device that it came in by.
                Err(_) if from != 0 => run::run_from(&self.devices, direction, frame, 0, interface),
                result => result,
            },
            Hook::FromPod => run::run_pod(&self.devices, frame, interface, 1),
        }?;
        Ok(Trial { outcome, events: self.overheard.take()?, counted: self.counted()?, changes: self.changes()? })
    }

    /// A row as the next packet finds it.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn get<K: Pod, V: Pod>(&self, name: &str, key: &K) -> Result<Option<V>> {
        let value = self.maps[name].lookup(bytemuck::bytes_of(key), MapFlags::ANY);
        let value = value.with_context(|| format!("cannot read the map {name}"))?;
        Ok(value.map(|value| bytemuck::pod_read_unaligned(&value)))
    }

    fn counted(&mut self) -> Result<Vec<(u32, u64)>> {
        let mut grown = Vec::new();
        for number in 0..COUNTER_MAX {
            let rows = self.maps["counters"].lookup_percpu(&number.to_ne_bytes(), MapFlags::ANY);
            let rows = rows.context("cannot read the map counters")?.unwrap_or_default();
            let sum = rows.iter().filter_map(|row| Some(u64::from_ne_bytes(row.get(..8)?.try_into().ok()?))).sum();
            let before = std::mem::replace(&mut self.counters[number as usize], sum);
            grown.extend((sum > before).then(|| (number, sum - before)));
        }
        Ok(grown)
    }

    fn changes(&mut self) -> Result<Vec<Change>> {
        let mut changes = Vec::new();
        for name in WATCHED {
            let mut before = self.known.remove(name).unwrap_or_default();
            let mut now = HashMap::new();
            each(&self.maps[name], |key, value| {
                let hash = self.hasher.hash_one(value);
                let former = before.remove(key);
                if former != Some(hash) {
                    let (key, was_there) = (key.to_vec(), former.is_some());
                    changes.push(Change { map: name, key, was_there, value: Some(value.to_vec()) });
                }
                now.insert(key.to_vec(), hash);
                Ok(())
            })?;
            let gone = |key| Change { map: name, key, was_there: true, value: None };
            changes.extend(before.into_keys().map(gone));
            self.known.insert(name, now);
        }
        Ok(changes)
    }
}

/// Gives the programs the live maps that they only read, and makes the others as large as the live ones. Answers the live
/// ones that are to be copied.
fn arrange(skeleton: &mut OpenKubelaneSkel<'_>, pin_path: &Path) -> Result<Vec<(&'static str, MapHandle)>> {
    let mut live = Vec::new();
    for mut map in skeleton.open_object_mut().maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        let pin = pinned::maps_directory(pin_path).join(&name);
        if READ_ONLY.contains(&name.as_str()) {
            map.reuse_pinned_map(&pin).with_context(|| format!("cannot use the pinned map {}", pin.display()))?;
        } else if pin.exists() && map.max_entries() > 0 {
            let theirs = pinned::open_map_at(&pin)?;
            map.set_max_entries(theirs.max_entries()).with_context(|| format!("cannot size the map {name}"))?;
            live.extend(COPIED.iter().find(|copied| **copied == name).map(|name| (*name, theirs)));
        }
    }
    Ok(live)
}

fn copy(from: &MapHandle, to: &MapHandle) -> Result<()> {
    if from.value_size() > LARGE_VALUE {
        for key in (0..from.max_entries()).map(u32::to_ne_bytes) {
            let value = from.lookup(&key, MapFlags::ANY).context("reading it")?.unwrap_or_default();
            to.update(&key, &value, MapFlags::ANY).context("writing the copy")?;
        }
        return Ok(());
    }
    each(from, |key, value| to.update(key, value, MapFlags::ANY).context("writing the copy"))
}

fn each(map: &MapHandle, mut each: impl FnMut(&[u8], &[u8]) -> Result<()>) -> Result<()> {
    let mut batches = Batches::new(map);
    loop {
        let batch = batches.next(map, ROWS_AT_ONCE)?;
        for (key, value) in batch.rows() {
            each(key, value)?;
        }
        if batch.ended {
            return Ok(());
        }
    }
}
