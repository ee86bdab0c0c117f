//! What has to be so on an API server before the bench makes anything there, told in an operator's words.

use std::net::Ipv4Addr;

use anyhow::bail;
use ipnet::Ipv4Net;
use serde_json::{Value, json};

use crate::laboratory::api_client::connection::Connection;
use crate::path::TARGETS;

/// What the bench, kubelane and kube-proxy do: verbs, group, resource. Everywhere, for the namespace is not there yet.
const RIGHTS: [(&[&str], &str, &str); 5] = [
    (&["create", "delete"], "", "namespaces"),
    (&["get", "list", "watch", "create", "delete"], "", "nodes"),
    (&["list", "watch", "create", "delete"], "", "services"),
    (&["patch"], "", "services/status"),
    (&["list", "watch", "create", "delete"], "discovery.k8s.io", "endpointslices"),
];

/// Fails with all that is not as it has to be for `others` Services beside the targets. What this server does not tell
/// is said not to be checked.
pub fn check(server: &Connection, others: usize) -> anyhow::Result<()> {
    server.check()?;
    let mut problems = missing_rights(server);
    match server.call("GET", "/api/v1/services", "", None) {
        Ok(services) => {
            problems.extend(taken_ports(&services));
            problems.extend(narrow_range(server, &services, others + TARGETS.len()));
        }
        Err(status) => problems.push(format!("the Services of all namespaces cannot be listed: {status}")),
    }
    if problems.is_empty() {
        return Ok(());
    }
    bail!("the API server is not as this bench needs it:\n  {}", problems.join("\n  "))
}

fn missing_rights(server: &Connection) -> Vec<String> {
    let mut missing = Vec::new();
    for (verbs, group, resource) in RIGHTS {
        for verb in verbs {
            let (resource, part) = resource.split_once('/').unwrap_or((resource, ""));
            let attributes = json!({"verb": verb, "group": group, "resource": resource, "subresource": part});
            let review = json!({
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SelfSubjectAccessReview",
                "spec": {"resourceAttributes": attributes},
            });
            let path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
            match server.call("POST", path, "application/json", Some(&review)) {
                Ok(answer) if answer["status"]["allowed"] == true => {}
                Ok(_) => missing.push(format!("--kubeconfig has no right to {verb} {resource}/{part}")),
                Err(status) => {
                    println!("NOT CHECKED: what the user of --kubeconfig may do ({status})");
                    return missing;
                }
            }
        }
    }
    missing.iter().map(|line| line.trim_end_matches('/').to_owned()).collect()
}

/// Ports that the targets need: their numbers are the paths' own.
fn taken_ports(services: &Value) -> Vec<String> {
    let wanted: Vec<(String, bool, u16)> = TARGETS.iter().flat_map(|target| target.ports()).collect();
    let mut taken = Vec::new();
    for service in items(services) {
        for port in service["spec"]["ports"].as_array().into_iter().flatten() {
            let is_tcp = port["protocol"].as_str().unwrap_or("TCP") == "TCP";
            let number = &port["nodePort"];
            if wanted.iter().any(|(_, tcp, wanted)| *tcp == is_tcp && *number == json!(wanted)) {
                let (namespace, name) = (&service["metadata"]["namespace"], &service["metadata"]["name"]);
                taken.push(format!(
                    "NodePort {number}, which the bench needs, is that of the Service {namespace}/{name}"
                ));
            }
        }
    }
    taken.iter().map(|line| line.replace('"', "")).collect()
}

/// Whether `wanted` cluster IPs are left in the server's ranges (ServiceCIDR, Kubernetes 1.33).
fn narrow_range(server: &Connection, services: &Value, wanted: usize) -> Option<String> {
    let Ok(ranges) = server.call("GET", "/apis/networking.k8s.io/v1/servicecidrs", "", None) else {
        println!("NOT CHECKED: whether {wanted} cluster IPs are free (this API server has no ServiceCIDRs)");
        return None;
    };
    let ranges = items(&ranges).flat_map(|range| range["spec"]["cidrs"].as_array().into_iter().flatten());
    let ranges: Vec<Ipv4Net> = ranges.filter_map(|range| range.as_str()?.parse().ok()).collect();
    // Without the network's own address and the last one.
    let all: u64 = ranges.iter().map(|range| (1_u64 << (32 - range.prefix_len())).saturating_sub(2)).sum();
    let addresses = items(services).filter_map(|service| service["spec"]["clusterIP"].as_str());
    let used = addresses.filter(|ip| ip.parse::<Ipv4Addr>().is_ok()).count() as u64;
    let free = all.saturating_sub(used);
    (free < wanted as u64).then(|| {
        let ranges = ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        format!(
            "{wanted} Services are to be made, and {free} cluster IPs are free (IPv4 ranges: {ranges}): ask for fewer, by \
             --others and --latency-others"
        )
    })
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list["items"].as_array().into_iter().flatten()
}
