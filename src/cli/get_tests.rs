//! Tables, JSON and YAML from a small set of map rows.

use std::io;

use super::*;
use crate::abi::{Backend, Frontend, FrontendKey, Pool, ServiceName, frontend_flag, pool_empty};
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

    fn note_changed_hands(&mut self) -> std::io::Result<()> {
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

type Render = fn(&Snapshot, Option<Output>) -> anyhow::Result<String>;

fn rendered(render: Render, output: Option<Output>) -> String {
    render(&Snapshot::read(&mut maps()).unwrap(), output).unwrap()
}

#[test]
fn services_are_shown_as_a_table_like_kubectls() {
    assert_eq!(
        rendered(services, None),
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
    let text = rendered(services, Some(Output::Wide));
    assert!(
        text.lines().next().unwrap().ends_with("ENDPOINTS                     AFFINITY   ID   ADDRESSES"),
        "{text}"
    );
    assert!(text.contains("600s       1    10.244.1.2:8080,10.244.2.2:8080\n"), "{text}");
}

#[test]
fn backends_are_shown_without_those_that_are_gone() {
    assert_eq!(
        rendered(backends, Some(Output::Wide)),
        "\
NAMESPACE   NAME   PORT   PROTOCOL   BACKEND           STATE         LOCAL   SETS            ID   GENERATION   SERVICE-ID
default     web    http   TCP        10.244.1.2:8080   Active        yes     Cluster,Local   0    4            1
default     web    http   TCP        10.244.2.2:8080   Active        no      Cluster         1    4            1
default     web    http   TCP        10.244.3.2:8080   Terminating   no      Cluster         2    4            1
"
    );
    assert!(!rendered(backends, None).contains("SETS"));
}

#[test]
fn json_and_yaml_say_the_same() {
    for render in [services as Render, backends] {
        let json: serde_json::Value = serde_json::from_str(&rendered(render, Some(Output::Json))).unwrap();
        let yaml: serde_json::Value = serde_norway::from_str(&rendered(render, Some(Output::Yaml))).unwrap();
        assert_eq!(json, yaml);
    }
    let json: serde_json::Value = serde_json::from_str(&rendered(services, Some(Output::Json))).unwrap();
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
