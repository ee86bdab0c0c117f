//! Label and field selectors, as far as the API server has them for Services, EndpointSlices and Nodes.

use serde_json::Value;

/// What a list or a watch is limited to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    labels: Vec<Requirement>,
    fields: Vec<Requirement>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Requirement {
    Exists(String),
    Missing(String),
    Equal(String, String),
    NotEqual(String, String),
}

/// Fields that selectors may name.
const FIELDS: [&str; 4] = ["metadata.name", "metadata.namespace", "spec.clusterIP", "spec.type"];

impl Selection {
    /// # Errors
    /// With the name of a field that selectors may not use.
    pub fn parse(labels: &str, fields: &str) -> Result<Self, String> {
        let fields = requirements(fields);
        for field in &fields {
            if !FIELDS.contains(&field.key()) {
                return Err(field.key().to_owned());
            }
        }
        Ok(Selection { labels: requirements(labels), fields })
    }

    pub fn matches(&self, object: &Value) -> bool {
        let label = |key: &str| object["metadata"]["labels"][key].as_str();
        // A field that is not set is the empty string.
        let field =
            |key: &str| Some(key.split('.').fold(object, |value, part| &value[part]).as_str().unwrap_or_default());
        self.labels.iter().all(|r| r.holds(label)) && self.fields.iter().all(|r| r.holds(field))
    }
}

impl Requirement {
    fn key(&self) -> &str {
        match self {
            Requirement::Exists(key) | Requirement::Missing(key) => key,
            Requirement::Equal(key, _) | Requirement::NotEqual(key, _) => key,
        }
    }

    fn holds<'a>(&self, value: impl Fn(&str) -> Option<&'a str>) -> bool {
        match self {
            Requirement::Exists(key) => value(key).is_some(),
            Requirement::Missing(key) => value(key).is_none(),
            Requirement::Equal(key, wanted) => value(key) == Some(wanted),
            Requirement::NotEqual(key, unwanted) => value(key) != Some(unwanted),
        }
    }
}

fn requirements(text: &str) -> Vec<Requirement> {
    text.split(',').filter(|t| !t.is_empty()).map(requirement).collect()
}

fn requirement(text: &str) -> Requirement {
    if let Some(key) = text.strip_prefix('!') {
        Requirement::Missing(key.to_owned())
    } else if let Some((key, value)) = text.split_once("!=") {
        Requirement::NotEqual(key.to_owned(), value.to_owned())
    } else if let Some((key, value)) = text.split_once('=') {
        Requirement::Equal(key.to_owned(), value.trim_start_matches('=').to_owned())
    } else {
        Requirement::Exists(text.to_owned())
    }
}
