//! One object of a list or a watch as kube's watcher carries it. The object is kept as raw JSON by the outer parsers
//! and read here, so that one that cannot be read is an event like any other and not the end of a list or a watch.
//! (Raw JSON passes through kube's `WatchEvent` because API servers write `type` before `object`, and through its
//! `ObjectList` because `items` is a field of its own there.)

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::objects::wire::{Metadata, Wire};

/// An object, or why it could not be read.
#[derive(Clone, Debug)]
pub struct Envelope<W> {
    meta: ObjectMeta,
    pub content: Result<W, Unreadable>,
}

/// What could still be read of a malformed object.
#[derive(Clone, Debug)]
pub struct Unreadable {
    pub metadata: Metadata,
    pub reason: String,
}

/// The least that names an object. Raw, so that one wrong field does not hide the others.
#[derive(Default, Deserialize)]
struct Skeleton<'a> {
    #[serde(borrow)]
    metadata: Option<&'a RawValue>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Identity<'a> {
    #[serde(borrow)]
    name: Option<&'a RawValue>,
    #[serde(borrow)]
    namespace: Option<&'a RawValue>,
    #[serde(borrow)]
    resource_version: Option<&'a RawValue>,
}

impl<'de, W: Wire> Deserialize<'de> for Envelope<W> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = Box::<RawValue>::deserialize(deserializer)?;
        let content = serde_json::from_str::<W>(raw.get()).map_err(|error| unreadable(raw.get(), &error));
        let metadata = content.as_ref().map_or_else(|u| &u.metadata, |w| w.metadata());
        let text = |s: &String| (!s.is_empty()).then(|| s.clone());
        // The watcher resumes from the version; the rest of the metadata is nothing to it.
        let meta = ObjectMeta { resource_version: text(&metadata.resource_version), ..ObjectMeta::default() };
        Ok(Envelope { meta, content })
    }
}

fn unreadable(raw: &str, error: &serde_json::Error) -> Unreadable {
    let skeleton = serde_json::from_str::<Skeleton>(raw).unwrap_or_default();
    let metadata = skeleton.metadata.map_or("{}", RawValue::get);
    let identity = serde_json::from_str::<Identity>(metadata).unwrap_or_default();
    let text = |raw: Option<&RawValue>| raw.and_then(|raw| serde_json::from_str(raw.get()).ok()).unwrap_or_default();
    let metadata = Metadata {
        name: text(identity.name),
        namespace: text(identity.namespace),
        resource_version: text(identity.resource_version),
        ..Metadata::default()
    };
    let text = error.to_string();
    // The column moves with every version of the object, and a warning that lasts must read the same.
    let reason = text.rsplit_once(" at line ").map_or(text.as_str(), |(reason, _)| reason).to_owned();
    Unreadable { metadata, reason }
}

impl<W: Wire> Resource for Envelope<W> {
    type DynamicType = ();
    type Scope = k8s_openapi::ClusterResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        W::KIND.into()
    }

    fn group((): &()) -> Cow<'_, str> {
        W::GROUP.into()
    }

    fn version((): &()) -> Cow<'_, str> {
        W::VERSION.into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        W::PLURAL.into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::wire::Service;
    use kube::core::{ObjectList, WatchEvent};

    const BAD: &str = r#"{"metadata":{"name":"b","namespace":"x","resourceVersion":"7"},"spec":{"ports":"http"}}"#;

    #[test]
    fn a_malformed_object_in_a_list_keeps_its_name_and_the_others() {
        let text = format!(
            r#"{{"kind":"ServiceList","apiVersion":"v1","metadata":{{"resourceVersion":"9"}},"items":[{BAD},{{"metadata":{{"name":"a"}}}}]}}"#
        );
        let list: ObjectList<Envelope<Service>> = serde_json::from_str(&text).unwrap();
        let bad = list.items[0].content.as_ref().unwrap_err();
        assert_eq!((bad.metadata.name.as_str(), bad.metadata.namespace.as_str()), ("b", "x"));
        assert!(bad.reason.contains("invalid type"), "{}", bad.reason);
        assert_eq!(list.items[1].content.as_ref().unwrap().metadata.name, "a");
    }

    #[test]
    fn a_malformed_object_in_a_watch_keeps_its_version() {
        let event: WatchEvent<Envelope<Service>> =
            serde_json::from_str(&format!(r#"{{"type":"MODIFIED","object":{BAD}}}"#)).unwrap();
        let WatchEvent::Modified(envelope) = event else { panic!("{event:?}") };
        assert_eq!(envelope.meta().resource_version.as_deref(), Some("7"));
        assert!(envelope.content.is_err());
    }
}
