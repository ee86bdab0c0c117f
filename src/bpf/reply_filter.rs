//! Renewing the filter by which what leaves is told that answers nobody (`replies` of the map `ports`). Programs set bytes
//! in it and never clear any, so that on a node with many clients it would let everything pass in the end.
//!
//! There are two: programs set bytes in both and read one. The other is cleared, gets what the flows need that there are,
//! and is read from then on. A flow that begins meanwhile has its row before its bytes are set; so either the search for
//! rows, which begins after the clearing, finds it, or its byte was set after the clearing. A daemon that ends in between
//! leaves the one that is read as it was, and of two daemons at once the one that began last has the say.

use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use libbpf_rs::{MapCore, MapHandle};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::abi::flow_flag::FLOW_REPLY;
use crate::abi::reply_filter_size::REPLY_FILTER_SIZE;
use crate::abi::{Flow, FlowKey, reply_index};

/// `struct port_table`: bytes before the filters, and all of them.
const FILTERS_AT: usize = 65_536;
const FILTER: usize = REPLY_FILTER_SIZE as usize;
const READ_AT: usize = FILTERS_AT + 2 * FILTER;
const SIZE: usize = READ_AT + 4;

pub(super) struct ReplyFilter {
    /// The map's only value, SIZE bytes that programs write beside this.
    table: NonNull<AtomicU8>,
    /// `replies_read` since this daemon last began.
    begun: u32,
}

// SAFETY: The memory is reached by atomic operations only, and belongs to no thread.
unsafe impl Send for ReplyFilter {}

impl ReplyFilter {
    /// # Errors
    /// When the map is of another size, or cannot be mapped.
    pub fn open(ports: &MapHandle) -> Result<ReplyFilter> {
        ensure!(ports.value_size() as usize == SIZE, "the map ports has rows of {} bytes", ports.value_size());
        let length = NonZeroUsize::new(SIZE).context("a table has a size")?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: A new mapping, at an address of the kernel's choice, of a map whose value is SIZE bytes long.
        let memory = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, ports.as_fd(), 0) };
        Ok(ReplyFilter { table: memory.context("cannot map the map ports")?.cast(), begun: 0 })
    }

    fn bytes(&self) -> &[AtomicU8] {
        // SAFETY: SIZE bytes are mapped until this is dropped, and written by atomic operations here; programs store bytes.
        unsafe { std::slice::from_raw_parts(self.table.as_ptr(), SIZE) }
    }

    /// `replies_read`: which of the filters is read, and above that bit how often a renewal has begun.
    fn state(&self) -> &AtomicU32 {
        // SAFETY: READ_AT is a multiple of four, and the mapping begins at a page.
        unsafe { self.table.byte_add(READ_AT).cast().as_ref() }
    }

    /// The one that was not read when this daemon began.
    fn other(&self) -> &[AtomicU8] {
        let other = (self.begun & 1) ^ 1;
        &self.bytes()[FILTERS_AT + other as usize * FILTER..][..FILTER]
    }

    /// Clears the one that is not read.
    pub fn begin(&mut self) {
        self.begun = self.state().fetch_add(2, Ordering::SeqCst).wrapping_add(2);
        for byte in self.other() {
            byte.store(0, Ordering::Relaxed);
        }
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    /// Answers with this key will pass it. `key`: of a packet that leaves, a row's whose packets are met at egress.
    pub fn note(&self, key: &FlowKey) {
        let ends = &key.ends;
        self.other()[reply_index(&ends.source, &ends.destination, ends.source_port_be)].store(1, Ordering::Relaxed);
    }

    /// Packets of this row will be looked at, by whichever filter is read: as the program that begins a flow sees to it.
    pub fn note_flow(&self, key: &FlowKey, flow: &Flow) {
        let ends = &key.ends;
        if flow.is_at_egress() {
            let index = reply_index(&ends.source, &ends.destination, ends.source_port_be);
            for filter in 0..2 {
                self.bytes()[FILTERS_AT + filter * FILTER + index].store(1, Ordering::Relaxed);
            }
        } else if flow.has(FLOW_REPLY) {
            self.bytes()[usize::from(u16::from_be_bytes(ends.destination_port_be))].store(1, Ordering::Relaxed);
        }
    }

    /// All rows were seen since [`begin`](Self::begin): from now on the other one is read, unless another daemon has begun
    /// meanwhile, and perhaps cleared what was noted here.
    pub fn finish(&self) {
        let ended = self.begun ^ 1;
        let _ = self.state().compare_exchange(self.begun, ended, Ordering::SeqCst, Ordering::SeqCst);
    }
}

impl Drop for ReplyFilter {
    fn drop(&mut self) {
        // SAFETY: Mapped in open() with this length, and not used afterwards.
        let unmapped = unsafe { munmap(self.table.cast(), SIZE) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}
