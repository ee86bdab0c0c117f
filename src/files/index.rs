//! Which file holds which object. The first file by name wins an object that several files hold (and the first place
//! in a file); when it goes, the next takes over.
//!
//! Of an object only its names, the hash of its text and what was told of it are kept: what was sent is compared with
//! what should have been by hash, and the text itself is read again on the rare occasion that it is needed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use super::parse::{Fault, Key, Object, Parsed};
use crate::model::{Change, Warning};

type Hashed<K, V> = HashMap<K, V, foldhash::fast::RandomState>;

/// A piece's hash and what it holds.
type Piece = (u64, Box<[Key]>);

/// What goes out.
#[derive(Debug, PartialEq, Eq)]
pub enum Output {
    Change(Change),
    /// The warnings that now hold for the subject.
    Warnings(String, Vec<Warning>),
}

/// Gets one object's text again: file name, hash of the piece, key.
pub type Reread<'a> = &'a mut dyn FnMut(&str, u64, &Key) -> Option<Object>;

#[derive(Debug, Default)]
pub struct Index {
    files: BTreeMap<Arc<str>, File>,
    objects: Hashed<Key, Entry>,
}

/// The last good state of a file.
#[derive(Debug, Default)]
struct File {
    /// Hash and objects of each piece, in order.
    pieces: Vec<Piece>,
    broken: bool,
}

#[derive(Debug, Default)]
struct Entry {
    /// The files that hold it, in order of name. A file that holds it twice is there twice.
    holders: Vec<(Arc<str>, u64)>,
    /// Hash of the piece that was sent; `None` before the first.
    sent: Option<u64>,
    /// An upsert was sent, and no end since.
    served: bool,
    subject: Box<str>,
    /// Found by conversion.
    warnings: Vec<Warning>,
}

impl Index {
    /// The hashes of the file's pieces: what need not be parsed again.
    pub fn hashes(&self, file: &str) -> HashSet<u64> {
        self.files.get(file).map(|f| f.pieces.iter().map(|p| p.0).collect()).unwrap_or_default()
    }

    /// Names of all files with a state, good or broken.
    pub fn files(&self) -> Vec<Arc<str>> {
        self.files.keys().cloned().collect()
    }

    /// A file could not be read: what was known of it stays in force.
    pub fn broken(&mut self, name: &str, fault: &Fault) -> Vec<Output> {
        let file = self.files.entry(name.into()).or_default();
        file.broken = true;
        let kept = match file.pieces.is_empty() {
            true => "the file is not used",
            false => "its last good state stays in force",
        };
        let subject = format!("file {name}");
        vec![Output::Warnings(subject.clone(), vec![Warning { subject, message: format!("{fault}: {kept}") }])]
    }

    /// A file is there, in a good state.
    pub fn upsert(&mut self, name: &str, parsed: Vec<Parsed>, reread: Reread<'_>) -> Vec<Output> {
        let name = self.files.get_key_value(name).map_or_else(|| Arc::from(name), |(known, _)| known.clone());
        let old = self.files.remove(&name).unwrap_or_default();
        let mut out = healed(&name, old.broken);
        let known: HashMap<u64, &Box<[Key]>> = old.pieces.iter().map(|(hash, keys)| (*hash, keys)).collect();
        let mut fresh: Hashed<(Key, u64), Object> = Hashed::default();
        let mut pieces = Vec::with_capacity(parsed.len());
        for piece in parsed {
            let keys = match piece.objects {
                Some(objects) => objects.into_iter().map(|o| keep(&mut fresh, piece.hash, o)).collect(),
                None => known.get(&piece.hash).map(|k| (*k).clone()).unwrap_or_default(),
            };
            pieces.push((piece.hash, keys));
        }
        let same = unchanged(&old.pieces, &pieces);
        let mut touched: Vec<Key> = self.forget(&name, &old.pieces, &same);
        self.remember(&name, &pieces, &same, &mut touched);
        self.files.insert(name, File { pieces, broken: false });
        for key in touched {
            self.settle(key, &mut fresh, reread, &mut out);
        }
        out
    }

    /// A file is gone.
    pub fn remove(&mut self, name: &str, reread: Reread<'_>) -> Vec<Output> {
        let Some((name, old)) = self.files.remove_entry(name) else { return Vec::new() };
        let mut out = healed(&name, old.broken);
        for key in self.forget(&name, &old.pieces, &HashSet::new()) {
            self.settle(key, &mut Hashed::default(), reread, &mut out);
        }
        out
    }

    /// Takes `name` out of the holders of what it no longer holds in the same text.
    fn forget(&mut self, name: &Arc<str>, old: &[Piece], same: &HashSet<u64>) -> Vec<Key> {
        let mut touched = Vec::new();
        for (hash, keys) in old.iter().filter(|(hash, _)| !same.contains(hash)) {
            for key in keys {
                if let Some(entry) = self.objects.get_mut(key) {
                    entry.holders.retain(|(file, held)| !(file == name && held == hash));
                    touched.push(key.clone());
                }
            }
        }
        touched
    }

    /// Puts `name` among the holders of what it now holds.
    fn remember(&mut self, name: &Arc<str>, new: &[Piece], same: &HashSet<u64>, touched: &mut Vec<Key>) {
        let mut seen: HashSet<Key> = touched.iter().cloned().collect();
        for (hash, keys) in new.iter().filter(|(hash, _)| !same.contains(hash)) {
            for key in keys {
                let entry = self.objects.entry(key.clone()).or_default();
                // Behind the same file's earlier places, before the files after it.
                let at = entry.holders.partition_point(|(file, _)| file <= name);
                entry.holders.insert(at, (name.clone(), *hash));
                if seen.insert(key.clone()) {
                    touched.push(key.clone());
                }
            }
        }
    }

    /// Makes what was sent of an object what should have been.
    fn settle(&mut self, key: Key, fresh: &mut Hashed<(Key, u64), Object>, reread: Reread<'_>, out: &mut Vec<Output>) {
        let Some(entry) = self.objects.get_mut(&key) else { return };
        let Some((file, hash)) = entry.holders.first().cloned() else {
            if entry.served {
                out.push(Output::Change(gone(key.clone())));
            }
            out.push(Output::Warnings(entry.subject.to_string(), Vec::new()));
            self.objects.remove(&key);
            return;
        };
        if entry.sent != Some(hash) {
            // A file that changed under our eyes yields nothing here, and an event of its own soon.
            let found = fresh.remove(&(key.clone(), hash)).or_else(|| reread(&file, hash, &key));
            if let Some(object) = found {
                entry.sent = Some(hash);
                entry.subject = object.subject.into();
                entry.warnings = object.warnings;
                let upsert = !matches!(object.change, Change::ServiceGone(_) | Change::SliceGone(_) | Change::NodeGone);
                if upsert || entry.served {
                    out.push(Output::Change(object.change));
                }
                entry.served = upsert;
            }
        }
        let warnings = entry.warnings.iter().cloned().chain(entry.duplicates()).collect();
        out.push(Output::Warnings(entry.subject.to_string(), warnings));
    }
}

impl Entry {
    fn duplicates(&self) -> Option<Warning> {
        let (first, others) = self.holders.split_first()?;
        let mut names: Vec<&str> = others.iter().map(|(file, _)| &**file).filter(|f| *f != &*first.0).collect();
        names.dedup();
        let message = match (others.is_empty(), names.is_empty()) {
            (true, _) => return None,
            (false, true) => format!("it is in {} more than once: the first one is used", first.0),
            (false, false) => format!("it is in {} and in {}: the one in {0} is used", first.0, names.join(", ")),
        };
        Some(Warning { subject: self.subject.to_string(), message })
    }
}

fn keep(fresh: &mut Hashed<(Key, u64), Object>, hash: u64, object: Object) -> Key {
    let key = object.key.clone();
    fresh.entry((key.clone(), hash)).or_insert(object);
    key
}

fn healed(name: &str, broken: bool) -> Vec<Output> {
    broken.then(|| Output::Warnings(format!("file {name}"), Vec::new())).into_iter().collect()
}

/// Hashes of pieces that are in both and hold nothing that the file holds twice: those are put in again, so that their
/// order is always that of the file.
fn unchanged(old: &[Piece], new: &[Piece]) -> HashSet<u64> {
    let hashes: HashSet<u64> = old.iter().map(|p| p.0).collect();
    let twice: HashSet<&Key> = twice(old).chain(twice(new)).collect();
    let same = new.iter().filter(|(hash, keys)| hashes.contains(hash) && !keys.iter().any(|k| twice.contains(k)));
    same.map(|(hash, _)| *hash).collect()
}

fn twice(pieces: &[Piece]) -> impl Iterator<Item = &Key> {
    let mut seen = HashSet::new();
    pieces.iter().flat_map(|(_, keys)| keys).filter(move |key| !seen.insert(*key))
}

/// The end of an object.
fn gone(key: Key) -> Change {
    match key {
        Key::Service(name) => Change::ServiceGone(name),
        Key::Slice(name) => Change::SliceGone(name),
        Key::Node => Change::NodeGone,
    }
}
