//! Credential plugins (client.authentication.k8s.io): programs of the kubeconfig that print a token or a certificate. kube
//! runs them on the calling thread and waits for ever; here one has a minute, and the daemon goes on meanwhile.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};
use data_encoding::BASE64;
use jiff::Timestamp;
use kube::config::{AuthInfo, ExecConfig, ExecInteractiveMode};
use secrecy::SecretString;
use serde::Deserialize;
use serde_json::json;
use tokio::process::Command;

/// A plugin that has not ended by then is killed.
const PATIENCE: Duration = Duration::from_secs(60);
/// This long before its end a credential is asked for anew.
const AHEAD: jiff::SignedDuration = jiff::SignedDuration::from_secs(60);
/// Of what a plugin said, in an error.
const LONGEST: usize = 500;

/// What a plugin printed.
#[derive(Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Credential {
    token: Option<SecretString>,
    /// PEM.
    client_certificate_data: Option<String>,
    client_key_data: Option<SecretString>,
    expiration_timestamp: Option<Timestamp>,
}

#[derive(Deserialize)]
struct Output {
    status: Option<Credential>,
}

impl Credential {
    /// Whether it may still be used in a minute.
    pub fn is_fresh(&self) -> bool {
        self.expiration_timestamp.is_none_or(|end| Timestamp::now() + AHEAD < end)
    }

    /// Writes it where a kubeconfig would have it.
    pub fn put_into(&self, auth: &mut AuthInfo) {
        use secrecy::ExposeSecret as _;
        auth.token.clone_from(&self.token);
        if let (Some(certificate), Some(key)) = (&self.client_certificate_data, &self.client_key_data) {
            auth.client_certificate_data = Some(BASE64.encode(certificate.as_bytes()));
            auth.client_key_data = Some(BASE64.encode(key.expose_secret().as_bytes()).into());
        }
    }
}

/// Runs the plugin.
///
/// # Errors
/// When it cannot be started, fails, prints something else, or does not end in a minute.
pub async fn run(exec: &ExecConfig) -> anyhow::Result<Credential> {
    let name = exec.command.as_deref().context("exec: the kubeconfig names no command")?;
    let output = command(name, exec)?.output();
    let output = match tokio::time::timeout(PATIENCE, output).await {
        Ok(output) => output.with_context(|| started(name, exec))?,
        Err(_) => bail!("the credential plugin {name} has not ended after {} s, and was killed", PATIENCE.as_secs()),
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said: String = said.trim().chars().take(LONGEST).collect();
        bail!("the credential plugin {name} failed ({}): {said}", output.status);
    }
    let text = || format!("the credential plugin {name} did not print an ExecCredential");
    let printed: Output = serde_json::from_slice(&output.stdout).with_context(text)?;
    let credential = printed.status.ok_or_else(|| anyhow!("{}: it has no status", text()))?;
    let has_identity = credential.client_certificate_data.is_some() && credential.client_key_data.is_some();
    ensure!(credential.token.is_some() || has_identity, "{}: there is no token and no certificate in it", text());
    Ok(credential)
}

/// What to say of a plugin that could not be started.
fn started(name: &str, exec: &ExecConfig) -> String {
    let hint = exec.install_hint.as_deref().unwrap_or_default().trim();
    format!("the credential plugin {name} cannot be started {hint}").trim_end().to_owned()
}

fn command(name: &str, exec: &ExecConfig) -> anyhow::Result<Command> {
    let is_always = exec.interactive_mode == Some(ExecInteractiveMode::Always);
    ensure!(!is_always, "the credential plugin {name} is interactive, which a daemon does not support");
    let mut spec = json!({"interactive": false});
    if exec.provide_cluster_info {
        spec["cluster"] =
            serde_json::to_value(exec.cluster.as_ref().context("exec: no cluster information for the plugin")?)?;
    }
    let info = json!({"apiVersion": exec.api_version, "kind": "ExecCredential", "spec": spec});
    let mut command = Command::new(name);
    command.args(exec.args.iter().flatten()).env("KUBERNETES_EXEC_INFO", info.to_string());
    for pair in exec.env.iter().flatten() {
        if let (Some(name), Some(value)) = (pair.get("name"), pair.get("value")) {
            command.env(name, value);
        }
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    Ok(command)
}
