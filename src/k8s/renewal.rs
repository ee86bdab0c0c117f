//! Credentials that change: tokens are renewed every hour, certificates and their authorities once in a while, and plugins
//! are asked for new ones. kube reads most of them once, when a client is made. Here each request looks at the files first.
//! A new token is shown with the next request, on the same connection; for anything else a new client is made. Requests
//! are rare (a watch lasts for minutes), so that this costs nothing.

use std::hash::{Hash as _, Hasher as _};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use axum::body::Body;
use foldhash::quality::FixedState;
use http::header::AUTHORIZATION;
use http::{HeaderValue, Request, Response, StatusCode};
use kube::client::Body as KubeBody;
use kube::config::ExecConfig;
use secrecy::ExposeSecret as _;
use tokio::sync::Mutex;
use tracing::{info, warn};

use super::client::config;
use super::connect::client;
use super::exec::{self, Credential};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Where credentials come from, and what was made of them.
struct Renewing {
    kubeconfig: Option<PathBuf>,
    master: Option<String>,
    /// `None` before the first request.
    made: Option<Made>,
    /// What a plugin said, and a hash of how it was asked.
    credential: Option<(Credential, u64)>,
    /// The last problem, which was told.
    problem: Option<String>,
}

/// A client, and the token that it does not know.
#[derive(Clone)]
struct Made {
    client: kube::Client,
    token: Option<HeaderValue>,
    /// Of all that the client was made of.
    fingerprint: u64,
}

/// There is nothing to show the API server, and why.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NoCredentials(String);

/// A client whose requests are made with what [`config`] finds at that time. Files that cannot be used (a half written
/// one, say) change nothing. Credential plugins are run when something is asked, and not before.
///
/// # Errors
/// When the configuration cannot be used now.
pub async fn renewing(kubeconfig: Option<PathBuf>, master: Option<String>) -> anyhow::Result<kube::Client> {
    let mut state = Renewing { kubeconfig, master, made: None, credential: None, problem: None };
    let config = config(state.kubeconfig.as_deref(), state.master.as_deref()).await?;
    if config.auth_info.exec.is_none() {
        state.made = Some(make(config)?);
    }
    let state = Arc::new(Mutex::new(state));
    let service = tower::service_fn(move |request: Request<KubeBody>| send(Arc::clone(&state), request));
    Ok(kube::Client::new(service, "default"))
}

async fn send(state: Arc<Mutex<Renewing>>, mut request: Request<KubeBody>) -> Result<Response<Body>, BoxError> {
    let made = state.lock().await.renew().await.map_err(|error| NoCredentials(format!("{error:#}")))?;
    if let Some(token) = made.token {
        request.headers_mut().insert(AUTHORIZATION, token);
    }
    let (parts, body) = made.client.send(request).await?.into_parts();
    if parts.status == StatusCode::UNAUTHORIZED {
        // What a plugin said is no good any more, whatever it said of its end.
        state.lock().await.credential = None;
    }
    Ok(Response::from_parts(parts, Body::new(body)))
}

/// A client of this configuration, as far as it is no token.
fn make(mut config: kube::Config) -> anyhow::Result<Made> {
    let token = config.auth_info.token.take().map(|token| header(token.expose_secret())).transpose()?;
    Ok(Made { client: client(&config)?, token, fingerprint: fingerprint(&config) })
}

fn header(token: &str) -> anyhow::Result<HeaderValue> {
    let mut value = HeaderValue::try_from(format!("Bearer {token}")).context("the token has invalid characters")?;
    value.set_sensitive(true);
    Ok(value)
}

impl Renewing {
    /// What the next request is made with.
    async fn renew(&mut self) -> anyhow::Result<Made> {
        let renewed = self.renewed().await;
        match (renewed, &self.made) {
            (Ok(made), known) => {
                if known.as_ref().is_some_and(|known| known.fingerprint != made.fingerprint) {
                    info!("credentials for the API server have changed on disk: using the new ones");
                }
                self.problem = None;
                self.made = Some(made.clone());
                Ok(made)
            }
            (Err(error), None) => Err(error),
            (Err(error), Some(known)) => {
                let (known, problem) = (known.clone(), format!("{error:#}"));
                if self.problem.as_ref() != Some(&problem) {
                    warn!("cannot renew the credentials for the API server; keeping the old ones: {problem}");
                }
                self.problem = Some(problem);
                Ok(known)
            }
        }
    }

    async fn renewed(&mut self) -> anyhow::Result<Made> {
        let mut config = config(self.kubeconfig.as_deref(), self.master.as_deref()).await?;
        if let Some(exec) = config.auth_info.exec.take() {
            self.credential(&exec).await?.put_into(&mut config.auth_info);
        }
        let token = config.auth_info.token.take().map(|token| header(token.expose_secret())).transpose()?;
        match &self.made {
            Some(made) if made.fingerprint == fingerprint(&config) => Ok(Made { token, ..made.clone() }),
            _ => Ok(Made { token, ..make(config)? }),
        }
    }

    async fn credential(&mut self, plugin: &ExecConfig) -> anyhow::Result<Credential> {
        let asked = hash(|hasher| serde_json::to_string(plugin).unwrap_or_default().hash(hasher));
        if let Some((credential, of)) = &self.credential
            && *of == asked
            && credential.is_fresh()
        {
            return Ok(credential.clone());
        }
        let credential = exec::run(plugin).await?;
        self.credential = Some((credential.clone(), asked));
        Ok(credential)
    }
}

fn hash(feed: impl FnOnce(&mut foldhash::quality::FoldHasher<'_>)) -> u64 {
    let mut hasher = std::hash::BuildHasher::build_hasher(&FixedState::default());
    feed(&mut hasher);
    hasher.finish()
}

/// A hash of what the configuration says and of the files that it names, the token left out. A file that is not there
/// counts as empty.
fn fingerprint(config: &kube::Config) -> u64 {
    hash(|hasher| {
        config.cluster_url.hash(hasher);
        config.proxy_url.hash(hasher);
        config.root_cert.hash(hasher);
        config.tls_server_name.hash(hasher);
        let auth = &config.auth_info;
        (&auth.client_certificate_data, &auth.username).hash(hasher);
        for path in [&auth.client_certificate, &auth.client_key].into_iter().flatten() {
            path.hash(hasher);
            std::fs::read(path).unwrap_or_default().hash(hasher);
        }
        // Secrets hide themselves from Debug and Hash.
        if let Ok(text) = serde_json::to_string(auth) {
            text.hash(hasher);
        }
    })
}
