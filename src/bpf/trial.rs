//! Trial programs: questions about the kernel that no list of helpers or map types answers. Each is a packet program of
//! a dozen instructions, loaded, run once on an empty frame or offered to a hook, and let go.
//!
//! How such a program is written down and loaded is also what the laboratory's reference needs (reference.rs).

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use libbpf_rs::{MapHandle, MapType};

use super::signals::uninterrupted;

/// Flags of bpf_fib_lookup (linux/bpf.h).
#[derive(Clone, Copy, Debug)]
pub(super) enum FibFlag {
    /// BPF_FIB_LOOKUP_SRC, 6.7.
    Source = 1 << 4,
    /// BPF_FIB_LOOKUP_MARK, 6.10.
    Mark = 1 << 5,
}

/// sizeof(struct bpf_fib_lookup), which is the same in every kernel.
const FIB_LOOKUP_BYTES: i16 = 64;
/// The loopback device of every network namespace.
const LOOPBACK: i32 = 1;

/// Opcodes (linux/bpf.h, linux/bpf_common.h).
const STORE_8: u8 = 0x72;
const STORE_32: u8 = 0x62;
pub(super) const STORE_64: u8 = 0x7a;
pub(super) const MOVE_CONSTANT: u8 = 0xb7;
pub(super) const MOVE_REGISTER: u8 = 0xbf;
pub(super) const ADD_CONSTANT: u8 = 0x07;
pub(super) const CALL: u8 = 0x85;
pub(super) const EXIT: u8 = 0x95;
/// The frame pointer.
pub(super) const R10: u8 = 10;

pub(super) fn instruction(code: u8, to: u8, from: u8, offset: i16, constant: i32) -> libbpf_sys::bpf_insn {
    let _bitfield_1 = libbpf_sys::bpf_insn::new_bitfield_1(to, from);
    libbpf_sys::bpf_insn { code, off: offset, imm: constant, _bitfield_1, ..Default::default() }
}

/// A packet program.
pub(super) fn load(instructions: &[libbpf_sys::bpf_insn]) -> io::Result<OwnedFd> {
    let mut options =
        libbpf_sys::bpf_prog_load_opts { sz: size_of::<libbpf_sys::bpf_prog_load_opts>() as _, ..Default::default() };
    load_as(libbpf_sys::BPF_PROG_TYPE_SCHED_CLS, instructions, &mut options)
}

fn load_as(
    kind: libbpf_sys::bpf_prog_type,
    instructions: &[libbpf_sys::bpf_insn],
    options: &mut libbpf_sys::bpf_prog_load_opts,
) -> io::Result<OwnedFd> {
    // SAFETY: the pointers lead to NUL-terminated strings, to as many instructions as is said, and to options of the
    // size that they say.
    let fd = uninterrupted(|| unsafe {
        libbpf_sys::bpf_prog_load(
            kind,
            c"kubelane_trial".as_ptr(),
            c"GPL".as_ptr(),
            instructions.as_ptr(),
            instructions.len() as u64,
            options,
        )
    });
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(-fd));
    }
    // SAFETY: the kernel has just given this descriptor to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether BPF iterators over `target` are to be had, and their programs may call a helper. One that
/// calls it with nothing in its argument registers is refused for that (EACCES), or before for another reason.
pub(super) fn iterator_knows(target: &CStr, helper: u32) -> bool {
    // SAFETY: the name ends with a NUL.
    let id = unsafe { libbpf_sys::libbpf_find_vmlinux_btf_id(target.as_ptr(), libbpf_sys::BPF_TRACE_ITER) };
    if id <= 0 {
        return false;
    }
    let program = [instruction(CALL, 0, 0, 0, helper as i32), instruction(EXIT, 0, 0, 0, 0)];
    let mut options = libbpf_sys::bpf_prog_load_opts {
        sz: size_of::<libbpf_sys::bpf_prog_load_opts>() as _,
        expected_attach_type: libbpf_sys::BPF_TRACE_ITER,
        attach_btf_id: id as u32,
        ..Default::default()
    };
    load_as(libbpf_sys::BPF_PROG_TYPE_TRACING, &program, &mut options)
        .is_err_and(|error| error.raw_os_error() == Some(libc::EACCES))
}

/// What the program answers about an empty Ethernet frame.
fn run(program: &OwnedFd) -> io::Result<i32> {
    let frame = [0u8; 64];
    let mut options = libbpf_sys::bpf_test_run_opts {
        sz: size_of::<libbpf_sys::bpf_test_run_opts>() as _,
        data_in: frame.as_ptr().cast(),
        data_size_in: frame.len() as u32,
        ..Default::default()
    };
    // SAFETY: the frame outlives the call and is as long as is said.
    match unsafe { libbpf_sys::bpf_prog_test_run_opts(program.as_fd().as_raw_fd(), &mut options) } {
        0 => Ok(options.retval as i32),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

/// `return bpf_fib_lookup(skb, &{.family = AF_INET, .ifindex = LOOPBACK}, 64, flag);`
fn fib_lookup_program(flag: FibFlag) -> Vec<libbpf_sys::bpf_insn> {
    let mut program: Vec<_> =
        (1..=FIB_LOOKUP_BYTES / 8).map(|word| instruction(STORE_64, R10, 0, -8 * word, 0)).collect();
    program.extend([
        instruction(STORE_8, R10, 0, -FIB_LOOKUP_BYTES, libc::AF_INET),
        instruction(STORE_32, R10, 0, 8 - FIB_LOOKUP_BYTES, LOOPBACK),
        instruction(MOVE_REGISTER, 2, R10, 0, 0),
        instruction(ADD_CONSTANT, 2, 0, 0, i32::from(-FIB_LOOKUP_BYTES)),
        instruction(MOVE_CONSTANT, 3, 0, 0, i32::from(FIB_LOOKUP_BYTES)),
        instruction(MOVE_CONSTANT, 4, 0, 0, flag as i32),
        instruction(CALL, 0, 0, 0, libbpf_sys::BPF_FUNC_fib_lookup as i32),
        instruction(EXIT, 0, 0, 0, 0),
    ]);
    program
}

/// Whether bpf_fib_lookup knows the flag: it refuses those that it does not know before it looks anything up.
pub(super) fn fib_lookup_knows(flag: FibFlag) -> bool {
    load(&fib_lookup_program(flag)).and_then(|program| run(&program)).is_ok_and(|result| result != -libc::EINVAL)
}

/// A program that does nothing: what comes next on its hook runs.
pub(super) fn next_program() -> io::Result<OwnedFd> {
    /// linux/bpf.h.
    const TCX_NEXT: i32 = -1;
    load(&[instruction(MOVE_CONSTANT, 0, 0, 0, TCX_NEXT), instruction(EXIT, 0, 0, 0, 0)])
}

/// Whether a hash map's rows can be read, and so written and deleted, many at a time: an empty one says ENOENT.
pub(super) fn has_hash_batches() -> bool {
    let options =
        libbpf_sys::bpf_map_create_opts { sz: size_of::<libbpf_sys::bpf_map_create_opts>() as _, ..Default::default() };
    let Ok(map) = MapHandle::create(MapType::Hash, Some("kubelane_trial"), 4, 4, 1, &options) else { return false };
    let (mut next, mut key, mut value, mut count) = (0u32, 0u32, 0u32, 1u32);
    // SAFETY: keys and values have the map's sizes, there is room for `count` of each, and all outlive the call.
    let result = unsafe {
        libbpf_sys::bpf_map_lookup_batch(
            map.as_fd().as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::from_mut(&mut next).cast(),
            std::ptr::from_mut(&mut key).cast(),
            std::ptr::from_mut(&mut value).cast(),
            &mut count,
            std::ptr::null(),
        )
    };
    result == -libc::ENOENT
}
