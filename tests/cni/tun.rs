//! A cable whose ends are tun devices: packets without a link header on every kernel, also where it has no tunnels.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::thread::JoinHandle;

use anyhow::Context as _;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::support::netns;

/// Room for any packet.
const PACKET: usize = 1 << 16;

/// Carries packets between two devices until it is dropped; the devices go with it.
pub struct Cable {
    end: Option<PipeWriter>,
    carrier: Option<JoinHandle<()>>,
}

impl Cable {
    /// Makes a device of this name in each of the two namespaces.
    pub fn new(device: &str, namespaces: [&Path; 2]) -> anyhow::Result<Cable> {
        let [left, right] = namespaces.map(|space| netns::inside(space, || open(device)));
        let (left, right) = (left?, right?);
        let (ended, end) = io::pipe()?;
        let carrier = std::thread::spawn(move || carry(&left, &right, &ended).expect("the cable works"));
        Ok(Cable { end: Some(end), carrier: Some(carrier) })
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        drop(self.end.take());
        let _ = self.carrier.take().map(JoinHandle::join);
    }
}

/// Until the other end of `ended` is closed.
fn carry(left: &File, right: &File, ended: &PipeReader) -> io::Result<()> {
    let mut packet = vec![0; PACKET];
    loop {
        let mut ready = [left.as_fd(), right.as_fd(), ended.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        poll(&mut ready, PollTimeout::NONE)?;
        let [from_left, from_right, is_over] = ready.map(|fd| fd.any().unwrap_or(false));
        if is_over {
            return Ok(());
        }
        for (is_ready, mut from, mut to) in [(from_left, left, right), (from_right, right, left)] {
            if is_ready && let Ok(length) = from.read(&mut packet) {
                // An end that is not up yet takes nothing: a lost packet.
                let _ = to.write(&packet[..length]);
            }
        }
    }
}

/// Opens a new tun device of the calling thread's namespace. It is gone when the file is closed.
fn open(device: &str) -> anyhow::Result<File> {
    let mut options = File::options();
    let file = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
    let file = file.context("opening /dev/net/tun")?;
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(device.bytes()) {
        *to = from.cast_signed();
    }
    let flags = i16::try_from(libc::IFF_TUN | libc::IFF_NO_PI)?;
    let mut request = libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } };
    // SAFETY: the file is open, and TUNSETIFF reads and writes one struct ifreq, which lives until the call returns.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result != 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("making the tun device {device}"));
    }
    Ok(file)
}
