//! The Kubernetes source against a double of the API server: real recordings, a live world, and everything that goes
//! wrong. Time is virtual: ten minutes of outage take no time.

use std::sync::Arc;
use std::time::Duration;

use crate::laboratory::apiserver::seen::Seen;
use crate::laboratory::apiserver::source::{Source, service};
use crate::laboratory::apiserver::{Answer, ApiServer, Resource, Verb, recorded};
use kubelane::k8s;
use kubelane::model::{Family, Kind, TrafficPolicy};
use kubelane::objects::{Settings, SourceStatus};
use serde_json::{Value, json};
use tokio::sync::mpsc;

/// The records of the recorded state after all changes, read by list.
async fn world_after() -> Seen {
    let mut source = Source::start(ApiServer::with_lists("services-after.json", "endpointslices-after.json"));
    source.listed().await;
    source.seen
}

#[tokio::test(start_paused = true)]
async fn the_double_selects_as_the_real_server_did() {
    let mut source = Source::start(ApiServer::with_recorded_lists());
    source.listed().await;
    let selected: Value = serde_json::from_str(&recorded("services-selected.json")).unwrap();
    let mut expected: Vec<String> = selected["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| {
            format!("{}/{}", s["metadata"]["namespace"].as_str().unwrap(), s["metadata"]["name"].as_str().unwrap())
        })
        .collect();
    // The server's selector lets ExternalName through; a proxy does not serve it.
    expected.retain(|name| name != "infra/mail");
    expected.sort();
    assert_eq!(source.seen.services.keys().cloned().collect::<Vec<_>>(), expected);
    assert_eq!(source.seen.slices.len(), 24, "all but the headless one");
    for request in source.server.requests() {
        assert!(request.query.contains_key("timeoutSeconds") || request.verb == Verb::List);
        let (labels, fields) = (request.query.get("labelSelector"), request.query.get("fieldSelector"));
        let expected = match request.resource {
            Resource::Services => (Some("!service.kubernetes.io/service-proxy-name"), Some("spec.clusterIP!=None")),
            Resource::EndpointSlices => (Some("!service.kubernetes.io/headless"), None),
            Resource::Nodes => (None, Some("metadata.name=n1")),
        };
        assert_eq!((labels.map(String::as_str), fields.map(String::as_str)), expected);
    }
}

#[tokio::test(start_paused = true)]
async fn recorded_lists_load_as_they_are() {
    let mut source = Source::start(ApiServer::with_recorded_lists());
    source.listed().await;
    let seen = &source.seen;
    assert_eq!(seen.warnings, Default::default(), "a real cluster gives no reason for warnings");
    assert!(seen.services.values().all(|s| s.created > 1_700_000_000));

    let gateway = &seen.services["edge/gateway"];
    let text = |ips: &[kubelane::model::Ipx]| ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    assert_eq!(text(&gateway.cluster_ips), "10.96.118.60 fd00:96::c:79d4");
    assert_eq!(
        text(&gateway.load_balancer_ips),
        "198.51.100.10 2001:db8:1::10",
        "ipMode Proxy and hostnames are not ours"
    );
    assert_eq!(gateway.source_ranges.len(), 3, "blanks around a range do not matter");
    assert_eq!((gateway.external_policy, gateway.health_check_node_port), (TrafficPolicy::Local, 32654));
    assert_eq!(seen.services["edge/vip"].external_ips.len(), 1);
    assert_eq!(seen.services["infra/node-agent"].internal_policy, TrafficPolicy::Local);
    assert_eq!(seen.services["shop/cart"].affinity_seconds, Some(600));
    assert_eq!(seen.services["shop/big"].affinity_seconds, None);
    assert_eq!(seen.services["infra/v6only"].cluster_ips[0].family(), Family::Ipv6);
    let dns: Vec<_> =
        seen.services["kube-system/kube-dns"].ports.iter().map(|p| (&*p.name, p.protocol.as_str(), p.port)).collect();
    assert_eq!(dns, [("dns", "UDP", 53), ("dns-tcp", "TCP", 53), ("metrics", "TCP", 9153)]);
    assert_eq!(seen.services["infra/sctp"].ports[0].protocol.as_str(), "SCTP");
    assert_eq!(seen.services["shop/web"].ports[0].node_port, 30080);

    let conditions = |slice: &str, at: usize| {
        let endpoint = &seen.slices[slice].endpoints[at];
        (endpoint.ready, endpoint.serving, endpoint.terminating)
    };
    assert_eq!(conditions("edge/draining-9ld89", 0), (false, true, true));
    assert_eq!(conditions("infra/early-8h4cd", 0), (true, false, false));
    assert_eq!(conditions("infra/legacy-1", 0), (true, true, false), "missing conditions have the API's defaults");
    assert_eq!(conditions("infra/legacy-1", 2), (false, true, true));
    let empty = &seen.slices["infra/empty-46p84"];
    assert_eq!((empty.endpoints.len(), empty.ports.len()), (0, 0), "null lists are empty lists");
    assert_eq!(empty.triggered, Some(1_795_311_096_000_000_000));
    assert_eq!(&*seen.slices["default/kubernetes"].service, "kubernetes");
    let cache = &seen.slices["shop/cache-lbgjl"].endpoints[0];
    assert!(cache.hints.as_ref().is_some_and(|h| !h.nodes.is_empty()), "{cache:?}");
    let catalog = &seen.slices["shop/catalog-5dh4k"].endpoints[0];
    assert!(catalog.hints.as_ref().is_some_and(|h| !h.zones.is_empty()), "{catalog:?}");
    let big: usize = seen.slices.values().filter(|s| &*s.service == "big").map(|s| s.endpoints.len()).sum();
    assert!(big > 100, "{big}");

    let node = seen.node.as_ref().expect("the own Node");
    assert_eq!((&*node.name, node.zone.as_deref(), node.being_deleted), ("n1", Some("zone-a"), false));
    assert!(!node.internal_ips.is_empty());
}

#[tokio::test(start_paused = true)]
async fn replaying_the_streaming_lists_arrives_at_the_recorded_end() {
    let server = ApiServer::with_recorded_lists();
    for (resource, file) in [
        (Resource::Services, "watch-services-initial-events.jsonl"),
        (Resource::EndpointSlices, "watch-endpointslices-initial-events.jsonl"),
        (Resource::Nodes, "watch-node.jsonl"),
    ] {
        server.script(resource, Verb::StreamingList, [Answer::Stream(recorded(file))]);
    }
    let mut source = Source::start(server);
    source.listed().await;
    source.settle(5).await;
    let after = world_after().await;
    assert_eq!(source.seen.services, after.services);
    assert_eq!(source.seen.slices, after.slices);
    let node = source.seen.node.as_ref().unwrap();
    assert_eq!((node.zone.as_deref(), node.being_deleted), (Some("zone-b"), true));
    assert!(source.server.requests().iter().all(|r| r.verb == Verb::StreamingList));
}

#[tokio::test(start_paused = true)]
async fn replaying_the_watches_from_the_lists_arrives_at_the_recorded_end() {
    let server = ApiServer::with_recorded_lists();
    server.refuse_streaming();
    for (resource, file) in [
        (Resource::Services, "watch-services-from-list.jsonl"),
        (Resource::EndpointSlices, "watch-endpointslices-from-list.jsonl"),
    ] {
        server.script(resource, Verb::Watch, [Answer::Stream(recorded(file))]);
    }
    let mut source = Source::start(server);
    source.listed().await;
    source.settle(5).await;
    let after = world_after().await;
    assert_eq!(source.seen.services, after.services);
    assert_eq!(source.seen.slices, after.slices);
    let first =
        source.server.requests().into_iter().find(|r| r.verb == Verb::Watch && r.resource == Resource::Services);
    assert_eq!(first.unwrap().query["resourceVersion"], "713", "the watch begins where the list ended");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_refuses_streaming_lists_is_listed_and_watched() {
    let server = ApiServer::with_recorded_lists();
    server.refuse_streaming();
    let mut source = Source::start(server.clone());
    source.listed().await;
    server.upsert(service("late", "10.96.7.7"));
    source.until("a live change arrives", |s| s.services.contains_key("test/late")).await;
    let verbs: Vec<Verb> =
        server.requests().iter().filter(|r| r.resource == Resource::Services).map(|r| r.verb).collect();
    assert_eq!(verbs, [Verb::StreamingList, Verb::List, Verb::Watch]);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_ignores_streaming_lists_is_listed_and_watched() {
    let server = ApiServer::with_recorded_lists();
    server.ignore_streaming();
    let mut source = Source::start(server.clone());
    source.listed().await;
    assert_eq!(source.seen.services.len(), 16);
    let before = server.requests().len();
    source.settle(600).await;
    assert!(server.requests()[before..].iter().all(|r| r.verb == Verb::Watch), "it is not asked again");
}

#[tokio::test(start_paused = true)]
async fn recorded_pages_make_one_list_and_an_expired_token_begins_it_again() {
    let server = ApiServer::with_recorded_lists();
    server.refuse_streaming();
    let page = |file: &str| Answer::Body(200, recorded(file));
    let expired = Answer::Body(410, recorded("error-410-expired-continue.json"));
    server.script(
        Resource::Services,
        Verb::List,
        [page("services-page-1.json"), expired, page("services-page-1.json"), page("services-page-2.json")],
    );
    let mut source = Source::start(server);
    source.listed().await;
    // The recording ends with a second token, which the double answers with its whole list.
    assert!(source.seen.begun(Kind::Services) == 2, "the first list never ended");
    assert_eq!(source.seen.lists(Kind::Services), 1);
    assert!(source.seen.services.contains_key("edge/gateway") && source.seen.services.contains_key("infra/v6only"));
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_is_too_old_is_listed_again_and_what_went_meanwhile_is_gone() {
    let server = ApiServer::with_recorded_lists();
    let mut source = Source::start(server.clone());
    source.listed().await;
    server.set_down(true);
    server.delete(Resource::Services, "shop", "web");
    server.upsert(service("new", "10.96.7.7"));
    server.compact();
    server.set_down(false);
    source.until("the relist", |s| s.lists(Kind::Services) == 2).await;
    assert!(!source.seen.services.contains_key("shop/web"));
    assert!(source.seen.services.contains_key("test/new"));
    assert_eq!(source.status.services.lists(), 2);
}

#[tokio::test(start_paused = true)]
async fn the_recorded_410_leads_to_a_relist() {
    let server = ApiServer::with_recorded_lists();
    server.refuse_streaming();
    server.script(Resource::Services, Verb::Watch, [Answer::Ended(recorded("watch-gone-410.jsonl"))]);
    let mut source = Source::start(server);
    source.until("the relist", |s| s.lists(Kind::Services) == 2).await;
    assert_eq!(source.seen.services.len(), 16);
    assert_eq!(source.status.services.errors(), 0, "an expired watch is not a failure");
}

#[tokio::test(start_paused = true)]
async fn errors_of_the_server_are_retried_until_they_end() {
    let cases = [
        (401, recorded("error-401-bad-token.json")),
        (403, recorded("error-403-forbidden.json")),
        (404, recorded("error-404-not-found.json")),
        (429, "{}".to_owned()),
        (500, "the etcd cluster is on fire".to_owned()),
        (503, String::new()),
    ];
    for (code, body) in cases {
        let server = ApiServer::with_recorded_lists();
        let answers = vec![Answer::Body(code, body); 4];
        server.script(Resource::Services, Verb::StreamingList, answers);
        let mut source = Source::start(server.clone());
        source.until("the other kinds", |s| s.lists(Kind::EndpointSlices) == 1 && s.lists(Kind::Node) == 1).await;
        assert!(!source.status.services.connected() && !source.status.services.listed(), "{code}");
        assert!(source.status.services.last_error().is_some(), "{code}");
        source.listed().await;
        assert_eq!(source.seen.services.len(), 16, "{code}");
        assert_eq!(source.status.services.errors(), 4, "{code}");
        assert!(source.status.services.connected() && source.status.services.last_error().is_none(), "{code}");
        let at: Vec<_> = server.requests().iter().filter(|r| r.resource == Resource::Services).map(|r| r.at).collect();
        let gaps: Vec<Duration> = at.windows(2).map(|w| w[1] - w[0]).collect();
        assert!(gaps[0] >= Duration::from_millis(400) && gaps[3] > 2 * gaps[0], "{code}: no backoff: {gaps:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_forbids_everything_just_after_its_start_is_no_reason_for_advice() {
    let server = ApiServer::with_recorded_lists();
    let mut source = Source::start(server.clone());
    source.listed().await;
    let forbidden = Answer::Body(403, recorded("error-403-forbidden.json"));
    server.script(Resource::Services, Verb::Watch, vec![forbidden; 12]);
    source.settle(10).await;
    server.break_watches();
    source.settle(5).await;
    assert_eq!(source_error(&source.status), "the API server forbids the watch for now (403 Forbidden)");
    source.settle(60).await;
    assert_eq!(source_error(&source.status), "the API server forbids the watch (403 Forbidden)", "it lasts");
}

fn source_error(status: &SourceStatus) -> String {
    status.services.last_error().unwrap_or_default()
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_breaks_in_the_middle_of_an_object_is_made_again() {
    let text = recorded("watch-services-initial-events.jsonl");
    let server = ApiServer::with_recorded_lists();
    let half = text[..text.len() / 3].to_owned();
    server.script(Resource::Services, Verb::StreamingList, [Answer::Broken(half.clone()), Answer::Ended(half)]);
    let mut source = Source::start(server);
    source.listed().await;
    assert_eq!(source.seen.services.len(), 16);
    assert_eq!(source.seen.begun(Kind::Services), 3);
    assert_eq!(source.seen.lists(Kind::Services), 1);
}

#[tokio::test(start_paused = true)]
async fn a_live_watch_that_breaks_is_resumed_without_a_list() {
    let server = ApiServer::with_recorded_lists();
    let mut source = Source::start(server.clone());
    source.listed().await;
    source.settle(10).await;
    server.inject(Resource::Services, r#"{"type":"MODIFIED","object":{"metadata":{"na"#);
    server.break_watches();
    server.upsert(service("meanwhile", "10.96.7.7"));
    source.until("the change", |s| s.services.contains_key("test/meanwhile")).await;
    assert_eq!(source.seen.lists(Kind::Services), 1);
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_ends_at_once_is_not_opened_in_a_loop() {
    let server = ApiServer::with_recorded_lists();
    server.refuse_streaming();
    server.script(Resource::Services, Verb::Watch, vec![Answer::Ended(String::new()); 1000]);
    let mut source = Source::start(server.clone());
    source.listed().await;
    source.settle(60).await;
    let watches =
        server.requests().iter().filter(|r| r.verb == Verb::Watch && r.resource == Resource::Services).count();
    assert!((3..12).contains(&watches), "{watches} watches in a minute");
    assert!(source.status.services.last_error().is_some_and(|e| e.contains("end as soon")));
}

#[tokio::test(start_paused = true)]
async fn a_malformed_object_is_skipped_and_named_and_the_rest_goes_on() {
    for streaming in [true, false] {
        let server = ApiServer::with_recorded_lists();
        if !streaming {
            server.refuse_streaming();
        }
        let mut bad = service("bad", "10.96.7.7");
        bad["spec"]["ports"] = json!("eighty");
        server.upsert(bad.clone());
        let mut source = Source::start(server.clone());
        source.listed().await;
        assert_eq!(source.seen.services.len(), 16);
        assert!(source.seen.warnings["Service test/bad"][0].contains("skipped"), "{:?}", source.seen.warnings);
        // Mended, then broken again while it is watched: the good state stays.
        server.upsert(service("bad", "10.96.7.7"));
        source.until("the mended object", |s| s.services.contains_key("test/bad") && s.warnings.is_empty()).await;
        server.upsert(bad);
        server.upsert(service("next", "10.96.7.8"));
        source.until("what follows", |s| s.services.contains_key("test/next")).await;
        assert!(source.seen.services.contains_key("test/bad") && source.seen.warnings.len() == 1);
        assert_eq!(source.seen.lists(Kind::Services), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_warning_that_lasts_is_told_once_though_its_object_changes_and_an_object_without_a_name_is_skipped() {
    let server = ApiServer::with_recorded_lists();
    let mut source = Source::start(server.clone());
    source.listed().await;
    let mut bad = service("bad", "10.96.7.7");
    bad["spec"]["ports"] = json!("eighty");
    server.upsert(bad.clone());
    source.until("the warning", |s| s.warnings.contains_key("Service test/bad")).await;
    let said = source.seen.warnings["Service test/bad"].clone();
    bad["metadata"]["annotations"] = json!({"padding": "moves the place of the mistake"});
    server.upsert(bad);
    // With a version: an object without one is the end of the watch, and the list is made again.
    let nameless = json!({"metadata": {"resourceVersion": "2000000"}, "spec": {"clusterIP": "10.96.7.9"}});
    server.inject(Resource::Services, &format!("{{\"type\":\"ADDED\",\"object\":{nameless}}}\n"));
    server.upsert(service("next", "10.96.7.8"));
    source.until("what follows", |s| s.services.contains_key("test/next")).await;
    assert_eq!(source.seen.warnings["Service test/bad"], said);
    assert!(source.seen.warnings["Service default/"][0].contains("no metadata.name"), "{:?}", source.seen.warnings);
    assert!(!source.seen.services.contains_key("default/"));
}

#[tokio::test(start_paused = true)]
async fn a_line_that_is_not_json_does_not_end_the_watch() {
    let server = ApiServer::with_recorded_lists();
    let mut source = Source::start(server.clone());
    source.listed().await;
    server.inject(Resource::Services, "<html>504 Gateway Time-out</html>\n");
    server.upsert(service("next", "10.96.7.8"));
    source.until("what follows", |s| s.services.contains_key("test/next")).await;
    assert_eq!(source.status.services.errors(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_stops_being_ours_is_gone() {
    let server = ApiServer::with_recorded_lists();
    let mut source = Source::start(server.clone());
    source.listed().await;
    let change = |name: &str, edit: &dyn Fn(&mut Value)| {
        let mut object = server.get(Resource::Services, "shop", name).unwrap();
        object["kind"] = json!("Service");
        edit(&mut object);
        server.upsert(object);
    };
    change("web", &|s| s["metadata"]["labels"]["service.kubernetes.io/service-proxy-name"] = json!("other"));
    change("cart", &|s| s["spec"] = json!({"type": "ExternalName", "externalName": "cart.example.com"}));
    change("cache", &|s| s["spec"]["clusterIP"] = json!("None"));
    let gone = ["shop/web", "shop/cart", "shop/cache"];
    source.until("three are gone", |s| gone.iter().all(|g| !s.services.contains_key(*g))).await;
    let mut slice = server.get(Resource::EndpointSlices, "shop", "cache-lbgjl").unwrap();
    slice["kind"] = json!("EndpointSlice");
    slice["metadata"]["labels"]["service.kubernetes.io/headless"] = json!("");
    server.upsert(slice);
    source.until("the slice is gone", |s| !s.slices.contains_key("shop/cache-lbgjl")).await;
}

#[tokio::test(start_paused = true)]
async fn a_named_proxy_serves_its_own_services_only() {
    let settings = Settings { node_name: "n1".into(), service_proxy_name: Some("someone-else".into()) };
    let mut source = Source::with(ApiServer::with_recorded_lists(), settings);
    source.listed().await;
    assert_eq!(source.seen.services.keys().collect::<Vec<_>>(), ["infra/other-proxy"]);
}

#[tokio::test(start_paused = true)]
async fn ten_minutes_without_a_server_change_nothing_and_end_by_themselves() {
    let server = ApiServer::with_recorded_lists();
    let mut source = Source::start(server.clone());
    source.listed().await;
    server.set_down(true);
    let before = server.requests().len();
    source.settle(600).await;
    assert_eq!(source.seen.services.len(), 16, "what was known stays in force");
    let attempts = server.requests().len() - before;
    assert!((30..150).contains(&attempts), "{attempts} attempts of three watches in ten minutes");
    assert!(!source.status.services.connected());
    server.delete(Resource::Services, "shop", "web");
    server.upsert(service("meanwhile", "10.96.7.7"));
    server.compact();
    server.set_down(false);
    let back = tokio::time::Instant::now();
    source
        .until("the server is back", |s| s.services.contains_key("test/meanwhile") && s.lists(Kind::Services) == 2)
        .await;
    assert!(!source.seen.services.contains_key("shop/web"));
    assert!(back.elapsed() < Duration::from_secs(75), "{:?}", back.elapsed());
    source.until("all are connected", |_| true).await;
}

#[tokio::test(start_paused = true)]
async fn a_server_that_hangs_is_given_up_and_asked_again() {
    let server = ApiServer::with_recorded_lists();
    server.refuse_streaming();
    server.script(Resource::Services, Verb::List, [Answer::Hang, Answer::Stream("{\"kind\":\"Serv".into())]);
    let mut source = Source::start(server);
    source.listed().await;
    assert_eq!(source.seen.services.len(), 16);
    assert_eq!(source.status.services.errors(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_died_silently_is_noticed_in_two_minutes_and_resumed() {
    let server = ApiServer::with_recorded_lists();
    let initial = recorded("watch-services-initial-events.jsonl");
    server.script(Resource::Services, Verb::StreamingList, [Answer::Stream(initial)]);
    let mut source = Source::start(server.clone());
    source.listed().await;
    let started = tokio::time::Instant::now();
    source.settle(130).await;
    let resumed = server.requests().into_iter().find(|r| r.resource == Resource::Services && r.verb == Verb::Watch);
    let resumed = resumed.expect("the watch was opened again");
    assert_eq!(resumed.query["resourceVersion"], "796", "from the last bookmark");
    assert!(resumed.at - started < Duration::from_secs(130));
}

#[tokio::test(start_paused = true)]
async fn a_quiet_healthy_watch_is_left_alone() {
    let server = ApiServer::with_recorded_lists();
    let mut source = Source::start(server.clone());
    source.listed().await;
    let before = server.requests().len();
    source.settle(280).await;
    assert_eq!(server.requests().len(), before);
    assert!(source.status.all().iter().all(|(_, state)| state.connected()));
}

#[tokio::test]
async fn the_source_ends_when_nobody_listens() {
    let server = ApiServer::with_recorded_lists();
    let (sender, receiver) = mpsc::channel(1);
    let settings = Settings { node_name: "n1".into(), service_proxy_name: None };
    let source = tokio::spawn(k8s::run(server.client(), settings, sender, Arc::default()));
    tokio::time::sleep(Duration::from_millis(20)).await;
    drop(receiver);
    tokio::time::timeout(Duration::from_secs(5), source).await.expect("it ends").unwrap();
}

#[tokio::test]
async fn over_a_socket_it_introduces_itself_and_follows() {
    let server = ApiServer::with_recorded_lists();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(server.serve(listener));
    let config = k8s::config(None, Some(&address.to_string())).await.unwrap();
    let (sender, changes) = mpsc::channel(16);
    let settings = Settings { node_name: "n1".into(), service_proxy_name: None };
    let status = Arc::new(SourceStatus::default());
    tokio::spawn(k8s::run(k8s::client(&config).unwrap(), settings, sender, status.clone()));
    let mut source = Source { server, changes, status, seen: Seen::default() };
    source.listed().await;
    let agent = format!("kubelane/{}", env!("CARGO_PKG_VERSION"));
    assert!(source.server.requests().iter().all(|r| r.user_agent == agent));
    source.server.upsert(service("late", "10.96.7.7"));
    source.until("a live change", |s| s.services.contains_key("test/late")).await;
    source.server.break_watches();
    source.server.delete(Resource::Services, "test", "late");
    source.until("a change after a break", |s| !s.services.contains_key("test/late")).await;
    assert_eq!(source.seen.lists(Kind::Services), 1);
}
