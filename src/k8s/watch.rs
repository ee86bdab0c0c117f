//! One kind, watched for ever: kube's watcher below, domain changes above. This file decides what the watcher leaves
//! to its user: how to list (by streaming, or by list and watch where the server cannot stream), how long to wait
//! after an error, what to tell the operator, and what an object that cannot be read means.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt};
use kube::Api;
use kube::runtime::watcher::{self, Config, Event, InitialListStrategy, watcher};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::backoff::Backoff;
use super::convert::{Convert, Converter};
use super::envelope::{Envelope, Unreadable};
use super::outlet::{Closed, Outlet};
use super::status::WatchState;
use super::{Settings, transport, trouble};
use crate::model::{Change, Kind, Warning};

/// A streaming list that says nothing for this long is not one: the server ignores `sendInitialEvents`.
const STREAMING_PATIENCE: Duration = Duration::from_secs(10);
/// This long without an error, and the next one is answered with a short delay again.
const CALM: Duration = Duration::from_secs(60);

/// Watches one kind until the receiver of `changes` is dropped.
pub async fn run<W: Convert>(
    client: &kube::Client,
    settings: &Settings,
    changes: &mpsc::Sender<Change>,
    state: &Arc<WatchState>,
) {
    let client = transport::guarded(client.clone(), state.clone());
    let mut watch = Watch {
        converter: Converter::new(settings.clone()),
        outlet: Outlet::new(changes.clone()),
        state: state.clone(),
        backoff: Backoff::default(),
        last_failure: None,
        listing: false,
    };
    let forever = async {
        let mut streaming = true;
        loop {
            let events = watcher(Api::<Envelope<W>>::all(client.clone()), selection(W::LISTED, settings, streaming));
            match watch.follow(pin!(events), streaming).await {
                Ok(()) => streaming = false,
                Err(Closed) => return,
            }
        }
    };
    tokio::select! {
        () = changes.closed() => {}
        () = forever => {}
    }
}

/// kube-proxy's selectors, so that the server sends what a proxy serves and nothing else.
fn selection(kind: Kind, settings: &Settings, streaming: bool) -> Config {
    let config = match kind {
        Kind::Services => {
            let label = "service.kubernetes.io/service-proxy-name";
            let labels = settings.service_proxy_name.as_ref().map_or(format!("!{label}"), |n| format!("{label}={n}"));
            Config::default().labels(&labels).fields("spec.clusterIP!=None")
        }
        Kind::EndpointSlices => Config::default().labels("!service.kubernetes.io/headless"),
        Kind::Node => Config::default().fields(&format!("metadata.name={}", settings.node_name)),
    };
    match streaming {
        true => Config { initial_list_strategy: InitialListStrategy::StreamingList, ..config },
        false => config,
    }
}

/// The state of one watch across reconnects.
struct Watch {
    converter: Converter,
    outlet: Outlet,
    state: Arc<WatchState>,
    backoff: Backoff,
    last_failure: Option<Instant>,
    /// `ListBegin` has been sent and `ListEnd` has not.
    listing: bool,
}

impl Watch {
    /// Follows the events of one watcher. Returns when the server turns out not to stream lists.
    async fn follow<W: Convert>(
        &mut self,
        mut events: impl Stream<Item = watcher::Result<Event<Envelope<W>>>> + Unpin,
        streaming: bool,
    ) -> Result<(), Closed> {
        let mut initial = true;
        loop {
            let next = match streaming && initial {
                true => tokio::time::timeout(STREAMING_PATIENCE, events.next()).await.ok(),
                false => Some(events.next().await),
            };
            match next {
                Some(Some(Ok(event))) => {
                    initial = match event {
                        Event::Init => true,
                        Event::InitDone => false,
                        _ => initial,
                    };
                    self.event::<W>(event).await?;
                }
                Some(Some(Err(error))) if streaming && trouble::refuses_streaming(&error) => {
                    info!(kind = W::PLURAL, "the API server refuses streaming lists: using list and watch");
                    return Ok(());
                }
                Some(Some(Err(error))) => self.failed::<W>(&error).await,
                None | Some(None) => {
                    info!(kind = W::PLURAL, "no streaming list from the API server: using list and watch");
                    return Ok(());
                }
            }
        }
    }

    async fn event<W: Convert>(&mut self, event: Event<Envelope<W>>) -> Result<(), Closed> {
        match event {
            // Said with the first object or the end: a list that fails at once leaves no trace.
            Event::Init => {
                self.listing = false;
                Ok(())
            }
            Event::InitApply(envelope) => {
                self.list_begin(W::LISTED).await?;
                self.upsert(envelope).await
            }
            Event::InitDone => {
                self.list_begin(W::LISTED).await?;
                self.outlet.list_end(W::LISTED).await?;
                self.listing = false;
                self.state.list_done();
                self.heard(W::PLURAL);
                Ok(())
            }
            Event::Apply(envelope) => {
                self.heard(W::PLURAL);
                self.upsert(envelope).await
            }
            Event::Delete(envelope) => {
                self.heard(W::PLURAL);
                self.state.object();
                let metadata = envelope.content.as_ref().map_or_else(|u| &u.metadata, |w| w.metadata());
                let gone = W::gone(metadata, &mut self.converter);
                self.outlet.send(gone).await?;
                self.outlet.warnings(W::subject(metadata), Vec::new()).await
            }
        }
    }

    async fn list_begin(&mut self, kind: Kind) -> Result<(), Closed> {
        if std::mem::replace(&mut self.listing, true) {
            return Ok(());
        }
        self.outlet.list_begin(kind).await
    }

    async fn upsert<W: Convert>(&mut self, envelope: Envelope<W>) -> Result<(), Closed> {
        self.state.object();
        let object = match envelope.content {
            Ok(object) if object.metadata().name.is_empty() => {
                let reason = "it has no metadata.name".to_owned();
                return self.skip::<W>(&Unreadable { metadata: object.metadata().clone(), reason }).await;
            }
            Ok(object) => object,
            Err(unreadable) => return self.skip::<W>(&unreadable).await,
        };
        let subject = W::subject(object.metadata());
        let converted = object.convert(&mut self.converter);
        if let Some(change) = converted.change {
            self.outlet.send(change).await?;
        }
        self.outlet.warnings(subject, converted.warnings).await
    }

    /// What was known of the object stays in force, until the next list at the latest.
    async fn skip<W: Convert>(&mut self, unreadable: &Unreadable) -> Result<(), Closed> {
        let subject = W::subject(&unreadable.metadata);
        let message = format!("it cannot be read ({}): this version of it is skipped", unreadable.reason);
        self.outlet.warnings(subject.clone(), vec![Warning { subject, message }]).await
    }

    fn heard(&mut self, kind: &str) {
        if let Some(error) = self.state.heard() {
            info!(kind, after = error, "the API server is back");
        }
    }

    /// Tells of an error that is new, and waits before the watcher may try again.
    async fn failed<W: Convert>(&mut self, error: &watcher::Error) {
        if self.last_failure.is_some_and(|at| at.elapsed() > CALM) {
            self.backoff.reset();
        }
        let trouble = trouble::explain(error);
        if trouble.expired {
            debug!(kind = W::PLURAL, "the watch is too old to be resumed: listing again");
        } else if self.state.failed(&trouble.what) {
            warn!(kind = W::PLURAL, error = trouble.detail, "{}; retrying: {}", trouble.what, trouble.remedy);
        }
        tokio::time::sleep(self.backoff.next()).await;
        self.last_failure = Some(Instant::now());
    }
}
