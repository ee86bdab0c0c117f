//! Tun and tap devices: what a process writes to the file arrives at the device, and what the device sends is read.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;

use anyhow::Context as _;

/// Opens a new device of the calling thread's namespace, non-blocking. It is gone when the file is closed. `mode` is
/// `IFF_TUN` (packets) or `IFF_TAP` (frames), with further flags.
pub fn open(device: &str, mode: libc::c_int) -> anyhow::Result<File> {
    let mut options = File::options();
    let file = options.read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
    let file = file.context("opening /dev/net/tun")?;
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(device.bytes()) {
        *to = from.cast_signed();
    }
    let flags = i16::try_from(mode | libc::IFF_NO_PI)?;
    let mut request = libc::ifreq { ifr_name: name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } };
    // SAFETY: the file is open, and TUNSETIFF reads and writes one struct ifreq, which lives until the call returns.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result != 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("making the device {device}"));
    }
    Ok(file)
}
