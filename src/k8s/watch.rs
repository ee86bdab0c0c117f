//! One kind, watched for ever: lists and watches below (`follow.rs`), domain changes above. This file decides how long to
//! wait after an error, what to tell the operator, and what an object that cannot be read means.

use std::sync::Arc;
use std::time::Duration;

use kube::runtime::watcher::{self, Event};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{info, warn};

use super::envelope::{Envelope, Unreadable};
use super::follow::{Follower, Selection};
use super::{transport, trouble};
use crate::backoff::Backoff;
use crate::model::{Change, Kind, Warning};
use crate::objects::convert::{Convert, Converter};
use crate::objects::outlet::{Closed, Outlet};
use crate::objects::{Settings, WatchState};

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
        forbidden_since: None,
        listing: false,
    };
    let follower = Follower::<W>::new(client, selection(W::LISTED, settings));
    tokio::select! {
        () = changes.closed() => {}
        _ = watch.follow(follower) => {}
    }
}

/// kube-proxy's selectors, so that the server sends what a proxy serves and nothing else.
fn selection(kind: Kind, settings: &Settings) -> Selection {
    match kind {
        Kind::Services => {
            let label = "service.kubernetes.io/service-proxy-name";
            let labels = settings.service_proxy_name.as_ref().map_or(format!("!{label}"), |n| format!("{label}={n}"));
            Selection { labels: Some(labels), fields: Some("spec.clusterIP!=None".to_owned()) }
        }
        Kind::EndpointSlices => Selection { labels: Some("!service.kubernetes.io/headless".to_owned()), fields: None },
        Kind::Node => Selection { labels: None, fields: Some(format!("metadata.name={}", settings.node_name)) },
    }
}

/// A server that was of another mind before may forbid everything for so long: after its start it has to read its roles.
const ROLES: Duration = Duration::from_secs(30);

/// The state of one watch across reconnects.
struct Watch {
    converter: Converter,
    outlet: Outlet,
    state: Arc<WatchState>,
    backoff: Backoff,
    last_failure: Option<Instant>,
    forbidden_since: Option<Instant>,
    /// `ListBegin` has been sent and `ListEnd` has not.
    listing: bool,
}

impl Watch {
    /// Returns when nobody listens any more.
    async fn follow<W: Convert>(&mut self, mut follower: Follower<W>) -> Result<std::convert::Infallible, Closed> {
        loop {
            match follower.next().await {
                Ok(event) => self.event::<W>(event).await?,
                Err(error) => self.failed::<W>(&error).await,
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
        self.forbidden_since = None;
        if let Some(error) = self.state.heard() {
            info!(kind, after = error, "the API server is back");
        }
    }

    /// Tells of an error that is new, and waits before the server is asked again.
    async fn failed<W: Convert>(&mut self, error: &watcher::Error) {
        if self.last_failure.is_some_and(|at| at.elapsed() > CALM) {
            self.backoff.reset();
        }
        let trouble = trouble::explain(error);
        if self.is_of_a_start(error) {
            if self.state.failed("the API server forbids the watch for now (403 Forbidden)") {
                info!(
                    kind = W::PLURAL,
                    "the API server forbids the watch, as servers do just after they start; retrying"
                );
            }
        } else if self.state.failed(&trouble.what) {
            warn!(kind = W::PLURAL, error = trouble.detail, "{}; retrying: {}", trouble.what, trouble.remedy);
        }
        tokio::time::sleep(self.backoff.next()).await;
        self.last_failure = Some(Instant::now());
    }

    /// Whether the server forbids what it allowed before, and has not done so for long.
    fn is_of_a_start(&mut self, error: &watcher::Error) -> bool {
        if !trouble::is_forbidden(error) || !self.state.listed() {
            return false;
        }
        self.forbidden_since.get_or_insert_with(Instant::now).elapsed() < ROLES
    }
}
