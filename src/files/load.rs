//! The first reading of a directory: two threads parse, one task takes the results in the order of the files' names.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::mpsc;

use super::fault::Fault;
use super::parse::{self, Key, Object, Parsed};
use super::split;
use crate::objects::Settings;
use crate::objects::convert::Converter;
use crate::table::HashSet;

/// A file and what was in it.
pub type Loaded = (String, Result<Option<Vec<Parsed>>, Fault>);

/// Files that one thread takes at a time.
const BATCH: usize = 32;
/// Batches that may wait for the receiver, per thread: this bounds the memory of a load.
const WAITING: usize = 4;
const THREADS: usize = 2;

/// Starts to read; the receiver gets every file, in the order of `names`.
pub fn start(directory: PathBuf, names: Vec<String>, settings: Settings) -> mpsc::Receiver<Loaded> {
    let (sender, receiver) = mpsc::channel(BATCH);
    let names = Arc::new(names);
    let directory = Arc::new(directory);
    // Batch i is read by thread i modulo THREADS, so taking from the threads in turn keeps the order.
    let mut threads: Vec<mpsc::Receiver<Vec<Loaded>>> = Vec::new();
    for number in 0..THREADS {
        let (batches, batch) = mpsc::channel(WAITING);
        threads.push(batch);
        let (names, directory, settings) = (names.clone(), directory.clone(), settings.clone());
        tokio::task::spawn_blocking(move || read_batches(number, &directory, &names, settings, &batches));
    }
    tokio::spawn(async move {
        for turn in 0.. {
            let Some(batch) = threads[turn % THREADS].recv().await else { return };
            for loaded in batch {
                if sender.send(loaded).await.is_err() {
                    return;
                }
            }
        }
    });
    receiver
}

fn read_batches(
    number: usize,
    directory: &Path,
    names: &[String],
    settings: Settings,
    batches: &mpsc::Sender<Vec<Loaded>>,
) {
    let mut converter = Converter::new(settings);
    let known = HashSet::default();
    for batch in names.chunks(BATCH).skip(number).step_by(THREADS) {
        let read = |name: &String| (name.clone(), parse::file(&directory.join(name), &known, &mut converter));
        if batches.blocking_send(batch.iter().map(read).collect()).is_err() {
            return;
        }
    }
}

/// Reads one object again: `None` when the file no longer holds that text.
pub fn reread(directory: &Path, file: &str, hash: u64, key: &Key, converter: &mut Converter) -> Option<Object> {
    let text = std::fs::read_to_string(directory.join(file)).ok()?;
    let pieces = split::split(&text, file.ends_with(".json")).ok()?;
    let piece = pieces.iter().find(|p| p.hash() == hash)?;
    parse::objects(piece, converter).ok()?.into_iter().find(|o| o.key == *key)
}
