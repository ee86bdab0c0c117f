//! BPF_PROG_TEST_RUN: calling a packet program without a packet.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use anyhow::{Context as _, Result};

/// Runs `program` on `frame` (at least 14 bytes), `repeat` times, with the leading part of a `struct __sk_buff`
/// (linux/bpf.h) as `context`, which may be empty. What the frame became is written to `out`, as far as it fits. Answers
/// what the program returned, the frame's length then, and the mean time of one run in nanoseconds.
pub(super) fn test_run(
    program: BorrowedFd<'_>,
    frame: &[u8],
    context: &[u8],
    out: &mut [u8],
    repeat: u32,
) -> Result<(u32, u32, u32)> {
    let mut options = libbpf_sys::bpf_test_run_opts {
        sz: size_of::<libbpf_sys::bpf_test_run_opts>() as _,
        data_in: frame.as_ptr().cast(),
        data_size_in: frame.len() as u32,
        repeat: repeat as i32,
        ..Default::default()
    };
    if !context.is_empty() {
        (options.ctx_in, options.ctx_size_in) = (context.as_ptr().cast(), context.len() as u32);
    }
    if !out.is_empty() {
        (options.data_out, options.data_size_out) = (out.as_mut_ptr().cast(), out.len() as u32);
    }
    // SAFETY: the pointers lead to buffers of the given sizes that outlive the call.
    let result = unsafe { libbpf_sys::bpf_prog_test_run_opts(program.as_raw_fd(), &mut options) };
    if result != 0 {
        return Err(io::Error::from_raw_os_error(-result)).context("BPF_PROG_TEST_RUN");
    }
    Ok((options.retval, options.data_size_out, options.duration))
}
