//! `kubelane run --shadow`: the daemon's sources and plan, and no datapath.

use std::time::Instant;

use super::flags::{RunFlags, Shadow};
use super::run::{choose_source, in_cluster};
use super::{UsageError, host, log, print, table};
use crate::agent::{self, Outcome};
use crate::bpf::rows_at_most;

const HEADS: [&str; 4] = ["SERVICE", "DESTINATION", "KIND", "DIFFERENCE"];

/// False: there are differences. `started`: when the process did.
///
/// # Errors
/// A [`UsageError`] before anything is touched; anything that keeps it from comparing.
pub fn run(mut flags: RunFlags, started: Instant) -> anyhow::Result<bool> {
    // Where a configuration file or the defaults have them, kube-proxy listens itself.
    let healthz = flags.node.healthz_bind_address.and_then(|address| address.0);
    let metrics = flags.node.metrics_bind_address.and_then(|address| address.0);
    let remarks = flags.complete()?;
    let source = choose_source(&flags.source, in_cluster())?;
    log::start(flags.log).map_err(|error| UsageError(format!("{error:#}")))?;
    if !remarks.odd.is_empty() {
        tracing::warn!(
            "these settings are malformed, and are read as kube-proxy reads them: {}",
            remarks.odd.join(", ")
        );
    }
    let settings = agent::Shadow {
        source,
        node_name: host::node_name(flags.source.hostname_override.as_deref())?,
        nodeport_addresses: flags.nodeport_addresses(),
        service_proxy_name: flags.source.service_proxy_name,
        masquerade: flags.traffic.masquerade(),
        capacity: rows_at_most(flags.max_services, flags.max_endpoints, flags.max_source_ranges),
        healthz,
        metrics,
        bind_hard_fail: flags.node.bind_address_hard_fail.unwrap_or_default(),
        is_once: flags.shadow == Some(Shadow::Once),
    };
    let outcome = super::run::block_on(agent::run_shadow(settings, started))?;
    outcome.map_or(Ok(true), |outcome| show(&outcome))
}

fn show(outcome: &Outcome) -> anyhow::Result<bool> {
    let mut text = outcome.remarks.iter().map(|remark| format!("{remark}\n")).collect::<String>();
    if !outcome.differences.is_empty() {
        text += &table::render(&HEADS, &outcome.differences);
    }
    print(&(text + &outcome.summary + "\n"))?;
    Ok(outcome.is_same)
}
