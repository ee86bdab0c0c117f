//! One request for a list. kube's own copies the answer three times before it is read, and a list from the server's cache
//! comes whole: of a large cluster it is a hundred megabytes.

use axum::body::Body;
use futures::StreamExt as _;
use kube::client::Body as KubeBody;
use kube::core::{ObjectList, Status};
use serde::de::DeserializeOwned;

/// Sends a request for a list and reads the answer.
///
/// # Errors
/// As kube's: the server's refusal is [`kube::Error::Api`].
pub async fn list<K>(client: &kube::Client, request: http::Request<Vec<u8>>) -> kube::Result<ObjectList<K>>
where
    K: DeserializeOwned + Clone,
{
    let response = client.send(request.map(KubeBody::from)).await?;
    let status = response.status();
    let mut chunks = Body::new(response.into_body()).into_data_stream();
    let mut text = Vec::new();
    while let Some(chunk) = chunks.next().await {
        text.extend_from_slice(&chunk.map_err(|error| kube::Error::Service(error.into()))?);
    }
    if status.is_success() {
        return serde_json::from_slice(&text).map_err(kube::Error::SerdeError);
    }
    let refusal = serde_json::from_slice::<Status>(&text).unwrap_or_else(|_| {
        let text = String::from_utf8_lossy(&text);
        Status::failure(text.trim(), "").with_code(status.as_u16())
    });
    Err(kube::Error::Api(refusal.boxed()))
}
