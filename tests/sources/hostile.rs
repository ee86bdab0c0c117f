//! Objects with every field wrong in turn, through the real watchers and into the plan: nothing stops, and no other
//! Service changes. And answers that come a byte a second.

use std::sync::Arc;
use std::time::Duration;

use kubelane::k8s;
use kubelane::model::{Change, Masquerade, ObjectName};
use kubelane::objects::{Settings, SourceStatus};
use kubelane::plan::compile::Compiled;
use kubelane::plan::warnings::WarningBook;
use kubelane::plan::world::World;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::laboratory::apiserver::{Answer, ApiServer, Resource, Verb};
use crate::laboratory::hostile_objects;

/// Virtual time in which anything must have happened.
const PATIENCE: Duration = Duration::from_secs(300);
const RESOURCES: [Resource; 3] = [Resource::Services, Resource::EndpointSlices, Resource::Nodes];

struct Run {
    changes: mpsc::Receiver<Change>,
    world: World,
    book: WarningBook,
    status: Arc<SourceStatus>,
    /// Lists that came to their end.
    lists: usize,
}

impl Run {
    fn start(server: &ApiServer) -> Run {
        let (sender, changes) = mpsc::channel(64);
        let settings = Settings { node_name: "n1".into(), service_proxy_name: None };
        let status = Arc::new(SourceStatus::default());
        tokio::spawn(k8s::run(server.client(), settings, sender, status.clone()));
        Run { changes, world: World::new("n1", Masquerade::default()), book: WarningBook::default(), status, lists: 0 }
    }

    /// Applies and compiles what comes, until `done` holds.
    async fn until(&mut self, what: &str, done: impl Fn(&World, usize) -> bool) {
        while !done(&self.world, self.lists) {
            let next = tokio::time::timeout(PATIENCE, self.changes.recv()).await;
            let change = next.unwrap_or_else(|_| panic!("{what} did not come")).expect("the source goes on");
            self.lists += usize::from(matches!(change, Change::ListEnd(_)));
            self.world.apply(change, &mut self.book);
            for name in self.world.take_dirty() {
                self.world.compile(&name);
                self.world.health_check(&name);
            }
        }
        self.book.take();
    }

    fn compiled(&self, name: &str) -> Option<Compiled> {
        self.world.compile(&ObjectName::new("test", name))
    }
}

fn service(name: &str, ip: &str) -> Value {
    let spec = json!({"clusterIP": ip, "clusterIPs": [ip], "ports": [{"name": "http", "port": 80}]});
    json!({"kind": "Service", "apiVersion": "v1", "metadata": {"namespace": "test", "name": name}, "spec": spec})
}

fn server() -> ApiServer {
    let server = ApiServer::new();
    server.upsert(service("good", "10.96.1.1"));
    let labels = json!({"kubernetes.io/service-name": "good"});
    server.upsert(json!({
        "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1",
        "metadata": {"namespace": "test", "name": "good-1", "labels": labels}, "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}], "endpoints": [{"addresses": ["10.244.1.1"]}],
    }));
    let [_, _, node] = hostile_objects::whole_objects();
    server.upsert(node);
    server
}

fn lines(kind: &str, mutants: &[String]) -> String {
    mutants.iter().map(|object| format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n")).collect()
}

#[tokio::test(start_paused = true)]
async fn thousands_of_broken_objects_in_a_watch_stop_nothing_and_change_no_other_service() {
    let server = server();
    let mut run = Run::start(&server);
    run.until("the lists", |_, lists| lists == 3).await;
    let good = run.compiled("good").expect("a good Service");
    assert_eq!(good.ports[0].endpoints.len(), 1);
    let mut count = 0;
    for (resource, object) in RESOURCES.into_iter().zip(hostile_objects::whole_objects()) {
        let mutants = hostile_objects::mutants(&object);
        count += mutants.len();
        for kind in ["MODIFIED", "DELETED"] {
            server.inject(resource, &lines(kind, &mutants));
        }
    }
    println!("{count} objects");
    assert!(count > 3000, "{count}");
    // The last of each kind that is whole again shows that everything before has been read.
    let [victim, slice, node] = hostile_objects::whole_objects();
    for object in [victim, slice, node] {
        server.upsert(object);
    }
    server.upsert(service("end", "10.96.1.2"));
    let end = ObjectName::new("test", "end");
    let victim = ObjectName::new("test", "victim");
    run.until("the end", |world, _| {
        let served = world.compile(&victim).is_some_and(|v| v.ports.iter().all(|port| port.endpoints.len() == 2));
        served && world.compile(&end).is_some()
    })
    .await;
    assert_eq!(run.lists, 3, "no watch had to begin again");
    assert_eq!(run.compiled("good"), Some(good));
    assert!(run.status.services.connected());
}

#[tokio::test(start_paused = true)]
async fn a_list_full_of_broken_objects_comes_to_its_end() {
    for streaming in [true, false] {
        let server = server();
        let good = server.get(Resource::Services, "test", "good").expect("the good Service").to_string();
        let [victim, ..] = hostile_objects::whole_objects();
        let mut objects = hostile_objects::mutants(&victim);
        objects.insert(objects.len() / 2, good);
        if streaming {
            let end = json!({"k8s.io/initial-events-end": "true"});
            let bookmark = json!({"kind": "Service", "metadata": {"resourceVersion": "9", "annotations": end}});
            let all = lines("ADDED", &objects) + &lines("BOOKMARK", &[bookmark.to_string()]);
            server.script(Resource::Services, Verb::StreamingList, [Answer::Stream(all)]);
        } else {
            server.refuse_streaming();
            let head = r#"{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"9"},"items":["#;
            let list = format!("{head}{}]}}", objects.join(","));
            server.script(Resource::Services, Verb::List, [Answer::Body(200, list)]);
        }
        let mut run = Run::start(&server);
        run.until("the lists", |_, lists| lists == 3).await;
        let good = run.compiled("good").expect("the good Service is served");
        assert_eq!(good.ports[0].endpoints.len(), 1, "streaming={streaming}");
    }
}

/// A wrong version costs the watch at most: it is listed again.
#[tokio::test(start_paused = true)]
async fn a_version_that_is_wrong_costs_a_list_at_most() {
    for wrong in hostile_objects::wrongs() {
        let server = server();
        let mut run = Run::start(&server);
        run.until("the lists", |_, lists| lists == 3).await;
        let good = run.compiled("good");
        let text = service("victim", "10.96.1.3").to_string();
        let text = text.replacen("\"metadata\":{", &format!("\"metadata\":{{\"resourceVersion\":{wrong},"), 1);
        server.inject(Resource::Services, &lines("MODIFIED", &[text]));
        server.break_watches();
        server.upsert(service("end", "10.96.1.2"));
        let end = ObjectName::new("test", "end");
        run.until(&wrong[..wrong.len().min(40)], |world, _| world.compile(&end).is_some()).await;
        assert_eq!(run.compiled("good"), good, "{wrong}");
    }
}

/// What is known stays in force, the trouble is told, and ends when the server is itself again.
#[tokio::test(start_paused = true)]
async fn answers_that_come_a_byte_a_second_are_given_up_and_what_is_known_stays() {
    for streaming in [true, false] {
        let server = server();
        if !streaming {
            server.refuse_streaming();
        }
        let mut run = Run::start(&server);
        run.until("the lists", |_, lists| lists == 3).await;
        let good = run.compiled("good");
        let line = lines("ADDED", &[service("slow", "10.96.1.4").to_string()]).repeat(50);
        for verb in [Verb::List, Verb::Watch, Verb::StreamingList] {
            server.script(Resource::Services, verb, vec![Answer::Drip(line.clone()); 3]);
        }
        server.break_watches();
        server.upsert(service("meanwhile", "10.96.1.6"));
        server.compact();
        let is_told = async {
            while run.status.services.connected() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), is_told).await.expect("the trouble is told within a minute");
        assert_eq!(run.compiled("good"), good, "what is known stays");
        server.upsert(service("end", "10.96.1.2"));
        let end = ObjectName::new("test", "end");
        run.until("the end", |world, _| world.compile(&end).is_some()).await;
        assert!(run.status.services.connected());
        assert_eq!(run.compiled("good"), good);
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_restarts_in_the_middle_of_a_list_is_listed_again_and_nothing_is_lost() {
    for streaming in [true, false] {
        let server = server();
        if !streaming {
            server.refuse_streaming();
        }
        let mut run = Run::start(&server);
        run.until("the lists", |_, lists| lists == 3).await;
        let good = run.compiled("good");
        let (verb, half) = match streaming {
            true => (Verb::StreamingList, lines("ADDED", &[service("other", "10.96.1.5").to_string()])),
            false => (Verb::List, r#"{"kind":"ServiceList","metadata":{"resourceVersion":"9"},"items":[{"#.to_owned()),
        };
        server.script(Resource::Services, verb, [Answer::Broken(half.clone()), Answer::Refused, Answer::Broken(half)]);
        server.break_watches();
        server.upsert(service("meanwhile", "10.96.1.6"));
        server.compact();
        // Deleted while it was away: seen by the list that comes to its end, and by no other.
        server.upsert(service("end", "10.96.1.2"));
        let end = ObjectName::new("test", "end");
        run.until("the relist", |world, _| world.compile(&end).is_some()).await;
        run.until("its end", |world, lists| lists > 3 && world.compile(&ObjectName::new("test", "other")).is_none())
            .await;
        assert_eq!(run.compiled("good"), good, "streaming={streaming}");
    }
}
