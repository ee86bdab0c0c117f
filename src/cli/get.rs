//! `kubelane get`: the records of a snapshot as a table, JSON or YAML. (`status` is in a file of its own.)

use serde::Serialize;

use super::flags::{GetFlags, Output, What};
use super::snapshot::{BackendRecord, FrontendRecord, PoolRecord, Snapshot};
use super::status::Status;
use super::table;
use crate::bpf::Maps;

/// Runs the subcommand.
///
/// # Errors
/// When nothing is pinned there, or the maps cannot be read.
pub fn run(flags: &GetFlags) -> anyhow::Result<()> {
    let pin_path = &flags.pins.pin_path;
    let read = || Snapshot::read(&mut Maps::open(pin_path)?);
    super::print(&match flags.what {
        What::Services => services(&read()?, flags.output)?,
        What::Backends => backends(&read()?, flags.output)?,
        What::Status => Status::read(pin_path)?.render(flags.output)?,
    })
}

/// JSON and YAML are one object with the list `items`, as kubectl's are.
#[derive(Serialize)]
struct List<'a, T> {
    items: &'a [T],
}

fn services(snapshot: &Snapshot, output: Option<Output>) -> anyhow::Result<String> {
    let items = snapshot.frontends();
    records(&items, output, |wide| services_table(&items, wide))
}

fn backends(snapshot: &Snapshot, output: Option<Output>) -> anyhow::Result<String> {
    let items = snapshot.backends();
    records(&items, output, |wide| backends_table(&items, wide))
}

fn records<T: Serialize>(
    items: &[T],
    output: Option<Output>,
    table: impl Fn(bool) -> String,
) -> anyhow::Result<String> {
    match output {
        Some(Output::Json) => Ok(serde_json::to_string_pretty(&List { items })? + "\n"),
        Some(Output::Yaml) => super::yaml(&List { items }),
        Some(Output::Wide) => Ok(table(true)),
        None => Ok(table(false)),
    }
}

fn services_table(items: &[FrontendRecord], wide: bool) -> String {
    let mut heads = vec!["NAMESPACE", "NAME", "PORT", "PROTOCOL", "FRONTEND", "KIND", "ENDPOINTS"];
    if wide {
        heads.extend(["AFFINITY", "ID", "ADDRESSES"]);
    }
    let row = |item: &FrontendRecord| {
        let mut row = vec![
            item.service.namespace.clone(),
            item.service.name.clone(),
            or_dash(&item.service.port_name),
            item.protocol.clone(),
            item.address.clone(),
            or_dash(&item.kinds.join(",")),
            endpoints(item),
        ];
        if wide {
            let affinity = Some(item.affinity_seconds).filter(|s| *s != 0).map(|s| format!("{s}s"));
            row.extend([
                or_dash(&affinity.unwrap_or_default()),
                item.service_id.to_string(),
                or_dash(&item.inside.endpoints.join(",")),
            ]);
        }
        row
    };
    table::render(&heads, &items.iter().map(row).collect::<Vec<_>>())
}

/// The number of endpoints for clients on this node, and that for packets from the wire where it differs.
fn endpoints(item: &FrontendRecord) -> String {
    let count = |pool: &PoolRecord| match pool.endpoints.len() {
        0 => format!("0 ({})", pool.when_empty),
        n => n.to_string(),
    };
    if item.inside == item.outside {
        return count(&item.inside);
    }
    format!("{}, from outside {}", count(&item.inside), count(&item.outside))
}

fn backends_table(items: &[BackendRecord], wide: bool) -> String {
    let mut heads = vec!["NAMESPACE", "NAME", "PORT", "PROTOCOL", "BACKEND", "STATE", "LOCAL"];
    if wide {
        heads.extend(["SETS", "ID", "GENERATION", "SERVICE-ID"]);
    }
    let row = |item: &BackendRecord| {
        let mut row = vec![
            item.service.namespace.clone(),
            item.service.name.clone(),
            or_dash(&item.service.port_name),
            item.protocol.clone(),
            item.address.clone(),
            item.state.to_owned(),
            if item.node_local { "yes" } else { "no" }.to_owned(),
        ];
        if wide {
            row.extend([
                or_dash(&item.sets.join(",")),
                item.id.to_string(),
                item.generation.to_string(),
                item.service_id.to_string(),
            ]);
        }
        row
    };
    table::render(&heads, &items.iter().map(row).collect::<Vec<_>>())
}

fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

#[cfg(test)]
#[path = "get_tests.rs"]
mod tests;
