//! What has been asked of the server, and what it took.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use crate::common::table;
use crate::gate::Gate;
use crate::laboratory::apiserver::{ApiServer, Verb};

/// As of one moment, or between two.
#[derive(Clone, Copy, Debug)]
pub struct Tally {
    at: Instant,
    pub seconds: f64,
    streaming_lists: usize,
    lists: usize,
    watches: usize,
    writes: usize,
    connections: usize,
    /// Of these, and of those of before, closed without a break.
    closed: u64,
    to_server: u64,
    pub from_server: u64,
}

impl Tally {
    pub fn now(server: &ApiServer, gate: &Gate) -> Tally {
        let requests = server.requests();
        let of = |verb| requests.iter().filter(|request| request.verb == verb).count();
        Tally {
            at: Instant::now(),
            seconds: 0.0,
            streaming_lists: of(Verb::StreamingList),
            lists: of(Verb::List),
            watches: of(Verb::Watch),
            writes: server.writes().len(),
            connections: gate.counts.connections.lock().expect("nobody panics with it").len(),
            closed: gate.counts.closed.load(Relaxed),
            to_server: gate.counts.to_server.load(Relaxed),
            from_server: gate.counts.from_server.load(Relaxed),
        }
    }

    /// What came after `before`.
    pub fn since(self, before: Tally) -> Tally {
        Tally {
            at: self.at,
            seconds: self.at.duration_since(before.at).as_secs_f64(),
            streaming_lists: self.streaming_lists - before.streaming_lists,
            lists: self.lists - before.lists,
            watches: self.watches - before.watches,
            writes: self.writes - before.writes,
            connections: self.connections - before.connections,
            closed: self.closed - before.closed,
            to_server: self.to_server - before.to_server,
            from_server: self.from_server - before.from_server,
        }
    }
}

/// A line for each, with the bytes of as many daemons as `nodes`.
pub fn print(rows: &[(&str, Tally)], nodes: u64) {
    let all = format!("of {nodes}: from the server");
    let heading = [
        "one daemon",
        "s, waits included",
        "connections made",
        "closed",
        "streaming lists",
        "lists",
        "watches",
        "writes",
        "to the server",
        "from it",
        &all,
    ];
    let row = |(what, tally): &(&str, Tally)| {
        let counts =
            [tally.connections, tally.closed as usize, tally.streaming_lists, tally.lists, tally.watches, tally.writes];
        let mut cells = vec![(*what).to_owned(), format!("{:.0}", tally.seconds)];
        cells.extend(counts.map(|count| count.to_string()));
        cells.extend([tally.to_server, tally.from_server, tally.from_server * nodes].map(bytes));
        cells
    };
    println!("{}", table(&heading, &rows.iter().map(row).collect::<Vec<_>>()));
}

pub fn bytes(count: u64) -> String {
    match count {
        0..10_000 => format!("{count} B"),
        10_000..10_000_000 => format!("{:.1} kB", count as f64 / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1} MB", count as f64 / 1e6),
        _ => format!("{:.1} GB", count as f64 / 1e9),
    }
}
