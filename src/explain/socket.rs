//! Where a daemon's socket is, and how it is asked. Its name is that of the pin directory's inode, so that it is found
//! by whatever path the directory is named, in a container, too, and daemons of one machine do not meet.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::{About, Answer, Question, VERSION};

/// Of all daemons' sockets.
pub const DIRECTORY: &str = "/run/kubelane";
/// A daemon in the middle of its first sync of a large cluster answers late.
const PATIENCE: Duration = Duration::from_secs(10);

/// The socket of the daemon whose state is pinned below `pin_path`.
///
/// # Errors
/// When the directory cannot be looked at.
pub fn sockets_path(pin_path: &Path) -> io::Result<PathBuf> {
    let pins = fs::metadata(pin_path)?;
    Ok(Path::new(DIRECTORY).join(format!("{:x}-{:x}.sock", pins.dev(), pins.ino())))
}

/// What the daemon answers; `None` when none listens.
///
/// # Errors
/// When there is one and it cannot be asked, does not answer, or is of a release that answers in another way.
pub fn ask(pin_path: &Path, about: About) -> Result<Option<Answer>> {
    let path = sockets_path(pin_path).with_context(|| format!("cannot look into {}", pin_path.display()))?;
    let mut stream = match UnixStream::connect(&path) {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(error) => return Err(error).with_context(|| format!("asking the daemon at {}", path.display())),
    };
    let text = exchange(&mut stream, &Question { version: VERSION, about })
        .with_context(|| format!("asking the daemon at {}", path.display()))?;
    let head: Head = serde_json::from_slice(&text).context("cannot read the daemon's response")?;
    if head.version != VERSION {
        let (theirs, ours) = (head.release, env!("CARGO_PKG_VERSION"));
        bail!(
            "the daemon is kubelane {theirs}, whose protocol differs from that of {ours}: use the daemon's own binary"
        );
    }
    let answer: Answer = serde_json::from_slice(&text).context("cannot read the daemon's response")?;
    match answer.error {
        Some(error) => bail!("the daemon cannot answer: {error}"),
        None => Ok(Some(answer)),
    }
}

/// What every release's answer has.
#[derive(serde::Deserialize)]
struct Head {
    version: u32,
    release: String,
}

fn exchange(stream: &mut UnixStream, question: &Question) -> Result<Vec<u8>> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all((serde_json::to_string(question)? + "\n").as_bytes())?;
    let mut text = Vec::new();
    stream.read_to_end(&mut text).with_context(|| format!("no answer within {} s", PATIENCE.as_secs()))?;
    anyhow::ensure!(!text.is_empty(), "the daemon closed the connection: only root may ask");
    Ok(text)
}
