//! How to reach the API server: in a cluster, through a kubeconfig, or at a plain address.

use std::path::Path;

use anyhow::Context;
use http::header::USER_AGENT;
use kube::config::{KubeConfigOptions, Kubeconfig};

use super::proxy::proxy;

/// The configuration of the API client. `kubeconfig` names a file; `master` replaces the server's address, and alone
/// means a plain connection without credentials, as with kube-proxy. Without either, the Pod's service account is used.
///
/// # Errors
/// When the file, the address or the service account cannot be read; the message names it.
pub async fn config(kubeconfig: Option<&Path>, master: Option<&str>) -> anyhow::Result<kube::Config> {
    let master = master.filter(|m| !m.is_empty()).map(parse_master).transpose()?;
    let (mut config, proxy_url) = match (kubeconfig, &master) {
        (Some(path), _) => from_file(path).await?,
        (None, Some(url)) => (kube::Config::new(url.clone()), None),
        (None, None) => {
            let config = kube::Config::incluster().context(
                "not running in a Pod with a service account: give --kubeconfig FILE, --master URL or --source dir:PATH",
            )?;
            (config, None)
        }
    };
    if let Some(url) = master {
        config.cluster_url = url;
    }
    let agent = concat!("kubelane/", env!("CARGO_PKG_VERSION"));
    config.headers.push((USER_AGENT, http::HeaderValue::from_static(agent)));
    config.proxy_url = proxy(&config.cluster_url, proxy_url.as_deref(), |name| std::env::var(name).ok())?;
    read_token(&mut config)?;
    Ok(config)
}

/// Reads the token's file, which counts for more than a token beside it, as client-go does: without the newline at its
/// end, which kube keeps.
fn read_token(config: &mut kube::Config) -> anyhow::Result<()> {
    let Some(path) = config.auth_info.token_file.take().filter(|path| !path.is_empty()) else { return Ok(()) };
    let token = std::fs::read_to_string(&path).with_context(|| format!("tokenFile {path}"))?;
    anyhow::ensure!(!token.trim().is_empty(), "tokenFile {path}: it is empty");
    config.auth_info.token = Some(token.trim().to_owned().into());
    Ok(())
}

/// With the proxy that the current context's cluster has: kube would hold it against NO_PROXY.
async fn from_file(path: &Path) -> anyhow::Result<(kube::Config, Option<String>)> {
    let context = || format!("the kubeconfig {} cannot be used", path.display());
    let mut file = Kubeconfig::read_from(path).with_context(context)?;
    let current = file.current_context.as_deref();
    let named = file.contexts.iter().find(|named| Some(named.name.as_str()) == current);
    let name = named.and_then(|named| named.context.as_ref()).map(|context| context.cluster.clone());
    let cluster = file.clusters.iter_mut().find(|named| Some(&named.name) == name.as_ref());
    let proxy_url = cluster.and_then(|named| named.cluster.as_mut()).and_then(|cluster| cluster.proxy_url.take());
    let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
    Ok((config.with_context(context)?, proxy_url))
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
        crate::k8s::client(&other).expect("a TLS client");
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
