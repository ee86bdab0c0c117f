//! Ways to an API server: credentials on disk that change while the source runs, keys and certificates as clusters have
//! them, plugins that hang, proxies.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kubelane::k8s;
use kubelane::model::{Change, Kind};
use kubelane::objects::{Settings, SourceStatus};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use crate::laboratory::apiserver::ApiServer;
use crate::laboratory::apiserver::seen::Seen;
use crate::laboratory::pki::{P256, acceptor, make_certificates, make_with, open_acceptor, openssl};
use crate::laboratory::{process, skip};

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

fn has_openssl() -> bool {
    let has = process::in_path("openssl");
    if !has {
        skip("needs the `openssl` command (Debian: apt-get install openssl; `make setup` does it)");
    }
    has
}

/// A server with these certificates, and the address where it listens.
async fn serve_tls(server: &ApiServer, directory: &Path) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(server.serve_tls(listener, open_acceptor(directory)));
    at
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_and_their_authority_may_be_replaced_while_the_source_runs() {
    if !has_openssl() {
        return;
    }
    let server = ApiServer::with_recorded_lists();
    let directory = tempfile::tempdir().unwrap();
    make_certificates(directory.path());
    // One socket for both servers: its address cannot be bound again while a process that another test forks still has
    // a copy of it.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let at = listener.local_addr().unwrap();
    let before = TcpListener::from_std(listener.try_clone().unwrap()).unwrap();
    let serving = tokio::spawn(server.serve_tls(before, acceptor(directory.path())));
    let path = |name: &str| directory.path().join(name);
    let user = json!({"client-certificate": path("client.crt"), "client-key": path("client.key")});
    kubeconfig(directory.path(), at, json!({"certificate-authority": path("ca.crt")}), user);
    let mut source = Source::start(&server, directory).await;
    source.follows("before").await;
    // Another authority, and everything signed by it; the old server is gone with its connections.
    serving.abort();
    let _ = serving.await;
    make_certificates(source.directory.path());
    let after = TcpListener::from_std(listener).unwrap();
    tokio::spawn(server.serve_tls(after, acceptor(source.directory.path())));
    source.follows("after").await;
}

/// What kubeadm, k3s, RKE2, kops and Talos make are keys on P-256 and RSA keys; hardened clusters have P-384 and P-521.
#[tokio::test(flavor = "multi_thread")]
async fn keys_of_every_sort_that_clusters_have_are_taken() {
    if !has_openssl() {
        return;
    }
    let curve = |name: &str| format!("-newkey ec -pkeyopt ec_paramgen_curve:{name} -nodes");
    for key in [
        curve("P-256"),
        curve("P-384"),
        curve("P-521"),
        "-newkey rsa:2048 -nodes".into(),
        "-newkey ed25519 -nodes".into(),
    ] {
        let server = ApiServer::with_recorded_lists();
        let directory = tempfile::tempdir().unwrap();
        make_with(directory.path(), &key, 2);
        let at = serve_tls(&server, directory.path()).await;
        let authority = json!({"certificate-authority": directory.path().join("ca.crt")});
        kubeconfig(directory.path(), at, authority, json!({}));
        Source::start(&server, directory).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_its_own_authority_is_trusted_where_it_is_named() {
    if !has_openssl() {
        return;
    }
    for is_authority in ["TRUE", "FALSE"] {
        let server = ApiServer::with_recorded_lists();
        let directory = tempfile::tempdir().unwrap();
        let extensions =
            format!("-addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:{is_authority}");
        let made = format!("req -x509 {P256} -keyout server.key -out server.crt -days 2 -subj /CN=self {extensions}");
        openssl(directory.path(), &made);
        let at = serve_tls(&server, directory.path()).await;
        let authority = json!({"certificate-authority": directory.path().join("server.crt")});
        kubeconfig(directory.path(), at, authority, json!({}));
        Source::start(&server, directory).await;
    }
}

/// The error that the source tells of first.
async fn trouble(directory: &Path) -> String {
    let client = k8s::renewing(Some(directory.join("kubeconfig")), None).await.unwrap();
    let (sender, _changes) = mpsc::channel(16);
    let settings = Settings { node_name: "n1".into(), service_proxy_name: None };
    let status = Arc::new(SourceStatus::default());
    tokio::spawn(k8s::run(client, settings, sender, status.clone()));
    let told = async {
        loop {
            if let Some(error) = status.services.last_error() {
                return error;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, told).await.expect("an error")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_is_not_trusted_is_named_with_the_reason() {
    if !has_openssl() {
        return;
    }
    let server = ApiServer::with_recorded_lists();
    let directory = tempfile::tempdir().unwrap();
    let own = |name: &str, subject: &str| {
        format!("req -x509 {P256} -keyout {name}.key -out {name}.crt -days 2 -subj /CN={subject}")
    };
    openssl(directory.path(), &own("stranger", "stranger"));
    make_certificates(directory.path());
    let stranger = json!({"certificate-authority": directory.path().join("stranger.crt")});
    let authority = json!({"certificate-authority": directory.path().join("ca.crt")});
    let at = serve_tls(&server, directory.path()).await;
    kubeconfig(directory.path(), at, stranger, json!({}));
    let told = trouble(directory.path()).await;
    let expected = "the API server's certificate is not trusted: the certificate of \"CN=server\", issued by \"CN=authority\", is not signed by an authority that is trusted here";
    assert_eq!(told, expected);
    let mut other_name = authority.clone();
    other_name["tls-server-name"] = json!("api.example");
    kubeconfig(directory.path(), at, other_name, json!({}));
    let told = trouble(directory.path()).await;
    assert!(told.contains("is not for api.example, but for 127.0.0.1"), "{told}");

    make_with(directory.path(), P256, -1);
    let at = serve_tls(&server, directory.path()).await;
    kubeconfig(directory.path(), at, authority, json!({}));
    let told = trouble(directory.path()).await;
    assert!(told.contains("was valid until"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_file_may_end_in_a_newline() {
    let server = ApiServer::with_recorded_lists();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(server.serve(listener));
    let directory = tempfile::tempdir().unwrap();
    let token = directory.path().join("token");
    fs::write(&token, "one\n").unwrap();
    server.set_token("one");
    kubeconfig(directory.path(), at, json!({}), json!({"tokenFile": token}));
    Source::start(&server, directory).await;
}

/// Three watches, and lists that are longer than the server sends uncompressed.
#[tokio::test(flavor = "multi_thread")]
async fn one_connection_carries_everything_and_long_lists_are_compressed() {
    if !has_openssl() {
        return;
    }
    let server = ApiServer::with_recorded_lists();
    server.refuse_streaming();
    for n in 0..1000 {
        let spec = json!({"clusterIP": "10.96.7.7", "clusterIPs": ["10.96.7.7"], "ports": [{"port": 80}]});
        server.upsert(json!({"kind": "Service", "apiVersion": "v1", "metadata": {"namespace": "test", "name": format!("s{n}")}, "spec": spec}));
    }
    let directory = tempfile::tempdir().unwrap();
    make_certificates(directory.path());
    let at = serve_tls(&server, directory.path()).await;
    let authority = json!({"certificate-authority": directory.path().join("ca.crt")});
    let token = directory.path().join("token");
    fs::write(&token, "one").unwrap();
    kubeconfig(directory.path(), at, authority, json!({"tokenFile": token}));
    let mut source = Source::start(&server, directory).await;
    source.follows("before").await;
    assert_eq!(server.traffic(), (1, 1), "connections, compressed lists");
    // A token that is renewed makes no new connection.
    fs::write(&token, "two").unwrap();
    server.set_token("two");
    server.break_watches();
    source.follows("after").await;
    assert_eq!(server.traffic().0, 1);
}

/// A proxy for CONNECT, and the targets that it was asked for.
async fn connect_proxy() -> (SocketAddr, Arc<std::sync::Mutex<Vec<String>>>) {
    use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (at, asked) = (listener.local_addr().unwrap(), Arc::<std::sync::Mutex<Vec<String>>>::default());
    let seen = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let seen = Arc::clone(&seen);
            tokio::spawn(async move {
                let mut socket = BufReader::new(socket);
                let mut head = String::new();
                while !head.ends_with("\r\n\r\n") {
                    socket.read_line(&mut head).await.unwrap();
                }
                let target = head.split(' ').nth(1).unwrap().to_owned();
                seen.lock().unwrap().push(head.lines().next().unwrap().to_owned());
                let mut server = tokio::net::TcpStream::connect(target).await.unwrap();
                socket.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut socket, &mut server).await;
            });
        }
    });
    (at, asked)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_the_kubeconfig_names_leads_to_the_server() {
    if !has_openssl() {
        return;
    }
    let server = ApiServer::with_recorded_lists();
    let directory = tempfile::tempdir().unwrap();
    make_certificates(directory.path());
    let at = serve_tls(&server, directory.path()).await;
    let (proxy, asked) = connect_proxy().await;
    let cluster =
        json!({"certificate-authority": directory.path().join("ca.crt"), "proxy-url": format!("http://{proxy}")});
    kubeconfig(directory.path(), at, cluster, json!({}));
    Source::start(&server, directory).await;
    let asked = asked.lock().unwrap();
    assert!(!asked.is_empty() && asked.iter().all(|line| *line == format!("CONNECT {at} HTTP/1.1")), "{asked:?}");
}

#[tokio::test]
async fn a_plugin_that_hangs_keeps_nothing_else_waiting_and_one_that_fails_is_told_of() {
    let directory = tempfile::tempdir().unwrap();
    let server = ApiServer::with_recorded_lists();
    server.set_token("from-a-plugin");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(server.serve(listener));
    let plugin = |script: &str| {
        let args = ["-c", script];
        json!({"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "/bin/sh", "args": args, "interactiveMode": "Never"}})
    };
    kubeconfig(directory.path(), at, json!({}), plugin("exec sleep 1000"));
    let began = std::time::Instant::now();
    let client = k8s::renewing(Some(directory.path().join("kubeconfig")), None).await.unwrap();
    let asked = tokio::spawn(async move { client.apiserver_version().await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(began.elapsed() < Duration::from_secs(5) && !asked.is_finished(), "this thread is not the plugin's");
    asked.abort();

    kubeconfig(directory.path(), at, json!({}), plugin("echo no ticket >&2; exit 3"));
    let told = trouble(directory.path()).await;
    assert!(told.contains("failed (exit status: 3): no ticket"), "{told}");

    let credential = r#"{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"from-a-plugin"}}"#;
    kubeconfig(directory.path(), at, json!({}), plugin(&format!("printf '%s' '{credential}'")));
    Source::start(&server, directory).await;
}
