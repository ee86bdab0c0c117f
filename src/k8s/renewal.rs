//! Credentials that change on disk: tokens are renewed every hour, certificates and their authorities once in a while.
//! kube reads most of them once, when a client is made. Here each request looks at the files first and makes a new client
//! when one of them has changed. Requests are rare (a watch lasts for minutes), so that this costs nothing.

use std::hash::{Hash as _, Hasher as _};
use std::path::PathBuf;
use std::sync::Arc;

use axum::body::Body;
use foldhash::quality::FixedState;
use http::{Request, Response};
use kube::client::Body as KubeBody;
use tokio::sync::Mutex;
use tracing::{info, warn};

use super::client::{client, config};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Where credentials come from, and the client that was made of them.
struct Renewing {
    kubeconfig: Option<PathBuf>,
    master: Option<String>,
    client: kube::Client,
    /// Of all that the client was made of.
    fingerprint: u64,
    /// The last problem with the files, which was told.
    problem: Option<String>,
}

/// A client whose requests are made with what [`config`] finds at that time. Files that cannot be used (a half written
/// one, say) change nothing.
///
/// # Errors
/// When the configuration cannot be used now.
pub async fn renewing(kubeconfig: Option<PathBuf>, master: Option<String>) -> anyhow::Result<kube::Client> {
    let config = config(kubeconfig.as_deref(), master.as_deref()).await?;
    let fingerprint = fingerprint(&config);
    let state = Renewing { kubeconfig, master, client: client(config)?, fingerprint, problem: None };
    let state = Arc::new(Mutex::new(state));
    let service = tower::service_fn(move |request: Request<KubeBody>| {
        let state = state.clone();
        async move {
            let client = {
                let mut state = state.lock().await;
                state.renew().await;
                state.client.clone()
            };
            let (parts, body) = client.send(request).await?.into_parts();
            Ok::<Response<Body>, BoxError>(Response::from_parts(parts, Body::new(body)))
        }
    });
    Ok(kube::Client::new(service, "default"))
}

impl Renewing {
    async fn renew(&mut self) {
        match self.renewed().await {
            Ok(false) => self.problem = None,
            Ok(true) => {
                self.problem = None;
                info!("credentials for the API server have changed on disk: the new ones are used");
            }
            Err(error) => {
                let problem = format!("{error:#}");
                if self.problem.as_ref() != Some(&problem) {
                    warn!(
                        "credentials for the API server have changed, and cannot be used; the old ones stay: {problem}"
                    );
                }
                self.problem = Some(problem);
            }
        }
    }

    async fn renewed(&mut self) -> anyhow::Result<bool> {
        let config = config(self.kubeconfig.as_deref(), self.master.as_deref()).await?;
        let fingerprint = fingerprint(&config);
        if fingerprint == self.fingerprint {
            return Ok(false);
        }
        self.client = client(config)?;
        self.fingerprint = fingerprint;
        Ok(true)
    }
}

/// A hash of what the configuration says and of the files that it names. A file that is not there counts as empty.
fn fingerprint(config: &kube::Config) -> u64 {
    let mut hasher = std::hash::BuildHasher::build_hasher(&FixedState::default());
    config.cluster_url.hash(&mut hasher);
    config.root_cert.hash(&mut hasher);
    config.tls_server_name.hash(&mut hasher);
    let auth = &config.auth_info;
    (&auth.client_certificate_data, &auth.username).hash(&mut hasher);
    for path in [&auth.client_certificate, &auth.client_key, &auth.token_file].into_iter().flatten() {
        path.hash(&mut hasher);
        std::fs::read(path).unwrap_or_default().hash(&mut hasher);
    }
    // Secrets hide themselves from Debug and Hash.
    if let Ok(text) = serde_json::to_string(auth) {
        text.hash(&mut hasher);
    }
    hasher.finish()
}
