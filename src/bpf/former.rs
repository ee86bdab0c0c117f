//! The former map ABI, v2: what an upgrade finds, as this version would have written it.
//!
//! Rows of Services, affinities and connected sockets are the same bytes in both, so that both versions use the same maps.
//! Flows are translated, one by one.

use std::fs;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use bytemuck::{Pod, Zeroable};
use libbpf_rs::{MapCore as _, MapHandle};

use super::batch::Batches;
use super::{link, pinned};
use crate::abi::flow_flag::{FLOW_AFFINE, FLOW_FIN, FLOW_FIN_FIRST, FLOW_PROVED, FLOW_REPLY, FLOW_RESET};
use crate::abi::flow_path::PATH_ROUTED;
use crate::abi::flow_state::{FLOW_SECOND_MASK, FLOW_SECOND_SHIFT};
use crate::abi::{DeviceAddresses, Ends, Flow, FlowKey, Frontend, FrontendKey};
use crate::model::Protocol;
use crate::table::HashSet;

/// Its directory below the pin path.
const NAME: &str = "v2";
/// Maps with the same rows in both. `source_ranges` and the hash maps may be of any size.
const SAME: [&str; 8] =
    ["services", "backends", "slots", "frontends", "addresses", "source_ranges", "affinities", "socket_origins"];
const ROWS_AT_ONCE: usize = 4096;
const NANOSECONDS: u64 = 1_000_000_000;

/// `enum flow_kind`.
const REPLY: u8 = 1;
const FORWARDED: u8 = 4;

/// `struct flow`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(super) struct FormerFlow {
    ends: Ends,
    kind: u8,
    replied: u8,
    client_closed: u8,
    backend_closed: u8,
    backend_first: u8,
    reset: u8,
    zero: u16,
    backend_id: u32,
    generation: u32,
    service_id: u32,
    interface: u32,
    /// Of TCP, until proved: the sequence number of the backend's last packet.
    stamp: u32,
    used_ns: u64,
    hop: [u32; 8],
}

/// `struct device`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct FormerDevice {
    ip4: [u8; 16],
    ip6: [u8; 16],
    is_bare: u32,
}

const _: () = assert!(size_of::<FormerFlow>() == 104 && size_of::<FormerDevice>() == 36);

/// The state that a daemon of that version has left.
pub(super) struct Former {
    directory: PathBuf,
}

impl Former {
    /// `None`: there is none.
    pub fn open(pin_path: &Path) -> Option<Former> {
        let former = Former { directory: pin_path.join(NAME) };
        former.mark().exists().then_some(former)
    }

    /// As long as this is pinned there is something to take over.
    fn mark(&self) -> PathBuf {
        self.directory.join("maps").join("frontends")
    }

    /// All of it has been taken over: what is left is only to be removed, in whatever order.
    pub fn close(&self) -> Result<()> {
        let mark = self.mark();
        fs::remove_file(&mark).with_context(|| format!("cannot remove {}", mark.display()))
    }

    pub fn name(&self) -> &'static str {
        NAME
    }

    pub fn links(&self) -> PathBuf {
        self.directory.join("links")
    }

    fn map(&self, name: &str) -> Result<MapHandle> {
        pinned::open_map_at(&self.directory.join("maps").join(name))
    }

    /// Pins the maps that both versions have in `directory`, where there is none of that name yet.
    pub fn share_maps(&self, directory: &Path) -> Result<()> {
        for name in SAME {
            let path = directory.join(name);
            if !path.exists() {
                link::pin(self.map(name)?.as_fd(), &path)?;
            }
        }
        Ok(())
    }

    /// The rows of devices, by interface index.
    pub fn devices(&self) -> Result<Vec<(u32, DeviceAddresses)>> {
        let mut devices = Vec::new();
        each(&self.map("devices")?, |index: u32, row: FormerDevice| {
            // rp_filter as in that version, which did not look at it; the daemon writes the row anew soon.
            devices.push((index, DeviceAddresses { ip4: row.ip4, ip6: row.ip6, is_bare: row.is_bare, rp_filter: 0 }));
        })?;
        Ok(devices)
    }

    /// What unconnected datagram sockets remember.
    pub fn datagram_tables(&self) -> Result<MapHandle> {
        self.map("datagram_tables")
    }

    /// The flows that both ends have proved, or all others that can go on: replies' rows first, as the programs make them.
    pub fn flows(&self, is_proved: bool, affine: &HashSet<u32>) -> Result<Vec<(FlowKey, Flow)>> {
        let mut flows = Vec::new();
        each(&self.map(if is_proved { "flows" } else { "new_flows" })?, |key: FlowKey, row: FormerFlow| {
            let flow = translate(&key, &row, is_proved, affine.contains(&row.service_id));
            flows.extend(flow.map(|flow| (key, flow)));
        })?;
        flows.sort_by_key(|(_, flow)| !flow.has(FLOW_REPLY));
        Ok(flows)
    }
}

/// Ids of Services that remember their clients.
pub(super) fn affine_services(pin_path: &Path) -> Result<HashSet<u32>> {
    let map = pinned::open_map(pin_path, "frontends")?;
    let mut affine = HashSet::default();
    each(&map, |_: FrontendKey, row: Frontend| {
        if row.affinity_seconds > 0 {
            affine.insert(row.service_id);
        }
    })?;
    Ok(affine)
}

/// One row. Sequence numbers were not remembered: 0 stands for that. A TCP connection that its backend has not answered is
/// left out: what it would be told by is not known, and its client asks again within a second.
fn translate(key: &FlowKey, row: &FormerFlow, is_proved: bool, is_affine: bool) -> Option<Flow> {
    let is_tcp = key.protocol == Protocol::Tcp as u8;
    let is_answered = is_proved || row.replied != 0;
    if is_tcp && !is_answered {
        return None;
    }
    let is_reply = row.kind & REPLY != 0;
    let second = (row.used_ns / NANOSECONDS) as u32 & FLOW_SECOND_MASK;
    let flags = [
        (FLOW_REPLY, is_reply),
        (PATH_ROUTED, row.kind & FORWARDED != 0),
        (FLOW_PROVED, if is_reply { is_answered } else { is_proved }),
        (FLOW_FIN, if is_reply { row.backend_closed != 0 } else { row.client_closed != 0 }),
        (FLOW_FIN_FIRST, is_reply && row.backend_first != 0),
        (FLOW_RESET, !is_reply && row.reset != 0),
        (FLOW_AFFINE, !is_reply && is_affine),
    ];
    let flags = flags.into_iter().filter(|(_, is_set)| *is_set).fold(0, |flags, (flag, _)| flags | flag);
    let (backend_or_first, generation_or_interface) = match (is_reply, is_tcp) {
        (false, _) => (row.backend_id, row.generation),
        (true, true) => (row.stamp, row.interface),
        (true, false) => (second, row.interface),
    };
    Some(Flow {
        ends: row.ends,
        change: Flow::change_of(&key.ends, &row.ends),
        state: second << FLOW_SECOND_SHIFT | flags,
        sequence: 0,
        backend_or_first,
        generation_or_interface,
    })
}

fn each<K: Pod, V: Pod>(map: &MapHandle, mut each: impl FnMut(K, V)) -> Result<()> {
    if (map.key_size(), map.value_size()) != (size_of::<K>() as u32, size_of::<V>() as u32) {
        bail!("a map of {NAME} has rows of another size");
    }
    let mut batches = Batches::new(map);
    loop {
        let batch = batches.next(map, ROWS_AT_ONCE).context("reading a map of the former version")?;
        for (key, value) in batch.rows() {
            each(bytemuck::pod_read_unaligned(key), bytemuck::pod_read_unaligned(value));
        }
        if batch.ended {
            return Ok(());
        }
    }
}
