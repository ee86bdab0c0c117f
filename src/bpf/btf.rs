//! Loading the object on a kernel without BTF (CONFIG_DEBUG_INFO_BTF).
//!
//! One program, the socket iterator, is relocated against the kernel's BTF. libbpf refuses the whole object when there
//! is none, even if that program is not to be loaded; told to relocate against a file, it looks at what is loaded only.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use nix::sys::memfd::{MFdFlags, memfd_create};

/// linux/btf.h: struct btf_header (magic, version, flags, length 24; no types; strings of one byte), and that byte.
const EMPTY: [u32; 7] = [0x0001_eb9f, 24, 0, 0, 0, 1, 0];

/// A BTF file that describes nothing, for as long as it lives.
pub(super) struct EmptyBtf(OwnedFd);

impl EmptyBtf {
    pub fn new() -> io::Result<EmptyBtf> {
        let file = memfd_create("empty-btf", MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::write(&file, &bytemuck::cast_slice(&EMPTY)[..25])?;
        Ok(EmptyBtf(file))
    }

    /// Where this process finds it.
    pub fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }
}
