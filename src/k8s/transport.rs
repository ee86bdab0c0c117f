//! What lists and watches leave to the layer below them: a deadline for the answer to begin, one for silence in the middle
//! of an answer, a least speed (an answer of a byte a second is none), and when a watch that ended may be opened again: by
//! chance within a second if it broke off, because all nodes' do when a server goes, and later each time if it ended as
//! soon as it was opened. Bookmarks pass here too, so this is where a quiet watch shows that it lives.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes};
use futures::{Stream, StreamExt};
use http::{Request, Response};
use kube::client::Body as KubeBody;
use tokio::time::Instant;
use tracing::warn;

use crate::backoff::Backoff;
use crate::objects::WatchState;

/// The API server starts to answer a list or a watch in this time, or the request counts as failed.
const ANSWER: Duration = Duration::from_secs(30);
/// The longest silence inside a list.
const LIST_SILENCE: Duration = Duration::from_secs(30);
/// A list that brings less than this in [`LIST_SILENCE`], and goes on, is given up.
const LIST_LEAST: usize = 16 << 10;
/// How long one line of a watch may take from its first byte to its end.
const LINE: Duration = Duration::from_secs(30);
/// The longest silence of a watch. Bookmarks come about once a minute, so two minutes without one is a dead connection
/// (or a server without bookmarks); the watch is then opened again where it was, which costs one request.
const WATCH_SILENCE: Duration = Duration::from_secs(120);
/// A watch that ends sooner than this after it was opened counts as a failure.
const TOO_SHORT: Duration = Duration::from_secs(5);

/// A watch that ends this much before its time has broken off.
const EARLY: Duration = Duration::from_secs(5);
/// Watches that broke off are opened again within this time.
const RESUME_SPREAD: Duration = Duration::from_secs(1);

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// `client` with the deadlines and the pace of one watch.
pub fn guarded(client: kube::Client, state: Arc<WatchState>) -> kube::Client {
    let pace = Arc::new(Mutex::new(Pace::default()));
    let service = tower::service_fn(move |request: Request<KubeBody>| {
        let (client, state, pace) = (client.clone(), state.clone(), pace.clone());
        async move { send(client, request, state, pace).await }
    });
    kube::Client::new(service, "default")
}

async fn send(
    client: kube::Client,
    request: Request<KubeBody>,
    state: Arc<WatchState>,
    pace: Arc<Mutex<Pace>>,
) -> Result<Response<Body>, BoxError> {
    let watch = parameter(&request, "watch=") == Some("true");
    let seconds = parameter(&request, "timeoutSeconds=").and_then(|seconds| seconds.parse().ok());
    let lasts = seconds.map_or(Duration::MAX, Duration::from_secs);
    if watch {
        let not_before = pace.lock().unwrap_or_else(PoisonError::into_inner).not_before;
        if let Some(instant) = not_before {
            tokio::time::sleep_until(instant).await;
        }
    }
    let response = match tokio::time::timeout(ANSWER, client.send(request)).await {
        Ok(response) => response?,
        Err(_) => return Err(format!("no answer in {} s", ANSWER.as_secs()).into()),
    };
    let success = response.status().is_success();
    let (parts, body) = response.into_parts();
    let body = Body::new(body).into_data_stream().map(|chunk| chunk.map_err(BoxError::from));
    let body = match watch && success {
        true => {
            Body::from_stream(watched(body, Watch { opened: Instant::now(), lasts, state, pace, line_since: None }))
        }
        false => Body::from_stream(impatient(body)),
    };
    Ok(Response::from_parts(parts, body))
}

/// The value of a parameter of the query, as it is written; `name` has the equals sign.
fn parameter<'r>(request: &'r Request<KubeBody>, name: &str) -> Option<&'r str> {
    request.uri().query()?.split('&').find_map(|pair| pair.strip_prefix(name))
}

/// The body of a list or of an error: silence in the middle is an error, and so is a trickle.
fn impatient(
    body: impl Stream<Item = Result<Bytes, BoxError>> + Send + Unpin,
) -> impl Stream<Item = Result<Bytes, BoxError>> + Send {
    let window = (Instant::now() + LIST_SILENCE, 0);
    futures::stream::unfold((body, window), |(mut body, (end, received))| async move {
        let seconds = LIST_SILENCE.as_secs();
        let (chunk, window) = match tokio::time::timeout(LIST_SILENCE, body.next()).await {
            Ok(None) => return None,
            Ok(Some(Ok(bytes))) if Instant::now() < end => {
                let received = received + bytes.len();
                (Ok(bytes), (end, received))
            }
            Ok(Some(Ok(bytes))) if received + bytes.len() >= LIST_LEAST => {
                (Ok(bytes), (Instant::now() + LIST_SILENCE, 0))
            }
            Ok(Some(Ok(_))) => {
                let error = format!("the response is too slow: less than {LIST_LEAST} bytes in {seconds} s");
                (Err(error.into()), (end, received))
            }
            Ok(Some(Err(error))) => (Err(error), (end, received)),
            Err(_) => (Err(format!("the response stalled: nothing for {seconds} s").into()), (end, received)),
        };
        Some((chunk, (body, window)))
    })
}

/// One open watch.
struct Watch {
    opened: Instant,
    /// How long the server was asked to keep it open.
    lasts: Duration,
    state: Arc<WatchState>,
    pace: Arc<Mutex<Pace>>,
    /// When the line began that has not come to its end.
    line_since: Option<Instant>,
}

/// The body of a watch: silence and breaks are its end, and the follower resumes from the last version that it saw.
fn watched(
    body: impl Stream<Item = Result<Bytes, BoxError>> + Send + Unpin,
    watch: Watch,
) -> impl Stream<Item = Result<Bytes, BoxError>> + Send {
    futures::stream::unfold((body, watch), |(mut body, mut watch)| async {
        let silence = Instant::now() + WATCH_SILENCE;
        let deadline = watch.line_since.map_or(silence, |since| silence.min(since + LINE));
        // What has come counts first: whoever reads may have been busy until the deadline had passed.
        let chunk = tokio::select! {
            biased;
            chunk = body.next() => Ok(chunk),
            () = tokio::time::sleep_until(deadline) => Err(()),
        };
        let chunk = match chunk {
            Ok(chunk) => chunk,
            Err(()) if watch.line_since.is_some() => {
                watch.stuck();
                return None;
            }
            Err(()) => {
                tracing::debug!("no data on the watch for {} s: opening it again", WATCH_SILENCE.as_secs());
                watch.ended(None);
                return None;
            }
        };
        match chunk {
            Some(Ok(bytes)) => {
                match memchr::memrchr(b'\n', &bytes) {
                    Some(end) => {
                        watch.line_since = (end + 1 < bytes.len()).then(Instant::now);
                        if watch.opened.elapsed() >= TOO_SHORT {
                            watch.state.heard();
                        }
                    }
                    None => drop(watch.line_since.get_or_insert_with(Instant::now)),
                }
                Some((Ok(bytes), (body, watch)))
            }
            Some(Err(error)) => {
                watch.ended(Some(error));
                None
            }
            None => {
                watch.ended(None);
                None
            }
        }
    })
}

impl Watch {
    /// Notes that a line did not come to its end in time: a server that is overloaded, or hostile.
    fn stuck(&self) {
        let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        pace.not_before = Some(Instant::now() + pace.backoff.next());
        let problem = "the API server sends too slowly";
        if self.state.failed(problem) {
            warn!(
                "{problem}: one object took longer than {} s; retrying; what is programmed continues to be served",
                LINE.as_secs()
            );
        }
    }

    /// Notes how the watch ended. One that ended early delays the next, and twice in a row is worth telling.
    fn ended(&self, error: Option<BoxError>) {
        let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        let lasted = self.opened.elapsed();
        if lasted >= TOO_SHORT {
            *pace = Pace::default();
            if lasted + EARLY < self.lasts {
                pace.not_before = Some(Instant::now() + RESUME_SPREAD.mul_f64(fastrand::f64()));
            }
            return;
        }
        pace.short += 1;
        pace.not_before = Some(Instant::now() + pace.backoff.next());
        if pace.short < 2 {
            return;
        }
        let problem = "watches end as soon as they are opened";
        if self.state.failed(problem) {
            let error = error.map(|e| e.to_string()).unwrap_or_default();
            warn!(error, "{problem}; retrying: check the API server and the proxies in front of it");
        }
    }
}

/// When the next watch may be opened.
#[derive(Default)]
struct Pace {
    short: u32,
    not_before: Option<Instant>,
    backoff: Backoff,
}
