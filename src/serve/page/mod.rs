//! The page at `/` of the metrics port: what `kubelane top` shows, for a browser. It only reads. The page itself is one
//! document without anything from elsewhere; what it shows comes as server-sent events, which are made when somebody takes
//! them, so that nobody costs nothing and a slow reader holds one of them at most.

mod detail;
mod event;
mod viewers;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use axum::Router;
use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures::future::BoxFuture;

use super::Metrics;
use crate::explain::{About, Answer};
use crate::overview::{Overview, Reader};
use event::Query;
use viewers::{Viewer, Viewers};

/// Between two events of one viewer.
const EVERY: Duration = Duration::from_secs(2);
/// A stream ends before its connection does, which is ended after ten minutes (`http.rs`); the page asks again.
const LIFE: Duration = Duration::from_secs(570);
/// A Service is explained again after so many times as long as it took the worker, once for each viewer: an eighth of a
/// percent of one processor for all.
const EXPLAIN_QUOTA: u32 = 800;
/// But not later than this: the worker may have been busy with something else.
const EXPLAIN_MOST: Duration = Duration::from_secs(30);

const DOCUMENT: &str = concat!(
    include_str!("head.html"),
    "<style>",
    include_str!("page.css"),
    "</style>\n",
    include_str!("body.html"),
    "<script type=\"module\">",
    include_str!("page.js"),
    "</script>\n"
);
/// By the hashes of what is in [`DOCUMENT`], which a test computes: nothing else is styled or run, and nothing is fetched
/// from anywhere but this port.
const POLICY: &str = concat!(
    "default-src 'none'; style-src 'sha256-JEdGxWE6liYZNVZ4HUvRFV1FMPf6FkKKMzX889CNr1E='; script-src 'sha256-GM+RdGS4jHZHRNz5qSAC79ycpT5jzr+syiwtz8eK/5w='; ",
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
);

/// Where metrics are served, whether the page is, too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MetricsPage {
    /// On a loopback address.
    #[default]
    Auto,
    Always,
    Never,
}

impl FromStr for MetricsPage {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(MetricsPage::Auto),
            "always" => Ok(MetricsPage::Always),
            "never" => Ok(MetricsPage::Never),
            _ => Err("allowed are auto, always and never"),
        }
    }
}

impl MetricsPage {
    pub fn is_served_at(self, address: SocketAddr) -> bool {
        match self {
            MetricsPage::Auto => address.ip().is_loopback(),
            MetricsPage::Always => true,
            MetricsPage::Never => false,
        }
    }
}

/// Asks the worker; `None`: it has ended.
pub type Ask = Arc<dyn Fn(About) -> BoxFuture<'static, Option<Answer>> + Send + Sync>;

/// What the page is made of.
pub struct Page {
    metrics: Arc<Metrics>,
    ask: Ask,
    /// Only names of the node itself are answered: a page of elsewhere whose name leads to loopback is not the node's.
    is_loopback: bool,
    viewers: Viewers,
    /// For the next overview. Made when somebody looks, and forgotten when nobody does.
    looks: Arc<Mutex<Looks>>,
    pin_path: PathBuf,
}

#[derive(Default)]
struct Looks {
    reader: Option<Reader>,
    latest: Option<(Arc<Overview>, Instant)>,
}

impl Page {
    /// `address`: where it is served.
    pub fn new(pin_path: PathBuf, metrics: Arc<Metrics>, ask: Ask, address: SocketAddr) -> Arc<Page> {
        Arc::new(Page {
            metrics,
            ask,
            is_loopback: address.ip().is_loopback(),
            viewers: Viewers::default(),
            looks: Arc::default(),
            pin_path,
        })
    }

    /// What there is to see, half of [`EVERY`] old at most. Viewers share it.
    async fn overview(&self) -> Result<Arc<Overview>> {
        let (looks, metrics, pins) = (Arc::clone(&self.looks), Arc::clone(&self.metrics), self.pin_path.clone());
        let look = move || {
            let mut looks = looks.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((overview, _)) = looks.latest.as_ref().filter(|(_, at)| at.elapsed() < EVERY / 2) {
                return Ok(Arc::clone(overview));
            }
            let text = metrics.text()?;
            let reader = looks.reader.get_or_insert_with(|| Reader::new(&pins));
            let overview = Arc::new(reader.look(Some(&text))?);
            looks.latest = Some((Arc::clone(&overview), Instant::now()));
            Ok(overview)
        };
        tokio::task::spawn_blocking(look).await.context("a look at the maps broke off")?
    }

    /// Nobody looks any more.
    fn forget(&self) {
        let looks = Arc::clone(&self.looks);
        tokio::task::spawn_blocking(move || {
            *looks.lock().unwrap_or_else(PoisonError::into_inner) = Looks::default();
        });
    }
}

/// `/` and what the page asks for. `None`: it is left out, and `/` says so.
pub fn router(page: Option<Arc<Page>>) -> Router {
    let Some(page) = page else {
        let left_out = "the page is left out here: see --metrics-page\n";
        return Router::new().route("/", get(async move || (StatusCode::NOT_FOUND, left_out)));
    };
    Router::new().route("/", get(document)).route("/page/events", get(events)).with_state(page)
}

async fn document(State(page): State<Arc<Page>>, headers: HeaderMap) -> Response {
    match page.is_asked_by_another_name(&headers) {
        true => refused(),
        false => {
            (common(header::CONTENT_SECURITY_POLICY, POLICY, "text/html; charset=utf-8"), DOCUMENT).into_response()
        }
    }
}

async fn events(State(page): State<Arc<Page>>, RawQuery(query): RawQuery, headers: HeaderMap) -> Response {
    if page.is_asked_by_another_name(&headers) {
        return refused();
    }
    let stream = Stream {
        viewer: page.viewers.enter(),
        query: Query::parse(query.as_deref().unwrap_or_default()),
        next: tokio::time::Instant::now(),
        ends: tokio::time::Instant::now() + LIFE,
        explain_at: None,
        page,
    };
    let body = Body::from_stream(futures::stream::unfold(stream, Stream::next));
    (common(header::X_CONTENT_TYPE_OPTIONS, "nosniff", "text/event-stream"), body).into_response()
}

fn refused() -> Response {
    (StatusCode::MISDIRECTED_REQUEST, "ask by an IP address or as localhost\n").into_response()
}

fn common(name: HeaderName, value: &'static str, kind: &'static str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in [
        (header::CONTENT_TYPE, kind),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        (name, value),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers
}

impl Page {
    fn is_asked_by_another_name(&self, headers: &HeaderMap) -> bool {
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        let bare = host.rsplit_once(':').filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit()));
        let bare = bare.map_or(host, |(bare, _)| bare).trim_matches(['[', ']']);
        let is_own = bare.eq_ignore_ascii_case("localhost") || bare.parse::<std::net::IpAddr>().is_ok();
        self.is_loopback && !is_own
    }
}

/// One viewer's events.
struct Stream {
    page: Arc<Page>,
    viewer: Viewer,
    query: Query,
    next: tokio::time::Instant,
    ends: tokio::time::Instant,
    /// When the Service is explained again. `None`: at once.
    explain_at: Option<Instant>,
}

impl Stream {
    /// Asked for when there is room for it.
    async fn next(mut self) -> Option<(Result<String, Infallible>, Stream)> {
        tokio::select! {
            biased;
            () = self.viewer.taken() => return None,
            () = tokio::time::sleep_until(self.next.min(self.ends)) => {}
        }
        if tokio::time::Instant::now() >= self.ends {
            return None;
        }
        self.next = tokio::time::Instant::now() + EVERY;
        let text = match self.event().await {
            Ok(text) => text,
            Err(error) => event::trouble(&error),
        };
        Some((Ok(text), self))
    }

    async fn event(&mut self) -> Result<String> {
        let answer = self.explain().await?;
        let overview = self.page.overview().await?;
        Ok(event::event(&overview, &self.query, answer.as_ref()))
    }

    /// The Service that is looked at, if it is time for that.
    async fn explain(&mut self) -> Result<Option<Answer>> {
        let began = Instant::now();
        let Some((namespace, name)) =
            self.query.service.clone().filter(|_| self.explain_at.is_none_or(|at| began >= at))
        else {
            return Ok(None);
        };
        let answer = (self.page.ask)(About::Service { namespace, name }).await.context("the worker has ended")?;
        let pause = began.elapsed() * EXPLAIN_QUOTA * self.page.viewers.count();
        self.explain_at = Some(Instant::now() + pause.min(EXPLAIN_MOST));
        Ok(Some(answer))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.viewer.leave() {
            self.page.forget();
        }
    }
}

#[cfg(test)]
mod tests;
