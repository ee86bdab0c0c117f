//! Tables, JSON and YAML from a small set of map rows.

use std::io;

use super::*;
use crate::abi::{Backend, Frontend, FrontendKey, Pool, ServiceName, frontend_flag, pool_empty};
use crate::cli::snapshot::{FrontendRecord, Snapshot};
use crate::model::Protocol;
use crate::sync::{Failure, MapIo, MapName};

/// Maps that can only be read.
#[derive(Default)]
struct Rows(Vec<(MapName, Vec<u8>, Vec<u8>)>);

impl Rows {
    fn add<K: bytemuck::Pod, V: bytemuck::Pod>(&mut self, map: MapName, key: K, value: V) {
        self.0.push((map, bytemuck::bytes_of(&key).to_vec(), bytemuck::bytes_of(&value).to_vec()));
    }
}

impl MapIo for Rows {
    fn write(&mut self, _: MapName, _: &[u8], _: &[u8], _: usize) -> Vec<Failure> {
        panic!("`get` writes nothing")
    }

    fn delete(&mut self, _: MapName, _: &[u8], _: usize) -> Vec<Failure> {
        panic!("`get` deletes nothing")
    }

    fn dump(&mut self, map: MapName, each: &mut dyn FnMut(&[u8], &[u8])) -> io::Result<()> {
        self.0.iter().filter(|(m, ..)| *m == map).for_each(|(_, key, value)| each(key, value));
        Ok(())
    }

    fn note_new_owners(&mut self) -> std::io::Result<()> {
        Ok(())
    }

    fn capacity(&self, _: MapName) -> u32 {
        1000
    }
}

fn backend(ip: &str, service_id: u32, state: u8, local: bool) -> Backend {
    let address = ip.parse::<crate::model::Ipx>().unwrap().0;
    let (flags, pools) = (u8::from(local), if local { 3 } else { 1 });
    let port_be = 8080u16.to_be_bytes();
    Backend { address, port_be, state, pools, generation: 4, service_id, protocol: 6, flags, zero: 0 }
}

/// default/web:http with a cluster IP of both families and a NodePort with policy Local; kube-system/dns without
/// endpoints.
fn maps() -> Rows {
    let mut maps = Rows::default();
    maps.add(MapName::Services, 1u32, ServiceName::new("default/web:http"));
    maps.add(MapName::Services, 2u32, ServiceName::new("kube-system/dns"));
    maps.add(MapName::Backends, 0u32, backend("10.244.1.2", 1, 1, true));
    maps.add(MapName::Backends, 1u32, backend("10.244.2.2", 1, 1, false));
    maps.add(MapName::Backends, 2u32, backend("10.244.3.2", 1, 2, false));
    maps.add(MapName::Backends, 3u32, backend("10.244.9.9", 1, 0, false));
    // Slot 4 holds backend 0, which a dump leaves out.
    maps.add(MapName::Slots, 5u32, 1u32);
    let pool = |base, count| Pool { base, count, member: 1, on_empty: 0, zero: 0 };
    let frontend =
        |service_id, flags, inside, outside| Frontend { service_id, flags, affinity_seconds: 0, inside, outside };
    let key = |ip: &str, port, protocol| FrontendKey::new(ip.parse().unwrap(), port, protocol);
    let cluster =
        Frontend { affinity_seconds: 600, ..frontend(1, frontend_flag::FRONTEND_CLUSTER_IP, pool(4, 2), pool(4, 2)) };
    maps.add(MapName::Frontends, key("fd00::a", 80, Protocol::Tcp), cluster);
    maps.add(MapName::Frontends, key("10.96.0.10", 80, Protocol::Tcp), cluster);
    let none = Pool { on_empty: pool_empty::EMPTY_DROP as u8, ..pool(0, 0) };
    maps.add(
        MapName::Frontends,
        key("0.0.0.0", 30080, Protocol::Tcp),
        frontend(1, frontend_flag::FRONTEND_NODE_PORT, pool(4, 2), none),
    );
    maps.add(
        MapName::Frontends,
        key("10.96.0.53", 53, Protocol::Udp),
        frontend(2, frontend_flag::FRONTEND_CLUSTER_IP | frontend_flag::FRONTEND_EXTERNAL_IP, pool(0, 0), pool(0, 0)),
    );
    maps
}

fn records(what: What) -> (Heads, Vec<Box<dyn Record>>) {
    let snapshot = Snapshot::read(&mut maps()).unwrap();
    let boxed = |record: FrontendRecord| Box::new(record) as Box<dyn Record>;
    match what {
        What::Backends => {
            let all = snapshot.backends().into_iter().map(|record| Box::new(record) as Box<dyn Record>);
            (heads(what), all.collect())
        }
        What::Nodeports => {
            let addresses = ["192.0.2.1", "2001:db8::1"].map(|ip| ip.parse().unwrap());
            let all = services::node_ports(snapshot.frontends(), &addresses);
            (heads(what), all.into_iter().map(|record| Box::new(record) as Box<dyn Record>).collect())
        }
        _ => (heads(what), snapshot.frontends().into_iter().map(boxed).collect()),
    }
}

fn rendered(what: What, output: Option<Output>) -> String {
    let (heads, records) = records(what);
    let mut text = Vec::new();
    let mut printer = Printer::new(&mut text, output, heads, &[], false);
    records.iter().for_each(|record| assert!(printer.row(&**record, &[]).unwrap()));
    printer.finish().unwrap();
    String::from_utf8(text).unwrap()
}

#[test]
fn a_table_is_the_same_whether_endpoints_were_read_or_counted() {
    let cells = |snapshot: Snapshot| -> Vec<(Vec<String>, String)> {
        let row = |record: FrontendRecord| {
            let cells = record.cells();
            (cells[..services::SERVICE_HEADS.narrow].to_vec(), record.state())
        };
        snapshot.frontends().into_iter().map(row).collect()
    };
    let read = cells(Snapshot::read(&mut maps()).unwrap());
    assert_eq!(cells(Snapshot::count(&mut maps()).unwrap()), read);
    assert_eq!(read.len(), 4);
}

#[test]
fn services_are_shown_as_a_table_like_kubectls() {
    assert_eq!(
        rendered(What::Services, None),
        "\
NAMESPACE     NAME   PORT   PROTOCOL   FRONTEND        KIND                   ENDPOINTS
default       web    http   TCP        10.96.0.10:80   ClusterIP              2
default       web    http   TCP        [fd00::a]:80    ClusterIP              2
default       web    http   TCP        0.0.0.0:30080   NodePort               2, from outside 0 (dropped)
kube-system   dns    -      UDP        10.96.0.53:53   ClusterIP,ExternalIP   0 (refused)
"
    );
}

#[test]
fn the_wide_table_names_affinity_ids_and_addresses() {
    let text = rendered(What::Services, Some(Output::Wide));
    assert!(
        text.lines().next().unwrap().ends_with("ENDPOINTS                     AFFINITY   ID   ADDRESSES"),
        "{text}"
    );
    assert!(text.contains("600s       1    10.244.1.2:8080,10.244.2.2:8080\n"), "{text}");
}

#[test]
fn backends_are_shown_without_those_that_are_gone() {
    assert_eq!(
        rendered(What::Backends, Some(Output::Wide)),
        "\
NAMESPACE   NAME   PORT   PROTOCOL   BACKEND           STATE         LOCAL   SETS            ID   GENERATION   SERVICE-ID
default     web    http   TCP        10.244.1.2:8080   Active        yes     Cluster,Local   0    4            1
default     web    http   TCP        10.244.2.2:8080   Active        no      Cluster         1    4            1
default     web    http   TCP        10.244.3.2:8080   Terminating   no      Cluster         2    4            1
"
    );
    assert!(!rendered(What::Backends, None).contains("SETS"));
}

#[test]
fn json_and_yaml_say_the_same() {
    for what in [What::Services, What::Backends, What::Nodeports] {
        let json: serde_json::Value = serde_json::from_str(&rendered(what, Some(Output::Json))).unwrap();
        let yaml: serde_json::Value = serde_norway::from_str(&rendered(what, Some(Output::Yaml))).unwrap();
        assert_eq!(json, yaml);
    }
    let json: serde_json::Value = serde_json::from_str(&rendered(What::Services, Some(Output::Json))).unwrap();
    let dns = &json["items"][3];
    assert_eq!(dns["namespace"], "kube-system");
    assert_eq!(dns["kinds"], serde_json::json!(["ClusterIP", "ExternalIP"]));
    assert_eq!(dns["inside"], serde_json::json!({ "endpoints": [], "whenEmpty": "refused" }));
}

#[test]
fn rows_of_another_size_are_not_guessed_at() {
    let mut maps = Rows::default();
    maps.add(MapName::Frontends, 1u32, 2u32);
    let error = Snapshot::read(&mut maps).err().unwrap().to_string();
    assert!(error.contains("\"frontends\"") && error.contains("not this version's"), "{error}");
}

#[test]
fn names_are_each_services_once_and_templates_are_about_all_of_them() {
    assert_eq!(rendered(What::Services, Some(Output::Name)), "service/default/web\nservice/kube-system/dns\n");
    let template = "jsonpath={range .items[*]}{.name}={.address}{\"\\n\"}{end}".parse().unwrap();
    let expected = "web=10.96.0.10:80\nweb=[fd00::a]:80\nweb=0.0.0.0:30080\ndns=10.96.0.53:53\n";
    assert_eq!(rendered(What::Services, Some(template)), expected);
}

#[test]
fn an_empty_answer_is_an_empty_list_or_the_heads() {
    let empty = |output, no_headers| {
        let mut text = Vec::new();
        Printer::new(&mut text, output, heads(What::Snat), &[], no_headers).finish().unwrap();
        String::from_utf8(text).unwrap()
    };
    assert_eq!(empty(None, false), "BACKEND   PROTOCOL   SOURCE   PORTS\n");
    assert_eq!(empty(None, true), "");
    assert_eq!(empty(Some(Output::Json), false), "{\n  \"items\": []\n}\n");
    assert_eq!(empty(Some(Output::Yaml), false), "items: []\n");
}

#[test]
fn a_filter_takes_what_has_all_that_is_asked_for() {
    let shown = |what: What, filter: Filter| -> Vec<String> {
        let (_, records) = records(what);
        records.iter().filter(|record| filter.takes(&***record)).map(|record| record.cells()[4].clone()).collect()
    };
    let none = Filter::default;
    let (namespace, name) = (Some("kube-system".to_owned()), Some("web".to_owned()));
    assert_eq!(shown(What::Services, Filter { namespace, ..none() }), ["10.96.0.53:53"]);
    assert_eq!(shown(What::Services, Filter { name, ..none() }).len(), 3);
    let address = |text: &str| Filter { address: Some(text.parse().unwrap()), ..none() };
    assert_eq!(shown(What::Services, address("10.96.0.53")), ["10.96.0.53:53"]);
    assert_eq!(shown(What::Services, address("10.244.2.2")).len(), 3, "whose backend it is");
    assert_eq!(shown(What::Nodeports, address("192.0.2.1")), ["30080"]);
    let state = |text: &str| Filter { state: Some(text.to_owned()), ..none() };
    assert_eq!(shown(What::Backends, state("Terminating")), ["10.244.3.2:8080"]);
    assert_eq!(shown(What::Services, state("refused")), ["10.96.0.53:53"]);
    for (service, count) in [("default/web", 3), ("default/web:http", 3), ("default/web:https", 0), ("default/dns", 0)]
    {
        let filter = Filter { service: Some(service.parse().unwrap()), ..none() };
        assert_eq!(shown(What::Services, filter).len(), count, "{service}");
    }
    for bad in ["", "web", "/web", "default/", "a/b/c"] {
        assert!(bad.parse::<ServiceFilter>().is_err(), "{bad}");
    }
}

#[test]
fn ipvsadms_lines_are_those_that_its_users_read() {
    let frontends = Snapshot::read(&mut maps()).unwrap().frontends();
    let mut connections = ipvsadm::Connections::new();
    let at = |text: &str| text.parse().unwrap();
    connections.insert((at("192.0.2.1:30080"), at("10.244.2.2:8080")), (7, 2));
    let text = ipvsadm::text(&frontends, &["192.0.2.1".parse().unwrap()], &connections);
    let lines: Vec<&str> = text.lines().skip(1).collect();
    assert_eq!(
        lines,
        [
            "Prot LocalAddress:Port Scheduler Flags",
            "  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn",
            "TCP  10.96.0.10:80 random persistent 600",
            "  -> 10.244.1.2:8080              Masq    1      0          0         ",
            "  -> 10.244.2.2:8080              Masq    1      0          0         ",
            "TCP  [fd00::a]:80 random persistent 600",
            "  -> 10.244.1.2:8080              Masq    1      0          0         ",
            "  -> 10.244.2.2:8080              Masq    1      0          0         ",
            "TCP  192.0.2.1:30080 random",
            "  -> 10.244.1.2:8080              Masq    1      0          0         ",
            "  -> 10.244.2.2:8080              Masq    1      7          2         ",
            "UDP  10.96.0.53:53 random",
        ]
    );
}

#[test]
fn orders_are_by_size_for_numbers_and_by_text_for_all_else() {
    use std::cmp::Ordering::{Greater, Less};
    let compare = |a: Value, b: Value| compare(Some(&a), Some(&b));
    assert_eq!(compare(9.into(), 10.into()), Less);
    assert_eq!(compare("9".into(), "10".into()), Greater);
    assert_eq!(super::compare(None, Some(&Value::from(1))), Less);
}
