//! Services as `ipvsadm -Ln` shows them, for those who come from kube-proxy's IPVS mode.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use super::flows::FlowRecord;
use crate::cli::snapshot::FrontendRecord;

/// Flows of packets from outside: active (proved by both ends), and the rest.
pub type Connections = HashMap<(SocketAddr, SocketAddr), (u64, u64)>;

pub fn count(connections: &mut Connections, flow: &FlowRecord) {
    let (active, other) = connections.entry((flow.frontend, flow.backend)).or_default();
    *(if flow.state == "established" { active } else { other }) += 1;
}

/// A NodePort is a virtual service at each of `addresses`, as it is in IPVS.
pub fn text(frontends: &[FrontendRecord], addresses: &[IpAddr], connections: &Connections) -> String {
    let mut text = format!("kubelane {}, in the format of ipvsadm\n", env!("CARGO_PKG_VERSION"));
    text += "Prot LocalAddress:Port Scheduler Flags\n";
    text += "  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn\n";
    for frontend in frontends {
        let Ok(at) = frontend.address.parse::<SocketAddr>() else { continue };
        let all: Vec<SocketAddr> = match at.ip().is_unspecified() {
            true => {
                let own = addresses.iter().filter(|ip| ip.is_ipv6() == at.is_ipv6());
                own.map(|ip| SocketAddr::new(*ip, at.port())).collect()
            }
            false => vec![at],
        };
        all.into_iter().for_each(|at| service(&mut text, frontend, at, connections));
    }
    text
}

fn service(text: &mut String, frontend: &FrontendRecord, at: SocketAddr, connections: &Connections) {
    let persistent = match frontend.affinity_seconds {
        0 => String::new(),
        seconds => format!(" persistent {seconds}"),
    };
    // IPVS has no scheduler that takes one by chance; the name is ours.
    let _ = writeln!(text, "{:<4} {at} random{persistent}", frontend.protocol);
    let mut endpoints: Vec<&String> = frontend.inside.endpoints.iter().chain(&frontend.outside.endpoints).collect();
    endpoints.sort();
    endpoints.dedup();
    for endpoint in endpoints {
        let known = endpoint.parse().ok().and_then(|backend| connections.get(&(at, backend)));
        let (active, other) = known.copied().unwrap_or_default();
        let _ = writeln!(text, "  -> {endpoint:<28} Masq    1      {active:<10} {other:<10}");
    }
}
