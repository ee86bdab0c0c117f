//! Maps in memory that cost next to nothing, so that what is measured is the daemon's own work.

use std::io;

use kubelane::sync::{Failure, MapIo, MapName};

/// Takes every row. Keeps a sum of the bytes, so that making them cannot be optimised away.
#[derive(Debug, Default)]
pub struct Memory {
    sum: u64,
}

impl Memory {
    fn take(&mut self, bytes: &[u8]) {
        self.sum = bytes.iter().fold(self.sum, |sum, byte| sum.wrapping_add(u64::from(*byte)));
    }
}

impl MapIo for Memory {
    fn write(&mut self, _: MapName, keys: &[u8], values: &[u8], _: usize) -> Vec<Failure> {
        self.take(keys);
        self.take(values);
        Vec::new()
    }

    fn delete(&mut self, _: MapName, keys: &[u8], _: usize) -> Vec<Failure> {
        self.take(keys);
        Vec::new()
    }

    fn dump(&mut self, _: MapName, _: &mut dyn FnMut(&[u8], &[u8])) -> io::Result<()> {
        Ok(())
    }

    /// As `kubelane run` sizes the maps by default.
    fn note_new_owners(&mut self) -> std::io::Result<()> {
        Ok(())
    }

    fn capacity(&self, map: MapName) -> u32 {
        match map {
            MapName::Services | MapName::Addresses | MapName::SourceRanges => 131_072,
            MapName::Backends | MapName::Frontends => 262_144,
            MapName::Slots => 1_048_576,
        }
    }
}
