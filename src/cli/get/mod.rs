//! `kubelane get`: what is in the kernel right now, with kubectl's manners.

mod affinities;
mod devices;
mod filter;
mod flows;
mod format;
mod ipvsadm;
mod jsonpath;
mod node;
mod printer;
mod record;
mod services;
mod watch;

use std::io;

use anyhow::Result;
use serde_json::Value;

pub use filter::{Filter, ServiceFilter};
pub use format::{Output, sort_key};
pub use jsonpath::Path as JsonPath;

use super::UsageError;
use super::flags::{GetFlags, What};
use super::status::Status;
use printer::{Heads, Printer};
use record::Record;

/// Runs the subcommand.
///
/// # Errors
/// A [`UsageError`] when what is asked for does not go together; when nothing is pinned there, or the maps cannot be read.
pub fn run(flags: &GetFlags) -> Result<()> {
    flags.check()?;
    match flags.what {
        What::Status => super::print(&Status::read(&flags.pins.pin_path)?.render(flags.output.as_ref())?),
        _ if flags.output == Some(Output::Ipvsadm) => ipvsadm(flags),
        _ if flags.watch => watch::run(flags),
        _ if flags.sort_by.is_some() => sorted(flags),
        _ => streamed(flags, io::stdout().lock()),
    }
}

/// Nobody reads any more: a walk that ends before its end.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads any more")]
struct Closed;

/// Writes rows as they are met.
fn streamed(flags: &GetFlags, out: impl io::Write) -> Result<()> {
    let mut printer = Printer::new(out, flags.output.clone(), heads(flags.what), &[], flags.no_headers);
    let result = each(flags, &mut |record| match printer.row(&*record, &[])? {
        true => Ok(()),
        false => Err(Closed.into()),
    });
    match result {
        Err(error) if error.is::<Closed>() => Ok(()),
        Err(error) => Err(error),
        Ok(()) => printer.finish(),
    }
}

fn sorted(flags: &GetFlags) -> Result<()> {
    let Some(path) = &flags.sort_by else { return Ok(()) };
    let mut all: Vec<(Option<Value>, Box<dyn Record>)> = Vec::new();
    each(flags, &mut |record| {
        let value: Value = serde_json::from_str(&record.json()?)?;
        let key = path.find(&value).first().map(|key| (*key).clone());
        all.push((key, record));
        Ok(())
    })?;
    all.sort_by(|(a, _), (b, _)| compare(a.as_ref(), b.as_ref()));
    let mut printer = Printer::new(io::stdout().lock(), flags.output.clone(), heads(flags.what), &[], flags.no_headers);
    for (_, record) in &all {
        printer.row(&**record, &[])?;
    }
    printer.finish()
}

/// Numbers by size, all else as text; what is not there comes first.
fn compare(a: Option<&Value>, b: Option<&Value>) -> std::cmp::Ordering {
    let number = |value: Option<&Value>| value.and_then(Value::as_f64);
    match (number(a), number(b)) {
        (Some(a), Some(b)) => a.total_cmp(&b),
        _ => {
            let text = |value: Option<&Value>| match value {
                Some(Value::String(text)) => Some(text.clone()),
                other => other.map(Value::to_string),
            };
            text(a).cmp(&text(b))
        }
    }
}

fn heads(what: What) -> Heads {
    match what {
        What::Services | What::Status => services::SERVICE_HEADS,
        What::Backends => services::BACKEND_HEADS,
        What::Nodeports => services::NODE_PORT_HEADS,
        What::Flows => flows::FLOW_HEADS,
        What::Snat => flows::SNAT_HEADS,
        What::Affinities => affinities::HEADS,
        What::Devices => devices::HEADS,
        What::Node => node::HEADS,
    }
}

/// Every row that the filters let through.
fn each(flags: &GetFlags, each: &mut dyn FnMut(Box<dyn Record>) -> Result<()>) -> Result<()> {
    let (pins, filter) = (&flags.pins.pin_path, &flags.filter());
    let mut take = |record: Box<dyn Record>| if filter.takes(&*record) { each(record) } else { Ok(()) };
    // A table has the number of endpoints, which are most of all rows.
    let is_counted = flags.output.is_none() && flags.address.is_none() && flags.sort_by.is_none();
    let snapshot = if is_counted { services::counted } else { services::snapshot };
    match flags.what {
        What::Services => snapshot(pins)?.frontends().into_iter().try_for_each(|r| take(Box::new(r))),
        What::Backends => services::snapshot(pins)?.backends().into_iter().try_for_each(|r| take(Box::new(r))),
        What::Nodeports => {
            let addresses = services::node_addresses(pins)?;
            let all = services::node_ports(snapshot(pins)?.frontends(), &addresses);
            all.into_iter().try_for_each(|r| take(Box::new(r)))
        }
        What::Flows => flows::each(pins, &mut |r| take(Box::new(r))),
        What::Affinities => affinities::each(pins, &mut |r| take(Box::new(r))),
        What::Devices => devices::devices(pins)?.into_iter().try_for_each(|r| take(Box::new(r))),
        What::Node => take(Box::new(node::node(pins)?)),
        // Ports are counted by flows, which know their Services.
        What::Snat => {
            let all = flows::snat(pins, |flow| filter.takes(flow))?;
            all.into_iter().try_for_each(|r| each(Box::new(r)))
        }
        What::Status => Ok(()),
    }
}

fn ipvsadm(flags: &GetFlags) -> Result<()> {
    let pins = &flags.pins.pin_path;
    let filter = flags.filter();
    let mut frontends = services::snapshot(pins)?.frontends();
    frontends.retain(|frontend| filter.takes(frontend));
    let mut connections = ipvsadm::Connections::new();
    flows::each(pins, &mut |flow| {
        ipvsadm::count(&mut connections, &flow);
        Ok(())
    })?;
    super::print(&ipvsadm::text(&frontends, &services::node_addresses(pins)?, &connections))
}

impl GetFlags {
    fn filter(&self) -> Filter {
        Filter {
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            service: self.service.clone(),
            address: self.address,
            state: self.state.clone(),
        }
    }

    /// What does not go together.
    fn check(&self) -> Result<(), UsageError> {
        let is_streamed = matches!(self.what, What::Flows | What::Affinities);
        let has_filter = self.namespace.is_some()
            || self.name.is_some()
            || self.service.is_some()
            || self.address.is_some()
            || self.state.is_some();
        let refuse = |text: &str| Err(UsageError(text.to_owned()));
        match (&self.output, self.what) {
            (Some(Output::Ipvsadm), what) if what != What::Services => refuse("-o ipvsadm is for services only"),
            (Some(Output::Ipvsadm), _) if self.watch => refuse("-o ipvsadm cannot be used with --watch"),
            (Some(Output::Name | Output::JsonPath(_)), What::Status) => {
                refuse("`get status` supports -o json, yaml and wide")
            }
            (Some(Output::JsonPath(_)), _) if is_streamed => {
                refuse("flows and affinities are printed as they are read, and jsonpath needs all of them: use -o json")
            }
            (_, What::Status) if has_filter || self.watch || self.sort_by.is_some() => {
                refuse("`get status` is a single record: it has no filter, order or watch")
            }
            (_, What::Devices | What::Node)
                if self.namespace.is_some() || self.name.is_some() || self.service.is_some() =>
            {
                refuse("nodes and devices do not belong to a Service")
            }
            _ if self.sort_by.is_some() && is_streamed => {
                refuse("flows and affinities are printed as they are read, in no order: --sort-by does not apply")
            }
            _ if self.watch && is_streamed => refuse("flows and affinities cannot be watched: run the command again"),
            _ if self.watch && self.sort_by.is_some() => refuse("--watch and --sort-by cannot be used together"),
            (Some(Output::Yaml | Output::JsonPath(_) | Output::Name), _) if self.watch => {
                refuse("--watch shows a table (or -o wide), or -o json with one object per line")
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
