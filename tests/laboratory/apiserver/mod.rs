//! A double of the Kubernetes API server, as far as a proxy uses one: lists (with pages), watches (with initial events,
//! bookmarks, resume and 410) and selectors for Services, EndpointSlices and Nodes.
//!
//! It is a live server: tests upsert and delete objects and watchers see it. It can be told to misbehave: to answer a
//! request with recorded bytes, to break off, to hang, to be away. It runs in the process (`client()`, also with
//! tokio's paused clock) or on a socket (`serve()`).

mod objects;
mod respond;
pub mod seen;
mod selector;
pub mod source;
mod write;

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use axum::body::Body;
use http::Response;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;

use selector::Selection;

/// A recorded file.
pub fn recorded(name: &str) -> String {
    let path = format!("{}/tests/data/cluster/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The resources that are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Resource {
    Services,
    EndpointSlices,
    Nodes,
}

impl Resource {
    fn kind(self) -> &'static str {
        match self {
            Resource::Services => "Service",
            Resource::EndpointSlices => "EndpointSlice",
            Resource::Nodes => "Node",
        }
    }

    fn api_version(self) -> &'static str {
        if self == Resource::EndpointSlices { "discovery.k8s.io/v1" } else { "v1" }
    }

    fn of_path(path: &str) -> Option<Self> {
        match path {
            "/api/v1/services" => Some(Resource::Services),
            "/apis/discovery.k8s.io/v1/endpointslices" => Some(Resource::EndpointSlices),
            "/api/v1/nodes" => Some(Resource::Nodes),
            _ => None,
        }
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    List,
    Watch,
    /// A watch with `sendInitialEvents`.
    StreamingList,
}

/// What a scripted request gets instead of an honest answer.
#[derive(Clone, Debug)]
pub enum Answer {
    /// A status and a body.
    Body(u16, String),
    /// 200, these bytes, and then silence.
    Stream(String),
    /// 200, these bytes, and the connection breaks.
    Broken(String),
    /// 200, these bytes, and an orderly end.
    Ended(String),
    /// 200, and these bytes, one a second.
    Drip(String),
    /// Nothing, for ever.
    Hang,
    /// No connection.
    Refused,
}

/// A request that was made.
#[derive(Clone, Debug)]
pub struct Request {
    pub resource: Resource,
    pub verb: Verb,
    /// Decoded query parameters.
    pub query: BTreeMap<String, String>,
    pub user_agent: String,
    /// The client takes compressed answers.
    pub gzip: bool,
    pub at: Instant,
}

/// The server. Clones are the same server.
#[derive(Clone, Default)]
pub struct ApiServer {
    state: Arc<Mutex<State>>,
}

/// By resource, namespace and name.
type Objects = BTreeMap<(Resource, String), Arc<Value>>;

#[derive(Default)]
struct State {
    version: u64,
    /// Addresses and ports that were given to Services so far.
    allotted: u64,
    /// Watches from before this version get 410.
    compacted: u64,
    objects: Objects,
    history: Vec<Record>,
    watchers: Vec<Watcher>,
    scripts: Vec<(Resource, Verb, VecDeque<Answer>)>,
    requests: Vec<Request>,
    /// That came in by sockets.
    connections: usize,
    /// Lists that were sent compressed.
    compressed: usize,
    events: Vec<Value>,
    /// When something was to be written.
    writes: Vec<Instant>,
    /// Statuses for the next writes of any sort, one each.
    write_failures: VecDeque<u16>,
    down: bool,
    /// What the cache of a replica that has fallen behind holds, and its version.
    behind: Option<(u64, Objects)>,
    /// What reviews of access deny, as "verb resource".
    denied: Vec<String>,
    /// How far the clock is ahead, in seconds.
    ahead: i64,
    /// The only one that is let in, once it is set.
    token: Option<String>,
    refuses_streaming: bool,
    ignores_streaming: bool,
}

/// One change of an object: before and after.
#[derive(Clone)]
struct Record {
    version: u64,
    resource: Resource,
    before: Option<Arc<Value>>,
    after: Option<Arc<Value>>,
}

struct Watcher {
    resource: Resource,
    selection: Selection,
    lines: mpsc::UnboundedSender<Line>,
}

/// What an open watch sends.
enum Line {
    Event(String),
    Raw(String),
    Break,
}

impl ApiServer {
    pub fn new() -> Self {
        ApiServer::default()
    }

    /// A server that holds the recorded lists, at the version at which they were recorded.
    pub fn with_recorded_lists() -> Self {
        ApiServer::with_lists("services.json", "endpointslices.json")
    }

    /// As `with_recorded_lists`, from these files.
    pub fn with_lists(services: &str, slices: &str) -> Self {
        let server = ApiServer::new();
        let lists =
            [(Resource::Services, services), (Resource::EndpointSlices, slices), (Resource::Nodes, "nodes.json")];
        let mut state = server.lock();
        for (resource, file) in lists {
            let list: Value = serde_json::from_str(&recorded(file)).unwrap();
            state.version = list["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
            for object in list["items"].as_array().unwrap() {
                state.objects.insert((resource, key(object)), Arc::new(object.clone()));
            }
        }
        state.compacted = state.version;
        drop(state);
        server
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Creates or replaces an object; its kind is read from it, its version is set. Returns the version.
    pub fn upsert(&self, mut object: Value) -> u64 {
        let resource = resource_of(&object);
        let mut state = self.lock();
        state.version += 1;
        object["metadata"]["resourceVersion"] = json!(state.version.to_string());
        let (place, object) = ((resource, key(&object)), Arc::new(object));
        let before = state.objects.insert(place, Arc::clone(&object));
        state.record(resource, before, Some(object))
    }

    /// Creates or replaces the objects of a YAML stream.
    pub fn apply_yaml(&self, text: &str) {
        for document in text.split("\n---") {
            self.upsert(serde_norway::from_str(document).unwrap());
        }
    }

    /// Deletes an object; `namespace` is empty for Nodes. Returns the version.
    pub fn delete(&self, resource: Resource, namespace: &str, name: &str) -> u64 {
        let mut state = self.lock();
        let before = state.objects.remove(&(resource, format!("{namespace}/{name}")));
        assert!(before.is_some(), "{namespace}/{name} is not there");
        state.version += 1;
        state.record(resource, before, None)
    }

    /// The object as stored.
    pub fn get(&self, resource: Resource, namespace: &str, name: &str) -> Option<Value> {
        self.lock().objects.get(&(resource, format!("{namespace}/{name}"))).map(|object| (**object).clone())
    }

    /// Forgets history: watches that resume from before now get 410.
    pub fn compact(&self) {
        let mut state = self.lock();
        state.compacted = state.version;
        state.history.clear();
    }

    /// The cache stays as it is now: lists that may be cached are answered from it, and what is newer is not waited for.
    pub fn fall_behind(&self) {
        let mut state = self.lock();
        state.behind = Some((state.version, state.objects.clone()));
    }

    /// The cache holds what is stored again.
    pub fn catch_up(&self) {
        self.lock().behind = None;
    }

    /// All versions begin anew, as after a restored backup; open watches break.
    pub fn restore(&self) {
        let mut state = self.lock();
        (state.version, state.compacted) = (1, 1);
        state.history.clear();
        drop(state);
        self.break_watches();
    }

    /// The next requests of this sort get these answers, one each.
    pub fn script(&self, resource: Resource, verb: Verb, answers: impl IntoIterator<Item = Answer>) {
        self.lock().scripts.push((resource, verb, answers.into_iter().collect()));
    }

    /// Away: open watches break, new requests find nobody.
    pub fn set_down(&self, down: bool) {
        self.lock().down = down;
        if down {
            self.break_watches();
        }
    }

    /// Denies these rights ("watch services") in reviews of access, from now on.
    pub fn deny(&self, rights: &[&str]) {
        self.lock().denied = rights.iter().map(|right| (*right).to_owned()).collect();
    }

    /// Sets the clock this many seconds ahead.
    pub fn set_clock(&self, ahead: i64) {
        self.lock().ahead = ahead;
    }

    /// Answers 401 to whoever has not this token, from now on.
    pub fn set_token(&self, token: &str) {
        self.lock().token = Some(token.to_owned());
    }

    /// Refuses streaming lists with 422, as a server does whose feature gate is off.
    pub fn refuse_streaming(&self) {
        self.lock().refuses_streaming = true;
    }

    /// Ignores `sendInitialEvents`, as servers did that had never heard of it.
    pub fn ignore_streaming(&self) {
        self.lock().ignores_streaming = true;
    }

    /// Breaks all open watches.
    pub fn break_watches(&self) {
        for watcher in self.lock().watchers.drain(..) {
            let _ = watcher.lines.send(Line::Break);
        }
    }

    /// Sends bytes to the open watches of a resource, as they are.
    pub fn inject(&self, resource: Resource, bytes: &str) {
        for watcher in self.lock().watchers.iter().filter(|w| w.resource == resource) {
            let _ = watcher.lines.send(Line::Raw(bytes.to_owned()));
        }
    }

    /// The next writes fail with these statuses, one each.
    pub fn fail_writes(&self, statuses: impl IntoIterator<Item = u16>) {
        self.lock().write_failures.extend(statuses);
    }

    /// When something was to be written, each time.
    pub fn writes(&self) -> Vec<Instant> {
        self.lock().writes.clone()
    }

    /// The Events of this reason, as they are now, in the order in which they were created.
    pub fn events(&self, reason: &str) -> Vec<Value> {
        self.lock().events.iter().filter(|event| event["reason"] == reason).cloned().collect()
    }

    /// Every request so far.
    pub fn requests(&self) -> Vec<Request> {
        self.lock().requests.clone()
    }

    /// Connections so far, and lists that were sent compressed.
    pub fn traffic(&self) -> (usize, usize) {
        let state = self.lock();
        (state.connections, state.compressed)
    }

    /// Open watches of a resource.
    pub fn open_watches(&self, resource: Resource) -> usize {
        let mut state = self.lock();
        state.watchers.retain(|w| !w.lines.is_closed());
        state.watchers.iter().filter(|w| w.resource == resource).count()
    }
}

impl State {
    fn record(&mut self, resource: Resource, before: Option<Arc<Value>>, after: Option<Arc<Value>>) -> u64 {
        let record = Record { version: self.version, resource, before, after };
        self.watchers.retain(|w| !w.lines.is_closed());
        for watcher in self.watchers.iter().filter(|w| w.resource == resource) {
            if let Some(line) = record.event(&watcher.selection) {
                let _ = watcher.lines.send(Line::Event(line));
            }
        }
        self.history.push(record);
        self.version
    }

    /// The version that answers a request, and whether that is the cache's. Without a version what is stored is wanted, 0
    /// is anything, and another is the least that will do: `Err` when the cache does not have it.
    fn freshness(&self, request: &Request) -> Result<(u64, bool), Box<Response<Body>>> {
        let asked = request.query.get("resourceVersion").map_or("", String::as_str);
        let Ok(asked) = asked.parse::<u64>() else { return Ok((self.version, false)) };
        let (cached, is_behind) = self.behind.as_ref().map_or((self.version, false), |(version, _)| (*version, true));
        match asked <= cached {
            true => Ok((cached, is_behind)),
            false => Err(Box::new(respond::too_large(asked, cached))),
        }
    }

    /// The selected objects, in the order of a list.
    fn selected(&self, resource: Resource, selection: &Selection, cached: bool) -> Vec<Arc<Value>> {
        let all = self.behind.as_ref().filter(|_| cached).map_or(&self.objects, |(_, objects)| objects);
        let objects = all.iter().filter(|((r, _), _)| *r == resource).map(|(_, object)| object);
        objects.filter(|object| selection.matches(object)).cloned().collect()
    }

    fn scripted(&mut self, resource: Resource, verb: Verb) -> Option<Answer> {
        let scripts = self.scripts.iter_mut().filter(|(r, v, _)| *r == resource && *v == verb);
        scripts.filter_map(|(_, _, answers)| answers.pop_front()).next()
    }
}

impl Record {
    /// The event that a watcher with this selection sees: an object that stops matching is DELETED to it.
    fn event(&self, selection: &Selection) -> Option<String> {
        let before = self.before.as_ref().filter(|o| selection.matches(o));
        let after = self.after.as_ref().filter(|o| selection.matches(o));
        match (before, after) {
            (None, None) => None,
            // Both have this version already.
            (None, Some(object)) => Some(event("ADDED", self.resource, object)),
            (Some(_), Some(object)) => Some(event("MODIFIED", self.resource, object)),
            (Some(object), None) => {
                let mut object = (**object).clone();
                object["metadata"]["resourceVersion"] = json!(self.version.to_string());
                Some(event("DELETED", self.resource, &object))
            }
        }
    }
}

/// One line of a watch; API servers write the type first.
fn event(kind: &str, resource: Resource, object: &Value) -> String {
    // What lists hold has no kind; whoever brings his own objects, a hundred thousand perhaps, has it in them.
    let is_whole = object["kind"] == resource.kind() && object["apiVersion"] == resource.api_version();
    let object = if is_whole { Cow::Borrowed(object) } else { Cow::Owned(named(resource, object.clone())) };
    format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n")
}

fn named(resource: Resource, mut object: Value) -> Value {
    object["kind"] = json!(resource.kind());
    object["apiVersion"] = json!(resource.api_version());
    object
}

fn resource_of(object: &Value) -> Resource {
    match object["kind"].as_str() {
        Some("Service") => Resource::Services,
        Some("EndpointSlice") => Resource::EndpointSlices,
        Some("Node") => Resource::Nodes,
        other => panic!("kind {other:?} is not served"),
    }
}

fn key(object: &Value) -> String {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    format!("{}/{}", text("namespace"), text("name"))
}
