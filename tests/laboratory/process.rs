//! Processes in a place: in the right cgroup and namespace before they make their first socket, gone with their owner.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::lab_binary;

/// Whether `name` is an executable that `PATH` (or Debian's /usr/sbin) leads to.
pub fn in_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]).any(|dir| dir.join(name).is_file())
}

/// A running process. Killed and reaped when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
}

impl Process {
    /// Starts `program` through `kubelane-lab enter`, which joins the cgroup and the namespace and then becomes it.
    /// Its log (stderr) goes to `log`; stdin and stdout are pipes.
    pub fn spawn<S: AsRef<OsStr>>(
        netns: &Path,
        cgroup: &Path,
        log: &Path,
        program: &Path,
        arguments: &[S],
    ) -> anyhow::Result<Process> {
        let log_file = File::options().create(true).append(true).open(log);
        let log_file = log_file.with_context(|| format!("opening {}", log.display()))?;
        let mut command = Command::new(lab_binary()?);
        command.arg("enter").arg("--netns").arg(netns).arg("--cgroup").arg(cgroup).arg("--").arg(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log_file);
        let child = command.spawn().with_context(|| format!("starting {}", program.display()))?;
        Ok(Process { child })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process's stdin, once.
    pub fn stdin(&mut self) -> anyhow::Result<ChildStdin> {
        self.child.stdin.take().context("stdin was taken before")
    }

    /// The process's stdout, once.
    pub fn stdout(&mut self) -> anyhow::Result<BufReader<ChildStdout>> {
        self.child.stdout.take().map(BufReader::new).context("stdout was taken before")
    }

    /// Waits for the line "ready" on stdout.
    pub fn wait_ready(&mut self, name: &str) -> anyhow::Result<()> {
        let mut line = String::new();
        self.stdout()?.read_line(&mut line).context("reading from a server")?;
        if line.trim() != "ready" {
            bail!("{name} did not come up");
        }
        Ok(())
    }

    /// The exit status when the process has ended by itself.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Waits for the end.
    pub fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        self.child.wait().context("waiting for a process")
    }

    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        kill(Pid::from_raw(self.pid().cast_signed()), signal).context("sending a signal")
    }

    /// Asks with SIGTERM; an error when the process is still there after `patience`.
    pub fn terminate(&mut self, patience: Duration) -> anyhow::Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        let mut status = None;
        super::eventually(patience, || {
            status = self.ended();
            status.is_some()
        });
        status.with_context(|| format!("still running {patience:?} after SIGTERM"))
    }

    /// Ends it at once, as the kernel does to a process that it runs out of memory for.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
