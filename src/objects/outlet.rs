//! Where a source's changes go out. It frames lists, and remembers which objects had warnings, so that the receiver
//! hears of a warning when it appears and when it ends.

use std::collections::HashMap;

use tokio::sync::mpsc;

use crate::model::{Change, Kind, Warning};

/// The receiver is gone: the source ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed;

/// The sender of one source (or of one watch of it).
#[derive(Debug)]
pub struct Outlet {
    changes: mpsc::Sender<Change>,
    /// Subjects whose last word was a warning, with the list in which it was last said.
    warned: HashMap<String, u64>,
    list: u64,
}

impl Outlet {
    pub fn new(changes: mpsc::Sender<Change>) -> Self {
        Outlet { changes, warned: HashMap::new(), list: 0 }
    }

    /// Resolves when nobody listens any more.
    pub async fn closed(&self) {
        self.changes.closed().await;
    }

    /// # Errors
    /// When the receiver is gone.
    pub async fn send(&self, change: Change) -> Result<(), Closed> {
        self.changes.send(change).await.map_err(|_| Closed)
    }

    /// # Errors
    /// When the receiver is gone.
    pub async fn list_begin(&mut self, kind: Kind) -> Result<(), Closed> {
        self.list += 1;
        self.send(Change::ListBegin(kind)).await
    }

    /// Ends a list; warnings of objects that were not in it are taken back.
    ///
    /// # Errors
    /// When the receiver is gone.
    pub async fn list_end(&mut self, kind: Kind) -> Result<(), Closed> {
        let list = self.list;
        let ended: Vec<String> = self.warned.extract_if(|_, said| *said < list).map(|(subject, _)| subject).collect();
        for subject in ended {
            self.send(Change::Warnings { subject, warnings: Vec::new() }).await?;
        }
        self.send(Change::ListEnd(kind)).await
    }

    /// Says what warnings now hold for `subject`: something is sent only if there are any, or were before.
    ///
    /// # Errors
    /// When the receiver is gone.
    pub async fn warnings(&mut self, subject: String, warnings: Vec<Warning>) -> Result<(), Closed> {
        let before = match warnings.is_empty() {
            true => self.warned.remove(&subject).is_some(),
            false => self.warned.insert(subject.clone(), self.list).is_some(),
        };
        match before || !warnings.is_empty() {
            true => self.send(Change::Warnings { subject, warnings }).await,
            false => Ok(()),
        }
    }
}
