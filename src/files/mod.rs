//! The directory source: ordinary Service, EndpointSlice and Node objects in `*.yaml`, `*.yml` and `*.json` files, `List`s
//! and multi-document files included, followed live. It needs no cluster.
//!
//! Hidden files, editors' temporaries and subdirectories are not read. A file that cannot be read is named with line and
//! reason, and its last good state stays in force. Writers should write elsewhere and rename, or write and close: a
//! file is read when it was closed or renamed, never while it is being written. Symbolic links are followed, and a
//! ConfigMap volume's `..data` swap is noticed; a change of the target of any other link is not.

mod fault;
mod index;
mod load;
mod notify;
mod parse;
mod split;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::model::{Change, Kind};
use crate::objects::convert::Converter;
use crate::objects::outlet::{Closed, Outlet};
use crate::objects::{Settings, SourceStatus};
use index::{Index, Output};
use notify::{Event, Watcher};

/// The kinds that a directory holds.
const KINDS: [Kind; 3] = [Kind::Services, Kind::EndpointSlices, Kind::Node];

/// Files that a rescan reads before it sends what they changed: this bounds its memory.
const RESCAN_BATCH: usize = 64;

/// Reads `directory` and follows it until the receiver of `changes` is dropped. Warnings travel as changes; who receives
/// them logs them.
///
/// # Errors
/// When the directory cannot be opened at the start; later it may go away and come back.
pub async fn run(
    directory: PathBuf,
    settings: Settings,
    changes: mpsc::Sender<Change>,
    status: Arc<SourceStatus>,
) -> anyhow::Result<()> {
    let context = || format!("--source dir:{}: cannot open the directory", directory.display());
    // Watching before reading: what changes in between is seen twice rather than never.
    let watcher = Watcher::open(&directory).with_context(context)?;
    let mut source = Source {
        directory,
        live: Live { index: Index::default(), converter: Converter::new(settings.clone()) },
        outlet: Outlet::new(changes),
        status,
    };
    match source.follow(watcher, settings).await {
        Ok(()) | Err(Stop::Closed) => Ok(()),
        Err(Stop::Failed(error)) => Err(error),
    }
}

/// Why following ended.
enum Stop {
    Closed,
    Failed(anyhow::Error),
}

impl From<Closed> for Stop {
    fn from(_: Closed) -> Self {
        Stop::Closed
    }
}

impl From<anyhow::Error> for Stop {
    fn from(error: anyhow::Error) -> Self {
        Stop::Failed(error)
    }
}

struct Source {
    directory: PathBuf,
    live: Live,
    outlet: Outlet,
    status: Arc<SourceStatus>,
}

/// What moves to a blocking thread and back for each piece of work.
struct Live {
    index: Index,
    converter: Converter,
}

impl Source {
    async fn follow(&mut self, mut watcher: Watcher, settings: Settings) -> Result<(), Stop> {
        self.load(&settings).await?;
        loop {
            let event = tokio::select! {
                event = watcher.next() => event,
                () = self.outlet.closed() => return Err(Stop::Closed),
            };
            match event {
                Event::File(name) if is_object_file(&name) => self.update(vec![name]).await?,
                Event::File(_) => {}
                Event::Rescan => self.rescan().await?,
                Event::Gone => self.gone(),
                Event::Back => {
                    info!(directory = %self.directory.display(), "the directory is back: reading it again");
                    self.rescan().await?;
                    self.reachable();
                }
            }
        }
    }

    /// The first reading: a list of each kind.
    async fn load(&mut self, settings: &Settings) -> Result<(), Stop> {
        let started = std::time::Instant::now();
        for kind in KINDS {
            self.outlet.list_begin(kind).await?;
        }
        let names = object_files(&self.directory)
            .with_context(|| format!("--source dir:{}: cannot read the directory", self.directory.display()))?;
        let count = names.len();
        let mut files = load::start(self.directory.clone(), names, settings.clone());
        while let Some((name, parsed)) = files.recv().await {
            let directory = &self.directory;
            let converter = &mut self.live.converter;
            let mut reread =
                |file: &str, hash: u64, key: &parse::Key| load::reread(directory, file, hash, key, converter);
            let out = match parsed {
                Ok(Some(pieces)) => self.live.index.upsert(&name, pieces, &mut reread),
                Ok(None) => Vec::new(),
                Err(fault) => self.live.index.broken(&name, &fault),
            };
            self.emit(out).await?;
        }
        for kind in KINDS {
            self.outlet.list_end(kind).await?;
        }
        for (_, state) in self.status.all() {
            state.list_done();
        }
        self.reachable();
        info!(files = count, elapsed = ?started.elapsed(), directory = %self.directory.display(), "directory read");
        if count == 0 {
            warn!(directory = %self.directory.display(), "no *.yaml, *.yml or *.json file here: no Service is served");
        }
        Ok(())
    }

    /// Reads these files again.
    async fn update(&mut self, names: Vec<String>) -> Result<(), Stop> {
        let directory = self.directory.clone();
        let out =
            self.blocking(move |live| names.iter().flat_map(|name| live.update(&directory, name)).collect()).await?;
        for (_, state) in self.status.all() {
            state.heard();
        }
        self.emit(out).await
    }

    /// Reads the whole directory again; what did not change costs its reading only.
    async fn rescan(&mut self) -> Result<(), Stop> {
        let mut names: Vec<String> = self.live.index.files().iter().map(|n| n.to_string()).collect();
        match object_files(&self.directory) {
            Ok(found) => names.extend(found),
            // It is about to be reported as gone.
            Err(_) => return Ok(()),
        }
        names.sort_unstable();
        names.dedup();
        for some in names.chunks(RESCAN_BATCH) {
            self.update(some.to_vec()).await?;
        }
        Ok(())
    }

    async fn blocking<T, F>(&mut self, work: F) -> Result<T, Stop>
    where
        T: Send + 'static,
        F: FnOnce(&mut Live) -> T + Send + 'static,
    {
        let settings = self.live.converter.settings().clone();
        let empty = Live { index: Index::default(), converter: Converter::new(settings) };
        let mut live = std::mem::replace(&mut self.live, empty);
        let task = tokio::task::spawn_blocking(move || {
            let result = work(&mut live);
            (live, result)
        });
        let (live, result) = task.await.context("reading the directory")?;
        self.live = live;
        Ok(result)
    }

    async fn emit(&mut self, out: Vec<Output>) -> Result<(), Stop> {
        for output in out {
            match output {
                Output::Change(change) => {
                    self.count(&change);
                    self.outlet.send(change).await?;
                }
                Output::Warnings(subject, warnings) => self.outlet.warnings(subject, warnings).await?,
            }
        }
        Ok(())
    }

    fn count(&self, change: &Change) {
        match change {
            Change::Service(_) | Change::ServiceGone(_) => self.status.services.object(),
            Change::Slice(_) | Change::SliceGone(_) => self.status.slices.object(),
            _ => self.status.node.object(),
        }
    }

    fn gone(&self) {
        let directory = self.directory.display();
        for (_, state) in self.status.all() {
            state.failed("the directory is gone");
        }
        warn!(%directory, "the directory is gone: its last content stays in force until it is back");
    }

    fn reachable(&self) {
        for (_, state) in self.status.all() {
            state.heard();
        }
    }
}

impl Live {
    fn update(&mut self, directory: &Path, name: &str) -> Vec<Output> {
        let known = self.index.hashes(name);
        let parsed = parse::file(&directory.join(name), &known, &mut self.converter);
        let converter = &mut self.converter;
        let mut reread = |file: &str, hash: u64, key: &parse::Key| load::reread(directory, file, hash, key, converter);
        match parsed {
            Ok(Some(pieces)) => self.index.upsert(name, pieces, &mut reread),
            Ok(None) => self.index.remove(name, &mut reread),
            Err(fault) => self.index.broken(name, &fault),
        }
    }
}

/// Names of the files to read, in order.
fn object_files(directory: &Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        if let Ok(name) = entry?.file_name().into_string()
            && is_object_file(&name)
        {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// By name only: hidden files and editors' temporaries (`.web.yaml.swp`, `#web.yaml#`, `web.yaml~`) are not objects.
fn is_object_file(name: &str) -> bool {
    let object = [".yaml", ".yml", ".json"].iter().any(|ending| name.len() > ending.len() && name.ends_with(ending));
    object && !name.starts_with(['.', '#', '~'])
}
