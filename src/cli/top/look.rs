//! Looks, on a thread of their own: a daemon that answers late holds up no key.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::chain::chain;
use crate::cli::explain::{Explanation, of_service};
use crate::explain::{About, ask};
use crate::overview::{Overview, Reader};

/// A Service is explained again after so many times as long as it took: half a percent of one processor.
const EXPLAIN_QUOTA: u32 = 200;
/// But not later than this: it may have been the daemon that was busy.
const EXPLAIN_MOST: Duration = Duration::from_secs(30);

/// Namespace and name.
pub type ServiceName = (String, String);

/// What one look saw.
#[derive(Debug)]
pub struct Seen {
    pub overview: Result<Overview, String>,
    /// Why the daemon does not answer, where it listens.
    pub daemon_trouble: Option<String>,
    /// Of the Service that was asked for, if it was time for that.
    pub detail: Option<(ServiceName, Result<Explanation, String>)>,
}

/// Asks the thread that looks.
pub struct Looker {
    wanted: Sender<Option<ServiceName>>,
    seen: Receiver<Seen>,
    is_asked: bool,
}

impl Looker {
    /// The thread ends with this.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start(pin_path: &Path) -> Result<Looker> {
        let ((wanted, asked), (answers, seen)) = (channel(), channel());
        let mut looks = Looks { reader: Reader::new(pin_path), pin_path: pin_path.to_owned(), explained: None };
        let work = move || {
            while let Ok(service) = asked.recv() {
                if answers.send(looks.look(service)).is_err() {
                    break;
                }
            }
        };
        std::thread::Builder::new().name("looks".to_owned()).spawn(work).context("starting a thread")?;
        Ok(Looker { wanted, seen, is_asked: false })
    }

    /// An answer is waited for.
    pub fn is_asked(&self) -> bool {
        self.is_asked
    }

    /// # Errors
    /// When the thread broke off.
    pub fn ask(&mut self, service: Option<ServiceName>) -> Result<()> {
        self.is_asked = true;
        self.wanted.send(service).ok().context("the thread that looks broke off")
    }

    /// # Errors
    /// When the thread broke off.
    pub fn answer(&mut self) -> Result<Option<Seen>> {
        match self.seen.try_recv() {
            Ok(seen) => {
                self.is_asked = false;
                Ok(Some(seen))
            }
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => bail!("the thread that looks broke off"),
        }
    }
}

struct Looks {
    reader: Reader,
    pin_path: PathBuf,
    /// What was explained last, and when it is due again.
    explained: Option<(ServiceName, Instant)>,
}

impl Looks {
    fn look(&mut self, service: Option<ServiceName>) -> Seen {
        let (metrics, daemon_trouble) = match ask(&self.pin_path, About::Metrics) {
            Ok(answer) => (answer.map(|answer| answer.metrics), None),
            Err(error) => (None, Some(chain(error.as_ref()))),
        };
        let overview = self.reader.look(metrics.as_deref()).map_err(|error| chain(error.as_ref()));
        Seen { overview, daemon_trouble, detail: service.and_then(|service| self.explain(service)) }
    }

    fn explain(&mut self, service: ServiceName) -> Option<(ServiceName, Result<Explanation, String>)> {
        let began = Instant::now();
        if self.explained.as_ref().is_some_and(|(before, due)| *before == service && began < *due) {
            return None;
        }
        let told = of_service(&self.pin_path, &service.0, &service.1).map_err(|error| chain(error.as_ref()));
        let pause = (began.elapsed() * EXPLAIN_QUOTA).min(EXPLAIN_MOST);
        self.explained = Some((service.clone(), Instant::now() + pause));
        Some((service, told))
    }
}
