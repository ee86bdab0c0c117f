//! A cable whose ends are tun devices: packets without a link header on every kernel, also where it has no tunnels.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::laboratory::{netns, tun};

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
        let [left, right] = namespaces.map(|space| netns::inside(space, || tun::open(device, libc::IFF_TUN)));
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
