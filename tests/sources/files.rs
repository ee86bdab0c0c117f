//! The directory source on real directories: what is read, how changes are followed, and what a broken file costs.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::laboratory::apiserver::seen::Seen;
use crate::laboratory::apiserver::{ApiServer, recorded};
use kubelane::files;
use kubelane::model::{Change, Kind};
use kubelane::objects::{Settings, SourceStatus};
use tempfile::TempDir;
use tokio::sync::mpsc;

const PATIENCE: Duration = Duration::from_secs(10);

struct Source {
    /// The directory's parent: the directory itself may be moved and made again.
    parent: TempDir,
    directory: PathBuf,
    changes: mpsc::Receiver<Change>,
    status: Arc<SourceStatus>,
    seen: Seen,
}

impl Source {
    /// A source on a directory of these files, loaded.
    async fn start(files: &[(&str, &str)]) -> Self {
        let parent = TempDir::new().unwrap();
        let directory = parent.path().join("objects");
        fs::create_dir(&directory).unwrap();
        for (name, text) in files {
            fs::write(directory.join(name), text).unwrap();
        }
        Source::on(parent, directory).await
    }

    async fn on(parent: TempDir, directory: PathBuf) -> Self {
        let (sender, changes) = mpsc::channel(64);
        let status = Arc::new(SourceStatus::default());
        let settings = Settings { node_name: "n1".into(), service_proxy_name: None };
        let run = files::run(directory.clone(), settings, sender, status.clone());
        tokio::spawn(async move { run.await.unwrap() });
        let mut source = Source { parent, directory, changes, status, seen: Seen::default() };
        source.until("the first load", |s| s.lists(Kind::Node) == 1).await;
        source
    }

    async fn until(&mut self, what: &str, done: impl Fn(&Seen) -> bool) {
        self.seen.until(&mut self.changes, PATIENCE, what, done).await;
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.directory.join(name), text).unwrap();
    }

    /// As editors save: into a temporary, then over the file.
    fn save(&self, name: &str, text: &str) {
        let temporary = self.directory.join(format!(".{name}.tmp"));
        fs::write(&temporary, text).unwrap();
        fs::rename(temporary, self.directory.join(name)).unwrap();
    }

    fn ip(&self, service: &str) -> String {
        self.seen.services.get(service).map(|s| s.cluster_ips[0].to_string()).unwrap_or_default()
    }
}

fn service(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  clusterIP: {ip}\n  ports:\n  - port: 80\n"
    )
}

fn slice(name: &str, service: &str, ip: &str) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}\n  labels:\n    \
         kubernetes.io/service-name: {service}\naddressType: IPv4\nports:\n- port: 8080\nendpoints:\n- addresses: [{ip}]\n"
    )
}

fn node(name: &str, zone: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Node\nmetadata:\n  name: {name}\n  labels:\n    topology.kubernetes.io/zone: {zone}\n"
    )
}

#[tokio::test]
async fn yaml_json_lists_and_multi_document_files_are_read_and_other_kinds_are_not() {
    let multi = format!(
        "{}---\n{}---\n{}---\nkind: Deployment\napiVersion: apps/v1\nspec: {{ports: 3}}\n",
        service("a", "10.0.0.1"),
        slice("a-1", "a", "10.1.0.1"),
        node("n1", "z1")
    );
    let json = r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"b"},"spec":{"clusterIP":"10.0.0.2","ports":[{"port":80}]}}"#;
    let flow = "{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: Service, metadata: {name: c}, spec: {clusterIP: 10.0.0.3}}]}";
    let block = "apiVersion: v1\nkind: ServiceList\nitems:\n- metadata: {name: d}\n  spec: {clusterIP: 10.0.0.4}\n- metadata: {name: e}\n  spec:\n    clusterIP: 10.0.0.5\n";
    let anchors = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata: {name: f}\n  spec: &s\n    clusterIP: 10.0.0.6\n- apiVersion: v1\n  kind: Service\n  metadata: {name: g}\n  spec: *s\n";
    let knative =
        "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: k}\nspec: {clusterIP: 7, ports: no}\n";
    let source = Source::start(&[
        ("multi.yaml", &multi),
        ("b.json", json),
        ("flow.yml", flow),
        ("block.yaml", block),
        ("anchors.yaml", anchors),
        ("knative.yaml", knative),
        ("other-node.yaml", &node("n2", "z2")),
        (".hidden.yaml", "{"),
        ("web.yaml~", "{"),
        ("#web.yaml#", "{"),
        ("readme.txt", "{"),
    ])
    .await;
    assert_eq!(source.seen.warnings, Default::default());
    let names = ["default/a", "default/b", "default/c", "default/d", "default/e", "default/f", "default/g"];
    assert_eq!(source.seen.services.keys().collect::<Vec<_>>(), names);
    assert_eq!(source.ip("default/g"), "10.0.0.6");
    assert_eq!(source.seen.slices.len(), 1);
    assert_eq!(source.seen.node.as_ref().unwrap().zone.as_deref(), Some("z1"));
    for kind in [Kind::Services, Kind::EndpointSlices, Kind::Node] {
        assert_eq!((source.seen.begun(kind), source.seen.lists(kind)), (1, 1));
    }
    assert!(source.status.all().iter().all(|(_, s)| s.connected() && s.listed()));
}

#[tokio::test]
async fn recorded_lists_load_from_files_as_from_the_server() {
    let (services, slices, nodes) =
        (recorded("services.json"), recorded("endpointslices.json"), recorded("nodes.json"));
    let files = [("services.json", &*services), ("slices.json", &*slices), ("nodes.json", &*nodes)];
    let from_files = Source::start(&files).await;
    let server = ApiServer::with_recorded_lists();
    let (sender, mut changes) = mpsc::channel(64);
    let settings = Settings { node_name: "n1".into(), service_proxy_name: None };
    tokio::spawn(kubelane::k8s::run(server.client(), settings, sender, Arc::default()));
    let mut from_server = Seen::default();
    let kinds = [Kind::Services, Kind::EndpointSlices, Kind::Node];
    from_server.until(&mut changes, PATIENCE, "lists", |s| kinds.iter().all(|k| s.lists(*k) > 0)).await;
    assert_eq!(from_files.seen.services, from_server.services);
    assert_eq!(from_files.seen.slices, from_server.slices);
    assert_eq!(from_files.seen.node, from_server.node);
}

#[tokio::test]
async fn changes_are_followed_however_a_file_is_saved() {
    let mut source = Source::start(&[("a.yaml", &service("a", "10.0.0.1"))]).await;
    source.write("a.yaml", &service("a", "10.0.0.2"));
    source.until("a write", |s| s.services["default/a"].cluster_ips[0].to_string() == "10.0.0.2").await;
    source.save("a.yaml", &service("a", "10.0.0.3"));
    source.until("a rename over the file", |s| s.services["default/a"].cluster_ips[0].to_string() == "10.0.0.3").await;
    source.write("b.yaml", &service("b", "10.0.1.1"));
    source.until("a new file", |s| s.services.contains_key("default/b")).await;
    fs::hard_link(source.directory.join("b.yaml"), source.directory.join("c.yaml")).unwrap();
    source.until("a hard link", |s| s.warnings.contains_key("Service default/b")).await;
    fs::remove_file(source.directory.join("c.yaml")).unwrap();
    source.until("the link is gone", |s| s.warnings.is_empty()).await;
    fs::rename(source.directory.join("b.yaml"), source.parent.path().join("b.yaml")).unwrap();
    source.until("a file moved away", |s| !s.services.contains_key("default/b")).await;
    symlink(source.parent.path().join("b.yaml"), source.directory.join("link.yaml")).unwrap();
    source.until("a symbolic link", |s| s.services.contains_key("default/b")).await;
    fs::remove_file(source.directory.join("a.yaml")).unwrap();
    source.until("a deleted file", |s| !s.services.contains_key("default/a")).await;
    assert_eq!(source.seen.warnings, Default::default());
}

#[tokio::test]
async fn a_file_is_not_read_while_it_is_being_written() {
    use std::io::Write;
    let mut source = Source::start(&[("a.yaml", &service("a", "10.0.0.1"))]).await;
    let mut file = fs::File::create(source.directory.join("a.yaml")).unwrap();
    file.write_all(service("a", "10.0.0.2").as_bytes()).unwrap();
    file.write_all(b"---\n").unwrap();
    source.seen.settle(&mut source.changes, Duration::from_millis(200)).await;
    assert_eq!(source.ip("default/a"), "10.0.0.1", "half a file is not a change");
    file.write_all(service("b", "10.0.0.3").as_bytes()).unwrap();
    drop(file);
    source.until("the closed file", |s| s.services.contains_key("default/b")).await;
    assert_eq!(source.ip("default/a"), "10.0.0.2");
}

#[tokio::test]
async fn only_what_changed_in_a_file_is_sent() {
    let text = |ip: &str| {
        let mut text = String::from("apiVersion: v1\nkind: List\nitems:\n");
        for i in 0..100 {
            let ip = if i == 42 { ip.to_owned() } else { format!("10.0.1.{i}") };
            text += &format!(
                "- apiVersion: v1\n  kind: Service\n  metadata:\n    name: s{i}\n  spec:\n    clusterIP: {ip}\n"
            );
        }
        text
    };
    let mut source = Source::start(&[("all.yaml", &text("10.0.2.1"))]).await;
    let before = source.seen.counts.0;
    source.save("all.yaml", &text("10.0.2.2"));
    source.until("the change", |s| s.services["default/s42"].cluster_ips[0].to_string() == "10.0.2.2").await;
    source.seen.settle(&mut source.changes, Duration::from_millis(100)).await;
    assert_eq!(source.seen.counts.0, before + 1);
    // The same text in another order and with other comments is no change at all.
    source.save("all.yaml", &format!("# head\n{}", text("10.0.2.2")));
    source.save("b.yaml", &service("b", "10.0.3.1"));
    source.until("what follows", |s| s.services.contains_key("default/b")).await;
    assert_eq!(source.seen.counts.0, before + 2);
}

#[tokio::test]
async fn a_broken_file_is_named_by_line_and_reason_and_its_last_good_state_stays() {
    let cases = [
        ("syntax", "apiVersion: v1\nkind: Service\nmetadata: {name: a\nspec:\n", 4),
        ("type", "# head\napiVersion: v1\nkind: Service\nmetadata:\n  name: a\nspec:\n  ports:\n  - name: [http]\n", 8),
        (
            "second document",
            "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {clusterIP: 10.0.0.9}\n---\n\nkind: [\n",
            0,
        ),
        (
            "item",
            "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata: {name: x}\n- apiVersion: v1\n  kind: Service\n  metadata:\n    name: [a]\n",
            10,
        ),
        ("name", "kind: Pod\napiVersion: v1\n---\napiVersion: v1\nkind: Service\nmetadata: {}\n", 4),
        ("no object", "just text\n", 1),
        ("a sequence", "- - - -\n", 1),
    ];
    for (what, text, line) in cases {
        let mut source =
            Source::start(&[("a.yaml", &service("a", "10.0.0.1")), ("b.yaml", &service("b", "10.0.0.2"))]).await;
        source.save("a.yaml", text);
        source.until(what, |s| s.warnings.contains_key("file a.yaml")).await;
        let message = source.seen.warnings["file a.yaml"][0].clone();
        assert!(message.ends_with("its last good state stays in force"), "{what}: {message}");
        assert!(line == 0 || message.starts_with(&format!("line {line}: ")), "{what}: {message}");
        assert!(!message.contains('\n'), "{what}: {message}");
        assert_eq!((source.ip("default/a").as_str(), source.seen.services.len()), ("10.0.0.1", 2), "{what}");
        source.save("a.yaml", &service("a", "10.0.0.3"));
        source
            .until(what, |s| s.warnings.is_empty() && s.services["default/a"].cluster_ips[0].to_string() == "10.0.0.3")
            .await;
    }
}

#[tokio::test]
async fn a_file_that_is_broken_at_the_start_does_not_stop_the_others() {
    let json = "{\"kind\":\"Service\",\n\"apiVersion\":}";
    let mut source =
        Source::start(&[("a.json", json), ("b.yaml", &service("b", "10.0.0.2")), ("c.yaml", "\u{1}")]).await;
    fs::write(source.directory.join("latin.yaml"), b"kind: x\nname: \xe9\n").unwrap();
    source.until("the third", |s| s.warnings.len() == 3).await;
    assert!(source.seen.warnings["file a.json"][0].starts_with("line 2: "), "{:?}", source.seen.warnings);
    assert!(source.seen.warnings["file a.json"][0].ends_with("the file is not used"));
    assert_eq!(source.seen.warnings["file latin.yaml"][0], "line 2: the text is not UTF-8: the file is not used");
    assert_eq!(source.ip("default/b"), "10.0.0.2");
    fs::remove_file(source.directory.join("a.json")).unwrap();
    source.until("its warning goes with it", |s| !s.warnings.contains_key("file a.json")).await;
}

#[tokio::test]
async fn of_duplicates_the_first_file_wins_and_the_next_takes_over() {
    let twice = format!("{}---\n{}", service("a", "10.0.0.2"), service("a", "10.0.0.3"));
    let mut source = Source::start(&[("2.yaml", &twice), ("1.yaml", &service("a", "10.0.0.1"))]).await;
    assert_eq!(source.ip("default/a"), "10.0.0.1");
    let warning = |seen: &Seen| seen.warnings.get("Service default/a").map(|w| w[0].clone()).unwrap_or_default();
    assert_eq!(warning(&source.seen), "it is in 1.yaml and in 2.yaml: the one in 1.yaml is used");
    fs::remove_file(source.directory.join("1.yaml")).unwrap();
    source
        .until("the next file takes over", |s| s.services["default/a"].cluster_ips[0].to_string() == "10.0.0.2")
        .await;
    source.until("another warning", |s| warning(s) == "it is in 2.yaml more than once: the first one is used").await;
    source.save("2.yaml", &service("a", "10.0.0.3"));
    source
        .until("the second place takes over", |s| s.services["default/a"].cluster_ips[0].to_string() == "10.0.0.3")
        .await;
    source.until("no warning is left", |s| s.warnings.is_empty()).await;
    source.save("0.yaml", &service("a", "10.0.0.4"));
    source
        .until("an earlier file comes first", |s| s.services["default/a"].cluster_ips[0].to_string() == "10.0.0.4")
        .await;
    source.save("0.yaml", &service("other", "10.0.0.5"));
    source
        .until("it holds something else now", |s| s.services["default/a"].cluster_ips[0].to_string() == "10.0.0.3")
        .await;
    source.until("no warning is left", |s| s.warnings.is_empty()).await;
}

#[tokio::test]
async fn the_first_place_in_a_file_stays_first_when_it_is_edited() {
    let text = |first: &str| format!("{}---\n{}", service("a", first), service("a", "10.0.0.9"));
    let mut source = Source::start(&[("a.yaml", &text("10.0.0.1"))]).await;
    source.save("a.yaml", &text("10.0.0.2"));
    source.until("the edit", |s| s.services["default/a"].cluster_ips[0].to_string() == "10.0.0.2").await;
}

#[tokio::test]
async fn an_object_with_bad_fields_is_served_without_them_and_warned_of() {
    let bad = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  clusterIP: 10.0.0.1\n  externalIPs: [2001:db8::1, 0400.0.0.1, 192.0.2.1]\n  sessionAffinity: ClientIP\n  sessionAffinityConfig: {clientIP: {timeoutSeconds: 90000}}\n  ports:\n  - {name: ok, port: 80}\n  - {name: big, port: 70000}\n  - {name: text, port: http}\n  -\n  - {name: odd, port: 81, protocol: QUIC}\n";
    let endpoints = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: a-1, labels: {kubernetes.io/service-name: a}}\naddressType: IPv4\nports: [{port: 8080}, {name: all, port: null}, {name: zero, port: 0}]\nendpoints:\n- addresses: [10.1.0.1]\n- addresses: ['fd00::1']\n- addresses: [10.1.0.300]\n- addresses: []\n";
    let mut source = Source::start(&[("a.yaml", bad), ("b.yaml", endpoints)]).await;
    let a = &source.seen.services["default/a"];
    assert_eq!((a.ports.len(), a.external_ips.len(), a.affinity_seconds), (1, 1, Some(10_800)));
    assert_eq!(source.seen.warnings["Service default/a"].len(), 7, "{:#?}", source.seen.warnings);
    let slice = &source.seen.slices["default/a-1"];
    assert_eq!((slice.endpoints.len(), slice.ports.len()), (1, 1));
    assert_eq!(source.seen.warnings["EndpointSlice default/a-1"].len(), 4, "{:#?}", source.seen.warnings);
    source.save("a.yaml", &service("a", "10.0.0.1"));
    source.save("b.yaml", &self::slice("a-1", "a", "10.1.0.1"));
    source.until("all is well", |s| s.warnings.is_empty()).await;
}

#[tokio::test]
async fn what_stops_being_ours_is_gone() {
    let mut source =
        Source::start(&[("a.yaml", &service("a", "10.0.0.1")), ("b.yaml", &slice("b", "a", "10.1.0.1"))]).await;
    source.save("a.yaml", &service("a", "None"));
    source.until("a headless Service", |s| s.services.is_empty()).await;
    source.save("a.yaml", &service("a", "10.0.0.1"));
    source.until("it is back", |s| s.services.len() == 1).await;
    let labelled =
        slice("b", "a", "10.1.0.1").replace("  labels:\n", "  labels:\n    service.kubernetes.io/headless: \"\"\n");
    source.save("b.yaml", &labelled);
    source.until("a headless slice", |s| s.slices.is_empty()).await;
    source.save("a.yaml", &service("a", "10.0.0.1").replace("spec:", "spec:\n  type: ExternalName"));
    source.until("an ExternalName Service", |s| s.services.is_empty()).await;
    assert_eq!(source.seen.warnings, Default::default());
}

#[tokio::test]
async fn a_config_map_volume_changes_all_at_once() {
    let parent = TempDir::new().unwrap();
    let directory = parent.path().join("volume");
    let version = |number: u8, files: &[(&str, &str)]| {
        let data = directory.join(format!("..2026_{number}"));
        fs::create_dir_all(&data).unwrap();
        files.iter().for_each(|(name, text)| fs::write(data.join(name), text).unwrap());
        symlink(data.file_name().unwrap(), directory.join("..data_tmp")).unwrap();
        fs::rename(directory.join("..data_tmp"), directory.join("..data")).unwrap();
    };
    version(1, &[("a.yaml", &service("a", "10.0.0.1")), ("b.yaml", &service("b", "10.0.0.2"))]);
    for name in ["a.yaml", "b.yaml"] {
        symlink(Path::new("..data").join(name), directory.join(name)).unwrap();
    }
    let mut source = Source::on(parent, directory.clone()).await;
    assert_eq!(source.seen.services.len(), 2);
    version(2, &[("a.yaml", &service("a", "10.0.0.9"))]);
    source.until("the swap", |s| !s.services.contains_key("default/b")).await;
    assert_eq!(source.ip("default/a"), "10.0.0.9");
}

#[tokio::test]
async fn a_directory_that_is_made_again_is_followed() {
    let mut source = Source::start(&[("a.yaml", &service("a", "10.0.0.1"))]).await;
    fs::rename(&source.directory, source.parent.path().join("away")).unwrap();
    while source.status.services.connected() {
        source.seen.settle(&mut source.changes, Duration::from_millis(20)).await;
    }
    assert_eq!(source.ip("default/a"), "10.0.0.1", "its last content stays in force while it is away");
    fs::create_dir(&source.directory).unwrap();
    source.write("b.yaml", &service("b", "10.0.0.2"));
    source.until("the new directory", |s| s.services.contains_key("default/b") && s.services.len() == 1).await;
    fs::remove_dir_all(&source.directory).unwrap();
    source.until("its files were deleted", |s| s.services.is_empty()).await;
    fs::create_dir(&source.directory).unwrap();
    source.write("c.yaml", &service("c", "10.0.0.3"));
    source.until("the third directory", |s| s.services.contains_key("default/c")).await;
    source.save("c.yaml", &service("c", "10.0.0.4"));
    source.until("it is followed", |s| s.services["default/c"].cluster_ips[0].to_string() == "10.0.0.4").await;
}

#[tokio::test]
async fn a_directory_that_cannot_be_opened_is_named() {
    for path in ["/nonexistent/objects", "/etc/hostname"] {
        let (sender, _changes) = mpsc::channel(1);
        let error = files::run(path.into(), Settings::default(), sender, Arc::default()).await.unwrap_err();
        assert!(format!("{error:#}").contains(path), "{error:#}");
    }
}

#[tokio::test]
async fn the_source_ends_when_nobody_listens() {
    let parent = TempDir::new().unwrap();
    let (sender, receiver) = mpsc::channel(64);
    let source = tokio::spawn(files::run(parent.path().into(), Settings::default(), sender, Arc::default()));
    tokio::time::sleep(Duration::from_millis(20)).await;
    drop(receiver);
    tokio::time::timeout(PATIENCE, source).await.expect("it ends").unwrap().unwrap();
}
