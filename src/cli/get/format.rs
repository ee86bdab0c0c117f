//! `-o`: what an answer looks like.

use std::str::FromStr;

use super::jsonpath::{Path, Template};

/// An output format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    Json,
    Yaml,
    /// The table with more columns.
    Wide,
    /// "kind/name", one a line.
    Name,
    /// As `ipvsadm -Ln` has it.
    Ipvsadm,
    JsonPath(Template),
}

impl FromStr for Output {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const ALLOWED: &str = "expected json, yaml, wide, name, jsonpath=TEMPLATE or (for services) ipvsadm";
        match (text, text.strip_prefix("jsonpath=")) {
            ("json", _) => Ok(Output::Json),
            ("yaml", _) => Ok(Output::Yaml),
            ("wide", _) => Ok(Output::Wide),
            ("name", _) => Ok(Output::Name),
            ("ipvsadm", _) => Ok(Output::Ipvsadm),
            (_, Some(template)) => Ok(Output::JsonPath(template.parse()?)),
            _ => Err(ALLOWED.to_owned()),
        }
    }
}

/// `--sort-by`: a path within an item.
pub fn sort_key(text: &str) -> Result<Path, String> {
    let bare = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).unwrap_or(text);
    bare.parse()
}
