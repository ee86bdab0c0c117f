//! `manifests/`: that every object is one that Kubernetes knows, field by field; that overlays and components apply;
//! and that what they say of the daemon (arguments, ports, capabilities, paths, rights) is what the daemon and
//! docs/REFERENCE.md say.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command as Process;

use crate::laboratory::{kustomize, skip};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Container, PodSpec, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use kubelane::cli::{self, Command};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

const OVERLAYS: [&str; 3] = ["base", "overlays/kubeadm", "overlays/k3s"];
const COMPONENTS: [&str; 5] = [
    "components/startup-taint",
    "components/node-by-node",
    "components/old-kernels",
    "components/openshift",
    "components/pod-monitor",
];
const JOBS: [&str; 2] = ["migration/kube-proxy-cleanup.yaml", "migration/kubelane-cleanup.yaml"];

fn manifests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests")
}

/// An overlay with components, as README has an operator write it.
fn composed(overlay: &str, components: &[&str]) -> tempfile::TempDir {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    // kustomize knows relative paths only.
    let depth = directory.path().strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap().components().count();
    let at = |name: &&str| format!("{}manifests/{name}", "../".repeat(depth));
    let kustomization = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
        "resources": [at(&overlay)], "components": components.iter().map(at).collect::<Vec<_>>(),
    });
    std::fs::write(directory.path().join("kustomization.yaml"), kustomization.to_string()).unwrap();
    directory
}

/// Reads an object as its type, and complains of whatever the type has no field for.
fn strict<T: DeserializeOwned + Serialize>(object: &Value) -> T {
    let typed: T = T::deserialize(object).unwrap_or_else(|error| panic!("{error}: {object:#}"));
    let known = serde_json::to_value(&typed).unwrap();
    let lost = lost("", object, &known);
    assert!(lost.is_empty(), "not fields of {} {}: {lost:?}", object["kind"], object["metadata"]["name"]);
    typed
}

/// The paths of `given` that are not in `known`, or are something else there.
fn lost(path: &str, given: &Value, known: &Value) -> Vec<String> {
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => given
            .iter()
            .flat_map(|(key, value)| lost(&format!("{path}.{key}"), value, known.get(key).unwrap_or(&Value::Null)))
            .collect(),
        (Value::Array(given), Value::Array(known)) if given.len() == known.len() => {
            given.iter().zip(known).enumerate().flat_map(|(n, (a, b))| lost(&format!("{path}[{n}]"), a, b)).collect()
        }
        _ if given == known => Vec::new(),
        _ => vec![path.to_owned()],
    }
}

fn strict_by_kind(object: &Value) {
    match (object["apiVersion"].as_str().unwrap(), object["kind"].as_str().unwrap()) {
        ("apps/v1", "DaemonSet") => drop(strict::<DaemonSet>(object)),
        ("batch/v1", "Job") => drop(strict::<Job>(object)),
        ("v1", "ConfigMap") => drop(strict::<ConfigMap>(object)),
        ("v1", "ServiceAccount") => drop(strict::<ServiceAccount>(object)),
        ("rbac.authorization.k8s.io/v1", "ClusterRole") => drop(strict::<ClusterRole>(object)),
        ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding") => drop(strict::<ClusterRoleBinding>(object)),
        // Other people's kinds, with no types here: what they say is compared with the DaemonSet below.
        ("security.openshift.io/v1", "SecurityContextConstraints") | ("monitoring.coreos.com/v1", "PodMonitor") => {}
        kind => panic!("unexpected: {kind:?}"),
    }
}

/// The one object of a kind.
fn of_kind<T: DeserializeOwned + Serialize>(objects: &[Value], kind: &str) -> T {
    let found: Vec<&Value> = objects.iter().filter(|object| object["kind"] == kind).collect();
    assert_eq!(found.len(), 1, "{kind}");
    strict(found[0])
}

fn pod(objects: &[Value]) -> PodSpec {
    of_kind::<DaemonSet>(objects, "DaemonSet").spec.unwrap().template.spec.unwrap()
}

fn container(pod: &PodSpec) -> &Container {
    assert_eq!(pod.containers.len(), 1);
    &pod.containers[0]
}

/// The container's arguments as kubelane understands them, with the program's name before them.
fn command(container: &Container) -> Command {
    assert!(container.command.is_none(), "the image's entry point is kubelane");
    let arguments = container.args.iter().flatten().map(OsString::from);
    cli::parse(std::iter::once("kubelane".into()).chain(arguments).collect()).unwrap().command
}

fn capabilities(container: &Container) -> BTreeSet<String> {
    let capabilities = container.security_context.as_ref().unwrap().capabilities.as_ref().unwrap();
    assert_eq!(capabilities.drop.as_deref(), Some(&["ALL".to_owned()][..]));
    capabilities.add.iter().flatten().map(|name| format!("CAP_{name}")).collect()
}

/// Those in the first column of the table in docs/REFERENCE.md.
fn documented_capabilities() -> BTreeSet<String> {
    let reference = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/REFERENCE.md")).unwrap();
    let (_, table) = reference.split_once("| capability | without it |\n").expect("the reference has the table");
    let rows = table.lines().take_while(|line| line.starts_with('|'));
    let first_columns = rows.filter_map(|row| row.split('|').nth(1).map(str::to_owned)).collect::<String>();
    first_columns.split('`').filter(|word| word.starts_with("CAP_")).map(str::to_owned).collect()
}

#[test]
fn every_object_of_every_overlay_is_one_that_kubernetes_knows_field_by_field() {
    for overlay in OVERLAYS {
        for components in (0..COMPONENTS.len()).map(|n| &COMPONENTS[n..=n]).chain([&[][..], &COMPONENTS]) {
            let objects = kustomize::build(composed(overlay, components).path());
            objects.iter().for_each(strict_by_kind);
            let mut names: Vec<String> =
                objects.iter().map(|object| format!("{}/{}", object["kind"], object["metadata"]["name"])).collect();
            let count = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), count, "{overlay} {components:?}: an object twice");
        }
    }
    let jobs = JOBS.iter().flat_map(|job| kustomize::documents(&manifests().join(job)));
    jobs.for_each(|job| drop(strict::<Job>(&job)));
}

#[test]
fn a_misspelt_or_misplaced_field_is_found() {
    let good = kustomize::build(&manifests().join("base"));
    let daemon_set = good.iter().find(|object| object["kind"] == "DaemonSet").unwrap();
    let at = "/spec/template/spec/containers/0";
    for (parent, field) in [("", "specs"), (at, "readOnlyRootFilesystem"), (at, "livenesProbe"), ("/spec", "replicas")]
    {
        let mut bad = daemon_set.clone();
        bad.pointer_mut(parent).unwrap()[field] = json!(1);
        let lost = std::panic::catch_unwind(|| strict::<DaemonSet>(&bad)).expect_err(field);
        let message = lost.downcast_ref::<String>().unwrap();
        assert!(message.contains(field), "{message}");
    }
}

#[test]
fn kustomize_makes_of_the_overlays_what_these_tests_look_at() {
    for overlay in OVERLAYS {
        let directory = composed(overlay, &COMPONENTS);
        let kustomize = Path::new(env!("CARGO_MANIFEST_DIR")).join("release/kustomize");
        let output = Process::new(kustomize).arg("build").arg(directory.path()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.code() == Some(3) {
            let reason = said.lines().last().unwrap_or("no kustomize");
            return skip(&format!("{reason} (the rules of kustomize that are used are tested)"));
        }
        assert!(output.status.success(), "{said}");
        let text = String::from_utf8(output.stdout).unwrap();
        let file = directory.path().join("built.yaml");
        std::fs::write(&file, text).unwrap();
        let sorted = |mut objects: Vec<Value>| {
            objects.sort_by_key(|object| format!("{}/{}", object["kind"], object["metadata"]["name"]));
            objects
        };
        assert_eq!(sorted(kustomize::documents(&file)), sorted(kustomize::build(directory.path())), "{overlay}");
    }
}

#[test]
fn the_arguments_are_ones_that_kubelane_takes_and_name_files_that_are_mounted() {
    for (overlay, file) in [
        ("base", "/etc/kubelane/kubeconfig"),
        ("overlays/k3s", "/etc/kubelane/kubeconfig"),
        ("overlays/kubeadm", "/var/lib/kube-proxy/config.conf"),
    ] {
        let pod = pod(&kustomize::build(&manifests().join(overlay)));
        let Command::Run(flags) = command(container(&pod)) else { panic!("{overlay}: another command") };
        let config = flags.node.config.as_deref().map(Path::new);
        assert_eq!(flags.source.kubeconfig.as_deref().xor(config), Some(Path::new(file)), "{overlay}");
        assert!(flags.source.source.is_none() && flags.startup_taint.is_none(), "{overlay}");
        let mount =
            container(&pod).volume_mounts.as_ref().unwrap().iter().find(|mount| mount.name == "config").unwrap();
        assert_eq!(Path::new(file).parent(), Some(Path::new(&mount.mount_path)), "{overlay}");
    }
    for job in &JOBS[1..] {
        let job: Job = strict(&kustomize::documents(&manifests().join(job))[0]);
        let pod = job.spec.unwrap().template.spec.unwrap();
        assert!(matches!(command(container(&pod)), Command::Cleanup(_)));
    }
}

#[test]
fn the_files_that_the_arguments_name_are_in_the_config_maps() {
    let base = pod(&kustomize::build(&manifests().join("base")));
    let Command::Run(flags) = command(container(&base)) else { panic!("another command") };
    let key = flags.source.kubeconfig.as_ref().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    let objects = kustomize::build(&manifests().join("overlays/k3s"));
    let map: ConfigMap = of_kind(&objects, "ConfigMap");
    assert_eq!(config_map_of(&pod(&objects)), map.metadata.name);
    assert_no_service_is_needed(&map.data.unwrap()[&key], "https://127.0.0.1:6444/");

    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/kubeadm/kube-proxy-configmap.yaml");
    let map: ConfigMap = strict(&kustomize::documents(&path)[0]);
    let data = map.data.unwrap();
    let pod = pod(&kustomize::build(&manifests().join("overlays/kubeadm")));
    assert_eq!(config_map_of(&pod), map.metadata.name);
    assert!(data.contains_key("config.conf"));
    assert_no_service_is_needed(&data["kubeconfig.conf"], "https://controlplane:6443/");
}

fn config_map_of(pod: &PodSpec) -> Option<String> {
    let volumes = pod.volumes.iter().flatten();
    let maps: Vec<_> = volumes.filter_map(|volume| volume.config_map.as_ref()).collect();
    assert_eq!(maps.len(), 1);
    Some(maps[0].name.clone())
}

/// The kubeconfig leads to `server`, with the pod's own service account.
fn assert_no_service_is_needed(kubeconfig: &str, server: &str) {
    let config = kube::config::Kubeconfig::from_yaml(kubeconfig).unwrap();
    let cluster = config.clusters[0].cluster.as_ref().unwrap();
    assert_eq!(cluster.server.as_ref().unwrap().trim_end_matches('/'), server.trim_end_matches('/'));
    let of_account = |name: &str| format!("/var/run/secrets/kubernetes.io/serviceaccount/{name}");
    assert_eq!(cluster.certificate_authority, Some(of_account("ca.crt")));
    assert_eq!(config.auth_infos[0].auth_info.as_ref().unwrap().token_file, Some(of_account("token")));
    assert_eq!(config.current_context.as_deref(), Some(config.contexts[0].name.as_str()));
}

#[test]
fn the_ports_are_the_defaults_of_the_flags_and_the_probes_ask_the_health_port() {
    for overlay in OVERLAYS {
        let pod = pod(&kustomize::build(&manifests().join(overlay)));
        let container = container(&pod);
        let Command::Run(flags) = command(container) else { panic!("{overlay}: another command") };
        let ports: Vec<_> =
            container.ports.iter().flatten().map(|p| (p.name.as_deref().unwrap(), p.host_port)).collect();
        let port = |address: Option<std::net::SocketAddr>| address.map(|address| i32::from(address.port()));
        assert_eq!(ports, [("health", port(flags.node.healthz())), ("metrics", port(flags.node.metrics()))]);
        assert!(container.ports.iter().flatten().all(|p| p.host_port == Some(p.container_port)));
        assert!(pod.host_network == Some(true) && pod.host_pid == Some(true));
        let probes = [&container.startup_probe, &container.liveness_probe, &container.readiness_probe];
        for (probe, path) in probes.into_iter().zip(["/livez", "/livez", "/readyz"]) {
            let get = probe.as_ref().unwrap().http_get.as_ref().unwrap();
            assert_eq!(get.path.as_deref(), Some(path));
            assert_eq!(serde_json::to_value(&get.port).unwrap(), "health");
        }
    }
}

#[test]
fn the_container_has_the_documented_capabilities_and_no_more() {
    let expected = documented_capabilities();
    assert!(expected.len() > 3, "{expected:?}");
    let base = pod(&kustomize::build(&manifests().join("base")));
    let cleanup: Job = strict(&kustomize::documents(&manifests().join(JOBS[1]))[0]);
    let cleanup = cleanup.spec.unwrap().template.spec.unwrap();
    let old = pod(&kustomize::build(composed("base", &["components/old-kernels"]).path()));
    assert_eq!(capabilities(container(&old)), expected);
    let old_only = BTreeSet::from(["CAP_SYS_RESOURCE".to_owned()]);
    assert_eq!(
        &expected - &capabilities(container(&base)),
        old_only,
        "which keeps a pod from starting where root lacks it"
    );
    assert!(capabilities(container(&cleanup)).is_subset(&expected));
    for pod in [&base, &cleanup] {
        let context = container(pod).security_context.as_ref().unwrap();
        assert_eq!((context.privileged, context.read_only_root_filesystem), (Some(false), Some(true)));
    }
}

#[test]
fn openshift_admits_what_the_daemonset_asks_for_and_no_more() {
    let objects = kustomize::build(composed("base", &["components/openshift", "components/old-kernels"]).path());
    let pod = pod(&objects);
    let context = container(&pod).security_context.as_ref().unwrap();
    let scc = objects.iter().find(|object| object["kind"] == "SecurityContextConstraints").unwrap();
    let names = |field: &str| scc[field].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    let allowed: BTreeSet<&str> = names("allowedCapabilities");
    assert_eq!(
        allowed.into_iter().map(|name| format!("CAP_{name}")).collect::<BTreeSet<_>>(),
        capabilities(container(&pod))
    );
    let volumes = pod.volumes.iter().flatten().map(|v| if v.host_path.is_some() { "hostPath" } else { "configMap" });
    let allowed: BTreeSet<&str> = names("volumes");
    assert_eq!(allowed, volumes.chain(["projected"]).collect());
    let account = format!("system:serviceaccount:kube-system:{}", pod.service_account_name.as_ref().unwrap());
    assert_eq!(scc["users"], json!([account]));
    for (field, asked) in [
        ("allowHostNetwork", pod.host_network),
        ("allowHostPID", pod.host_pid),
        ("allowHostIPC", pod.host_ipc.or(Some(false))),
        ("allowPrivilegedContainer", context.privileged),
        ("readOnlyRootFilesystem", context.read_only_root_filesystem),
    ] {
        assert_eq!(scc[field], json!(asked), "{field}");
    }
}

#[test]
fn a_pod_monitor_selects_the_pods_and_finds_metrics_that_are_served_on_all_addresses() {
    let objects = kustomize::build(composed("base", &["components/pod-monitor"]).path());
    let monitor = objects.iter().find(|object| object["kind"] == "PodMonitor").unwrap();
    let daemon_set = objects.iter().find(|object| object["kind"] == "DaemonSet").unwrap();
    let labels = daemon_set["spec"]["template"]["metadata"]["labels"].as_object().unwrap();
    let wanted = monitor["spec"]["selector"]["matchLabels"].as_object().unwrap();
    assert!(!wanted.is_empty() && wanted.iter().all(|(key, value)| labels.get(key) == Some(value)));
    let pod = pod(&objects);
    let Command::Run(flags) = command(container(&pod)) else { panic!("another command") };
    let metrics = flags.node.metrics().unwrap();
    assert!(metrics.ip().is_unspecified(), "{metrics}");
    let port =
        container(&pod).ports.iter().flatten().find(|port| {
            Some(port.name.as_deref().unwrap()) == monitor["spec"]["podMetricsEndpoints"][0]["port"].as_str()
        });
    assert_eq!(port.map(|port| port.container_port), Some(i32::from(metrics.port())));
}

#[test]
fn the_image_has_the_version_of_this_tree() {
    let image = format!("kubelane:{}", env!("CARGO_PKG_VERSION"));
    let base = pod(&kustomize::build(&manifests().join("base")));
    let cleanup = std::fs::read_to_string(manifests().join(JOBS[1])).unwrap();
    assert_eq!(container(&base).image.as_deref(), Some(image.as_str()));
    assert!(cleanup.contains(&format!("image: {image}\n")));
}

#[test]
fn rights_beyond_kube_proxys_come_with_the_startup_taint_only() {
    for overlay in OVERLAYS {
        let objects = kustomize::build(&manifests().join(overlay));
        assert_eq!(bound_to(&objects), ["system:node-proxier"], "{overlay}");
        assert!(objects.iter().all(|object| object["kind"] != "ClusterRole"), "{overlay}");
        let objects = kustomize::build(composed(overlay, &["components/startup-taint"]).path());
        assert_eq!(bound_to(&objects), ["system:node-proxier", "kubelane-startup-taint"], "{overlay}");
        let role: ClusterRole = of_kind(&objects, "ClusterRole");
        assert_eq!(role.metadata.name.as_deref(), Some("kubelane-startup-taint"));
        let rules = serde_json::to_value(role.rules.unwrap()).unwrap();
        assert_eq!(rules, json!([{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "patch"]}]));
        let Command::Run(flags) = command(container(&pod(&objects))) else { panic!("{overlay}: another command") };
        assert_eq!(flags.startup_taint.as_deref(), Some("kubelane-not-ready"));
    }
}

/// The ClusterRoles that the DaemonSet's own account has.
fn bound_to(objects: &[Value]) -> Vec<String> {
    let account: ServiceAccount = of_kind(objects, "ServiceAccount");
    assert_eq!(pod(objects).service_account_name, account.metadata.name);
    let bindings = objects.iter().filter(|object| object["kind"] == "ClusterRoleBinding").map(strict);
    let role = |binding: ClusterRoleBinding| {
        let subject = &binding.subjects.unwrap()[0];
        assert_eq!(
            (Some(&subject.name), &subject.namespace),
            (account.metadata.name.as_ref(), &account.metadata.namespace)
        );
        assert_eq!(subject.kind, "ServiceAccount");
        binding.role_ref.name
    };
    bindings.map(role).collect()
}

#[test]
fn a_node_has_kubelane_or_kube_proxy_by_its_label() {
    let selector = |components: &[&str]| {
        let directory = composed("overlays/kubeadm", components);
        pod(&kustomize::build(directory.path())).node_selector.unwrap_or_default()
    };
    assert!(!selector(&[]).contains_key("service-proxy"));
    let selector = selector(&["components/node-by-node"]);
    let wanted = &selector["service-proxy"];
    // The patch for kube-proxy has no selector and no name: it is a DaemonSet's but for these.
    let mut patch = kustomize::documents(&manifests().join("migration/kube-proxy-off-labelled-nodes.yaml")).remove(0);
    patch["spec"]["selector"] = json!({});
    patch["metadata"] = json!({});
    let affinity = strict::<DaemonSet>(&with_kind(patch)).spec.unwrap().template.spec.unwrap().affinity.unwrap();
    let terms = affinity.node_affinity.unwrap().required_during_scheduling_ignored_during_execution.unwrap();
    let expressions = terms.node_selector_terms[0].match_expressions.clone().unwrap();
    assert_eq!((terms.node_selector_terms.len(), expressions.len()), (1, 1));
    assert_eq!((expressions[0].key.as_str(), expressions[0].operator.as_str()), ("service-proxy", "NotIn"));
    assert_eq!(expressions[0].values.as_ref().unwrap(), std::slice::from_ref(wanted));
}

fn with_kind(mut object: Value) -> Value {
    object["apiVersion"] = json!("apps/v1");
    object["kind"] = json!("DaemonSet");
    object
}
