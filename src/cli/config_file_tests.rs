use std::time::Duration;

use super::*;

/// The file that the kubelet mounts from kubeadm's ConfigMap.
fn kubeadm() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/kubeadm/kube-proxy-configmap.yaml");
    let map: Value = serde_norway::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    map["data"]["config.conf"].as_str().unwrap().to_owned()
}

fn config(body: &str) -> Result<ConfigFile, String> {
    ConfigFile::parse(&format!("apiVersion: {API_VERSION}\nkind: {KIND}\n{body}"))
}

#[test]
fn kubeadms_file_names_a_kubeconfig_and_leaves_everything_else_open() {
    let expected = ConfigFile {
        masquerade_all: None,
        kubeconfig: Some("/var/lib/kube-proxy/kubeconfig.conf".into()),
        bind_address: Some("0.0.0.0".parse().unwrap()),
        ignored: vec!["clusterCIDR".to_owned()],
        ..ConfigFile::default()
    };
    assert_eq!(ConfigFile::parse(&kubeadm()).unwrap(), expected);
}

#[test]
fn what_applies_is_taken_over() {
    let full = "
bindAddress: '::'
bindAddressHardFail: true
iptables: {localhostNodePorts: true}
clientConnection: {kubeconfig: /etc/k, qps: 0}
healthzBindAddress: 0.0.0.0:11256
metricsBindAddress: '127.0.0.1:0'
hostnameOverride: node-a
logging: {format: json, verbosity: 4}
nodePortAddresses: [10.0.0.0/8, 'fd00::/8']
oomScoreAdj: -999
conntrack:
  {tcpEstablishedTimeout: 2h, tcpCloseWaitTimeout: 0s, udpTimeout: 45000000000, udpStreamTimeout: null, tcpBeLiberal: true,
   maxPerCore: 0, min: 9}
";
    let expected = ConfigFile {
        kubeconfig: Some("/etc/k".into()),
        bind_address: Some("::".parse().unwrap()),
        bind_address_hard_fail: Some(true),
        healthz: Some(BindAddress(Some("0.0.0.0:11256".parse().unwrap()))),
        metrics: Some(BindAddress(None)),
        hostname_override: Some("node-a".into()),
        nodeport_addresses: Some("10.0.0.0/8,fd00::/8".parse().unwrap()),
        oom_score_adj: Some(-999),
        verbosity: Some(4),
        log_format: Some(LogFormat::Json),
        tcp_be_liberal: Some(true),
        masquerade_all: None,
        timeouts: TimeoutFlags {
            tcp_established: Some(Duration::from_secs(7200)),
            tcp_close_wait: Some(Duration::ZERO),
            udp: Some(Duration::from_secs(45)),
            udp_stream: None,
        },
        table: TableFlags { max_per_core: Some(0), min: Some(9) },
        ignored: vec![],
        odd: vec![],
    };
    assert_eq!(config(full).unwrap(), expected);
    let primary = config("nodePortAddresses: [primary]").unwrap();
    assert_eq!(primary.nodeport_addresses, Some(NodePortAddresses::Primary));
}

#[test]
fn what_cannot_apply_is_named_when_it_is_set() {
    let set = "
mode: ipvs
ipvs: {scheduler: rr, strictARP: true, excludeCIDRs: [10.0.0.0/8], syncPeriod: 30s, tcpTimeout: 0s}
iptables: {masqueradeBit: 14, minSyncPeriod: 1000000000, localhostNodePorts: false}
conntrack: {maxPerCore: null, tcpEstablishedTimeout: 24h0m0s, max: 5}
featureGates: {A: true}
logging: {vmodule: [{filePattern: x, verbosity: 3}], flushFrequency: 5s}
winkernel: {networkName: x}
detectLocal:
udpIdleTimeout: 250ms
";
    let mut ignored = config(set).unwrap().ignored;
    ignored.sort();
    let expected = [
        "conntrack.max",
        "featureGates",
        "iptables.localhostNodePorts",
        "iptables.masqueradeBit",
        "iptables.minSyncPeriod",
        "ipvs.excludeCIDRs",
        "ipvs.scheduler",
        "ipvs.strictARP",
        "ipvs.syncPeriod",
        "logging.flushFrequency",
        "logging.vmodule",
        "mode",
        "udpIdleTimeout",
        "winkernel.networkName",
    ];
    assert_eq!(ignored, expected);
}

#[test]
fn a_field_that_is_not_readable_is_named_with_what_is_allowed() {
    let table = [
        ("ipvs: [1]", "ipvs: expected an object"),
        ("ipvs: rr", "ipvs: expected an object"),
        ("mode: IPVS", "mode: \"IPVS\" is not valid: expected one of iptables, ipvs, nftables"),
        ("detectLocalMode: x", "detectLocalMode: \"x\" is not valid: expected one of ClusterCIDR, NodeCIDR"),
        ("iptables: {masqueradeBit: fourteen}", "iptables.masqueradeBit: expected a number"),
        ("iptables: {syncPeriod: soon}", "iptables.syncPeriod: \"soon\" is not valid: expected a duration such as"),
        ("conntrack: {maxPerCore: -1}", "conntrack.maxPerCore: -1 is not valid: expected 0 to 2147483647"),
        ("enableProfiling: maybe", "enableProfiling: expected true or false"),
        ("bindAddress: here", "bindAddress: \"here\" is not valid: expected an IP address"),
        ("healthzBindAddress: here:1", "healthzBindAddress: \"here:1\" is not valid: expected IP:PORT"),
        ("nodePortAddresses: [10.0.0.1]", "nodePortAddresses: \"10.0.0.1\" is not a CIDR; allowed are `primary`"),
        ("nodePortAddresses: all", "nodePortAddresses: expected a list"),
        ("clusterCIDR: 10.0.0.1", "clusterCIDR: \"10.0.0.1\" is not valid: expected CIDRs"),
        ("oomScoreAdj: -1001", "oomScoreAdj: -1001 is not valid: expected -1000 to 1000"),
        ("conntrack: {udpTimeout: 500ms}", "conntrack.udpTimeout: \"500ms\" is not valid: expected 1s to 720h"),
        (
            "conntrack: {tcpCloseWaitTimeout: -1s}",
            "conntrack.tcpCloseWaitTimeout: \"-1s\" is not valid: expected 1s to 720h",
        ),
        ("conntrack: {tcpEstablishedTimeout: 721h}", "conntrack.tcpEstablishedTimeout: \"721h\" is not valid"),
        ("logging: {format: xml}", "logging.format: \"xml\" is not valid: expected one of text, json"),
        ("logging: {verbosity: 1.5}", "logging.verbosity: 1.5 is not valid"),
        ("featureGates: {A: x}", "featureGates: expected NAME=true or NAME=false"),
        ("ipvs: {excludeCIDRs: [1]}", "ipvs.excludeCIDRs: expected a list of CIDRs"),
        ("oomScoreAdj: 1\noomScoreAdj: 5000", "oomScoreAdj: 5000 is not valid"),
        ("? [1]\n: x", "a field name is not a string"),
        ("a: [", "at line 4"),
    ];
    for (body, expected) in table {
        let error = config(body).unwrap_err();
        assert!(error.contains(expected), "{body}: {error}");
    }
    for (text, expected) in [
        ("[]", "not a KubeProxyConfiguration"),
        ("kind: KubeProxyConfiguration", "apiVersion \"\" is not valid: expected kubeproxy.config.k8s.io/v1alpha1"),
        ("{apiVersion: kubeproxy.config.k8s.io/v1alpha1, kind: KubeletConfiguration}", "kind \"KubeletConfiguration\""),
        ("apiVersion: kubeproxy.config.k8s.io/v1alpha2", "v1alpha2"),
    ] {
        let error = ConfigFile::parse(text).unwrap_err();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn what_a_strict_reader_would_refuse_is_named_and_read_as_kube_proxy_does() {
    let odd = "
metadata: {name: x}
creationTimestamp: null
ipvs: {schedular: rr, syncPeriod: 30s}
1: x
hostnameOverride: first
hostnameOverride: last
conntrack: {udpTimeout: 5s, tcpEstablishedTimeout: 2h}
conntrack: {udpTimeout: 5s, udpTimeout: 6s}
";
    let text = format!("\u{feff}apiVersion: {API_VERSION}\nkind: {KIND}\n{odd}---\nkind: Other\n");
    let found = ConfigFile::parse(&text).unwrap();
    assert_eq!(
        (found.hostname_override.as_deref(), found.ignored.as_slice()),
        (Some("last"), &["ipvs.syncPeriod".to_owned()][..])
    );
    let timeouts = TimeoutFlags { udp: Some(Duration::from_secs(6)), ..TimeoutFlags::default() };
    assert_eq!(found.timeouts, timeouts, "the last section counts, and not what the one before said");
    let expected = [
        "a byte-order mark at the beginning (skipped)",
        "hostnameOverride (given twice: the last one counts)",
        "conntrack.udpTimeout (given twice: the last one counts)",
        "conntrack (given twice: the last one counts)",
        "a second document (not read)",
        "metadata (unknown field)",
        "creationTimestamp (unknown field)",
        "ipvs.schedular (unknown field)",
        "1 (unknown field)",
    ];
    assert_eq!(found.odd, expected);
}

#[test]
fn a_value_of_another_sort_in_any_field_is_an_error_that_names_the_field() {
    for (field, _) in FIELDS.iter().filter(|(field, _)| !["apiVersion", "kind"].contains(field)) {
        let steps: Vec<&str> = field.split('.').collect();
        let nested = |value: &str| {
            let inner = steps.iter().rev().fold(value.to_owned(), |inner, step| format!("{{{step}: {inner}}}"));
            inner[1..inner.len() - 1].to_owned()
        };
        for bad in ["{x: {y: 1}}", "[[1]]"] {
            let error = config(&nested(bad)).unwrap_err();
            assert!(error.starts_with(&format!("{field}: ")), "{field}: {error}");
        }
        assert!(config(&nested("null")).unwrap().ignored.is_empty(), "{field}");
    }
}
