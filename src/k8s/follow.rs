//! Lists and watches of one kind, asked for as client-go's reflector does. kube's own watcher lists at any version or by
//! quorum reads, in pages: five thousand of those at once bring a server down, and the former may be older than what was
//! seen. Here a list asks the server's cache for what is not older (`NotOlderThan`), without pages. Only when the cache
//! cannot have that version (it is behind, or versions began anew) is the next list a quorum read.
//!
//! A list is streamed where the server can. Where it refuses, the list is an ordinary one. A streaming list that says
//! nothing for ten seconds, or breaks off twice, is left for an ordinary one, too, and tried again later.

use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::BoxStream;
use kube::api::{ListParams, VersionMatch, WatchParams};
use kube::core::{Request, WatchEvent};
use kube::runtime::watcher::{Error, Event, Result};
use kube::{Api, Resource as _};
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info};

use super::envelope::Envelope;
use super::list::list;
use super::trouble;
use crate::backoff::Backoff;
use crate::objects::wire::Wire;

/// A streaming list that says nothing for this long is not one: the server ignores `sendInitialEvents`, or has too much
/// to do.
const STREAMING_PATIENCE: Duration = Duration::from_secs(10);
/// As many streaming lists may break off before an ordinary one is made.
const STREAMING_TRIES: u32 = 2;
/// Before a streaming list is tried again; doubled each time.
const STREAMING_PAUSE: Duration = Duration::from_secs(60);
const STREAMING_PAUSE_LONGEST: Duration = Duration::from_secs(1800);
/// The least length of a watch, in seconds; it is up to twice as long, by chance (client-go's `minWatchTimeout`).
const WATCH_SECONDS: f64 = 300.0;
/// Lists that are due because a version is too old begin within this time: after a restart of the server all nodes' are.
const RELIST_SPREAD: Duration = Duration::from_secs(5);
/// Of a page, where there are pages: of quorum reads.
const PAGE: u32 = 500;

type Events<W> = BoxStream<'static, kube::Result<WatchEvent<Envelope<W>>>>;

/// Selectors, in the API's syntax.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    pub labels: Option<String>,
    pub fields: Option<String>,
}

/// Where the follower of one kind stands.
pub struct Follower<W: Wire> {
    client: kube::Client,
    api: Api<Envelope<W>>,
    selection: Selection,
    stage: Stage<W>,
    /// The version of the last list or event.
    seen: String,
    /// The server's cache does not have `seen`: the next list is a quorum read.
    must_be_latest: bool,
    streaming: Streaming,
}

enum Stage<W: Wire> {
    /// A list is due.
    Due,
    /// An ordinary list: what came of it, where it goes on, its version.
    Listing {
        objects: std::vec::IntoIter<Envelope<W>>,
        token: Option<String>,
        version: String,
    },
    /// A streaming list, whose end a bookmark tells.
    Streaming(Events<W>),
    /// A watch is due, from `seen` on.
    Listed,
    Watching(Events<W>),
}

/// What is known of the server's streaming lists.
#[derive(Default)]
struct Streaming {
    failures: u32,
    pauses: u32,
    not_before: Option<Instant>,
    /// That the server refuses was told.
    told: bool,
    backoff: Backoff,
}

impl<W: Wire> Follower<W> {
    pub fn new(client: kube::Client, selection: Selection) -> Self {
        let api = Api::all(client.clone());
        let (seen, streaming) = (String::new(), Streaming::default());
        Follower { client, api, selection, stage: Stage::Due, seen, must_be_latest: false, streaming }
    }

    /// The next event, or an error after which the caller waits before it asks again. Never ends.
    pub async fn next(&mut self) -> Result<Event<Envelope<W>>> {
        loop {
            let step = match std::mem::replace(&mut self.stage, Stage::Due) {
                Stage::Due => self.list().await,
                Stage::Listing { objects, token, version } => self.listed(objects, token, version).await,
                Stage::Streaming(events) => self.streamed(events).await,
                Stage::Listed => self.watch().await,
                Stage::Watching(events) => self.watched(events).await,
            };
            if let Some(event) = step.transpose() {
                return event;
            }
        }
    }

    /// The version that a list must not be older than; `None`: the latest.
    fn least_version(&self) -> Option<&str> {
        match (self.must_be_latest, self.seen.as_str()) {
            (true, _) => None,
            (false, "") => Some("0"),
            (false, seen) => Some(seen),
        }
    }

    async fn list(&mut self) -> Result<Option<Event<Envelope<W>>>> {
        if self.streaming.not_before.is_none_or(|at| at <= Instant::now()) {
            let version = self.least_version().unwrap_or_default().to_owned();
            match self.api.watch(&self.watch_params(true), &version).await {
                Ok(events) => self.stage = Stage::Streaming(events.boxed()),
                Err(error) if trouble::refuses_streaming(&error) => {
                    if !std::mem::replace(&mut self.streaming.told, true) {
                        info!(kind = W::PLURAL, "the API server refuses streaming lists: using list and watch");
                    }
                    self.stage = self.ordinary_list();
                }
                Err(error) => return self.list_failed(error, Error::WatchStartFailed),
            }
        } else {
            self.stage = self.ordinary_list();
        }
        Ok(Some(Event::Init))
    }

    fn ordinary_list(&self) -> Stage<W> {
        Stage::Listing { objects: Vec::new().into_iter(), token: None, version: String::new() }
    }

    /// The next object of an ordinary list, or its next page.
    async fn listed(
        &mut self,
        mut objects: std::vec::IntoIter<Envelope<W>>,
        token: Option<String>,
        version: String,
    ) -> Result<Option<Event<Envelope<W>>>> {
        if let Some(object) = objects.next() {
            self.stage = Stage::Listing { objects, token, version };
            return Ok(Some(Event::InitApply(object)));
        }
        if token.is_none() && !version.is_empty() {
            self.list_ended(version);
            self.stage = Stage::Listed;
            return Ok(Some(Event::InitDone));
        }
        let request = Request::new(self.api.resource_url()).list(&self.list_params(token));
        let request = request.map_err(|error| Error::InitialListFailed(kube::Error::BuildRequest(error)))?;
        let list = match list::<Envelope<W>>(&self.client, request).await {
            Ok(list) => list,
            Err(error) => return self.list_failed(error, Error::InitialListFailed),
        };
        let token = list.metadata.continue_.filter(|token| !token.is_empty());
        let version = list.metadata.resource_version.unwrap_or_default();
        if version.is_empty() && token.is_none() {
            return Err(Error::NoResourceVersion);
        }
        self.stage = Stage::Listing { objects: list.items.into_iter(), token, version };
        Ok(None)
    }

    fn list_ended(&mut self, version: String) {
        self.seen = version;
        self.must_be_latest = false;
    }

    /// An error of a list. That the cache does not have the version is none: the latest is asked for at once.
    fn list_failed(
        &mut self,
        error: kube::Error,
        wrap: fn(kube::Error) -> Error,
    ) -> Result<Option<Event<Envelope<W>>>> {
        let is_of_version = trouble::is_expired(&error) || trouble::is_too_new(&error);
        if is_of_version && !std::mem::replace(&mut self.must_be_latest, true) {
            debug!(
                kind = W::PLURAL,
                "the API server's cache does not have version {}: asking for the latest", self.seen
            );
            return Ok(None);
        }
        Err(wrap(error))
    }

    /// The next event of a streaming list.
    async fn streamed(&mut self, mut events: Events<W>) -> Result<Option<Event<Envelope<W>>>> {
        let event = match timeout(STREAMING_PATIENCE, events.next()).await {
            Ok(Some(event)) => event,
            Ok(None) => {
                self.streaming_failed(1).await;
                return Ok(None);
            }
            Err(_) => {
                drop(events);
                self.streaming_failed(STREAMING_TRIES).await;
                return Ok(None);
            }
        };
        let event = match event {
            Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => Ok(Some(Event::InitApply(object))),
            Ok(WatchEvent::Deleted(object)) => Ok(Some(Event::Delete(object))),
            Ok(WatchEvent::Bookmark(mark)) if mark.metadata.annotations.contains_key("k8s.io/initial-events-end") => {
                self.list_ended(mark.metadata.resource_version);
                self.streaming = Streaming::default();
                self.stage = Stage::Watching(events);
                return Ok(Some(Event::InitDone));
            }
            Ok(WatchEvent::Bookmark(_)) => Ok(None),
            Ok(WatchEvent::Error(status)) if status.code == 410 || trouble::says_too_new(&status) => {
                return self.list_failed(kube::Error::Api(status.boxed()), Error::WatchFailed);
            }
            Ok(WatchEvent::Error(status)) => Err(Error::WatchError(status.boxed())),
            Err(error) => Err(Error::WatchFailed(error)),
        };
        self.stage = Stage::Streaming(events);
        event
    }

    /// After too many failures the next list is an ordinary one, which costs the server more: it is not asked at once.
    async fn streaming_failed(&mut self, count: u32) {
        let streaming = &mut self.streaming;
        streaming.failures += count;
        let pause = streaming.backoff.next();
        if streaming.failures >= STREAMING_TRIES {
            let longest = STREAMING_PAUSE.saturating_mul(1 << streaming.pauses.min(16)).min(STREAMING_PAUSE_LONGEST);
            streaming.not_before = Some(Instant::now() + pause + longest);
            (streaming.failures, streaming.pauses) = (0, streaming.pauses + 1);
            info!(kind = W::PLURAL, "no streaming list from the API server: using list and watch");
        }
        sleep(pause).await;
    }

    async fn watch(&mut self) -> Result<Option<Event<Envelope<W>>>> {
        match self.api.watch(&self.watch_params(false), &self.seen).await {
            Ok(events) => self.stage = Stage::Watching(events.boxed()),
            Err(error) if trouble::is_expired(&error) => self.expired().await,
            Err(error) => {
                self.stage = Stage::Listed;
                return Err(Error::WatchStartFailed(error));
            }
        }
        Ok(None)
    }

    async fn watched(&mut self, mut events: Events<W>) -> Result<Option<Event<Envelope<W>>>> {
        let Some(event) = events.next().await else {
            self.stage = Stage::Listed;
            return Ok(None);
        };
        let event = match event {
            Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => Event::Apply(object),
            Ok(WatchEvent::Deleted(object)) => Event::Delete(object),
            Ok(WatchEvent::Bookmark(mark)) => {
                self.seen = mark.metadata.resource_version;
                self.stage = Stage::Watching(events);
                return Ok(None);
            }
            Ok(WatchEvent::Error(status)) if status.code == 410 => {
                self.expired().await;
                return Ok(None);
            }
            Ok(WatchEvent::Error(status)) => {
                self.stage = Stage::Watching(events);
                return Err(Error::WatchError(status.boxed()));
            }
            Err(error) => {
                self.stage = Stage::Watching(events);
                return Err(Error::WatchFailed(error));
            }
        };
        let (Event::Apply(object) | Event::Delete(object)) = &event else { return Ok(Some(event)) };
        match object.meta().resource_version.clone() {
            Some(version) => {
                self.seen = version;
                self.stage = Stage::Watching(events);
                Ok(Some(event))
            }
            None => Err(Error::NoResourceVersion),
        }
    }

    /// The server no longer has what came after `seen`: not a failure.
    async fn expired(&mut self) {
        debug!(kind = W::PLURAL, "the watch is too old to be resumed: listing again");
        sleep(RELIST_SPREAD.mul_f64(fastrand::f64())).await;
    }

    fn list_params(&self, token: Option<String>) -> ListParams {
        let version = self.least_version().filter(|_| token.is_none()).map(str::to_owned);
        ListParams {
            label_selector: self.selection.labels.clone(),
            field_selector: self.selection.fields.clone(),
            // A limit with a version would lead past the cache.
            limit: (self.must_be_latest || token.is_some()).then_some(PAGE),
            continue_token: token,
            version_match: version.as_ref().map(|_| VersionMatch::NotOlderThan),
            resource_version: version,
            ..ListParams::default()
        }
    }

    fn watch_params(&self, streaming: bool) -> WatchParams {
        WatchParams {
            label_selector: self.selection.labels.clone(),
            field_selector: self.selection.fields.clone(),
            timeout: Some((WATCH_SECONDS * (1.0 + fastrand::f64())) as u32),
            bookmarks: true,
            send_initial_events: streaming,
        }
    }
}
