//! A connection to the server: single requests, and the paths of what was made by them and has to go again.

use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use anyhow::Context as _;
use futures::StreamExt as _;
use http_body_util::BodyExt as _;
use kube::client::Body;
use serde_json::Value;
use tokio::runtime::{Handle, Runtime};

/// Requests under way at a time when many objects are made or deleted.
pub const AT_ONCE: usize = 32;
/// How often a server may say that it has too much to do, with a second in between.
const BUSY: u32 = 30;

/// This process's connections, for [`remove_own`].
static OWN: Mutex<Vec<Weak<Connection>>> = Mutex::new(Vec::new());

pub struct Connection {
    client: kube::Client,
    runtime: Handle,
    /// Paths of what is to be deleted, in the order in which it was made; the namespace is the first.
    made: Mutex<Vec<String>>,
}

impl Connection {
    /// To the server that `kubeconfig` leads to; nobody is asked yet. `runtime` has a thread of its own.
    pub fn open(runtime: &Runtime, kubeconfig: &Value) -> anyhow::Result<Arc<Connection>> {
        let parsed: kube::config::Kubeconfig = serde_json::from_value(kubeconfig.clone())?;
        let client = runtime.block_on(async {
            let config = kube::Config::from_custom_kubeconfig(parsed, &Default::default()).await?;
            Ok::<_, anyhow::Error>(kube::Client::try_from(config)?)
        })?;
        let connection = Connection { client, runtime: runtime.handle().clone(), made: Mutex::default() };
        let connection = Arc::new(connection);
        lock(&OWN).push(Arc::downgrade(&connection));
        Ok(connection)
    }

    /// Fails when nobody answers.
    pub fn check(&self) -> anyhow::Result<()> {
        self.runtime.block_on(self.send("GET", "/version", "", &[])).map(drop)
    }

    /// One request. A refusal is a status; anything else that goes wrong ends the test.
    pub fn call(&self, method: &str, path: &str, content: &str, body: Option<&Value>) -> Result<Value, u16> {
        self.runtime.block_on(self.request(method, path, content, body))
    }

    /// As [`Connection::call`]. A server that has too much to do is asked again.
    pub async fn request(&self, method: &str, path: &str, content: &str, body: Option<&Value>) -> Result<Value, u16> {
        let bytes = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
        let mut patience = BUSY;
        let (status, bytes) = loop {
            let answer = self.send(method, path, content, &bytes).await.unwrap_or_else(|error| panic!("{error:#}"));
            if answer.0 != http::StatusCode::TOO_MANY_REQUESTS || patience == 0 {
                break answer;
            }
            patience -= 1;
            tokio::time::sleep(Duration::from_secs(1)).await;
        };
        if !status.is_success() {
            if !matches!((method, status.as_u16()), ("GET" | "DELETE", 404)) {
                println!("{method} {path}: {status}: {}", String::from_utf8_lossy(&bytes));
            }
            return Err(status.as_u16());
        }
        Ok(serde_json::from_slice(&bytes).expect("JSON"))
    }

    /// Status and body of an answer; an error when there is none.
    async fn send(
        &self,
        method: &str,
        path: &str,
        content: &str,
        body: &[u8],
    ) -> anyhow::Result<(http::StatusCode, Vec<u8>)> {
        let mut request = http::Request::builder().method(method).uri(path);
        if !content.is_empty() {
            request = request.header(http::header::CONTENT_TYPE, content);
        }
        let request = request.body(Body::from(body.to_vec())).expect("a request");
        let what = || format!("{method} {path}");
        let response = self.client.send(request).await.with_context(what)?;
        let status = response.status();
        Ok((status, response.into_body().collect().await.with_context(what)?.to_bytes().into()))
    }

    /// Makes an object in the collection `all`, which is deleted in the end.
    pub fn create(&self, all: &str, object: &Value) -> Result<Value, u16> {
        // Held until the object is among what was made: nobody removes that in between.
        let mut made = lock(&self.made);
        let created = self.call("POST", all, "application/json", Some(object))?;
        made.push(path_in(all, object));
        Ok(created)
    }

    /// As [`Connection::create`], for many objects of the namespace at once. One that is under way when everything is
    /// removed goes with the namespace.
    pub async fn create_beside(&self, all: &str, object: &Value) -> Result<Value, u16> {
        let created = self.request("POST", all, "application/json", Some(object)).await?;
        lock(&self.made).push(path_in(all, object));
        Ok(created)
    }

    pub fn delete(&self, path: &str) {
        let outcome = self.call("DELETE", path, "", None);
        assert!(matches!(outcome, Ok(_) | Err(404)), "DELETE {path}: {outcome:?}");
        lock(&self.made).retain(|made| made != path);
    }

    /// Deletes all that was made, at the end.
    pub fn finish(&self) {
        let mut own = lock(&OWN);
        self.remove_made(&mut lock(&self.made));
        own.retain(|other| !std::ptr::eq(other.as_ptr(), self));
    }

    fn remove_made(&self, made: &mut Vec<String>) {
        let mut paths = std::mem::take(made);
        // The namespace was made first, and goes when nothing is in it.
        let namespace: Vec<String> = paths.drain(..paths.len().min(1)).collect();
        self.remove_all(paths);
        self.remove_all(namespace);
    }

    /// Deletes these, many at once, and tells of those that stay.
    fn remove_all(&self, paths: Vec<String>) {
        let remove = |path: String| async move {
            let outcome = self.request("DELETE", &path, "", None).await;
            if !matches!(outcome, Ok(_) | Err(404)) {
                eprintln!("{path} was not deleted");
            }
        };
        let requests = futures::stream::iter(paths).for_each_concurrent(AT_ONCE, remove);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.runtime.block_on(requests)));
        if outcome.is_err() {
            eprintln!("not everything that was made on the API server was deleted");
        }
    }
}

/// Deletes all that this process's connections made: for a signal handler thread, which then ends the process. Whoever
/// opens or finishes a connection or makes an object from now on waits for that end.
pub fn remove_own() {
    let own = lock(&OWN);
    for connection in own.iter().filter_map(Weak::upgrade) {
        let mut made = lock(&connection.made);
        connection.remove_made(&mut made);
        std::mem::forget(made);
    }
    std::mem::forget(own);
}

fn path_in(all: &str, object: &Value) -> String {
    format!("{all}/{}", object["metadata"]["name"].as_str().expect("a name"))
}

/// A panic elsewhere changes nothing about what was made.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
