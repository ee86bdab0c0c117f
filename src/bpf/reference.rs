//! Two fixed packet programs that the benches run beside kubelane's, so that a slower, hotter or busier processor moves
//! both: one that does nothing, which is what measuring costs, and one that does about what a packet program does: look-ups
//! in hash tables and arrays, and arithmetic between them. For tests and benches.
//!
//! Figures on file (benches/FIGURES.md) are ratios to the second: who changes it has to take all of them anew.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context as _, Result};
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType};

use super::run::run_plain;
use super::trial::{
    ADD_CONSTANT, CALL, EXIT, MOVE_CONSTANT, MOVE_REGISTER, R10, STORE_64, instruction, load as load_program,
};

/// As large as the key and the value of a flow, or nearly so.
const KEY_BYTES: u32 = 40;
const VALUE_BYTES: u32 = 96;
/// Look-ups in each of the two maps, and rounds of four instructions between them.
const LOOKUPS: usize = 4;
const ROUNDS: usize = 16;

/// Opcodes (linux/bpf.h, linux/bpf_common.h).
const LOAD_CONSTANT_64: u8 = 0x18;
const LOAD_64: u8 = 0x79;
const ADD_REGISTER: u8 = 0x0f;
const MULTIPLY_CONSTANT: u8 = 0x27;
const SHIFT_RIGHT: u8 = 0x77;
const XOR_REGISTER: u8 = 0xaf;
const JUMP_IF_EQUAL: u8 = 0x15;
/// The constant is a map's descriptor.
const IS_MAP: u8 = 1;
/// Registers: results of helpers, their arguments, and two that calls leave alone.
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const SUM: u8 = 6;
const SHIFTED: u8 = 7;
/// A prime with bits all over.
const PRIME: i32 = 0x1e35_a7bd;
/// The TC action "pass on".
const UNSPECIFIED: i32 = -1;

/// Both programs, loaded.
pub struct Reference {
    empty: OwnedFd,
    mixed: OwnedFd,
    /// The program holds them as well.
    _maps: [MapHandle; 2],
}

impl Reference {
    /// Loads both programs and their maps.
    pub fn load() -> Result<Reference> {
        let hash = map(MapType::Hash, KEY_BYTES)?;
        let array = map(MapType::Array, size_of::<u32>() as u32)?;
        for (map, key_bytes) in [(&hash, KEY_BYTES as usize), (&array, size_of::<u32>())] {
            let row = (vec![0u8; key_bytes], vec![7u8; VALUE_BYTES as usize]);
            map.update(&row.0, &row.1, MapFlags::ANY).context("cannot fill the reference's map")?;
        }
        let nothing = [instruction(MOVE_CONSTANT, R0, 0, 0, UNSPECIFIED), instruction(EXIT, 0, 0, 0, 0)];
        Ok(Reference {
            empty: load_program(&nothing).context("cannot load the empty program")?,
            mixed: load_program(&mixed_program(&hash, &array)).context("cannot load the reference")?,
            _maps: [hash, array],
        })
    }

    /// What running a program at all costs: the mean of `repeat` runs of the one that does nothing.
    pub fn run_empty(&self, frame: &[u8], repeat: u32) -> Result<Duration> {
        run_plain(self.empty.as_fd(), frame, repeat).map(|outcome| outcome.duration)
    }

    /// The mean of `repeat` runs of the one that the others are compared with.
    pub fn run(&self, frame: &[u8], repeat: u32) -> Result<Duration> {
        run_plain(self.mixed.as_fd(), frame, repeat).map(|outcome| outcome.duration)
    }
}

fn map(kind: MapType, key_bytes: u32) -> Result<MapHandle> {
    let options =
        libbpf_sys::bpf_map_create_opts { sz: size_of::<libbpf_sys::bpf_map_create_opts>() as _, ..Default::default() };
    MapHandle::create(kind, Some("reference"), key_bytes, VALUE_BYTES, 1, &options)
        .context("cannot make the reference's map")
}

/// Sum = sum + first eight bytes of the row with the key that is on the stack, if there is one.
fn look_up(map: &MapHandle) -> [libbpf_sys::bpf_insn; 8] {
    [
        instruction(LOAD_CONSTANT_64, R1, IS_MAP, 0, map.as_fd().as_raw_fd()),
        // The upper half of the constant.
        instruction(0, 0, 0, 0, 0),
        instruction(MOVE_REGISTER, R2, R10, 0, 0),
        instruction(ADD_CONSTANT, R2, 0, 0, -(KEY_BYTES as i32)),
        instruction(CALL, 0, 0, 0, libbpf_sys::BPF_FUNC_map_lookup_elem as i32),
        instruction(JUMP_IF_EQUAL, R0, 0, 2, 0),
        instruction(LOAD_64, R0, R0, 0, 0),
        instruction(ADD_REGISTER, SUM, R0, 0, 0),
    ]
}

fn mixed_program(hash: &MapHandle, array: &MapHandle) -> Vec<libbpf_sys::bpf_insn> {
    let arithmetic = [
        instruction(MULTIPLY_CONSTANT, SUM, 0, 0, PRIME),
        instruction(MOVE_REGISTER, SHIFTED, SUM, 0, 0),
        instruction(SHIFT_RIGHT, SHIFTED, 0, 0, 13),
        instruction(XOR_REGISTER, SUM, SHIFTED, 0, 0),
    ];
    let mut program: Vec<_> =
        (1..=KEY_BYTES as i16 / 8).map(|word| instruction(STORE_64, R10, 0, -8 * word, 0)).collect();
    program.push(instruction(MOVE_CONSTANT, SUM, 0, 0, 1));
    for _ in 0..LOOKUPS {
        program.extend(look_up(hash));
        program.extend(arithmetic.repeat(ROUNDS));
        program.extend(look_up(array));
    }
    program.push(instruction(MOVE_CONSTANT, R0, 0, 0, UNSPECIFIED));
    program.push(instruction(EXIT, 0, 0, 0, 0));
    program
}
