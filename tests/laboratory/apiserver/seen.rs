//! What a source has said so far: changes applied the way their receiver must apply them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kubelane::model::{Change, Kind, Node, ObjectName, Service, Slice};
use tokio::sync::mpsc;

/// The world as told, and how it was told.
#[derive(Debug, Default, PartialEq)]
pub struct Seen {
    pub services: BTreeMap<String, Service>,
    pub slices: BTreeMap<String, Slice>,
    pub node: Option<Node>,
    /// Messages by subject.
    pub warnings: BTreeMap<String, Vec<String>>,
    /// Changes received, lists begun and lists ended.
    pub counts: (usize, BTreeMap<u8, usize>, BTreeMap<u8, usize>),
    fresh: BTreeMap<u8, BTreeSet<String>>,
}

impl Seen {
    pub fn apply(&mut self, change: Change) {
        self.counts.0 += 1;
        match change {
            Change::Service(service) => {
                self.touch(Kind::Services, &service.name);
                self.services.insert(service.name.to_string(), *service);
            }
            Change::ServiceGone(name) => drop(self.services.remove(&name.to_string())),
            Change::Slice(slice) => {
                self.touch(Kind::EndpointSlices, &slice.name);
                self.slices.insert(slice.name.to_string(), *slice);
            }
            Change::SliceGone(name) => drop(self.slices.remove(&name.to_string())),
            Change::Node(node) => {
                self.touch(Kind::Node, &ObjectName::new("", "node"));
                self.node = Some(*node);
            }
            Change::NodeGone => self.node = None,
            Change::ListBegin(kind) => {
                *self.counts.1.entry(kind as u8).or_default() += 1;
                self.fresh.insert(kind as u8, BTreeSet::new());
            }
            Change::ListEnd(kind) => {
                *self.counts.2.entry(kind as u8).or_default() += 1;
                let fresh = self.fresh.remove(&(kind as u8)).expect("a list ends that has begun");
                match kind {
                    Kind::Services => self.services.retain(|name, _| fresh.contains(name)),
                    Kind::EndpointSlices => self.slices.retain(|name, _| fresh.contains(name)),
                    Kind::Node if fresh.is_empty() => self.node = None,
                    Kind::Node => {}
                }
            }
            Change::Warnings { subject, warnings } => {
                assert!(warnings.iter().all(|w| w.subject == subject), "{warnings:?}");
                let before = match warnings.is_empty() {
                    true => self.warnings.remove(&subject),
                    false => self.warnings.insert(subject, warnings.into_iter().map(|w| w.message).collect()),
                };
                // An empty list only ever takes something back.
                drop(before);
            }
        }
    }

    fn touch(&mut self, kind: Kind, name: &ObjectName) {
        if let Some(fresh) = self.fresh.get_mut(&(kind as u8)) {
            fresh.insert(name.to_string());
        }
    }

    /// Lists of this kind that came to their end.
    pub fn lists(&self, kind: Kind) -> usize {
        self.counts.2.get(&(kind as u8)).copied().unwrap_or(0)
    }

    /// Lists of this kind that were begun.
    pub fn begun(&self, kind: Kind) -> usize {
        self.counts.1.get(&(kind as u8)).copied().unwrap_or(0)
    }

    /// Receives until `done` holds; panics after `patience`.
    pub async fn until(
        &mut self,
        changes: &mut mpsc::Receiver<Change>,
        patience: Duration,
        what: &str,
        done: impl Fn(&Seen) -> bool,
    ) {
        let receive = async {
            while !done(self) {
                let change = changes.recv().await.unwrap_or_else(|| panic!("the source ended before: {what}"));
                self.apply(change);
            }
        };
        if tokio::time::timeout(patience, receive).await.is_err() {
            panic!("not in {patience:?}: {what}; seen: {self:#?}");
        }
    }

    /// Receives whatever comes within `time`.
    pub async fn settle(&mut self, changes: &mut mpsc::Receiver<Change>, time: Duration) {
        let receive = async {
            while let Some(change) = changes.recv().await {
                self.apply(change);
            }
        };
        let _ = tokio::time::timeout(time, receive).await;
    }
}
