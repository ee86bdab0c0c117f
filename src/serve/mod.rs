//! The daemon's HTTP servers: health for load balancers and the kubelet, metrics for Prometheus.

mod health;
mod http;
mod metrics;
mod page;
mod places;
mod probes;
mod service_health;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::anyhow;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tracing::{info, warn};

pub use health::Stage;
pub use health::{Health, UPDATE_TIMEOUT};
pub use http::listen;
pub use metrics::{Changes, Durations, Metrics, Sample, SyncSample, Totals};
pub use page::{Ask, MetricsPage, Page};
pub use places::Limits;
pub use service_health::{HealthChecks, run as run_service_health};

use health::Answer;

/// The flag that says where [`health_router`] is served.
pub const HEALTHZ_FLAG: &str = "--healthz-bind-address";
/// The flag that says where [`metrics_router`] is served.
pub const METRICS_FLAG: &str = "--metrics-bind-address";

/// What the handlers know.
#[derive(Clone)]
pub struct App {
    pub health: Arc<Health>,
    pub metrics: Arc<Metrics>,
}

/// `/healthz`, `/livez`, `/readyz`.
pub fn health_router(app: App) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .with_state(app)
}

/// `/metrics`, `/healthz`, `/proxyMode`, and the page at `/`, if there is one.
pub fn metrics_router(app: App, page: Option<Arc<Page>>) -> Router {
    Router::new()
        .route("/metrics", get(metrics_text))
        .route("/healthz", get(healthz))
        .route("/proxyMode", get(async || "kubelane"))
        .with_state(app)
        .merge(page::router(page))
}

/// Listens on `address`.
///
/// # Errors
/// When it cannot be had; `flag` is named.
pub fn bind(flag: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    listen(address).and_then(TcpListener::from_std).map_err(|error| {
        let remedy = match error.kind() {
            io::ErrorKind::AddrInUse => {
                "is kube-proxy or another kubelane running? `kubelane check` names the process; stop it, or use \
                 another port or \"\" (off)"
            }
            io::ErrorKind::AddrNotAvailable => {
                "no device of this node has this address; use one of the node's addresses, or 0.0.0.0"
            }
            _ => "use another address, or \"\" (off)",
        };
        anyhow!("{flag}: cannot listen on {address}: {error}; {remedy}")
    })
}

/// Before an address that could not be had is tried again, as kube-proxy does.
const RETRY: Duration = Duration::from_secs(5);

/// What is served at an address that a flag names.
pub struct Server {
    pub flag: &'static str,
    pub address: SocketAddr,
    pub router: Router,
    /// Where it listens already.
    pub listener: Option<TcpListener>,
    /// Of [`health_router`]: who is told that it is listened at.
    pub health: Option<Arc<Health>>,
}

/// Serves until it is dropped. Services do not wait for a port that somebody else has: it is told once, and had when it is
/// free.
pub async fn run(server: Server, limits: Arc<Limits>) {
    let Server { flag, address, router, mut listener, health } = server;
    let mut told = None;
    let listener = loop {
        match listener.take().map_or_else(|| bind(flag, address), Ok) {
            Ok(listener) => break listener,
            Err(error) => {
                let error = error.to_string();
                if told.as_ref() != Some(&error) {
                    warn!("{error}. Services are served nevertheless; trying again");
                    told = Some(error);
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    };
    info!("{flag}: listening on {address}");
    if let Some(health) = health {
        health.change_probed(|probed| probed.healthz = Some(address));
    }
    http::serve(listener, router, limits).await;
}

async fn healthz(State(app): State<App>) -> Response {
    let answer = app.health.facts().healthz(Instant::now(), SystemTime::now());
    app.metrics.healthz_answered(code(&answer).as_u16());
    json(answer)
}

async fn livez(State(app): State<App>) -> Response {
    let answer = app.health.facts().livez(Instant::now(), SystemTime::now());
    app.metrics.livez_answered(code(&answer).as_u16());
    json(answer)
}

async fn readyz(State(app): State<App>) -> Response {
    let answer = app.health.facts().readyz();
    (code(&answer), answer.body).into_response()
}

async fn metrics_text(State(app): State<App>) -> Response {
    match app.metrics.text() {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}\n")).into_response(),
    }
}

fn code(answer: &Answer) -> StatusCode {
    if answer.ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

fn json(answer: Answer) -> Response {
    let headers = [(header::CONTENT_TYPE, "application/json"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    (code(&answer), headers, answer.body).into_response()
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::Request;
    use http_body_util::BodyExt as _;
    use tower::ServiceExt as _;

    use super::*;

    async fn get(router: &Router, path: &str) -> (u16, String, String) {
        let request = Request::get(path).body(Body::empty()).unwrap();
        let response = router.clone().oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        let kind = response.headers().get("content-type").map(|v| v.to_str().unwrap().to_owned()).unwrap_or_default();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, kind, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn the_endpoints_answer_as_the_health_says() {
        let app = App { health: Arc::default(), metrics: Arc::new(Metrics::new().unwrap()) };
        let (health, metrics) = (health_router(app.clone()), metrics_router(app.clone(), None));
        assert_eq!(get(&health, "/healthz").await.0, 503);
        assert_eq!(get(&health, "/readyz").await.0, 503);
        assert_eq!(get(&health, "/livez").await.0, 200);

        app.health.up_to_date(SystemTime::now());
        let (status, kind, body) = get(&health, "/healthz").await;
        assert_eq!((status, kind.as_str()), (200, "application/json"));
        assert!(body.contains("\"nodeEligible\":true"), "{body}");
        let unprobed = get(&health, "/readyz").await;
        assert!(unprobed.0 == 503 && unprobed.2.contains("has not been probed"), "{unprobed:?}");
        app.health.probed(None);
        assert_eq!(get(&health, "/readyz").await, (200, "text/plain; charset=utf-8".into(), "ok\n".into()));

        app.health.node_leaves(true);
        assert_eq!(get(&health, "/healthz").await.0, 503);
        assert_eq!(get(&metrics, "/healthz").await.0, 503);
        assert_eq!(get(&health, "/livez").await.0, 200);

        let (status, kind, text) = get(&metrics, "/metrics").await;
        assert_eq!((status, kind.as_str()), (200, "text/plain; version=0.0.4; charset=utf-8"));
        assert!(text.contains("kubeproxy_proxy_healthz_total{code=\"503\"} 3\n"), "{text}");
        assert!(text.contains("kubeproxy_proxy_livez_total{code=\"200\"} 2\n"), "{text}");
        assert_eq!(get(&metrics, "/proxyMode").await.2, "kubelane");
        assert_eq!(get(&health, "/metrics").await.0, 404);
        let (status, _, text) = get(&metrics, "/").await;
        assert!(status == 404 && text.contains("--metrics-page"), "{text}");
    }

    #[tokio::test]
    async fn a_taken_port_is_named_with_its_flag() {
        let first = bind("--healthz-bind-address", ([127, 0, 0, 1], 0).into()).unwrap();
        let taken = first.local_addr().unwrap();
        let error = format!("{:#}", bind("--healthz-bind-address", taken).unwrap_err());
        assert!(error.contains(&taken.to_string()) && error.contains("--healthz-bind-address"), "{error}");
        assert!(error.contains("`kubelane check` names the process"), "{error}");
    }

    #[tokio::test]
    async fn an_address_that_the_node_does_not_have_is_not_blamed_on_another_process() {
        let error = format!("{:#}", bind("--metrics-bind-address", ([192, 0, 2, 1], 1).into()).unwrap_err());
        assert!(error.contains("no device of this node has this address") && !error.contains("kube-proxy"), "{error}");
    }
}
