//! Drift: rows in the kernel that are not what was written, because somebody else wrote them or took them away.
//!
//! An audit takes a [`Snapshot`] of a map's table and compares it with the kernel's rows elsewhere, while the owner of
//! the table goes on. What differs may be a change that was made meanwhile; only [`correct`], which reads these rows
//! again where nobody writes in between, calls it drift, and the next sync repairs it.

use std::io;

use anyhow::{Context as _, Result};
use bytemuck::{Pod, bytes_of};

use super::{MapIo, MapName};
use crate::abi::backend_state::BACKEND_GONE;
use crate::abi::{Backend, Frontend};
use crate::plan::tables::{Tables, is_gone};
use crate::table::{Rows, Table};

/// A map's rows as the daemon wrote them.
#[derive(Debug)]
pub struct Snapshot {
    map: MapName,
    key_size: usize,
    row_size: usize,
    /// Keys, each with its value behind it.
    rows: Vec<u8>,
}

impl Snapshot {
    pub(super) fn take(tables: &Tables, map: MapName) -> Snapshot {
        match map {
            MapName::Services => Snapshot::of(map, &tables.services),
            MapName::Backends => Snapshot::of(map, &tables.backends),
            MapName::Slots => Snapshot::of(map, &tables.slots),
            MapName::Frontends => Snapshot::of(map, &tables.frontends),
            MapName::Addresses => Snapshot::of(map, &tables.addresses),
            MapName::SourceRanges => Snapshot::of(map, &tables.source_ranges),
        }
    }

    fn of<R: Rows>(map: MapName, table: &Table<R>) -> Snapshot {
        let (key_size, value_size) = (size_of::<R::Key>(), size_of::<R::Value>());
        let row_size = key_size + value_size;
        let mut rows = Vec::with_capacity(table.rows().len() * row_size);
        table.rows().for_each(&mut |key, value| {
            rows.extend_from_slice(bytes_of(&key));
            rows.extend_from_slice(bytes_of(&value));
        });
        Snapshot { map, key_size, row_size, rows }
    }

    /// Reads the map by `io` and returns the keys of rows that differ, are missing, or are too many.
    ///
    /// # Errors
    /// The map could not be read to its end.
    pub fn compare(self, io: &mut dyn MapIo) -> io::Result<Vec<Vec<u8>>> {
        let rows: Vec<&[u8]> = self.rows.chunks_exact(self.row_size).collect();
        let key_of = |row: &&[u8]| row[..self.key_size].to_vec();
        let mut order: Vec<u32> = (0..rows.len() as u32).collect();
        order.sort_unstable_by_key(|row| &rows[*row as usize][..self.key_size]);
        let mut seen = vec![false; rows.len()];
        let mut different = Vec::new();
        io.dump(self.map, &mut |key, value| match order
            .binary_search_by_key(&key, |row| &rows[*row as usize][..self.key_size])
        {
            Ok(at) => {
                let row = order[at] as usize;
                seen[row] = true;
                if rows[row][self.key_size..] != *value {
                    different.push(key.to_vec());
                }
            }
            Err(_) if is_foreign(self.map, key, value) => {}
            Err(_) => different.push(key.to_vec()),
        })?;
        different.extend(rows.iter().zip(seen).filter(|(_, seen)| !seen).map(|(row, _)| key_of(row)));
        Ok(different)
    }
}

/// The datapath's trial has a frontend of Service 0 and backend 0 for some milliseconds.
fn is_foreign(map: MapName, key: &[u8], value: &[u8]) -> bool {
    match map {
        MapName::Backends => key.iter().all(|byte| *byte == 0),
        MapName::Frontends => {
            bytemuck::try_pod_read_unaligned::<Frontend>(value).is_ok_and(|frontend| frontend.service_id == 0)
        }
        _ => false,
    }
}

/// Reads these rows again, and notes what the kernel has. Returns how many were not as written.
pub(super) fn correct(tables: &mut Tables, map: MapName, keys: &[Vec<u8>], io: &mut dyn MapIo) -> Result<usize> {
    match map {
        MapName::Services => note(&mut tables.services, map, keys, io),
        MapName::Frontends => note(&mut tables.frontends, map, keys, io),
        MapName::Addresses => note(&mut tables.addresses, map, keys, io),
        MapName::SourceRanges => note(&mut tables.source_ranges, map, keys, io),
        // Rows of an array cannot be deleted. A slot that no pool covers is seen by nobody; a backend that nobody has
        // is gone, and keeps its generation.
        MapName::Slots => {
            let drift = note(&mut tables.slots, map, keys, io)?;
            disown(&mut tables.slots, |row| row);
            Ok(drift)
        }
        MapName::Backends => {
            let drift = note(&mut tables.backends, map, keys, io)?;
            disown(&mut tables.backends, gone);
            Ok(drift)
        }
    }
}

fn gone(row: Backend) -> Backend {
    if is_gone(&row) {
        return row;
    }
    Backend { state: BACKEND_GONE as u8, pools: 0, generation: row.generation.max(1), ..row }
}

fn note<R: Rows>(table: &mut Table<R>, map: MapName, keys: &[Vec<u8>], io: &mut dyn MapIo) -> Result<usize> {
    let mut drift = 0;
    for bytes in keys {
        let value = io.read(map, bytes).with_context(|| format!("reading a row of the map {}", map.as_str()))?;
        if value.as_ref().is_some_and(|value| is_foreign(map, bytes, value)) {
            continue;
        }
        let Ok(key) = bytemuck::try_pod_read_unaligned::<R::Key>(bytes) else { continue };
        let value = value.and_then(|value| bytemuck::try_pod_read_unaligned::<R::Value>(&value).ok());
        if table.applied(key) != value {
            table.found(key, value);
            drift += 1;
        }
    }
    Ok(drift)
}

/// Wants for each row of an array that nobody asked for what `becomes` says.
fn disown<V: Copy + PartialEq + Pod>(table: &mut Table<crate::table::Indexed<V>>, becomes: impl Fn(V) -> V) {
    let unwanted: Vec<u32> = table.pending().filter(|(_, wanted)| wanted.is_none()).map(|(key, _)| key).collect();
    for key in unwanted {
        if let Some(row) = table.applied(key) {
            table.set(key, becomes(row));
        }
    }
}
