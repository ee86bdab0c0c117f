use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use axum::http::Request;
use data_encoding::BASE64;
use http_body_util::BodyExt as _;
use sha2::{Digest as _, Sha256};
use tower::ServiceExt as _;

use super::*;

/// A page without maps, and how often the worker was asked.
fn page(address: &str) -> (Arc<Page>, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let ask: Ask = Arc::new(move |_| {
        count.fetch_add(1, Relaxed);
        Box::pin(async { Some(Answer::new()) })
    });
    let metrics = Arc::new(Metrics::new().unwrap());
    (Page::new("/nowhere".into(), metrics, ask, address.parse().unwrap()), asked)
}

async fn get(page: &Arc<Page>, path: &str, host: &str) -> Response {
    let request = Request::get(path).header("host", host).body(Body::empty()).unwrap();
    router(Some(Arc::clone(page))).oneshot(request).await.unwrap()
}

#[test]
fn the_policy_allows_the_documents_own_style_and_script_and_nothing_else() {
    for (kind, text) in [("style-src", include_str!("page.css")), ("script-src", include_str!("page.js"))] {
        let hash = BASE64.encode(&Sha256::digest(text));
        assert!(POLICY.contains(&format!("{kind} 'sha256-{hash}';")), "{kind} 'sha256-{hash}'");
    }
    assert!(!POLICY.contains("unsafe") && POLICY.starts_with("default-src 'none';"));
}

#[test]
fn the_document_is_small_and_brings_all_that_it_needs() {
    assert!(DOCUMENT.len() < 60_000, "{} bytes", DOCUMENT.len());
    for foreign in ["http:", "https:", "//cdn", "url(", "@import", "src=", "style=\"", "onclick"] {
        assert!(!DOCUMENT.contains(foreign), "{foreign}");
    }
    for interpreted in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"] {
        assert!(!DOCUMENT.contains(interpreted), "{interpreted}");
    }
}

#[tokio::test]
async fn on_loopback_only_the_nodes_own_names_are_answered() {
    let (loopback, _) = page("127.0.0.1:10249");
    let (open, _) = page("0.0.0.0:10249");
    for (host, is_own) in [
        ("127.0.0.1:10249", true),
        ("[::1]:10249", true),
        ("localhost", true),
        ("LOCALHOST:8080", true),
        ("10.0.0.1", true),
        ("evil.example:10249", false),
        ("127.0.0.1.evil.example", false),
        ("", false),
    ] {
        for path in ["/", "/page/events"] {
            let expected = if is_own { StatusCode::OK } else { StatusCode::MISDIRECTED_REQUEST };
            assert_eq!(get(&loopback, path, host).await.status(), expected, "{host} {path}");
            assert_eq!(get(&open, path, host).await.status(), StatusCode::OK, "{host} {path}");
        }
    }
    let answer = get(&loopback, "/", "localhost").await;
    assert_eq!(answer.headers()["content-security-policy"], POLICY);
    assert_eq!(answer.headers()["content-type"], "text/html; charset=utf-8");
    let answer = get(&loopback, "/page/events", "localhost").await;
    assert_eq!(answer.headers()["content-type"], "text/event-stream");
}

#[test]
fn the_page_is_where_the_flag_says() {
    let at = |text: &str, address: &str| text.parse::<MetricsPage>().unwrap().is_served_at(address.parse().unwrap());
    assert!(
        at("auto", "127.0.0.1:1") && at("auto", "[::1]:1") && !at("auto", "0.0.0.0:1") && !at("auto", "10.0.0.1:1")
    );
    assert!(at("always", "0.0.0.0:1") && !at("never", "127.0.0.1:1"));
    assert!("sometimes".parse::<MetricsPage>().is_err());
}

#[tokio::test(start_paused = true)]
async fn nothing_is_asked_for_a_viewer_who_does_not_read() {
    let (page, asked) = page("127.0.0.1:10249");
    let mut body = get(&page, "/page/events?service=shop%2Fweb", "localhost").await.into_body();
    assert_eq!(asked.load(Relaxed), 0);
    let mut next =
        async || String::from_utf8(body.frame().await.unwrap().unwrap().into_data().unwrap().to_vec()).unwrap();
    let first = next().await;
    assert!(first.starts_with("event: trouble\ndata: \"") && first.contains("/nowhere"), "{first}");
    assert_eq!(asked.load(Relaxed), 1);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(asked.load(Relaxed), 1);
    next().await;
    let late = tokio::time::Instant::now();
    next().await;
    assert_eq!(late.elapsed(), EVERY, "what was missed is not made up for");
}

#[tokio::test(start_paused = true)]
async fn a_stream_ends_before_its_connection_does_and_when_a_newcomer_needs_its_place() {
    let (page, _) = page("127.0.0.1:10249");
    let began = tokio::time::Instant::now();
    let mut body = get(&page, "/page/events", "localhost").await.into_body();
    while body.frame().await.is_some() {}
    assert_eq!(began.elapsed(), LIFE);
    let mut oldest = get(&page, "/page/events", "localhost").await.into_body();
    let mut others = Vec::new();
    for _ in 0..16 {
        others.push(get(&page, "/page/events", "localhost").await);
    }
    assert!(oldest.frame().await.is_none());
}

#[tokio::test]
async fn what_was_looked_at_is_forgotten_when_nobody_looks() {
    let (page, _) = page("127.0.0.1:10249");
    let has_latest = || page.looks.lock().unwrap().latest.is_some();
    let (first, second) =
        (get(&page, "/page/events", "localhost").await, get(&page, "/page/events", "localhost").await);
    page.looks.lock().unwrap().latest = Some((Arc::default(), Instant::now()));
    drop(first);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(has_latest());
    drop(second);
    let mut waited = 0;
    while has_latest() && waited < 1000 {
        tokio::time::sleep(Duration::from_millis(5)).await;
        waited += 1;
    }
    assert!(!has_latest());
}
