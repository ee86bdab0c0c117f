//! The daemon's socket, where `kubelane explain` asks what the planner knows. It is root's alone, and only reads: the
//! worker tells of one Service at a time, which costs about what compiling it does.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tracing::{debug, warn};

use super::request::Request;
use crate::explain::{About, Answer, DIRECTORY, QUESTION_MAX, Question, VERSION, sockets_path};
use crate::serve::{Ask, Metrics};

/// Questions at once; others wait.
const AT_ONCE: usize = 4;
/// Within which a question has to come, and its answer to be taken.
const PATIENCE: Duration = Duration::from_secs(10);

/// After which a socket is found again that has the name of a pin directory on another file system.
const RENAMED: Duration = Duration::from_secs(5);

/// Answers until the daemon ends. A socket that cannot be had is told once, and nothing else depends on it.
///
/// # Errors
/// Never: it ends with the daemon.
pub async fn serve(pin_path: &Path, worker: mpsc::Sender<Request>, metrics: Arc<Metrics>) -> anyhow::Result<()> {
    let (mut listener, mut path) = match listen(pin_path) {
        Ok(listener) => listener,
        Err(error) => {
            warn!(
                "`kubelane explain` will answer from the maps alone: {error:#}; make {DIRECTORY} writable for the \
                 daemon"
            );
            return std::future::pending().await;
        }
    };
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut ticks = tokio::time::interval(RENAMED);
    loop {
        let place = Arc::clone(&places).acquire_owned().await.context("places are never closed")?;
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = ticks.tick() => {
                if sockets_path(pin_path).is_ok_and(|now| now != path)
                    && let Ok(again) = listen(pin_path)
                {
                    let _ = fs::remove_file(&path);
                    (listener, path) = again;
                }
                continue;
            }
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // No more open files, most likely.
                debug!("cannot accept a request on the daemon's socket: {error}");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let (worker, metrics) = (worker.clone(), Arc::clone(&metrics));
        tokio::spawn(async move {
            match tokio::time::timeout(PATIENCE, answer(stream, worker, &metrics)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => debug!("cannot answer a request on the daemon's socket: {error:#}"),
                Err(_) => debug!("the client stopped sending"),
            }
            drop(place);
        });
    }
}

/// Whoever takes away the last socket takes the directory with it, which may be just before this daemon's is made.
fn listen(pin_path: &Path) -> anyhow::Result<(UnixListener, PathBuf)> {
    const TRIES: usize = 5;
    let is_missing = |error: &anyhow::Error| {
        error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::NotFound)
    };
    for _ in 1..TRIES {
        match make_socket(pin_path) {
            Err(error) if is_missing(&error) => {}
            result => return result,
        }
    }
    make_socket(pin_path)
}

/// The socket is made under another name: at its own name there is never one that does not listen yet. The lock on the
/// pin directory keeps it from being made by two.
fn make_socket(pin_path: &Path) -> anyhow::Result<(UnixListener, PathBuf)> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(DIRECTORY)
        .with_context(|| format!("making {DIRECTORY}"))?;
    let path = sockets_path(pin_path).with_context(|| format!("looking into {}", pin_path.display()))?;
    let fresh = path.with_extension("new");
    let named = || format!("creating the socket {}", path.display());
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).with_context(named),
        _ => {}
    }
    let listener = UnixListener::bind(&fresh).with_context(named)?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600)).with_context(named)?;
    fs::rename(&fresh, &path).with_context(named)?;
    sweep(&path);
    Ok((listener, path))
}

/// Takes away the sockets of daemons that are no more: nobody listens there.
fn sweep(own: &Path) {
    for entry in fs::read_dir(DIRECTORY).into_iter().flatten().flatten() {
        let path = entry.path();
        if path == own || path.extension().is_none_or(|extension| extension != "sock") {
            continue;
        }
        let is_dead = std::os::unix::net::UnixStream::connect(&path)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
        if is_dead {
            let _ = fs::remove_file(path);
        }
    }
}

async fn answer(mut stream: UnixStream, worker: mpsc::Sender<Request>, metrics: &Metrics) -> anyhow::Result<()> {
    // The file's mode says the same, but a directory that others may write to would let them replace the file.
    let asker = stream.peer_cred().context("reading the client's credentials")?.uid();
    anyhow::ensure!(asker == 0, "the client is user {asker}, and only root may ask");
    let (read, mut write) = stream.split();
    let mut line = String::new();
    BufReader::new(read.take(QUESTION_MAX as u64)).read_line(&mut line).await.context("reading a request")?;
    let answer = match serde_json::from_str::<Question>(&line) {
        Ok(question) if question == Question { version: VERSION, about: About::Metrics } => match metrics.text() {
            Ok(metrics) => Answer { metrics, ..Answer::new() },
            Err(error) => refusal(format!("cannot read the metrics: {error:#}")),
        },
        Ok(question) if question.version == VERSION => {
            let (reply, answer) = oneshot::channel();
            worker.send(Request::Explain(question.about, reply)).await.context("the worker ended")?;
            answer.await.context("the worker ended")?
        }
        Ok(question) => refusal(format!("requests of version {} are not supported", question.version)),
        Err(error) => refusal(format!("cannot parse the request: {error}")),
    };
    let text = tokio::task::spawn_blocking(move || serde_json::to_vec(&answer)).await??;
    write.write_all(&text).await.context("writing a response")?;
    Ok(())
}

/// The way of the page on the metrics port, which asks in this process.
pub fn within(worker: mpsc::Sender<Request>) -> Ask {
    Arc::new(move |about| {
        let worker = worker.clone();
        Box::pin(async move {
            let (reply, answer) = oneshot::channel();
            worker.send(Request::Explain(about, reply)).await.ok()?;
            answer.await.ok()
        })
    })
}

fn refusal(error: String) -> Answer {
    Answer { error: Some(error), ..Answer::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It is looked for a few times, and then told of.
    #[tokio::test]
    async fn a_pin_directory_that_is_not_there_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let error = listen(&directory.path().join("missing")).unwrap_err();
        assert!(format!("{error:#}").contains("missing"), "{error:#}");
    }
}
