//! healthCheckNodePort: load balancers ask each node whether it has endpoints of a Service with traffic policy Local,
//! and send its traffic there only. The answers are kube-proxy's (`pkg/proxy/healthcheck/service_health.go`).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use axum::Router;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::ser::{PrettyFormatter, Serializer};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tracing::{info, warn};

use super::http::{listen, serve};
use super::{App, Health, Limits};
use crate::model::{About, HealthCheck, Ipx, Notice, ObjectName};

/// Before a port that could not be had is tried again.
const RETRY: Duration = Duration::from_secs(5);
pub(super) const WEIGHT: &str = "x-load-balancing-endpoint-weight";

/// What is asked about, and where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HealthChecks {
    /// The addresses of this node that serve NodePorts; `None`: every address.
    pub addresses: Option<Vec<Ipx>>,
    pub checks: Vec<HealthCheck>,
    /// When they were last known to be true: nanoseconds of CLOCK_MONOTONIC, 0: not yet.
    pub vouched_ns: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Body<'a> {
    service: Name<'a>,
    local_endpoints: u32,
    service_proxy_healthy: bool,
}

#[derive(Serialize)]
struct Name<'a> {
    namespace: &'a str,
    name: &'a str,
}

/// One listening socket: which Service's, and where.
type Key = (ObjectName, SocketAddr);

/// A server that runs.
struct Open {
    local_endpoints: Arc<AtomicU32>,
    task: JoinHandle<()>,
}

/// The servers of all Services.
struct Servers {
    node: String,
    app: App,
    limits: Arc<Limits>,
    notices: mpsc::Sender<Notice>,
    open: BTreeMap<Key, Open>,
    /// What was said of those that could not listen.
    failed: BTreeMap<Key, String>,
}

/// Opens and closes servers as `wanted` says, until its sender is dropped. `node`: the name of this node.
pub async fn run(
    mut wanted: watch::Receiver<HealthChecks>,
    node: String,
    app: App,
    limits: Arc<Limits>,
    notices: mpsc::Sender<Notice>,
) {
    let mut servers = Servers { node, app, limits, notices, open: BTreeMap::new(), failed: BTreeMap::new() };
    let mut followed = HealthChecks::default();
    loop {
        let checks = wanted.borrow_and_update().clone();
        let is_followed = checks.checks == followed.checks && checks.addresses == followed.addresses;
        if !is_followed || !servers.failed.is_empty() {
            servers.follow(&checks).await;
        }
        servers.tell(&checks);
        followed = checks;
        let retry = async {
            match servers.failed.is_empty() {
                true => std::future::pending().await,
                false => tokio::time::sleep(RETRY).await,
            }
        };
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            () = retry => {}
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Servers {
    /// Closes first: a port may go from one Service to another.
    async fn follow(&mut self, wanted: &HealthChecks) {
        let keys: BTreeSet<Key> = wanted.checks.iter().flat_map(|check| self::keys(check, wanted)).collect();
        let gone: Vec<Key> = self.open.keys().filter(|key| !keys.contains(*key)).cloned().collect();
        for key in gone {
            if let Some(mut open) = self.open.remove(&key) {
                open.task.abort();
                // The socket is closed when the task has ended. That it was cancelled is what was asked for.
                let _ = (&mut open.task).await;
                info!(service = %key.0, at = %key.1, "health checks of this Service are no longer answered");
            }
        }
        self.failed.retain(|key, _| keys.contains(key));
        for check in &wanted.checks {
            for key in self::keys(check, wanted) {
                match self.open.get(&key) {
                    Some(open) => open.local_endpoints.store(check.local_endpoints, Relaxed),
                    None => self.start(key, check),
                }
            }
        }
    }

    /// What is listened at, for those who answer probes in the place of the servers.
    fn tell(&self, wanted: &HealthChecks) {
        let at = |check| {
            let open = self::keys(check, wanted).into_iter().filter(|key| self.open.contains_key(key));
            open.map(|key| (key.1, check.clone()))
        };
        let checks = wanted.checks.iter().flat_map(at).collect();
        self.app.health.change_probed(|probed| (probed.checks, probed.vouched_ns) = (checks, wanted.vouched_ns));
    }

    fn start(&mut self, key: Key, check: &HealthCheck) {
        let listener = match listen(key.1).and_then(TcpListener::from_std) {
            Ok(listener) => listener,
            Err(error) => return self.cannot_start(key, &error),
        };
        info!(service = %key.0, at = %key.1, "health checks of this Service are answered");
        self.failed.remove(&key);
        let local_endpoints = Arc::new(AtomicU32::new(check.local_endpoints));
        let router = router(check.service.clone(), Arc::clone(&local_endpoints), Arc::clone(&self.app.health));
        let task = tokio::spawn(serve(listener, router, Arc::clone(&self.limits)));
        self.open.insert(key, Open { local_endpoints, task });
    }

    fn cannot_start(&mut self, key: Key, error: &std::io::Error) {
        let error = error.to_string();
        if self.failed.get(&key) == Some(&error) {
            return;
        }
        let (service, at) = (&key.0, key.1);
        let note = format!(
            "node {} failed to start healthcheck \"{service}\" on port {}: cannot listen on {at}: {error}",
            self.node,
            at.port()
        );
        warn!("{note}; trying again");
        let notice = Notice {
            about: About::Service(service.clone()),
            is_warning: true,
            reason: "FailedToStartServiceHealthcheck",
            action: "Listen",
            note,
            is_of_cluster: false,
        };
        // A full queue has more to tell than anybody reads; the log has it all.
        let _ = self.notices.try_send(notice);
        self.failed.insert(key, error);
    }
}

fn keys(check: &HealthCheck, wanted: &HealthChecks) -> Vec<Key> {
    let everywhere = [IpAddr::from(Ipv4Addr::UNSPECIFIED)];
    let chosen = wanted.addresses.as_ref().map(|all| all.iter().map(Ipx::to_ip).collect::<Vec<_>>());
    let addresses = chosen.as_deref().unwrap_or(&everywhere);
    addresses.iter().map(|ip| (check.service.clone(), SocketAddr::new(*ip, check.port))).collect()
}

/// Answers any path.
fn router(service: ObjectName, local_endpoints: Arc<AtomicU32>, health: Arc<Health>) -> Router {
    Router::new()
        .fallback(async move || answer(&service, local_endpoints.load(Relaxed), health.facts().serves(Instant::now())))
}

pub(super) fn answer_of(service: &ObjectName, local_endpoints: u32, healthy: bool) -> (StatusCode, String) {
    let code = if local_endpoints > 0 && healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = Body {
        service: Name { namespace: &service.namespace, name: &service.name },
        local_endpoints,
        service_proxy_healthy: healthy,
    };
    let mut text = Vec::new();
    // kube-proxy's indentation. Strings, a number and a bool cannot fail to be written into memory.
    let _ = body.serialize(&mut Serializer::with_formatter(&mut text, PrettyFormatter::with_indent(b"\t")));
    (code, String::from_utf8(text).unwrap_or_default())
}

fn answer(service: &ObjectName, local_endpoints: u32, healthy: bool) -> Response {
    let (code, text) = answer_of(service, local_endpoints, healthy);
    let headers = [
        (header::CONTENT_TYPE, "application/json".to_owned()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
        (HeaderName::from_static(WEIGHT), local_endpoints.to_string()),
    ];
    (code, headers, text).into_response()
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use http_body_util::BodyExt as _;

    use super::*;
    use crate::serve::Metrics;

    fn app() -> App {
        App { health: Arc::default(), metrics: Arc::new(Metrics::new().unwrap()) }
    }

    fn checks(port: u16, local_endpoints: u32) -> HealthChecks {
        let service = ObjectName::new("shop", "web");
        let loopback = Ipx::from(IpAddr::from(Ipv4Addr::LOCALHOST));
        let checks = vec![HealthCheck { service, port, local_endpoints }];
        HealthChecks { addresses: Some(vec![loopback]), checks, vouched_ns: 0 }
    }

    #[tokio::test]
    async fn an_answer_is_kube_proxys_to_the_byte() {
        let service = ObjectName::new("shop", "web");
        for (endpoints, healthy, status) in [(2, true, 200), (0, true, 503), (2, false, 503)] {
            let response = answer(&service, endpoints, healthy);
            assert_eq!(response.status(), status);
            let header = |name: &str| response.headers()[name].to_str().unwrap().to_owned();
            assert_eq!(header("content-type"), "application/json");
            assert_eq!(header("x-content-type-options"), "nosniff");
            assert_eq!(header("x-load-balancing-endpoint-weight"), endpoints.to_string());
            let body = response.into_body().collect().await.unwrap().to_bytes();
            let expected = format!(
                "{{\n\t\"service\": {{\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"web\"\n\t}},\n\t\"localEndpoints\": \
                 {endpoints},\n\t\"serviceProxyHealthy\": {healthy}\n}}"
            );
            assert_eq!(String::from_utf8(body.to_vec()).unwrap(), expected);
        }
    }

    #[tokio::test]
    async fn a_port_that_is_taken_is_told_of_once_and_had_as_soon_as_it_is_free() {
        let _forks = crate::FORKS.lock().await;
        let taken = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let port = taken.local_addr().unwrap().port();
        let (notices, mut told) = mpsc::channel(8);
        let app = app();
        app.health.up_to_date(SystemTime::now());
        let mut servers = Servers {
            node: "node-a".into(),
            app,
            limits: Arc::default(),
            notices,
            open: BTreeMap::new(),
            failed: BTreeMap::new(),
        };
        for _ in 0..3 {
            servers.follow(&checks(port, 1)).await;
        }
        assert_eq!((servers.open.len(), servers.failed.len()), (0, 1));
        let notice = told.try_recv().unwrap();
        assert!(notice.is_warning && notice.reason == "FailedToStartServiceHealthcheck", "{notice:?}");
        assert_eq!(notice.about, About::Service(ObjectName::new("shop", "web")));
        assert!(notice.note.contains("node-a") && notice.note.contains(&port.to_string()), "{notice:?}");
        assert!(told.try_recv().is_err(), "told once");
        drop(taken);
        servers.follow(&checks(port, 1)).await;
        assert_eq!((servers.open.len(), servers.failed.len()), (1, 0));
        servers.follow(&HealthChecks::default()).await;
        listen(([127, 0, 0, 1], port).into()).expect("it is free again at once");
    }
}
