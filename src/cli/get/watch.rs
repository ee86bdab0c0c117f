//! `--watch`: what there is, and then each row that comes, changes or goes. Maps tell nobody of changes, so that they are
//! read once a second.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use anyhow::Result;

use super::format::Output;
use super::printer::Printer;
use super::record::Record;
use super::{each, heads};
use crate::cli::escape;
use crate::cli::flags::GetFlags;

const EVERY: Duration = Duration::from_secs(1);

/// By what tells a row from others.
type Rows = BTreeMap<(String, String), (String, Box<dyn Record>)>;

/// Until nobody reads any more, or the maps are gone.
pub fn run(flags: &GetFlags) -> Result<()> {
    let more = ["EVENT"];
    let mut printer =
        Printer::new(io::stdout().lock(), flags.output.clone(), heads(flags.what), &more, flags.no_headers);
    let mut before = Rows::new();
    loop {
        let now = read(flags)?;
        for (key, (json, record)) in &now {
            match before.get(key) {
                None => tell(&mut printer, flags, "ADDED", &**record)?,
                Some((old, _)) if old != json => tell(&mut printer, flags, "MODIFIED", &**record)?,
                Some(_) => {}
            }
        }
        for (_, (_, record)) in before.iter().filter(|(key, _)| !now.contains_key(*key)) {
            tell(&mut printer, flags, "DELETED", &**record)?;
        }
        if flags.output != Some(Output::Json) {
            printer.begin()?;
        }
        printer.flush()?;
        if printer.is_closed() {
            return Ok(());
        }
        before = now;
        std::thread::sleep(EVERY);
    }
}

fn read(flags: &GetFlags) -> Result<Rows> {
    let mut rows = Rows::new();
    each(flags, &mut |record| {
        // A frontend's second cell and its address, a backend's id: the name alone is not enough.
        let cells = record.cells();
        let place = cells.get(..5).unwrap_or(&cells).join(" ");
        rows.insert((record.name(), place), (record.json()?, record));
        Ok(())
    })?;
    Ok(rows)
}

fn tell(printer: &mut Printer<impl io::Write>, flags: &GetFlags, event: &str, record: &dyn Record) -> Result<()> {
    if flags.output == Some(Output::Json) {
        let line = format!("{{\"type\":\"{event}\",\"object\":{}}}", record.json()?);
        return printer.put(&(escape::line(&line) + "\n"));
    }
    printer.row(record, &[event]).map(drop)
}
