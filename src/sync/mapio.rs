//! The door to the kernel: everything above it works the same on real maps and on the tests' model of them.

use std::io;

/// The maps that the daemon fills, named as in bpf/. Keys and values are the bytes of the `abi` structs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum MapName {
    /// u32 service id -> `abi::ServiceName` (hash).
    Services,
    /// u32 backend id -> `abi::Backend` (array).
    Backends,
    /// u32 index -> u32 backend id (array).
    Slots,
    /// `abi::FrontendKey` -> `abi::Frontend` (hash).
    Frontends,
    /// 16 address bytes -> u32 bits of `abi::address_flag` (hash).
    Addresses,
    /// `abi::SourceRangeKey` -> u32, 1 (trie).
    SourceRanges,
}

impl MapName {
    pub const ALL: [MapName; 6] = [
        MapName::Services,
        MapName::Backends,
        MapName::Slots,
        MapName::Frontends,
        MapName::Addresses,
        MapName::SourceRanges,
    ];

    /// The map's name in the BPF object and in the pin directory.
    pub fn as_str(self) -> &'static str {
        match self {
            MapName::Services => "services",
            MapName::Backends => "backends",
            MapName::Slots => "slots",
            MapName::Frontends => "frontends",
            MapName::Addresses => "addresses",
            MapName::SourceRanges => "source_ranges",
        }
    }
}

/// A row that the kernel did not take.
#[derive(Debug)]
pub struct Failure {
    /// Index of the row in the call.
    pub row: usize,
    /// ENOSPC/E2BIG: the map is full. ENOMEM, EPERM and others as bpf(2) says.
    pub error: io::Error,
}

impl Failure {
    /// The map has no room for the row: hash maps say E2BIG, tries ENOSPC.
    pub fn is_full(&self) -> bool {
        matches!(self.error.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC))
    }

    /// The kernel's words, and what to do about it.
    pub fn reason(&self) -> String {
        let error = &self.error;
        match error.raw_os_error() {
            Some(libc::ENOMEM) => format!(
                "{error}: the memory limit of the container whose daemon created the maps, to which their entries are \
                 charged, is reached, or the node has no memory; raise the one or free the other"
            ),
            _ => error.to_string(),
        }
    }
}

/// Reads and writes the kernel's maps. Rows of one call are independent: each succeeds or fails alone, and rows that
/// are not in the returned list were written.
pub trait MapIo {
    /// Inserts or replaces `rows` rows; `keys` and `values` are the rows' bytes one after another.
    fn write(&mut self, map: MapName, keys: &[u8], values: &[u8], rows: usize) -> Vec<Failure>;

    /// Deletes `rows` rows of a hash map. A key that is not there counts as deleted.
    fn delete(&mut self, map: MapName, keys: &[u8], rows: usize) -> Vec<Failure>;

    /// Calls `each(key, value)` for every row; rows of array maps whose value is all zeros are left out. Fails rather
    /// than ending early: an incomplete dump is never taken for the whole.
    fn dump(&mut self, map: MapName, each: &mut dyn FnMut(&[u8], &[u8])) -> io::Result<()>;

    /// As [`MapIo::dump`], of the first `rows` rows of an array only.
    fn dump_first(&mut self, map: MapName, rows: u32, each: &mut dyn FnMut(&[u8], &[u8])) -> io::Result<()> {
        self.dump(map, &mut |key, value| {
            if key.try_into().is_ok_and(|key| u32::from_ne_bytes(key) < rows) {
                each(key, value);
            }
        })
    }

    /// One row, or `None`; of an array, a row of zeros is none.
    fn read(&mut self, map: MapName, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let mut found = None;
        self.dump(map, &mut |each, value| {
            if each == key {
                found = Some(value.to_vec());
            }
        })?;
        Ok(found)
    }

    /// Tells the packet programs that frontends of UDP or SCTP, already written, have become another Service's: flows
    /// that ask for them are looked at again.
    fn note_new_owners(&mut self) -> io::Result<()>;

    /// These maps are about to have so many rows; of arrays, the largest index and one. Who makes room for that as it
    /// is needed does so now, or says why not: rows that do not fit then fail.
    fn reserve(&mut self, _rows: &[(MapName, usize)]) {}

    /// How many rows the map may have at most.
    fn capacity(&self, map: MapName) -> u32;

    /// How many rows it has room for now.
    fn size(&self, map: MapName) -> u32 {
        self.capacity(map)
    }
}
