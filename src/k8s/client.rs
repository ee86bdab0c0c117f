//! How to reach the API server: in a cluster, through a kubeconfig, or at a plain address.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use http::header::USER_AGENT;
use kube::config::{KubeConfigOptions, Kubeconfig};

/// A connection that is not up in this time is given up and tried again.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The configuration of the API client. `kubeconfig` names a file; `master` replaces the server's address, and alone
/// means a plain connection without credentials, as with kube-proxy. Without either, the Pod's service account is used.
///
/// # Errors
/// When the file, the address or the service account cannot be read; the message names it.
pub async fn config(kubeconfig: Option<&Path>, master: Option<&str>) -> anyhow::Result<kube::Config> {
    let master = master.filter(|m| !m.is_empty()).map(parse_master).transpose()?;
    let mut config = match (kubeconfig, &master) {
        (Some(path), _) => from_file(path).await?,
        (None, Some(url)) => kube::Config::new(url.clone()),
        (None, None) => kube::Config::incluster().context(
            "not running in a Pod with a service account: give --kubeconfig FILE, --master URL or --source dir:PATH",
        )?,
    };
    if let Some(url) = master {
        config.cluster_url = url;
    }
    let agent = concat!("kubelane/", env!("CARGO_PKG_VERSION"));
    config.headers.push((USER_AGENT, http::HeaderValue::from_static(agent)));
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    // The watch loop has its own backoff; a second one below it would only hide the server's answers.
    config.default_retry = false;
    Ok(config)
}

/// The client of `config`.
///
/// # Errors
/// When certificates or credentials of the configuration cannot be used.
pub fn client(config: kube::Config) -> anyhow::Result<kube::Client> {
    let server = config.cluster_url.clone();
    kube::Client::try_from(config).with_context(|| format!("API client for {server}"))
}

async fn from_file(path: &Path) -> anyhow::Result<kube::Config> {
    let context = || format!("the kubeconfig {} cannot be used", path.display());
    let file = Kubeconfig::read_from(path).with_context(context)?;
    kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.with_context(context)
}

fn parse_master(master: &str) -> anyhow::Result<http::Uri> {
    let text = if master.contains("://") { master.to_owned() } else { format!("http://{master}") };
    let url: http::Uri = text.parse().with_context(|| format!("--master {master}: not a URL"))?;
    anyhow::ensure!(url.host().is_some(), "--master {master}: the URL has no host");
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KUBECONFIG: &str = "apiVersion: v1
kind: Config
current-context: c
contexts: [{name: c, context: {cluster: k, user: u}}]
clusters: [{name: k, cluster: {server: 'https://192.0.2.1:6443'}}]
users: [{name: u, user: {token: secret}}]
";

    #[tokio::test]
    async fn a_kubeconfig_names_the_server_and_master_overrides_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), KUBECONFIG).unwrap();
        let plain = config(Some(file.path()), None).await.unwrap();
        assert_eq!(plain.cluster_url.to_string(), "https://192.0.2.1:6443/");
        assert!(
            plain.headers.iter().any(|(name, value)| name == USER_AGENT && value.as_bytes().starts_with(b"kubelane/"))
        );
        let other = config(Some(file.path()), Some("https://198.51.100.1:443")).await.unwrap();
        assert_eq!(other.cluster_url.host(), Some("198.51.100.1"));
        client(other).expect("a TLS client with ring");
    }

    #[tokio::test]
    async fn master_alone_is_a_plain_address() {
        let config = config(None, Some("127.0.0.1:8080")).await.unwrap();
        assert_eq!(config.cluster_url.to_string(), "http://127.0.0.1:8080/");
    }

    #[tokio::test]
    async fn what_cannot_be_read_is_named() {
        let missing = config(Some(Path::new("/nonexistent/kubeconfig")), None).await.unwrap_err();
        assert!(format!("{missing:#}").contains("/nonexistent/kubeconfig"), "{missing:#}");
        for bad in ["http://", "http://a b", "://"] {
            let error = config(None, Some(bad)).await.unwrap_err();
            assert!(format!("{error:#}").contains("--master"), "{bad}: {error:#}");
        }
    }
}
