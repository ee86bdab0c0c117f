//! Listening to the datapath: a place in the map `listening`, with what is wanted, and a ring of one's own in
//! `listener_rings` (bpf/observe.h, bpf/tell.h). A place is held by showing up once a second; one that was left by a process
//! that was killed is free again some seconds later, and nobody is told anything there.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context as _, Result, bail, ensure};
use bytemuck::{Pod, Zeroable};
use libbpf_rs::{MapCore as _, MapFlags, MapHandle, MapType, RingBuffer, RingBufferBuilder};
use nix::fcntl::{Flock, FlockArg};
use nix::time::{ClockId, clock_gettime};

use super::pinned;
use super::privileges::Privileges;
use super::skeleton::types;
use crate::abi::Ends;
use crate::abi::listener_limits::{LISTENER_STALE_S, LISTENERS};
use crate::model::Ipx;

/// Bytes that wait to be read, at most: some 40,000 events.
const RING_BYTES: u32 = 8 << 20;
/// Of the events of one packet.
const RING_BYTES_OF_ONE: u32 = 1 << 16;
const NANOSECONDS: u64 = 1_000_000_000;

/// What happened: `struct event` of bpf/observe.h.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct Event {
    /// CLOCK_MONOTONIC.
    pub time_ns: u64,
    /// Of the caller's network namespace, for system calls.
    pub netns_cookie: u64,
    pub asked: Ends,
    /// Zeros where there is nothing.
    pub becomes: Ends,
    pub quoted: Ends,
    /// One of [`counter`](crate::abi::counter) or [`event_number`](crate::abi::event_number).
    pub number: u32,
    /// One of [`choice_reason`](crate::abi::choice_reason) or [`removal`](crate::abi::removal).
    pub reason: u32,
    pub service_id: u32,
    pub backend_id: u32,
    pub generation: u32,
    /// Interface index, of packets.
    pub interface: u32,
    /// As [`Flow::state`](crate::abi::Flow), of both rows.
    pub request_state: u32,
    pub reply_state: u32,
    /// Process id, of system calls; else 0.
    pub process: u32,
    pub unused: u32,
    /// IP protocol number.
    pub protocol: u8,
    /// Not 0: `service_id` is known.
    pub has_backend: u8,
    pub tcp_flags: u8,
    pub zero: u8,
    /// NUL padded.
    pub command: [u8; 16],
}

/// `struct listener`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Listener {
    numbers: u64,
    heard_ns: u64,
    rate: u32,
    one_in: u32,
    protocol: u32,
    from: [u8; 16],
    to: [u8; 16],
    port_be: [u8; 2],
    has_from: u16,
    has_to: u16,
    zero: u16,
    unused: u32,
}

/// `struct listening`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Everybody {
    slots: u32,
    zero: u32,
    listeners: [Listener; LISTENERS as usize],
}

/// `struct listener_state`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct State {
    told: u64,
    lost: u64,
    limited: u64,
    sampled: u64,
    rest: [u64; 3],
}

const _: () = {
    assert!(size_of::<types::listener>() == size_of::<Listener>());
    assert!(offset_of!(types::listener, heard_ns) == offset_of!(Listener, heard_ns));
    assert!(offset_of!(types::listener, from) == offset_of!(Listener, from));
    assert!(offset_of!(types::listener, port) == offset_of!(Listener, port_be));
    assert!(size_of::<types::listening>() == size_of::<Everybody>());
    assert!(size_of::<types::listener_state>() == size_of::<State>());
    assert!(offset_of!(types::listener_state, sampled) == offset_of!(State, sampled));
    // Of `struct event` no map has a type; its size is asserted on both sides.
    assert!(size_of::<Event>() == 184);
};

/// What is told; the kernel leaves out what is cheap to tell apart there, and so never too much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// A bit for each number of an event.
    pub numbers: u64,
    /// IP protocol number; 0: all.
    pub protocol: u8,
    /// Of packets only: a socket has no source yet when it connects.
    pub from: Option<Ipx>,
    pub to: Option<Ipx>,
    /// 0: all.
    pub port: u16,
    /// Of so many events one is told.
    pub one_in: u32,
    /// Events in a second from each processor; 0: all.
    pub rate: u32,
}

/// What became of events so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub told: u64,
    /// There was no room.
    pub lost: u64,
    /// Beyond the rate.
    pub limited: u64,
    /// Left out by sampling.
    pub sampled: u64,
}

/// A place among those who listen, until dropped.
pub struct Listening {
    places: Places,
    slot: u32,
    wanted: Wanted,
    states: MapHandle,
    rings: MapHandle,
    /// Of earlier listeners at this place.
    before: Tally,
    ring: RingBuffer<'static>,
    inbox: Rc<RefCell<Vec<Event>>>,
}

impl Listening {
    /// Takes a place.
    ///
    /// # Errors
    /// When nothing is pinned there, a right is missing, or all places are taken.
    pub fn open(pin_path: &Path, wanted: Wanted) -> Result<Listening> {
        pinned::expect_state(pin_path)?;
        let missing: Vec<&str> = Privileges::own().missing().into_iter().filter(|name| *name == "CAP_BPF").collect();
        ensure!(missing.is_empty(), "CAP_BPF missing: run kubelane monitor as root, or give it this capability");
        let places = Places::open(pin_path)?;
        let (states, rings) = (open(pin_path, "listener_states")?, open(pin_path, "listener_rings")?);
        let ring = new_ring(RING_BYTES)?;
        let inbox = Rc::<RefCell<Vec<Event>>>::default();
        let reader = reader(&ring, Rc::clone(&inbox))?;
        let slot = places.take(|slot| {
            let fd = ring.as_fd().as_raw_fd().to_ne_bytes();
            rings.update(&slot.to_ne_bytes(), &fd, MapFlags::ANY).context("cannot hand the ring to the programs")
        })?;
        let mut listening =
            Listening { places, slot, wanted, states, rings, before: Tally::default(), ring: reader, inbox };
        listening.before = listening.tally()?;
        listening.places.hold(slot, &wanted)?;
        Ok(listening)
    }

    /// Says that this listener is still there: at least once in [`LISTENER_STALE_S`] seconds, or nothing more is told.
    ///
    /// # Errors
    /// When the state has gone.
    pub fn hold(&self) -> Result<()> {
        self.places.hold(self.slot, &self.wanted)
    }

    /// A descriptor that is readable when much waits to be read.
    pub fn ring(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the ring's, which lives as long as what is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.ring.epoll_fd()) }
    }

    /// What was told since the last call, `most` events at most, in the order in which room was taken for them.
    ///
    /// # Errors
    /// When the ring cannot be read.
    pub fn read(&mut self, most: usize) -> Result<Vec<Event>> {
        let read = self.ring.consume_raw_n(most);
        if read < 0 {
            return Err(io::Error::from_raw_os_error(-read)).context("reading events");
        }
        Ok(std::mem::take(&mut *self.inbox.borrow_mut()))
    }

    /// # Errors
    /// When the kernel does not tell.
    pub fn tally(&self) -> Result<Tally> {
        let rows =
            self.states.lookup_percpu(&self.slot.to_ne_bytes(), MapFlags::ANY).context("reading what was lost")?;
        let mut tally = Tally::default();
        for row in rows.unwrap_or_default() {
            let state: State = bytemuck::try_pod_read_unaligned(&row)
                .map_err(|_| anyhow::anyhow!("the map \"listener_states\" has other rows: it is not this version's"))?;
            tally.told += state.told;
            tally.lost += state.lost;
            tally.limited += state.limited;
            tally.sampled += state.sampled;
        }
        let before = &self.before;
        Ok(Tally {
            told: tally.told - before.told,
            lost: tally.lost - before.lost,
            limited: tally.limited - before.limited,
            sampled: tally.sampled - before.sampled,
        })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        // Whoever cannot say that it goes is gone some seconds later.
        let _ = self.places.leave(self.slot);
        let _ = self.rings.delete(&self.slot.to_ne_bytes());
    }
}

/// Frees the places of listeners that were killed; how many they were.
///
/// # Errors
/// When the state cannot be read or written.
pub fn sweep_listeners(pin_path: &Path) -> Result<u32> {
    Places::open(pin_path)?.sweep()
}

fn open(pin_path: &Path, name: &str) -> Result<MapHandle> {
    let path = pinned::maps_directory(pin_path).join(name);
    MapHandle::from_pinned_path(&path).with_context(|| {
        format!("cannot open the pinned map {}; a daemon from before `kubelane monitor` has none", path.display())
    })
}

fn new_ring(bytes: u32) -> Result<MapHandle> {
    let options =
        libbpf_sys::bpf_map_create_opts { sz: size_of::<libbpf_sys::bpf_map_create_opts>() as _, ..Default::default() };
    let ring = MapHandle::create(MapType::RingBuf, Some("events"), 0, 0, bytes, &options);
    ring.context("cannot make a ring buffer")
}

/// Hears everything that programs tell on maps that nobody else has.
pub(super) struct Overheard {
    listening: MapHandle,
    ring: RingBuffer<'static>,
    inbox: Rc<RefCell<Vec<Event>>>,
}

impl Overheard {
    pub fn new(listening: MapHandle, rings: &MapHandle) -> Result<Overheard> {
        let ring = new_ring(RING_BYTES_OF_ONE)?;
        let inbox = Rc::<RefCell<Vec<Event>>>::default();
        let reader = reader(&ring, Rc::clone(&inbox))?;
        let fd = ring.as_fd().as_raw_fd().to_ne_bytes();
        rings.update(&[0; 4], &fd, MapFlags::ANY).context("cannot hand the ring to the programs")?;
        Ok(Overheard { listening, ring: reader, inbox })
    }

    /// What is told from now on, for [`LISTENER_STALE_S`] seconds.
    pub fn begin(&self) -> Result<()> {
        let mut all = Everybody { slots: 1, ..Everybody::zeroed() };
        all.listeners[0] = Listener { numbers: u64::MAX, heard_ns: now_ns()?, one_in: 1, ..Listener::zeroed() };
        self.listening.update(&[0; 4], bytemuck::bytes_of(&all), MapFlags::ANY).context("writing who listens")
    }

    pub fn take(&self) -> Result<Vec<Event>> {
        self.ring.consume().context("reading events")?;
        Ok(std::mem::take(&mut *self.inbox.borrow_mut()))
    }
}

fn now_ns() -> Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).context("cannot read the clock")?;
    Ok(now.tv_sec() as u64 * NANOSECONDS + now.tv_nsec() as u64)
}

fn reader(ring: &MapHandle, inbox: Rc<RefCell<Vec<Event>>>) -> Result<RingBuffer<'static>> {
    let mut builder = RingBufferBuilder::new();
    let take = move |bytes: &[u8]| {
        inbox.borrow_mut().extend(bytes.get(..size_of::<Event>()).map(bytemuck::pod_read_unaligned::<Event>));
        0
    };
    builder.add(ring, take).context("cannot read the ring")?;
    builder.build().context("cannot read the ring")
}

/// Who listens. One row for all, so that the programs find in one look whether anybody does.
struct Places {
    map: MapHandle,
    directory: PathBuf,
}

impl Places {
    fn open(pin_path: &Path) -> Result<Places> {
        Ok(Places { map: open(pin_path, "listening")?, directory: pinned::maps_directory(pin_path) })
    }

    /// A free place, for which `prepare` is called before anybody else may have it.
    fn take(&self, prepare: impl FnOnce(u32) -> Result<()>) -> Result<u32> {
        let mut taken = None;
        self.change(|all, now| {
            let slot = (0..LISTENERS).find(|slot| !all.is_held(*slot, now));
            let Some(slot) = slot else { bail!("{LISTENERS} listen already, and there is room for no more: end one") };
            prepare(slot)?;
            // Nothing is wanted yet.
            all.listeners[slot as usize] = Listener { heard_ns: now, ..Listener::zeroed() };
            all.slots |= 1 << slot;
            taken = Some(slot);
            Ok(())
        })?;
        taken.context("no place was taken")
    }

    fn hold(&self, slot: u32, wanted: &Wanted) -> Result<()> {
        self.change(|all, now| {
            all.listeners[slot as usize] = Listener {
                numbers: wanted.numbers,
                heard_ns: now,
                rate: if wanted.rate == 0 { 0 } else { wanted.rate.div_ceil(10) },
                one_in: wanted.one_in,
                protocol: wanted.protocol.into(),
                from: wanted.from.unwrap_or_default().0,
                to: wanted.to.unwrap_or_default().0,
                port_be: wanted.port.to_be_bytes(),
                has_from: wanted.from.is_some().into(),
                has_to: wanted.to.is_some().into(),
                zero: 0,
                unused: 0,
            };
            all.slots |= 1 << slot;
            Ok(())
        })
    }

    fn leave(&self, slot: u32) -> Result<()> {
        self.change(|all, _| {
            all.slots &= !(1 << slot);
            all.listeners[slot as usize] = Listener::zeroed();
            Ok(())
        })
    }

    /// Frees the places of those who are gone; how many they were.
    fn sweep(&self) -> Result<u32> {
        if self.read()?.slots == 0 {
            return Ok(0);
        }
        let mut gone = 0;
        self.change(|all, now| {
            let stale = (0..LISTENERS).filter(|slot| all.slots & (1 << slot) != 0 && !all.is_held(*slot, now));
            let stale: u32 = stale.map(|slot| 1 << slot).sum();
            gone = stale.count_ones();
            all.slots &= !stale;
            Ok(())
        })?;
        Ok(gone)
    }

    fn read(&self) -> Result<Everybody> {
        let row = self.map.lookup(&[0; 4], MapFlags::ANY).context("reading who listens")?.unwrap_or_default();
        bytemuck::try_pod_read_unaligned(&row)
            .map_err(|_| anyhow::anyhow!("the map \"listening\" has other rows: it is not this version's"))
    }

    /// Only one process at a time writes the row.
    fn change(&self, change: impl FnOnce(&mut Everybody, u64) -> Result<()>) -> Result<()> {
        let directory = File::open(&self.directory);
        let directory = directory.with_context(|| format!("cannot open {}", self.directory.display()))?;
        let lock = Flock::lock(directory, FlockArg::LockExclusive).map_err(|(_, error)| error);
        let _lock = lock.with_context(|| format!("cannot lock {}", self.directory.display()))?;
        let mut all = self.read()?;
        change(&mut all, now_ns()?)?;
        self.map.update(&[0; 4], bytemuck::bytes_of(&all), MapFlags::ANY).context("writing who listens")
    }
}

impl Everybody {
    fn is_held(&self, slot: u32, now: u64) -> bool {
        let listener = &self.listeners[slot as usize];
        let age = now.saturating_sub(listener.heard_ns);
        self.slots & (1 << slot) != 0 && age <= u64::from(LISTENER_STALE_S) * NANOSECONDS
    }
}
