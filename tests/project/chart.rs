//! The Helm chart, rendered by Helm: with its defaults it is `manifests/base`, with the values that stand for them the
//! overlays and components, and every value does what it says. Without helm on this machine all of it is skipped.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::laboratory::{kustomize, skip};
use serde_json::{Value, json};

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn run(values: &Value) -> (tempfile::TempDir, Output) {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = directory.path().join("values.json");
    fs::write(&file, values.to_string()).unwrap();
    let output = Command::new(repository().join("release/helm-template")).arg(file).output().unwrap();
    (directory, output)
}

/// The objects that the chart makes; `None`, with a note, where there is no helm.
fn render(values: &Value) -> Option<Vec<Value>> {
    let (directory, output) = run(values);
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(3) {
        skip(said.lines().last().unwrap_or("no helm"));
        return None;
    }
    assert!(output.status.success(), "{values}: {said}");
    let file = directory.path().join("rendered.yaml");
    fs::write(&file, output.stdout).unwrap();
    Some(kustomize::documents(&file).into_iter().filter(|object| !object.is_null()).collect())
}

fn sorted(mut objects: Vec<Value>) -> Vec<Value> {
    objects.sort_by_key(|object| format!("{}/{}", object["kind"], object["metadata"]["name"]));
    objects
}

fn manifests(name: &str) -> PathBuf {
    repository().join("manifests").join(name)
}

/// The base with components.
fn composed(overlay: &str, components: &[&str]) -> Vec<Value> {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let depth = directory.path().strip_prefix(repository()).unwrap().components().count();
    let at = |name: &&str| format!("{}manifests/{name}", "../".repeat(depth));
    let kustomization = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
        "resources": [at(&overlay)], "components": components.iter().map(at).collect::<Vec<_>>(),
    });
    fs::write(directory.path().join("kustomization.yaml"), kustomization.to_string()).unwrap();
    kustomize::build(directory.path())
}

/// Two lists of objects are the same, whatever their order.
fn assert_same(chart: Vec<Value>, kustomize: Vec<Value>, what: &str) {
    let (chart, kustomize) = (sorted(chart), sorted(kustomize));
    let names = |objects: &[Value]| objects.iter().map(|o| o["kind"].to_string()).collect::<Vec<_>>();
    assert_eq!(names(&chart), names(&kustomize), "{what}");
    for (chart, kustomize) in chart.iter().zip(&kustomize) {
        assert_eq!(chart, kustomize, "{what}: {}", chart["kind"]);
    }
}

#[test]
fn the_chart_makes_what_the_overlays_and_components_make() {
    for (values, overlay, components) in [
        (json!({}), "base", &[][..]),
        (json!({"kubeadm": true}), "overlays/kubeadm", &[]),
        (json!({"apiServer": "https://127.0.0.1:6444"}), "overlays/k3s", &[]),
        (json!({"startupTaint": "kubelane-not-ready"}), "base", &["components/startup-taint"]),
        (json!({"oldKernels": true}), "base", &["components/old-kernels"]),
        (json!({"openshift": true}), "base", &["components/openshift"]),
        (json!({"podMonitor": {"enabled": true}}), "base", &["components/pod-monitor"]),
    ] {
        let Some(chart) = render(&values) else { return };
        assert_same(chart, composed(overlay, components), &values.to_string());
    }
}

/// Values, the kind of the object in which they show, where in it, and what is there then.
type Case = (Value, &'static str, &'static str, Value);

fn cases() -> Vec<Case> {
    let of_image = |image| json!({"image": image});
    let of_monitor = |mut monitor: Value| {
        monitor["enabled"] = json!(true);
        json!({"podMonitor": monitor})
    };
    let (pod, container) = ("/spec/template/spec", "/spec/template/spec/containers/0");
    let affinity =
        json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}});
    let toleration = json!([{"key": "a", "operator": "Exists"}]);
    let mut cases = Vec::new();
    let mut add = |values: Value, kind, at: String, expected: Value| {
        cases.push((values, kind, &*Box::leak(at.into_boxed_str()), expected));
    };
    let mut set = |values: Value, at: &str, expected: Value| add(values, "DaemonSet", at.to_owned(), expected);
    set(
        of_image(json!({"repository": "a.example:5000/b"})),
        &format!("{container}/image"),
        json!("a.example:5000/b:0.1.0"),
    );
    set(of_image(json!({"tag": "1: #x"})), &format!("{container}/image"), json!("kubelane:1: #x"));
    set(of_image(json!({"pullPolicy": "Never"})), &format!("{container}/imagePullPolicy"), json!("Never"));
    set(json!({"imagePullSecrets": [{"name": "s"}]}), &format!("{pod}/imagePullSecrets"), json!([{"name": "s"}]));
    set(json!({"apiServer": "https://a"}), &format!("{pod}/volumes/0/configMap/name"), json!("kubelane"));
    set(json!({"kubeadm": true}), &format!("{pod}/volumes/0/configMap/name"), json!("kube-proxy"));
    set(json!({"configMap": "yes"}), &format!("{pod}/volumes/0/configMap/name"), json!("yes"));
    set(
        json!({"extraArgs": ["-v=4", "--devices=eth0: #"]}),
        &format!("{container}/args/3"),
        json!("--devices=eth0: #"),
    );
    set(json!({"startupTaint": "a: b"}), &format!("{container}/args/2"), json!("--startup-taint=a: b"));
    set(json!({"oldKernels": true}), &format!("{container}/securityContext/capabilities/add/5"), json!("SYS_RESOURCE"));
    set(json!({"maxUnavailable": 3}), "/spec/updateStrategy/rollingUpdate/maxUnavailable", json!(3));
    set(json!({"maxUnavailable": "20%"}), "/spec/updateStrategy/rollingUpdate/maxUnavailable", json!("20%"));
    set(json!({"priorityClassName": "true"}), &format!("{pod}/priorityClassName"), json!("true"));
    set(json!({"nodeSelector": {"a": "1"}}), &format!("{pod}/nodeSelector/a"), json!("1"));
    set(json!({"tolerations": toleration}), &format!("{pod}/tolerations"), toleration.clone());
    set(json!({"affinity": affinity}), &format!("{pod}/affinity"), affinity.clone());
    set(json!({"podAnnotations": {"a/b": "on"}}), "/spec/template/metadata/annotations/a~1b", json!("on"));
    set(json!({"podLabels": {"a": "on"}}), "/spec/template/metadata/labels/a", json!("on"));
    set(
        json!({"resources": {"limits": {"memory": "1Gi"}}}),
        &format!("{container}/resources/limits/memory"),
        json!("1Gi"),
    );
    let scc = "SecurityContextConstraints";
    add(json!({"openshift": true}), scc, "/allowPrivilegedContainer".to_owned(), json!(false));
    let endpoint = "/spec/podMetricsEndpoints/0";
    add(of_monitor(json!({})), "PodMonitor", format!("{endpoint}/port"), json!("metrics"));
    add(of_monitor(json!({"interval": "5s"})), "PodMonitor", format!("{endpoint}/interval"), json!("5s"));
    add(of_monitor(json!({"labels": {"a": "no"}})), "PodMonitor", "/metadata/labels/a".to_owned(), json!("no"));
    cases
}

/// The names of values: of maps that have documented members (their defaults are not empty), the members'.
fn names(values: &Value) -> BTreeSet<String> {
    let is_group = |name: &str| ["image", "podMonitor"].contains(&name);
    let of_one = |(name, value): (&String, &Value)| match value {
        Value::Object(members) if is_group(name) => members.keys().map(|member| format!("{name}.{member}")).collect(),
        _ => vec![name.clone()],
    };
    values.as_object().unwrap().iter().flat_map(of_one).collect()
}

#[test]
fn every_value_has_a_case_and_shows_where_it_should() {
    let documented = names(&kustomize::documents(&manifests("chart/values.yaml"))[0]);
    let tried: BTreeSet<String> = cases().iter().flat_map(|(values, ..)| names(values)).collect();
    assert_eq!(tried, documented);
    let Some(default) = render(&json!({})) else { return };
    for (values, kind, at, expected) in cases() {
        let Some(objects) = render(&values) else { return };
        let found =
            |objects: &[Value]| objects.iter().find_map(|o| (o["kind"] == kind).then(|| o.pointer(at).cloned())?);
        assert_eq!(found(&objects), Some(expected), "{values}");
        assert_ne!(sorted(objects), sorted(default.clone()), "{values} changes something");
    }
}

#[test]
fn values_that_are_misspelt_or_make_no_sense_are_refused_by_name() {
    if render(&json!({})).is_none() {
        return;
    }
    for (values, named) in [
        (json!({"apiServr": "https://a"}), "apiServr"),
        (json!({"image": {"tags": "1"}}), "tags"),
        (json!({"apiServer": "10.0.0.1"}), "apiServer"),
        (json!({"apiServer": "https://a:"}), "apiServer"),
        (json!({"apiServer": "https://a", "kubeadm": true}), "give one of them"),
        (json!({"extraArgs": ["run"]}), "extraArgs"),
        (json!({"apiServer": "https://a\n        insecure: true"}), "apiServer"),
        (json!({"podMonitor": {"enabled": "yes"}}), "enabled"),
        (json!({"podLabels": {"app.kubernetes.io/name": "another"}}), "app.kubernetes.io/name"),
    ] {
        let (_, output) = run(&values);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(named), "{values}: {said}");
    }
}

#[test]
fn the_chart_has_the_version_of_this_tree() {
    let chart = &kustomize::documents(&manifests("chart/Chart.yaml"))[0];
    assert_eq!(chart["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
}
