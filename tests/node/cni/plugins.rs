//! The real CNI plugins, run as a container runtime does it: in the node's namespace, with the configuration on stdin.

use std::path::Path;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use crate::laboratory::Lab;
use crate::laboratory::lab::{Node, Place};

/// Where Debian's containernetworking-plugins are.
const DIRECTORY: &str = "/usr/lib/cni";
const VERSION: &str = "0.4.0";

/// Why they cannot be run here, with a remedy.
pub fn missing() -> Option<String> {
    let lacks = |name: &&str| !Path::new(DIRECTORY).join(name).is_file();
    let name = ["bridge", "host-local", "portmap"].into_iter().find(lacks)?;
    Some(format!(
        "needs {DIRECTORY}/{name} (Debian: apt-get install containernetworking-plugins; `make setup` does it)"
    ))
}

/// How the `bridge` plugin is configured: by its field names.
#[derive(Clone, Copy)]
pub struct Bridge {
    pub mtu: u32,
    pub ip_masq: bool,
}

/// Connects a pod to the node's bridge `cni0`, with addresses from `host-local`, which gives them out in the order in
/// which the laboratory planned them. The plugin's result.
pub fn add_to_bridge(lab: &Lab, node: &Node, pod: &Place, bridge: Bridge) -> anyhow::Result<Value> {
    let number = node.number;
    let range = |subnet: String, first: String| json!([{"subnet": subnet, "rangeStart": first}]);
    let configuration = json!({
        "cniVersion": VERSION,
        "name": format!("{}-pods", node.name),
        "type": "bridge",
        "bridge": "cni0",
        "isDefaultGateway": true,
        "hairpinMode": true,
        "mtu": bridge.mtu,
        "ipMasq": bridge.ip_masq,
        "ipam": {
            "type": "host-local",
            "dataDir": lab.dir.join("ipam"),
            "ranges": [
                range(format!("10.244.{number}.0/24"), format!("10.244.{number}.10")),
                range(format!("fd44:0:0:{number}::/64"), format!("fd44:0:0:{number}::10")),
            ],
        },
    });
    pod.ip(&["link set lo up"])?;
    let result = add(node, pod, "bridge", &configuration)?;
    let given: Vec<&str> =
        result["ips"].as_array().into_iter().flatten().filter_map(|ip| ip["address"].as_str()).collect();
    let planned = [format!("{}/24", pod.v4), format!("{}/64", pod.v6)];
    ensure!(given == planned, "host-local gave {given:?} to {}, not {planned:?}", pod.name);
    Ok(result)
}

/// A host port, for TCP and UDP, of a pod that a plugin has connected (`result`): `host` on the node is the pod's `port`.
pub fn map_port(node: &Node, pod: &Place, result: &Value, host: u16, port: u16) -> anyhow::Result<()> {
    let mapping = |protocol: &str| json!({"hostPort": host, "containerPort": port, "protocol": protocol});
    let configuration = json!({
        "cniVersion": VERSION,
        "name": format!("{}-pods", node.name),
        "type": "portmap",
        "snat": true,
        "capabilities": {"portMappings": true},
        "runtimeConfig": {"portMappings": [mapping("tcp"), mapping("udp")]},
        "prevResult": result,
    });
    add(node, pod, "portmap", &configuration).map(drop)
}

fn add(node: &Node, pod: &Place, plugin: &str, configuration: &Value) -> anyhow::Result<Value> {
    let environment = [
        "CNI_COMMAND=ADD".to_owned(),
        format!("CNI_CONTAINERID={}", pod.name),
        format!("CNI_NETNS={}", pod.netns().display()),
        "CNI_IFNAME=eth0".to_owned(),
        format!("CNI_PATH={DIRECTORY}"),
        // They call iptables, which is no user's command.
        format!("PATH=/usr/sbin:/sbin:{}", std::env::var("PATH").unwrap_or_default()),
        format!("{DIRECTORY}/{plugin}"),
    ];
    let words: Vec<&str> = environment.iter().map(String::as_str).collect();
    let said = node.host.run("env", &words, &configuration.to_string());
    let said = said.with_context(|| format!("the {plugin} plugin for {}", pod.name))?;
    serde_json::from_str(&said).with_context(|| format!("the {plugin} plugin said {said:?}"))
}
