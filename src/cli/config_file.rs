//! KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1), the file behind `--config`, as kubeadm writes it.
//!
//! One table says of every field what its values look like and whether it means something here. Zero values (null, "",
//! 0, 0s, false) are kube-proxy's way of writing "not set", and kubeadm writes all of them. Like kube-proxy, which reads
//! this version leniently, it passes over fields that are not known, and names them.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde_norway::{Mapping, Value};

use super::address::{BindAddress, HEALTHZ_PORT, METRICS_PORT, bind_address};
use super::flags::LogFormat;
use super::lenient_yaml;
use super::traffic::{TableFlags, TimeoutFlags};
use super::value::{LOCAL_MODES, MODES, Sort, is_duration, is_zero_duration, timeout};
use crate::netdev::NodePortAddresses;

const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
const KIND: &str = "KubeProxyConfiguration";

/// Every field and what its values look like. Those that [`ConfigFile`] has are used; the others are named in a
/// warning when they are set. The last three were kube-proxy's once, and kubeadm carries them from old clusters on.
const FIELDS: [(&str, Sort); 66] = [
    ("clientConnection.acceptContentTypes", Sort::Text),
    ("clientConnection.burst", Sort::Number),
    ("clientConnection.contentType", Sort::Text),
    ("clientConnection.kubeconfig", Sort::Text),
    ("clientConnection.qps", Sort::Number),
    ("bindAddress", Sort::Text),
    ("bindAddressHardFail", Sort::Bool),
    ("clusterCIDR", Sort::Cidrs),
    ("configSyncPeriod", Sort::Duration),
    ("conntrack.maxPerCore", Sort::Number),
    ("conntrack.min", Sort::Number),
    ("conntrack.tcpBeLiberal", Sort::Bool),
    ("conntrack.tcpCloseWaitTimeout", Sort::Duration),
    ("conntrack.tcpEstablishedTimeout", Sort::Duration),
    ("conntrack.udpStreamTimeout", Sort::Duration),
    ("conntrack.udpTimeout", Sort::Duration),
    ("detectLocal.bridgeInterface", Sort::Text),
    ("detectLocal.interfaceNamePrefix", Sort::Text),
    ("detectLocalMode", LOCAL_MODES),
    ("enableProfiling", Sort::Bool),
    ("featureGates", Sort::Gates),
    ("healthzBindAddress", Sort::Text),
    ("hostnameOverride", Sort::Text),
    ("iptables.localhostNodePorts", Sort::Bool),
    ("iptables.masqueradeAll", Sort::Bool),
    ("iptables.masqueradeBit", Sort::Number),
    ("iptables.minSyncPeriod", Sort::Duration),
    ("iptables.snatNodeInternalIP", Sort::Bool),
    ("iptables.syncPeriod", Sort::Duration),
    ("ipvs.excludeCIDRs", Sort::CidrList),
    ("ipvs.minSyncPeriod", Sort::Duration),
    ("ipvs.scheduler", Sort::Text),
    ("ipvs.strictARP", Sort::Bool),
    ("ipvs.syncPeriod", Sort::Duration),
    ("ipvs.tcpFinTimeout", Sort::Duration),
    ("ipvs.tcpTimeout", Sort::Duration),
    ("ipvs.udpTimeout", Sort::Duration),
    ("logging.flushFrequency", Sort::Duration),
    ("logging.format", Sort::OneOf(&["text", "json"])),
    ("logging.options.json.infoBufferSize", Sort::Text),
    ("logging.options.json.splitStream", Sort::Bool),
    ("logging.options.text.infoBufferSize", Sort::Text),
    ("logging.options.text.splitStream", Sort::Bool),
    ("logging.verbosity", Sort::Number),
    ("logging.vmodule", Sort::List),
    ("metricsBindAddress", Sort::Text),
    ("mode", MODES),
    ("nftables.masqueradeAll", Sort::Bool),
    ("nftables.masqueradeBit", Sort::Number),
    ("nftables.minSyncPeriod", Sort::Duration),
    ("nftables.syncPeriod", Sort::Duration),
    ("nodePortAddresses", Sort::List),
    ("oomScoreAdj", Sort::Number),
    ("portRange", Sort::Text),
    ("showHiddenMetricsForVersion", Sort::Text),
    ("windowsRunAsService", Sort::Bool),
    ("winkernel.enableDSR", Sort::Bool),
    ("winkernel.forwardHealthCheckVip", Sort::Bool),
    ("winkernel.networkName", Sort::Text),
    ("winkernel.rootHnsEndpointName", Sort::Text),
    ("winkernel.sourceVip", Sort::Text),
    ("apiVersion", Sort::OneOf(&[API_VERSION])),
    ("kind", Sort::OneOf(&[KIND])),
    ("udpIdleTimeout", Sort::Duration),
    ("conntrack.max", Sort::Number),
    ("resourceContainer", Sort::Text),
];

/// Fields of which kube-proxy tells zero from nothing: the node's sysctl stays as it is.
const ZERO_SAYS_SOMETHING: [&str; 4] =
    ["conntrack.maxPerCore", "conntrack.min", "conntrack.tcpEstablishedTimeout", "conntrack.tcpCloseWaitTimeout"];

/// What the file says; `None` where it says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfigFile {
    pub kubeconfig: Option<PathBuf>,
    pub bind_address: Option<IpAddr>,
    pub bind_address_hard_fail: Option<bool>,
    pub healthz: Option<BindAddress>,
    pub metrics: Option<BindAddress>,
    pub hostname_override: Option<String>,
    pub nodeport_addresses: Option<NodePortAddresses>,
    pub oom_score_adj: Option<i16>,
    pub tcp_be_liberal: Option<bool>,
    pub masquerade_all: Option<bool>,
    pub timeouts: TimeoutFlags,
    pub table: TableFlags,
    pub verbosity: Option<u8>,
    pub log_format: Option<LogFormat>,
    /// Fields that are set and have no meaning here.
    pub ignored: Vec<String>,
    /// What kube-proxy's strict reader would refuse, with what becomes of it.
    pub odd: Vec<String>,
}

impl ConfigFile {
    /// # Errors
    /// When the file cannot be read, or a field of it; the message names both.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|error| format!("--config {}: {error}", path.display()))?;
        Self::parse(&text).map_err(|error| format!("--config {}: {error}", path.display()))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let (value, odd) = lenient_yaml::read(text).map_err(|error| error.to_string())?;
        let Value::Mapping(mapping) = value else { return Err(format!("not a {KIND}")) };
        for (field, expected) in [("apiVersion", API_VERSION), ("kind", KIND)] {
            let found = mapping.get(field).and_then(Value::as_str).unwrap_or_default();
            if found != expected {
                return Err(format!("{field} {found:?} is not valid: expected {expected}"));
            }
        }
        let mut config = ConfigFile { odd, ..ConfigFile::default() };
        config.walk("", &mapping)?;
        Ok(config)
    }

    fn walk(&mut self, above: &str, mapping: &Mapping) -> Result<(), String> {
        for (key, value) in mapping {
            let path = lenient_yaml::below(above, key.as_str().unwrap_or_default());
            match FIELDS.iter().find(|(name, _)| *name == path) {
                Some((_, sort)) => self.field(&path, *sort, value).map_err(|error| format!("{path}: {error}"))?,
                None => match value {
                    Value::Mapping(inner) if is_section(&path) => self.walk(&path, inner)?,
                    Value::Null if is_section(&path) => {}
                    _ if is_section(&path) => return Err(format!("{path}: expected an object")),
                    _ => self.odd.push(format!("{path} (unknown field)")),
                },
            }
        }
        Ok(())
    }

    /// Takes one field over, or notes that it has no meaning here.
    fn field(&mut self, path: &str, sort: Sort, value: &Value) -> Result<(), String> {
        if matches!(path, "apiVersion" | "kind") {
            return Ok(());
        }
        if path == "iptables.localhostNodePorts" && *value == Value::Bool(false) {
            self.ignored.push(path.to_owned());
        }
        let text = match read(sort, value)? {
            Some(text) => text,
            None if ZERO_SAYS_SOMETHING.contains(&path) && !value.is_null() => "0".to_owned(),
            None => return Ok(()),
        };
        match path {
            "clientConnection.kubeconfig" => self.kubeconfig = Some(text.into()),
            "bindAddress" => {
                let bad = |_| format!("{text:?} is not valid: expected an IP address");
                self.bind_address = Some(text.parse().map_err(bad)?);
            }
            "bindAddressHardFail" => self.bind_address_hard_fail = Some(true),
            "healthzBindAddress" => self.healthz = Some(address(&text, HEALTHZ_PORT)?),
            "metricsBindAddress" => self.metrics = Some(address(&text, METRICS_PORT)?),
            "hostnameOverride" => self.hostname_override = Some(text),
            "nodePortAddresses" => self.nodeport_addresses = Some(text.parse()?),
            "oomScoreAdj" => self.oom_score_adj = Some(integer(&text, -1000, 1000)? as i16),
            "conntrack.maxPerCore" => self.table.max_per_core = Some(integer(&text, 0, i32::MAX.into())? as u32),
            "conntrack.min" => self.table.min = Some(integer(&text, 0, i32::MAX.into())? as u32),
            "conntrack.tcpBeLiberal" => self.tcp_be_liberal = Some(true),
            // That of another mode than the file's says what its owner wants all the same.
            "iptables.masqueradeAll" | "nftables.masqueradeAll" => self.masquerade_all = Some(true),
            "conntrack.tcpEstablishedTimeout" => self.timeouts.tcp_established = Some(timeout(&text)?),
            "conntrack.tcpCloseWaitTimeout" => self.timeouts.tcp_close_wait = Some(timeout(&text)?),
            "conntrack.udpTimeout" => self.timeouts.udp = Some(timeout(&text)?),
            "conntrack.udpStreamTimeout" => self.timeouts.udp_stream = Some(timeout(&text)?),
            "logging.verbosity" => self.verbosity = Some(integer(&text, 0, u8::MAX.into())? as u8),
            "logging.format" => {
                self.log_format = Some(if text == "json" { LogFormat::Json } else { LogFormat::Human });
            }
            // What kubelane does anyway.
            "iptables.localhostNodePorts" => {}
            _ => self.ignored.push(path.to_owned()),
        }
        Ok(())
    }
}

/// The value as a flag would have it; `None` when it means "not set".
fn read(sort: Sort, value: &Value) -> Result<Option<String>, String> {
    let text = match (sort, value) {
        (_, Value::Null) => return Ok(None),
        (Sort::Bool, Value::Bool(on)) => on.to_string(),
        (Sort::Number, Value::Number(number)) => number.to_string(),
        // Go's own JSON for durations: nanoseconds.
        (Sort::Duration, Value::Number(number)) => format!("{number}ns"),
        (Sort::Text, Value::Number(number)) => number.to_string(),
        (Sort::Text | Sort::Duration | Sort::Cidrs | Sort::OneOf(_), Value::String(text)) => text.clone(),
        (Sort::List | Sort::CidrList, Value::Sequence(items)) => list(sort, items)?,
        (Sort::Gates, Value::Mapping(gates)) => gate_list(gates)?,
        _ => return Err(sort.allowed()),
    };
    sort.check(&text)?;
    let is_set = match sort {
        Sort::Bool => text == "true",
        Sort::Number => text.parse::<f64>().is_ok_and(|number| number != 0.0),
        Sort::Duration => is_duration(&text) && !is_zero_duration(&text),
        _ => !text.is_empty() && text != "0",
    };
    Ok(is_set.then_some(text))
}

fn list(sort: Sort, items: &[Value]) -> Result<String, String> {
    let texts: Option<Vec<&str>> = match sort {
        Sort::CidrList => items.iter().map(Value::as_str).collect(),
        // Lists of objects (vmodule) are of no use here; that there is one is all that counts.
        _ => items.iter().map(|item| if item.is_mapping() { Some("{}") } else { item.as_str() }).collect(),
    };
    texts.map(|texts| texts.join(",")).ok_or_else(|| sort.allowed())
}

fn gate_list(gates: &Mapping) -> Result<String, String> {
    let gate = |(name, on): (&Value, &Value)| Some(format!("{}={}", name.as_str()?, on.as_bool()?));
    let gates: Option<Vec<String>> = gates.iter().map(gate).collect();
    gates.map(|gates| gates.join(",")).ok_or_else(|| Sort::Gates.allowed())
}

/// In the file, "" is the default: there, port 0 is the only way to turn a server off.
fn address(text: &str, default_port: u16) -> Result<BindAddress, String> {
    bind_address(text, default_port).map_err(|allowed| format!("{text:?} is not valid: {allowed}"))
}

fn integer(text: &str, least: i64, most: i64) -> Result<i64, String> {
    let number = text.parse().ok().filter(|number| (least..=most).contains(number));
    number.ok_or_else(|| format!("{text} is not valid: expected {least} to {most}"))
}

fn is_section(path: &str) -> bool {
    FIELDS.iter().any(|(name, _)| name.strip_prefix(path).is_some_and(|rest| rest.starts_with('.')))
}

#[cfg(test)]
#[path = "config_file_tests.rs"]
mod tests;
