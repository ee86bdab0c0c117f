//! The connection to the API server: one, with HTTP/2 over TLS, for everything; through a proxy where the kubeconfig or the
//! environment names one. kube's own connector knows HTTP/1 only, which makes four connections of a daemon.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use data_encoding::BASE64;
use http::Uri;
use hyper_rustls::{FixedServerNameResolver, HttpsConnector, HttpsConnectorBuilder};
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::Builder;
use hyper_util::client::legacy::connect::proxy::{SocksV5, Tunnel};
use hyper_util::client::legacy::connect::{Connection, HttpConnector};
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::client::{Body, ConfigExt as _};
use kube::config::AuthInfo;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tower::{BoxError, Service, ServiceBuilder};
use tower_http::decompression::DecompressionLayer;

use super::certificate::verifier;
use super::first::FirstAlone;
use super::insecure::TrustsAnyone;

/// A connection that is not up in this time is given up and tried again.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// As client-go: a connection that was silent for so long is asked whether it lives, and has this long to answer.
const PING_AFTER: Duration = Duration::from_secs(30);
const PING_ANSWER: Duration = Duration::from_secs(15);
/// Of all streams of a connection: more than all of them may use, so that no slow reader stops another.
const CONNECTION_WINDOW: u32 = 16 << 20;

/// The client of `config`.
///
/// # Errors
/// When certificates, credentials or the proxy of the configuration cannot be used.
pub fn client(config: &kube::Config) -> anyhow::Result<kube::Client> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_keepalive(Some(PING_AFTER));
    let Some(proxy) = &config.proxy_url else { return build(config, tcp) };
    let name = || format!("the proxy {}://{}", proxy.scheme_str().unwrap_or("http"), proxy.host().unwrap_or_default());
    // This takes user and password out of the URL.
    let matcher = Matcher::builder().all(proxy.to_string()).build();
    let taken = matcher.intercept(&config.cluster_url).with_context(name)?;
    let at = taken.uri().clone();
    match at.scheme_str() {
        Some("http") => build(config, with_auth(Tunnel::new(at, tcp), taken.basic_auth())),
        Some("https") => {
            let https = HttpsConnectorBuilder::new().with_tls_config(tls(config)?).https_only();
            let https = https.enable_http1().wrap_connector(tcp);
            build(config, with_auth(Tunnel::new(at, https), taken.basic_auth()))
        }
        Some("socks5" | "socks5h") => {
            let socks = SocksV5::new(at, tcp);
            match taken.raw_auth() {
                Some((user, password)) => build(config, socks.with_auth(user.to_owned(), password.to_owned())),
                None => build(config, socks),
            }
        }
        _ => bail!("{}: expected http, https or socks5", name()),
    }
}

fn with_auth<C>(tunnel: Tunnel<C>, auth: Option<&http::HeaderValue>) -> Tunnel<C> {
    match auth {
        Some(auth) => tunnel.with_auth(auth.clone()),
        None => tunnel,
    }
}

/// The client whose connections `connector` makes. Bodies of answers are decompressed, which servers only compress when
/// they are long.
fn build<C>(config: &kube::Config, connector: C) -> anyhow::Result<kube::Client>
where
    C: Service<Uri> + Clone + Send + Sync + 'static,
    C::Response: Connection + hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
    C::Future: Send + 'static,
    C::Error: Into<BoxError>,
{
    let mut timed = TimeoutConnector::new(https(config, connector)?);
    timed.set_connect_timeout(Some(CONNECT_TIMEOUT));
    let http = Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        .http2_keep_alive_interval(PING_AFTER)
        .http2_keep_alive_timeout(PING_ANSWER)
        .http2_initial_connection_window_size(CONNECTION_WINDOW)
        .build::<_, Body>(timed);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .layer(DecompressionLayer::new().gzip(!config.disable_compression))
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(FirstAlone::new(http));
    Ok(kube::Client::new(service, config.default_namespace.clone()))
}

fn https<C>(config: &kube::Config, connector: C) -> anyhow::Result<HttpsConnector<C>> {
    let mut builder = HttpsConnectorBuilder::new().with_tls_config(tls(config)?).https_or_http();
    if let Some(name) = &config.tls_server_name {
        let name = name.clone().try_into().with_context(|| format!("tls-server-name: {name}"))?;
        builder = builder.with_server_name_resolver(FixedServerNameResolver::new(name));
    }
    Ok(builder.enable_http1().enable_http2().wrap_connector(connector))
}

fn tls(config: &kube::Config) -> anyhow::Result<rustls::ClientConfig> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier: Arc<dyn ServerCertVerifier> = match config.accept_invalid_certs {
        true => Arc::new(TrustsAnyone::new(&provider)),
        // Without TLS nobody is asked, and a machine without authorities does not matter.
        false if config.cluster_url.scheme_str() == Some("http") => Arc::new(TrustsAnyone::new(&provider)),
        false => verifier(config.root_cert.as_deref(), &provider)?,
    };
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    match identity(&config.auth_info)? {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).context("client-certificate and client-key"),
        None => Ok(builder.with_no_client_auth()),
    }
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// The client's certificates and key.
fn identity(auth: &AuthInfo) -> anyhow::Result<Option<Identity>> {
    use secrecy::ExposeSecret as _;
    let key_data = auth.client_key_data.as_ref().map(|data| data.expose_secret());
    let certificate =
        pem("client-certificate", auth.client_certificate_data.as_deref(), auth.client_certificate.as_deref())?;
    let key = pem("client-key", key_data, auth.client_key.as_deref())?;
    let (Some(certificate), Some(key)) = (certificate, key) else { return Ok(None) };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&certificate).collect();
    let chain = chain.context("client-certificate")?;
    anyhow::ensure!(!chain.is_empty(), "client-certificate: there is no certificate in it");
    Ok(Some((chain, PrivateKeyDer::from_pem_slice(&key).context("client-key")?)))
}

/// What stands in the kubeconfig, or else in the file that it names.
fn pem(name: &str, data: Option<&str>, file: Option<&str>) -> anyhow::Result<Option<Vec<u8>>> {
    match (data.filter(|data| !data.is_empty()), file.filter(|file| !file.is_empty())) {
        (Some(data), _) => {
            let text: Vec<u8> = data.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
            Ok(Some(BASE64.decode(&text).with_context(|| format!("{name}-data is not in base64"))?))
        }
        (None, Some(file)) => Ok(Some(fs::read(file).with_context(|| format!("{name} {file}"))?)),
        (None, None) => Ok(None),
    }
}
