//! Who is shown events. A newcomer always is: when there are as many as may be, the one that came first gives way, and its
//! page asks again. How many connections there are at all is for `places.rs` to say.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Viewers at once.
const MOST: usize = 16;

/// All viewers.
#[derive(Debug, Default)]
pub struct Viewers(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    newest: u64,
    /// The oldest first.
    present: BTreeMap<u64, Arc<Notify>>,
}

/// One of them.
#[derive(Debug)]
pub struct Viewer {
    id: u64,
    taken: Arc<Notify>,
    all: Arc<Mutex<Table>>,
}

impl Viewers {
    pub fn enter(&self) -> Viewer {
        let mut table = lock(&self.0);
        if table.present.len() >= MOST
            && let Some((_, oldest)) = table.present.pop_first()
        {
            oldest.notify_one();
        }
        table.newest += 1;
        let (id, taken) = (table.newest, Arc::new(Notify::new()));
        table.present.insert(id, Arc::clone(&taken));
        Viewer { id, taken, all: Arc::clone(&self.0) }
    }

    pub fn count(&self) -> u32 {
        lock(&self.0).present.len() as u32
    }
}

impl Viewer {
    /// Resolves when a newcomer has the place.
    pub async fn taken(&self) {
        self.taken.notified().await;
    }

    /// True when nobody is left.
    pub fn leave(&self) -> bool {
        let mut table = lock(&self.all);
        table.present.remove(&self.id);
        table.present.is_empty()
    }
}

fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_oldest_viewer_gives_way_to_a_newcomer() {
        let viewers = Viewers::default();
        let first: Vec<Viewer> = (0..MOST).map(|_| viewers.enter()).collect();
        let newcomer = viewers.enter();
        let is_taken =
            async |viewer: &Viewer| tokio::time::timeout(Duration::from_secs(1), viewer.taken()).await.is_ok();
        assert!(is_taken(&first[0]).await && !is_taken(&first[1]).await && !is_taken(&newcomer).await);
        assert_eq!(viewers.count() as usize, MOST);
        assert!(!newcomer.leave());
        let last = first.iter().map(Viewer::leave).filter(|is_empty| *is_empty).count();
        assert!(last > 0 && viewers.count() == 0);
    }
}
