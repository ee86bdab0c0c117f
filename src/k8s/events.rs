//! Notices become Events of the cluster (events.k8s.io/v1), one after another: who reads them must not slow down what
//! they are about. Events of one object and reason are one series; the recorder sees to that.

use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, warn};

use super::backoff::Backoff;
use crate::chain::chain;
use crate::model::{About, Notice};

/// Notices that may wait; what comes when these do is only in the log.
pub const WAITING: usize = 64;
/// The API's own limit, in bytes.
const LONGEST_NOTE: usize = 1024;
/// As client-go: together about five minutes.
const ATTEMPTS: u32 = 12;
const ANSWER: Duration = Duration::from_secs(10);
/// Between two events: about 60 a minute at most, whatever goes on.
const PACE: Duration = Duration::from_secs(1);
/// This many may go at once after a quiet time.
const BURST: u32 = 20;

/// Posts notices until their sender is dropped. `node`: this node's name.
pub async fn run(client: kube::Client, node: String, mut notices: mpsc::Receiver<Notice>) {
    let reporter = Reporter { controller: "kubelane".to_owned(), instance: Some(node.clone()) };
    let recorder = Recorder::new(client, reporter);
    let mut told = None;
    // When all events so far would have gone at an even pace.
    let mut even = Instant::now();
    while let Some(notice) = notices.recv().await {
        even = even.max(Instant::now());
        if let Some(at) = even.checked_sub(PACE * (BURST - 1)) {
            tokio::time::sleep_until(at).await;
        }
        even += PACE;
        match post(&recorder, &event(&notice), &regarding(&notice.about, &node)).await {
            Ok(()) => told = None,
            Err(error) if told.as_ref() == Some(&error) => debug!("an event was not posted: {error}"),
            Err(error) => {
                warn!("an event was not posted ({}: {}): {error}", notice.reason, notice.note);
                told = Some(error);
            }
        }
    }
}

/// Tries again while that may help.
async fn post(recorder: &Recorder, event: &Event, regarding: &ObjectReference) -> Result<(), String> {
    let mut backoff = Backoff::default();
    let mut attempt = 1;
    loop {
        let error = match tokio::time::timeout(ANSWER, recorder.publish(event, regarding)).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(kube::Error::Api(status))) if status.code == 403 => {
                return Err(format!("403 Forbidden: {}; apply manifests/base/rbac.yaml", status.message));
            }
            // The object or its namespace is gone, or the server will never take this.
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 400..=428) => {
                return Err(format!("{}: {}", status.code, status.message));
            }
            Ok(Err(error)) => chain(&error),
            Err(_) => format!("no answer in {} s", ANSWER.as_secs()),
        };
        if attempt == ATTEMPTS {
            return Err(error);
        }
        attempt += 1;
        tokio::time::sleep(backoff.next()).await;
    }
}

fn event(notice: &Notice) -> Event {
    let type_ = if notice.is_warning { EventType::Warning } else { EventType::Normal };
    let ends = notice.note.char_indices().map(|(start, letter)| start + letter.len_utf8());
    let end = ends.take_while(|end| *end <= LONGEST_NOTE).last().unwrap_or(0);
    let note = &notice.note[..end];
    Event {
        type_,
        reason: notice.reason.to_owned(),
        note: Some(note.to_owned()),
        action: notice.action.to_owned(),
        secondary: None,
    }
}

/// As kubelet and kube-proxy refer to a Node: its name is the uid that `kubectl describe node` looks for.
fn regarding(about: &About, node: &str) -> ObjectReference {
    let of = |kind: &str, namespace: Option<&str>, name: &str, uid: String| ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some(kind.to_owned()),
        name: Some(name.to_owned()),
        namespace: namespace.map(str::to_owned),
        uid: Some(uid),
        ..ObjectReference::default()
    };
    match about {
        About::Node => of("Node", None, node, node.to_owned()),
        About::Service(service) => of("Service", Some(&service.namespace), &service.name, service.to_string()),
    }
}
