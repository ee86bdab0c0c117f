//! Tools of the node for what is in the kernel: run with a limit of time and of output, and read as they write. An image has
//! none: they are run in the mount namespace of the node's first process then, which takes the host's PID namespace and
//! CAP_SYS_ADMIN.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read as _, Seek as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// A listing takes a fraction of a second even with ten thousand Services; a hung one must not hang who asked.
const LISTING: Duration = Duration::from_secs(20);
/// Ten times what the rules of ten thousand Services take.
const OUTPUT_MAX: u64 = 1 << 30;
/// How long a tool that has failed may take to say why.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Of what a tool says about its failure.
const ERRORS_MAX: u64 = 4096;

/// Why a tool has nothing to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    NotInstalled,
    /// With what it wrote to standard error.
    Failed(String),
    TooSlow,
}

/// $PATH, and the directories of administrators' tools, which are not in everybody's.
fn search_path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin:/usr/bin:/bin");
    path
}

/// Here, or on the node.
fn spawn(program: &str, arguments: &[&str], input: &str) -> io::Result<Child> {
    let spawn = || {
        let mut command = Command::new(program);
        command.args(arguments).env("PATH", search_path()).stdin(standard_input(input)?);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
    };
    let missing = match spawn() {
        Err(error) if error.kind() == io::ErrorKind::NotFound && has_own_mounts() => error,
        result => return result,
    };
    // The namespace is the thread's, and goes with it.
    let there = || {
        let refused = |error| format!("not installed here, and the node's mount namespace cannot be entered: {error}");
        enter_node().map_err(|error| io::Error::other(refused(error)))?;
        spawn()
    };
    thread::scope(|scope| scope.spawn(there).join()).unwrap_or(Err(missing))
}

/// In memory: nobody has to write while the tool is waited for.
fn standard_input(input: &str) -> io::Result<Stdio> {
    if input.is_empty() {
        return Ok(Stdio::null());
    }
    let mut file = File::from(memfd_create(c"kubelane", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(input.as_bytes())?;
    file.rewind()?;
    Ok(file.into())
}

fn has_own_mounts() -> bool {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    matches!((namespace("self"), namespace("1")), (Some(own), Some(first)) if own != first)
}

fn enter_node() -> io::Result<()> {
    let mounts = File::open("/proc/1/ns/mnt")?;
    // A thread that shares its root and working directory with others may not.
    unshare(CloneFlags::CLONE_FS)?;
    Ok(setns(mounts, CloneFlags::CLONE_NEWNS)?)
}

/// What `read` makes of the standard output of a command, which it has to read to its end. `input`: its standard input.
/// `limit`: of its time.
///
/// # Errors
/// When the command is not installed, fails, or does not end in time.
pub fn run<T: Send + 'static>(
    command: &[&str],
    input: &str,
    limit: Duration,
    read: impl FnOnce(&mut dyn BufRead) -> io::Result<T> + Send + 'static,
) -> Result<T, Failure> {
    let failed = |error: io::Error| Failure::Failed(error.to_string());
    let (program, arguments) = command.split_first().ok_or(Failure::NotInstalled)?;
    let mut child = spawn(program, arguments, input)
        .map_err(|error| if error.kind() == io::ErrorKind::NotFound { Failure::NotInstalled } else { failed(error) })?;
    let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(Failure::NotInstalled);
    };
    let (sender, output) = mpsc::channel();
    thread::spawn(move || {
        let mut limited = BufReader::with_capacity(1 << 16, stdout.take(OUTPUT_MAX));
        let result = read(&mut limited);
        let is_cut = limited.get_ref().limit() == 0;
        let _ = sender.send(if is_cut { Err(io::Error::other("it wrote more than 1 GiB")) } else { result });
    });
    let (sender, errors) = mpsc::channel();
    thread::spawn(move || {
        let mut stderr = stderr;
        let mut text = Vec::new();
        let _ = stderr.by_ref().take(ERRORS_MAX).read_to_end(&mut text);
        let _ = sender.send(String::from_utf8_lossy(&text).trim().to_owned());
        // It must not wait for somebody to read on.
        let _ = io::copy(&mut stderr, &mut io::sink());
    });
    let result = output.recv_timeout(limit);
    // Of one that fails the output makes no sense, and its own words do.
    let is_good = matches!(result, Ok(Ok(_)));
    let said = if is_good { None } else { errors.recv_timeout(LAST_WORDS).ok() };
    if !is_good {
        let _ = child.kill();
    }
    let status = child.wait().map_err(failed)?;
    let said = || said.or_else(|| errors.recv_timeout(LAST_WORDS).ok()).filter(|said| !said.is_empty());
    match result {
        Err(_) => Err(Failure::TooSlow),
        Ok(Ok(read)) if status.success() => Ok(read),
        Ok(Ok(_)) => Err(Failure::Failed(said().unwrap_or_else(|| status.to_string()))),
        Ok(Err(error)) => Err(said().filter(|_| !status.success()).map_or_else(|| failed(error), Failure::Failed)),
    }
}

/// Everything that a command writes. Otherwise as [`run`].
pub fn text_of(command: &[&str], input: &str, limit: Duration) -> Result<String, Failure> {
    let text = run(command, input, limit, |output| {
        let mut text = Vec::new();
        output.read_to_end(&mut text)?;
        Ok(text)
    });
    text.map(|text| String::from_utf8_lossy(&text).into_owned())
}

/// Standard output of a command, `None` when it is not installed, fails or does not end in time.
pub fn output_of(command: &[&str]) -> Option<String> {
    text_of(command, "", LISTING).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_that_is_missing_or_fails_says_nothing() {
        let _forks = crate::FORKS.blocking_lock();
        assert_eq!(output_of(&["kubelane-no-such-tool"]), None);
        assert_eq!(output_of(&["false"]), None);
        assert_eq!(output_of(&["echo", "a", "b"]).as_deref(), Some("a b\n"));
    }

    #[test]
    fn the_reason_of_a_failure_is_what_the_tool_wrote() {
        let _forks = crate::FORKS.blocking_lock();
        let read = |output: &mut dyn BufRead| io::copy(output, &mut io::sink());
        assert_eq!(run(&["kubelane-no-such-tool"], "", LISTING, read), Err(Failure::NotInstalled));
        let failure = run(&["sh", "-c", "echo no rules >&2; exit 3"], "", LISTING, read);
        assert_eq!(failure, Err(Failure::Failed("no rules".to_owned())));
        assert_eq!(run(&["echo", "abc"], "", LISTING, read), Ok(4));
        let odd = |_: &mut dyn BufRead| Err::<(), _>(io::Error::other("odd"));
        assert_eq!(run(&["echo", "abc"], "", LISTING, odd), Err(Failure::Failed("odd".to_owned())));
        assert_eq!(run(&["sh", "-c", "echo no >&2; false"], "", LISTING, odd), Err(Failure::Failed("no".to_owned())));
    }

    #[test]
    fn a_tool_that_hangs_is_ended() {
        let _forks = crate::FORKS.blocking_lock();
        let read = |output: &mut dyn BufRead| io::copy(output, &mut io::sink());
        assert_eq!(run(&["sleep", "600"], "", Duration::from_millis(50), read), Err(Failure::TooSlow));
    }
}
