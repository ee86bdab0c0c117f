//! Authorities, keys and certificates, made by openssl, and servers that show them.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{WantsServerCert, WebPkiClientVerifier};
use tokio_rustls::rustls::{ConfigBuilder, RootCertStore, ServerConfig};

pub const P256: &str = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";

pub fn openssl(directory: &Path, arguments: &str) {
    let output = Command::new("openssl").args(arguments.split(' ')).current_dir(directory).output().unwrap();
    assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A new authority with certificates of the server at 127.0.0.1 and of a client, as `ca`, `server` and `client`.
pub fn make_certificates(directory: &Path) {
    make_with(directory, P256, 2);
}

/// As [`make_certificates`], with keys of this sort, and a server's certificate that is valid for so many days.
pub fn make_with(directory: &Path, key: &str, days: i32) {
    let run = |arguments: String| openssl(directory, &arguments);
    run(format!("req -x509 {key} -keyout ca.key -out ca.crt -days 2 -subj /CN=authority"));
    fs::write(directory.join("names"), "subjectAltName=IP:127.0.0.1\n").unwrap();
    for name in ["server", "client"] {
        run(format!("req {key} -keyout {name}.key -out {name}.csr -subj /CN={name}"));
        let signed = format!("-CA ca.crt -CAkey ca.key -CAcreateserial -days {days} -extfile names -out {name}.crt");
        run(format!("x509 -req -in {name}.csr {signed}"));
    }
}

/// For clients with a certificate of the authority.
pub fn acceptor(directory: &Path) -> TlsAcceptor {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(directory.join("ca.crt")).unwrap()).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::aws_lc_rs::default_provider());
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build().unwrap();
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    serving(config.with_client_cert_verifier(clients), directory)
}

/// For clients without a certificate.
pub fn open_acceptor(directory: &Path) -> TlsAcceptor {
    let provider = Arc::new(tokio_rustls::rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    serving(config.with_no_client_auth(), directory)
}

fn serving(config: ConfigBuilder<ServerConfig, WantsServerCert>, directory: &Path) -> TlsAcceptor {
    let certificate = CertificateDer::from_pem_file(directory.join("server.crt")).unwrap();
    let key = PrivateKeyDer::from_pem_file(directory.join("server.key")).unwrap();
    let mut config = config.with_single_cert(vec![certificate], key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    TlsAcceptor::from(Arc::new(config))
}
