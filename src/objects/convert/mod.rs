//! Kubernetes objects become domain records here, and go no further. A field that cannot be used costs that field, not
//! the object: each becomes a [`Warning`] that says what is wrong and what kubelane does about it.

mod node;
mod parse;
mod service;
mod slice;

use std::sync::Arc;

use super::intern::Interner;
use super::{Settings, wire};
use crate::model::{Change, Kind, ObjectName, Warning};

/// More than this many warnings for one object are summed up in one line.
const WARNINGS_PER_OBJECT: usize = 8;

/// Turns wire objects into records, sharing names between all that it has made.
#[derive(Debug)]
pub struct Converter {
    settings: Settings,
    names: Interner,
}

/// What became of an object.
#[derive(Debug)]
pub struct Converted {
    /// An upsert, or the "gone" of an object that is not this proxy's to serve. `None`: another node's Node.
    pub change: Option<Change>,
    pub warnings: Vec<Warning>,
}

impl Converter {
    pub fn new(settings: Settings) -> Self {
        Converter { settings, names: Interner::default() }
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The shared name of an object. Files may leave the namespace out, which means "default".
    pub fn object_name(&mut self, metadata: &wire::Metadata) -> ObjectName {
        let namespace = if metadata.namespace.is_empty() { "default" } else { metadata.namespace.as_str() };
        ObjectName { namespace: self.names.name(namespace), name: Arc::from(metadata.name.as_str()) }
    }
}

/// A wire object that knows its way into the domain.
pub trait Convert: wire::Wire {
    /// What is listed when a list of this object begins.
    const LISTED: Kind;

    /// The record, or the record's end when the object is not this proxy's to serve.
    fn convert(self, converter: &mut Converter) -> Converted;

    /// The change that takes the object away.
    fn gone(metadata: &wire::Metadata, converter: &mut Converter) -> Change;

    /// "Service default/web": how warnings name the object.
    fn subject(metadata: &wire::Metadata) -> String {
        match metadata.namespace.as_str() {
            "" if Self::LISTED == Kind::Node => format!("{} {}", Self::KIND, metadata.name),
            "" => format!("{} default/{}", Self::KIND, metadata.name),
            namespace => format!("{} {namespace}/{}", Self::KIND, metadata.name),
        }
    }
}

/// Collects the warnings of one object.
struct Notes {
    subject: String,
    warnings: Vec<Warning>,
    left_out: usize,
}

impl Notes {
    fn new(subject: String) -> Self {
        Notes { subject, warnings: Vec::new(), left_out: 0 }
    }

    fn add(&mut self, message: String) {
        if self.warnings.len() >= WARNINGS_PER_OBJECT {
            self.left_out += 1;
        } else {
            self.warnings.push(Warning { subject: self.subject.clone(), message });
        }
    }

    /// Tells of an address that is not written as it is read.
    fn plain(&mut self, what: &str, text: &str) {
        if let Some(read) = parse::plain(text) {
            self.add(format!(
                "{what} {} has leading zeros: it is read as {read}, as kube-proxy does",
                wire::quoted(text)
            ));
        }
    }

    fn finish(mut self) -> Vec<Warning> {
        if self.left_out > 0 {
            let message = format!("{} more problems of this kind", self.left_out);
            self.warnings.push(Warning { subject: self.subject, message });
        }
        self.warnings
    }
}
