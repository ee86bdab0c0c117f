//! What is attached, and what the programs were configured with, as the kernel knows it: that is in no pinned map, and the
//! daemon may be down.

use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use libbpf_rs::query::{ProgInfoIter, ProgInfoQueryOptions, ProgramInfo};
use libbpf_rs::{Link, MapCore as _, MapFlags, MapHandle, Program};

use super::pinned;
use super::skeleton::{OpenKubelaneSkel, types};

/// What is pinned as an attachment.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// Of the pin.
    pub name: String,
    /// `None`: a filter's program, or what cannot be opened.
    pub link_id: Option<u32>,
    pub program_id: Option<u32>,
}

/// All attachments pinned below `pin_path`, by name.
///
/// # Errors
/// When nothing is pinned there.
pub fn attachments(pin_path: &Path) -> Result<Vec<Attachment>> {
    pinned::expect_state(pin_path)?;
    let pins = pinned::children(&pinned::links_directory(pin_path))?;
    let read = |pin: &PathBuf| {
        let name = pin.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("filter_") {
            // A program: asked for as a link, the kernel would tell of it all the same, and be misread.
            let program = Program::fd_from_pinned_path(pin).ok();
            let program_id = program.and_then(|program| Program::id_from_fd(program.as_fd()).ok());
            return Attachment { name, link_id: None, program_id };
        }
        let info = Link::open(pin).ok().and_then(|link| link.info().ok());
        Attachment {
            name,
            link_id: info.as_ref().map(|info| info.id),
            program_id: info.as_ref().map(|info| info.prog_id),
        }
    };
    Ok(pins.iter().map(read).collect())
}

/// A program that is attached.
pub(super) struct AttachedProgram {
    /// The kernel's hash of its instructions.
    pub tag: [u8; 8],
    /// The object's read-only data, which all its programs share.
    rodata: Vec<u8>,
}

/// What the daemon was told that changes verdicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Configuration {
    /// Cluster IPs serve clients outside.
    pub external_cluster_ips: bool,
    /// Programs are on pods' devices.
    pub has_pod_devices: bool,
    /// Sockets of pods are left alone.
    pub host_sockets_only: bool,
}

impl Default for Configuration {
    fn default() -> Self {
        Configuration { external_cluster_ips: false, has_pod_devices: true, host_sockets_only: false }
    }
}

/// Of the programs pinned below `pin_path`. `None`: none is attached.
///
/// # Errors
/// When nothing is pinned there, the kernel refuses, or they are another version's.
pub fn configuration(pin_path: &Path) -> Result<Option<Configuration>> {
    let Some(attached) = attached(pin_path, "")? else { return Ok(None) };
    let config = attached.rodata()?.config;
    Ok(Some(Configuration {
        external_cluster_ips: config.external_cluster_ips != 0,
        has_pod_devices: config.has_pod_devices != 0,
        host_sockets_only: config.host_sockets_only != 0,
    }))
}

/// Any pinned program whose name begins with `name`, of which the kernel keeps 15 bytes.
pub(super) fn attached(pin_path: &Path, name: &str) -> Result<Option<AttachedProgram>> {
    let mut pinned: Vec<u32> = attachments(pin_path)?.iter().filter_map(|link| link.program_id).collect();
    pinned.sort_unstable();
    let name = name.get(..15).unwrap_or(name);
    let options = ProgInfoQueryOptions::default().include_map_ids(true);
    let is_it = |program: &ProgramInfo| {
        pinned.binary_search(&program.id).is_ok() && program.name.to_string_lossy().starts_with(name)
    };
    let mut is_visible = false;
    let mut all = ProgInfoIter::with_query_opts(options).inspect(|_| is_visible = true);
    let Some(program) = all.find(is_it) else {
        ensure!(is_visible || pinned.is_empty(), "the kernel does not show its programs: CAP_SYS_ADMIN is missing");
        return Ok(None);
    };
    for id in &program.map_ids {
        let Ok(map) = MapHandle::from_map_id(*id) else { continue };
        if map.name().to_string_lossy().ends_with(".rodata") {
            let rodata = map.lookup(&[0; 4], MapFlags::ANY).context("cannot read the programs' configuration")?;
            return Ok(Some(AttachedProgram { tag: program.tag.0, rodata: rodata.unwrap_or_default() }));
        }
    }
    bail!("the program {} has no configuration: it is not kubelane's", program.id)
}

impl AttachedProgram {
    fn rodata(&self) -> Result<types::rodata> {
        ensure!(
            self.rodata.len() >= size_of::<types::rodata>(),
            "the programs that are attached are another version's: use the binary of the daemon that attached them"
        );
        // SAFETY: the bytes are as many as are read, and all are values of the integers that the data is made of.
        Ok(unsafe { std::ptr::read_unaligned(self.rodata.as_ptr().cast::<types::rodata>()) })
    }

    /// Gives a second object the same configuration.
    pub fn configure(&self, skeleton: &mut OpenKubelaneSkel<'_>) -> Result<()> {
        let rodata = skeleton.maps.rodata_data.as_deref_mut().context("the BPF object has no read-only data")?;
        *rodata = self.rodata()?;
        // The counts are the daemon's own, in a map that is not pinned.
        rodata.config.counts_services = 0;
        rodata.config.counts_traffic = 0;
        Ok(())
    }
}
