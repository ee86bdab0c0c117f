//! HTTP: requests in, lists and watch streams out.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use futures::StreamExt;
use futures::stream::{self, Stream};
use http::Response;
use http_body_util::BodyExt as _;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::selector::Selection;
use super::{Answer, ApiServer, Line, Request, Resource, State, Verb, Watcher, event, recorded};

/// How often a watch gets a bookmark, as from a real server.
const BOOKMARKS: Duration = Duration::from_secs(60);

/// Lists of this size are sent compressed, as the real server does it.
const COMPRESSED: usize = 128 << 10;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl ApiServer {
    /// A client of this server that needs no socket.
    pub fn client(&self) -> kube::Client {
        let server = self.clone();
        let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
            let server = server.clone();
            async move { server.answer(request).await }
        });
        kube::Client::new(service, "default")
    }

    /// Serves on a socket until the future is dropped; an outage closes connections without an answer.
    pub fn serve(&self, listener: TcpListener) -> impl Future<Output = ()> + use<> {
        let server = self.clone();
        async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                // As Go's servers do: an event is not to wait for the acknowledgement of the one before.
                let _ = socket.set_nodelay(true);
                connections.spawn(server.clone().connection(socket));
            }
        }
    }

    /// As [`ApiServer::serve`], over TLS.
    pub fn serve_tls(&self, listener: TcpListener, tls: tokio_rustls::TlsAcceptor) -> impl Future<Output = ()> + use<> {
        let server = self.clone();
        async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                let _ = socket.set_nodelay(true);
                let (server, tls) = (server.clone(), tls.clone());
                connections.spawn(async move {
                    if let Ok(socket) = tls.accept(socket).await {
                        server.connection(socket).await;
                    }
                });
            }
        }
    }

    /// HTTP/1 or 2, as the client begins.
    async fn connection<S>(self, socket: S)
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        self.lock().connections += 1;
        let service = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
            let server = self.clone();
            async move { server.answer(request).await }
        });
        let builder = hyper_util::server::conn::auto::Builder::new(hyper_util::rt::TokioExecutor::new());
        let _ = builder.serve_connection(TokioIo::new(socket), service).await;
    }

    async fn answer<B>(&self, request: http::Request<B>) -> std::io::Result<Response<Body>>
    where
        B: hyper::body::Body,
        B::Error: std::fmt::Debug,
    {
        let (head, body) = request.into_parts();
        let body = body.collect().await.expect("a whole request").to_bytes();
        let shown = head.headers.get(http::header::AUTHORIZATION).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let is_known = self.lock().token.as_ref().is_none_or(|token| shown == format!("Bearer {token}"));
        if !is_known {
            return Ok(response(401, recorded("error-401-bad-token.json")));
        }
        match head.uri.path() {
            "/version" => return Ok(self.version()),
            "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews" => return Ok(self.review(&body)),
            _ => {}
        }
        let is_one = head.uri.path().starts_with("/api/v1/nodes/") || head.uri.path().contains("/namespaces/");
        if head.method != http::Method::GET || is_one {
            return self.write(&head, &body);
        }
        let Some(resource) = Resource::of_path(head.uri.path()) else {
            return Ok(response(404, recorded("error-404-not-found.json")));
        };
        let query = parse_query(head.uri.query().unwrap_or_default());
        let is = |name: &str| query.get(name).is_some_and(|v| v == "true");
        let verb = match (is("watch"), is("sendInitialEvents")) {
            (false, _) => Verb::List,
            (true, false) => Verb::Watch,
            (true, true) => Verb::StreamingList,
        };
        let agent = head.headers.get(http::header::USER_AGENT).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let encodings =
            head.headers.get(http::header::ACCEPT_ENCODING).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let gzip = encodings.contains("gzip");
        let request = Request { resource, verb, query, user_agent: agent.to_owned(), gzip, at: Instant::now() };
        let scripted = {
            let mut state = self.lock();
            state.requests.push(request.clone());
            if state.down { Some(Answer::Refused) } else { state.scripted(resource, verb) }
        };
        match scripted {
            Some(answer) => scripted_answer(answer).await,
            None => Ok(self.honest(&request)),
        }
    }

    fn honest(&self, request: &Request) -> Response<Body> {
        let parameter = |name: &str| request.query.get(name).map_or("", String::as_str);
        let selection = match Selection::parse(parameter("labelSelector"), parameter("fieldSelector")) {
            Ok(selection) => selection,
            Err(_) => return response(400, recorded("error-400-invalid-selector.json")),
        };
        let mut state = self.lock();
        match request.verb {
            Verb::List => list(&mut state, request, &selection).unwrap_or_else(|refusal| *refusal),
            Verb::StreamingList if state.refuses_streaming => {
                response(422, recorded("error-422-initial-events-without-match.json"))
            }
            Verb::StreamingList => match state.freshness(request) {
                Ok((version, cached)) => self.watch(&mut state, request, selection, version, cached),
                Err(refusal) => *refusal,
            },
            Verb::Watch => {
                let version = state.version;
                self.watch(&mut state, request, selection, version, false)
            }
        }
    }

    /// Opens a watch: what it starts with, and then what happens.
    fn watch(
        &self,
        state: &mut State,
        request: &Request,
        selection: Selection,
        version: u64,
        cached: bool,
    ) -> Response<Body> {
        let resource = request.resource;
        let from: u64 = request.query.get("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0);
        let streaming = request.verb == Verb::StreamingList;
        let (mut initial, mut start) = (Vec::new(), String::new());
        if streaming || from == 0 {
            initial = state.selected(resource, &selection, cached);
            if streaming && !state.ignores_streaming {
                start += &bookmark(resource, version, true);
            }
        } else if from < state.compacted {
            return body(Body::from(recorded("watch-gone-410.jsonl")));
        } else {
            let newer = state.history.iter().filter(|r| r.resource == resource && r.version > from);
            start.extend(newer.filter_map(|r| r.event(&selection)));
        }
        let (sender, lines) = mpsc::unbounded_channel();
        state.watchers.push(Watcher { resource, selection, lines: sender });
        let seconds = request.query.get("timeoutSeconds").and_then(|v| v.parse().ok()).unwrap_or(1800);
        let open = Open { server: self.clone(), resource, lines, end: Instant::now() + Duration::from_secs(seconds) };
        let first = stream::iter((!start.is_empty()).then(|| Ok(Bytes::from(start))));
        body(Body::from_stream(added(resource, initial).chain(first).chain(open.stream())))
    }
}

/// The initial events of a watch, written as they are sent: of a large cluster they are hundreds of megabytes.
fn added(resource: Resource, objects: Vec<Arc<Value>>) -> impl Stream<Item = Result<Bytes, BoxError>> + Send {
    const CHUNK: usize = 256 << 10;
    stream::unfold(objects.into_iter(), move |mut objects| async move {
        let mut text = String::new();
        while text.len() < CHUNK
            && let Some(object) = objects.next()
        {
            text += &event("ADDED", resource, &object);
        }
        (!text.is_empty()).then(|| (Ok(text.into()), objects))
    })
}

/// An open watch.
struct Open {
    server: ApiServer,
    resource: Resource,
    lines: mpsc::UnboundedReceiver<Line>,
    end: Instant,
}

impl Open {
    fn stream(self) -> impl Stream<Item = Result<Bytes, BoxError>> + Send {
        stream::unfold(self, |mut open| async {
            let next_bookmark = (Instant::now() + BOOKMARKS).min(open.end);
            match tokio::time::timeout_at(next_bookmark, open.lines.recv()).await {
                Ok(Some(Line::Event(line) | Line::Raw(line))) => Some((Ok(line.into()), open)),
                Ok(Some(Line::Break)) => Some((Err("connection reset".into()), open)),
                Ok(None) => None,
                Err(_) if Instant::now() >= open.end => None,
                Err(_) => {
                    let version = open.server.lock().version;
                    Some((Ok(bookmark(open.resource, version, false).into()), open))
                }
            }
        })
    }
}

fn bookmark(resource: Resource, version: u64, initial_end: bool) -> String {
    let mut metadata = json!({"resourceVersion": version.to_string()});
    if initial_end {
        metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
    }
    event("BOOKMARK", resource, &json!({"metadata": metadata}))
}

/// A list, or a page of one. A continue token is the version of the first page and the place where to go on.
fn list(state: &mut State, request: &Request, selection: &Selection) -> Result<Response<Body>, Box<Response<Body>>> {
    let (current, cached) = state.freshness(request)?;
    let objects = state.selected(request.resource, selection, cached);
    let limit: usize = request.query.get("limit").and_then(|v| v.parse().ok()).unwrap_or(usize::MAX);
    let token = request.query.get("continue").map_or("", String::as_str);
    let (version, from) = match token.split_once('-') {
        Some((version, from)) => (version.parse().unwrap_or(0), from.parse().unwrap_or(0)),
        None => (current, 0),
    };
    if !token.is_empty() && version < state.compacted {
        return Ok(response(410, recorded("error-410-expired-continue.json")));
    }
    let to = objects.len().min(from + limit.min(objects.len()));
    let mut metadata = json!({"resourceVersion": version.to_string()});
    if to < objects.len() {
        metadata["continue"] = json!(format!("{version}-{to}"));
    }
    let list = json!({
        "kind": format!("{}List", request.resource.kind()),
        "apiVersion": request.resource.api_version(),
        "metadata": metadata,
        "items": objects[from.min(to)..to],
    });
    let text = list.to_string();
    if !request.gzip || text.len() < COMPRESSED {
        return Ok(response(200, text));
    }
    state.compressed += 1;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, text.as_bytes()).expect("memory");
    let mut response = body(Body::from(encoder.finish().expect("memory")));
    response.headers_mut().insert(http::header::CONTENT_ENCODING, http::HeaderValue::from_static("gzip"));
    Ok(response)
}

/// A version that the cache has not seen, after three seconds of waiting for it (`NewTooLargeResourceVersionError`).
pub(super) fn too_large(asked: u64, cached: u64) -> Response<Body> {
    let message = format!("Timeout: Too large resource version: {asked}, current: {cached}");
    let cause = json!({"reason": "ResourceVersionTooLarge", "message": "Too large resource version"});
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Timeout", "code": 504, "message": message,
        "details": {"causes": [cause], "retryAfterSeconds": 1},
    });
    response(504, status.to_string())
}

async fn scripted_answer(answer: Answer) -> std::io::Result<Response<Body>> {
    let once = |text: String| stream::iter([Ok::<_, BoxError>(Bytes::from(text))]);
    Ok(match answer {
        Answer::Body(status, text) => response(status, text),
        Answer::Ended(text) => body(Body::from(text)),
        Answer::Stream(text) => body(Body::from_stream(once(text).chain(stream::pending()))),
        Answer::Broken(text) => {
            let error = stream::iter([Err::<Bytes, BoxError>("connection reset".into())]);
            body(Body::from_stream(once(text).chain(error)))
        }
        Answer::Drip(text) => {
            let drops = stream::iter(text.into_bytes()).then(|byte| async move {
                tokio::time::sleep(Duration::from_secs(1)).await;
                Ok::<_, BoxError>(Bytes::from(vec![byte]))
            });
            body(Body::from_stream(drops))
        }
        Answer::Hang => match std::future::pending::<Infallible>().await {},
        Answer::Refused => return Err(std::io::ErrorKind::ConnectionRefused.into()),
    })
}

fn body(body: Body) -> Response<Body> {
    let builder = Response::builder().header(http::header::CONTENT_TYPE, "application/json");
    builder.body(body).expect("a valid response")
}

pub(super) fn response(status: u16, text: String) -> Response<Body> {
    let mut response = body(Body::from(text));
    *response.status_mut() = http::StatusCode::from_u16(status).expect("a valid status");
    response
}

fn parse_query(query: &str) -> BTreeMap<String, String> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (decode(key), decode(value))).collect()
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'+' => bytes.push(b' '),
            b'%' => {
                let digits: String = rest.by_ref().take(2).map(char::from).collect();
                bytes.push(u8::from_str_radix(&digits, 16).expect("percent encoding"));
            }
            byte => bytes.push(byte),
        }
    }
    String::from_utf8(bytes).expect("UTF-8 in a query")
}
