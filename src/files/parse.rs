//! Reads a file into domain changes. A file counts as a whole: one piece that cannot be read is a fault of the file,
//! told by line and reason, and nothing of that version of the file is used.

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::path::Path;

use serde::Deserialize;
use serde::de::{DeserializeOwned, DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::fault::Fault;
use super::split::{self, Identity, Piece, Shape};
use crate::model::{Change, ObjectName, Warning};
use crate::objects::convert::{Convert, Converter};
use crate::objects::wire;
use crate::table::HashSet;

/// A file above this size is refused: a directory of objects is not a place for disk images.
const LARGEST_FILE: u64 = 256 << 20;
/// From this many bytes to parse a file is worth a second thread.
const WORTH_A_THREAD: usize = 512 << 10;

/// What an object is known by.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    Service(ObjectName),
    Slice(ObjectName),
    Node,
}

/// One object of a file.
#[derive(Debug)]
pub struct Object {
    pub key: Key,
    pub subject: String,
    pub change: Change,
    pub warnings: Vec<Warning>,
}

/// One piece of a file.
#[derive(Debug)]
pub struct Parsed {
    pub hash: u64,
    /// `None` for a piece whose hash is known already.
    pub objects: Option<Vec<Object>>,
}

/// Reads the file at `path`; pieces with a `known` hash are not parsed.
///
/// # Errors
/// `Ok(None)` when there is no such file (any more); a fault when it cannot be used.
pub fn file(path: &Path, known: &HashSet<u64>, converter: &mut Converter) -> Result<Option<Vec<Parsed>>, Fault> {
    // A parser that panics must not look like a directory with fewer files: what was served would be taken away.
    let read = AssertUnwindSafe(|| read_file(path, known, converter));
    std::panic::catch_unwind(read).unwrap_or_else(|_| Err(Fault::new(0, "the parser panicked")))
}

fn read_file(path: &Path, known: &HashSet<u64>, converter: &mut Converter) -> Result<Option<Vec<Parsed>>, Fault> {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Fault::new(0, error.to_string())),
    };
    if !metadata.is_file() {
        return Ok(None);
    }
    if metadata.len() > LARGEST_FILE {
        return Err(Fault::new(0, format!("the file is larger than {} MiB", LARGEST_FILE >> 20)));
    }
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Fault::new(0, error.to_string())),
    };
    let text = String::from_utf8(bytes).map_err(|e| {
        let line = 1 + e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count();
        Fault::new(line, "the text is not UTF-8")
    })?;
    let json = path.extension().is_some_and(|e| e == "json");
    let pieces = split::split(&text, json)?;
    parse_all(&pieces, known, converter).map(Some)
}

/// Parses the pieces that are not known, on two threads when there is much of them.
fn parse_all(pieces: &[Piece<'_>], known: &HashSet<u64>, converter: &mut Converter) -> Result<Vec<Parsed>, Fault> {
    let hashed: Vec<(&Piece<'_>, u64, bool)> = pieces
        .iter()
        .map(|piece| {
            let hash = piece.hash();
            (piece, hash, known.contains(&hash))
        })
        .collect();
    let bytes: usize = hashed.iter().filter(|(_, _, known)| !known).map(|(piece, ..)| piece.text.len()).sum();
    if bytes < WORTH_A_THREAD || pieces.len() < 2 {
        return hashed.iter().map(|p| parse(p, converter)).collect();
    }
    let (front, back) = hashed.split_at(hashed.len() / 2);
    let mut second = Converter::new(converter.settings().clone());
    std::thread::scope(|scope| {
        let back = scope.spawn(|| back.iter().map(|p| parse(p, &mut second)).collect::<Result<Vec<_>, _>>());
        let mut all: Vec<Parsed> = front.iter().map(|p| parse(p, converter)).collect::<Result<_, _>>()?;
        all.extend(back.join().map_err(|_| Fault::new(0, "the parser panicked"))??);
        Ok(all)
    })
}

fn parse(&(piece, hash, known): &(&Piece<'_>, u64, bool), converter: &mut Converter) -> Result<Parsed, Fault> {
    let objects = match known {
        true => None,
        false => Some(objects(piece, converter)?),
    };
    Ok(Parsed { hash, objects })
}

/// The objects of a piece: one, none (another kind, another node), or those of a list that could not be cut.
pub fn objects(piece: &Piece<'_>, converter: &mut Converter) -> Result<Vec<Object>, Fault> {
    let probe;
    let identity = match (split::identity(piece).filter(|_| piece.shape != Shape::Json), piece.listed) {
        (Some(identity), _) => identity,
        (None, listed) => {
            probe = read::<Probe>(piece)?;
            let default = listed.unwrap_or_default();
            Identity {
                api_version: probe.api_version.as_deref().unwrap_or(default.api_version),
                kind: probe.kind.as_deref().unwrap_or(default.kind),
            }
        }
    };
    match (identity.api_version, identity.kind) {
        ("v1", "Service") => one::<wire::Service>(piece, converter),
        ("discovery.k8s.io/v1", "EndpointSlice") => one::<wire::EndpointSlice>(piece, converter),
        ("v1", "Node") => one::<wire::Node>(piece, converter),
        (_, kind) if split::is_list(kind) => uncut(piece, identity, converter),
        ("", _) | (_, "") => {
            Err(Fault::new(piece.line, "this is not a Kubernetes object: it has no apiVersion or no kind"))
        }
        (version, kind) => {
            tracing::debug!(version, kind, "not a kind that kubelane reads: ignored");
            Ok(Vec::new())
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an object with apiVersion and kind")]
struct Probe {
    api_version: Option<String>,
    kind: Option<String>,
}

fn read<T: DeserializeOwned>(piece: &Piece<'_>) -> Result<T, Fault> {
    match piece.shape {
        Shape::Yaml => serde_norway::from_str(piece.text).map_err(|e| Fault::yaml(&e, piece.line)),
        Shape::YamlItem => {
            serde_norway::from_str::<(T,)>(piece.text).map(|t| t.0).map_err(|e| Fault::yaml(&e, piece.line))
        }
        Shape::Json => serde_json::from_str(piece.text).map_err(|e| Fault::json(&e, piece.line)),
    }
}

fn one<W: Convert + Keyed>(piece: &Piece<'_>, converter: &mut Converter) -> Result<Vec<Object>, Fault> {
    object(read::<W>(piece)?, piece.line, converter).map(|object| object.into_iter().collect())
}

fn object<W: Convert + Keyed>(wire: W, line: usize, converter: &mut Converter) -> Result<Option<Object>, Fault> {
    if wire.metadata().name.is_empty() {
        return Err(Fault::new(line, format!("{} without metadata.name", W::KIND)));
    }
    let subject = W::subject(wire.metadata());
    let key = W::key(converter.object_name(wire.metadata()));
    let converted = wire.convert(converter);
    Ok(converted.change.map(|change| Object { key, subject, change, warnings: converted.warnings }))
}

/// How an object is found again.
trait Keyed {
    fn key(name: ObjectName) -> Key;
}

impl Keyed for wire::Service {
    fn key(name: ObjectName) -> Key {
        Key::Service(name)
    }
}

impl Keyed for wire::EndpointSlice {
    fn key(name: ObjectName) -> Key {
        Key::Slice(name)
    }
}

impl Keyed for wire::Node {
    fn key(_: ObjectName) -> Key {
        Key::Node
    }
}

/// A list that was not cut (flow style, anchors): its entries pass one by one, and no more than one is kept as a value.
fn uncut(piece: &Piece<'_>, list: Identity<'_>, converter: &mut Converter) -> Result<Vec<Object>, Fault> {
    let mut entries = Entries { line: piece.line, list, converter, objects: Vec::new(), fault: None };
    let result = match piece.shape {
        Shape::Json => Err(Fault::new(piece.line, "a list inside a list")),
        _ => (&mut entries)
            .deserialize(serde_norway::Deserializer::from_str(piece.text))
            .map_err(|e| Fault::yaml(&e, piece.line)),
    };
    match entries.fault {
        Some(fault) => Err(fault),
        None => result.map(|()| entries.objects),
    }
}

/// Walks a list document to its items, and through them.
struct Entries<'a> {
    line: usize,
    list: Identity<'a>,
    converter: &'a mut Converter,
    objects: Vec<Object>,
    fault: Option<Fault>,
}

impl Entries<'_> {
    fn take(&mut self, value: serde_norway::Value) -> Result<(), Fault> {
        let text = |key: &str| value.get(key).and_then(|v| v.as_str()).map(str::to_owned);
        let default = self.list.kind.strip_suffix("List").unwrap_or_default().to_owned();
        let version = text("apiVersion").unwrap_or_else(|| self.list.api_version.to_owned());
        let object = match (version.as_str(), text("kind").unwrap_or(default).as_str()) {
            ("v1", "Service") => object(self.value::<wire::Service>(value)?, self.line, self.converter)?,
            ("discovery.k8s.io/v1", "EndpointSlice") => {
                object(self.value::<wire::EndpointSlice>(value)?, self.line, self.converter)?
            }
            ("v1", "Node") => object(self.value::<wire::Node>(value)?, self.line, self.converter)?,
            _ => None,
        };
        self.objects.extend(object);
        Ok(())
    }

    fn value<W: DeserializeOwned>(&self, value: serde_norway::Value) -> Result<W, Fault> {
        serde_norway::from_value(value).map_err(|e| Fault::yaml(&e, self.line))
    }
}

impl<'de> DeserializeSeed<'de> for &mut Entries<'_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for &mut Entries<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of objects")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "items" => map.next_value_seed(&mut *self)?,
                _ => map.next_value::<IgnoredAny>().map(|_| ())?,
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while let Some(value) = seq.next_element::<serde_norway::Value>()? {
            if let Err(fault) = self.take(value) {
                self.fault.get_or_insert(fault);
            }
        }
        Ok(())
    }
}
