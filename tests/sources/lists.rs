//! How lists and watches are asked for: from the server's cache, never older than what was seen, and not by all nodes at
//! once. Time is virtual.

use std::time::Duration;

use crate::laboratory::apiserver::source::{KINDS, Source, service};
use crate::laboratory::apiserver::{Answer, ApiServer, Request, Resource, Verb, recorded};
use kubelane::model::Kind;

/// Version, match and limit of the requests of this sort for Services.
fn freshness(server: &ApiServer, verb: Verb) -> Vec<[String; 3]> {
    let asked = |request: &Request| {
        ["resourceVersion", "resourceVersionMatch", "limit"]
            .map(|name| request.query.get(name).cloned().unwrap_or_default())
    };
    let requests = server.requests();
    requests.iter().filter(|r| r.resource == Resource::Services && r.verb == verb).map(asked).collect()
}

fn not_older_than(version: &str) -> [String; 3] {
    [version, "NotOlderThan", ""].map(str::to_owned)
}

#[tokio::test(start_paused = true)]
async fn lists_ask_the_servers_cache_for_what_is_not_older_than_what_was_seen() {
    for streaming in [true, false] {
        let server = ApiServer::with_recorded_lists();
        if !streaming {
            server.refuse_streaming();
        }
        let mut source = Source::start(server.clone());
        source.listed().await;
        let version = server.upsert(service("late", "10.96.7.7"));
        source.until("a live change", |s| s.services.contains_key("test/late")).await;
        server.set_down(true);
        server.compact();
        server.upsert(service("later", "10.96.7.8"));
        server.compact();
        server.set_down(false);
        source.until("the relist", |s| s.lists(Kind::Services) == 2).await;
        let verb = if streaming { Verb::StreamingList } else { Verb::List };
        let expected = [not_older_than("0"), not_older_than(&version.to_string())];
        assert_eq!(freshness(&server, verb), expected, "streaming: {streaming}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_older_list_never_brings_back_what_is_gone() {
    for streaming in [true, false] {
        let server = ApiServer::with_recorded_lists();
        if !streaming {
            server.refuse_streaming();
        }
        let mut source = Source::start(server.clone());
        source.listed().await;
        // Another replica, which has not heard of the deletion, is asked after the watch broke.
        server.fall_behind();
        server.delete(Resource::Services, "shop", "web");
        source.until("the deletion", |s| !s.services.contains_key("shop/web")).await;
        server.upsert(service("other", "10.96.7.7"));
        server.compact();
        server.inject(Resource::Services, &recorded("watch-gone-410.jsonl"));
        source.until("the relist", |s| s.lists(Kind::Services) == 2).await;
        assert!(!source.seen.services.contains_key("shop/web"), "streaming: {streaming}");
        assert!(source.seen.services.contains_key("test/other"), "streaming: {streaming}");
        assert_eq!(source.status.services.errors(), 0, "a cache that is behind is no failure");
        server.catch_up();
    }
}

#[tokio::test(start_paused = true)]
async fn versions_that_begin_anew_are_followed() {
    let server = ApiServer::with_recorded_lists();
    let mut source = Source::start(server.clone());
    source.listed().await;
    server.restore();
    server.delete(Resource::Services, "shop", "web");
    server.inject(Resource::Services, &recorded("watch-gone-410.jsonl"));
    server.script(Resource::Services, Verb::Watch, [Answer::Ended(recorded("watch-gone-410.jsonl"))]);
    source.until("the relist", |s| s.lists(Kind::Services) == 2).await;
    assert!(!source.seen.services.contains_key("shop/web"));
    server.upsert(service("late", "10.96.7.7"));
    source.until("a live change", |s| s.services.contains_key("test/late")).await;
}

#[tokio::test(start_paused = true)]
async fn a_streaming_list_that_was_slow_once_is_tried_again() {
    let server = ApiServer::with_recorded_lists();
    server.script(Resource::Services, Verb::StreamingList, [Answer::Stream(String::new())]);
    let mut source = Source::start(server.clone());
    source.listed().await;
    let at = |verb: Verb| {
        let requests = server.requests();
        requests.iter().filter(|r| r.resource == Resource::Services && r.verb == verb).map(|r| r.at).collect::<Vec<_>>()
    };
    let (streamed, listed) = (at(Verb::StreamingList)[0], at(Verb::List)[0]);
    let waited = listed - streamed;
    assert!(waited > Duration::from_millis(10_300), "a server with too much to do is not asked for more: {waited:?}");
    source.settle(600).await;
    server.inject(Resource::Services, &recorded("watch-gone-410.jsonl"));
    source.until("the relist", |s| s.lists(Kind::Services) == 2).await;
    assert_eq!((at(Verb::StreamingList).len(), at(Verb::List).len()), (2, 1));
}

/// client-go's five to ten minutes.
#[tokio::test(start_paused = true)]
async fn each_watch_lasts_another_time() {
    let server = ApiServer::with_recorded_lists();
    let mut source = Source::start(server.clone());
    source.listed().await;
    source.settle(4 * 3600).await;
    let requests = server.requests();
    let lengths: Vec<u64> = requests.iter().map(|r| r.query["timeoutSeconds"].parse().unwrap()).collect();
    assert!(lengths.iter().all(|length| (300..=600).contains(length)), "{lengths:?}");
    let different: std::collections::BTreeSet<_> = lengths.iter().collect();
    assert!((70..150).contains(&lengths.len()) && different.len() > lengths.len() / 2, "{lengths:?}");
    assert!(source.status.all().iter().all(|(_, state)| state.errors() == 0), "the end of a watch is no failure");
}

#[tokio::test(start_paused = true)]
async fn the_nodes_of_a_cluster_do_not_return_in_step() {
    let server = ApiServer::with_recorded_lists();
    let mut nodes = Vec::new();
    for _ in 0..40 {
        let mut source = Source::start(server.clone());
        source.listed().await;
        nodes.push(source);
    }
    let spread = |verb: Verb, after: tokio::time::Instant| {
        let requests = server.requests();
        let later = requests.iter().filter(|r| r.verb == verb && r.resource == Resource::Services && r.at >= after);
        let times: Vec<_> = later.map(|r| r.at).collect();
        assert_eq!(times.len(), 40, "{verb:?}");
        *times.iter().max().unwrap() - *times.iter().min().unwrap()
    };
    tokio::time::sleep(Duration::from_secs(20)).await;
    let now = tokio::time::Instant::now();
    server.break_watches();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(spread(Verb::Watch, now) > Duration::from_millis(500), "watches that broke at once");
    let now = tokio::time::Instant::now();
    server.inject(Resource::Services, &recorded("watch-gone-410.jsonl"));
    for source in &mut nodes {
        source.until("the relist", |s| s.lists(Kind::Services) == 2).await;
    }
    assert!(spread(Verb::StreamingList, now) > Duration::from_secs(2), "lists that are due at once");
}

/// What one daemon asks of an API server: at its start, in an hour with a change every ten seconds, and when the server
/// restarts and has forgotten all history. benches/RESULTS.md says what five thousand daemons make of it.
#[tokio::test(start_paused = true)]
async fn a_daemon_asks_little_of_the_api_server() {
    let server = ApiServer::with_recorded_lists();
    let mut source = Source::start(server.clone());
    source.listed().await;
    let count = || server.requests().len();
    assert_eq!(count(), 3, "a streaming list for each kind, which becomes its watch");
    for change in 0..360 {
        server.upsert(service("changing", &format!("10.96.7.{}", change % 250 + 1)));
        source.settle(10).await;
    }
    let hour = count() - 3;
    assert!((3 * 6..=3 * 12).contains(&hour), "{hour} requests in an hour");
    let before = count();
    server.set_down(true);
    source.settle(20).await;
    let refused = count() - before;
    server.upsert(service("meanwhile", "10.96.7.7"));
    server.compact();
    server.set_down(false);
    let before = count();
    source.until("the relists", |s| KINDS.iter().all(|kind| s.lists(*kind) == 2)).await;
    let restart = count() - before;
    println!(
        "3 requests at the start, {hour} in an hour, {refused} while the server is away for 20 s, {restart} after it"
    );
    assert!(refused <= 3 * 8, "{refused} requests in 20 s without a server");
    assert_eq!(restart, 6, "a watch that is too old, and a list, for each kind");
}
