//! `components/monitoring`: Prometheus' own parser reads every alert and every query of the dashboard, and evaluates them on
//! what a real daemon exposes. Each alert is silent on that, and fires when what it warns of is so.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::laboratory::api_cluster::ApiCluster;
use crate::laboratory::daemon::{Daemon, PATIENCE};
use crate::laboratory::{eventually, kustomize, process, skip};

/// What the PodMonitor adds to each series.
const TARGET: &str = "instance=\"172.31.0.11:10249\",job=\"kube-system/kubelane\",node=\"node1\"";
/// Minutes that series go on for.
const MINUTES: usize = 150;

fn component() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests/components/monitoring")
}

fn promtool() -> Option<PathBuf> {
    let unpacked = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/target/promtool"));
    if process::in_path("promtool") {
        return Some("promtool".into());
    }
    unpacked.exists().then_some(unpacked)
}

/// A series in promtool's notation: its name with labels, and its values.
type Series = (String, String);

/// What a daemon exposes, with the labels of its target, and that it could be asked. Everything stays as it is.
fn exposed() -> Option<Vec<Series>> {
    let cluster = ApiCluster::or_skip()?;
    let daemon: Daemon = cluster.start_with(&["--service-metrics", "2"]);
    for path in ["/healthz", "/livez"] {
        assert!(daemon.health(path).unwrap().contains("200 OK"));
    }
    cluster.ask(10);
    let mut text = String::new();
    assert!(eventually(PATIENCE, || {
        text = daemon.metrics().unwrap().split_once("\r\n\r\n").unwrap().1.to_owned();
        text.contains("map=\"affinities\"") && text.contains("kubelane_service_connections_total{")
    }));
    let samples = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let series = samples.map(|line| {
        let (name, value) = line.rsplit_once(' ').unwrap();
        let name = match name.strip_suffix('}') {
            Some(labelled) => format!("{labelled},{TARGET}}}"),
            None => format!("{name}{{{TARGET}}}"),
        };
        // promtool knows no exponents here.
        let value: f64 = value.parse().unwrap();
        (name, format!("{value}+0x{MINUTES}"))
    });
    Some(series.chain([(format!("up{{{TARGET}}}"), format!("1+0x{MINUTES}"))]).collect())
}

/// With other values for the series whose names have these beginnings: each has to be there.
fn changed(series: &[Series], changes: &[(&str, &str)]) -> Vec<Series> {
    let mut series = series.to_vec();
    for (beginning, values) in changes {
        let all: Vec<&mut Series> = series.iter_mut().filter(|(name, _)| name.starts_with(beginning)).collect();
        assert!(!all.is_empty(), "the daemon exposes no {beginning}");
        all.into_iter().for_each(|one| one.1 = format!("{values}x{MINUTES}"));
    }
    series
}

/// What `promtool test rules` says of one question to these series: nothing when it finds nothing.
fn ask(promtool: &Path, directory: &Path, series: &[Series], question: Value) -> String {
    let input: Vec<Value> = series.iter().map(|(name, values)| json!({"series": name, "values": values})).collect();
    let mut test = json!({"interval": "1m", "input_series": input});
    question.as_object().unwrap().iter().for_each(|(field, value)| test[field] = value.clone());
    let all = json!({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [test]});
    std::fs::write(directory.join("test.yaml"), all.to_string()).unwrap();
    let output = Command::new(promtool).args(["test", "rules", "test.yaml"]).current_dir(directory).output().unwrap();
    let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert!(output.status.success() || said.contains("got:"), "{question}: {said}");
    if output.status.success() { String::new() } else { said }
}

fn rules() -> Value {
    let [object] = <[Value; 1]>::try_from(kustomize::documents(&component().join("prometheusrule.yaml"))).unwrap();
    json!({"groups": object["spec"]["groups"]})
}

/// Beside its name: what makes it true.
const FIRED_BY: [(&str, &[(&str, &str)]); 16] = [
    ("KubelaneDown", &[("up{", "0+0")]),
    (
        "KubelaneUpdatesWait",
        &[("kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{ip_family=\"IPv4\"", "99999999999+0")],
    ),
    ("KubelaneSyncFailures", &[("kubelane_sync_failures_total", "0+1")]),
    ("KubelaneSourceDisconnected", &[("kubelane_source_connected{kind=\"services\"", "0+0")]),
    ("KubelaneUnserved", &[("kubelane_unserved{reason=\"contested\"", "1+0")]),
    ("KubelaneMapNearlyFull", &[("kubelane_map_entries{map=\"backends\"", "250000+0")]),
    ("KubelaneDegradedServices", &[("kubelane_degraded_services", "3+0")]),
    ("KubelaneDrops", &[("kubelane_datapath_verdicts_total{verdict=\"dropped_no_route\"", "0+60")]),
    ("KubelaneNoEndpoints", &[("kubelane_datapath_verdicts_total{verdict=\"refused_no_endpoint\"", "0+120")]),
    ("KubelaneFlowTableFull", &[("kubelane_datapath_verdicts_total{verdict=\"flow_table_full\"", "0+60")]),
    ("KubelaneSourcePortsScarce", &[("kubelane_snat_ports_used", "28000+0")]),
    ("KubelaneBackendMissing", &[("kubelane_datapath_verdicts_total{verdict=\"failed_backend_missing\"", "0+1")]),
    ("KubelaneDrift", &[("kubelane_drift_total{map=\"slots\"", "0+1")]),
    ("KubelaneAttachmentsTakenOff", &[("kubelane_attachments_restored_total{place=\"device\"", "0+1")]),
    (
        "KubelaneSlowProgramming",
        &[("kubeproxy_network_programming_duration_seconds_bucket{ip_family=\"IPv4\",le=\"+Inf\"", "0+60")],
    ),
    ("KubelaneAuditLate", &[("kubelane_last_audit_timestamp_seconds", "1+0")]),
];

#[test]
fn each_alert_is_silent_on_a_healthy_node_and_fires_on_what_it_warns_of() {
    let Some(promtool) = promtool() else { return skip("needs promtool (`make promtool` fetches it)") };
    let Some(series) = exposed() else { return };
    let directory = tempfile::tempdir().unwrap();
    let rules = rules();
    std::fs::write(directory.path().join("rules.yaml"), rules.to_string()).unwrap();
    let checked = Command::new(&promtool).args(["check", "rules"]).arg(directory.path().join("rules.yaml")).output();
    assert!(checked.as_ref().unwrap().status.success(), "{checked:?}");
    let rules = rules["groups"][0]["rules"].as_array().unwrap();
    let names: BTreeSet<&str> = rules.iter().map(|rule| rule["alert"].as_str().unwrap()).collect();
    assert_eq!(names, FIRED_BY.iter().map(|(name, _)| *name).collect());
    for rule in rules {
        let name = rule["alert"].as_str().unwrap();
        let question = || json!({"alert_rule_test": [{"alertname": name, "eval_time": "2h", "exp_alerts": []}]});
        assert_eq!(ask(&promtool, directory.path(), &series, question()), "", "{name} fires on a healthy node");
        let (_, changes) = FIRED_BY.iter().find(|(known, _)| *known == name).unwrap();
        let said = ask(&promtool, directory.path(), &changed(&series, changes), question());
        assert!(said.contains(&format!("alertname=\"{name}\"")), "{name} does not fire: {said}");
        for annotation in ["summary", "cause", "remedy"] {
            assert!(
                rule["annotations"][annotation].as_str().is_some_and(|text| text.len() > 20),
                "{name}: {annotation}"
            );
        }
        for broken in ["<no value>", "<error", "{{", " on :", " on  "] {
            assert!(!said.contains(broken), "{name}: a template leads nowhere: {said}");
        }
    }
}

#[test]
fn every_query_of_the_dashboard_has_data_of_a_daemon() {
    let Some(promtool) = promtool() else { return skip("needs promtool (`make promtool` fetches it)") };
    let Some(series) = exposed() else { return };
    // What a good day has none of.
    let series = changed(
        &series,
        &[
            ("kubelane_datapath_verdicts_total{verdict=\"dropped_no_route\"", "0+60"),
            ("kubelane_source_connected{kind=\"services\"", "0+0"),
            ("kubelane_drift_total{map=\"slots\"", "0+1"),
            ("kubelane_attachments_restored_total{place=\"device\"", "0+1"),
        ],
    );
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("rules.yaml"), "groups: []").unwrap();
    let text = std::fs::read_to_string(component().join("kubelane.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    let mut count = 0;
    for target in targets {
        let query = target["expr"].as_str().unwrap().replace("$node", ".*").replace("$__rate_interval", "5m");
        let question =
            |query: &str| json!({"promql_expr_test": [{"expr": query, "eval_time": "2h", "exp_samples": []}]});
        let said = ask(&promtool, directory.path(), &series, question(&query));
        assert!(said.contains("got:") && !said.contains("err:"), "{query}: no data: {said}");
        let labels: Vec<&str> = target["legendFormat"].as_str().unwrap().split("{{").skip(1).collect();
        for label in labels.iter().map(|label| label.split("}}").next().unwrap()) {
            assert!(said.contains(&format!("{label}=")), "{query} has no label {label}: {said}");
        }
        count += 1;
    }
    assert!(count > 18, "{count}");
    let nothing = json!({"promql_expr_test": [{"expr": "kubelane_nonsense", "eval_time": "2h", "exp_samples": []}]});
    assert_eq!(ask(&promtool, directory.path(), &series, nothing), "", "a metric that there is not has no data");
    let ids: BTreeSet<i64> = panels.iter().map(|panel| panel["id"].as_i64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len());
}

#[test]
fn the_component_finds_the_daemonset_by_its_labels_and_port() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
    std::fs::create_dir_all(&root).unwrap();
    let directory = tempfile::tempdir_in(root).unwrap();
    let up = "../../manifests";
    let composed = json!({"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
        "resources": [format!("{up}/base")], "components": [format!("{up}/components/monitoring")]});
    std::fs::write(directory.path().join("kustomization.yaml"), composed.to_string()).unwrap();
    let objects = kustomize::build(directory.path());
    let of = |kind: &str| objects.iter().find(|object| object["kind"] == kind).unwrap();
    let (monitor, daemonset, map) = (of("PodMonitor"), of("DaemonSet"), of("ConfigMap"));
    let pod = &daemonset["spec"]["template"];
    assert_eq!(monitor["metadata"]["namespace"], daemonset["metadata"]["namespace"]);
    let wanted = monitor["spec"]["selector"]["matchLabels"].as_object().unwrap();
    assert!(wanted.iter().all(|(label, value)| pod["metadata"]["labels"][label] == *value), "{wanted:?}");
    let port = &monitor["spec"]["podMetricsEndpoints"][0]["port"];
    let container = &pod["spec"]["containers"][0];
    let ports = container["ports"].as_array().unwrap();
    assert!(ports.iter().any(|known| known["name"] == *port), "{port}");
    let arguments = container["args"].as_array().unwrap();
    assert!(arguments.contains(&json!("--metrics-bind-address=0.0.0.0:10249")), "{arguments:?}");
    assert_eq!(map["metadata"]["labels"]["grafana_dashboard"], "1");
    let dashboard: Value = serde_json::from_str(map["data"]["kubelane.json"].as_str().unwrap()).unwrap();
    assert_eq!(dashboard["uid"], "kubelane");
    assert_eq!(of("PrometheusRule")["apiVersion"], "monitoring.coreos.com/v1");
}
