//! Notices become Events of the cluster (events.k8s.io/v1), one after another: who reads them must not slow down what
//! they are about. Events of one object and reason are one series; the recorder sees to that. What every node says of a
//! Service is one event of the cluster: it has the same name wherever it is made, and each node asks at a time of its own.

use std::hash::BuildHasher as _;
use std::time::Duration;

use foldhash::quality::FixedState;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event as ClusterEvent;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::PostParams;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::backoff::Backoff;
use crate::chain::chain;
use crate::model::{About, Notice};

const CONTROLLER: &str = "kubelane";
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

/// What every node says is said within this time, by chance: of five thousand nodes, 170 a second.
const TURN: Duration = Duration::from_secs(30);

/// Posts notices until their sender is dropped. `node`: this node's name.
pub async fn run(client: kube::Client, node: String, mut notices: mpsc::Receiver<Notice>) {
    let reporter = Reporter { controller: CONTROLLER.to_owned(), instance: Some(node.clone()) };
    let mut poster =
        Poster { recorder: Recorder::new(client.clone(), reporter), client, node, told: None, even: Instant::now() };
    let (mut shared, mut turn) = (Vec::new(), None);
    loop {
        let is_due = async {
            match turn {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            notice = notices.recv(), if shared.len() < WAITING => match notice {
                Some(notice) if notice.is_of_cluster => {
                    turn.get_or_insert_with(|| Instant::now() + TURN.mul_f64(fastrand::f64()));
                    shared.push(notice);
                }
                Some(notice) => poster.post(&notice).await,
                None => break,
            },
            () = is_due => {
                turn = None;
                for notice in shared.drain(..) {
                    poster.post(&notice).await;
                }
            }
        }
    }
    if let Some(at) = turn {
        tokio::time::sleep_until(at).await;
    }
    for notice in &shared {
        poster.post(notice).await;
    }
}

/// Posts one notice after another, at an even pace.
struct Poster {
    client: kube::Client,
    recorder: Recorder,
    node: String,
    /// The last failure, which was told.
    told: Option<String>,
    /// When all events so far would have gone at an even pace.
    even: Instant,
}

impl Poster {
    async fn post(&mut self, notice: &Notice) {
        self.even = self.even.max(Instant::now());
        if let Some(at) = self.even.checked_sub(PACE * (BURST - 1)) {
            tokio::time::sleep_until(at).await;
        }
        self.even += PACE;
        let (event, regarding) = (event(notice), regarding(&notice.about, &self.node));
        let posted = match notice.is_of_cluster {
            true => {
                let shared = shared_event(event, regarding, &self.node);
                let namespace = shared.metadata.namespace.as_deref().unwrap_or("default").to_owned();
                let events = Api::<ClusterEvent>::namespaced(self.client.clone(), &namespace);
                patiently(|| async { told_by_anybody(events.create(&PostParams::default(), &shared).await) }).await
            }
            false => patiently(|| self.recorder.publish(&event, &regarding)).await,
        };
        match posted {
            Ok(()) => self.told = None,
            Err(error) if self.told.as_ref() == Some(&error) => debug!("an event was not posted: {error}"),
            Err(error) => {
                warn!("an event was not posted ({}: {}): {error}", notice.reason, notice.note);
                self.told = Some(error);
            }
        }
    }
}

/// That another node was first is as good.
fn told_by_anybody(created: kube::Result<ClusterEvent>) -> kube::Result<()> {
    match created {
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        other => other.map(drop),
    }
}

/// An event whose name says what it is about, so that of all nodes one makes it.
fn shared_event(event: Event, regarding: ObjectReference, node: &str) -> ClusterEvent {
    let said = FixedState::default().hash_one((&regarding.uid, &event.reason, &event.note));
    let name = format!("{}.kubelane-{said:016x}", regarding.name.as_deref().unwrap_or_default());
    ClusterEvent {
        metadata: ObjectMeta { name: Some(name), namespace: regarding.namespace.clone(), ..ObjectMeta::default() },
        event_time: Some(MicroTime(Timestamp::now())),
        reporting_controller: Some(CONTROLLER.to_owned()),
        reporting_instance: Some(node.to_owned()),
        action: Some(event.action),
        reason: Some(event.reason),
        note: event.note,
        type_: Some(if matches!(event.type_, EventType::Warning) { "Warning" } else { "Normal" }.to_owned()),
        regarding: Some(regarding),
        ..ClusterEvent::default()
    }
}

/// Tries again while that may help.
async fn patiently<F: Future<Output = kube::Result<()>>>(post: impl Fn() -> F) -> Result<(), String> {
    let mut backoff = Backoff::default();
    let mut attempt = 1;
    loop {
        let error = match tokio::time::timeout(ANSWER, post()).await {
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
