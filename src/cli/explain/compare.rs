//! Where the kernel and the daemon disagree about a frontend.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::decide::Found;
use crate::abi::pool_empty::EMPTY_DROP;
use crate::abi::pool_member::POOL_LOCAL;
use crate::abi::{self, frontend_flag::FRONTEND_SOURCE_RANGES};
use crate::cli::snapshot::kinds;
use crate::explain::{Frontend, Policy, Pool, Port, Service};
use crate::model::SocketAddrx;

/// As many addresses are named.
const NAMED: usize = 5;

/// `is_outside`: whose pool `found` has.
pub fn compare(found: &Found, told: Option<(&Service, &Port)>, is_outside: bool) -> Vec<String> {
    let key = SocketAddrx { ip: found.key.ip(), port: found.key.port() };
    let name = found.name.as_deref().unwrap_or("a Service without a name");
    let at: SocketAddr = SocketAddr::new(key.ip.to_ip(), key.port);
    let wanted = told.and_then(|(service, port)| Some((service, port, port.frontends.iter().find(|f| f.at == at)?)));
    let Some((service, port, frontend)) = wanted else {
        return vec![format!("{key}: the kernel has it for {name}, and the daemon has no such frontend")];
    };
    let mut said = Vec::new();
    if let Some(owner) = &frontend.owner {
        said.push(format!("{key}: the kernel has it for {name}, the daemon for {owner}"));
    }
    let flags = found.row.flags & !FRONTEND_SOURCE_RANGES;
    if flags != frontend.flags & !FRONTEND_SOURCE_RANGES {
        let (here, there) = (kinds(flags).join(","), kinds(frontend.flags).join(","));
        said.push(format!("{key}: the kernel has it as {here}, the daemon as {there}"));
    }
    if (found.row.flags ^ frontend.flags) & FRONTEND_SOURCE_RANGES != 0 {
        let has = |flags: u32| if flags & FRONTEND_SOURCE_RANGES != 0 { "checks" } else { "does not check" };
        let (here, there) = (has(found.row.flags), has(frontend.flags));
        said.push(format!("{key}: the kernel {here} source ranges, the daemon {there}"));
    }
    if found.row.affinity_seconds != service.affinity_seconds {
        let (here, there) = (found.row.affinity_seconds, service.affinity_seconds);
        said.push(format!("{key}: affinity of {here} s in the kernel, of {there} s by the daemon (0: none)"));
    }
    said.extend(pools(&key, found, frontend, is_outside));
    said.extend(endpoints(&key, found, port, if is_outside { frontend.outside.set } else { frontend.inside.set }));
    said
}

fn pools(key: &SocketAddrx, found: &Found, told: &Frontend, is_outside: bool) -> Option<String> {
    let wanted = if is_outside { told.outside } else { told.inside };
    let kernel = pool(&found.pool);
    // What an empty pool does is of no meaning while it is not empty.
    let same = kernel.set == wanted.set && (found.pool.count > 0 || kernel.drops == wanted.drops);
    (!same).then(|| {
        let text = |pool: Pool| {
            let when_empty = if pool.drops { "drops" } else { "refuses" };
            format!("the {:?} pool, which {when_empty} when it is empty", pool.set)
        };
        format!("{key}: the kernel uses {}; the daemon {}", text(kernel), text(wanted))
    })
}

fn pool(pool: &abi::Pool) -> Pool {
    let set = if u32::from(pool.member) == POOL_LOCAL { Policy::Local } else { Policy::Cluster };
    Pool { set, drops: u32::from(pool.on_empty) == EMPTY_DROP }
}

fn endpoints(key: &SocketAddrx, found: &Found, port: &Port, set: Policy) -> Vec<String> {
    let is_ipv6 = found.key.ip().to_ip().is_ipv6();
    let is_in = |endpoint: &&crate::explain::Endpoint| {
        let out = if set == Policy::Local { endpoint.not_in_local } else { endpoint.not_in_cluster };
        out.is_none() && endpoint.at.is_ipv6() == is_ipv6
    };
    let wanted: BTreeSet<SocketAddr> = port.endpoints.iter().filter(is_in).map(|endpoint| endpoint.at).collect();
    let kernel: BTreeSet<SocketAddr> =
        found.candidates.iter().map(|candidate| SocketAddr::new(candidate.at.ip.to_ip(), candidate.at.port)).collect();
    let list = |some: Vec<&SocketAddr>| {
        let named: Vec<String> = some.iter().take(NAMED).map(ToString::to_string).collect();
        let more = some.len().saturating_sub(NAMED);
        if more > 0 { format!("{} and {more} more", named.join(", ")) } else { named.join(", ") }
    };
    let mut said = Vec::new();
    let (only_kernel, only_daemon): (Vec<_>, Vec<_>) =
        (kernel.difference(&wanted).collect(), wanted.difference(&kernel).collect());
    if !only_kernel.is_empty() {
        said.push(format!("{key}: the kernel has endpoints that the daemon does not: {}", list(only_kernel)));
    }
    if !only_daemon.is_empty() {
        said.push(format!("{key}: the daemon has endpoints that the kernel does not: {}", list(only_daemon)));
    }
    said
}
