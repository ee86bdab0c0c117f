//! Credentials on disk that change while the source runs: tokens, certificates, and the authorities behind them.
#![cfg(feature = "lab")]

mod apiserver;
mod support;

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use kubelane::k8s::{self, Settings, SourceStatus};
use kubelane::model::{Change, Kind};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use apiserver::ApiServer;
use apiserver::seen::Seen;

/// Real time in which anything must have happened: a watch that failed is tried again within 30 s.
const PATIENCE: Duration = Duration::from_secs(60);

struct Source {
    seen: Seen,
    changes: mpsc::Receiver<Change>,
    server: ApiServer,
    directory: tempfile::TempDir,
}

impl Source {
    /// A source that reads its kubeconfig in a directory of its own.
    async fn start(server: &ApiServer, directory: tempfile::TempDir) -> Source {
        let client = k8s::renewing(Some(directory.path().join("kubeconfig")), None).await.unwrap();
        let (sender, changes) = mpsc::channel(16);
        let settings = Settings { node_name: "n1".into(), service_proxy_name: None };
        tokio::spawn(k8s::run(client, settings, sender, Arc::new(SourceStatus::default())));
        let mut source = Source { seen: Seen::default(), changes, server: server.clone(), directory };
        source.until("the lists", |seen| seen.lists(Kind::Services) > 0 && seen.lists(Kind::EndpointSlices) > 0).await;
        source
    }

    async fn until(&mut self, what: &str, done: impl Fn(&Seen) -> bool) {
        self.seen.until(&mut self.changes, PATIENCE, what, done).await;
    }

    /// Whether what happens on the server is heard.
    async fn follows(&mut self, name: &str) {
        self.server.upsert(json!({
            "kind": "Service", "apiVersion": "v1", "metadata": {"namespace": "test", "name": name},
            "spec": {"clusterIP": "10.96.77.7", "clusterIPs": ["10.96.77.7"], "ports": [{"port": 80}]},
        }));
        let name = format!("test/{name}");
        self.until(&name, |seen| seen.services.contains_key(&name)).await;
    }
}

fn kubeconfig(directory: &Path, at: SocketAddr, cluster: Value, user: Value) {
    let mut cluster = cluster;
    let scheme = if cluster["certificate-authority"].is_null() { "http" } else { "https" };
    cluster["server"] = json!(format!("{scheme}://{at}"));
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": cluster}], "users": [{"name": "u", "user": user}],
    });
    fs::write(directory.join("kubeconfig"), config.to_string()).unwrap();
}

/// Within a second or two: a server that rejects the token that it has just replaced is no trouble for minutes.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_was_renewed_on_disk_is_used_with_the_next_request() {
    let server = ApiServer::with_recorded_lists();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(server.serve(listener));
    let directory = tempfile::tempdir().unwrap();
    let token = directory.path().join("token");
    fs::write(&token, "one").unwrap();
    server.set_token("one");
    kubeconfig(directory.path(), at, json!({}), json!({"tokenFile": token}));
    let mut source = Source::start(&server, directory).await;
    source.follows("before").await;
    // It expires, and what is written first is no token at all.
    server.set_token("two");
    server.break_watches();
    fs::write(&token, "").unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    fs::write(&token, "two").unwrap();
    let began = std::time::Instant::now();
    source.follows("after").await;
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}

/// A new authority with certificates of the server at 127.0.0.1 and of a client, as `ca`, `server` and `client`.
fn make_certificates(directory: &Path) {
    let run = |arguments: String| {
        let output = Command::new("openssl").args(arguments.split(' ')).current_dir(directory).output().unwrap();
        assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    run(format!("req -x509 {key} -keyout ca.key -out ca.crt -days 2 -subj /CN=authority"));
    fs::write(directory.join("names"), "subjectAltName=IP:127.0.0.1\n").unwrap();
    for name in ["server", "client"] {
        run(format!("req {key} -keyout {name}.key -out {name}.csr -subj /CN={name}"));
        let signed = format!("-CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile names -out {name}.crt");
        run(format!("x509 -req -in {name}.csr {signed}"));
    }
}

fn acceptor(directory: &Path) -> TlsAcceptor {
    let read = |name: &str| CertificateDer::from_pem_file(directory.join(name)).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(read("ca.crt")).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build().unwrap();
    let key = PrivateKeyDer::from_pem_file(directory.join("server.key")).unwrap();
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_client_cert_verifier(clients).with_single_cert(vec![read("server.crt")], key).unwrap();
    TlsAcceptor::from(Arc::new(config))
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_and_their_authority_may_be_replaced_while_the_source_runs() {
    if !support::process::in_path("openssl") {
        return support::skip("needs the `openssl` command (Debian: apt-get install openssl; `make setup` does it)");
    }
    let server = ApiServer::with_recorded_lists();
    let directory = tempfile::tempdir().unwrap();
    make_certificates(directory.path());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let serving = tokio::spawn(server.serve_tls(listener, acceptor(directory.path())));
    let path = |name: &str| directory.path().join(name);
    let user = json!({"client-certificate": path("client.crt"), "client-key": path("client.key")});
    kubeconfig(directory.path(), at, json!({"certificate-authority": path("ca.crt")}), user);
    let mut source = Source::start(&server, directory).await;
    source.follows("before").await;
    // Another authority, and everything signed by it; the old server is gone with its connections.
    serving.abort();
    let _ = serving.await;
    make_certificates(source.directory.path());
    let listener = TcpListener::bind(at).await.unwrap();
    tokio::spawn(server.serve_tls(listener, acceptor(source.directory.path())));
    source.follows("after").await;
}
