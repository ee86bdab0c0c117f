//! Where changes come from: an API server or a directory, prepared before anything is attached, then run as a task.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::ensure;
use tokio::sync::mpsc;

use crate::files;
use crate::k8s::ApiServer;
use crate::model::Change;
use crate::objects::{Settings, SourceStatus};

/// Which source, as the command line has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceSettings {
    Kubernetes {
        kubeconfig: Option<PathBuf>,
        /// URL of the API server.
        master: Option<String>,
    },
    Directory(PathBuf),
}

/// A source that could be reached for, if not yet reached.
pub(super) enum Source {
    Kubernetes(ApiServer),
    Directory(PathBuf),
}

impl Source {
    /// Reads the configuration.
    ///
    /// # Errors
    /// When the kubeconfig or the service account cannot be used, or the directory does not exist. That the API server
    /// does not answer is no error: it may come back.
    pub async fn prepare(settings: &SourceSettings) -> anyhow::Result<Self> {
        match settings {
            SourceSettings::Kubernetes { kubeconfig, master } => {
                Ok(Source::Kubernetes(ApiServer::configured(kubeconfig.clone(), master.clone()).await?))
            }
            SourceSettings::Directory(path) => {
                ensure!(path.is_dir(), "--source dir:{}: not a directory", path.display());
                tracing::info!("source: the directory {}", path.display());
                Ok(Source::Directory(path.clone()))
            }
        }
    }

    /// For what goes to the API server beside the watches; `None` when there is none.
    pub fn api_server(&self) -> Option<ApiServer> {
        match self {
            Source::Kubernetes(server) => Some(server.clone()),
            Source::Directory(_) => None,
        }
    }

    /// Runs for as long as the receiver of `changes` lives; an earlier end is a failure.
    pub async fn run(
        self,
        settings: Settings,
        changes: mpsc::Sender<Change>,
        status: Arc<SourceStatus>,
    ) -> anyhow::Result<()> {
        match self {
            Source::Kubernetes(server) => {
                server.follow(settings, changes, status).await;
                Ok(())
            }
            Source::Directory(path) => files::run(path, settings, changes, status).await,
        }
    }
}
