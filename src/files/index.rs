//! Which file holds which object. The first file by name wins an object that several files hold (and the first place
//! in a file); when it goes, the next takes over.
//!
//! Of an object only its names, the hash of its text and what was told of it are kept: what was sent is compared with
//! what should have been by hash, and the text itself is read again on the rare occasion that it is needed.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::fault::Fault;
use super::parse::{Key, Object, Parsed};
use crate::model::{Change, Warning};
use crate::table::{HashMap, HashSet};

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
    objects: HashMap<Key, Entry>,
}

/// The last good state of a file.
#[derive(Debug, Default)]
struct File {
    /// Hash and objects of each piece, in order.
    pieces: Vec<Piece>,
    /// An object is in it more than once.
    repeats: bool,
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
        let mut file = self.files.remove(&name).unwrap_or_default();
        let mut out = healed(&name, std::mem::take(&mut file.broken));
        let mut fresh = HashMap::default();
        let changed = file.changed(&parsed);
        let old = file.replace(&changed, parsed, &mut fresh);
        let mut touched = Vec::new();
        self.forget(&name, &old, &mut touched);
        let changed = changed.new;
        let part = changed.len() < file.pieces.len();
        file.repeats = self.remember(&name, &file.pieces[changed], &mut touched);
        if file.repeats && part {
            // The places of one file are among the holders in its own order: all are taken out and put in again.
            self.forget(&name, &file.pieces, &mut touched);
            self.remember(&name, &file.pieces, &mut touched);
        }
        self.files.insert(name, file);
        let mut seen = HashSet::default();
        touched.retain(|key| seen.insert(key.clone()));
        for key in touched {
            self.settle(key, &mut fresh, reread, &mut out);
        }
        out
    }

    /// A file is gone.
    pub fn remove(&mut self, name: &str, reread: Reread<'_>) -> Vec<Output> {
        let Some((name, old)) = self.files.remove_entry(name) else { return Vec::new() };
        let mut out = healed(&name, old.broken);
        let mut touched = Vec::new();
        self.forget(&name, &old.pieces, &mut touched);
        for key in touched {
            self.settle(key, &mut HashMap::default(), reread, &mut out);
        }
        out
    }

    /// Takes `name` out of the holders of what these pieces hold. Where the file repeats an object, it has to be all of
    /// its pieces: equal places are not told apart.
    fn forget(&mut self, name: &Arc<str>, pieces: &[Piece], touched: &mut Vec<Key>) {
        for (hash, keys) in pieces {
            for key in keys {
                if let Some(entry) = self.objects.get_mut(key) {
                    entry.holders.retain(|(file, held)| !(file == name && held == hash));
                    touched.push(key.clone());
                }
            }
        }
    }

    /// Puts `name` among the holders of what these pieces hold; true when it was there with another piece.
    fn remember(&mut self, name: &Arc<str>, pieces: &[Piece], touched: &mut Vec<Key>) -> bool {
        let mut repeats = false;
        for (hash, keys) in pieces {
            for key in keys {
                let entry = self.objects.entry(key.clone()).or_default();
                // Behind the same file's earlier places, before the files after it.
                let at = entry.holders.partition_point(|(file, _)| file <= name);
                repeats |= at > 0 && entry.holders[at - 1].0 == *name;
                entry.holders.insert(at, (name.clone(), *hash));
                touched.push(key.clone());
            }
        }
        repeats
    }

    /// Makes what was sent of an object what should have been.
    fn settle(&mut self, key: Key, fresh: &mut HashMap<(Key, u64), Object>, reread: Reread<'_>, out: &mut Vec<Output>) {
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

/// Pieces of a file that are not what they were: by place in the old version and in the new.
struct Changed {
    old: Range<usize>,
    new: Range<usize>,
}

impl File {
    /// What lies between the beginning and the end that both versions share: mostly one piece of thousands. All of it
    /// when the file repeats an object.
    fn changed(&self, parsed: &[Parsed]) -> Changed {
        let same = |(old, new): &(&Piece, &Parsed)| old.0 == new.hash && !self.repeats;
        let head = self.pieces.iter().zip(parsed).take_while(same).count();
        let rest = self.pieces.len().min(parsed.len()) - head;
        let tail = self.pieces.iter().rev().zip(parsed.iter().rev()).take(rest).take_while(same).count();
        Changed { old: head..self.pieces.len() - tail, new: head..parsed.len() - tail }
    }

    /// Puts the changed pieces in; returns those that they replace.
    fn replace(
        &mut self,
        changed: &Changed,
        parsed: Vec<Parsed>,
        fresh: &mut HashMap<(Key, u64), Object>,
    ) -> Vec<Piece> {
        let mut pieces = Vec::with_capacity(changed.new.len());
        // Known pieces that moved.
        let mut known: HashMap<u64, &Box<[Key]>> = HashMap::default();
        for piece in parsed.into_iter().take(changed.new.end).skip(changed.new.start) {
            let keys = match piece.objects {
                Some(objects) => objects.into_iter().map(|o| keep(fresh, piece.hash, o)).collect(),
                None => {
                    if known.is_empty() {
                        known = self.pieces.iter().map(|(hash, keys)| (*hash, keys)).collect();
                    }
                    known.get(&piece.hash).map(|keys| (*keys).clone()).unwrap_or_default()
                }
            };
            pieces.push((piece.hash, keys));
        }
        self.pieces.splice(changed.old.clone(), pieces).collect()
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

fn keep(fresh: &mut HashMap<(Key, u64), Object>, hash: u64, object: Object) -> Key {
    let key = object.key.clone();
    fresh.entry((key.clone(), hash)).or_insert(object);
    key
}

fn healed(name: &str, broken: bool) -> Vec<Output> {
    broken.then(|| Output::Warnings(format!("file {name}"), Vec::new())).into_iter().collect()
}

/// The end of an object.
fn gone(key: Key) -> Change {
    match key {
        Key::Service(name) => Change::ServiceGone(name),
        Key::Slice(name) => Change::SliceGone(name),
        Key::Node => Change::NodeGone,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::ObjectName;

    /// A version of a file: which object each piece holds, and in which text.
    type Version = Vec<(u8, u8)>;

    fn parsed(version: &Version, known: &HashSet<u64>) -> Vec<Parsed> {
        let piece = |&(name, text): &(u8, u8)| {
            let hash = u64::from(name) << 8 | u64::from(text);
            let key = Key::Service(ObjectName::new("default", &name.to_string()));
            let change = Change::Node(Box::default());
            let object = Object { key, subject: name.to_string(), change, warnings: Vec::new() };
            Parsed { hash, objects: (!known.contains(&hash)).then(|| vec![object]) }
        };
        version.iter().map(piece).collect()
    }

    fn upsert(index: &mut Index, file: &str, version: &Version) {
        let known = index.hashes(file);
        index.upsert(file, parsed(version, &known), &mut |_, _, _| None);
    }

    type Holders = BTreeMap<Key, Vec<(Arc<str>, u64)>>;

    fn holders(index: &Index) -> Holders {
        index.objects.iter().map(|(key, entry)| (key.clone(), entry.holders.clone())).collect()
    }

    proptest! {
        #[test]
        fn a_file_that_changed_is_held_as_if_it_had_always_been_so(
            versions in prop::collection::vec((0..2_usize, prop::collection::vec((0..6_u8, 0..3_u8), 0..8)), 1..8),
        ) {
            let names = ["a.yaml", "b.yaml"];
            let (mut index, mut last) = (Index::default(), BTreeMap::new());
            for (file, version) in versions {
                upsert(&mut index, names[file], &version);
                last.insert(names[file], version);
                let mut anew = Index::default();
                last.iter().for_each(|(file, version)| upsert(&mut anew, file, version));
                prop_assert_eq!(holders(&index), holders(&anew));
            }
        }
    }
}
