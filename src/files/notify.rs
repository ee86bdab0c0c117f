//! inotify on the directory, reduced to what the source must do. The watch sits on an inode while the operator means a
//! path: the path is compared with the inode now and then, so that a directory that was deleted and made again, moved,
//! mounted over or reached through a swapped link is followed.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt;
use inotify::{EventMask, EventStream, Inotify, WatchMask};
use tokio::time::{Instant, sleep_until};

/// How often the path is compared with what is watched, while all is well and while the directory is gone.
const CHECK: Duration = Duration::from_secs(2);
const CHECK_GONE: Duration = Duration::from_millis(100);
/// The link that a ConfigMap volume swaps to change all its files at once.
const CONFIG_MAP_LINK: &str = "..data";

/// What the source must do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The file of this name was written, renamed, linked or deleted.
    File(String),
    /// Anything may have changed.
    Rescan,
    /// The directory is gone.
    Gone,
    /// It is there (again), perhaps as another one.
    Back,
}

pub struct Watcher {
    path: PathBuf,
    /// `None` while the directory is gone.
    watched: Option<Watched>,
    waiting: VecDeque<Event>,
    next_check: Instant,
}

struct Watched {
    events: EventStream<[u8; 16 << 10]>,
    device: u64,
    inode: u64,
}

impl Watcher {
    /// # Errors
    /// When `path` is not a directory that can be watched.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        let watched = Some(Watched::open(path)?);
        let next_check = Instant::now() + CHECK;
        Ok(Watcher { path: path.to_owned(), watched, waiting: VecDeque::new(), next_check })
    }

    /// The next event; never ends. Cancelling loses nothing.
    pub async fn next(&mut self) -> Event {
        loop {
            if let Some(event) = self.waiting.pop_front() {
                return event;
            }
            let raw = match &mut self.watched {
                None => {
                    sleep_until(self.next_check).await;
                    None
                }
                // What the queue holds comes first: a check that finds the directory gone drops the queue.
                Some(watched) => tokio::select! {
                    biased;
                    raw = watched.events.next() => raw,
                    () = sleep_until(self.next_check) => None,
                },
            };
            match raw {
                Some(Ok(raw)) => self.take(raw.mask, raw.name.as_deref()),
                // The queue cannot be read, or it is time to look.
                Some(Err(_)) | None => self.check(),
            }
        }
    }

    fn take(&mut self, mask: EventMask, name: Option<&OsStr>) {
        if mask.contains(EventMask::Q_OVERFLOW) {
            self.waiting.push_back(Event::Rescan);
        } else if mask
            .intersects(EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::UNMOUNT | EventMask::IGNORED)
        {
            self.check();
        } else if let Some(name) = name.and_then(OsStr::to_str) {
            if name == CONFIG_MAP_LINK {
                self.waiting.push_back(Event::Rescan);
            } else if !mask.contains(EventMask::CREATE) || self.is_complete(name) {
                self.waiting.push_back(Event::File(name.to_owned()));
            }
        }
    }

    /// A new name is complete when it is a link, symbolic or hard; a new file is still to be written and closed.
    fn is_complete(&self, name: &str) -> bool {
        std::fs::symlink_metadata(self.path.join(name)).is_ok_and(|m| m.is_symlink() || m.nlink() > 1)
    }

    /// Compares the path with what is watched.
    fn check(&mut self) {
        let now = std::fs::metadata(&self.path).ok().map(|m| (m.dev(), m.ino()));
        let was = self.watched.as_ref().map(|w| (w.device, w.inode));
        if now != was || now.is_none() {
            let gone_before = self.watched.is_none();
            self.watched = Watched::open(&self.path).ok();
            match (&self.watched, gone_before) {
                (Some(_), _) => self.waiting.push_back(Event::Back),
                (None, false) => self.waiting.push_back(Event::Gone),
                (None, true) => {}
            }
        }
        self.next_check = Instant::now() + if self.watched.is_some() { CHECK } else { CHECK_GONE };
    }
}

impl Watched {
    fn open(path: &Path) -> std::io::Result<Self> {
        let inotify = Inotify::init()?;
        let mask = WatchMask::CLOSE_WRITE
            | WatchMask::MOVED_TO
            | WatchMask::MOVED_FROM
            | WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR;
        inotify.watches().add(path, mask)?;
        let metadata = std::fs::metadata(path)?;
        let events = inotify.into_event_stream([0; 16 << 10])?;
        Ok(Watched { events, device: metadata.dev(), inode: metadata.ino() })
    }
}
