//! Events and the startup taint, against the API server's double in this process and in virtual time.

use std::time::Duration;

use kubelane::k8s::{events, startup_taint};
use kubelane::model::{About, Notice, ObjectName};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::laboratory::apiserver::{ApiServer, Resource};

fn about(service: &str, note: &str) -> Notice {
    Notice {
        about: About::Service(ObjectName::new("shop", service)),
        is_warning: true,
        reason: "NotServedAsAsked",
        action: "Program",
        note: note.to_owned(),
        is_of_cluster: false,
    }
}

/// Posts all of them, to the end. Returns the events, and how long it took.
async fn posted(server: &ApiServer, notices: Vec<Notice>) -> (Vec<Value>, Duration) {
    let (sender, receiver) = mpsc::channel(events::WAITING);
    notices.into_iter().for_each(|notice| sender.try_send(notice).unwrap());
    drop(sender);
    let began = Instant::now();
    events::run(server.client(), "node-a".to_owned(), receiver).await;
    (server.events("NotServedAsAsked"), began.elapsed())
}

#[tokio::test(start_paused = true)]
async fn a_notice_becomes_an_event_of_its_object_and_again_one_series() {
    let server = ApiServer::new();
    let (events, _) =
        posted(&server, vec![about("web", "port 1"), about("api", "port 2"), about("web", "port 1")]).await;
    assert_eq!(events.len(), 2, "{events:#?}");
    let web = &events[0];
    let expected =
        json!({"apiVersion": "v1", "kind": "Service", "namespace": "shop", "name": "web", "uid": "shop/web"});
    assert_eq!(web["regarding"], expected);
    assert_eq!((&web["type"], &web["note"]), (&json!("Warning"), &json!("port 1")));
    assert_eq!((&web["reportingController"], &web["reportingInstance"]), (&json!("kubelane"), &json!("node-a")));
    assert_eq!((&web["series"]["count"], &events[1]["series"]), (&json!(2), &Value::Null));
}

/// Forty nodes find the same fault in the same Service.
#[tokio::test(start_paused = true)]
async fn what_every_node_says_is_one_event_and_not_asked_for_by_all_at_once() {
    let server = ApiServer::new();
    let began = Instant::now();
    let nodes: Vec<_> = (0..40)
        .map(|node| {
            let (sender, receiver) = mpsc::channel(events::WAITING);
            for note in ["port 1", "port 2"] {
                sender.try_send(Notice { is_of_cluster: true, ..about("web", note) }).unwrap();
            }
            tokio::spawn(events::run(server.client(), format!("node-{node}"), receiver))
        })
        .collect();
    for node in nodes {
        node.await.unwrap();
    }
    let events = server.events("NotServedAsAsked");
    let notes: Vec<&str> = events.iter().map(|event| event["note"].as_str().unwrap()).collect();
    assert_eq!(notes, ["port 1", "port 2"], "{events:#?}");
    assert_eq!((&events[0]["regarding"]["uid"], &events[0]["type"]), (&json!("shop/web"), &json!("Warning")));
    let at = server.writes();
    assert_eq!(at.len(), 80, "each node asks once, and takes a conflict for an answer");
    let busiest =
        at.iter().map(|from| at.iter().filter(|to| (*from..*from + Duration::from_secs(1)).contains(*to)).count());
    assert!(busiest.max() < Some(20), "of 80 in a second");
    assert!(began.elapsed() < Duration::from_secs(31), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn failures_that_may_pass_are_tried_again_and_others_cost_their_event_only() {
    let server = ApiServer::new();
    server.fail_writes([500, 429, 503]);
    assert_eq!(posted(&server, vec![about("web", "x")]).await.0.len(), 1, "the server recovers");
    for refusal in [403, 404, 422] {
        let server = ApiServer::new();
        server.fail_writes([refusal]);
        let (events, took) = posted(&server, vec![about("web", "x"), about("api", "y")]).await;
        assert_eq!((events.len(), &events[0]["note"]), (1, &json!("y")), "{refusal}");
        assert!(took < Duration::from_millis(100), "{refusal} is not tried again: {took:?}");
    }
    let server = ApiServer::new();
    server.set_down(true);
    let (events, took) = posted(&server, vec![about("web", "x")]).await;
    assert!(events.is_empty() && took > Duration::from_secs(120) && took < Duration::from_secs(600), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_flood_is_paced_and_a_long_note_is_cut_between_letters() {
    let server = ApiServer::new();
    let flood = (0..60).map(|n| about(&format!("web-{n}"), "x")).collect();
    let (events, took) = posted(&server, flood).await;
    assert_eq!(events.len(), 60);
    assert!(took >= Duration::from_secs(35), "{took:?}");
    let server = ApiServer::new();
    let (events, _) =
        posted(&server, vec![about("web", &"ä".repeat(2000)), about("api", &format!("x{}", "ä".repeat(2000)))]).await;
    let lengths: Vec<usize> = events.iter().map(|event| event["note"].as_str().unwrap().len()).collect();
    assert_eq!(lengths, [1024, 1023]);
}

#[tokio::test(start_paused = true)]
async fn the_startup_taint_is_removed_against_resistance_and_nothing_else_with_it() {
    let server = ApiServer::new();
    let node = |keys: &[&str]| {
        let taints: Vec<Value> = keys.iter().map(|key| json!({"key": key, "effect": "NoSchedule"})).collect();
        json!({"kind": "Node", "apiVersion": "v1", "metadata": {"name": "node-a"}, "spec": {"taints": taints}})
    };
    let taints = || server.get(Resource::Nodes, "", "node-a").unwrap()["spec"]["taints"].clone();
    server.upsert(node(&["other", "ours"]));
    server.fail_writes([422, 500, 403, 409]);
    let (tainted, is_tainted) = watch::channel(false);
    let task = tokio::spawn(startup_taint::run(server.client(), "node-a".into(), "ours".into(), is_tainted));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(taints().as_array().unwrap().len(), 2, "nobody has said that it is there");
    tainted.send_replace(true);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(taints(), json!([{"key": "other", "effect": "NoSchedule"}]));
    drop(tainted);
    task.await.unwrap();
}
