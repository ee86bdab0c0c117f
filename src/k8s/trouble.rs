//! What an error of the API server means to the person who has to mend it.

use kube::core::Status;
use kube::runtime::watcher::Error;

use super::renewal::NoCredentials;
use crate::chain::chain;

/// An error, explained.
pub struct Trouble {
    /// Stable while the trouble is the same: told once.
    pub what: String,
    /// What the server said, or the error in full.
    pub detail: String,
    pub remedy: &'static str,
}

/// The server understood the request for a streaming list and will not have it (feature gate off, or too old).
pub fn refuses_streaming(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if matches!(status.code, 400 | 422))
}

/// What came after the version is no longer known.
pub fn is_expired(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 410)
}

/// The server's cache has not come to the version: it is behind, or versions began anew.
pub fn is_too_new(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if says_too_new(status))
}

/// As [`is_too_new`]: servers before 1.19 say so in their message only.
pub fn says_too_new(status: &Status) -> bool {
    let causes = status.details.as_ref().map_or(&[][..], |details| &details.causes);
    causes.iter().any(|cause| cause.reason == "ResourceVersionTooLarge")
        || status.message.contains("Too large resource version")
}

/// What a server says in the seconds after its start, before it knows its roles: no trouble unless it lasts.
pub fn is_forbidden(error: &Error) -> bool {
    code(error) == Some(403)
}

pub fn explain(error: &Error) -> Trouble {
    if let Some(trouble) = of_tls(error).or_else(|| of_credentials(error)) {
        return trouble;
    }
    let code = code(error);
    let (what, remedy) = match code {
        Some(401) => (
            "the API server rejects the credentials (401 Unauthorized)",
            "check the service account token or the kubeconfig's credentials",
        ),
        Some(403) => (
            "the API server forbids the watch (403 Forbidden)",
            "apply manifests/base/rbac.yaml: kubelane must list and watch services, endpointslices.discovery.k8s.io and nodes",
        ),
        Some(404) => (
            "the API server does not have this resource (404 Not Found)",
            "check the server's address; discovery.k8s.io/v1 needs Kubernetes 1.21",
        ),
        Some(400 | 422) => (
            "the API server refuses the request (400 Bad Request)",
            "the server is too old or is not a Kubernetes API server",
        ),
        Some(429) => ("the API server is overloaded (429 Too Many Requests)", "kubelane sends fewer requests"),
        Some(500..) => ("the API server fails (5xx)", "check its logs, and etcd"),
        _ => transport(error),
    };
    Trouble { what: what.to_owned(), detail: detail(error), remedy }
}

/// What TLS found wrong: a certificate, ours or the server's, and not the network.
fn of_tls(error: &Error) -> Option<Trouble> {
    let trouble = |what: &str, why: String, remedy| {
        Some(Trouble { what: format!("{what}: {why}"), detail: chain(error), remedy })
    };
    match cause::<rustls::Error>(error)? {
        rustls::Error::InvalidCertificate(reason) => trouble(
            "the API server's certificate is not trusted",
            match reason {
                rustls::CertificateError::Other(rustls::OtherError(why)) => why.to_string(),
                other => other.to_string(),
            },
            "compare it with the kubeconfig's certificate-authority and server, and check this machine's clock",
        ),
        error @ rustls::Error::AlertReceived(_) => trouble(
            "the API server refuses the TLS connection",
            error.to_string(),
            "check that the kubeconfig's client-certificate is signed by an authority that the server knows, and still valid",
        ),
        error => trouble(
            "cannot set up TLS with the API server",
            error.to_string(),
            "check that the address is that of an API server, with https",
        ),
    }
}

/// A plugin that failed, or a file that cannot be used.
fn of_credentials(error: &Error) -> Option<Trouble> {
    let why = cause::<NoCredentials>(error)?;
    let remedy = "check the kubeconfig's user, and the plugin or the files that it names";
    Some(Trouble { what: format!("no credentials for the API server: {why}"), detail: chain(error), remedy })
}

/// The first error of this type among the causes of `error`. Those of I/O hide their cause from `source`.
fn cause<'e, E: std::error::Error + 'static>(error: &'e (dyn std::error::Error + 'static)) -> Option<&'e E> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<E>() {
            return Some(found);
        }
        let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        next = match inner {
            Some(inner) => Some(inner as &(dyn std::error::Error + 'static)),
            None => error.source(),
        };
    }
    None
}

fn code(error: &Error) -> Option<u16> {
    match error {
        Error::WatchError(status) => Some(status.code),
        Error::InitialListFailed(kube::Error::Api(status))
        | Error::WatchStartFailed(kube::Error::Api(status))
        | Error::WatchFailed(kube::Error::Api(status)) => Some(status.code),
        _ => None,
    }
}

fn transport(error: &Error) -> (&'static str, &'static str) {
    match error {
        Error::NoResourceVersion => {
            ("received an object without a resourceVersion", "the server is not a Kubernetes API server")
        }
        Error::InitialListFailed(kube::Error::SerdeError(_)) | Error::WatchFailed(kube::Error::SerdeError(_)) => {
            ("cannot read the API server's response", "check the proxies in front of the API server")
        }
        Error::InitialListFailed(kube::Error::Auth(_)) | Error::WatchStartFailed(kube::Error::Auth(_)) => {
            ("no credentials for the API server", "check the service account token or the kubeconfig's credentials")
        }
        Error::WatchFailed(_) => {
            ("the watch was interrupted", "check the network between this node and the API server")
        }
        _ => ("the API server cannot be reached", "check its address, and the network between it and this node"),
    }
}

/// What the server said, or the error with its causes, each once.
fn detail(error: &Error) -> String {
    match error {
        Error::WatchError(status)
        | Error::InitialListFailed(kube::Error::Api(status))
        | Error::WatchStartFailed(kube::Error::Api(status))
        | Error::WatchFailed(kube::Error::Api(status))
            if !status.message.is_empty() =>
        {
            status.message.clone()
        }
        _ => chain(error),
    }
}
