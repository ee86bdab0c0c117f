//! What the kernel's run statistics say of a BPF program that does nothing: their two readings of the clock, which are in
//! every program's figure.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use anyhow::Context as _;

use super::programs::statistics_on;

/// Runs of one batch. The best batch counts: interruptions are no part of the clock.
const RUNS: u64 = 20_000;
const BATCHES: usize = 10;

/// Nanoseconds.
pub fn cost() -> anyhow::Result<f64> {
    let program = load().context("loading an empty program")?;
    let _statistics = statistics_on()?;
    let mut best = f64::INFINITY;
    for _ in 0..BATCHES {
        let before = run_time(&program)?;
        run(&program).context("running an empty program")?;
        best = best.min((run_time(&program)? - before) as f64 / RUNS as f64);
    }
    Ok(best)
}

/// `return 0;`
fn load() -> io::Result<OwnedFd> {
    let instruction = |code: u32| libbpf_sys::bpf_insn { code: code as u8, ..Default::default() };
    // Register 0 becomes 0.
    let code = [
        instruction(libbpf_sys::BPF_ALU64 | libbpf_sys::BPF_MOV | libbpf_sys::BPF_K),
        instruction(libbpf_sys::BPF_JMP | libbpf_sys::BPF_EXIT),
    ];
    // SAFETY: the pointers lead to NUL-terminated strings and to as many instructions as is said; no options.
    let fd = unsafe {
        libbpf_sys::bpf_prog_load(
            libbpf_sys::BPF_PROG_TYPE_SCHED_CLS,
            c"nothing".as_ptr(),
            c"GPL".as_ptr(),
            code.as_ptr(),
            code.len() as _,
            std::ptr::null_mut(),
        )
    };
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(-fd));
    }
    // SAFETY: the descriptor is new, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn run(program: &OwnedFd) -> io::Result<()> {
    let frame = [0u8; 64];
    let mut options = libbpf_sys::bpf_test_run_opts {
        sz: size_of::<libbpf_sys::bpf_test_run_opts>() as _,
        data_in: frame.as_ptr().cast(),
        data_size_in: frame.len() as u32,
        repeat: RUNS as i32,
        ..Default::default()
    };
    // SAFETY: the frame outlives the call and is as long as is said.
    match unsafe { libbpf_sys::bpf_prog_test_run_opts(program.as_raw_fd(), &mut options) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

/// Nanoseconds of all runs so far.
fn run_time(program: &OwnedFd) -> anyhow::Result<u64> {
    let mut info = libbpf_sys::bpf_prog_info::default();
    let mut size = size_of::<libbpf_sys::bpf_prog_info>() as u32;
    // SAFETY: `info` is as long as is said, and asks for no array.
    let error = unsafe { libbpf_sys::bpf_prog_get_info_by_fd(program.as_raw_fd(), &mut info, &mut size) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(-error)).context("asking for a program's run time");
    }
    Ok(info.run_time_ns)
}
