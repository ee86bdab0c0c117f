//! The taint that keeps pods away from a node whose Services do not work yet (`--startup-taint`): taken off the Node
//! when the daemon is ready, and only then.

use std::time::Duration;

use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::backoff::Backoff;

/// For how long the Node may seem to have a taint that was taken away before it is looked at again: it may have been
/// registered anew in the meantime, which the watch shows as no change at all.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Takes the taint away whenever `tainted` says that the Node has it, until its sender is dropped.
pub async fn run(client: kube::Client, node: String, key: String, mut tainted: watch::Receiver<bool>) {
    let mut backoff = Backoff::default();
    let mut told = None;
    while tainted.wait_for(|is| *is).await.is_ok() {
        match remove(&client, &node, &key).await {
            Ok(removed) => {
                if removed > 0 {
                    info!(taint = key, removed, "removed the startup taint from the Node");
                }
                (backoff, told) = (Backoff::default(), None);
                // Until the watch has seen it.
                if let Ok(Err(_)) = timeout(LOOK_AGAIN, tainted.wait_for(|is| !*is)).await {
                    return;
                }
            }
            Err(error) => {
                let error = format!("{error:#}");
                if told.as_ref() != Some(&error) {
                    warn!("--startup-taint {key}: {error}; trying again");
                    told = Some(error);
                }
                tokio::time::sleep(backoff.next()).await;
            }
        }
    }
}

/// Returns how many taints (one key may have several effects) were removed.
async fn remove(client: &kube::Client, node: &str, key: &str) -> anyhow::Result<usize> {
    // As the server has it: a patch has to name all fields of a taint, known or not.
    let nodes: Api<DynamicObject> = Api::all_with(client.clone(), &ApiResource::erase::<Node>(&()));
    let object = nodes.get(node).await.context("reading the Node")?;
    let taints = object.data["spec"]["taints"].as_array().cloned().unwrap_or_default();
    let patch = patch(&taints, key);
    if patch.is_empty() {
        return Ok(0);
    }
    let removed = patch.len() / 2;
    let patch = Patch::Json::<()>(serde_json::from_value(patch.into())?);
    match nodes.patch(node, &PatchParams::default(), &patch).await {
        Ok(_) => Ok(removed),
        Err(kube::Error::Api(status)) if status.code == 403 => {
            bail!("403 Forbidden: {}; the account needs get and patch on nodes", status.message)
        }
        // A taint that is not where it was read: somebody else changed the list.
        Err(error) => Err(error).context("patching the Node"),
    }
}

/// A JSON patch (RFC 6902) that removes the taints of this key, the last first, each only if it still is where it was.
fn patch(taints: &[Value], key: &str) -> Vec<Value> {
    let ours = taints.iter().enumerate().rev().filter(|(_, taint)| taint["key"] == key);
    ours.flat_map(|(index, taint)| {
        let path = format!("/spec/taints/{index}");
        [json!({"op": "test", "path": path, "value": taint}), json!({"op": "remove", "path": path})]
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taints_of_the_key_are_removed_from_the_last_on_if_they_are_still_there() {
        let taint = |key: &str, effect: &str| json!({"key": key, "effect": effect});
        let taints = [taint("k", "NoExecute"), taint("other", "NoSchedule"), taint("k", "NoSchedule")];
        let expected = vec![
            json!({"op": "test", "path": "/spec/taints/2", "value": taints[2]}),
            json!({"op": "remove", "path": "/spec/taints/2"}),
            json!({"op": "test", "path": "/spec/taints/0", "value": taints[0]}),
            json!({"op": "remove", "path": "/spec/taints/0"}),
        ];
        assert_eq!(patch(&taints, "k"), expected);
        assert!(patch(&taints, "absent").is_empty());
    }
}
