//! Maps that are nowhere: the core keeps every row that it has written, which is all that a comparison needs.

use std::io;

use crate::sync::{Failure, MapIo, MapName};

/// Takes every row, up to what the daemon's maps would hold.
#[derive(Clone, Copy, Debug)]
pub struct Nowhere {
    /// By [`MapName`].
    pub capacity: [u32; MapName::ALL.len()],
}

impl MapIo for Nowhere {
    fn write(&mut self, _map: MapName, _keys: &[u8], _values: &[u8], _rows: usize) -> Vec<Failure> {
        Vec::new()
    }

    fn delete(&mut self, _map: MapName, _keys: &[u8], _rows: usize) -> Vec<Failure> {
        Vec::new()
    }

    fn dump(&mut self, _map: MapName, _each: &mut dyn FnMut(&[u8], &[u8])) -> io::Result<()> {
        Ok(())
    }

    fn note_new_owners(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn capacity(&self, map: MapName) -> u32 {
        self.capacity[map as usize]
    }
}
