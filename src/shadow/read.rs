//! Asks the node's tools for kube-proxy's rules, and finds out in which of its modes it runs.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::BufReader;
use std::sync::Arc;
use std::time::Duration;

use super::{Rules, iptables, ipvs, nftables};
use crate::model::{Family, Ipx};
use crate::tool::{self, Failure};

/// Commands, and what else must exist for them to be asked: iptables-legacy loads kernel modules when it is asked in vain.
/// Where both variants are the same, the first one is enough.
const IPTABLES: [[(&str, Option<&str>); 2]; 2] = [
    [("iptables-save", None), ("ip6tables-save", None)],
    [
        ("iptables-legacy-save", Some("/proc/net/ip_tables_names")),
        ("ip6tables-legacy-save", Some("/proc/net/ip6_tables_names")),
    ],
];
/// With ten thousand Services nft takes seconds.
const LIMIT: Duration = Duration::from_secs(60);
const FAMILIES: [(Family, &str); 2] = [(Family::Ipv4, "ip"), (Family::Ipv6, "ip6")];

/// Why there is nothing to compare with.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unreadable(pub String);

/// The rules of the mode that has most of them. `node`: the node's own addresses. It takes as long as the tools do.
///
/// # Errors
/// When no rules of kube-proxy are found, or a tool fails that would have shown some.
pub fn read(node: &Arc<Vec<Ipx>>) -> Result<Rules, Unreadable> {
    let mut troubles = BTreeSet::new();
    let mut found: Vec<Rules> = IPTABLES.iter().map(|variant| read_iptables(variant, &mut troubles)).collect();
    found.push(read_nftables(&mut troubles));
    found.extend(File::open(ipvs::TABLE).ok().and_then(|file| ipvs::parse(&mut BufReader::new(file), node).ok()));
    let modes: BTreeSet<&str> = found.iter().filter(|rules| !rules.rows.is_empty()).map(|rules| rules.mode).collect();
    let is_best = |best: &Rules, next: &Rules| next.rows.len() > best.rows.len();
    let best = found.into_iter().reduce(|best, next| if is_best(&best, &next) { next } else { best });
    let Some(mut best) = best.filter(|best| !best.rows.is_empty()) else {
        let troubles: Vec<String> = troubles.into_iter().collect();
        let why = if troubles.is_empty() { "kube-proxy has written none".to_owned() } else { troubles.join("; ") };
        return Err(Unreadable(format!("no rules of kube-proxy are found on this node: {why}")));
    };
    if modes.len() > 1 {
        let others: Vec<&str> = modes.into_iter().filter(|mode| *mode != best.mode).collect();
        best.remarks.insert(format!(
            "rules of several modes of kube-proxy are found; compared are those of {}, not those of {}",
            best.mode,
            others.join(" and ")
        ));
    }
    // A family that could not be read would look like Services without rules. A tool that is not there says nothing of it.
    let failed = troubles.iter().find(|trouble| !trouble.contains(NOT_INSTALLED) && trouble.starts_with(best.mode));
    match failed {
        Some(trouble) => Err(Unreadable(trouble.clone())),
        None => Ok(best),
    }
}

const NOT_INSTALLED: &str =
    "is not installed, neither here nor on the node (whose tools take hostPID and CAP_SYS_ADMIN from within an image)";

fn read_iptables(variant: &[(&str, Option<&str>)], troubles: &mut BTreeSet<String>) -> Rules {
    let mut all = Rules::new(iptables::MODE);
    for ((command, precondition), (family, _)) in variant.iter().zip(FAMILIES) {
        if precondition.is_some_and(|path| std::fs::read(path).unwrap_or_default().is_empty()) {
            continue;
        }
        match tool::run(&[command], "", LIMIT, move |output| iptables::parse(output, family)) {
            Ok(rules) => all.extend(rules),
            Err(failure) => note(troubles, iptables::MODE, command, failure),
        }
    }
    all
}

fn read_nftables(troubles: &mut BTreeSet<String>) -> Rules {
    let mut all = Rules::new(nftables::MODE);
    for (family, table) in FAMILIES {
        let command = ["nft", "-j", "list", "table", table, "kube-proxy"];
        match tool::run(&command, "", LIMIT, move |output| nftables::parse(output, family)) {
            Ok(rules) => all.extend(rules),
            Err(Failure::Failed(said)) if said.contains("No such file or directory") => {}
            Err(failure) => note(troubles, nftables::MODE, "nft", failure),
        }
    }
    all
}

fn note(troubles: &mut BTreeSet<String>, mode: &str, command: &str, failure: Failure) {
    let why = match failure {
        Failure::NotInstalled => NOT_INSTALLED.to_owned(),
        Failure::Failed(said) => format!("failed: {}", crate::escape::line(&said)),
        Failure::TooSlow => "did not end in time".to_owned(),
    };
    troubles.insert(format!("{mode}: {command} {why}"));
}
