//! A program in a pseudo-terminal, with what a person would see of it.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::num::NonZeroU16;
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::laboratory::eventually;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};

/// How long something may take to be shown.
const PATIENCE: Duration = Duration::from_secs(20);

/// What came from the program.
struct Shown {
    parser: vt100::Parser,
    bytes: Vec<u8>,
}

/// A terminal with a program. Dropping it kills the program.
pub struct Terminal {
    keys: Option<File>,
    path: PathBuf,
    shown: Arc<Mutex<Shown>>,
    is_closed: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
    child: Child,
}

/// Until the program ends, or the terminal is closed.
fn read(mut output: File, shown: &Mutex<Shown>, is_closed: &AtomicBool) {
    let mut chunk = [0; 4096];
    while !is_closed.load(Relaxed) {
        let mut asked = [PollFd::new(output.as_fd(), PollFlags::POLLIN)];
        if poll(&mut asked, PollTimeout::from(20u8)).unwrap_or(0) == 0 {
            continue;
        }
        // EIO: the program has ended.
        let Ok(length @ 1..) = output.read(&mut chunk) else { return };
        let mut shown = shown.lock().expect("nobody panicked");
        shown.parser.process(&chunk[..length]);
        shown.bytes.extend_from_slice(&chunk[..length]);
    }
}

fn set_size(path: &Path, columns: u16, rows: u16) {
    let (columns, rows) = (columns.to_string(), rows.to_string());
    let status = Command::new("stty").arg("-F").arg(path).args(["cols", &columns, "rows", &rows]).status();
    assert!(status.expect("stty (coreutils) runs").success());
}

fn cells(count: u16) -> NonZeroU16 {
    NonZeroU16::new(count).expect("a terminal has a size")
}

impl Terminal {
    /// Starts a program in a terminal of this size, with these variables more.
    pub fn start(
        program: &str,
        arguments: &[&str],
        (columns, rows): (u16, u16),
        variables: &[(&str, &str)],
    ) -> Terminal {
        let master =
            posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).expect("there are pseudo-terminals");
        grantpt(&master).and_then(|()| unlockpt(&master)).expect("the terminal is ours");
        let path = PathBuf::from(ptsname_r(&master).expect("a terminal has a name"));
        let slave = File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(&path);
        let slave = slave.expect("the terminal can be opened");
        set_size(&path, columns, rows);
        let end = || Stdio::from(slave.try_clone().expect("the terminal can be shared"));
        // The terminal is the session's own: its size and its end are signals.
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(program).args(arguments).env_remove("NO_COLOR").env("TERM", "xterm-256color");
        command.envs(variables.iter().copied()).stdin(end()).stdout(end()).stderr(end());
        let child = command.spawn().expect("setsid (util-linux) starts the program");
        let output = File::from(master.as_fd().try_clone_to_owned().expect("the terminal can be shared"));
        let keys = output.try_clone().expect("the terminal can be shared");
        let parser = vt100::Parser::new(cells(rows), cells(columns), 0);
        let shown = Arc::new(Mutex::new(Shown { parser, bytes: Vec::new() }));
        let is_closed = Arc::new(AtomicBool::new(false));
        let (seen, closed) = (Arc::clone(&shown), Arc::clone(&is_closed));
        let reader = std::thread::spawn(move || read(output, &seen, &closed));
        Terminal { keys: Some(keys), path, shown, is_closed, reader: Some(reader), child }
    }

    /// What is on the screen.
    pub fn screen(&self) -> String {
        self.shown.lock().expect("nobody panicked").parser.screen().contents()
    }

    /// All that was ever written.
    pub fn bytes(&self) -> String {
        String::from_utf8_lossy(&self.shown.lock().expect("nobody panicked").bytes).into_owned()
    }

    /// A full-screen program has the terminal.
    pub fn is_taken_over(&self) -> bool {
        let shown = self.shown.lock().expect("nobody panicked");
        shown.parser.screen().alternate_screen() || shown.parser.screen().hide_cursor()
    }

    pub fn press(&mut self, keys: &str) {
        let file = self.keys.as_mut().expect("the terminal is there");
        file.write_all(keys.as_bytes()).expect("keys can be pressed");
    }

    /// Waits until `holds` of the screen, and returns that.
    pub fn wait_for(&self, what: &str, holds: impl Fn(&str) -> bool) -> String {
        let mut screen = String::new();
        let came = eventually(PATIENCE, || {
            screen = self.screen();
            holds(&screen)
        });
        assert!(came, "{what} did not come:\n{screen}");
        screen
    }

    /// Waits until this is on the screen.
    pub fn wait_for_text(&self, text: &str) -> String {
        self.wait_for(&format!("{text:?}"), |screen| screen.contains(text))
    }

    pub fn resize(&self, columns: u16, rows: u16) {
        self.shown.lock().expect("nobody panicked").parser.set_size(cells(rows), cells(columns));
        set_size(&self.path, columns, rows);
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The terminal is closed, as a window or a connection is.
    pub fn hang_up(&mut self) {
        self.is_closed.store(true, Relaxed);
        self.reader.take().expect("it is closed once").join().expect("nobody panicked");
        self.keys = None;
    }

    /// Waits for the program's end.
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        eventually(PATIENCE, || {
            status = self.child.try_wait().expect("a child can be waited for");
            status.is_some()
        });
        let status = status.unwrap_or_else(|| panic!("the program does not end:\n{}", self.screen()));
        // What it wrote last may be on its way.
        std::thread::sleep(Duration::from_millis(50));
        status
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.is_closed.store(true, Relaxed);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
