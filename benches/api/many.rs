//! Many nodes' sources, each with connections of its own, and a server that restarts: when do they come back?

use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kubelane::k8s::ApiServer as Client;
use kubelane::objects::{Settings, SourceStatus};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use crate::common::print_table;
use crate::common::world::BenchWorld;
use crate::gate::Gate;
use crate::laboratory::apiserver::Verb;
use crate::laboratory::pki;
use crate::tally::{Tally, bytes};
use crate::{Arguments, NODE, quiet, restart, serve, server, watched, write_kubeconfig};

/// Services of a small cluster: it is the requests that count here.
const SERVICES: usize = 10;

pub fn come_back(runtime: &Runtime, arguments: &Arguments) -> anyhow::Result<()> {
    if arguments.sources == 0 {
        return Ok(());
    }
    let server = server(&BenchWorld::new(SERVICES, arguments.endpoints));
    let directory = tempfile::tempdir()?;
    pki::make_certificates(directory.path());
    let at = serve(runtime, &server, directory.path())?;
    let mut gate = Gate::new(runtime.handle(), at, |at| Ok(TcpListener::bind(at)?))?;
    let kubeconfig = write_kubeconfig(directory.path(), gate.at)?;
    for _ in 0..arguments.sources {
        let client = runtime.block_on(Client::configured(Some(kubeconfig.clone()), None))?;
        runtime.spawn(source(client));
    }
    watched(&server, arguments.sources)?;
    quiet(&gate);

    let before = Tally::now(&server, &gate);
    let (asked, connected) = (server.requests().len(), gate.counts.connections.lock().expect("no panic").len());
    restart(&server, &mut gate, arguments)?;
    let back = Instant::now();
    watched(&server, arguments.sources)?;
    let all_after = back.elapsed();
    let tally = Tally::now(&server, &gate).since(before);

    let connections = gate.counts.connections.lock().expect("no panic")[connected..].to_vec();
    let requests = server.requests()[asked..].to_vec();
    let times = |wanted: &[Verb]| -> Vec<Duration> {
        let of = requests.iter().filter(|request| wanted.contains(&request.verb));
        of.map(|request| request.at.into_std().saturating_duration_since(back)).collect()
    };
    let rows = [
        ("connections", connections.iter().map(|at| at.saturating_duration_since(back)).collect()),
        ("watches that are too old", times(&[Verb::Watch])),
        ("lists, streaming or not", times(&[Verb::StreamingList, Verb::List])),
    ];
    println!(
        "{} sources, a server that was away for {} s and has forgotten: all watch again {:.1} s after its return; {} from \
         the server.\n",
        arguments.sources,
        arguments.away,
        all_after.as_secs_f64(),
        bytes(tally.from_server)
    );
    let heading = ["after the return", "all", "in the busiest second", "each second, from the first on"];
    print_table(&heading, &rows.map(|(what, times)| row(what, &times)));
    Ok(())
}

/// Reads and forgets.
async fn source(client: Client) {
    let (sender, mut changes) = mpsc::channel(64);
    let settings = Settings { node_name: NODE.into(), service_proxy_name: None };
    let forgetting = async { while changes.recv().await.is_some() {} };
    tokio::join!(client.follow(settings, sender, Arc::new(SourceStatus::default())), forgetting);
}

fn row(what: &str, times: &[Duration]) -> Vec<String> {
    let last = times.iter().map(Duration::as_secs).max().unwrap_or(0);
    let each: Vec<usize> =
        (0..=last).map(|second| times.iter().filter(|time| time.as_secs() == second).count()).collect();
    let listed: Vec<String> = each.iter().map(usize::to_string).collect();
    let busiest = each.iter().max().copied().unwrap_or(0);
    vec![what.to_owned(), times.len().to_string(), busiest.to_string(), listed.join(" ")]
}
