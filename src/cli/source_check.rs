//! The part of `kubelane check` that asks about the source: is the API server there, and what may this account do?

use std::path::Path;

use super::finding::Finding;
use super::flags::{Source, SourceFlags};
use super::run::{choose_source, in_cluster};
use crate::agent::SourceSettings;
use crate::k8s::inquiry::{Answers, Inquiry, inquire};

const SERVER: &str = "API server";
const RIGHTS: &str = "rights on the API server";
const CLOCK: &str = "clock";
/// Seconds that the clocks may differ: certificates and tokens are valid from the moment on at which they are made.
const SKEW: i64 = 10;

pub(super) fn findings(flags: &SourceFlags) -> Vec<Finding> {
    match choose_source(flags, in_cluster()) {
        Ok(SourceSettings::Directory(path)) => vec![directory(&path)],
        Ok(SourceSettings::Kubernetes { kubeconfig, master }) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let inquiry = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
                let answer = runtime.block_on(inquire(kubeconfig, master));
                // A plugin that hangs is not waited for.
                runtime.shutdown_background();
                answer
            });
            match inquiry {
                Ok(inquiry) => of_server(inquiry),
                Err(error) => {
                    vec![Finding::fail(SERVER, format!("{error:#}"), "correct the kubeconfig, or name another one")]
                }
            }
        }
        Err(error) if flags.source == Some(Source::Kubernetes) || flags.kubeconfig.is_some() => {
            vec![Finding::fail(SERVER, format!("{error:#}"), "")]
        }
        Err(_) => vec![Finding::warn(
            SERVER,
            "not checked: its address is not given",
            "give the daemon's --config, --kubeconfig, --master or --source",
        )],
    }
}

fn directory(path: &Path) -> Finding {
    const WHAT: &str = "directory of manifests";
    match path.is_dir() {
        true => Finding::ok(WHAT, path.display().to_string()),
        false => {
            Finding::fail(WHAT, format!("{} is not a directory", path.display()), "create it, or name another one")
        }
    }
}

fn of_server((server, answers): Inquiry) -> Vec<Finding> {
    let Answers { version, ahead, missing, missed } = match answers {
        Ok(answers) => answers,
        Err((why, remedy)) => return vec![Finding::fail(SERVER, format!("{server}: {why}"), remedy)],
    };
    let mut findings = vec![Finding::ok(SERVER, format!("{server} ({version})"))];
    let rights = match (missing.as_slice(), missed.as_slice()) {
        ([], []) => Finding::ok(RIGHTS, "all that are needed"),
        ([], missed) => Finding::warn(
            RIGHTS,
            format!("this account may not {}: nobody reads of Services that cannot be served", missed.join(", ")),
            "apply manifests/base/rbac.yaml",
        ),
        (missing, _) => Finding::fail(
            RIGHTS,
            format!("this account may not {}", missing.join(", ")),
            "apply manifests/base/rbac.yaml, or name another account's kubeconfig",
        ),
    };
    findings.push(rights);
    findings.extend(ahead.map(clock));
    findings
}

fn clock(ahead: i64) -> Finding {
    match ahead.abs() {
        ..=SKEW => Finding::ok(CLOCK, "as the API server's"),
        seconds => {
            let side = if ahead > 0 { "behind" } else { "ahead of" };
            let detail =
                format!("{seconds} s {side} the API server's: certificates and tokens may count as not yet valid");
            Finding::warn(CLOCK, detail, "run an NTP client on both")
        }
    }
}
