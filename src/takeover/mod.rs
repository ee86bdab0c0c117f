//! `--takeover`: once the daemon serves, kube-proxy's rules are removed from the node, and nothing of anybody else's.
//! Connections that they have begun go on: netfilter's connection tracking has their translation, and the packet programs
//! leave them to it (`bpf/tracked.rs`).

mod rules;

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tracing::{info, warn};

use crate::serve::Stage;
use crate::tool::{self, Failure};
use tokio::sync::watch;

/// Between two looks for a kube-proxy that has not ended yet, and after a failure.
const AGAIN: Duration = Duration::from_secs(5);
/// A change takes a fraction of a second even with ten thousand Services.
const PATIENCE: Duration = Duration::from_secs(30);
/// What lists the rules of each variant and family, and what changes them; a file that must not be empty for it to be
/// asked: iptables-legacy loads kernel modules when it is asked in vain.
const IPTABLES: [(&str, &str, Option<&str>); 6] = [
    ("iptables-save", "iptables-restore", None),
    ("ip6tables-save", "ip6tables-restore", None),
    ("iptables-nft-save", "iptables-nft-restore", None),
    ("ip6tables-nft-save", "ip6tables-nft-restore", None),
    ("iptables-legacy-save", "iptables-legacy-restore", Some("/proc/net/ip_tables_names")),
    ("ip6tables-legacy-save", "ip6tables-legacy-restore", Some("/proc/net/ip6_tables_names")),
];
const IPVS_DEVICE: &str = "kube-ipvs0";

/// Removes the rules when the daemon is ready and kube-proxy has ended; then waits for ever.
pub async fn run(mut stage: watch::Receiver<Stage>) -> Result<()> {
    stage.wait_for(|stage| *stage == Stage::Ready).await.context("the daemon's health is no longer watched")?;
    let mut told = String::new();
    loop {
        let outcome = match kube_proxy_process() {
            Some(process) => Err(format!(
                "--takeover: kube-proxy still runs (pid {process}): its rules are removed once it has ended"
            )),
            None => remove().await.map_err(|error| {
                format!(
                    "--takeover: cannot remove kube-proxy's rules: {error:#}; `kube-proxy --cleanup` can; trying again"
                )
            }),
        };
        match outcome {
            Ok(removed) if removed.is_empty() => info!("--takeover: there are no rules of kube-proxy's"),
            Ok(removed) => info!("--takeover: removed kube-proxy's rules: {}", removed.join(", ")),
            Err(problem) => {
                if problem != told {
                    warn!("{problem}");
                    told = problem;
                }
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        }
        std::future::pending::<()>().await;
    }
}

/// A kube-proxy in this network namespace.
fn kube_proxy_process() -> Option<u32> {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/net")).ok();
    let own = namespace("self")?;
    let processes = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut processes = processes.filter(|process: &u32| {
        fs::read_to_string(format!("/proc/{process}/comm")).is_ok_and(|name| name.trim() == "kube-proxy")
    });
    processes.find(|process| namespace(&process.to_string()).as_ref() == Some(&own))
}

/// Answers what was removed, in words.
async fn remove() -> Result<Vec<String>> {
    let mut removed = tokio::task::spawn_blocking(remove_by_tools).await.context("a thread failed")??;
    if remove_ipvs_device().await? {
        removed.push(format!("device {IPVS_DEVICE}"));
    }
    Ok(removed)
}

fn remove_by_tools() -> Result<Vec<String>> {
    let mut removed = Vec::new();
    let mut has_iptables = false;
    for (save, restore, precondition) in IPTABLES {
        if precondition.is_some_and(|path| fs::read(path).unwrap_or_default().is_empty()) {
            continue;
        }
        let Some(saved) = run_tool(&[save], "")? else { continue };
        has_iptables = true;
        let Some(removal) = rules::removal(&saved) else { continue };
        run_tool(&[restore, "-w", "5", "--noflush"], &removal.script)?.with_context(|| format!("no {restore} here"))?;
        removed.push(format!("{} chains ({save})", removal.chains));
        for chain in removal.kept {
            warn!("--takeover: chain {chain} stays, empty: rules of somebody else lead to it");
        }
    }
    if let Some(chains) = run_tool(&["nft", "list", "chains"], "")? {
        let lines = || chains.lines().map(str::trim);
        if !has_iptables && lines().any(|line| line == "chain KUBE-SERVICES {") {
            bail!("iptables has made them, and is not installed here or on the node");
        }
        for family in ["ip", "ip6"] {
            if lines().any(|line| line == format!("table {family} kube-proxy {{")) {
                run_tool(&["nft", "delete", "table", family, "kube-proxy"], "")?;
                removed.push(format!("nftables table {family} kube-proxy"));
            }
        }
    } else if !has_iptables {
        bail!(
            "neither iptables nor nft is installed here, nor to be had on the node (from a container that takes hostPID, \
             CAP_SYS_ADMIN and CAP_SYS_PTRACE)"
        );
    }
    removed.extend(remove_virtual_servers()?);
    Ok(removed)
}

/// Its standard output. `None`: it is not installed here or on the node.
fn run_tool(command: &[&str], input: &str) -> Result<Option<String>> {
    match tool::text_of(command, input, PATIENCE) {
        Ok(text) => Ok(Some(text)),
        Err(Failure::NotInstalled) => Ok(None),
        Err(Failure::TooSlow) => bail!("{} has not ended after {} s", command.join(" "), PATIENCE.as_secs()),
        Err(Failure::Failed(said)) => bail!("{} failed: {said}", command.join(" ")),
    }
}

/// All of them, as kube-proxy does: its mode has no others beside it. And its sets of addresses.
fn remove_virtual_servers() -> Result<Vec<String>> {
    if !fs::exists(format!("/sys/class/net/{IPVS_DEVICE}")).unwrap_or(false) {
        return Ok(Vec::new());
    }
    run_tool(&["ipvsadm", "--clear"], "")?.context("IPVS has virtual servers, and ipvsadm is not installed")?;
    let sets = run_tool(&["ipset", "list", "-name"], "")?.unwrap_or_default();
    for set in sets.lines().filter(|set| set.starts_with("KUBE-")) {
        run_tool(&["ipset", "destroy", set], "")?;
    }
    Ok(vec!["IPVS virtual servers".to_owned()])
}

async fn remove_ipvs_device() -> Result<bool> {
    let Ok(index) = nix::net::if_::if_nametoindex(IPVS_DEVICE) else { return Ok(false) };
    let (connection, handle, _) = rtnetlink::new_connection().context("opening a netlink socket")?;
    let connection = tokio::spawn(connection);
    let deleted = handle.link().del(index).execute().await;
    connection.abort();
    deleted.with_context(|| format!("deleting the device {IPVS_DEVICE}"))?;
    Ok(true)
}
