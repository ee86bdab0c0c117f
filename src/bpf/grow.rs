//! Giving full maps more room while everything goes on.
//!
//! A kernel map has the size that it was made with. So a larger one is made beside it, with the same rows, and with it a new
//! generation of the programs, which differ from the running ones in these maps only: flows, affinities, counters and all
//! that sockets remember are in maps that both share.
//!
//! The larger maps take the names of the smaller ones, and then link by link gets its new program, each atomically. The
//! daemon writes nothing meanwhile. Both generations hold the same rows, so that packets and sockets are served alike by
//! either, links may be swapped in any order, and a daemon that is killed at any point leaves nothing to finish or to undo:
//! whatever maps the pins lead the next one to, their rows are these. (A program that could not be replaced, because
//! somebody has just taken it off for instance, is attached anew by the next look at the attachments.)

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use libbpf_rs::skel::{OpenSkel as _, Skel as _};
use libbpf_rs::{MapCore as _, MapFlags, MapHandle, MapType};

use super::attach::SocketHooks;
use super::batch::{self, Batches};
use super::devices::{Programs, SharedPrograms};
use super::flows::SharedProgram;
use super::link;
use super::object::{Loader, btf_stand_in, collecting_program, made_maps};
use super::pins::Pins;
use super::signals::uninterrupted;
use super::skeleton::KubelaneSkel;
use super::stale::StaleSockets;
use crate::sync::MapName;

/// Rows in one system call.
const ROWS_AT_ONCE: usize = 4096;
/// After a failure. To load the programs takes a good part of a second.
const RETRY: Duration = Duration::from_secs(30);

/// Everything that leads to the maps that grow.
pub(super) struct Grower {
    pub loader: Loader,
    pub pins: Pins,
    /// All maps of the object by name, but for its constants.
    pub maps: HashMap<String, MapHandle>,
    pub hooks: SocketHooks,
    pub devices: SharedPrograms,
    pub stale: Option<StaleSockets>,
    pub flow_collect: SharedProgram,
    /// Where maps are pinned.
    pub directory: PathBuf,
    pub retry_at: Option<Instant>,
}

/// Every map that programs share with those of the next generation.
pub(super) fn shared_maps(skeleton: &KubelaneSkel<'_>) -> Result<HashMap<String, MapHandle>> {
    let mut maps = HashMap::new();
    for (name, map) in made_maps(skeleton.object()) {
        // ".rodata" is each generation's own.
        if !name.contains('.') {
            maps.insert(name, MapHandle::try_from(&map).context("cannot keep a map")?);
        }
    }
    Ok(maps)
}

impl Grower {
    /// Whether the last failure is long enough ago.
    pub fn is_due(&self) -> bool {
        self.retry_at.is_none_or(|at| Instant::now() >= at)
    }

    /// Gives these maps so many rows. Answers handles on the new ones.
    ///
    /// # Errors
    /// Of the kernel; nothing has changed then.
    pub fn grow(&mut self, sizes: &[(MapName, u32)]) -> Result<Vec<(MapName, MapHandle)>> {
        let grown = self.try_to_grow(sizes);
        self.retry_at = grown.is_err().then(|| Instant::now() + RETRY);
        grown
    }

    fn try_to_grow(&mut self, sizes: &[(MapName, u32)]) -> Result<Vec<(MapName, MapHandle)>> {
        let mut storage = MaybeUninit::uninit();
        let btf = btf_stand_in()?;
        let mut skeleton = self.loader.open(&mut storage, btf.as_ref())?;
        for mut map in skeleton.open_object_mut().maps_mut() {
            let name = map.name().to_string_lossy().into_owned();
            match (sizes.iter().find(|(map, _)| map.as_str() == name), self.maps.get(&name)) {
                (Some((_, size)), _) => map.set_max_entries(*size).with_context(|| format!("sizing the map {name}"))?,
                (None, Some(shared)) => {
                    map.reuse_fd(shared.as_fd()).with_context(|| format!("sharing the map {name}"))?;
                }
                (None, None) => {}
            }
        }
        let skeleton = uninterrupted(|| skeleton.load()).context("loading the programs once more")?;
        let mut grown = Vec::new();
        for (name, _) in sizes {
            let made = skeleton.object().maps().find(|map| map.name() == name.as_str());
            let new = MapHandle::try_from(&made.context("the BPF object lacks a map")?).context("cannot keep a map")?;
            let old = self.maps.get(name.as_str()).context("no such map")?;
            copy(old, &new).with_context(|| format!("copying the map {}", name.as_str()))?;
            grown.push((*name, new));
        }
        let (hooks, devices) = (self.hooks.successors(&skeleton)?, Programs::new(&skeleton)?);
        let iterators = self.loader.iterators(&skeleton)?;
        let second = |map: &MapHandle| Ok((MapHandle::try_from(map)?, map.as_fd().try_clone_to_owned()?));
        let handles =
            grown.iter().map(|(_, map)| second(map)).collect::<Result<Vec<_>>>().context("cannot keep a map")?;
        let flow_collect = collecting_program(&skeleton)?;
        self.pin(&grown)?;
        // From here on nothing fails that has to be undone.
        self.hooks.replace(hooks);
        self.devices.replace(devices);
        *self.flow_collect.lock().unwrap_or_else(PoisonError::into_inner) = flow_collect;
        if let (Some(stale), Some((iterators, unserved))) = (&self.stale, iterators) {
            stale.replace(iterators, unserved);
        }
        for ((name, _), (shared, held)) in grown.iter().zip(handles) {
            self.maps.insert(name.as_str().to_owned(), shared);
            self.pins.exchange(name.as_str(), held);
        }
        Ok(grown)
    }

    /// Pins the larger maps in the place of the smaller ones, or leaves these there.
    fn pin(&self, grown: &[(MapName, MapHandle)]) -> Result<()> {
        let path = |name: &MapName| self.directory.join(name.as_str());
        let pinned = grown.iter().try_for_each(|(name, map)| link::pin(map.as_fd(), &path(name)));
        if pinned.is_err() {
            let old = |name: &MapName| self.maps.get(name.as_str());
            for (name, map) in grown.iter().filter_map(|(name, _)| Some((name, old(name)?))) {
                link::pin(map.as_fd(), &path(name)).with_context(|| {
                    format!("{} leads to a map that nobody uses: restart kubelane", path(name).display())
                })?;
            }
        }
        pinned
    }
}

/// The rows of `from`; `to` is empty. Rows of zeros are none in an array.
fn copy(from: &MapHandle, to: &MapHandle) -> Result<()> {
    if from.map_type() == MapType::LpmTrie {
        batch::each_by_key(from, |key, value| to.update(key, value, MapFlags::ANY).map_err(io::Error::other))?;
        return Ok(());
    }
    let is_array = from.map_type() == MapType::Array;
    let (mut batches, mut keys, mut values) = (Batches::new(from), Vec::new(), Vec::new());
    loop {
        let batch = batches.next(from, ROWS_AT_ONCE)?;
        keys.clear();
        values.clear();
        for (key, value) in batch.rows().filter(|(_, value)| !is_array || value.iter().any(|byte| *byte != 0)) {
            keys.extend_from_slice(key);
            values.extend_from_slice(value);
        }
        let rows = keys.len() / from.key_size() as usize;
        if rows > 0
            && let (written, Some(error)) = batch::write(to, &keys, &values, rows)
        {
            return Err(error).with_context(|| format!("{written} of {rows} rows written"));
        }
        if batch.ended {
            return Ok(());
        }
    }
}
