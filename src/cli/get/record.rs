//! What one row of an answer is, whatever it is a row of.

use std::net::IpAddr;

use anyhow::Result;

use crate::cli::escape;
use crate::cli::snapshot::PortName;

/// One row.
pub trait Record {
    /// Of the wide table; the narrow one has the first of them.
    fn cells(&self) -> Vec<String>;
    /// "kind/name", for `-o name`.
    fn name(&self) -> String;
    fn service(&self) -> Option<&PortName>;
    /// Those that `--address` is compared with.
    fn addresses(&self) -> Vec<IpAddr>;
    /// In lower case; empty when it has none.
    fn state(&self) -> String;
    fn json(&self) -> Result<String>;
    fn pretty_json(&self) -> Result<String>;
    /// As an item of a list.
    fn yaml(&self) -> Result<String>;
}

/// The same of anything that can be written.
macro_rules! written {
    () => {
        fn json(&self) -> anyhow::Result<String> {
            Ok(serde_json::to_string(self)?)
        }

        fn pretty_json(&self) -> anyhow::Result<String> {
            Ok(serde_json::to_string_pretty(self)?)
        }

        fn yaml(&self) -> anyhow::Result<String> {
            $crate::cli::get::record::yaml_item(self)
        }
    };
}
pub(super) use written;

/// A list of one. JSON is YAML, too, and names every character.
pub fn yaml_item(record: &impl serde::Serialize) -> Result<String> {
    let json = serde_json::to_string(record)?;
    match escape::is_plain_json(&json) {
        true => Ok(serde_norway::to_string(&[record])?),
        false => Ok(format!("- {}\n", escape::line(&json))),
    }
}

/// The address of "IP:port"; `None` for anything else.
pub fn ip(text: &str) -> Option<IpAddr> {
    Some(text.parse::<std::net::SocketAddr>().ok()?.ip())
}

pub fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}
