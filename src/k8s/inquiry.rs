//! What `kubelane check` asks the API server: whether it answers, what this account may do, and what time it is there.

use std::path::PathBuf;
use std::time::Duration;

use http::header::{CONTENT_TYPE, DATE};
use jiff::Timestamp;
use jiff::fmt::rfc2822;
use kube::client::Body;
use kube::runtime::watcher;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::client::config;
use super::renewal::renewing;
use super::trouble::explain;

/// For each answer.
const PATIENCE: Duration = Duration::from_secs(15);
const REVIEWS: &str = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";

/// Group, resource and verbs of what the daemon cannot do without, and of what it posts.
const NEEDED: [(&str, &str, &[&str]); 3] = [
    ("", "services", &["list", "watch"]),
    ("discovery.k8s.io", "endpointslices", &["list", "watch"]),
    ("", "nodes", &["list", "watch"]),
];
const USEFUL: [(&str, &str, &[&str]); 1] = [("events.k8s.io", "events", &["create", "patch"])];

/// What the server said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answers {
    /// Its version, such as "v1.36.2".
    pub version: String,
    /// How many seconds its clock is ahead of ours.
    pub ahead: Option<i64>,
    /// What this account may not do though it has to ("watch services"), and what would be of use.
    pub missing: Vec<String>,
    pub missed: Vec<String>,
}

/// The server's address, and its answers, or why there are none, with a remedy.
pub type Inquiry = (String, Result<Answers, (String, &'static str)>);

/// Asks the API server that the daemon would ask.
///
/// # Errors
/// When the kubeconfig or the service account cannot be used: the daemon would end.
pub async fn inquire(kubeconfig: Option<PathBuf>, master: Option<String>) -> anyhow::Result<Inquiry> {
    let server = config(kubeconfig.as_deref(), master.as_deref()).await?.cluster_url.to_string();
    let client = renewing(kubeconfig, master).await?;
    let answers = ask(&client).await.map_err(|error| {
        let trouble = explain(&watcher::Error::WatchStartFailed(error));
        (format!("{} ({})", trouble.what, trouble.detail), trouble.remedy)
    });
    Ok((server, answers))
}

async fn ask(client: &kube::Client) -> kube::Result<Answers> {
    let (version, ahead) = patiently(version(client)).await?;
    let missing = denied(client, &NEEDED).await?;
    let missed = denied(client, &USEFUL).await?;
    Ok(Answers { version, ahead, missing, missed })
}

async fn patiently<T>(answer: impl Future<Output = kube::Result<T>>) -> kube::Result<T> {
    let late = || kube::Error::Service(format!("no answer in {} s", PATIENCE.as_secs()).into());
    timeout(PATIENCE, answer).await.unwrap_or_else(|_| Err(late()))
}

/// The server's version, and how far its clock is ahead.
async fn version(client: &kube::Client) -> kube::Result<(String, Option<i64>)> {
    let request = http::Request::get("/version").body(Body::empty()).map_err(kube::Error::HttpError)?;
    let response = client.send(request).await?;
    let date = response.headers().get(DATE).and_then(|date| date.to_str().ok());
    let there = date.and_then(|date| rfc2822::DateTimeParser::new().parse_timestamp(date).ok());
    let ahead = there.map(|there| there.as_second() - Timestamp::now().as_second());
    let request = http::Request::get("/version").body(Vec::new()).map_err(kube::Error::HttpError)?;
    let answer: Value = client.request(request).await?;
    Ok((answer["gitVersion"].as_str().unwrap_or("of an unknown version").to_owned(), ahead))
}

/// Those of the rights that this account does not have.
async fn denied(client: &kube::Client, rights: &[(&str, &str, &[&str])]) -> kube::Result<Vec<String>> {
    let mut denied = Vec::new();
    for (group, resource, verbs) in rights {
        for verb in *verbs {
            let attributes = json!({"group": group, "resource": resource, "verb": verb});
            let review = json!({
                "kind": "SelfSubjectAccessReview", "apiVersion": "authorization.k8s.io/v1",
                "spec": {"resourceAttributes": attributes},
            });
            let request = http::Request::post(REVIEWS).header(CONTENT_TYPE, "application/json");
            let request = request.body(review.to_string().into_bytes()).map_err(kube::Error::HttpError)?;
            let answer: Value = patiently(client.request(request)).await?;
            if answer["status"]["allowed"] != true {
                denied.push(format!("{verb} {resource}"));
            }
        }
    }
    Ok(denied)
}
