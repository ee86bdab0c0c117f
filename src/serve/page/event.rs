//! One event: what a viewer asked for, out of an overview. It is bounded, however many Services there are.

use anyhow::Error;
use serde::Serialize;

use super::detail::{Detail, shown};
use crate::explain::Answer;
use crate::overview::{Measures, Order, Overview, Row, Verdict};

/// Services of one event; others are found by searching.
const ROWS: usize = 100;
/// Characters that are looked for.
const SEARCH_MAX: usize = 300;

/// What a viewer asks for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Query {
    pub search: String,
    pub order: Order,
    /// Namespace and name.
    pub service: Option<(String, String)>,
}

impl Query {
    /// What cannot be read is left out.
    pub fn parse(text: &str) -> Query {
        let mut query = Query::default();
        for (key, value) in form_urlencoded::parse(text.as_bytes()) {
            match (&*key, &*value) {
                ("search", search) => query.search = search.chars().take(SEARCH_MAX).collect(),
                ("order", "new") => query.order = Order::New,
                ("order", "open") => query.order = Order::Open,
                ("service", name) => {
                    let name = name.split_once('/').map(|(namespace, name)| (namespace.to_owned(), name.to_owned()));
                    query.service = name;
                }
                _ => {}
            }
        }
        query
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Event<'a> {
    verdicts: &'a [Verdict],
    measures: Option<&'a Measures>,
    services: Services<'a>,
    /// What the worker says of the Service that is looked at, when it was asked for this event.
    detail: Option<Detail>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Services<'a> {
    total: usize,
    found: usize,
    counts_connections: bool,
    has_open: bool,
    rows: Vec<Shown<'a>>,
}

/// A Service port.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown<'a> {
    /// No other row has it.
    key: String,
    /// As it is asked for: "namespace/name".
    service: String,
    /// As it is read.
    text: String,
    protocol: &'a str,
    address: &'a str,
    more_addresses: usize,
    kinds: &'a [&'static str],
    endpoints: u32,
    when_empty: &'static str,
    rate: Option<f64>,
    open: Option<u64>,
}

impl<'a> Shown<'a> {
    fn new(row: &Row<'a>) -> Shown<'a> {
        let port = row.port;
        let service = format!("{}/{}", port.name.namespace, port.name.name);
        Shown {
            key: format!("{service} {}", port.id),
            service,
            text: shown(&port.full_name),
            protocol: &port.protocol,
            address: &port.address,
            more_addresses: port.more_addresses,
            kinds: &port.kinds,
            endpoints: port.endpoints,
            when_empty: port.when_empty,
            rate: row.rate,
            open: row.open,
        }
    }
}

/// As it goes over the wire.
pub fn event(overview: &Overview, query: &Query, answer: Option<&Answer>) -> String {
    let rows = overview.rows(&query.search, query.order);
    let services = Services {
        total: overview.count(),
        found: rows.len(),
        counts_connections: overview.counts_connections(),
        has_open: !overview.open.is_empty(),
        rows: rows.iter().take(ROWS).map(Shown::new).collect(),
    };
    let (verdicts, measures) = (&overview.verdicts[..], overview.measures.as_ref());
    let detail = answer.zip(query.service.as_ref()).map(|(answer, name)| Detail::new(answer, name));
    written("state", &Event { verdicts, measures, services, detail })
}

/// Why there is nothing to see.
pub fn trouble(error: &Error) -> String {
    written("trouble", &shown(&format!("{error:#}")))
}

/// JSON is one line, whatever is in it.
fn written(kind: &str, data: &impl Serialize) -> String {
    let json = serde_json::to_string(data).unwrap_or_else(|error| format!("\"{error}\""));
    format!("event: {kind}\ndata: {json}\n\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_read_as_browsers_write_it() {
        let query = Query::parse("search=a%20b+c&order=new&service=shop%2Fweb");
        let service = Some(("shop".to_owned(), "web".to_owned()));
        assert_eq!(query, Query { search: "a b c".into(), order: Order::New, service });
        for odd in ["", "&&=&", "order=nonsense&service=noslash", "%", "search"] {
            assert_eq!(Query::parse(odd), Query::default(), "{odd}");
        }
        let long = Query::parse(&format!("search={}", "%E2%80%AE".repeat(5000)));
        assert_eq!(long.search.chars().count(), SEARCH_MAX);
    }

    #[test]
    fn an_event_is_one_line_of_data_whatever_the_error_says() {
        let text = trouble(&anyhow::anyhow!("two\nlines\n\nevent: state\r\x1b[31m"));
        assert_eq!(
            text,
            "event: trouble\ndata: \"two\\\\u000alines\\\\u000a\\\\u000aevent: state\\\\u000d\\\\u001b[31m\"\n\n"
        );
    }
}
