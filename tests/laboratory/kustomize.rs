//! As much of kustomize as `manifests/` uses: resources, components, generated ConfigMaps, and JSON patches (RFC 6902) on objects chosen by
//! kind and name. A field of a kustomization that is not known here is refused, so that nothing goes unnoticed.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Kustomization {
    api_version: String,
    kind: String,
    #[serde(default)]
    resources: Vec<PathBuf>,
    #[serde(default)]
    components: Vec<PathBuf>,
    #[serde(default)]
    config_map_generator: Vec<ConfigMap>,
    #[serde(default)]
    patches: Vec<Patch>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigMap {
    name: String,
    namespace: String,
    files: Vec<PathBuf>,
    options: GeneratorOptions,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct GeneratorOptions {
    labels: Value,
    disable_name_suffix_hash: bool,
}

impl ConfigMap {
    fn object(&self, directory: &Path) -> Value {
        assert!(self.options.disable_name_suffix_hash, "{}: names with hashes are not known here", self.name);
        let file = |path: &PathBuf| (path.display().to_string(), Value::from(read(&directory.join(path))));
        let data: serde_json::Map<String, Value> = self.files.iter().map(file).collect();
        let metadata =
            serde_json::json!({"name": self.name, "namespace": self.namespace, "labels": self.options.labels});
        serde_json::json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Patch {
    path: PathBuf,
    target: Target,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Target {
    kind: String,
    name: String,
}

/// What `kubectl kustomize DIRECTORY` makes, in the order of the resources.
pub fn build(directory: &Path) -> Vec<Value> {
    let mut objects = Vec::new();
    apply(directory, ("kustomize.config.k8s.io/v1beta1", "Kustomization"), &mut objects);
    objects
}

/// Adds the directory's resources to `objects`, then has its components and patches change all of them.
fn apply(directory: &Path, (api_version, kind): (&str, &str), objects: &mut Vec<Value>) {
    let file = directory.join("kustomization.yaml");
    let kustomization: Kustomization = serde_norway::from_str(&read(&file)).unwrap_or_else(|e| panic!("{file:?}: {e}"));
    assert_eq!((kustomization.api_version.as_str(), kustomization.kind.as_str()), (api_version, kind), "{file:?}");
    for resource in &kustomization.resources {
        let path = directory.join(resource);
        if path.is_dir() {
            objects.extend(build(&path));
        } else {
            objects.extend(documents(&path));
        }
    }
    objects.extend(kustomization.config_map_generator.iter().map(|map| map.object(directory)));
    for component in &kustomization.components {
        apply(&directory.join(component), ("kustomize.config.k8s.io/v1alpha1", "Component"), objects);
    }
    for Patch { path, target } in &kustomization.patches {
        let file = directory.join(path);
        let patch: json_patch::Patch = serde_norway::from_str(&read(&file)).unwrap_or_else(|e| panic!("{file:?}: {e}"));
        let is_target =
            |object: &&mut Value| object["kind"] == target.kind && object["metadata"]["name"] == target.name;
        let targets: Vec<&mut Value> = objects.iter_mut().filter(is_target).collect();
        assert!(!targets.is_empty(), "{file:?}: no {} {}", target.kind, target.name);
        for object in targets {
            json_patch::patch(object, &patch).unwrap_or_else(|e| panic!("{file:?}: {e}"));
        }
    }
}

/// The documents of a YAML file.
pub fn documents(path: &Path) -> Vec<Value> {
    let text = read(path);
    let parse = |document| Value::deserialize(document).unwrap_or_else(|e| panic!("{path:?}: {e}"));
    let documents: Vec<Value> = serde_norway::Deserializer::from_str(&text).map(parse).collect();
    assert!(!documents.is_empty(), "{path:?} is empty");
    documents
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{path:?}: {e}"))
}
