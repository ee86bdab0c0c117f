//! Taking over from the former version, whose maps have other rows, while it serves.
//!
//! | step | what serves then |
//! |---|---|
//! | 1 maps that are the same in both are pinned here, too | the former programs |
//! | 2 the others are made and filled: filters, devices, flows | the former programs |
//! | 3 links move to this version's directory, and each gets this version's program, atomically | both: Services are in the same maps, and each has all flows up to step 2 |
//! | 4 flows that began between 2 and 3 follow | this version's programs |
//! | 5 the former directory goes, its map `frontends` first | this version's programs |
//!
//! As long as that map is pinned there, a start does all of this again; each step leaves alone what is done. Its removal is
//! the commit, one unlink(2). So a start may be killed at any point. What is lost: the handshake of a TCP connection from
//! outside that is under way at step 3 (its client asks again within a second), and the answer to an unconnected socket's
//! first datagram to a Service, likewise.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use libbpf_rs::{ErrorKind, Iter, Link, MapCore as _, MapFlags, MapHandle};

use super::devices::SharedPrograms;
use super::filter::WireFilter;
use super::former::{self, Former};
use super::namespaces::{self, Namespaces};
use super::probe::{self, SocketSearch};
use super::read::PinnedMap;
use super::reply_filter::ReplyFilter;
use super::{object, pinned};
use crate::abi::flow_class::{FLOW_CLASS_OTHER, FLOW_CLASS_TCP};
use crate::abi::flow_flag::{FLOW_PROVED, FLOW_REPLY};
use crate::abi::{DeviceAddresses, Flow, FlowKey4, Frontend, FrontendKey};
use crate::model::{Family, Ipx, Protocol};

/// An upgrade under way.
pub(super) struct Upgrade<'p> {
    former: Former,
    devices: Vec<(u32, DeviceAddresses)>,
    pin_path: &'p Path,
    flows: usize,
}

impl<'p> Upgrade<'p> {
    /// Step 1. `None`: no former version has left anything. Before the maps of this version are made.
    pub fn begin(pin_path: &'p Path) -> Result<Option<Upgrade<'p>>> {
        let Some(former) = Former::open(pin_path) else { return Ok(None) };
        former.share_maps(&pinned::maps_directory(pin_path))?;
        Ok(Some(Upgrade { former, devices: Vec::new(), pin_path, flows: 0 }))
    }

    /// Steps 2 and 3, up to the programs: whoever attaches them finds the links in their place.
    pub fn fill(&mut self) -> Result<()> {
        let name = self.former.name();
        let why = || format!("taking over from {name}");
        self.open_filters().with_context(why)?;
        let (devices, map) = (self.former.devices().with_context(why)?, self.map("devices")?);
        for (index, row) in &devices {
            map.update(&index.to_ne_bytes(), bytemuck::bytes_of(row), MapFlags::ANY).with_context(why)?;
        }
        self.devices = devices;
        self.copy_flows().context("copying the flows of an earlier version")?;
        self.carry_datagrams();
        self.move_links()
    }

    /// Step 3 of devices, and 4.
    pub fn finish(mut self, programs: &SharedPrograms) -> Result<()> {
        programs.take_over(&self.devices);
        self.carry_datagrams();
        self.copy_flows().context("copying the flows of an earlier version")?;
        self.former.close()?;
        tracing::info!(flows = self.flows / 2, "took over the state of map ABI {}", self.former.name());
        Ok(())
    }

    fn map(&self, name: &str) -> Result<MapHandle> {
        pinned::open_map(self.pin_path, name)
    }

    /// That of this version knows more.
    fn open_filters(&self) -> Result<()> {
        let (mut keys, mut rows) = (Vec::new(), Vec::new());
        PinnedMap::open(self.pin_path, "addresses")?.each(|address: [u8; 16], flags: u32| {
            keys.extend(address);
            rows.extend(flags.to_ne_bytes());
            Ok(())
        })?;
        let mut filter = WireFilter::open(self.pin_path)?;
        filter.add_addresses(&keys, &rows).context("writing wire_filter")?;
        keys.clear();
        rows.clear();
        PinnedMap::open(self.pin_path, "frontends")?.each(|key: FrontendKey, row: Frontend| {
            keys.extend(bytemuck::bytes_of(&key));
            rows.extend(bytemuck::bytes_of(&row));
            Ok(())
        })?;
        filter.add_frontends(&keys, &rows).context("writing wire_filter")?;
        Ok(())
    }

    /// Those that are not here yet. A flow that has begun here since is left alone. Proved ones all have room, as both versions
    /// have as much for them; of the others as many come along as fit.
    fn copy_flows(&mut self) -> Result<()> {
        let (flows4, flows6) = (self.map("flows4")?, self.map("flows6")?);
        let filter = ReplyFilter::open(&self.map("ports")?)?;
        let affine = former::affine_services(self.pin_path)?;
        let (mut proved, mut without_room) = ([0u64; 2], 0);
        let all = [self.former.flows(true, &affine)?, self.former.flows(false, &affine)?];
        for (key, flow) in all.into_iter().flatten() {
            filter.note_flow(&key, &flow);
            let created = match Ipx(key.ends.destination).family() {
                Family::Ipv4 => create(&flows4, bytemuck::bytes_of(&FlowKey4::from(key)), &flow)?,
                Family::Ipv6 => create(&flows6, bytemuck::bytes_of(&key), &flow)?,
            };
            match created {
                Created::Yes if !flow.has(FLOW_REPLY) && flow.has(FLOW_PROVED) => {
                    let is_tcp = key.protocol == Protocol::Tcp as u8;
                    proved[if is_tcp { FLOW_CLASS_TCP } else { FLOW_CLASS_OTHER } as usize] += 1;
                }
                Created::Yes | Created::WasThere => {}
                Created::NoRoom => without_room += 1,
            }
            self.flows += usize::from(created == Created::Yes);
        }
        if without_room > 0 {
            tracing::warn!("{without_room} entries of flows found no room: these begin anew");
        }
        let counts = self.map("flow_counts")?;
        for (class, added) in (0u32..).zip(proved).filter(|(_, added)| *added > 0) {
            let key = class.to_ne_bytes();
            let before = counts.lookup(&key, MapFlags::ANY)?.unwrap_or_default();
            let before = before.try_into().map(u64::from_ne_bytes).unwrap_or(0);
            counts.update(&key, &(before + added).to_ne_bytes(), MapFlags::ANY)?;
        }
        Ok(())
    }

    /// What each unconnected socket has sent to, and where that went. Kernels from before 5.11 have no way.
    fn carry_datagrams(&self) {
        let tables = pinned::maps_directory(self.pin_path).join("datagram_tables");
        let load = |program| object::load_carrier(program, &self.former.datagram_tables()?, &tables);
        let run = |link: &Link| -> Result<()> {
            std::io::copy(&mut Iter::new(link)?, &mut std::io::sink()).context("walking the sockets")?;
            Ok(())
        };
        let carry = || match probe::socket_search() {
            SocketSearch::Origins => run(&load(object::CARRY_OF_MAP)?),
            SocketSearch::Namespaces => {
                let link = load(object::CARRY_OF_NAMESPACE)?;
                let Namespaces { handles, mut hidden } = namespaces::all();
                for handle in handles.values() {
                    match namespaces::run_inside(handle, || run(&link)) {
                        Ok(result) => result?,
                        // It may have gone with its last process.
                        Err(_) => hidden += usize::from(handle.exists()),
                    }
                }
                if hidden > 0 {
                    tracing::warn!(
                        "unconnected UDP sockets in {hidden} network namespaces, which cannot be entered, lose the \
                         answers to what they have just sent"
                    );
                }
                Ok(())
            }
            SocketSearch::None => bail!("this kernel lets no program look at sockets"),
        };
        if let Err(error) = carry() {
            tracing::warn!(
                "unconnected UDP sockets lose the answers to what they have just sent: their records of an earlier \
                 version cannot be read: {error:#}"
            );
        }
    }

    fn move_links(&self) -> Result<()> {
        let links = pinned::links_directory(self.pin_path);
        let former = self.former.links();
        if !former.exists() {
            return Ok(());
        }
        for pin in pinned::children(&former)? {
            let to = links.join(pin.file_name().unwrap_or_default());
            if !to.exists() {
                fs::rename(&pin, &to)
                    .with_context(|| format!("cannot rename {} to {}", pin.display(), to.display()))?;
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Created {
    Yes,
    WasThere,
    NoRoom,
}

fn create(map: &MapHandle, key: &[u8], flow: &Flow) -> Result<Created> {
    let Err(error) = map.update(key, bytemuck::bytes_of(flow), MapFlags::NO_EXIST) else { return Ok(Created::Yes) };
    match error.kind() {
        ErrorKind::AlreadyExists => Ok(Created::WasThere),
        ErrorKind::TooBig => Ok(Created::NoRoom),
        _ => Err(error).context("writing a flow"),
    }
}
