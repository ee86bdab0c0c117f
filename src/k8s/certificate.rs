//! Whether the API server's certificate is trusted, as Go's clients judge it, and why not in words: which certificate it is,
//! and what is wrong with it.

use std::fmt;
use std::sync::Arc;

use anyhow::Context as _;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, Error, OtherError, RootCertStore, SignatureScheme};
use x509_parser::prelude::{ASN1Time, FromDer as _, GeneralName, X509Certificate};

/// What was wrong with a certificate, for people.
#[derive(Debug)]
pub struct BadCertificate(String);

impl fmt::Display for BadCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadCertificate {}

/// Trusts what is signed by one of the roots, and each of them as a server's own certificate: k3s' users and others make
/// one that is its own authority, which webpki refuses as an end entity.
#[derive(Debug)]
struct Verifier {
    roots: Vec<CertificateDer<'static>>,
    inner: Arc<dyn ServerCertVerifier>,
}

/// A verifier that trusts `roots` (DER), or without any the authorities of this machine.
///
/// # Errors
/// When a root is no certificate, or the machine has no authorities.
pub fn verifier(
    roots: Option<&[Vec<u8>]>,
    provider: &Arc<CryptoProvider>,
) -> anyhow::Result<Arc<dyn ServerCertVerifier>> {
    let Some(roots) = roots else {
        let verifier = rustls_platform_verifier::Verifier::new(Arc::clone(provider));
        let inner = Arc::new(verifier.context("this machine's certificate authorities")?);
        return Ok(Arc::new(Verifier { roots: Vec::new(), inner }));
    };
    let roots: Vec<CertificateDer<'static>> = roots.iter().cloned().map(CertificateDer::from).collect();
    let mut store = RootCertStore::empty();
    for root in &roots {
        store.add(root.clone()).with_context(|| format!("certificate-authority: {}", describe(root)))?;
    }
    let builder = WebPkiServerVerifier::builder_with_provider(Arc::new(store), Arc::clone(provider));
    let inner = builder.build().context("certificate-authority")?;
    Ok(Arc::new(Verifier { roots, inner }))
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let judged = self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        let Err(Error::InvalidCertificate(error)) = judged else { return judged };
        let error = match self.roots.contains(end_entity) {
            true => match judge_root(end_entity, server_name, now) {
                Ok(()) => return Ok(ServerCertVerified::assertion()),
                Err(error) => error,
            },
            false => error,
        };
        let text = format!("{} {}", describe(end_entity), reason(&error, end_entity));
        Err(Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(BadCertificate(text))))))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// A server's certificate that is one of the roots: name, time and purpose still count.
fn judge_root(root: &CertificateDer<'_>, name: &ServerName<'_>, now: UnixTime) -> Result<(), CertificateError> {
    let (_, parsed) = X509Certificate::from_der(root).map_err(|_| CertificateError::BadEncoding)?;
    let now = i64::try_from(now.as_secs()).ok().and_then(|now| ASN1Time::from_timestamp(now).ok());
    let now = now.ok_or(CertificateError::BadEncoding)?;
    if now > parsed.validity().not_after {
        return Err(CertificateError::Expired);
    }
    if now < parsed.validity().not_before {
        return Err(CertificateError::NotValidYet);
    }
    if let Ok(Some(usage)) = parsed.extended_key_usage()
        && !usage.value.any
        && !usage.value.server_auth
    {
        return Err(CertificateError::InvalidPurpose);
    }
    let entity = ParsedCertificate::try_from(root).map_err(|_| CertificateError::BadEncoding)?;
    verify_server_name(&entity, name).map_err(|error| match error {
        Error::InvalidCertificate(error) => error,
        _ => CertificateError::NotValidForName,
    })
}

/// "the certificate of CN=x, issued by CN=y,".
fn describe(certificate: &CertificateDer<'_>) -> String {
    match X509Certificate::from_der(certificate) {
        Ok((_, parsed)) => format!("the certificate of \"{}\", issued by \"{}\",", parsed.subject(), parsed.issuer()),
        Err(_) => "something that is not a certificate".to_owned(),
    }
}

fn reason(error: &CertificateError, certificate: &CertificateDer<'_>) -> String {
    use CertificateError::{
        Expired, ExpiredContext, InvalidPurpose, NotValidForName, NotValidForNameContext, NotValidYet,
        NotValidYetContext, UnknownIssuer,
    };
    let parsed = X509Certificate::from_der(certificate).ok().map(|(_, parsed)| parsed);
    let validity = parsed.as_ref().map(|parsed| parsed.validity());
    let names = || parsed.as_ref().map(names).unwrap_or_default();
    match error {
        Expired | ExpiredContext { .. } => {
            format!("was valid until {}", validity.map(|v| v.not_after.to_string()).unwrap_or_default())
        }
        NotValidYet | NotValidYetContext { .. } => {
            format!("is valid from {} on", validity.map(|v| v.not_before.to_string()).unwrap_or_default())
        }
        NotValidForNameContext { expected, .. } => {
            format!("is not for {}, but for {}", expected.to_str(), names())
        }
        NotValidForName => format!("is not for this server, but for {}", names()),
        UnknownIssuer => "is not signed by an authority that is trusted here".to_owned(),
        InvalidPurpose => "is not for servers".to_owned(),
        other => format!("cannot be used: {other}"),
    }
}

/// The subject alternative names.
fn names(certificate: &X509Certificate<'_>) -> String {
    let alternatives = certificate.subject_alternative_name().ok().flatten();
    let names: Vec<String> = alternatives.map_or_else(Vec::new, |alternatives| {
        let name = |name: &GeneralName<'_>| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            GeneralName::IPAddress(bytes) => address(bytes),
            _ => None,
        };
        alternatives.value.general_names.iter().filter_map(name).collect()
    });
    if names.is_empty() { "nobody (it has no subject alternative names)".to_owned() } else { names.join(", ") }
}

fn address(bytes: &[u8]) -> Option<String> {
    let v4 = <[u8; 4]>::try_from(bytes).map(std::net::IpAddr::from);
    let v6 = <[u8; 16]>::try_from(bytes).map(std::net::IpAddr::from);
    v4.or(v6).ok().map(|ip| ip.to_string())
}
