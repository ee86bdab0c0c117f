//! Network namespaces: made and wired by the `ip` command, entered with setns(2).
//!
//! Never `ip netns exec`: it remounts /sys, which hides bpffs and the cgroups.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use nix::sched::{CloneFlags, setns};

/// Where `ip netns add` puts its names.
const DIRECTORY: &str = "/run/netns";

/// The path that names a namespace, for setns(2).
pub fn path(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

/// All namespaces whose name begins with `prefix`.
pub fn with_prefix(prefix: &str) -> Vec<String> {
    let entries = fs::read_dir(DIRECTORY).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| name.starts_with(prefix)).collect()
}

/// Runs `ip` commands, one a line, in the namespace called `inside` or in this process's own.
pub fn ip(inside: Option<&str>, commands: &[String]) -> anyhow::Result<()> {
    let mut command = Command::new("ip");
    if let Some(name) = inside {
        command.args(["-n", name]);
    }
    let mut script = commands.join("\n");
    script.push('\n');
    let place = inside.unwrap_or("the machine's namespace");
    feed(command.args(["-batch", "-"]), &script).with_context(|| format!("in {place}")).map(drop)
}

/// Runs a program with `input` on its stdin, where the calling thread is; its stdout.
pub fn run(program: &str, arguments: &[&str], input: &str) -> anyhow::Result<String> {
    feed(Command::new(program).args(arguments), input)
}

fn feed(command: &mut Command, input: &str) -> anyhow::Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("running {program}"))?;
    // A program that ends early breaks the pipe; what it says then is the better reason.
    let told = child.stdin.take().context("the program has a stdin")?.write_all(input.as_bytes());
    let output = child.wait_with_output().with_context(|| format!("waiting for {program}"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        bail!("{program} failed: {} {}\ninput:\n{input}", error.trim(), said.trim());
    }
    told.with_context(|| format!("talking to {program}"))?;
    Ok(said)
}

/// Moves the calling thread into the namespace at `path`.
pub fn enter(path: &Path) -> anyhow::Result<()> {
    let file = File::open(path).with_context(|| format!("opening the namespace {}", path.display()))?;
    setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("entering the namespace {}", path.display()))
}

/// Runs `work` in the namespace at `path`, on a thread of its own: a thread that entered a namespace never returns.
pub fn inside<T: Send>(path: &Path, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter(path)?;
            work()
        });
        thread.join().unwrap_or_else(|_| bail!("the work in {} panicked", path.display()))
    })
}

/// Sets sysctls below /proc/sys/net in the namespace at `path`.
pub fn sysctl(path: &Path, settings: &[(&str, &str)]) -> anyhow::Result<()> {
    inside(path, || {
        for (name, value) in settings {
            fs::write(Path::new("/proc/sys/net").join(name), value).with_context(|| format!("sysctl net/{name}"))?;
        }
        Ok(())
    })
}

/// Deletes namespaces; those that are gone already do not matter.
pub fn delete(names: &[String]) {
    for name in names {
        let _ = ip(None, &[format!("netns delete {name}")]);
    }
}
