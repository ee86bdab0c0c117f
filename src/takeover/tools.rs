//! The node's own tools for its packet filter. An image has none: they are run in the mount namespace of the node's first
//! process then, which takes the host's PID namespace and CAP_SYS_ADMIN.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read as _, Seek as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// A listing or a change takes a fraction of a second even with ten thousand Services; a hung tool must not hang the daemon.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Runs a tool to its end, with `input` on its stdin; its stdout. `None`: it is not installed.
///
/// # Errors
/// It failed, with what it said, or took too long.
pub fn run(command: &[&str], input: &str) -> Result<Option<String>> {
    match run_here(command, input) {
        Ok(None) if has_own_mounts() => {
            let there = || {
                enter_node().context("entering the node's mount namespace")?;
                run_here(command, input)
            };
            // The namespace is the thread's, and goes with it.
            std::thread::scope(|scope| scope.spawn(there).join().unwrap_or_else(|_| bail!("a thread failed")))
        }
        result => result,
    }
}

fn has_own_mounts() -> bool {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    matches!((namespace("self"), namespace("1")), (Some(own), Some(first)) if own != first)
}

fn enter_node() -> Result<()> {
    let mounts = File::open("/proc/1/ns/mnt")?;
    // A thread that shares its root and working directory with others may not.
    unshare(CloneFlags::CLONE_FS)?;
    Ok(setns(mounts, CloneFlags::CLONE_NEWNS)?)
}

fn run_here(command: &[&str], input: &str) -> Result<Option<String>> {
    let Some((program, arguments)) = command.split_first() else { return Ok(None) };
    // In memory, not pipes: nobody has to write and read while it is waited for.
    let file = |text: &str| -> io::Result<File> {
        let mut file = File::from(memfd_create(c"kubelane", MFdFlags::MFD_CLOEXEC)?);
        file.write_all(text.as_bytes())?;
        file.rewind()?;
        Ok(file)
    };
    let (mut output, mut errors) = (file("")?, file("")?);
    let child = Command::new(program)
        .args(arguments)
        .env("PATH", search_path())
        .stdin(file(input)?)
        .stdout(output.try_clone()?)
        .stderr(Stdio::from(errors.try_clone()?))
        .spawn();
    let mut child = match child {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        child => child.with_context(|| format!("running {program}"))?,
    };
    let is_well = wait(&mut child).with_context(|| format!("running {program}"))?;
    let read = |file: &mut File| -> io::Result<String> {
        let mut text = Vec::new();
        file.rewind()?;
        file.read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    if !is_well {
        bail!("{} failed: {}", command.join(" "), read(&mut errors)?.trim());
    }
    Ok(Some(read(&mut output)?))
}

/// Whether it ended well.
fn wait(child: &mut Child) -> Result<bool> {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.success());
        }
        if began.elapsed() > TIMEOUT {
            child.kill()?;
            child.wait()?;
            bail!("it has not ended after {} s", TIMEOUT.as_secs());
        }
        std::thread::sleep((began.elapsed() / 50).clamp(Duration::from_millis(1), Duration::from_millis(100)));
    }
}

/// $PATH, and the directories of administrators' tools, which are not in everybody's.
fn search_path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin:/usr/bin:/bin");
    path
}
